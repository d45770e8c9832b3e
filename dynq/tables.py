"""Tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text. Columns are the keys of the first row, less those that are None throughout.

    Numbers stand right, fractions with four digits.
    """
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    cells = [[str(key) for key in keys], *([_cell(row[key]) for key in keys] for row in rows)]
    right = [any(isinstance(row[key], int | float) for row in rows) for key in keys]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
