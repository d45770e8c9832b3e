"""Pictures of one block and of one tensor in all formats: figures with tables, as in dynq.figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dynq import formats
from dynq.blocks import Block, ByHand, FormatError
from dynq.figures import BLACK, BLUE, GREEN, NATS, ORANGE, PINK, Picture, html_table, styled
from dynq.layout import layout
from dynq.svg_blocks import bits_text, draw_layout

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
    rows.insert(0, _scale_row(hand, "largest weight to the end of the levels", hand.full_range))
    styled(figure, f"One block of {hand.format}: the error of each scale")
    figure.update_xaxes(title="scale d").update_yaxes(title="error of the block", **NATS)
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
        name="less error takes more bits",
        line={"color": "#999999", "width": 1},
    )
    for name, (colour, mark) in FAMILIES.items():
        own = [one for one in found if family(one.format) == name]
        figure.add_scatter(
            x=[one.bpw for one in own],
            y=[one.error for one in own],
            text=[one.format if one in best else _label(one, found, best) for one in own],
            hovertext=[one.format for one in own],
            textposition=["bottom left" if one in best else "top right" for one in own],
            textfont={"size": 10},
            mode="markers+text",
            name=name,
            marker={"color": colour, "symbol": mark, "size": 9},
        )
    styled(figure, title or "All formats on one tensor", 520, legend={"x": 0.98, "xanchor": "right", "y": 0.98})
    figure.update_xaxes(title="bits per weight")
    figure.update_yaxes(title="weighted error / that of zeros", **NATS)
    rows = [
        {"format": one.format, "bits per weight": one.bpw, "family": family(one.format), "relative error": one.error}
        | {"on the line": "yes" if one in best else ""}
        for one in found
    ]
    return Picture(figure, html_table(rows, "The error of zeros is 1"))


def _label(one: FormatError, found: Sequence[FormatError], best: Sequence[FormatError]) -> str:
    """The names of all formats above the line that lie on one spot, at the uppermost of them."""
    near = [o for o in found if o not in best and o.bpw == one.bpw and 0.6 < o.error / one.error < 1.6]
    near.sort(key=lambda o: -o.error)
    return "<br>".join(o.format for o in near) if near[0] is one else ""


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
    styled(figure, "What not knowing the importance costs")
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


def kinds(fmt: str) -> list[dict[str, Any]]:
    """A table of a format's kinds of fields: how many there are, their bits, and the share of a weight's bits."""
    form, rows = formats.get(fmt), []
    fields = layout(fmt).fields
    for kind in dict.fromkeys(field.kind for field in fields):
        own = [field for field in fields if field.kind == kind]
        sizes = {len(field.bits) for field in own}
        reach = sorted({len(field.weights) for field in own})
        rows.append(
            {
                "field": kind,
                "how many": len(own),
                "bits of each": " or ".join(map(str, sorted(sizes))),
                "weights that share it": " or ".join(map(str, reach)),
                "bits per weight": sum(len(field.bits) for field in own) / form.block,
            }
        )
    return rows


def weight_rows(block: Block, weights: Sequence[int]) -> list[dict[str, object]]:
    """A line for each of some weights of a block: before, after, and its bits, without those of the whole block."""
    drawn, rows = layout(block.format), []
    for i in weights:
        row: dict[str, object] = {"weight": i}
        if block.original is not None:
            row["original"] = float(block.original[i])
        row["stored"] = float(block.decoded[i])
        if block.importance is not None:
            row["importance"] = float(block.importance[i])
        for field in drawn.of_weight(i):
            if len(field.weights) == len(block.decoded):
                continue
            row[field.kind] = f"{bits_text(field, block.data)} = {drawn.number(field, block.data):.4g}"
        rows.append(row)
    return rows


def shared(block: Block) -> str:
    """What all weights of a block share, in words: "d = 0.0003, dmin = 0.0027"."""
    drawn = layout(block.format)
    own = [field for field in drawn.fields if len(field.weights) == len(block.decoded)]
    return ", ".join(f"{field.kind} = {drawn.number(field, block.data):.4g}" for field in own)


def worst(block: Block, count: int = 8) -> list[int]:
    """The weights with the largest weighted errors, the largest first; without an original the first weights."""
    if block.original is None:
        return list(range(count))
    weight = 1 if block.importance is None else block.importance
    missed = weight * np.square(block.original - block.decoded, dtype=np.float64)
    return [int(i) for i in np.argsort(-missed)[:count]]


def layout_page(fmt: str, mark: int | None = None) -> str:
    """A format's block as HTML: its bits drawn, and a table of its fields. mark: a weight whose bits are framed."""
    form = formats.get(fmt)
    caption = f"{fmt}: {form.block_bytes} bytes for {form.block} weights, {form.bpw:g} bits per weight"
    return draw_layout(fmt, mark) + html_table(kinds(fmt), caption)


def answers_kept(sizes: Sequence[Mapping[str, Any]]) -> Picture:
    """Tokens of the original's answers that each format keeps. sizes: of `dynq.evaluate.talk.sizes`."""
    names = [f"{row['format']}<br>{row['MB (10^6 bytes)']:.1f} MB" for row in sizes]
    kept = [int(row["tokens before they part"].partition(" ")[0]) for row in sizes]
    figure = go.Figure(go.Bar(x=names, y=kept, text=kept, marker_color=[BLACK, *[BLUE] * (len(sizes) - 1)]))
    styled(figure, "Tokens before the answers part from the original's", 340)
    figure.update_yaxes(title="tokens, over all answers").update_xaxes(type="category")
    return Picture(figure, html_table(sizes, "The model with all its matrices in one format"))
