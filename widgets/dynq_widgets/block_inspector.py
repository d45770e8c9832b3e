"""Any block of any tensor: its weights, what is stored of them, their importance and error, and the bits."""

from typing import Any

from traitlets import Dict

from dynq.blocks import Block, Blocks
from dynq.errors import DynqError
from dynq.figures import html_table
from dynq.figures_blocks import kinds, shared, weight_rows, worst
from dynq.layout import layout
from dynq.svg_blocks import bits_text, draw
from dynq_widgets.view import View, source


class BlockInspector(View):
    """A view on `dynq.blocks.Blocks`: of a model, encoded on the spot, or of a GGUF.

    Args:
        blocks: where blocks come from.
        tensor, format, row, index: the first block shown; by default the first tensor, and the first of its formats.

    block: the block that is shown. Hovering over a weight frames its bits, and the other way round.
    """

    _esm = source("common.js", "block_inspector.js")
    asked = Dict().tag(sync=True)
    """Which block: {"tensor", "format", "row", "index"}."""
    shown = Dict().tag(sync=True)
    """What there is to see of it; "message" where it cannot be shown."""

    def __init__(self, blocks: Blocks, tensor: str = "", format: str = "", row: int = 0, index: int = 0) -> None:
        self.blocks = blocks
        name = tensor or next(iter(blocks.shapes))
        fmt = format or blocks.formats(name)[0]
        self.block: Block = blocks.block(name, fmt, row, index)
        super().__init__(asked={"tensor": name, "format": fmt, "row": row, "index": index}, shown=self._look())
        self.observe(self._answer, "asked")

    def _answer(self, change: Any) -> None:
        asked = change["new"]
        try:
            name, fmt = asked["tensor"], asked["format"]
            able = self.blocks.formats(name)
            fmt = fmt if fmt in able else able[0]
            rows, count = self.blocks.count(name, fmt)
            row, index = min(max(asked["row"], 0), rows - 1), min(max(asked["index"], 0), count - 1)
            self.block = self.blocks.block(name, fmt, row, index)
            self.shown = self._look()
        except DynqError as error:
            self.shown = self.shown | {"message": str(error)}

    def _look(self) -> dict[str, Any]:
        block = self.block
        drawing = draw(block)
        rows, count = self.blocks.count(block.tensor, block.format)
        drawn = layout(block.format)
        columns = {"original": block.original, "stored": block.decoded, "importance": block.importance}
        return {
            "tensor": block.tensor,
            "format": block.format,
            "row": block.row,
            "index": block.index,
            "tensors": list(self.blocks.shapes),
            "formats": self.blocks.formats(block.tensor),
            "rows": rows,
            "blocks": count,
            "title": self._title(),
            "svg": drawing.svg,
            "geometry": drawing.geometry,
            "weights": {name: values.tolist() for name, values in columns.items() if values is not None},
            "fields": [
                {
                    "name": f"{field.kind} {field.index}",
                    "bits": field.bits,
                    "weights": list(field.weights),
                    "text": f"{bits_text(field, block.data)} = {drawn.number(field, block.data):.4g}",
                }
                for field in drawn.fields
            ],
            "message": "",
        }

    def _title(self) -> str:
        block = self.block
        size = f"{len(block.data)} bytes for {len(block.decoded)} weights"
        if block.relative_error is None:
            return f"{size}; the original is not known"
        weighed = "" if block.importance is None else "weighted "
        return f"{size}; {weighed}error {100 * block.relative_error:.2g} % of that of zeros"

    def twin(self) -> str:
        block = self.block
        caption = f"{block.tensor}, row {block.row}, block {block.index}, {block.format}: {self._title()}"
        tables = html_table(kinds(block.format), caption)
        which = "The first weights" if block.original is None else "The weights with the largest errors"
        rows = html_table(weight_rows(block, worst(block)), ", ".join(filter(None, (which, shared(block)))))
        return draw(block).svg + tables + rows
