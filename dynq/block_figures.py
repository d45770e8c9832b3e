"""Pictures of one block and of one tensor in all formats: figures with tables, as in dynq.figures."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from dynq.block_svg import bits_text
from dynq.blocks import Block, ByHand, FormatError
from dynq.figures import BLUE, GREEN, ORANGE, PINK, Picture, _layout, html_table
from dynq.layout import layout

# family -> colour, mark
FAMILIES = {
    "32 weights a block": (ORANGE, "circle"),
    "K: super-blocks": (BLUE, "diamond"),
    "IQ: code books": (GREEN, "square"),
    "few levels, four-bit floats": (PINK, "triangle-up"),
}


def family(name: str) -> str:
    """Which of FAMILIES a format belongs to."""
    if name.startswith("IQ"):
        return "IQ: code books"
    if name.endswith("_K"):
        return "K: super-blocks"
    return "32 weights a block" if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") else "few levels, four-bit floats"


def scale_curve(hand: ByHand) -> Picture:
    """The error of a block against its scale, importance off and on, with what the encoder takes.

    The table has the scale that sends the largest weight to the end of the levels, the best of all scales tried, and
    the encoder's, each with the error both ways.
    """
    figure = go.Figure()
    rows = []
    for which, colour, dash in (("off", ORANGE, "dash"), ("on", BLUE, "solid")):
        figure.add_scatter(
            x=hand.scales.tolist(),
            y=hand.error[which].tolist(),
            mode="lines",
            name=f"importance {which}",
            line={"color": colour, "dash": dash, "width": 2},
        )
        scale, error = hand.encoder[which]
        figure.add_scatter(
            x=[scale],
            y=[error],
            mode="markers",
            name=f"the encoder, {which}",
            marker={"color": colour, "size": 13, "symbol": "star", "line": {"color": "white", "width": 1}},
        )
        best = hand.best(which)
        rows += [
            _scale_row(hand, f"best of {len(hand.scales)}, importance {which}", float(hand.scales[best])),
            _scale_row(hand, f"the encoder, importance {which}", scale),
        ]
    largest = float(hand.weights[np.abs(hand.weights).argmax()])
    end = hand.levels[0] if hand.levels[0] < 0 else hand.levels[-1]
    rows.insert(0, _scale_row(hand, f"largest weight on level {end:g}", largest / float(end)))
    _layout(figure, f"One block of {hand.format}: the error of each scale")
    figure.update_xaxes(title="scale d").update_yaxes(title="weighted error of the block", type="log", tickformat=".0e")
    return Picture(figure, html_table(rows, "The same scales with importance counted as 1 (off) and as it is (on)"))


def _scale_row(hand: ByHand, name: str, scale: float) -> dict[str, object]:
    missed = (hand.weights.astype(np.float64) - hand.decoded(scale)) ** 2
    return {
        "scale": name,
        "d": scale,
        "error, importance off": float(missed.sum()),
        "error, importance on": float(missed @ hand.importance.astype(np.float64)),
    }


def bits_against_error(found: Sequence[FormatError], title: str = "") -> Picture:
    """Bits per weight against the weighted error of one tensor, every format a point; the line is the best so far."""
    figure = go.Figure()
    best: list[FormatError] = []
    for one in found:
        if not best or one.error < best[-1].error:
            best = [*(b for b in best if b.bpw < one.bpw), one]
    figure.add_scatter(
        x=[one.bpw for one in best],
        y=[one.error for one in best],
        mode="lines",
        name="no format is better with fewer bits",
        line={"color": "#999999", "width": 1},
    )
    for name, (colour, mark) in FAMILIES.items():
        own = [one for one in found if family(one.format) == name]
        figure.add_scatter(
            x=[one.bpw for one in own],
            y=[one.error for one in own],
            text=[one.format for one in own],
            textposition="top right",
            textfont={"size": 10},
            mode="markers+text",
            name=name,
            marker={"color": colour, "symbol": mark, "size": 9},
        )
    _layout(figure, title or "All formats on one tensor", 520)
    figure.update_xaxes(title="bits per weight")
    figure.update_yaxes(title="weighted error / that of zeros", type="log", tickformat="~g")
    rows = [
        {"format": one.format, "bits per weight": one.bpw, "family": family(one.format), "relative error": one.error}
        | {"on the line": "yes" if one in best else ""}
        for one in found
    ]
    return Picture(figure, html_table(rows, "The error of zeros is 1"))


def importance_gain(found: Sequence[FormatError]) -> Picture:
    """How much larger the error is where the encoder does not know the importance, as a bar for each format."""
    figure = go.Figure()
    for needed, name, colour in ((True, "llama.cpp wants importance", ORANGE), (False, "goes without", BLUE)):
        own = [one for one in found if one.needs_importance == needed]
        figure.add_bar(
            x=[one.format for one in own],
            y=[100 * (one.flat / one.error - 1) for one in own],
            name=name,
            marker_color=colour,
        )
    _layout(figure, "What not knowing the importance costs")
    figure.update_xaxes(categoryorder="array", categoryarray=[one.format for one in found], tickangle=-50)
    figure.update_yaxes(title="more weighted error, %")
    rows = [
        {
            "format": one.format,
            "error, importance known": one.error,
            "error, not known": one.flat,
            "more, %": 100 * (one.flat / one.error - 1),
            "importance": "wanted" if one.needs_importance else "",
        }
        for one in found
    ]
    return Picture(
        figure, html_table(rows, "Weighted error over that of zeros, encoded with the importance and without")
    )


def weight_rows(block: Block, weights: Sequence[int]) -> list[dict[str, object]]:
    """A line for each of some weights of a block: before, after, and the bits that it is made from."""
    drawn, rows = layout(block.format), []
    for i in weights:
        row: dict[str, object] = {"weight": i}
        if block.original is not None:
            row["original"] = float(block.original[i])
        row["stored"] = float(block.decoded[i])
        if block.importance is not None:
            row["importance"] = float(block.importance[i])
        for field in drawn.of_weight(i):
            row[field.kind] = f"{bits_text(field, block.data)} = {drawn.number(field, block.data):.4g}"
        rows.append(row)
    return rows


def worst(block: Block, count: int = 8) -> list[int]:
    """The weights with the largest weighted errors, the largest first; without an original the first weights."""
    if block.original is None:
        return list(range(count))
    weight = 1 if block.importance is None else block.importance
    missed = weight * np.square(block.original - block.decoded, dtype=np.float64)
    return [int(i) for i in np.argsort(-missed)[:count]]
