"""Text as a model reads it: token by token, with the marks that no reader sees."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from dynq.evaluate.where import token_text

_SPECIAL = "background:#E69F00;color:#000;border-radius:3px;padding:0 2px"
_SHADES = ("background:rgba(0,114,178,.16)", "background:rgba(0,114,178,.04)")


def tokens_shown(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as HTML: neighbours in two shades, special tokens in orange; line breaks as ⏎. All text is escaped."""
    special = set(tokenizer.all_special_ids) | {
        int(i) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    spans = []
    for at, token in enumerate(map(int, ids)):
        text = tokenizer.decode([token]) if token in special else token_text(tokenizer, token)
        style = _SPECIAL if token in special else _SHADES[at % 2]
        shown = escape(text.replace("\n", "⏎"))
        spans.append(f'<span title="token {token}" style="{style}">{shown}</span>' + "<br>" * text.count("\n"))
    return f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.7">{"".join(spans)}</div>'
