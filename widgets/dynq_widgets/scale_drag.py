"""One block, its levels, and a scale to drag: what `dynq.blocks.by_hand` found, to be found again by hand."""

from traitlets import Bool, Dict, Int

from dynq.blocks import ByHand
from dynq.figures import html_table
from dynq.svg_blocks import draw_line
from dynq_widgets.view import View, source


class ScaleDrag(View):
    """The weights of a block on a line, and under them the levels, which move with the scale.

    hand: of `dynq.blocks.by_hand`. at: which of its scales is shown, at first the one that sends the largest weight to
    the end of the levels. weighted: whether importance counts.
    """

    _esm = source("common.js", "scale_drag.js")
    block = Dict().tag(sync=True)
    at = Int().tag(sync=True)
    weighted = Bool(True).tag(sync=True)

    def __init__(self, hand: ByHand) -> None:
        self.hand = hand
        start = hand.nearest(hand.full_range)
        block = {name: getattr(hand, name).tolist() for name in ("weights", "importance", "levels", "scales")}
        block["error"] = {which: error.tolist() for which, error in hand.error.items()}
        block["encoder"] = {which: list(found) for which, found in hand.encoder.items()}
        super().__init__(block=block, at=start)

    @property
    def scale(self) -> float:
        return float(self.hand.scales[self.at])

    def twin(self) -> str:
        scale, error = self.hand.encoder["on"]
        rows = [
            {"weight": i, "original": float(w), "importance": float(importance), "stored": float(v), "level": v / scale}
            for i, (w, importance, v) in enumerate(
                zip(self.hand.weights, self.hand.importance, self.hand.decoded(scale), strict=True)
            )
        ]
        caption = f"At the encoder's scale, {scale:.4g}: weighted error {error:.4g}"
        table = html_table(rows, caption)
        return f"{draw_line(self.hand, scale)}<details><summary>{caption}, weight by weight</summary>{table}</details>"
