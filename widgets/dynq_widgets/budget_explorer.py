"""The budget explorer: a slider over sizes, the frontier with llama.cpp's mixes on it, the formats of each layer."""

from typing import Any

import numpy as np
from traitlets import Dict, List

from dynq.editing import Draft
from dynq.errors import DynqError
from dynq.figures_budget import layer_formats, predicted_frontier
from dynq_widgets.palette import palette
from dynq_widgets.view import View, source

_POINTS = 240  # of the frontier, as many as a screen tells apart
_HIGHEST = 9.0  # bits per weight at the slider's right end; a target typed in may be larger


class BudgetExplorer(View):
    """Aim a `dynq.editing.Draft` at a size: GB, bits per weight, or that of a mix. Views of the same draft follow."""

    _esm = source("common.js", "budget_explorer.js")
    _css = source("theme.css", "budget_explorer.css")

    wanted = Dict().tag(sync=True)  # set by the browser: {"target": "3.5bpw", "moving": True while it is dragged}
    scale = Dict().tag(sync=True)  # n_weights; outside: bytes of the file beside tensor data; low, high: tensor bytes
    frontier = Dict().tag(sync=True)  # bytes, kld
    mixes: List[Any] = List().tag(sync=True)  # name, bytes, kld
    state = Dict().tag(sync=True)
    palette = Dict().tag(sync=True)
    message = Dict().tag(sync=True)

    def __init__(self, draft: Draft):
        self.draft = draft
        budget = draft.budget
        data, file = budget.data, budget.file
        self._pinned: dict[str, str] | None = None
        super().__init__(
            mixes=[{"name": m.name, "bytes": m.tensor_bytes, "kld": m.kld} for m in budget.mixes],
            palette=palette({option.format for row in data.options.values() for option in row}),
            state=self._state(),
        )
        self._draw_frontier()
        low, high = self.frontier["bytes"][0], self.frontier["bytes"][-1]
        outside = (file.budget - file.room) - (data.budget - data.room)
        limits = {"low": low, "high": max(low, min(high, int(_HIGHEST * budget.n_weights / 8)))}
        self.scale = {"n_weights": budget.n_weights, "outside": outside, **limits}
        draft.listen(self._refresh)
        self.observe(self._aim, "wanted")

    def twin(self) -> str:
        return predicted_frontier(self.draft).html() + layer_formats(self.draft).html()

    def _aim(self, _: Any = None) -> None:
        try:
            self.draft.aim(str(self.wanted["target"]), moving=bool(self.wanted.get("moving")))
            self.message = {}
        except DynqError as error:
            self.message = {"kind": "error", "text": str(error)}

    def _refresh(self) -> None:
        self._draw_frontier()
        self.state = self._state()

    def _draw_frontier(self) -> None:
        """What is pinned holds at every size, so the frontier moves with the pins, and only with them."""
        pinned = self.draft.state.pins
        if pinned == self._pinned:
            return
        self._pinned = pinned
        sizes, losses = self.draft.budget.frontier(pinned)
        keep = np.unique(np.searchsorted(sizes, np.linspace(sizes[0], sizes[-1], 4 * _POINTS)))
        keep = keep[np.unique(np.linspace(0, len(keep) - 1, _POINTS).astype(int))]
        self.frontier = {"bytes": sizes[keep].tolist(), "kld": losses[keep].tolist()}

    def _state(self) -> dict[str, Any]:
        totals = self.draft.totals()
        shares = self.draft.layer_shares()
        return {
            "totals": totals._asdict(),
            "mix_kld": self.draft.budget.mix_kld(totals.tensor_bytes),
            "pinned": len(self.draft.state.pinned),
            "layers": [
                [layer, {fmt: round(part, 4) for fmt, part in parts.items()}] for layer, parts in shares.items()
            ],
        }
