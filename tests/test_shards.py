"""Split files hold what the whole file holds, are named as llama.cpp names them, and open in it."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from conftest import dynq_command

from dynq import shards
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.engine import generate
from dynq.errors import DynqError
from dynq.export import export, files
from dynq.recipe import Recipe

LIMIT = 100_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def written(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The model whole, and in shards."""
    folder = tmp_path_factory.mktemp("written")
    names = ("F16", "Q8_0", "BF16")
    recipe = Recipe({n: names[i % 3] for i, n in enumerate(tiny.tensors)}, "a test", 0, 0.0, None)
    whole = folder / "whole" / "model.gguf"
    split = folder / "split" / "model.gguf"
    for path, limit in ((whole, None), (split, LIMIT)):
        path.parent.mkdir()
        told = export(tiny, recipe, None, path, shard_bytes=limit, threads=1)
        made = files(tiny, recipe, path, limit)
        assert sorted(made) == sorted(path.parent.iterdir())
        assert told["bytes"] == sum(file.stat().st_size for file in made)
    return whole, made


def test_shards_are_those_of_llama_cpp(written: tuple[Path, list[Path]]) -> None:
    whole, parts = written
    count, tensors = len(parts), {t.name: t for t in gguf.GGUFReader(whole).tensors}
    assert count > 3 and parts[0].name == f"model-00001-of-{count:05d}.gguf"
    found = []
    for i, part in enumerate(parts):
        assert part.stat().st_size <= LIMIT or len(gguf.GGUFReader(part).tensors) == 1
        reader = gguf.GGUFReader(part)
        kinds = gguf.GGUFValueType
        keys = {"split.no": (i, kinds.UINT16), "split.count": (count, kinds.UINT16)}
        keys["split.tensors.count"] = (len(tensors), kinds.INT32)
        for key, (value, kind) in keys.items():
            field = reader.fields[key]
            assert (field.contents(), field.types) == (value, [kind])
        assert i == 0 or set(reader.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == set(keys)
        for tensor in reader.tensors:
            other = tensors[tensor.name]
            assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape))
            assert np.array_equal(tensor.data, other.data)
        found += [tensor.name for tensor in reader.tensors]
    assert found == list(tensors)
    first = gguf.GGUFReader(parts[0]).fields
    for key, field in gguf.GGUFReader(whole).fields.items():
        assert key.startswith("GGUF.") or first[key].contents() == field.contents(), key


def test_llama_cpp_opens_the_first(written: tuple[Path, list[Path]]) -> None:
    pytest.importorskip("xllamacpp")
    whole, parts = written
    asked = [2, 3, 5, 7, 11]
    assert generate(parts[0], asked, 8).tokens == generate(whole, asked, 8).tokens


@pytest.mark.parametrize("at", [0, 1, -1])
def test_any_shard_opens_the_model(at: int, written: tuple[Path, list[Path]]) -> None:
    whole, parts = written
    one, other = (open_checkpoint(path, allow_requantize=True) for path in (whole, parts[at]))
    assert (other.name, other.path, other.files) == ("model", parts[0], parts)
    assert one.metadata == other.metadata and one.packed == other.packed and one.tensors == other.tensors
    assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)
    assert Recipe.from_gguf(parts[at]).formats == Recipe.from_gguf(whole).formats


def test_a_tensor_larger_than_a_shard_is_alone() -> None:
    sizes = {"a": 10, "b": 2000, "c": 10, "d": 10, "e": 600}
    parts = shards.partition(sizes, 1000, first=100, more=dict.fromkeys(sizes, 50))
    assert parts == [["a"], ["b"], ["c", "d"], ["e"]]
    with pytest.raises(DynqError, match=r"would be 70,000, llama\.cpp takes 65,535"):
        shards.partition(
            dict.fromkeys(map(str, range(70_000)), 600), 1000, first=0, more=dict.fromkeys(map(str, range(70_000)), 0)
        )


def test_what_is_wrong_with_shards_is_named(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    parts = [Path(shutil.copy(part, tmp_path)) for part in written[1]]
    count = len(parts)
    alone = Path(shutil.copy(parts[1], tmp_path / "alone.gguf"))
    with pytest.raises(DynqError, match=f"alone.gguf: it says that it is shard 2 of {count}"):
        open_checkpoint(alone, allow_requantize=True)
    parts[1].rename(tmp_path / "aside")
    with pytest.raises(DynqError, match=rf"{parts[1]}: this shard is missing; all {count} are needed"):
        open_checkpoint(parts[0], allow_requantize=True)
    shutil.copy(parts[2], parts[1])
    with pytest.raises(DynqError, match=f"it says that it is shard 3 of {count}"):
        open_checkpoint(parts[0], allow_requantize=True)


def test_shards_do_not_overwrite_the_model(written: tuple[Path, list[Path]]) -> None:
    model = open_checkpoint(written[1][0], allow_requantize=True)
    recipe = Recipe(dict.fromkeys(model.tensors, "BF16"), "a test", 0, 0.0, None)
    for limit in range(50_000, 200_000, 2_000):  # one that makes as many shards as the model has
        if files(model, recipe, written[1][0].with_name("model.gguf"), limit) == model.files:
            break
    with pytest.raises(DynqError, match="that is the model itself"):
        export(model, recipe, None, written[1][0].with_name("model.gguf"), shard_bytes=limit)


def test_the_command_splits(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    whole, parts = written
    arguments = ("--out", tmp_path / "new.gguf", "--allow-requantize", "--max-shard-size")
    done = dynq_command("recipe", "apply", whole, parts[1], *arguments, "100kB")
    assert done.returncode == 0, done.stderr
    made = sorted(tmp_path.glob("new-*.gguf"))
    assert f"{made[0]}: {sum(part.stat().st_size for part in made):,} bytes in {len(made)} files" in done.stdout
    assert Recipe.from_gguf(made[-1]).formats == Recipe.from_gguf(whole).formats
    done = dynq_command("recipe", "apply", whole, parts[1], *arguments, "5bpw")
    assert done.returncode == 2 and "size '5bpw': write it as" in done.stderr
