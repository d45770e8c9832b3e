"""Files of strangers: whatever they hold, they are taken or refused in one line, soon, in little memory."""

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from costs import BYTES, SECONDS, Costs
from safetensors.numpy import save_file

from dynq import chat_template
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import logits_file
from dynq.export import export
from dynq.files import load_json, parse_json
from dynq.folder import RunFolder
from dynq.gguf_reader import Reader
from dynq.imatrix import read_imatrix
from dynq.recipe import Recipe
from dynq.text import load_text
from dynq.tokenizer import from_directory, from_gguf

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import fuzz

ROOT = Path(__file__).parent.parent
_SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, and a GGUF of it."""
    folder = tmp_path_factory.mktemp("sound")
    model = tiny_models.make("llama", folder / "model", **_SMALL)
    checkpoint = open_checkpoint(model)
    recipe = Recipe(dict.fromkeys(checkpoint.tensors, "F32"), "", 0, 0.0, None)
    export(checkpoint, recipe, None, folder / "model.gguf", threads=1)
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be spoilt."""
    (tmp_path / "model").mkdir()
    for file in (sound / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def refused(read: Callable[[], Any], words: str) -> None:
    """One line of error, soon, in little memory, and nothing written anywhere."""
    costs = Costs()
    with pytest.raises(DynqError, match=words or None) as caught, costs:
        read()
    assert costs.seconds < SECONDS and costs.bytes < BYTES and costs.written == []
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100


# --- GGUF -------------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, *shape: int, kind: int = 0, at: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


def header(keys: list[bytes], tensors: list[bytes], data: int = 4096, n_keys: int = -1, n_tensors: int = -1) -> bytes:
    counts = len(tensors) if n_tensors < 0 else n_tensors, len(keys) if n_keys < 0 else n_keys
    whole = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys + tensors)
    return whole + bytes(-len(whole) % 32 + data)


GGUFS = {
    "2^60 weights": (header([], [tensor(b"a", 2**30, 2**30)]), "tensor a of 1073741824x1073741824 weights"),
    "2^60 weights of a type": (header([], [tensor(b"a", 2**59, kind=8)]), "tensor a reaches past its end"),
    "sizes that wrap around": (header([], [tensor(b"a", 2**32, 2**32)]), "tensor a of"),
    "no weights": (header([], [tensor(b"a", 4, 0)]), "tensor a of 0x4"),
    "no axes": (header([], [tensor(b"a")]), "a has 0 axes"),
    "many axes": (header([], [tensor(b"a", *[1] * 100)]), "a has 100 axes"),
    "2^32 axes": (header([], [text(b"a") + b"\xff" * 4]), "4294967295 axes"),
    "offset past the end": (header([], [tensor(b"a", 4, at=8192)]), "a reaches past its end"),
    "offset of 2^63": (header([], [tensor(b"a", 4, at=2**63)]), "a reaches past its end"),
    "overlap": (header([], [tensor(b"a", 64), tensor(b"b", 64, at=32)]), "tensors a and b overlap"),
    "the same place": (header([], [tensor(b"a", 64), tensor(b"b", 64)]), "tensors a and b overlap"),
    "between steps": (header([], [tensor(b"a", 4, at=8)]), "no multiple of 32"),
    "half a block": (header([], [tensor(b"a", 40, kind=8)]), "tensor a of 40 weights in Q8_0"),
    "tensor twice": (header([], [tensor(b"a", 8), tensor(b"a", 8, at=32)]), "tensor a is there twice"),
    "key twice": (header([key(b"k", 4, bytes(4))] * 2, []), "key k is there twice"),
    "NUL in a name": (header([], [tensor(b"a\0b", 8)]), r"the name 'a\\x00b'"),
    "escape in a name": (header([], [tensor(b"\x1b]0;x\x07", 8)]), "not printable"),
    "name of nothing": (header([], [tensor(b"", 8)]), "is empty"),
    "name that is no text": (header([], [tensor(b"\xff\xfe", 8)]), "cut off or damaged"),
    "long name": (header([], [tensor(b"a" * 5000, 8)]), "is empty, long or"),
    "2^60 keys": (header([], [], n_keys=2**60), "keys, of which no model"),
    "2^60 tensors": (header([], [], n_tensors=2**60), "tensors, of which no model"),
    "more keys than there are": (header([], [], n_keys=8000, data=0), "cut off or damaged|name ''"),
    "text of 2^63": (header([key(b"k", 8, b"\xff" * 7 + b"\x7f")], []), "cut off or damaged"),
    "list of 2^60 texts": (header([key(b"k", 9, struct.pack("<IQ", 8, 2**60))], []), "texts in its lists"),
    "list of 2^60 numbers": (header([key(b"k", 9, struct.pack("<IQ", 10, 2**60))], []), "numbers in its lists"),
    "lists in lists": (header([key(b"k", 9, struct.pack("<IQ", 9, 1) * 9999)], []), "a list of type 9"),
    "type of a value": (header([key(b"k", 77, b"")], []), "key k has type 77"),
    "alignment": (header([key(b"general.alignment", 4, struct.pack("<I", 3))], []), "alignment is 3"),
    "alignment that is a text": (header([key(b"general.alignment", 8, text(b"x"))], []), "alignment is 'x'"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_that_lies(name: str, tmp_path: Path) -> None:
    data, words = GGUFS[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    for read in (open_checkpoint, read_imatrix):
        refused(lambda read=read: read(path), words)


def test_costs_are_seen(tmp_path: Path) -> None:
    """What `refused` looks at."""
    with Costs() as costs:
        (tmp_path / "inside").mkdir()
        (tmp_path / "x").write_bytes(b"")
        np.ones(10**7)
        sum(range(10**6))
    assert costs.written == [tmp_path / "inside", tmp_path / "x"] and costs.outside(tmp_path) == []
    assert costs.outside(tmp_path / "inside") == [tmp_path / "x"]
    assert costs.seconds > 0.001 and (costs.bytes > 7e7 or sys.platform != "linux")


def test_the_longest_list_that_is_read(tmp_path: Path) -> None:
    path, n = tmp_path / "x.gguf", 2**20 - 1
    path.write_bytes(header([key(b"k", 9, struct.pack("<IQ", 8, n) + (text(b"ab") * n))], []))
    for read in (open_checkpoint, read_imatrix):
        refused(lambda read=read: read(path), "not a model|not an importance matrix")


def test_slashes_and_dots_in_a_name_are_a_name(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header([key(b"general.architecture", 8, text(b"llama"))], [tensor(b"../../x.weight", 32, 2)]))
    assert list(Recipe.from_gguf(path).formats) == ["../../x.weight"]
    refused(lambda: open_checkpoint(path), "not a complete model|has no tensor")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": 2**31}, "num_hidden_layers is 2147483648"),
        ({"llama.attention.head_count": 0}, "damaged|config.json|division"),
        ({"llama.attention.head_count": "x"}, "damaged|config.json"),
        ({"llama.embedding_length": 2**62}, "hidden_size is"),
        ({"llama.attention.key_length": 2**40}, "head_dim is"),
    ],
)
def test_gguf_with_numbers_that_no_model_has(changes: dict[str, Any], words: str, sound: Path, tmp_path: Path) -> None:
    reader = Reader(sound / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama.") and name not in changes:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in changes.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT64
        writer.add_key_value(name, value, kind)
    for item in reader.tensors:
        writer.add_tensor(item.name, item.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(lambda: open_checkpoint(tmp_path / "x.gguf"), words)


def test_tokenizer_of_a_gguf_that_contradicts_itself(sound: Path) -> None:
    keys = open_checkpoint(sound / "model.gguf").metadata
    bad: list[dict[str, Any]] = [
        {"merges": ["no such"]}, {"merges": [1]}, {"tokens": [1, 2]}, {"token_type": [1]}, {"tokens": "abc"},
        {"model": "llama", "scores": []}, {"model": "llama", "tokens": ["a" * 10**6] * 2, "token_type": [1, 1]},
        {"model": "gemma4", "merges": ["x"]}, {"model": []}, {"pre": ["x"]},
    ]  # fmt: skip
    for changes in bad:
        refused(lambda changes=changes: from_gguf(keys | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}), "")


def test_vocabularies_of_a_million_tokens(sound: Path) -> None:
    keys, n = open_checkpoint(sound / "model.gguf").metadata, 2**19
    tokens = [f"t{i}" for i in range(n + 1)]
    for texts, merges, words in (
        (tokens, [], "524,289 tokens, more than any model has"),
        (tokens[:n], ["t 1"] * n, "the merge 't 1' has no token"),
        ([*tokens[3:n], "t", "1", "t1"], ["t 1"] * n + ["1 t"], "the merge '1 t' has no token"),
    ):
        changes = {"tokens": texts, "token_type": [1] * len(texts), "merges": merges}
        refused(lambda changes=changes: from_gguf(keys | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}), words)


# --- safetensors ------------------------------------------------------------------------------------------------------


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


EMBED = "model.embed_tokens.weight"
SAFETENSORS: dict[str, tuple[Any, str]] = {
    "size": ({EMBED: entry(0, 16, 8)}, "has 16 bytes, its shape wants 32"),
    "2^60 weights": ({EMBED: entry(0, 2**62, 2**60)}, "truncated"),
    "weights that wrap around": ({EMBED: entry(0, 0, 2**32, 2**32)}, "has 0 bytes, its shape wants"),
    "past the end": ({EMBED: entry(96, 128, 8)}, "truncated"),
    "before the beginning": ({EMBED: entry(-8, 24, 8)}, "has the shape"),
    "negative size": ({EMBED: entry(0, 32, -8)}, "has the shape"),
    "size that is a text": ({EMBED: entry(0, 32) | {"shape": ["8"]}}, "has the shape"),
    "size that is a fraction": ({EMBED: entry(0, 32, 8.0)}, "has the shape"),
    "overlap": ({"a": entry(0, 32, 8), EMBED: entry(16, 48, 8)}, "a and model.embed_tokens.weight overlap"),
    "nothing": ({EMBED: entry(0, 0, 0, 64)}, "is empty"),
    "no offsets": ({EMBED: {"dtype": "F32", "shape": [1]}}, "KeyError"),
    "no object": ({EMBED: 7}, "damaged"),
    "a list": ([], "damaged"),
    "type": ({EMBED: entry(0, 32, 8, dtype="F4")}, "type F4, which is not read"),
    "type that is a list": ({EMBED: entry(0, 32, 8) | {"dtype": []}}, "damaged"),
    "twice": (f'{{"a": {json.dumps(entry(0, 32, 8))}, "a": {json.dumps(entry(32, 64, 8))}}}', "there twice"),
    "deep": ("[" * 100_000, "nested too deep"),
    "no text": (b"\xff\xfe\xfd", "not readable as JSON"),
    "number of a million digits": ('{"a": ' + "9" * 10**6 + "}", "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_lie(name: str, model: Path) -> None:
    head, words = SAFETENSORS[name]
    head = head if isinstance(head, str | bytes) else json.dumps(head)
    head = head if isinstance(head, bytes) else head.encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
    refused(lambda: open_checkpoint(model), words)


def test_headers_longer_than_the_file_or_any_model(model: Path) -> None:
    for length in (2**63, 2**40, 66):
        (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + bytes(64))
        refused(lambda: open_checkpoint(model), "truncated or not a safetensors file")
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # takes no room
    refused(lambda: open_checkpoint(model), "a header of 1,073,741,824 bytes")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "..", "", 7,
     "x\0.safetensors", "config.json", "x" * 300 + ".safetensors", ".safetensors\n", None, ["x"]],
)  # fmt: skip
def test_index_names_no_file_elsewhere(name: Any, model: Path) -> None:
    (model.parent / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: name}}))
    refused(lambda: open_checkpoint(model), "index.json: .*no name of a safetensors file|index.json: damaged")


def test_a_tensor_in_two_shards(model: Path) -> None:
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        save_file({EMBED: np.zeros((8, 8), np.float32)}, model / name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("xy", names, strict=True))}))
    refused(lambda: open_checkpoint(model), "b.safetensors: tensor .* is there twice, also as .*a.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.PKL", "last.ckpt"])
def test_pickles_are_refused_unopened(name: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    bomb = model / name
    bomb.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    for given in (model, bomb):
        refused(
            lambda given=given: open_checkpoint(given), "pickle format are never loaded.*convert them to safetensors"
        )
    assert not (tmp_path / "pwned").exists()


# what compiles or sends code of its own: kernels for a card from the kernels' own sources, and tasks from a run to the
# workers of a cluster, which run whatever their scheduler sends in any case
OWN_CODE = {"dynq/kernels/on_card.py": {"exec(", "eval("}, "dynq/cluster.py": {"cloudpickle"}}


def test_nothing_loads_pickles_or_strangers_code() -> None:
    words = r"torch\.load|pickle\.load|import pickle|cloudpickle|allow_pickle=True|trust_remote_code=True|np\.load\("
    words += r"|unsafe_load|yaml\.load\(|(?<![.\w])(?:eval|exec)\("
    sources = [path for kind in ("py", "ipynb") for part in ("dynq", "widgets", "notebooks")
               for path in (ROOT / part).rglob(f"*.{kind}")]  # fmt: skip
    assert len(sources) > 80
    for path in sources:
        found = set(re.findall(words, path.read_text(encoding="utf-8")))
        assert found == OWN_CODE.get(path.relative_to(ROOT).as_posix(), set()), path


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_that_no_model_has(tmp_path: Path) -> None:
    refused(lambda: parse_json(b"[" * 10**6, "x"), "x: JSON nested too deep")
    refused(lambda: parse_json(b'{"a":' * 10**5, "x"), "nested too deep")
    refused(lambda: parse_json(b"[" + b"[]," * 1_600_000 + b"1]", "x"), "more than any model has")
    refused(lambda: parse_json(b'"' + b"x" * (1 << 26) + b'"', "x"), "more than any model has")
    refused(lambda: parse_json(b"\xff", "x"), "not readable as JSON")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: load_json(tmp_path / "pipe", ""), "not a file")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: load_json(tmp_path / "long", ""), "longer than")


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": "x"}, "config.json"),
    ({"hidden_size": 2**60}, "hidden_size is"),
    ({"head_dim": 2**40}, "head_dim is"),
    ({"vocab_size": 2**40}, "vocab_size is"),
    ({"num_attention_heads": 0}, "config.json"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": "x", "rope_theta": 1}}, "config.json"),
    ({"rope_parameters": []}, "config.json|shape|tensors"),
    ({"text_config": 7}, "config.json"),
    ({"model_type": ["llama"]}, "config.json"),
    ({"model_type": "\ud800"}, r"'\\ud800' is not supported"),
    ({"architectures": 7, "model_type": None}, "config.json"),
    ({"num_local_experts": 4096, "num_hidden_layers": 1024, "model_type": "mixtral"}, "more than any model has"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_configs_that_no_model_has(changes: dict[str, Any], words: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    try:
        open_checkpoint(model)
    except DynqError as error:
        assert re.search(words, str(error)) and str(error).isprintable()
    else:
        assert "rope_parameters" in changes, "taken"


def test_a_config_larger_than_its_weights(model: Path) -> None:
    from dynq.torch_model import load_model

    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 1 << 22}
    (model / "config.json").write_text(json.dumps(config))
    refused(lambda: load_model(open_checkpoint(model)), "describes a model of .* weights, its tensors hold")


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: *b", "has aliases"),
        ("a: " + "[" * 5000, "nested deeper than 50 brackets"),
        ("- " * 15_000, "not readable as YAML"),
        ("a: [", "not readable as YAML"),
        ("a: 2000-99-99", "not readable as YAML"),
        ("a: !!bool x", "not readable as YAML"),
        ("a: " + "x" * 40_000, "40,003 characters"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_yaml_of_a_card(front: str, words: str, model: Path) -> None:
    (model / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    refused(lambda: open_checkpoint(model), f"README.md: the YAML at its top .*{words}|README.md: .*{words}")


TOKENIZERS: list[tuple[str, Any]] = [
    ("model", 7),
    ("model.vocab", {"a": -1}),
    ("model.vocab", {"a": 1.5}),
    ("model.vocab", {"a": 10**9}),
    ("model.vocab", {"\ud800": 5}),
    ("model.vocab", ["a"]),
    ("model.merges", [7]),
    ("model.merges", [["a"], 3]),
    ("added_tokens", [{"id": -5, "content": "x"}]),
    ("added_tokens", [{"id": 5, "content": 7}]),
    ("added_tokens", {"x": 1}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}),
    ("decoder", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
]


@pytest.mark.parametrize(("where", "value"), TOKENIZERS)
def test_tokenizers_that_are_none(where: str, value: Any, model: Path) -> None:
    loaded = json.loads((model / "tokenizer.json").read_text())
    holder, _, name = where.rpartition(".")
    (loaded[holder] if holder else loaded)[name] = value
    (model / "tokenizer.json").write_text(json.dumps(loaded))
    refused(lambda: from_directory(model, tiny_models.VOCAB), "")


def test_code_beside_a_tokenizer_is_not_run(model: Path, tmp_path: Path) -> None:
    from dynq.torch_model import load_tokenizer

    (model / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(open_checkpoint(model))
    except DynqError as error:
        assert "transformers does not open its tokenizer" in str(error)
    assert not (tmp_path / "pwned").exists()


# --- other files ------------------------------------------------------------------------------------------------------


def test_recipe_names_are_lines_of_their_own(tmp_path: Path) -> None:
    good = json.loads(Recipe({"output.weight": "Q6_K"}, "", 1, 1.0, None).to_json())
    good["dynq.recipe"]["formats"] = {"a$=f32\n^output": "Q6_K"}
    (tmp_path / "r.json").write_text(json.dumps(good))
    refused(lambda: Recipe.load(tmp_path / "r.json"), "is no name of a tensor")


@pytest.mark.parametrize(
    "steps", [7, [], {"a": 1}, {"a": {"state": "done"}}, {"a": {"state": 1, "parameters": [], "inputs": 0}}]
)
def test_run_json_that_is_none(steps: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"steps": steps}))
    refused(lambda: RunFolder(tmp_path).state, "run.json: not the record of a run; delete it")
    for name in ("../../x", "/etc/x", "a/../../x", "..", ".", "", "a\\..\\x", "C:x", "a\0", "x" * 300):
        step = {"state": "done", "parameters": {}, "inputs": {}, "outputs": {name: "0"}}
        (tmp_path / "run.json").write_text(json.dumps({"steps": {"a": step}}))
        refused(lambda: RunFolder(tmp_path).state, "not the record of a run")
    for value in (float("inf"), "\ud800"):
        (tmp_path / "run.json").write_text(json.dumps({"steps": {}, "dynq": value}))
        refused(lambda: RunFolder(tmp_path).state, "not the record of a run")


def test_logits_whose_size_wraps_around(tmp_path: Path) -> None:
    path = tmp_path / "l"
    for n_ctx, n_vocab, n_chunks in ((2**32 - 1, 2**31 - 1, 2**31 - 1), (2**31, 1, 2**30), (4, 2**31 - 1, 2**31 - 1)):
        path.write_bytes(b"_logits_" + struct.pack("<Iii", n_ctx, n_vocab, n_chunks) + bytes(64))
        refused(lambda: logits_file.read(path), "truncated")


def test_legacy_imatrix_is_looked_at_before_it_is_copied(tmp_path: Path) -> None:
    path, one = tmp_path / "x.dat", struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1.0)
    for data, words in (
        (struct.pack("<i", 2**31 - 1) + one, "truncated"),
        (struct.pack("<ii", 1, 2**31 - 1), "a name of 2,147,483,647 bytes"),
        (struct.pack("<ii", 1, -1), "truncated"),
        (struct.pack("<i", 2) + one * 2, "entry 1, 'a'"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1), "truncated"),
        (struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<iif", 1, 1, 1.0), "damaged"),
    ):
        path.write_bytes(data)
        refused(lambda: read_imatrix(path), words)


def test_chats_that_are_none(sound: Path, tmp_path: Path) -> None:
    tokenizer = from_gguf(open_checkpoint(sound / "model.gguf").metadata)
    path = tmp_path / "x.jsonl"
    for line in ("[" * 10**5, '{"text": "\\ud800"}', '{"text": ' + "9" * 10**5 + "}", "7", '{"messages": [7]}'):
        path.write_text(line + "\n")
        refused(lambda: load_text(str(path), tokenizer, n_ctx=4, n_chunks=1, seed=0), "")


# --- chat templates ---------------------------------------------------------------------------------------------------

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long step": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set s = namespace(s='abcdefgh') %}{% for i in range(99) %}{% set s.s = s.s ~ s.s %}{% endfor %}",
    "width": "{{ 'a'.ljust(10 ** 10) }}",
}
ESCAPES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe|immutable|Security",
    "{% include '/etc/passwd' %}": "loader|TypeError|Error",
    "{% for a in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "RecursionError",
    "{{ " + "(" * 50_000 + " }}": "RecursionError",
    "{% if %}": "TemplateSyntaxError",
}
CHAT = [{"role": "user", "content": "hé"}]


@pytest.mark.parametrize("name", ENDLESS)
def test_template_that_does_not_end(name: str) -> None:
    refused(lambda: chat_template.render(ENDLESS[name], CHAT, answer=True, values={}), "chat template does not end")
    assert chat_template.render("{{ messages[0].content }}", CHAT, answer=True, values={}) == "hé"


@pytest.mark.parametrize("template", ESCAPES)
def test_template_that_wants_out(template: str) -> None:
    with pytest.raises(chat_template.TemplateError, match=ESCAPES[template]):
        chat_template.render(template, CHAT, answer=True, values={})
    assert not (ROOT / "pwned").exists()


def test_template_is_filled_in_as_by_transformers(sound: Path) -> None:
    tokenizer = from_gguf(open_checkpoint(sound / "model.gguf").metadata)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}\n  {%- if loop.last %}L{% endif %}{{ m | tojson }}{{ m['role'] }}\n"
        "  {% generation %}{{ m.content }}{% endgeneration %}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}{% if tools is defined and tools %}T{% endif %}"
    )
    chat = [{"role": role, "content": f"<{role}> ü"} for role in ("system", "user", "assistant", "user")]
    for answer in (False, True):
        ours = chat_template.render(tokenizer.chat_template, chat, answer=answer, values=tokenizer.special_tokens_map)
        assert ours == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)


# --- at random --------------------------------------------------------------------------------------------------------


def test_damaged_at_random(tmp_path: Path) -> None:
    """The first inputs of tests/bench/fuzz.py, of which a release is given 100,000."""
    counts, bad = fuzz.run(0, 400, 0, fuzz.readers(tmp_path))
    assert bad == []
    assert {kind for kind, _ in counts} == set(fuzz.readers(tmp_path / "again"))
    assert sum(n for (_, outcome), n in counts.items() if outcome == "refused") > 100
