"""How byte-level BPE splits text before merging: llama.cpp's names and Hugging Face's pre-tokenizers.

llama.cpp splits by rules of its own, chosen by a name (the key `tokenizer.ggml.pre`). `PRE` holds, for each name, the
pre-tokenizer of the tokenizer.json files that it was made for. Sources: the names, src/llama-vocab.cpp and
conversion/base.py (`get_vocab_base_pre`) of llama.cpp; the patterns, tokenizer.json of the models named here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_REST_MARKS = _REST.replace(r"\p{L}", r"\p{L}\p{M}")
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_CASED = (  # DeepSeek's letters that have a case, in the Unicode of their time
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

Steps = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pre:
    """A way to split.

    steps: ("split", regex), ("digits",) or ("gpt-2",), the last being the regex built into ByteLevel.
    ignore_merges: whether a piece that is itself a token is taken whole.
    adds_bos: whether llama.cpp puts BOS first where a file has no add_bos_token key.
    """

    steps: Steps
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3: Steps = (("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"),)
# Of two names that do the same, a tokenizer.json gets the first. The models are examples.
PRE: dict[str, Pre] = {
    "gpt-2": Pre((("gpt-2",),)),  # GPT-2, OLMo 1
    "llama-bpe": Pre(_LLAMA3, ignore_merges=True, adds_bos=True),  # Llama 3, SmolLM 3
    "dbrx": Pre(_LLAMA3),  # Phi-4, OLMo 2, Granite 4
    "glm4": Pre(_LLAMA3, ignore_merges=True),  # GLM-4, GLM-4.5
    "qwen2": Pre((("split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"),)),  # Qwen 2, 2.5, 3, Next
    "qwen35": Pre((("split", rf"{_CONTRACTIONS}|{_WORD_MARKS}|\p{{N}}|{_REST_MARKS}"),)),
    "smollm": Pre((("digits",), ("gpt-2",))),  # SmolLM 1 and 2, Granite 3, Command-R, StarCoder
    "tekken": Pre(  # Mistral Nemo, Small 3
        (("split", rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_REST_SLASH}"),), ignore_merges=True, adds_bos=True
    ),
    "gpt-4o": Pre(  # gpt-oss, Llama 4, Phi-4-mini
        (("split", rf"{_CAMEL[0]}{_CONTRACTIONS}?|{_CAMEL[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}"),)
    ),
    "deepseek-llm": Pre(  # DeepSeek LLM, V2, Coder V2
        (
            ("split", "[\r\n]"),
            ("split", rf"\s?[{_CASED}]+"),
            ("split", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            ("split", r"\s+$"),
            ("split", _CJK),
            ("digits",),
        )
    ),
    "deepseek-coder": Pre(
        (("split", "[\r\n]"), ("split", r"\s?\p{L}+"), ("split", r"\s?\p{P}+"), ("split", _CJK), ("digits",))
    ),
    "deepseek-v3": Pre(  # DeepSeek V3, R1
        (
            ("split", r"\p{N}{1,3}"),
            ("split", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            (
                "split",
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
                "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
            ),
        )
    ),
}
# Other names for the same rules, met in files that others made.
SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "falcon-h1": "llama-bpe",
    "pixtral": "llama-bpe", "midm-2.0": "llama-bpe", "lfm2": "llama-bpe",
    "smaug-bpe": "dbrx", "chatglm-bpe": "dbrx", "glm5": "glm4",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "stablelm2": "qwen2", "hunyuan": "qwen2", "kormo": "qwen2",
    "solar-open": "qwen2", "grok-2": "qwen2",
    "refact": "smollm", "starcoder": "smollm", "command-r": "smollm", "codeshell": "smollm", "exaone": "smollm",
    "minerva-7b": "smollm", "mellum2": "smollm",
    "exaone4": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "phi-2": "gpt-2", "jais": "gpt-2", "trillion": "gpt-2",
    "gigachat": "gpt-2", "mellum": "gpt-2", "a.x-4.0": "gpt-2", "granite-docling": "gpt-2",
    "llama4": "gpt-4o", "kanana2": "gpt-4o", "minimax-m2": "gpt-4o",
    "hunyuan-dense": "deepseek-v3", "joyai-llm": "deepseek-v3",
}  # fmt: skip


def find(name: str) -> Pre | None:
    """What llama.cpp does for a name; None if it is not known here."""
    return PRE.get(SAME.get(name, name))


def name_of(steps: Steps, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a way to split; None if it has none.

    A near match, as llama.cpp's own converter makes, is one that differs in `ignore_merges`: whole pieces that are
    tokens but that no merge reaches are rare.
    """
    names = [name for name, pre in PRE.items() if pre.steps == steps]
    return next((name for name in names if PRE[name].ignore_merges == ignore_merges), names[0] if names else None)


def parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The elements of a (nested) Sequence of a tokenizer.json."""
    if node is None:
        return []
    children = node.get("pretokenizers", node.get("normalizers"))
    return [node] if children is None else [part for child in children for part in parts(child)]


def from_json(node: dict[str, Any] | None) -> Steps | None:
    """A byte-level pre-tokenizer of a tokenizer.json in the form of `PRE`; None if it is not byte-level at all.

    Parts that `PRE` has no word for are kept as their JSON, so that they match nothing and show in the error.
    """
    steps: list[tuple[str, ...]] = []
    byte_level = False
    for part in parts(node):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            byte_level = True
            if part.get("use_regex", True):
                steps.append(("gpt-2",))
        elif kind == "Split" and _isolates(part):
            steps.append(("split", part["pattern"]["Regex"]))
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append(("digits",))
        else:
            byte_level = byte_level or kind == "ByteLevel"
            steps.append(("unknown", json.dumps(part, ensure_ascii=False)))
    return tuple(steps) if byte_level else None


def _isolates(split: dict[str, Any]) -> bool:
    """Whether a Split makes each match a piece of its own and loses nothing.

    Phi-4 and Granite 4 write it as "remove what does not match", the same where the regex matches all text.
    """
    regex = split["pattern"].get("Regex")
    if regex is None:
        return False
    matches_all = "[^\\s" in regex and regex.endswith(r"|\s+")
    behavior = (split["behavior"], bool(split.get("invert")))
    return behavior == ("Isolated", False) or (behavior == ("Removed", True) and matches_all)


def to_json(pre: Pre) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json."""
    nodes: list[dict[str, Any]] = []
    for step in pre.steps:
        if step[0] == "split":
            nodes.append({"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated", "invert": False})
        elif step[0] == "digits":
            nodes.append({"type": "Digits", "individual_digits": True})
    built_in = ("gpt-2",) in pre.steps
    nodes.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": built_in})
    return {"type": "Sequence", "pretokenizers": nodes}
