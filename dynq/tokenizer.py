"""Tokenizers: Hugging Face's files <-> GGUF's `tokenizer.*` keys.

llama.cpp splits text by rules of its own, chosen by a name (`tokenizer.ggml.pre`). `_PRE` holds, for each name, the
pre-tokenizer of a tokenizer.json that splits alike. llama.cpp applies no Unicode normalisation: where a
tokenizer.json asks for one (Qwen: NFC), text that is not yet normalised gives other tokens there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from dynq.errors import DynqError

_SPACE = "\u2581"  # SentencePiece's visible space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Steps = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Pre:
    """How a byte-level BPE splits text before merging.

    steps: ("split", regex), ("digits",) or ("gpt-2",), the last being the regex built into ByteLevel.
    ignore_merges: whether a piece that is itself a token is taken whole.
    """

    steps: Steps
    ignore_merges: bool = False


_LLAMA3: Steps = (("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"),)
# llama.cpp's name -> what it does (src/llama-vocab.cpp). Where two names do the same, the first is written.
_PRE: dict[str, _Pre] = {
    "gpt-2": _Pre((("gpt-2",),)),
    "llama-bpe": _Pre(_LLAMA3, ignore_merges=True),
    "smaug-bpe": _Pre(_LLAMA3),
    "qwen2": _Pre((("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"),)),
    "smollm": _Pre((("digits",), ("gpt-2",))),
    "tekken": _Pre((("split", rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_REST_SLASH}"),), ignore_merges=True),
    "gpt-4o": _Pre(
        (("split", rf"{_CAMEL[0]}{_CONTRACTIONS}?|{_CAMEL[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}"),)
    ),
    "deepseek-coder": _Pre(
        (
            ("split", "[\r\n]"),
            ("split", r"\s?\p{L}+"),
            ("split", r"\s?\p{P}+"),
            ("split", "[一-龥ࠀ-一가-퟿]+"),
            ("digits",),
        )
    ),
}
# Other names for the same rules, met in files that others made.
_SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "dbrx": "smaug-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "stablelm2": "qwen2",
    "refact": "smollm", "starcoder": "smollm", "command-r": "smollm", "exaone4": "gpt-2", "olmo": "gpt-2",
}  # fmt: skip
_ADDS_BOS = {"llama-bpe", "tekken"}  # what llama.cpp does where a file has no add_bos_token key


def from_directory(path: Path, vocab_size: int) -> dict[str, Any]:
    """GGUF's `tokenizer.*` keys of a Hugging Face directory.

    Args:
        path: holds tokenizer.json (byte-level BPE, or SentencePiece's BPE in that form) or tokenizer.model.
        vocab_size: rows of the embedding; ids without a token become unused "[PADi]".

    Raises:
        DynqError: no tokenizer, one of another kind, or a pre-tokenizer that llama.cpp has no name for.
    """
    keys: dict[str, Any]
    fast = path / "tokenizer.json"
    loaded = json.loads(fast.read_text(encoding="utf-8")) if fast.is_file() else None
    if loaded is not None and _steps(loaded.get("pre_tokenizer")) is not None:
        keys = _byte_level(fast, loaded, vocab_size)
    elif (path / "tokenizer.model").is_file():
        keys = _sentencepiece_model(path, vocab_size)
    elif loaded is not None:
        keys = _sentencepiece_json(fast, loaded, vocab_size)
    else:
        raise DynqError(f"{path}: no tokenizer.json and no tokenizer.model")
    special = gguf.SpecialVocab(path, load_merges=keys["tokenizer.ggml.model"] == "gpt2", n_vocab=vocab_size)
    if loaded is not None and "bos" not in special.add_special_token:
        special.add_special_token["bos"] = False  # no template adds one; llama.cpp's default may differ
    writer = gguf.GGUFWriter(None, "llama")
    special.add_to_gguf(writer, quiet=True)
    return keys | {k: v.value for k, v in writer.kv_data[0].items() if k.startswith("tokenizer.")}


def _byte_level(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = loaded["model"]
    if model.get("type", "BPE") != "BPE":
        raise DynqError(f"{file}: a tokenizer of type {model.get('type')} is not supported, BPE is")
    steps = _steps(loaded["pre_tokenizer"])
    wanted = [name for name, pre in _PRE.items() if pre.steps == steps]
    name = next((n for n in wanted if _PRE[n].ignore_merges == model.get("ignore_merges", False)), None)
    if name is None and wanted:
        name = wanted[
            0
        ]  # whole pieces that no merge reaches are rare: a near match, as llama.cpp's own converter makes
    if name is None:
        raise DynqError(
            f"{file}: llama.cpp has no known name for this pre-tokenizer ({steps}), so it would split text otherwise; "
            f"known are {', '.join(_PRE)}"
        )
    texts: list[str | None] = [None] * vocab_size
    types = [int(TokenType.NORMAL)] * vocab_size
    for text, token in model["vocab"].items():
        _place(file, texts, token, text)
    _place_added(file, loaded.get("added_tokens", []), texts, types)
    return _vocabulary("gpt2", name, texts, types)


def _sentencepiece_json(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """SentencePiece's BPE kept as tokenizer.json: a token's score is minus the rank of the merge that makes it."""
    model = loaded["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise DynqError(
            f"{file}: this {model.get('type')} tokenizer is neither byte-level BPE nor SentencePiece BPE "
            "with byte fallback"
        )
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    texts: list[str | None] = [None] * vocab_size
    types = [int(TokenType.NORMAL)] * vocab_size
    scores = [-10000.0] * vocab_size
    for text, token in model["vocab"].items():
        _place(file, texts, token, text)
        scores[token] = -float(ranks.get(text, len(ranks)))
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[token] = int(TokenType.BYTE)
            scores[token] = 0.0
    for token in _place_added(file, loaded.get("added_tokens", []), texts, types):
        scores[token] = -1000.0
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    prefix = any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in _parts(loaded.get("normalizer")) + _parts(loaded.get("pre_tokenizer"))
    )
    return _vocabulary("llama", "default", texts, types, scores, prefix)


def _sentencepiece_model(path: Path, vocab_size: int) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    file = path / "tokenizer.model"
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        raise DynqError(f"{file}: not a SentencePiece model; fetch it again") from None
    texts: list[str | None] = [None] * vocab_size
    types = [int(TokenType.NORMAL)] * vocab_size
    scores = [-10000.0] * vocab_size
    for token in range(model.vocab_size()):
        _place(file, texts, token, model.IdToPiece(token))
        scores[token] = float(model.GetScore(token))
        if model.IsUnknown(token):
            types[token] = int(TokenType.UNKNOWN)
        elif model.IsControl(token):
            types[token] = int(TokenType.CONTROL)
        elif model.IsUnused(token):
            types[token] = int(TokenType.UNUSED)
        elif model.IsByte(token):
            types[token] = int(TokenType.BYTE)
    if any(s != round(s) for s, t in zip(scores, types, strict=True) if t == TokenType.NORMAL):
        # BPE scores are minus a rank; a unigram model's are log-probabilities, and llama.cpp's merging would not fit
        raise DynqError(f"{file}: a SentencePiece unigram model is not supported, SentencePiece BPE is")
    for token in _place_added(file, _added_tokens(path), texts, types):
        scores[token] = -1000.0
    prefix = "".join(model.EncodeAsPieces("a")).startswith(_SPACE)
    return _vocabulary("llama", "default", texts, types, scores, prefix)


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """Tokens added beside a tokenizer.model: added_tokens.json, then tokenizer_config.json's decoder table."""
    added: dict[int, dict[str, Any]] = {}
    if (file := path / "added_tokens.json").is_file():
        for text, token in json.loads(file.read_text(encoding="utf-8")).items():
            added[token] = {"id": token, "content": text}
    if (file := path / "tokenizer_config.json").is_file():
        table = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        added |= {int(token): {"id": int(token), **entry} for token, entry in table.items()}
    return list(added.values())


def _place(file: Path, texts: list[str | None], token: int, text: str) -> None:
    if token >= len(texts):
        raise DynqError(f"{file}: token {token} ({text!r}) lies beyond the model's vocabulary of {len(texts):,}")
    texts[token] = text


def _place_added(file: Path, added: list[dict[str, Any]], texts: list[str | None], types: list[int]) -> list[int]:
    """Put added tokens in their places, with their types; returns their ids. An unknown token keeps its type."""
    for entry in added:
        token, text = entry["id"], entry["content"]
        control = entry.get("special") or _looks_special(text)
        _place(file, texts, token, text if control else text.replace(_SPACE, " "))
        if types[token] != TokenType.UNKNOWN:
            types[token] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return [entry["id"] for entry in added]


def _looks_special(text: str) -> bool:
    """Control tokens that their makers did not mark as special; the list is that of llama.cpp's converter."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<\uff5c")) and text.endswith(("|>", "\uff5c>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _vocabulary(
    model: str,
    pre: str,
    texts: list[str | None],
    types: list[int],
    scores: list[float] | None = None,
    space_prefix: bool | None = None,
) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)],
    }
    if scores is not None:
        keys["tokenizer.ggml.scores"] = scores
    unused = int(TokenType.UNUSED)
    keys["tokenizer.ggml.token_type"] = [
        unused if text is None else kind for text, kind in zip(texts, types, strict=True)
    ]
    if space_prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = space_prefix
    return keys


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The elements of a (nested) Sequence of a tokenizer.json."""
    if node is None:
        return []
    children = node.get("pretokenizers") or node.get("normalizers")
    return [part for child in children for part in _parts(child)] if children else [node]


def _steps(node: dict[str, Any] | None) -> Steps | None:
    """A byte-level pre-tokenizer in the form of `_PRE`; None if it is not byte-level at all.

    Parts that `_PRE` has no word for are kept as their JSON, so that they match nothing and show in the error.
    """
    steps: list[tuple[str, ...]] = []
    byte_level = False
    for part in _parts(node):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            byte_level = True
            if part.get("use_regex", True):
                steps.append(("gpt-2",))
        elif (
            kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]
        ):
            steps.append(("split", part["pattern"]["Regex"]))
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append(("digits",))
        else:
            byte_level = byte_level or kind == "ByteLevel"
            steps.append(("unknown", json.dumps(part, ensure_ascii=False)))
    return tuple(steps) if byte_level else None


# --- GGUF -> transformers -------------------------------------------------------------------------------------------


def added_bos(metadata: dict[str, Any]) -> int | None:
    """The BOS token that llama.cpp puts before a text, by a GGUF's metadata; None where it puts none."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    default = metadata.get("tokenizer.ggml.model") == "llama" or _SAME.get(pre, pre) in _ADDS_BOS
    token = metadata.get("tokenizer.ggml.bos_token_id")
    return token if metadata.get("tokenizer.ggml.add_bos_token", default) and isinstance(token, int) else None


def from_gguf(metadata: dict[str, Any]) -> Any:
    """A transformers tokenizer (fast) rebuilt from GGUF's `tokenizer.*` keys.

    Raises:
        DynqError: no tokenizer, or one of a model or pre-tokenizer that is not known here.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens: list[str] = get("tokens") or []
    if not tokens:
        raise DynqError("the GGUF has no tokenizer (no key tokenizer.ggml.tokens)")
    types = get("token_type") or [int(TokenType.NORMAL)] * len(tokens)
    padding = [
        kind == TokenType.UNUSED and text == f"[PAD{i}]"
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    vocab = {text: i for i, text in enumerate(tokens) if not padding[i]}
    model = get("model")
    pre = get("pre", "default")
    pre = _SAME.get(pre, pre)
    if model == "gpt2":
        parts = _byte_level_parts(vocab, get("merges", []), pre)
    elif model == "llama":
        parts = _sentencepiece_parts(tokens, types, get("scores") or [], get("add_space_prefix", True))
    else:
        raise DynqError(f"the GGUF's tokenizer model {model!r} is not supported; supported are gpt2 and llama")
    special = {
        role: tokens[token]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(token := get(f"{key}_token_id"), int) and 0 <= token < len(tokens)
    }
    added = [
        {"id": i, "content": tokens[i], "special": kind == TokenType.CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]  # fmt: skip
    bos = added_bos(metadata)
    ends = [
        None if bos is None else special.get("bos"),
        special.get("eos") if get("add_eos_token", False) else None,
    ]
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "post_processor": _template(vocab, ends), **parts,
    }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": text for role, text in special.items()},
    )


def _byte_level_parts(vocab: dict[str, int], merges: list[str], pre: str) -> dict[str, Any]:
    if pre not in _PRE:
        raise DynqError(f"the GGUF's pre-tokenizer {pre!r} is not known here; known are {', '.join([*_PRE, *_SAME])}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps: list[dict[str, Any]] = []
    for step in _PRE[pre].steps:
        if step[0] == "split":
            steps.append({"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated", "invert": False})
        elif step[0] == "digits":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            byte_level["use_regex"] = True
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": _PRE[pre].ignore_merges},
    }


def _sentencepiece_parts(
    tokens: list[str], types: list[int], scores: list[float], space_prefix: bool
) -> dict[str, Any]:
    """Merges from scores: every split of a token into two tokens is a merge, tried in the order of the scores."""
    vocab: dict[str, int] = {}
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.UNUSED:
            vocab.setdefault(text, i)
    merges = [
        (-scores[i], vocab[text[:cut]], vocab[text[cut:]], text[:cut], text[cut:])
        for text, i in vocab.items()
        if types[i] == TokenType.NORMAL
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_prefix else []
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    invisible = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, visible]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [invisible, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "vocab": vocab, "merges": [list(m[3:]) for m in sorted(merges)],
            "unk_token": unknown, "fuse_unk": True, "byte_fallback": True,
        },
    }  # fmt: skip


def _template(vocab: dict[str, int], ends: list[str | None]) -> dict[str, Any] | None:
    """A post-processor that adds the first and the last token, where there are such."""
    first, last = ends
    if first is None and last is None:
        return None

    def wrap(sequence: str, kind: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        if first is not None:
            pieces.insert(0, {"SpecialToken": {"id": first, "type_id": kind}})
        if last is not None:
            pieces.append({"SpecialToken": {"id": last, "type_id": kind}})
        return pieces

    special = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in ends if t is not None}
    return {
        "type": "TemplateProcessing",
        "single": wrap("A", 0),
        "pair": wrap("A", 0) + wrap("B", 1),
        "special_tokens": special,
    }
