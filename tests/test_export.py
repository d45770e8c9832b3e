"""Files are whole or absent, hold what was meant, and open in llama.cpp."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from peak import Peak, in_a_new_process

from dynq import __version__, codec, formats
from dynq import export as export_module
from dynq.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from dynq.engine import Engine, generate
from dynq.errors import DynqError
from dynq.export import export, header_bytes, simulate
from dynq.imatrix import Importance
from dynq.recipe import KEY, Recipe

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import memory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return open_checkpoint("dynq-tiny")


def recipe(checkpoint: Checkpoint, *names: str) -> Recipe:
    """The formats in turn."""
    chosen = {name: names[i % len(names)] for i, name in enumerate(checkpoint.tensors)}
    return Recipe(chosen, "a test", 0, 0.0, 0.125, {"seed": 1})


def some_importance(checkpoint: Checkpoint) -> Importance:
    rng = np.random.default_rng(0)
    sums = {
        name: rng.gamma(0.5, 10, (1, info.row)).astype(np.float32)
        for name, info in checkpoint.tensors.items()
        if info.quantizable and info.kind != "token_embd"
    }
    counts = {name: np.array([10], np.float32) for name in sums}
    return Importance(sums, counts, ["one.txt", "two.txt"], chunk_count=7, chunk_size=64)


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_many_formats_in_one_file(embedded: Checkpoint, tmp_path: Path) -> None:
    """One file with many formats, each written with importance; llama.cpp answers sensibly from it.

    tests/test_engine_formats.py has every format by itself; those of two bits and less would cost this the answer.
    """
    names = ("Q8_0", "Q6_K", "Q5_K", "F16", "BF16", "Q5_1", "Q5_0", "F32", "Q4_K", "Q4_1", "Q3_K", "Q4_0", "Q2_K")
    path = tmp_path / "all.gguf"
    told = export(embedded, recipe(embedded, *names), some_importance(embedded), path, threads=2)
    assert told["bytes"] == path.stat().st_size
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert told["tensor_bytes"] == sum(t.n_bytes for t in found.values())
    assert told["bpw"] == pytest.approx(8 * told["tensor_bytes"] / embedded.n_weights)
    assert {t.tensor_type.name for t in found.values()} == set(names)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in generate(path, prompt, 16).text


def test_data_is_what_the_codec_gives(embedded: Checkpoint, tmp_path: Path) -> None:
    importance = some_importance(embedded)
    path = tmp_path / "m.gguf"
    export(embedded, recipe(embedded, "Q4_K", "Q3_K", "Q6_K"), importance, path, threads=2)
    seen = simulate(embedded, recipe(embedded, "Q4_K", "Q3_K", "Q6_K").formats, importance, threads=1)
    tensors = gguf.GGUFReader(path).tensors
    assert {tensor.name for tensor in tensors} == set(embedded.tensors)
    for tensor in tensors:
        values = seen(tensor.name)
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        assert np.array_equal(decoded, values), tensor.name
    name = "blk.5.attn_k.weight"
    plain = simulate(embedded, recipe(embedded, "Q4_K", "Q3_K", "Q6_K").formats, None, threads=2)
    assert not np.array_equal(plain(name), seen(name))  # importance reached the encoder


def test_same_bytes_whatever_the_threads(tiny: Checkpoint, tmp_path: Path) -> None:
    told = [export(tiny, recipe(tiny, "Q8_0", "Q4_0"), None, tmp_path / f"{n}.gguf", threads=n) for n in (1, 2)]
    assert told[0] == told[1]


def test_metadata(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(tiny, recipe(tiny, "Q8_0"), some_importance(tiny), path, imatrix_file="imatrix.gguf", threads=1)
    found = fields(path)
    assert found["general.quantization_version"] == 2
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["quantize.imatrix.file"] == "imatrix.gguf"
    assert found["quantize.imatrix.dataset"] == "one.txt, two.txt"
    assert found["quantize.imatrix.entries_count"] == len(some_importance(tiny).sums)
    assert found["quantize.imatrix.chunks_count"] == 7
    assert found["dynq.version"] == __version__
    for key, value in tiny.metadata.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    carried = Recipe.from_json(found[KEY])
    assert (carried.target, carried.predicted_kld, carried.provenance) == ("a test", 0.125, {"seed": 1})
    assert Recipe.from_gguf(path) == carried  # the types in the header are those of the recipe
    again = open_checkpoint(path, allow_requantize=True).metadata  # a file's own keys do not leak into the next one
    assert not [key for key in again if key.startswith(("quantize.", "dynq.")) or key == "general.file_type"]


@pytest.mark.parametrize(
    ("fmt", "number"), [("F32", 0), ("F16", 1), ("BF16", 32), ("Q4_0", 2), ("Q8_0", 7), ("Q2_K", 10), ("Q3_K", 12)]
)
def test_file_type(fmt: str, number: int, embedded: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp's numbers (llama_ftype in llama.h)."""
    names = ["token_embd.weight", "output_norm.weight"]
    tensors = {name: embedded.tensors[name] for name in names}
    small = Checkpoint("m", tmp_path, embedded.architecture, {}, tensors, embedded.read, [])
    export(small, recipe(small, fmt), None, tmp_path / "m.gguf", threads=1)
    assert fields(tmp_path / "m.gguf")["general.file_type"] == number


def test_file_type_of_every_format() -> None:
    """llama_ftype in llama.h; as llama.cpp guesses it from the most frequent type where the key is missing."""
    numbers = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7}
    numbers |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19}
    numbers |= {"IQ2_XS": 20, "IQ2_S": 28, "IQ3_XXS": 23, "IQ3_S": 26, "IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36}
    numbers |= {"TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41}
    assert {name: export_module._file_type(name) for name in formats.FORMATS} == {
        n: numbers[n] for n in formats.FORMATS
    }


def test_fallbacks_and_tensors_never_quantized(tiny: Checkpoint, tmp_path: Path) -> None:
    """Rows of 128 and 160 do not divide by 256; the recipe in the file says what was written in their place."""
    path = tmp_path / "m.gguf"
    told = export(tiny, recipe(tiny, "Q4_K"), None, path, threads=1)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.0.attn_norm.weight"] == types["rope_freqs.weight"] == "F32"
    assert Recipe.from_json(fields(path)[KEY]).formats == types
    assert Recipe.from_json(fields(path)[KEY]).tensor_bytes == told["tensor_bytes"]
    with Engine(path) as engine:
        assert len(engine.generate([5, 6, 7], 4, ignore_eos=True).tokens) == 4


def test_data_is_aligned(tmp_path: Path) -> None:
    """A tensor whose bytes are no multiple of 32 is followed by padding."""

    shapes = {"blk.0.attn_q.weight": (3, 32), "blk.0.attn_k.weight": (7, 32), "blk.0.attn_v.weight": (5, 32)}
    tensors = {name: TensorInfo(name, shape, "F32") for name, shape in shapes.items()}
    weights = {n: np.random.default_rng(1).normal(size=s).astype(np.float32) for n, s in shapes.items()}
    architecture: Any = type("A", (), {"name": "llama", "config": {}})()
    model = Checkpoint("m", tmp_path, architecture, {}, tensors, weights.__getitem__, [])
    told = export(model, recipe(model, "Q8_0", "Q4_0"), None, tmp_path / "m.gguf", threads=1)
    assert told["bytes"] == (tmp_path / "m.gguf").stat().st_size
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        assert tensor.data_offset % 32 == 0
        expected = codec.quantize(weights[tensor.name], tensor.tensor_type.name)
        assert np.array_equal(np.asarray(tensor.data), expected)


def test_experts_have_an_importance_each(tmp_path: Path) -> None:
    name = "blk.0.ffn_up_exps.weight"
    weights = np.random.default_rng(2).normal(size=(3, 4, 256)).astype(np.float32)
    sums = np.random.default_rng(3).gamma(0.3, 1e6, (3, 256)).astype(np.float32)
    importance = Importance({name: sums}, {name: np.full(3, 1e4, np.float32)}, [])
    architecture: Any = type("A", (), {"name": "llama", "config": {}})()
    model = Checkpoint(
        "m", tmp_path, architecture, {}, {name: TensorInfo(name, weights.shape, "F32")}, lambda n: weights, []
    )
    export(model, recipe(model, "Q4_K"), importance, tmp_path / "m.gguf", threads=1)
    data = np.asarray(gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].data)
    mean = importance.mean(name)
    assert mean is not None and mean.shape == (3, 256)
    for expert in range(3):
        assert np.array_equal(data[expert], codec.quantize(weights[expert], "Q4_K", mean[expert]))


@pytest.mark.parametrize("names", [("F32",), ("Q8_0", "Q5_0"), ("Q2_K", "BF16")])
def test_header_bound(names: tuple[str, ...], tiny: Checkpoint, tmp_path: Path) -> None:
    chosen = recipe(tiny, *names)
    chosen = replace(chosen, bpw=1 / 3, predicted_kld=1.2345678901234567e-05)
    told = export(tiny, chosen, some_importance(tiny), tmp_path / "m.gguf", imatrix_file="i.gguf", threads=1)
    rest = told["bytes"] - told["tensor_bytes"]
    assert rest <= header_bytes(tiny, chosen, some_importance(tiny), "i.gguf") < rest + 2048
    assert rest <= header_bytes(tiny)


def test_recipe_for_another_model(tiny: Checkpoint, tmp_path: Path) -> None:
    whole = recipe(tiny, "Q8_0")
    less = replace(whole, formats={n: f for n, f in whole.formats.items() if n != "output.weight"})
    more = replace(whole, formats=whole.formats | {"blk.9.attn_q.weight": "Q8_0"})
    with pytest.raises(DynqError, match=r"no format for output\.weight"):
        export(tiny, less, None, tmp_path / "m.gguf")
    with pytest.raises(DynqError, match=r"names blk\.9\.attn_q\.weight"):
        export(tiny, more, None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_no_directory(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DynqError, match="does not exist"):
        export(tiny, recipe(tiny, "Q8_0"), None, tmp_path / "none" / "m.gguf")


def test_no_room(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DynqError, match=r"m\.gguf: the disk has 1,000 bytes left, the file needs \d{3},\d{3}"):
        export(tiny, recipe(tiny, "Q8_0"), None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def fails_after(calls: int, error: BaseException) -> Callable[..., np.ndarray]:
    true, count = codec.quantize, 0

    def quantize(*args: Any, **kwargs: Any) -> np.ndarray:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return true(*args, **kwargs)

    return quantize


def test_disk_full_half_way(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "quantize", fails_after(5, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DynqError, match=r"m\.gguf: the disk is full; the file needs \d{3},\d{3} bytes"):
        export(tiny, recipe(tiny, "Q8_0"), None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_the_old_file(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    monkeypatch.setattr(codec, "quantize", fails_after(5, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(tiny, recipe(tiny, "Q8_0"), None, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"old"


def test_damage_between_writing_and_reading_is_seen(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = export_module.Reader

    def damage(path: Path) -> gguf.GGUFReader:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        return true(path)

    monkeypatch.setattr(export_module, "Reader", damage)
    with pytest.raises(DynqError, match=r"output\.weight's data is not what was written"):
        export(tiny, recipe(tiny, "Q8_0"), None, tmp_path / "m.gguf", threads=1)
    assert list(tmp_path.iterdir()) == []


def peak_of_export(folder: Path, source: str) -> float:
    """Most bytes that an export holds, over those of the largest tensor as it is stored: 62 MiB of 150."""
    memory.WIDTH, memory.FEED_FORWARD = 256, 256
    for name in ("warm", "model"):
        (folder / name).mkdir()
        checkpoint = open_checkpoint(memory.sparse_checkpoint(folder / name, 1, 0))
        if source == "GGUF":
            checkpoint = open_checkpoint(memory.sparse_gguf(checkpoint, folder / f"{name}.BF16.gguf"))
        with Peak() as peak:
            export(checkpoint, recipe(checkpoint, "Q4_K"), None, folder / f"{name}.gguf", threads=2)
        memory.WIDTH, memory.FEED_FORWARD = 1024, 3584
    return peak.bytes / (2 * max(info.n_weights for info in checkpoint.tensors.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="where Linux tells what a process holds")
@pytest.mark.parametrize("source", ["safetensors", "GGUF"])
def test_memory_is_three_times_the_largest_tensor(source: str, tmp_path: Path) -> None:
    """In BF16, where the tensor is large beside what any export takes; tests/bench/memory.py takes 8 GiB."""
    assert 1 < in_a_new_process(peak_of_export, tmp_path, source) < 3


def test_engine_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(DynqError, match=r'pip install "dynq\[engine\]"'):
        generate(tmp_path / "m.gguf", "x")


def test_engine_refuses_rubbish(tmp_path: Path) -> None:
    with pytest.raises(DynqError, match="no such file"):
        generate(tmp_path / "none.gguf", "x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(DynqError, match=r"llama\.cpp does not open this file"):
        generate(tmp_path / "bad.gguf", "x")


def test_recipe_is_plain_json(tiny: Checkpoint, tmp_path: Path) -> None:
    export(tiny, recipe(tiny, "Q8_0"), None, tmp_path / "m.gguf", threads=1)
    assert json.loads(fields(tmp_path / "m.gguf")[KEY])[KEY]["target"] == "a test"
