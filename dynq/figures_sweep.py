"""The picture of a sweep: every model's divergence against bits per weight. See `dynq.figures`."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dynq.figures import BLACK, BLUE, GREEN, NATS, ORANGE, PINK, Picture, html_table, styled


def sweep_frontier(result: Mapping[str, Any]) -> Picture:
    """A colour for every model: filled its files, hollow what llama.cpp's mixes reach at the same bytes.

    Every seed is a mark; the line goes through the geometric means over seeds.
    """
    figure = go.Figure()
    models = list(dict.fromkeys(run["model"] for run in result["runs"]))
    for model, colour in zip(models, cycle((BLUE, ORANGE, GREEN, PINK, BLACK)), strict=False):
        made = [file for run in result["runs"] if run["model"] == model for file in run["files"]]
        for key, name, shape, dash in (("kld", "dynq", "diamond", "solid"), ("mix_kld", "mixes", "circle-open", "dot")):
            legend = f"{Path(model).name}, {name}"
            shared: dict[str, Any] = {"legendgroup": legend, "name": legend}
            figure.add_scatter(
                x=[file["bpw"] for file in made],
                y=[file[key] for file in made],
                error_y={"array": [file["kld_error"] for file in made], "thickness": 1} if key == "kld" else None,
                mode="markers",
                marker={"color": colour, "size": 10, "symbol": shape},
                **shared,
            )
            points = []
            for target in dict.fromkeys(file["target"] for file in made):
                own = [file for file in made if file["target"] == target]
                mean = np.exp(np.mean([np.log(max(file[key], 1e-12)) for file in own]))
                points.append((float(np.mean([file["bpw"] for file in own])), float(mean)))
            if len(points) > 1:
                x, y = zip(*sorted(points), strict=True)
                line = {"color": colour, "width": 1.5, "dash": dash}
                figure.add_scatter(x=x, y=y, mode="lines", line=line, showlegend=False, **shared)
    styled(figure, "Divergence from the original against size", 460)
    figure.update_xaxes(title="bits per weight, all tensors")
    every = [
        np.log10(max(file[key], 1e-9)) for run in result["runs"] for file in run["files"] for key in ("kld", "mix_kld")
    ]
    around = [float(min(every)) - 0.35, float(max(every)) + 0.35]  # wide enough for a tick or two
    figure.update_yaxes(title="mean KLD, nats per token (less is better)", range=around, **NATS)
    caption = "Every file on its model's held-out text; mixes: llama.cpp's at the same bytes; ratio: KLD over theirs"
    return Picture(figure, html_table(sweep_rows(result), caption))


def sweep_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary's table: a row for every file that was made."""
    return [
        {
            "model": Path(run["model"]).name,
            "target": made["target"],
            "seed": run["seed"],
            "bytes": made["file_bytes"],
            "bpw": made["bpw"],
            "KLD": made["kld"],
            "±": made["kld_error"],
            "mixes": made["mix_kld"],
            "ratio": made["kld_ratio"],
            "same top-1, %": 100 * made["same_top"],
            "file": f"{run['folder']}/{made['file']}",
        }
        for run in result["runs"]
        for made in run["files"]
    ]
