"""SentencePiece's BPE and its relatives: Llama 2, Mistral, Phi-3, Gemma, Gemma 4; and Mistral's tekken.json."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import transformers
from awkward import STRINGS, WORDS
from gguf import TokenType
from in_engine import code, differ, gguf_of, tokens
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.integrations.mistral.tokenizer import MistralConverter

from dynq import tokenizer
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.torch_model import load_tokenizer

SIZE = 1500
RUNS = ["\n" * i for i in range(1, 32)] + ["▁" * i for i in range(2, 32)]  # Gemma's tokens for white space
SYMBOLS = ["<mask>", "<start_of_turn>", "<end_of_turn>", *RUNS, "<h1>", "</h1>", "\t"]
GEMMA = [
    "<h1>a</h1>", "\n\n\n<h1>", "a" + " " * 40 + "b", "x" + "\n" * 45 + "y", "   \n\n\n",
    "<start_of_turn>user\nhi<end_of_turn>\n",
]  # fmt: skip
VISIBLE_SPACE = "▁ lower▁block ▁▁"


def train(directory: Path, config: dict[str, Any], **settings: Any) -> Path:
    """A directory with a SentencePiece BPE, trained as Llama's was: byte fallback, single digits, spaces kept."""
    SentencePieceTrainer.Train(
        sentence_iterator=iter(code() + WORDS * 3), model_prefix=str(directory / "tokenizer"), model_type="bpe",
        vocab_size=SIZE, byte_fallback=True, split_digits=True, remove_extra_whitespaces=False, num_threads=1,
        normalization_rule_name="identity", character_coverage=0.995, allow_whitespace_only_pieces=True,
        minloglevel=2, **settings,
    )  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **names}
    directory = train(tmp_path_factory.mktemp("llama"), config)
    ids = {"vocab_size": SIZE + 10, "bos_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps({**tiny_models.COMMON, "model_type": "llama", **ids}))
    return directory


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return train(
        tmp_path_factory.mktemp("gemma"), {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **names},
        add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", user_defined_symbols=SYMBOLS,
    )  # fmt: skip


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_STYLES: dict[str, dict[str, Any]] = {
    "llama": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}},
    "mistral": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    },
    "gemma": {
        "normalizer": _REPLACE,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
        },
    },
}  # fmt: skip


def as_json(source: Path, directory: Path, style: str, added: dict[str, dict[str, Any]], model_type: str) -> Path:
    """A SentencePiece model as the tokenizer.json that transformers converts it to; added: text -> its flags."""
    model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    scores = {model.IdToPiece(i): model.GetScore(i) for i in range(model.vocab_size())}
    vocab = {text: i for i, text in enumerate(scores)}
    symbols = SYMBOLS if style == "gemma" else []
    flags = {t: {"special": not model.IsUnknown(i)} for t, i in vocab.items() if model.IsControl(i)}
    flags |= {"<unk>": {"special": True}, **{t: {"special": "turn" in t} for t in symbols}, **added}
    default = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    ids = {**vocab, **{t: len(vocab) + i for i, t in enumerate(t for t in flags if t not in vocab)}}
    loaded = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [{"id": ids[t], "content": t, **default, **f} for t, f in flags.items()],
        "normalizer": None, "pre_tokenizer": None, **_STYLES[style],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": [list(pair) for pair in generate_merges(vocab, scores)],
        },
    }  # fmt: skip
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(loaded))
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    del config["add_bos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": SIZE + 10}))
    return directory


def test_llama_2(llama: Path, tmp_path: Path) -> None:
    path = gguf_of(llama, SIZE + 10, tmp_path / "t.gguf")
    metadata = open_checkpoint(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert types[300:SIZE] == [TokenType.NORMAL] * (SIZE - 300)
    assert types[SIZE:] == [TokenType.UNUSED] * 10
    original = SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    theirs = load_tokenizer(open_checkpoint(path))  # transformers' own reading of the model needs protobuf
    ours = tokens(path, STRINGS)
    assert differ(ours, original.Encode) == []
    assert differ(ours, theirs) == []
    assert differ(tokens(path, STRINGS[:50], add_special=True), theirs, add_special=True) == []
    assert theirs("x")["input_ids"][0] == 1
    assert theirs.decode(theirs(WORDS[60])["input_ids"], skip_special_tokens=True) == WORDS[60]


def test_llama_2_kept_as_json(llama: Path, tmp_path: Path) -> None:
    """Scores come from the order of merges."""
    added: dict[str, dict[str, Any]] = {"<|begin|>": {"special": True}, "<|end|>": {"special": True}}
    directory = as_json(llama, tmp_path / "m", "llama", added | {"[user word]": {}, "<tool>": {}}, "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    path = gguf_of(directory, SIZE + 10, tmp_path / "t.gguf")
    assert differ(tokens(path, STRINGS), theirs) == []
    assert differ(tokens(path, STRINGS[:50], add_special=True), theirs, add_special=True) == []  # no template, no BOS
    assert differ(tokens(path, STRINGS), load_tokenizer(open_checkpoint(path))) == []


def test_prefix_at_the_start_only(llama: Path, tmp_path: Path) -> None:
    """Mistral 7B v0.3's Metaspace: no prefix before a space or after a token; exactly those texts differ."""
    added: dict[str, dict[str, Any]] = {"<|begin|>": {"special": True}, "<|end|>": {"special": True}, "<tool>": {}}
    directory = as_json(llama, tmp_path / "m", "mistral", added, "mistral")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    path = gguf_of(directory, SIZE + 10, tmp_path / "t.gguf")

    def differs(text: str) -> bool:
        pieces = [text]
        for token in added:
            pieces = [part for piece in pieces for part in piece.split(token)]
        return text.startswith((" ", "▁")) or any(pieces[1:])

    assert differ(tokens(path, STRINGS), theirs) == [s for s in STRINGS if differs(s)]
    as_llama = as_json(llama, tmp_path / "l", "llama", added, "llama")  # what llama.cpp does
    assert differ(tokens(path, STRINGS), transformers.AutoTokenizer.from_pretrained(as_llama)) == []


def test_phi_3(llama: Path, tmp_path: Path) -> None:
    """Its tokens drop the white space after them; llama.cpp does so by the model's name, in ASCII."""
    added: dict[str, dict[str, Any]] = {"<|endoftext|>": {"special": True}, "</s>": {"rstrip": True}}
    added |= {t: {"special": True, "rstrip": True} for t in ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")}
    directory = as_json(llama, tmp_path / "m", "llama", added, "phi3")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    chats = ["<|user|>\nHi <|end|>\n<|assistant|>  \n x", "<|user|>   ", "<s> a </s> b", "<|end|>\t\r\n\x0b\x0cx"]
    plain, wide = ["<|user|>Hi<|end|>", "<|endoftext|> x"], ["<|end|>\u00a0x", "a <|end|>\u3000x"]
    named = gguf_of(directory, SIZE + 10, tmp_path / "a.gguf", name="Phi-3-mini")
    ours = tokens(named, STRINGS + chats + plain + wide)
    assert differ(ours, theirs) == wide
    assert differ(ours, load_tokenizer(open_checkpoint(named))) == wide
    other = tokens(gguf_of(directory, SIZE + 10, tmp_path / "b.gguf", name="mini"), STRINGS + chats + plain + wide)
    assert differ(other, theirs) == ["<|end|>\n\n<|begin|>", *chats, *wide]
    metadata = open_checkpoint(named).metadata | {"general.architecture": "phi3"}
    assert tokenizer.name_that_tells(metadata) == "Phi-3-mini"
    assert tokenizer.name_that_tells(metadata | {"general.name": "mini"}) == "mini (Phi-3)"
    assert tokenizer.name_that_tells(metadata | {"general.name": "mini", "tokenizer.ggml.tokens": ["<s>"]}) == "mini"
    assert tokenizer.name_that_tells(metadata | {"general.name": "x", "general.architecture": "llama"}) == "x"


def test_gemma(gemma: Path, tmp_path: Path) -> None:
    """Runs of white space and tags are symbols of their own; a visible space written by hand is seen as a space."""
    path = gguf_of(gemma, SIZE + 10, tmp_path / "t.gguf")
    metadata = open_checkpoint(path).metadata
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.add_space_prefix"]) == ("llama", False)
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert [types[texts.index(t)] for t in ("  ", "\n\n", "<h1>", "<bos>", "<unk>")] == [
        TokenType.USER_DEFINED, TokenType.USER_DEFINED, TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN,
    ]  # fmt: skip
    ours = tokens(path, STRINGS + GEMMA)
    original = SentencePieceProcessor(model_file=str(gemma / "tokenizer.model"))
    assert differ(ours, original.Encode) == [VISIBLE_SPACE]
    assert differ(ours, load_tokenizer(open_checkpoint(path))) == []


@pytest.mark.parametrize(
    ("model_type", "model", "exceptions"), [("gemma3_text", "llama", [VISIBLE_SPACE]), ("gemma4_text", "gemma4", [])]
)
def test_gemma_kept_as_json(model_type: str, model: str, exceptions: list[str], gemma: Path, tmp_path: Path) -> None:
    directory = as_json(gemma, tmp_path / "m", "gemma", {"<|tool_call>": {"special": True}}, model_type)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    path = gguf_of(directory, SIZE + 10, tmp_path / "t.gguf")
    metadata = open_checkpoint(path).metadata
    assert metadata["tokenizer.ggml.model"] == model
    ours = tokens(path, [*STRINGS, *GEMMA, "a<|tool_call>b"])
    assert differ(ours, theirs) == exceptions
    assert differ(ours, load_tokenizer(open_checkpoint(path))) == []
    seen = metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("<|tool_call>")]
    assert seen == (TokenType.USER_DEFINED if model == "gemma4" else TokenType.CONTROL)
    first = {text: ids[0] for text, ids in tokens(path, ["x"], add_special=True).items()}
    assert first["x"] == tokenizer.added_bos(metadata) if model == "gemma4" else tokenizer.added_bos(metadata) is None


def test_tekken_json(tmp_path: Path) -> None:
    """Mistral's own file, without a tokenizer.json beside it."""
    fast = json.loads((tiny_models.byte_level("tekken", STRINGS * 4, tmp_path / "t", vocab_size=3000, across=True)
                       / "tokenizer.json").read_text())  # fmt: skip
    letters = {letter: byte for byte, letter in enumerate(tokenizer.tekken._letters())}
    made = [bytes(letters[c] for c in text) for text in fast["model"]["vocab"] if not text.startswith("<|")]
    made.sort(key=lambda token: len(token) > 1)  # bytes come first
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    raw = {
        "config": {
            "pattern": tiny_models.PRE_TOKENIZERS["tekken"][0], "default_vocab_size": len(made) + 10,
            "default_num_special_tokens": 10, "version": "v7",
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(made)],
        "special_tokens": [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(special)],
    }  # fmt: skip
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "tekken.json").write_text(json.dumps(raw))
    (directory / "chat_template.jinja").write_text("[INST]{{ messages }}[/INST]")
    keys = tokenizer.from_directory(directory, len(made) + 10)
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.bos_token_id"]) == ("tekken", 1)
    assert keys["tokenizer.chat_template"].startswith("[INST]")
    theirs = MistralConverter(str(directory / "tekken.json")).converted()
    assert keys["tokenizer.ggml.tokens"] == [theirs.id_to_token(i) for i in range(len(made) + 10)]
    assert keys["tokenizer.ggml.merges"] == [" ".join(m) for m in json.loads(theirs.to_str())["model"]["merges"]]
    path = gguf_of(directory, len(made) + 10, tmp_path / "t.gguf")
    ours = tokens(path, [*(s for s in STRINGS if s.isascii()), "[INST] hi [/INST]", "<SPECIAL_7>"])
    assert differ(ours, lambda s: theirs.encode(s, add_special_tokens=False).ids) == []
    assert tokens(path, ["x"], add_special=True)["x"][0] == 1
    del raw["special_tokens"]
    (directory / "tekken.json").write_text(json.dumps(raw))
    with pytest.raises(DynqError, match="lists no special_tokens"):
        tokenizer.from_directory(directory, len(made) + 10)


def test_unigram_is_refused(tmp_path: Path) -> None:
    SentencePieceTrainer.Train(
        sentence_iterator=iter(code()), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram", vocab_size=300,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    with pytest.raises(DynqError, match="unigram"):
        tokenizer.from_directory(tmp_path, 300)


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(DynqError, match="not a SentencePiece model; fetch it again"):
        tokenizer.from_directory(tmp_path, 300)
