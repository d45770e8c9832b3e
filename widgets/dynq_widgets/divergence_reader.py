"""The divergence reader: a text coloured by KLD, token by token, with the guesses of both models."""

import math
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from traitlets import Dict, Int

from dynq.figures import html_table
from dynq_widgets.view import View, source

if TYPE_CHECKING:
    from dynq.evaluate.reading import Reading, ReadToken
    from dynq.evaluate.where import Guess

_FAINT, _FULL = 0.01, 3.0  # nats: where the colour begins and ends
_WORST = 10  # rows of the twin's table
_CONTEXT = 40  # characters before a token there
_ORANGE = "230,159,0"  # Okabe and Ito's; over light and dark paper alike


def shade(kld: float) -> float:
    """How strongly a token is coloured, 0 to 1, by the logarithm of its KLD in nats."""
    if kld <= _FAINT:
        return 0.0
    return min(1.0, math.log(kld / _FAINT) / math.log(_FULL / _FAINT))


class DivergenceReader(View):
    """Read a text as two models do.

    read: gives the reading of chunk i (`dynq.evaluate.reading.read`), called when that chunk is looked at;
    n_chunks: how many there are.
    """

    _esm = source("common.js", "divergence_reader.js")
    _css = source("theme.css", "divergence_reader.css")

    n_chunks = Int(1).tag(sync=True)
    chunk = Int(0).tag(sync=True)  # set by the browser
    page = Dict().tag(sync=True)

    def __init__(self, read: "Callable[[int], Reading]", n_chunks: int = 1):
        self._read = read
        self._kept: dict[int, Reading] = {}
        super().__init__(n_chunks=n_chunks, page=_page(0, self._reading(0)))
        self.observe(self._turn, "chunk")

    def _reading(self, chunk: int) -> "Reading":
        if chunk not in self._kept:
            self._kept[chunk] = self._read(chunk)
        return self._kept[chunk]

    def _turn(self, _: Any) -> None:
        self.chunk = max(0, min(self.n_chunks - 1, self.chunk))
        self.page = _page(self.chunk, self._reading(self.chunk))

    def twin(self) -> str:
        reading = self._reading(self.chunk)
        spans = "".join(_span(token) for token in reading.tokens)
        style = "white-space:pre-wrap;line-height:1.9;max-width:60em;overflow-wrap:anywhere"
        text = f'<div style="{style}"><span style="opacity:.6">{escape(reading.before)}</span>{spans}</div>'
        about = f"mean KLD {reading.mean_kld:.3f} nats; coloured from {_FAINT} nats, strongest at {_FULL:g}"
        return f"<p>{about}; the pale text was read before.</p>{text}{self._table(reading)}"

    def _table(self, reading: "Reading") -> str:
        order = sorted(range(len(reading.tokens)), key=lambda i: -reading.tokens[i].kld)[:_WORST]
        rows = []
        for i in order:
            token = reading.tokens[i]
            before = reading.before + "".join(earlier.piece for earlier in reading.tokens[:i])
            rows.append(
                {
                    "KLD": token.kld,
                    "before": "…" + before[-_CONTEXT:],
                    "followed": _told(token.followed, "both"),
                    "the original expects": ", ".join(_told(guess, "original") for guess in token.original_top),
                    "the file expects": ", ".join(_told(guess, "file") for guess in token.file_top),
                }
            )
        return html_table(rows, "Where the two diverge most, nats, and what each held likeliest")


def _told(guess: "Guess", whose: str) -> str:
    if whose == "both":
        return f"{guess.text!r} {100 * guess.original:.1f} % → {100 * guess.file:.1f} %"
    return f"{guess.text!r} {100 * (guess.original if whose == 'original' else guess.file):.1f} %"


def _span(token: "ReadToken") -> str:
    lines = [f"KLD {token.kld:.4f}", "original → file"]
    lines += [_told(guess, "both") for guess in dict.fromkeys([*token.original_top, *token.file_top])]
    colour = f"background:rgba({_ORANGE},{0.65 * shade(token.kld):.2f})"
    return f'<span style="{colour}" title="{escape(chr(10).join(lines))}">{escape(token.piece or "·")}</span>'


def _page(chunk: int, reading: "Reading") -> dict[str, Any]:
    def row(guess: "Guess") -> list[Any]:
        return [guess.text, round(guess.original, 5), round(guess.file, 5)]

    tokens = [
        {
            "piece": token.piece,
            "kld": token.kld,
            "shade": round(shade(token.kld), 3),
            "followed": row(token.followed),
            "original": [row(guess) for guess in token.original_top],
            "file": [row(guess) for guess in token.file_top],
        }
        for token in reading.tokens
    ]
    return {"chunk": chunk, "before": reading.before, "mean_kld": reading.mean_kld, "tokens": tokens}
