"""Tokenizers: Hugging Face's files <-> GGUF's `tokenizer.*` keys.

Byte-level BPE (`dynq.pretokenizers` names its ways to split text), SentencePiece's BPE from tokenizer.model or
tokenizer.json, Gemma 4's BPE over whole lines, Mistral's tekken.json. Where llama.cpp itself gives other tokens than
the tokenizer it is given (tests/test_tokenizer.py pins the texts):

- It applies no Unicode normalisation: where a tokenizer.json asks for NFC (Qwen, Command-R), text that is not yet
  normalised differs.
- It has no flags lstrip, rstrip and single_word of added tokens; only if `general.name` contains "phi-3" or "phi3" does
  it drop the white space after special tokens.
- It puts SentencePiece's space prefix after every special token, as Llama 2's tokenizer.json does ("Prepend");
  Metaspace with the scheme "first" (Mistral 7B v0.3) puts it at the start of a text only, and not before a space.
- Of added tokens that overlap the longest is taken first, not the leftmost.
- A visible space (U+2581) in a text becomes a space too late to be found in a token for a run of spaces (Gemma 2, 3).
- The rules tekken and gpt-4o know upper and lower case in ASCII only and leave combining marks out of words;
  deepseek-llm and deepseek-coder do not count white space between U+0800 and U+4E00 among their CJK characters;
  contractions are looked for with s, but not with the long s (U+017F).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from dynq import pretokenizers, tekken
from dynq.errors import DynqError
from dynq.files import load_json, no_collection, read_bytes, taking_apart

_SPACE = "\u2581"  # SentencePiece's visible space
_GLM = {"eot": "<|user|>", "eom": "<|observation|>"}  # they end GLM's turns; llama.cpp does not know them by name
# Gemma 4's tokens that its chat parser in llama.cpp must see, so that they cannot be control tokens.
_GEMMA4_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'
}  # fmt: skip

_MOST_TOKENS = 1 << 19  # twice Gemma's; they take two seconds
_LARGEST_TEMPLATE, _LARGEST_MODEL = 1 << 22, 1 << 26  # bytes of a chat template and of a tokenizer.model
_PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}  # special tokens after which llama.cpp drops no white space in Phi-3


def from_directory(path: Path, vocab_size: int) -> dict[str, Any]:
    """GGUF's `tokenizer.*` keys of a Hugging Face directory.

    Args:
        path: holds tokenizer.json (byte-level BPE, or SentencePiece's BPE in that form), tokenizer.model
            (SentencePiece) or tekken.json.
        vocab_size: rows of the embedding; ids without a token become unused "[PADi]", added tokens without a row are
            left out.

    Raises:
        DynqError: no tokenizer, one of another kind, or a pre-tokenizer that llama.cpp has no name for.
    """
    with taking_apart(f"{path}: its tokenizer"):
        return _from_directory(path, vocab_size)


def _from_directory(path: Path, vocab_size: int) -> dict[str, Any]:
    keys: dict[str, Any]
    fast, spm, mistral = (path / name for name in ("tokenizer.json", "tokenizer.model", "tekken.json"))
    loaded = _object(fast)
    if loaded is not None and pretokenizers.from_json(loaded.get("pre_tokenizer")) is not None:
        keys = _byte_level(fast, loaded, vocab_size)
    elif loaded is not None and _model_type(path).startswith("gemma4"):
        keys = _gemma4(fast, loaded, vocab_size)
    elif spm.is_file():
        keys = _sentencepiece_model(spm, loaded or {}, vocab_size)
    elif loaded is not None:
        keys = _sentencepiece_json(fast, loaded, vocab_size)
    elif mistral.is_file():
        keys = _tekken(mistral, vocab_size)
    else:
        raise DynqError(f"{path}: no tokenizer.json, no tokenizer.model and no tekken.json")
    for name in ("tokenizer_config.json", "chat_template.json"):
        _object(path / name)  # gguf reads these again, without a look at what they are
    for template in (path / "chat_template.jinja", *path.glob("additional_chat_templates/*.jinja")):
        if template.exists():
            read_bytes(template, _LARGEST_TEMPLATE)
    special = gguf.SpecialVocab(path, n_vocab=vocab_size)
    if loaded is not None and "bos" not in special.add_special_token:
        special.add_special_token["bos"] = False  # no template adds one; llama.cpp's default may differ
    if keys["tokenizer.ggml.model"] == "gemma4":
        special.add_special_token["bos"] = True  # llama.cpp does so whatever the file says
    writer = gguf.GGUFWriter(None, "llama")
    special.add_to_gguf(writer, quiet=True)
    keys |= {k: v.value for k, v in writer.kv_data[0].items() if k.startswith("tokenizer.")}
    for value in keys.values():
        if isinstance(value, str | list):
            "".join(map(str, value)).encode()  # JSON can hold halves of characters, GGUF cannot
    return keys


def _object(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is no file."""
    return load_json(path, "") if path.exists() else None


def _model_type(path: Path) -> str:
    return str((_object(path / "config.json") or {}).get("model_type", ""))


def _byte_level(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = loaded["model"]
    _check(file, loaded, {"NFC"})
    steps = pretokenizers.from_json(loaded["pre_tokenizer"])
    assert steps is not None
    name = pretokenizers.name_of(steps, model.get("ignore_merges", False))
    if name is None:
        raise DynqError(
            f"{file}: llama.cpp has no known name for this pre-tokenizer ({steps}), so it would split text otherwise; "
            f"known are {', '.join(pretokenizers.PRE)}"
        )
    texts, types = _tokens(file, model, vocab_size)
    _place_added(file, loaded.get("added_tokens", []), texts, types)
    keys: dict[str, Any] = {}
    if "[gMASK]" in texts:
        name = {"llama-bpe": "glm4", "dbrx": "chatglm-bpe"}.get(name, name)
        keys = {f"tokenizer.ggml.{role}_token_id": texts.index(t) for role, t in _GLM.items() if t in texts}
    return _vocabulary("gpt2", name, texts, types) | {"tokenizer.ggml.merges": _merges(model)} | keys


def _gemma4(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """BPE over whole lines with byte tokens: SentencePiece's vocabulary with tokenizer.json's merges."""
    model = loaded["model"]
    _check(file, loaded, {"Replace"})
    texts, types = _tokens(file, model, vocab_size)
    _place_added(file, loaded.get("added_tokens", []), texts, types, visible=_GEMMA4_VISIBLE)
    keys = _vocabulary("gemma4", "gemma4", texts, types, space_prefix=False)
    return keys | {"tokenizer.ggml.merges": _merges(model)}


def _tekken(file: Path, vocab_size: int) -> dict[str, Any]:
    loaded = tekken.read(file)
    keys = _byte_level(file, loaded, vocab_size) | {"tokenizer.ggml.add_bos_token": True}
    special = {entry["content"]: entry["id"] for entry in loaded["added_tokens"]}
    keys |= {f"tokenizer.ggml.{role}_token_id": special[t] for role, t in tekken.ROLES.items() if t in special}
    template = file.with_name("chat_template.jinja")
    return keys | ({"tokenizer.chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {})


def _check(file: Path, loaded: dict[str, Any], normalizers: set[str]) -> None:
    kind = loaded["model"].get("type", "BPE")
    if kind != "BPE":
        raise DynqError(f"{file}: a tokenizer of type {kind} is not supported, BPE is")
    for part in pretokenizers.parts(loaded.get("normalizer")):
        if part["type"] not in normalizers:
            raise DynqError(
                f"{file}: llama.cpp does not do what the tokenizer's normalizer {part['type']} does to text"
            )
    # a regex of one's own can take for ever on a text; those of a byte-level pre-tokenizer are compared with known ones
    splits = None if "NFC" in normalizers else loaded.get("pre_tokenizer")
    for name, value in (*((key, loaded.get(key)) for key in ("normalizer", "post_processor", "decoder")), ("", splits)):
        if '"Regex"' in json.dumps(value):
            raise DynqError(f"{file}: the {name or 'pre_tokenizer'} has a regular expression, which llama.cpp has not")


def _merges(model: dict[str, Any]) -> list[str]:
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def _tokens(file: Path, model: dict[str, Any], vocab_size: int) -> tuple[list[str | None], list[int]]:
    """The texts and types of a tokenizer.json's model, without the added tokens."""
    texts: list[str | None] = [None] * vocab_size
    types = [int(TokenType.NORMAL)] * vocab_size
    for text, token in model["vocab"].items():
        _place(file, texts, token, text)
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[token] = int(TokenType.BYTE)
    if model.get("byte_fallback") and (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return texts, types


def _sentencepiece_json(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """SentencePiece's BPE kept as tokenizer.json: a token's score is minus the rank of the merge that makes it."""
    model = loaded["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise DynqError(
            f"{file}: this {model.get('type')} tokenizer is neither byte-level BPE nor SentencePiece BPE "
            "with byte fallback"
        )
    _check(file, loaded, {"Prepend", "Replace"})
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    texts, types = _tokens(file, model, vocab_size)
    scores = [
        0.0 if kind == TokenType.BYTE else -10000.0 if text is None else -float(ranks.get(text, len(ranks)))
        for text, kind in zip(texts, types, strict=True)
    ]
    for token in _place_added(file, loaded.get("added_tokens", []), texts, types, spaces=True):
        scores[token] = -1000.0
    prefix = any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for key in ("normalizer", "pre_tokenizer")
        for part in pretokenizers.parts(loaded.get(key))
    )
    return _vocabulary("llama", "default", texts, types, scores, prefix)


def _sentencepiece_model(file: Path, loaded: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_bytes(file, _LARGEST_MODEL) or b"nothing")
    except (OSError, RuntimeError):
        raise DynqError(f"{file}: not a SentencePiece model; fetch it again") from None
    texts: list[str | None] = [None] * vocab_size
    types = [int(TokenType.NORMAL)] * vocab_size
    scores = [-10000.0] * vocab_size
    for token, kind in enumerate(_piece_types(model.serialized_model_proto())):
        _place(file, texts, token, model.IdToPiece(token))
        scores[token] = float(model.GetScore(token))
        types[token] = kind  # the numbers are the same in SentencePiece and GGUF
    if any(s != round(s) for s, t in zip(scores, types, strict=True) if t == TokenType.NORMAL):
        # BPE scores are minus a rank; a unigram model's are log-probabilities, and llama.cpp's merging would not fit
        raise DynqError(f"{file}: a SentencePiece unigram model is not supported, SentencePiece BPE is")
    symbols = [
        {"id": token, "content": text}
        for token, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind == TokenType.USER_DEFINED
    ]
    for token in _place_added(file, symbols + _added_tokens(file.parent, loaded), texts, types, spaces=True):
        scores[token] = -1000.0
    prefix = "".join(model.EncodeAsPieces("a")).startswith(_SPACE)
    return _vocabulary("llama", "default", texts, types, scores, prefix)


def _piece_types(proto: bytes) -> Iterator[int]:
    """The type of each piece of a SentencePiece model, whose Python package tells all types but "user defined".

    A protocol buffer (sentencepiece_model.proto): field 1 of the model is a piece, field 3 of a piece its type.
    """
    for number, piece in _fields(proto):
        if number == 1 and isinstance(piece, bytes):
            yield next((int(v) for n, v in _fields(piece) if n == 3 and isinstance(v, int)), int(TokenType.NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and the values of a protocol buffer's fields (protobuf.dev/programming-guides/encoding)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        at += size
        yield number, message[at - size : at]


def _added_tokens(path: Path, loaded: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens added to a tokenizer.model by added_tokens.json, tokenizer_config.json and tokenizer.json."""
    added: dict[int, dict[str, Any]] = {}
    if (file := path / "added_tokens.json").is_file():
        for text, token in load_json(file, "").items():
            added[token] = {"id": token, "content": text}
    if (file := path / "tokenizer_config.json").is_file():
        table = load_json(file, "").get("added_tokens_decoder", {})
        added |= {int(token): {"id": int(token), **entry} for token, entry in table.items()}
    added |= {entry["id"]: entry for entry in loaded.get("added_tokens", [])}
    return list(added.values())


def _place(file: Path, texts: list[str | None], token: int, text: str) -> None:
    if type(token) is not int or token < 0 or not isinstance(text, str):
        raise DynqError(f"{file}: {text!r} with the id {token!r} is no token; fetch it again")
    if token >= len(texts):
        raise DynqError(f"{file}: token {token} ({text!r}) lies beyond the model's vocabulary of {len(texts):,}")
    texts[token] = text


def _place_added(
    file: Path,
    added: list[dict[str, Any]],
    texts: list[str | None],
    types: list[int],
    *,
    spaces: bool = False,
    visible: Collection[str] = (),
) -> list[int]:
    """Put added tokens in their places, with their types; returns their ids. An unknown token keeps its type.

    Tokens that the embedding has no row for are left out (Gemma 3's for images).
    spaces: text tokens hold SentencePiece's visible spaces; llama.cpp looks for spaces.
    visible: control tokens that are to be shown.
    """
    placed = []
    for entry in added:
        token, text = entry["id"], entry["content"]
        if token >= len(texts):
            continue
        control = (entry.get("special") or _looks_special(text)) and text not in visible
        _place(file, texts, token, text.replace(_SPACE, " ") if spaces and not control else text)
        if types[token] != TokenType.UNKNOWN:
            types[token] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        placed.append(token)
    return placed


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


# --- GGUF -> transformers -------------------------------------------------------------------------------------------


def added_bos(metadata: dict[str, Any]) -> int | None:
    """The BOS token that llama.cpp puts before a text, by a GGUF's metadata; None where it puts none."""
    model = metadata.get("tokenizer.ggml.model")
    pre = pretokenizers.find(metadata.get("tokenizer.ggml.pre", "default"))
    adds = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or (pre is not None and pre.adds_bos))
    token = metadata.get("tokenizer.ggml.bos_token_id")
    return token if (adds or model == "gemma4") and isinstance(token, int) else None


def name_that_tells(metadata: dict[str, Any]) -> str:
    """`general.name`, with "Phi-3" in it if the tokenizer is Phi-3's: llama.cpp knows it by nothing else.

    It does not open a file of that name without these tokens, as Phi-4's.
    """
    name: str = metadata["general.name"]
    if metadata["general.architecture"] != "phi3" or _is_called_phi3(metadata):
        return name
    return f"{name} (Phi-3)" if {*_PHI3_KEEPS, "</s>"} <= set(metadata["tokenizer.ggml.tokens"]) else name


def _is_called_phi3(metadata: dict[str, Any]) -> bool:
    return any(name in metadata.get("general.name", "").lower() for name in ("phi-3", "phi3"))


def from_gguf(metadata: dict[str, Any]) -> Any:
    """A transformers tokenizer (fast) rebuilt from GGUF's `tokenizer.*` keys.

    Raises:
        DynqError: no tokenizer, one of a model or pre-tokenizer that is not known here, or one that contradicts itself.
    """
    with taking_apart("the GGUF's tokenizer"), no_collection():
        return _from_gguf(metadata)


def _from_gguf(metadata: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens: list[str] = get("tokens") or []
    if not tokens:
        raise DynqError("the GGUF has no tokenizer (no key tokenizer.ggml.tokens)")
    if len(tokens) > _MOST_TOKENS:
        raise DynqError(f"the GGUF's tokenizer: {len(tokens):,} tokens, more than any model has; fetch the file again")
    types = get("token_type") or [int(TokenType.NORMAL)] * len(tokens)
    padding = [
        kind == TokenType.UNUSED and text == f"[PAD{i}]"
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    vocab = {text: i for i, text in enumerate(tokens) if not padding[i]}
    model = get("model")
    if model in ("gpt2", "gemma4"):
        _check_merges(vocab, get("merges", []))
    if model == "gpt2":
        parts = _byte_level_parts(vocab, get("merges", []), get("pre", "default"))
    elif model == "llama":
        merges = _merges_of_scores(tokens, types, get("scores") or [])
        parts = _sentencepiece_parts(tokens, types, merges, get("add_space_prefix", True))
    elif model == "gemma4":
        merges = [text.split(" ", 1) for text in get("merges", [])]
        parts = _sentencepiece_parts(tokens, types, merges, False)
    else:
        raise DynqError(f"the GGUF's tokenizer model {model!r} is not supported; supported are gpt2, llama and gemma4")
    special = {
        role: tokens[token]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(token := get(f"{key}_token_id"), int) and 0 <= token < len(tokens)
    }
    phi3 = _is_called_phi3(metadata)
    added = [
        {"id": i, "content": tokens[i], "special": kind == TokenType.CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": phi3 and tokens[i] not in _PHI3_KEEPS}
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
    try:
        built = Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the library raises nothing finer
        raise DynqError(f"the GGUF's tokenizer does not fit together ({error}); fetch the file again") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": text for role, text in special.items()},
    )


def _check_merges(vocab: dict[str, int], merges: list[str]) -> None:
    """DynqError where a merge has no token, which the library says only after seconds."""
    for text in merges:
        first, _, second = text.partition(" ")
        if not (first in vocab and second in vocab and first + second in vocab):
            raise DynqError(f"the GGUF's tokenizer: the merge {text[:80]!r} has no token; fetch the file again")


def _byte_level_parts(vocab: dict[str, int], merges: list[str], name: str) -> dict[str, Any]:
    pre = pretokenizers.find(name)
    if pre is None:
        known = ", ".join([*pretokenizers.PRE, *pretokenizers.SAME])
        raise DynqError(f"the GGUF's pre-tokenizer {name!r} is not known here; known are {known}")
    return {
        "normalizer": None,
        "pre_tokenizer": pretokenizers.to_json(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre.ignore_merges},
    }


def _used(tokens: list[str], types: list[int]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.UNUSED:
            vocab.setdefault(text, i)
    return vocab


def _merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every split of a token into two tokens is a merge, tried in the order of the scores."""
    vocab = _used(tokens, types)
    tekken.check_lengths(vocab, "the GGUF's tokenizer")
    merges = [
        (-scores[i], vocab[text[:cut]], vocab[text[cut:]], text[:cut], text[cut:])
        for text, i in vocab.items()
        if types[i] == TokenType.NORMAL
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    return [list(merge[3:]) for merge in sorted(merges)]


def _sentencepiece_parts(
    tokens: list[str], types: list[int], merges: list[list[str]], space_prefix: bool
) -> dict[str, Any]:
    vocab = _used(tokens, types)
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
            "type": "BPE", "vocab": vocab, "merges": merges,
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
