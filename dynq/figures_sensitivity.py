"""Pictures of notebook 04: what every tensor costs in every format, and whether the prediction is right."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from dynq import formats
from dynq.figures import BLACK, BLUE, GREEN, NATS, ORANGE, PINK, SCALE, Picture, html_table, styled

if TYPE_CHECKING:
    import pyarrow

_COLOURS = (BLUE, ORANGE, GREEN, PINK, BLACK, "#56B4E9", "#D55E00", "#F0E442")


def sensitivity_map(table: "pyarrow.Table") -> Picture:
    """Predicted KLD of every tensor in every format, as a heat map; the table has the sums by kind and format."""
    rows = table.to_pylist()
    names = list(dict.fromkeys(row["tensor"] for row in rows))
    found = sorted({row["format"] for row in rows}, key=lambda fmt: (formats.get(fmt).bpw, fmt))
    value = {(row["tensor"], row["format"]): row["predicted_kld"] for row in rows}
    logs = [
        [None if (v := value.get((name, fmt))) is None else float(np.log10(max(v, 1e-9))) for fmt in found]
        for name in names
    ]
    figure = go.Figure(go.Heatmap(z=logs, x=found, y=names, colorscale=SCALE, colorbar={"title": "log10 nats"}))
    styled(
        figure,
        "Predicted KL divergence, one tensor in one format",
        220 + 8 * len(names),
        margin={"l": 170, "r": 30, "t": 60, "b": 60},
    )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 9})
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        kind = sums.setdefault(row["kind"], dict.fromkeys(found, 0.0))
        kind[row["format"]] += row["predicted_kld"]
    lines = [{"kind": kind} | {fmt: v or None for fmt, v in by_format.items()} for kind, by_format in sums.items()]
    return Picture(figure, html_table(lines, "Predicted KLD in nats per token, summed over the tensors of a kind"))


def prediction_scatter(table: "pyarrow.Table", agreement: Mapping[str, Any]) -> Picture:
    """Predicted against measured KLD of the swaps that were measured. agreement: of `dynq.sensitivity.agreement`."""
    rows = [row for row in table.to_pylist() if row["measured_kld"] is not None]
    figure = go.Figure()
    for fmt, colour in zip(sorted({row["format"] for row in rows}), (BLUE, ORANGE, GREEN, PINK) * 8, strict=False):
        own = [row for row in rows if row["format"] == fmt]
        figure.add_scatter(
            x=[row["measured_kld"] for row in own],
            y=[row["predicted_kld"] for row in own],
            error_y={"array": [row["predicted_error"] for row in own], "thickness": 1},
            text=[row["tensor"] for row in own],
            mode="markers",
            name=fmt,
            marker={"color": colour, "size": 8},
        )
    if rows:
        ends = [f(row[key] for row in rows for key in ("measured_kld", "predicted_kld")) for f in (min, max)]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": BLACK, "dash": "dot", "width": 1})
    ranks = ", ".join(f"{fmt} {rho:.2f}" for fmt, rho in agreement["rank"].items() if rho is not None)
    styled(figure, "Predicted and measured KLD of single swaps" + (f" (rank correlation {ranks})" if ranks else ""))
    figure.update_xaxes(title="measured, nats", **NATS).update_yaxes(title="predicted, nats", **NATS)
    lines = [
        {
            "tensor": row["tensor"],
            "format": row["format"],
            "predicted": row["predicted_kld"],
            "±": row["predicted_error"],
            "measured": row["measured_kld"],
            "predicted / measured": row["predicted_kld"] / max(row["measured_kld"], 1e-12),
        }
        for row in rows
    ]
    medians = [{"kind": kind, "median of predicted / measured": ratio} for kind, ratio in agreement["ratio"].items()]
    tables = html_table(medians, "Kinds of tensor"), html_table(lines, "Swaps that were measured")
    return Picture(figure, "".join(tables))


def tensor_curves(table: "pyarrow.Table", layer: int) -> Picture:
    """Predicted KLD of each tensor of one layer against its bits, all its formats; the table has the best of each size.

    A format above its tensor's line is one that a smaller one beats.
    """
    rows = [row for row in table.to_pylist() if row["tensor"].startswith(f"blk.{layer}.")]
    figure = go.Figure()
    lines = []
    for at, name in enumerate(dict.fromkeys(row["tensor"] for row in rows)):
        own = sorted((row for row in rows if row["tensor"] == name), key=lambda row: (row["bpw"], row["predicted_kld"]))
        best = [
            row
            for i, row in enumerate(own)
            if row["predicted_kld"] < min((r["predicted_kld"] for r in own[:i]), default=np.inf)
        ]
        colour = _COLOURS[at % len(_COLOURS)]
        for kept, style in ((best, {"mode": "lines"}), (own, {"mode": "markers", "showlegend": False})):
            figure.add_scatter(
                x=[row["bpw"] for row in kept],
                y=[max(row["predicted_kld"], 1e-9) for row in kept],
                text=[row["format"] for row in kept],
                name=own[0]["kind"],
                legendgroup=name,
                line={"color": colour},
                marker={"color": colour, "size": 6},
                hovertemplate="%{text}: %{x:.2f} bits, %{y:.2g} nats",
                **style,
            )
        lines.append({"tensor": name} | {f"{low} to {low + 1} bits": _least(best, low) for low in range(1, 7)})
    styled(figure, f"Layer {layer}: predicted KLD of each tensor against its bits")
    figure.update_xaxes(title="bits per weight of the tensor").update_yaxes(title="predicted, nats", **NATS)
    return Picture(figure, html_table(lines, "The least predicted KLD, and its format, by bits"))


def _least(best: list[dict[str, Any]], low: int) -> str:
    found = [row for row in best if low <= row["bpw"] < low + 1]
    return f"{found[-1]['predicted_kld']:.2g} ({found[-1]['format']})" if found else ""
