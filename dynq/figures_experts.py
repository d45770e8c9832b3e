"""Picture of a mixture's experts: how many tokens each layer's router sent to each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from dynq.checkpoint import Checkpoint
from dynq.experts import WANTED, expert_rows
from dynq.figures import SCALE, Picture, html_table, styled
from dynq.imatrix import Importance


def experts_map(seen: Mapping[int, np.ndarray], importance: Importance, checkpoint: Checkpoint) -> Picture:
    """Tokens of the calibration text that each expert read, the busiest of a layer on the left.

    seen: layer -> tokens of each expert (`dynq.experts.tokens_seen`). importance: after the top-up. The colour is the
    decimal logarithm; the table names the starved.
    """
    layers = sorted(seen)
    order = [np.argsort(-seen[layer], kind="stable") for layer in layers]
    counts = [seen[layer][by] for layer, by in zip(layers, order, strict=True)]
    most = max(int(row.max()) for row in counts)
    ticks = [m * 10**e for e in range(9) for m in (1, 2, 5) if m * 10**e <= most] or [1]
    figure = go.Figure(
        go.Heatmap(
            z=[[float(np.log10(max(n, 0.5))) for n in row] for row in counts],
            y=[str(layer) for layer in layers],
            customdata=[
                [[int(e), int(n)] for e, n in zip(by, row, strict=True)] for by, row in zip(order, counts, strict=True)
            ],
            hovertemplate="layer %{y}, expert %{customdata[0]}: %{customdata[1]:,} tokens<extra></extra>",
            colorscale=SCALE,
            colorbar={
                "title": "tokens",
                "tickvals": [float(np.log10(t)) for t in ticks],
                "ticktext": [f"{t:,}" for t in ticks],
            },
        )
    )
    styled(figure, "Tokens that each expert read", max(260, 120 + 18 * len(layers)))
    figure.update_xaxes(title="experts of the layer, busiest first").update_yaxes(
        title="layer", type="category", autorange="reversed"
    )
    caption = f"Experts that fewer than {WANTED} tokens reached are starved: before and after more text, and by number"
    return Picture(figure, html_table(expert_rows(seen, importance, checkpoint), caption))
