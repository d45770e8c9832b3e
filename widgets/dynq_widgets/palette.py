"""The formats' colours, for the browser."""

from collections.abc import Iterable
from typing import Any

from dynq import formats
from dynq.figures_budget import format_colours


def palette(names: Iterable[str]) -> dict[str, Any]:
    """Format -> bits per weight, colour and the colour to write on it; fewest bits first."""
    ordered = sorted(names, key=lambda fmt: (formats.get(fmt).bpw, fmt))
    colours = format_colours(ordered)
    return {fmt: {"bpw": formats.get(fmt).bpw, "colour": colours[fmt][0], "ink": colours[fmt][1]} for fmt in ordered}
