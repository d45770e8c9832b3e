"""Mistral's tekken.json, read as the tokenizer.json that it stands for.

A token is a string of bytes, its rank is the order in which it is merged, and the special tokens' ids come before all
others. As in transformers' `MistralConverter`, every split of a token into two tokens is a merge, in the order of the
ranks.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dynq.errors import DynqError
from dynq.files import load_json

_MOST_RESERVED, _LONGEST_TOKEN, _MOST_LETTERS = 1 << 16, 1 << 10, 4_000_000
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def read(file: Path) -> dict[str, Any]:
    """The parts of a tokenizer.json that `dynq.tokenizer` reads: pre_tokenizer, model, added_tokens.

    Raises:
        DynqError: a file of the first version, which does not list its special tokens.
    """
    raw = load_json(file, "no tokenizer")
    config = raw["config"]
    if "special_tokens" not in raw:
        raise DynqError(f"{file}: lists no special_tokens (an old version); add the model's tokenizer.json")
    special = {entry["rank"]: entry["token_str"] for entry in raw["special_tokens"]}
    reserved = config.get("default_num_special_tokens", len(special))
    if not 0 <= reserved <= _MOST_RESERVED:
        raise DynqError(f"{file}: {reserved} special tokens, at most {_MOST_RESERVED:,} are believed; fetch it again")
    for rank in range(reserved):
        special.setdefault(rank, f"<SPECIAL_{rank}>")
    kept = raw["vocab"][: config["default_vocab_size"] - reserved] if "default_vocab_size" in config else raw["vocab"]
    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(kept)}
    check_lengths(ranks, file)
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, f"{text(token[:cut])} {text(token[cut:])}"))
    return {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated"},
                {"type": "ByteLevel", "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {text(token): rank + reserved for token, rank in ranks.items()},
            "merges": [merge[-1] for merge in sorted(merges)],
        },
        "added_tokens": [{"id": rank, "content": content, "special": True} for rank, content in special.items()],
    }


def check_lengths(tokens: Collection[str | bytes], where: str | Path) -> None:
    """DynqError for tokens so long that to look for all their splits would take minutes."""
    longest, total = max(map(len, tokens), default=0), sum(map(len, tokens))
    if longest > _LONGEST_TOKEN or total > _MOST_LETTERS:
        raise DynqError(f"{where}: a token of {longest:,}, all tokens of {total:,} letters, more than any model has")


def _letters() -> list[str]:
    """The character that byte-level BPE (GPT-2) writes for each byte: itself if visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
