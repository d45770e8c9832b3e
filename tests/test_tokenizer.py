"""llama.cpp and transformers split and merge alike on exported tokenizers, and a GGUF's tokenizer comes back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import transformers
from awkward import STRINGS, WORDS
from gguf import TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from dynq import architectures, tokenizer
from dynq.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from dynq.engine import Engine
from dynq.errors import DynqError
from dynq.export import export
from dynq.recipe import Recipe
from dynq.torch_model import load_tokenizer

ROOT = Path(__file__).parents[1]


def test_there_are_enough_strings() -> None:
    assert len(set(STRINGS)) >= 200


def gguf_of(directory: Path, vocab_size: int, path: Path) -> Path:
    """A GGUF with the tokenizer of a directory and a model of zeros."""
    config = {**tiny_models.COMMON, "model_type": "llama", "vocab_size": vocab_size, "num_hidden_layers": 1}
    architecture = architectures.for_config(config)
    width, ff, kv = 128, 160, 64
    shapes: dict[str, tuple[int, ...]] = {"attn_k": (kv, width), "attn_v": (kv, width), "ffn_down": (width, ff)}
    shapes |= {"ffn_gate": (ff, width), "ffn_up": (ff, width), "token_embd": (vocab_size, width)}
    shapes |= {"output": (vocab_size, width), "attn_q": (width, width), "attn_output": (width, width)}
    tensors = {}
    for name in architecture.required():
        info = TensorInfo(name, (width,), "F32")
        tensors[name] = TensorInfo(name, shapes.get(info.kind, (width,)), "F32")
    metadata = {"general.architecture": "llama", **architecture.metadata()}
    metadata |= tokenizer.from_directory(directory, vocab_size)
    model = Checkpoint(
        "zeros", directory, architecture, metadata, tensors, lambda n: np.zeros(tensors[n].shape, np.float32), []
    )
    export(model, Recipe(dict.fromkeys(tensors, "F16"), "", 0, 0.0, None), None, path, threads=1)
    return path


def differences(
    path: Path, theirs: Any, strings: list[str], *, add_special: bool = False
) -> list[tuple[str, Any, Any]]:
    with Engine(path, n_ctx=64, threads=1) as engine:
        pairs = [
            (s, engine.tokenize(s, add_special=add_special), theirs(s, add_special_tokens=add_special)["input_ids"])
            for s in strings
        ]
    return [(s, ours, other) for s, ours, other in pairs if ours != other]


def code() -> list[str]:
    """English and code to train on."""
    files = [ROOT / "LICENSE", *sorted((ROOT / "dynq").glob("*.py"))]
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


SPECIAL = [
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b",
    "<|im_end|><|im_end|>",
    " <|im_start|> ",
    "<|endoftext|>x",
    "<|im_",
]


def test_embedded_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("dynq-tiny")
    assert checkpoint.metadata["tokenizer.ggml.pre"] == "gpt-2"
    path = gguf_of(checkpoint.path, checkpoint.config["vocab_size"], tmp_path / "t.gguf")
    theirs = load_tokenizer(checkpoint)
    assert differences(path, theirs, STRINGS + SPECIAL) == []
    back = load_tokenizer(open_checkpoint(path))
    assert [s for s in STRINGS + SPECIAL if back(s)["input_ids"] != theirs(s)["input_ids"]] == []
    assert back.chat_template == theirs.chat_template
    assert (back.bos_token_id, back.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 2)
    ids = theirs(STRINGS[0])["input_ids"]
    assert back.decode(ids) == theirs.decode(ids) == STRINGS[0]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level_bpe(kind: str, tmp_path: Path) -> None:
    directory = tiny_models.byte_level(kind, code() + STRINGS, tmp_path / kind, vocab_size=700)
    special = ["a[user word]b", "<|begin|>x", "[user word] [user word]", "x <|end|>"]
    path = gguf_of(directory, 720, tmp_path / "t.gguf")
    checkpoint = open_checkpoint(path)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert checkpoint.metadata["tokenizer.ggml.pre"] == kind
    assert differences(path, theirs, STRINGS + special) == []
    assert differences(path, theirs, STRINGS[:5], add_special=True) == []  # neither adds a first token
    back = load_tokenizer(checkpoint)
    assert [s for s in STRINGS + special if back(s)["input_ids"] != theirs(s)["input_ids"]] == []
    types = checkpoint.metadata["tokenizer.ggml.token_type"]
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert [types[tokens.index(t)] for t in ("<|begin|>", "[user word]", "a", "[PAD719]")] == [
        TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.UNUSED,
    ]  # fmt: skip


def test_another_split_is_seen(tmp_path: Path) -> None:
    """The comparison above can fail: the wrong pre-tokenizer gives other tokens."""
    numbers = [f"in {year}" for year in range(1900, 2100)] * 5  # so that some tokens are two and three digits
    directory = tiny_models.byte_level("llama-bpe", code() + STRINGS + numbers, tmp_path / "l", vocab_size=700)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace("{1,3}", ""))  # single digits: qwen2
    assert len(differences(gguf_of(directory, 720, tmp_path / "t.gguf"), theirs, numbers[:20])) > 5


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
    assert differences(path, theirs, STRINGS[:20], add_special=True) == []
    assert load_tokenizer(open_checkpoint(path))("Hello")["input_ids"] == theirs("Hello")["input_ids"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a SentencePiece BPE, trained as Llama's was: byte fallback, single digits, spaces kept."""
    directory = tmp_path_factory.mktemp("spm")
    SentencePieceTrainer.Train(
        sentence_iterator=iter(code() + WORDS), model_prefix=str(directory / "tokenizer"), model_type="bpe",
        vocab_size=900, byte_fallback=True, split_digits=True, remove_extra_whitespaces=False, num_threads=1,
        normalization_rule_name="identity", character_coverage=0.995, allow_whitespace_only_pieces=True,
        minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "add_eos_token": False, "legacy": True,
            }
        )
    )  # fmt: skip
    config = {**tiny_models.COMMON, "model_type": "llama", "vocab_size": 910, "bos_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_sentencepiece_model(sentencepiece: Path, tmp_path: Path) -> None:
    path = gguf_of(sentencepiece, 910, tmp_path / "t.gguf")
    metadata = open_checkpoint(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert types[300:899] == [TokenType.NORMAL] * 599
    assert types[900:] == [TokenType.UNUSED] * 10
    original = SentencePieceProcessor(model_file=str(sentencepiece / "tokenizer.model"))
    theirs = load_tokenizer(open_checkpoint(path))  # transformers' own reading of the model needs protobuf
    assert [s for s in STRINGS if theirs(s, add_special_tokens=False)["input_ids"] != original.Encode(s)] == []
    assert differences(path, theirs, STRINGS) == []
    assert differences(path, theirs, STRINGS[:50], add_special=True) == []
    assert theirs("x")["input_ids"][0] == 1
    assert theirs.decode(theirs(STRINGS[1])["input_ids"], skip_special_tokens=True) == STRINGS[1]


def test_sentencepiece_kept_as_json(sentencepiece: Path, tmp_path: Path) -> None:
    """transformers 5 saves a SentencePiece tokenizer as tokenizer.json only: scores come from the order of merges."""
    tokenizer.from_gguf(tokenizer.from_directory(sentencepiece, 910)).save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "tokenizer.model").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "fast")
    path = gguf_of(tmp_path / "fast", 910, tmp_path / "t.gguf")
    assert open_checkpoint(path).metadata["tokenizer.ggml.model"] == "llama"
    assert differences(path, theirs, STRINGS) == []
    assert differences(path, theirs, STRINGS[:50], add_special=True) == []


def test_unigram_is_refused(tmp_path: Path) -> None:
    SentencePieceTrainer.Train(
        sentence_iterator=iter(code()), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram", vocab_size=300,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    with pytest.raises(DynqError, match="unigram"):
        tokenizer.from_directory(tmp_path, 300)


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("qwen2", ["text"], tmp_path, vocab_size=300)
    fast = directory / "tokenizer.json"
    fast.write_text(fast.read_text().replace(r"\\p{N}", r"\\p{N}{1,7}"))
    with pytest.raises(DynqError, match=r"no known name for this pre-tokenizer .*known are gpt-2, llama-bpe"):
        tokenizer.from_directory(directory, 300)


def test_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.byte_level("gpt-2", ["text"], tmp_path, vocab_size=300)
    with pytest.raises(DynqError, match="beyond the model's vocabulary of 200"):
        tokenizer.from_directory(directory, 200)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DynqError, match=r"no tokenizer\.json and no tokenizer\.model"):
        tokenizer.from_directory(tmp_path, 10)
    with pytest.raises(DynqError, match="no tokenizer"):
        tokenizer.from_gguf({})
