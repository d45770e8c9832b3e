"""A block drawn as SVG: its weights before and after, and its bits, without JavaScript.

Bits stand as one writes them, the highest of a byte first; the colour is the kind of number, solid is 1 and pale is 0.
Paths hold many cells each, so that a saved notebook stays small; `Drawing.geometry` tells a script where a weight and a
bit lie. Texts take the page's own colour, light or dark.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dynq import formats
from dynq.blocks import Block, ByHand
from dynq.layout import Field, layout

WIDTH, LEFT, RIGHT = 860, 76, 8
COLOURS = {
    "d": "#D55E00",
    "dmin": "#CC79A7",
    "m": "#CC79A7",
    "scale": "#E69F00",
    "min": "#56B4E9",
    "shift": "#56B4E9",
    "signs": "#009E73",
    "entry": "#0072B2",
    "code": "#0072B2",
    "trits": "#0072B2",
    "unused": "#999999",
}
"""Colour of each kind of field, of Okabe and Ito's palette."""
ORIGINAL, DECODED, WEIGHED = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class Drawing:
    """An SVG, and where things are in it: {"weights": {x, step, top, bottom}, "bits": {x, y, cell, gap, row, columns}}.

    Bit i of byte k is at x + (k % columns) (8 cell + gap) + (7 - i) cell, y + (k // columns) row.
    """

    svg: str
    geometry: dict[str, Any]


def draw(block: Block, mark: int | None = None) -> Drawing:
    """The whole block: weights, importance and error above, bits below. mark: a weight whose bits are framed."""
    weights, bottom, place = _weights(block)
    bits, height, cells = _bits(block.format, block.data, bottom + 26, mark)
    return Drawing(_document([*weights, *bits], height), {"weights": place, "bits": cells})


def draw_layout(fmt: str, mark: int | None = None) -> str:
    """A format's block without contents: which bits are what. mark: a weight whose bits are framed."""
    parts, height, _ = _bits(fmt, None, 4, mark)
    return _document(parts, height)


def draw_line(hand: ByHand, scale: float) -> str:
    """A block's weights on a line, as large as they are important, and the levels of one scale under them.

    The live view has the same picture with a scale to drag.
    """
    ends = float(np.abs(hand.weights).max()) * 1.15
    x = lambda value: LEFT + (value + ends) / (2 * ends) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    decoded = hand.decoded(scale)
    links = "".join(f"M{x(w):.1f} 56L{x(v):.1f} 100" for w, v in zip(hand.weights, decoded, strict=True))
    shown = [x(v) for v in hand.levels * scale if abs(v) <= ends]
    radii = 2 + 1.8 * np.sqrt(hand.importance)
    parts = [
        _text(LEFT - 8, 54, "weights", "end"),
        _text(LEFT - 8, 106, "levels", "end"),
        _path(links, "#999999", 1),
        *(
            f'<circle cx="{x(w):.1f}" cy="50" r="{r:.1f}" fill="{ORIGINAL}" fill-opacity=".55"/>'
            for w, r in zip(hand.weights, radii, strict=True)
        ),
        _path("".join(f"M{at:.1f} 96v14" for at in shown), stroke=DECODED, width=2),
        _text(x(0), 128, "0", "middle"),
        _text(x(-ends / 1.15), 128, f"{-ends / 1.15:.3g}", "middle"),
        _text(x(ends / 1.15), 128, f"{ends / 1.15:.3g}", "middle"),
    ]
    return _document(parts, 136)


# --- the parts --------------------------------------------------------------------------------------------------------


def _weights(block: Block) -> tuple[list[str], int, dict[str, float]]:
    """Three bands: weights, importance, weighted error. Drawn only where they are known."""
    n = len(block.decoded)
    step = (WIDTH - LEFT - RIGHT) / n
    middle = [LEFT + (i + 0.5) * step for i in range(n)]
    values = [block.decoded] if block.original is None else [block.original, block.decoded]
    ends = max(float(np.abs(v).max()) for v in values) or 1.0
    y = lambda value: 92 - 76 * float(value) / ends  # noqa: E731
    groups = sorted({len(f.weights) for f in layout(block.format).fields if f.kind in ("scale", "entry")})
    size = groups[-1] if groups and groups[-1] < n else 0
    half = max(min(step * 0.42, 5), 1)
    parts = [
        _path("".join(f"M{LEFT + at * step:.1f} 14V170" for at in range(size or n, n, size or n)), "#999999", 0.5),
        _path(f"M{LEFT} 92H{WIDTH - RIGHT}", "#999999", 1),
        _text(LEFT - 8, 22, f"{ends:.3g}", "end"),
        _text(LEFT - 8, 96, "0", "end"),
        _text(LEFT - 8, 172, f"{-ends:.3g}", "end"),
        _path(
            "".join(f"M{x - half:.1f} {y(v):.1f}h{2 * half:.1f}" for x, v in zip(middle, block.decoded, strict=True)),
            DECODED,
            2,
        ),
    ]
    legend = [("stored", DECODED)]
    if block.original is not None:
        dots = "".join(f"M{x:.1f} {y(v):.1f}h0" for x, v in zip(middle, block.original, strict=True))
        parts.append(_path(dots, ORIGINAL, 4, 'stroke-linecap="round"'))
        legend.insert(0, ("original", ORIGINAL))
    bottom = 176
    for name, heights in _bands(block):
        top = bottom + 8
        tall = heights / max(float(heights.max()), 1e-300) * 34
        bars = "".join(f"M{x:.1f} {top + 34}v{-h:.1f}" for x, h in zip(middle, tall, strict=True) if h > 0.05)
        parts += [_path(bars, WEIGHED, 2 * half), _text(LEFT - 8, top + 22, name, "end")]
        bottom = top + 36
    x = WIDTH - RIGHT - 76 * len(legend)
    for name, colour in legend:
        parts += [f'<rect x="{x}" y="1" width="10" height="10" fill="{colour}"/>', _text(x + 14, 10, name)]
        x += 76
    return parts, bottom, {"x": LEFT, "step": step, "top": 14, "bottom": bottom}


def _bands(block: Block) -> Iterable[tuple[str, np.ndarray]]:
    if block.importance is not None:
        yield "importance", block.importance
    if block.original is not None:
        weight = 1 if block.importance is None else block.importance
        yield "error", weight * np.square(block.original - block.decoded, dtype=np.float64)


def _bits(fmt: str, data: np.ndarray | None, top: int, mark: int | None) -> tuple[list[str], int, dict[str, float]]:
    size = formats.get(fmt).block_bytes
    columns, cell, gap, tall, row = (8, 11, 9, 15, 19) if size <= 40 else (16, 5.6, 4, 9, 13)
    place = {"x": LEFT, "y": top + 22, "cell": cell, "gap": gap, "row": row, "columns": columns, "tall": tall}
    cells: dict[tuple[str, float], list[str]] = {}
    frames: list[str] = []
    drawn = layout(fmt)
    for field in drawn.fields:
        framed = mark is not None and mark in field.weights
        for bit in field.bits:
            # without contents neighbours are told apart by their shade
            look = (1.0, 0.65)[field.index % 2] if data is None else (0.3, 1.0)[int(data[bit >> 3]) >> (bit & 7) & 1]
            x, y = _corner(place, bit)
            cells.setdefault((field.kind, look), []).append(f"M{x:.1f} {y + tall / 2:g}h{cell - 0.8:.1f}")
            if framed:
                frames.append(f"M{x:.1f} {y}h{cell - 0.8:.1f}v{tall}h{0.8 - cell:.1f}z")
    parts = [
        _path("".join(shapes), COLOURS[kind], tall, f'stroke-opacity="{look}"')
        for (kind, look), shapes in cells.items()
    ]
    parts.append(_path("".join(frames), "currentColor", 1.6))
    rows = -(-size // columns)
    parts += [_text(LEFT - 8, place["y"] + r * row + tall - 1, f"byte {r * columns}", "end") for r in range(rows)]
    x = float(LEFT)
    for kind in dict.fromkeys(field.kind for field in drawn.fields):
        label = "entry of the book" if kind == "entry" else kind
        parts += [
            f'<rect x="{x:.0f}" y="{top}" width="10" height="10" fill="{COLOURS[kind]}"/>',
            _text(x + 14, top + 9, label),
        ]
        x += 34 + 7 * len(label)
    parts.append(_text(x + 6, top + 9, drawn.formula, weight="bold"))
    return parts, int(place["y"] + rows * row), place


def _corner(place: dict[str, float], bit: int) -> tuple[float, float]:
    line, column = divmod(bit >> 3, int(place["columns"]))
    x = place["x"] + column * (8 * place["cell"] + place["gap"]) + (7 - (bit & 7)) * place["cell"]
    return x, place["y"] + line * place["row"]


def bits_text(field: Field, data: np.ndarray) -> str:
    """A field's bits, the highest first."""
    return format(field.value(data), f"0{len(field.bits)}b")


def _document(parts: list[str], height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%"'
    look = f'style="max-width:{WIDTH}px;color:inherit" font-family="system-ui, sans-serif" font-size="11" role="img"'
    return "\n".join([f'{head} {look} fill="currentColor">', *parts, "</svg>"])


def _path(path: str, stroke: str, width: float, more: str = "") -> str:
    return f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}" {more}/>' if path else ""


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    bold = ' font-weight="bold"' if weight == "bold" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{bold}>{escape(text)}</text>'
