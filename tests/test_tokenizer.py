"""llama.cpp and transformers split and merge alike on exported byte-level BPEs, and a GGUF's tokenizer comes back."""

import json
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import pytest
import tiny_models
import transformers
from awkward import CASE, LONG_S, MARKS, STRINGS, WIDE, WORDS
from gguf import TokenType
from in_engine import ROOT, code, differ, gguf_of, tokens
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from dynq import pretokenizers, tokenizer
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.torch_model import load_tokenizer

SPECIAL = ["<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", "<|im_end|><|im_end|>", " <|im_start|> ", "<|im_"]


def test_there_are_enough_strings() -> None:
    assert len(set(WORDS)) >= 200
    assert len(set(STRINGS)) >= 300


def test_embedded_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("dynq-tiny")
    assert checkpoint.metadata["tokenizer.ggml.pre"] == "gpt-2"
    path = gguf_of(checkpoint.path, checkpoint.config["vocab_size"], tmp_path / "t.gguf")
    theirs = load_tokenizer(checkpoint)
    assert differ(tokens(path, STRINGS + SPECIAL), theirs) == []
    back = load_tokenizer(open_checkpoint(path))
    assert [s for s in STRINGS + SPECIAL if back(s)["input_ids"] != theirs(s)["input_ids"]] == []
    assert back.chat_template == theirs.chat_template
    assert (back.bos_token_id, back.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 2)
    ids = theirs(WORDS[0])["input_ids"]
    assert back.decode(ids) == theirs.decode(ids) == WORDS[0]


# --- every way to split ---------------------------------------------------------------------------------------------

# Where llama.cpp's own rule is another than the tokenizer's: what it puts in the place of a part of the regex
# (src/llama-vocab.cpp, and src/unicode.cpp, which sees only letters, marks, numbers and so on beyond ASCII).
_CASES = {  # case in ASCII only, and marks are no part of a word
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]": r"[\p{L}&&[^a-z]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]": r"[\p{L}&&[^A-Z]]",
}
_ASCII_CONTRACTIONS = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)": "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"}
_NO_WIDE_SPACE = {  # white space is taken out of the text before these classes are looked for
    "[一-龥ࠀ-一가-퟿]+": r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+",
    "[!-/:-~！-／：-～‘-‟　-。]+": r"[[!-/:-~！-／：-～‘-‟　-。]&&[^\s]]+",
}
_RUNS = {"digits": r"\p{N}+"}  # digits together: the same where, as in DeepSeek's, no token has parts of two digits
# kind -> (the replacements, the texts that are therefore split otherwise)
EXCEPTIONS: dict[str, tuple[dict[str, str], list[str]]] = {
    "llama-bpe": (_ASCII_CONTRACTIONS, LONG_S),
    "glm4": (_ASCII_CONTRACTIONS, LONG_S),
    "dbrx": (_ASCII_CONTRACTIONS, LONG_S),
    "qwen2": (_ASCII_CONTRACTIONS, LONG_S),
    "qwen35": (_ASCII_CONTRACTIONS, LONG_S),
    "tekken": (_CASES, MARKS + CASE),
    "gpt-4o": (_CASES | _ASCII_CONTRACTIONS, MARKS + CASE + LONG_S),
    "deepseek-coder": (_NO_WIDE_SPACE, WIDE),
    "deepseek-llm": (_NO_WIDE_SPACE | _RUNS, WIDE),
}
NFC = {"qwen2", "qwen35"}  # tokenizers that normalise
ADDED = [
    AddedToken("<tool>", normalized=False), AddedToken("[gMASK]", normalized=False, special=True),
    AddedToken("<|user|>", normalized=False, special=True), AddedToken("\n\n\n\n\n", normalized=False),
]  # fmt: skip


def rule(kind: str, replace: dict[str, str]) -> PreTokenizer:
    """A tokenizer's way to split with parts of its regexes replaced."""
    steps = []
    for step in tiny_models.PRE_TOKENIZERS[kind]:
        for theirs, ours in replace.items():
            step = step.replace(theirs, ours)
        steps.append(step)
    return tiny_models.pre_tokenizer(steps)


def borders(splitter: PreTokenizer, text: str) -> list[tuple[int, int]]:
    return [span for _, span in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", tiny_models.PRE_TOKENIZERS)
def test_byte_level_bpe(kind: str, tmp_path: Path) -> None:
    """Equal tokens, but for the texts in EXCEPTIONS and, where the tokenizer normalises, those not normalised."""
    text = (ROOT / "LICENSE").read_text().splitlines() + STRINGS * 4
    added = ADDED if kind == "glm4" else ADDED[:1]
    directory = tiny_models.byte_level(
        kind, text, tmp_path / kind, vocab_size=4000, across=True, nfc=kind in NFC, added=added
    )
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    path = gguf_of(directory, 4020, tmp_path / "t.gguf")
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["tokenizer.ggml.pre"] == kind
    ours = tokens(path, STRINGS)

    replace, listed = EXCEPTIONS.get(kind, ({}, []))
    exceptions = set(listed)
    as_llama_cpp = Tokenizer.from_file(str(directory / "tokenizer.json"))
    as_llama_cpp.pre_tokenizer, as_llama_cpp.normalizer = rule(kind, replace), None  # type: ignore[assignment]
    assert differ(ours, lambda s: as_llama_cpp.encode(s, add_special_tokens=False).ids) == []
    runs = _RUNS if kind == "deepseek-llm" else {}
    assert {s for s in STRINGS if borders(rule(kind, replace), s) != borders(rule(kind, runs), s)} == exceptions
    exceptions |= {"٠١٢٣٤٥٦٧٨٩"} if runs else set()  # tokens learnt from letters, of the end of one digit and the next
    denormal = {s for s in STRINGS if normalize("NFC", s) != s} if kind in NFC else set()
    different = set(differ(ours, theirs))
    assert denormal <= different <= denormal | exceptions
    assert bool(different & exceptions) == bool(exceptions) or exceptions == set(LONG_S)  # no merge may cross there
    assert set(differ(tokens(path, [normalize("NFC", s) for s in denormal]), theirs)) <= exceptions

    back = load_tokenizer(checkpoint)  # splits as the tokenizer does, not as llama.cpp does
    assert {s for s in STRINGS if back(s)["input_ids"] != theirs(s)["input_ids"]} == denormal
    assert differ(tokens(path, STRINGS[-5:], add_special=True), theirs, add_special=True) == []  # no first token
    types, texts = (checkpoint.metadata[f"tokenizer.ggml.{key}"] for key in ("token_type", "tokens"))
    assert [types[texts.index(t)] for t in ("<|begin|>", "[user word]", "a", "[PAD4019]")] == [
        TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.UNUSED,
    ]  # fmt: skip


def test_table_of_pre_tokenizers() -> None:
    """Every name has a test above; other names lead to it; what is written is read again."""
    assert set(pretokenizers.PRE) == set(tiny_models.PRE_TOKENIZERS)
    assert set(pretokenizers.SAME.values()) <= set(pretokenizers.PRE)
    assert not set(pretokenizers.SAME) & set(pretokenizers.PRE)
    for pre in pretokenizers.PRE.values():
        assert pretokenizers.from_json(pretokenizers.to_json(pre)) == pre.steps


def test_cased_letters_of_deepseek() -> None:
    ranges = pretokenizers.PRE["deepseek-llm"].steps[1][1][4:-2]
    letters: list[int] = []
    while ranges:
        span = 3 if ranges[1:2] == "-" else 1
        letters += range(ord(ranges[0]), ord(ranges[span - 1]) + 1)
        ranges = ranges[span:]
    assert letters == sorted(set(letters))
    assert len(letters) == 2729
    assert {category(chr(letter)) for letter in letters} == {"Lu", "Ll", "Lt"}


def test_glm_ends_its_turns(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("glm4", code(), tmp_path / "m", vocab_size=400, added=ADDED)
    keys = tokenizer.from_directory(directory, 400 + len(ADDED))
    texts = keys["tokenizer.ggml.tokens"]
    assert (keys["tokenizer.ggml.pre"], texts[keys["tokenizer.ggml.eot_token_id"]]) == ("glm4", "<|user|>")
    assert "tokenizer.ggml.eom_token_id" not in keys  # there is no <|observation|> here
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace('"ignore_merges": true', '"ignore_merges": false'))
    assert tokenizer.from_directory(directory, 500)["tokenizer.ggml.pre"] == "chatglm-bpe"


def test_another_split_is_seen(tmp_path: Path) -> None:
    """The comparison above can fail: the wrong pre-tokenizer gives other tokens."""
    numbers = [f"in {year}" for year in range(1900, 2100)] * 5  # so that some tokens are two and three digits
    directory = tiny_models.byte_level("llama-bpe", code() + STRINGS + numbers, tmp_path / "l", vocab_size=700)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace("{1,3}", ""))  # single digits: qwen2
    assert len(differ(tokens(gguf_of(directory, 720, tmp_path / "t.gguf"), numbers[:20]), theirs)) > 5


# --- added tokens ---------------------------------------------------------------------------------------------------


def test_flags_of_added_tokens_are_not_known_to_llama_cpp(tmp_path: Path) -> None:
    """Exactly these differ: spaces that a flag drops, a word that must stand alone, tokens that overlap."""
    added = [
        AddedToken("<|sep|>", lstrip=True, rstrip=True, special=True, normalized=False),  # as Phi-4's
        AddedToken("word", single_word=True, normalized=False),
        AddedToken("==>", normalized=False),
        AddedToken(">>>>", normalized=False),
    ]
    directory = tiny_models.byte_level("dbrx", code(), tmp_path / "m", vocab_size=500, added=added)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    alike = ["a<|sep|>b", "<|sep|><|sep|>", "a word b", "word", "==>", ">>>>", "==>==>", "x>>>>>>>>y"]
    path = gguf_of(directory, 510, tmp_path / "t.gguf")
    assert differ(tokens(path, alike), theirs) == []
    other = ["a <|sep|>b", "a<|sep|>\n\nb", "a <|sep|> b", "words", "==>>>>"]
    assert differ(tokens(path, other), theirs) == other
    back = load_tokenizer(open_checkpoint(path))
    assert differ(tokens(path, alike + other[:-1]), back) == []
    assert differ(tokens(path, other[-1:]), back) == ["==>>>>"]  # the longest first there, the leftmost here


def test_added_token_without_a_row(tmp_path: Path) -> None:
    """Gemma 3's token for images stands beyond the embedding of its text model."""
    directory = tiny_models.byte_level("gpt-2", ["text"], tmp_path, vocab_size=300, added=[AddedToken("<image>")])
    size = len(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"])
    keys = tokenizer.from_directory(directory, size)
    assert len(keys["tokenizer.ggml.tokens"]) == size
    assert not {"<image>", "[user word]"} & set(keys["tokenizer.ggml.tokens"])


def test_beginning_token_is_added_where_the_template_says_so(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("llama-bpe", code(), tmp_path / "l", vocab_size=500)
    fast = directory / "tokenizer.json"
    loaded = json.loads(fast.read_text())
    piece = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
    loaded["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }
    fast.write_text(json.dumps(loaded))
    path = gguf_of(directory, 500, tmp_path / "t.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs("a")["input_ids"][0] == 0
    assert differ(tokens(path, STRINGS[:60], add_special=True), theirs, add_special=True) == []
    assert load_tokenizer(open_checkpoint(path))("Hello")["input_ids"] == theirs("Hello")["input_ids"]


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ({"model": "gpt2", "pre": "llama3"}, 7),
        ({"model": "gpt2", "pre": "glm4"}, None),
        ({"model": "gpt2", "pre": "qwen2"}, None),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True}, 7),
        ({"model": "llama", "pre": "default"}, 7),
        ({"model": "llama", "add_bos_token": False}, None),
        ({"model": "gemma4", "add_bos_token": False}, 7),  # llama.cpp does not listen there
    ],
)
def test_first_token_of_a_file(keys: dict[str, Any], first: int | None) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**keys, "bos_token_id": 7}.items()}
    assert tokenizer.added_bos(metadata) == first


# --- what is refused ------------------------------------------------------------------------------------------------


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("qwen2", ["text"], tmp_path, vocab_size=300)
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace(r"\\p{N}", r"\\p{N}{1,7}"))
    with pytest.raises(DynqError, match=r"no known name for this pre-tokenizer .*known are gpt-2, llama-bpe"):
        tokenizer.from_directory(directory, 300)


def test_split_that_loses_text_is_refused(tmp_path: Path) -> None:
    """To remove what no regex matches is to isolate only where the regex matches everything."""
    directory = tiny_models.byte_level("deepseek-v3", ["text"], tmp_path, vocab_size=300)
    assert tokenizer.from_directory(directory, 300)["tokenizer.ggml.pre"] == "deepseek-v3"
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace('"Isolated"', '"Removed"').replace('"invert": false', '"invert": true'))
    with pytest.raises(DynqError, match=r"no known name for this pre-tokenizer .*Removed"):
        tokenizer.from_directory(directory, 300)


def test_unknown_normalizer_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("gpt-2", ["text"], tmp_path, vocab_size=300)
    fast = directory / "tokenizer.json"
    loaded = json.loads(fast.read_text()) | {"normalizer": {"type": "Lowercase"}}
    fast.write_text(json.dumps(loaded))
    with pytest.raises(DynqError, match=r"tokenizer\.json: llama\.cpp does not .* normalizer Lowercase"):
        tokenizer.from_directory(directory, 300)


def test_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("gpt-2", ["text"], tmp_path, vocab_size=300)
    with pytest.raises(DynqError, match="beyond the model's vocabulary of 200"):
        tokenizer.from_directory(directory, 200)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DynqError, match=r"no tokenizer\.json, no tokenizer\.model and no tekken\.json"):
        tokenizer.from_directory(tmp_path, 10)
    with pytest.raises(DynqError, match="no tokenizer"):
        tokenizer.from_gguf({})
    with pytest.raises(DynqError, match="model 'rwkv' is not supported"):
        tokenizer.from_gguf({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "rwkv"})
    with pytest.raises(DynqError, match="pre-tokenizer 'new' is not known here; known are gpt-2, llama-bpe"):
        tokenizer.from_gguf(
            {f"tokenizer.ggml.{k}": v for k, v in (("tokens", ["a"]), ("model", "gpt2"), ("pre", "new"))}
        )
