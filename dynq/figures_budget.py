"""Pictures of a budget: what every size can reach, and what a draft makes of one. See `dynq.figures`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dynq import formats
from dynq.figures import BLUE, GREEN, NATS, ORANGE, Picture, html_table, styled

if TYPE_CHECKING:
    from dynq.editing import Draft

_FEWEST, _MOST = 1.5, 8.5  # bits per weight at the ends of the scale


def format_colours(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Format -> its colour on the Viridis scale by the logarithm of its bits, and black or white to write on it.

    Viridis (S. van der Walt and N. Smith, matplotlib 2.0, 2015) rises evenly in lightness, so the colour-blind and a
    grey print keep the order, and tells 2 to 6 bits apart better than Cividis. Contrast as WCAG 2 defines it.
    """
    found = {}
    for name in names:
        part = np.log(formats.get(name).bpw / _FEWEST) / np.log(_MOST / _FEWEST)
        (colour,) = sample_colorscale("Viridis", [float(np.clip(part, 0, 1))])
        channels = [int(c) / 255 for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        found[name] = colour, "#000000" if luminance > 0.179 else "#ffffff"
    return found


def predicted_frontier(draft: "Draft") -> Picture:
    """The predicted KLD of the best recipe of every size, of llama.cpp's mixes, and of the draft."""
    line, totals = draft.budget.frontier(), draft.totals()
    mixes = [mix for mix in draft.budget.mixes if mix.kld is not None]
    shown = (line.kld > 0) & (line.tensor_bytes <= 1.15 * max([totals.tensor_bytes, *(m.tensor_bytes for m in mixes)]))
    keep = np.unique(np.linspace(0, shown.sum() - 1, 200).astype(int))
    figure = go.Figure()
    figure.add_scatter(
        x=[float(x) / 1e6 for x in line.tensor_bytes[shown][keep]],
        y=[float(y) for y in line.kld[shown][keep]],
        mode="lines",
        name="the best of every size",
        line={"color": BLUE, "width": 1.5},
    )
    figure.add_scatter(
        x=[mix.tensor_bytes / 1e6 for mix in mixes],
        y=[mix.kld for mix in mixes],
        text=[mix.name for mix in mixes],
        textposition="top right",
        mode="markers+text",
        name="llama.cpp's mixes",
        marker={"color": ORANGE, "size": 8},
    )
    figure.add_scatter(
        x=[totals.tensor_bytes / 1e6],
        y=[totals.kld],
        mode="markers",
        name=totals.target,
        marker={"color": GREEN, "size": 14, "symbol": "star"},
    )
    styled(figure, "Predicted divergence at a size", 460)
    figure.update_xaxes(title="tensor data, MB (10^6 bytes)")
    figure.update_yaxes(title="predicted KLD, nats per token", **NATS)
    sizes: list[tuple[str, int, float | None]] = [(f"draft for {totals.target}", totals.tensor_bytes, totals.kld)]
    sizes += [(mix.name, mix.tensor_bytes, mix.kld) for mix in draft.budget.mixes]
    rows: list[dict[str, Any]] = [
        {
            "recipe": name,
            "tensor bytes": size,
            "bpw": 8 * size / draft.budget.n_weights,
            "predicted KLD": kld,
            "the best of this size": float(np.interp(size, line.tensor_bytes, line.kld)),
        }
        for name, size, kld in sizes
    ]
    rows.sort(key=lambda row: row["tensor bytes"])
    return Picture(figure, html_table(rows, "Predicted KLD in nats per token"))


def layer_formats(draft: "Draft") -> Picture:
    """What part of each layer's weights every format takes, as stacked bars."""
    shares = draft.layer_shares()
    names = sorted({fmt for parts in shares.values() for fmt in parts}, key=lambda fmt: (formats.get(fmt).bpw, fmt))
    layers = ["no layer" if layer is None else str(layer) for layer in shares]
    colours = format_colours(names)
    figure = go.Figure()
    for fmt in names:
        parts = [100 * own.get(fmt, 0.0) for own in shares.values()]
        figure.add_bar(x=layers, y=parts, name=fmt, marker={"color": colours[fmt][0]})
    styled(figure, "Formats in each layer", barmode="stack")
    figure.update_xaxes(title="layer", type="category").update_yaxes(title="part of the weights, %")
    rows = [
        {"layer": layer} | {fmt: 100 * own[fmt] if fmt in own else None for fmt in names}
        for layer, own in zip(layers, shares.values(), strict=True)
    ]
    return Picture(figure, html_table(rows, "Part of a layer's weights in each format, %"))
