"""One progress bar, which knows a notebook, a terminal and a log.

- a live notebook: ipywidgets' bar where they are installed, else text
- a notebook run in batch (``DYNQ_DISPLAY=static``): text. A saved widget is dead, and ``tqdm.auto`` stays at 0 %
- a terminal: one line, redrawn
- anything else (a pipe, a CI log): a whole line now and then, see `LineStream`
"""

import os
import re
import sys
import time
from importlib.util import find_spec
from typing import Any, TextIO

from tqdm.std import tqdm

LOG_SECONDS = 10.0
"""A bar in a log gives at most one line in so many seconds, and its last one."""


class LineStream:
    """A text stream that turns bars, redrawn by ``\\r``, into whole lines now and then; other lines pass through."""

    def __init__(self, stream: TextIO, seconds: float = LOG_SECONDS):
        self.stream = stream
        self.seconds = seconds
        self._line = ""
        self._over = False  # the next text is drawn over the line
        self._last = time.monotonic()

    def write(self, text: str) -> int:
        for piece in re.split(r"([\r\n])", text):
            if piece == "\n":
                self._emit()
                self._line, self._over = "", False
            elif piece == "\r":
                if time.monotonic() - self._last >= self.seconds:
                    self._emit()
                self._over = True
            elif piece:
                if not self._line.strip():  # a new bar: its first line is due in a while, not now
                    self._last = time.monotonic()
                self._line, self._over = piece if self._over else self._line + piece, False
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def _emit(self) -> None:
        if self._line.strip():
            self.stream.write(self._line.rstrip() + "\n")
            self.stream.flush()
            self._last = time.monotonic()


def is_static() -> bool:
    """Whether nobody is there to move a widget: the runner sets ``DYNQ_DISPLAY=static`` for batch runs."""
    return os.environ.get("DYNQ_DISPLAY") == "static"


def progress(
    iterable: Any = None,
    *,
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    leave: bool = True,
    file: TextIO | None = None,
) -> Any:
    """A tqdm bar over `iterable`; without one, a bar of `total` units: ``.update(n)``, ``.close()``.

    desc: what is being done; unit: what is counted; leave: whether the full bar stays. file: where a text bar goes,
    by default the standard error. For every loop that can last more than a second.
    """
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "leave": leave, "dynamic_ncols": False}
    options["unit_scale"] = unit == "B"  # 2.4G of 5.4G
    stream = file or sys.stderr
    # a bar inside another is not drawn as text: a second line is lost in a log and in a saved notebook
    options["disable"] = bool(getattr(tqdm, "_instances", ()))
    kernel = _in_kernel() and file is None
    if kernel and not is_static() and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as widget_bar

        return widget_bar(iterable, **options | {"disable": False})
    if not kernel and not stream.isatty():
        # one line in LOG_SECONDS, so there is no point in drawing more often than every second
        return tqdm(iterable, file=LineStream(stream), mininterval=1.0, ncols=100, **options)
    # a kernel's stream is no terminal, but whoever shows it (Jupyter, the runner) understands \r
    return tqdm(iterable, file=stream, mininterval=0.2, ncols=_columns(), **options)


def _in_kernel() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def _columns() -> int:
    """Columns of a bar: those of the terminal (the runner passes its own on in COLUMNS), at most 100."""
    try:
        columns = os.get_terminal_size(sys.__stderr__.fileno()).columns if sys.__stderr__ else 0
    except (OSError, ValueError):
        columns = 0
    return max(40, min(100, (columns or int(os.environ.get("COLUMNS") or 100)) - 1))
