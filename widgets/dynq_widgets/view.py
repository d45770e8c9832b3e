"""What all views have in common: live an anywidget, else a static twin in HTML."""

from pathlib import Path
from typing import Any

from dynq.progress import is_static

try:
    from anywidget import AnyWidget

    LIVE = True
except ImportError:  # the extra "lab" is not installed: static twins only
    from traitlets import HasTraits as AnyWidget  # type: ignore[assignment]

    LIVE = False

HERE = Path(__file__).parent


def source(*names: str) -> str:
    """Files of this folder as one string: an ES module for ``_esm``, or a style sheet for ``_css``.

    The modules are not bundled, so what they share stands in ``common.js`` before them.
    """
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


class View(AnyWidget):
    """Base of the widgets: subclasses set ``_esm``, ``_css`` and their traits, and write `twin`.

    A static one opens no channel to the browser, so that nothing of a dead widget is kept in a saved notebook.
    """

    _css = source("theme.css")

    def twin(self) -> str:
        """What the view shows, as HTML that needs no script: every text from a model or a file is escaped."""
        raise NotImplementedError

    @staticmethod
    def is_static() -> bool:
        return is_static() or not LIVE

    def open(self) -> None:
        if not self.is_static():
            super().open()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if self.is_static():
            return {"text/html": self.twin(), "text/plain": f"<{type(self).__name__}>"}
        return super()._repr_mimebundle_(**kwargs)
