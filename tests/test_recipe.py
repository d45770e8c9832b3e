"""Recipes there and back: JSON, llama-quantize's tensor types, headers of GGUF files."""

import dataclasses
import importlib.util
import json
import random
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from record_mixes import MODELS, dry_run

from dynq.errors import DynqError
from dynq.gguf_header import read_header
from dynq.recipe import KEY, Recipe

FORMATS = {
    "blk.10.attn_q.weight": "Q4_K",
    "blk.2.attn_output.weight": "Q2_K",
    "output.weight": "Q6_K",
    "output_norm.weight": "F32",
}
RECIPE = Recipe(
    FORMATS, "3.5bpw", 1000, 3.4375, 0.0123456789012345, {"seed": 1, "text": "über", "a": {"z": [1], "b": 2}}
)


def damaged(change) -> str:
    outer = json.loads(RECIPE.to_json())
    change(outer[KEY])
    return json.dumps(outer)


def test_json_there_and_back():
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    without = dataclasses.replace(RECIPE, predicted_kld=None, provenance={})
    assert Recipe.from_json(without.to_json()) == without


def test_equal_recipes_give_equal_bytes_in_file_order():
    shuffled = list(FORMATS.items())
    random.Random(0).shuffle(shuffled)
    other = dataclasses.replace(
        RECIPE, formats=dict(shuffled), provenance={"a": {"b": 2, "z": [1]}, "text": "über", "seed": 1}
    )
    assert other.to_json() == RECIPE.to_json()
    assert list(json.loads(RECIPE.to_json())[KEY]["formats"])[:2] == [
        "blk.2.attn_output.weight",
        "blk.10.attn_q.weight",
    ]


def test_not_a_number_is_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(RECIPE, predicted_kld=float("nan")).to_json()


def test_file_there_and_back(tmp_path):
    path = tmp_path / "3.5bpw.recipe.json"
    RECIPE.save(path)
    assert Recipe.load(path) == RECIPE
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DynqError, match="no such recipe"):
        Recipe.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a recipe"),
        ('{"formats": {}}', "not a recipe"),
        (damaged(lambda body: body.update(version=2)), "version 2"),
        (damaged(lambda body: body.pop("target")), 'lacks "target"'),
        (damaged(lambda body: body.update(tensor_bytes="1000")), "a whole number"),
        (damaged(lambda body: body.update(tensor_bytes=True)), "a whole number"),
        (damaged(lambda body: body.update(bpw=float("inf"))), "finite"),
        (damaged(lambda body: body.update(rotation="hadamard")), '"rotation"'),
        (
            damaged(lambda body: body["formats"].update({"output.weight": "Q7_K"})),
            "output.weight has the format 'Q7_K'",
        ),
        (damaged(lambda body: body["formats"].update({"output.weight": ["Q6_K"]})), "output.weight"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(text, says):
    with pytest.raises(DynqError, match=re.escape(says)) as error:
        Recipe.from_json(text, "my.recipe.json")
    assert str(error.value).startswith("my.recipe.json: ") and "\n" not in str(error.value)


def llama_quantize_reads(text: str, names: list[str]) -> dict[str, str]:
    """The type of each name by llama-quantize's rules: words, pattern in lower case, searched for, first match."""
    pairs = [word.partition("=")[::2] for word in text.split()]
    return {
        name: next((kind for pattern, kind in pairs if re.search(pattern.lower(), name)), "").upper() for name in names
    }


def test_tensor_types_hit_their_own_tensor_only():
    names = [*FORMATS, "blk.0.attn_output.weight", "blk.1.attn_q.weight", "blk.110.attn_q.weight"]
    found = llama_quantize_reads(RECIPE.to_tensor_types(), names)
    assert found == dict.fromkeys(names, "") | FORMATS


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python (the extra bench)")
@pytest.mark.parametrize("title", ["llama, 12 layers, 2 heads shared, tied", "qwen3, 36 layers, 4 heads shared"])
def test_libllama_follows_tensor_types(tmp_path, title):
    model = MODELS[title]
    choice = random.Random(1)
    formats = {
        name: choice.choice(["Q2_K", "Q3_K", "Q4_K", "Q5_1", "Q6_K", "Q8_0", "F16"]) if tensor.quantizable else "F32"
        for name, tensor in model.tensors().items()
    }
    model.write(tmp_path / "model.gguf")
    text = Recipe(formats, "", 0, 0.0, None).to_tensor_types()
    assert dry_run(tmp_path / "model.gguf", "Q4_K_M", True, text).types == formats


def write_gguf(path: Path, recipe: str | None = None, tensors: dict[str, str] | None = None, **split: int) -> None:
    """A small file with vocabularies, a nested array and tensors of 512 x 256 zeros, as published files have them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", [f"ü{i}" for i in range(1000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 1000)
    writer.add_float64("a.double", 1.5)
    writer.add_bool("a.bool", True)
    if recipe is not None:
        writer.add_string(KEY, recipe)
    for key, value in split.items():
        writer.add_uint16(f"split.{key}", value)
    for name, fmt in (tensors if tensors is not None else FORMATS).items():
        kind = gguf.GGMLQuantizationType[fmt]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if fmt == "F32":
            writer.add_tensor(name, np.zeros(256, np.float32))
        else:
            writer.add_tensor(name, np.zeros((512, 256 // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_any_header_is_a_recipe(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors=FORMATS | {"blk.3.attn_k.weight": "IQ2_XXS"})
    found = Recipe.from_gguf(path)
    assert found.formats == FORMATS | {"blk.3.attn_k.weight": "IQ2_XXS"}
    assert found.tensor_bytes == 512 * (144 + 84 + 210 + 66) + 1024
    assert found.bpw == pytest.approx(8 * found.tensor_bytes / (4 * 512 * 256 + 256))
    assert found.predicted_kld is None
    assert found.provenance == {"file": "model.gguf", "general.name": "tiny", "general.architecture": "llama"}


def test_header_agrees_with_gguf_py(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    metadata, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    assert tensors == {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1])) for t in reader.tensors}
    assert metadata["a.double"] == 1.5 and metadata["a.bool"] is True
    assert "tokenizer.ggml.tokens" not in metadata


def test_own_recipe_comes_back_whole_unless_the_types_differ(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, RECIPE.to_json())
    assert Recipe.from_gguf(path) == RECIPE
    # another tool quantized the file again and copied the metadata
    write_gguf(path, RECIPE.to_json(), FORMATS | {"output.weight": "Q8_0"})
    again = Recipe.from_gguf(path)
    assert again.formats["output.weight"] == "Q8_0" and again.predicted_kld is None
    assert again.provenance["stale_recipe"] is True
    # a newer dynq's recipe
    write_gguf(path, damaged(lambda body: body.update(version=99)))
    assert "version 99" in Recipe.from_gguf(path).provenance["unread_recipe"]


def test_shards_are_read_together(tmp_path):
    names = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    write_gguf(names[0], tensors={"token_embd.weight": "Q8_0"}, no=0, count=2)
    write_gguf(names[1], tensors={"blk.0.ffn_up.weight": "Q3_K"}, no=1, count=2)
    for name in names:
        assert Recipe.from_gguf(name).formats == {"token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "Q3_K"}
    names[1].unlink()
    with pytest.raises(DynqError, match=r"m-00002-of-00002\.gguf: this shard is missing"):
        Recipe.from_gguf(names[0])


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(DynqError, match="no such file"):
        Recipe.from_gguf(path)
    with pytest.raises(DynqError, match="a folder"):
        Recipe.from_gguf(tmp_path)
    path.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(DynqError, match="not a GGUF"):
        Recipe.from_gguf(path)


def test_a_header_cut_anywhere_is_refused(tmp_path):
    path, cut = tmp_path / "model.gguf", tmp_path / "cut.gguf"
    write_gguf(path, tensors={"output.weight": "Q8_0"})
    whole = path.read_bytes()
    end = whole.rindex(b"output.weight") + len("output.weight") + 4 + 16 + 4 + 8
    for length in [*range(4, 200), *range(200, end, 97), end - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DynqError, match="cut off or damaged"):
            Recipe.from_gguf(cut)
    # a length or count that no file could have
    for at, says in ((8, "tensors, of which"), (16, "keys, of which"), (24, "cut off or damaged")):
        cut.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        with pytest.raises(DynqError, match=says):
            Recipe.from_gguf(cut)
