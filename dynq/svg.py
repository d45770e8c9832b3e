"""A scatter figure of plotly as SVG: a picture that stays where JavaScript is stripped (GitHub, a model card).

Only what `figures.frontier` and `figures.layer_costs` draw: scatter traces with lines, markers, texts and error bars
over a linear x axis and a logarithmic y axis. The numbers are read from the figure, so the two pictures cannot differ.
"""

import math
from collections.abc import Iterator
from html import escape
from typing import Any

import plotly.graph_objects as go

FONT = 'font-family="system-ui, sans-serif"'
_ANCHOR = {"left": "end", "center": "middle", "right": "start"}
# corners of marks around their middle, in radii; y points down
_CORNERS = {
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle-up": ((0, -1.2), (1.15, 0.8), (-1.15, 0.8)),
}


def render(figure: go.Figure) -> str:
    """The figure as an SVG document. Points without a logarithm are left out, as plotly does."""
    layout = figure.layout
    width, height, margin = layout.width, layout.height, layout.margin
    left, right, top, bottom = margin.l, width - margin.r, margin.t, height - margin.b
    points = [(x, y) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True) if y > 0]
    x0, x1 = layout.xaxis.range
    logs = [math.log10(y) for _, y in points] or [0.0]
    room = 0.12 * (max(logs) - min(logs)) or 0.5
    y0, y1 = min(logs) - room, max(logs) + room

    def at(x: float, y: float) -> tuple[float, float]:
        part = (math.log10(y) - y0) / (y1 - y0)
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - min(max(part, 0), 1) * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT} font-size="12" fill="#2a3f5f">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(left, 0.55 * top, layout.title.text, size=17),
    ]
    for x in _round_steps(x0, x1):
        px = at(x, 10**y0)[0]
        parts += [_line(px, top, px, bottom, "#e5ecf6"), _text(px, bottom + 18, f"{x:g}", "middle")]
    for y in _steps_of_a_decade(y0, y1):
        py = at(x0, y)[1]
        parts += [_line(left, py, right, py, "#e5ecf6"), _text(left - 8, py + 4, f"{y:g}", "end")]
    parts.append(_text((left + right) / 2, height - 14, layout.xaxis.title.text, "middle"))
    middle = (top + bottom) / 2
    parts.append(f'<g transform="rotate(-90 16 {middle:g})">{_text(16, middle, layout.yaxis.title.text, "middle")}</g>')
    for number, trace in enumerate(figure.data):
        parts += _trace(trace, at)
        row = top + 14 + 18 * number
        symbol = (_symbols(trace)[0] or "circle").removesuffix("-open")
        if "lines" in trace.mode:
            parts.append(_line(right - 161, row, right - 139, row, trace.marker.color, 1.5))
        parts += [_marker(right - 150, row, symbol, trace.marker.color, 5), _text(right - 134, row + 4, trace.name)]
    return "\n".join([*parts, "</svg>\n"])


def _trace(trace: Any, at: Any) -> Iterator[str]:
    colour = trace.marker.color
    shown = [i for i, y in enumerate(trace.y) if y > 0]
    if "lines" in trace.mode:
        path = " ".join("{:.1f},{:.1f}".format(*at(trace.x[i], trace.y[i])) for i in shown)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    symbols, errors = _symbols(trace), trace.error_y.array
    position = trace.textposition or "top right"
    positions = [position] * len(trace.x) if isinstance(position, str) else position
    for i in shown:
        x, y = at(trace.x[i], trace.y[i])
        if errors is not None:
            low, high = (at(trace.x[i], max(trace.y[i] + sign * errors[i], 1e-300))[1] for sign in (-1, 1))
            yield _line(x, low, x, high, colour)
        yield _marker(x, y, symbols[i], colour, trace.marker.size / 2)
        if trace.text is not None and trace.text[i]:
            vertical, _, horizontal = positions[i].partition(" ")
            side = {"left": -8, "center": 0, "right": 8}[horizontal]
            yield _text(x + side, y + (-7 if vertical == "top" else 16), trace.text[i], _ANCHOR[horizontal])


def _symbols(trace: Any) -> list[str | None]:
    symbol = trace.marker.symbol
    return [symbol] * len(trace.x) if isinstance(symbol, str) or symbol is None else list(symbol)


def _marker(x: float, y: float, symbol: str | None, colour: str, r: float) -> str:
    kind = (symbol or "circle").removesuffix("-open")
    look = f'fill="{colour if kind == (symbol or "circle") else "white"}" stroke="{colour}" stroke-width="1.5"'
    if kind in _CORNERS:
        corners = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in _CORNERS[kind])
        return f'<polygon points="{corners}" {look}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {look}/>'


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _round_steps(low: float, high: float) -> list[float]:
    """About six round numbers between two."""
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1) if n * step >= 0]


def _steps_of_a_decade(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten between two logarithms; the powers alone where these are many."""
    factors = (1, 2, 5) if high - low < 4 else (1,)
    found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in factors]
    return [y for y in found if low <= math.log10(y) <= high]
