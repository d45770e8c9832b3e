"""Recipes shown, compared and applied: from recipe files and from the headers of GGUFs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from conftest import dynq_command
from test_recipe import FORMATS, RECIPE, write_gguf

from dynq import describe
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.export import apply
from dynq.imatrix import Importance
from dynq.recipe import Recipe


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(
        tmp_path / "model.gguf", tensors=FORMATS | {"blk.3.attn_q.weight": "Q4_K", "blk.5.attn_q.weight": "Q2_K"}
    )
    return tmp_path / "model.gguf"


def test_kinds_and_formats_add_up(gguf_file):
    described = describe.read(gguf_file)
    kinds = {row["kind"]: row for row in describe.by_kind(described)}
    assert kinds["attn_q"]["formats"] == {"Q4_K": [3, 10], "Q2_K": [5]}
    assert kinds["attn_q"]["bytes"] == 512 * (144 + 144 + 84) and kinds["attn_q"]["tensors"] == 3
    assert kinds["attn_q"]["bpw"] == pytest.approx((4.5 + 4.5 + 2.625) / 3)
    assert kinds["output"]["formats"] == {"Q6_K": [None]}
    for rows in (kinds.values(), describe.by_format(described)):
        assert sum(row["bytes"] for row in rows) == described.recipe.tensor_bytes
    assert json.loads(json.dumps(describe.as_json(described)))["tensors"][-1]["tensor"] == "blk.10.attn_q.weight"


def test_show_prints_layers_in_short(gguf_file):
    text = describe.show_text(describe.read(gguf_file))
    assert "Q4_K 3,10  Q2_K 5" in text and max(map(len, text.splitlines())) <= 120
    assert describe.layers([0, 1, 2, 5, None]) == "0-2,5"


def test_a_recipe_file_has_no_bytes_of_tensors(tmp_path):
    RECIPE.save(tmp_path / "a.recipe.json")
    described = describe.read(tmp_path / "a.recipe.json")
    assert all(row["bytes"] is None for row in describe.by_kind(described))
    assert "1,000 bytes" in describe.show_text(described) and "predicted KLD 0.01235" in describe.show_text(described)


def test_diff_names_tensors_with_bytes(gguf_file, tmp_path):
    write_gguf(tmp_path / "b.gguf", tensors=FORMATS | {"output.weight": "Q8_0", "blk.3.attn_q.weight": "Q4_K"})
    a, b = describe.read(gguf_file), describe.read(tmp_path / "b.gguf")
    assert describe.difference(a, b) == [
        {"tensor": "blk.5.attn_q.weight", "a": "Q2_K", "b": None, "bytes_a": 512 * 84, "bytes_b": None},
        {"tensor": "output.weight", "a": "Q6_K", "b": "Q8_0", "bytes_a": 512 * 210, "bytes_b": 512 * 272},
    ]
    assert "2 of 6 tensors differ; b has -11,264 bytes" in describe.difference_text(a, b)
    assert describe.difference(a, a) == []
    RECIPE.save(tmp_path / "c.recipe.json")
    assert describe.difference(describe.read(tmp_path / "c.recipe.json"), b)[0] == {
        "tensor": "blk.3.attn_q.weight",
        "a": None,
        "b": "Q4_K",
        "bytes_a": None,
        "bytes_b": 512 * 144,
    }


def test_what_cannot_be_compared_is_one_line(gguf_file, tmp_path):
    write_gguf(tmp_path / "other.gguf", tensors={"blk.0.ffn_up.weight": "Q8_0"})
    with pytest.raises(DynqError, match="no tensor in common"):
        describe.difference(describe.read(gguf_file), describe.read(tmp_path / "other.gguf"))
    (tmp_path / "text").write_text("hello")
    for path, words in (
        (tmp_path, "a folder"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "text", "not readable as JSON"),
    ):
        with pytest.raises(DynqError, match=words):
            describe.read(path)
    done = dynq_command("recipe", "show", tmp_path / "none")
    assert done.returncode == 2 and done.stderr == f"dynq: {tmp_path / 'none'}: no such file\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama-tied", tmp_path_factory.mktemp("tiny") / "llama"))


def recipe_for(checkpoint: Checkpoint, fmt: str) -> Recipe:
    chosen = {name: fmt if info.quantizable else "F32" for name, info in checkpoint.tensors.items()}
    return Recipe(chosen, "a test", 0, 0.0, 0.125, {"seed": 1})


def test_apply_from_a_recipe_and_from_the_header_it_makes(tiny, tmp_path):
    recipe_for(tiny, "Q5_K").save(tmp_path / "a.recipe.json")
    made = apply(describe.read(tmp_path / "a.recipe.json"), tiny, None, tmp_path / "a.gguf", threads=1)
    assert made["verified"] and made["fallbacks"]["blk.0.attn_q.weight"] == ["Q5_K", "Q5_1"]  # rows of 128
    told = Recipe.from_gguf(tmp_path / "a.gguf")
    assert told.formats["blk.0.attn_q.weight"] == "Q5_1" and told.predicted_kld is None
    assert told.provenance == {"recipe": "a.recipe.json", "recipe_provenance": {"seed": 1}}
    again = apply(describe.read(tmp_path / "a.gguf"), tiny, None, tmp_path / "b.gguf", level="search", threads=1)
    assert again["tensor_bytes"] == made["tensor_bytes"] and again["fallbacks"] == {}


def test_apply_to_a_wider_model_of_the_family_by_what_show_prints(tiny, tmp_path):
    apply(describe.Described(tmp_path / "r", recipe_for(tiny, "Q8_0"), {}), tiny, None, tmp_path / "a.gguf", threads=1)
    tiny_models.MODELS["wider"] = ("llama", {"intermediate_size": 192, "tie_word_embeddings": True})
    try:
        tiny_models.make("wider", tmp_path / "wider")
    finally:
        del tiny_models.MODELS["wider"]
    shown = dynq_command("recipe", "show", tmp_path / "a.gguf", "--json")
    (tmp_path / "a.recipe.json").write_text(shown.stdout)
    for source, n in (("a.gguf", 9), ("a.recipe.json", None)):  # a recipe file knows no shapes
        done = dynq_command("recipe", "apply", tmp_path / source, tmp_path / "wider", "--out", tmp_path / "b.gguf")
        assert done.returncode == 0, done.stderr
        assert (f"{n} tensors (blk.0.ffn_gate.weight, ...) have another shape" in done.stdout) == (n is not None)
        assert Recipe.from_gguf(tmp_path / "b.gguf").formats == Recipe.from_gguf(tmp_path / "a.gguf").formats


def test_apply_refuses_what_does_not_match_before_it_writes(tiny, tmp_path):
    recipe = recipe_for(tiny, "IQ4_NL")

    def refused(recipe, words, importance=None):
        with pytest.raises(DynqError, match=words):
            apply(describe.Described(tmp_path / "r", recipe, {}), tiny, importance, tmp_path / "a.gguf")
        assert not (tmp_path / "a.gguf").exists()

    name = "blk.0.attn_q.weight"
    less = {key: value for key, value in recipe.formats.items() if key != name}
    refused(dataclasses.replace(recipe, formats=less), f"no format for {name}")
    refused(dataclasses.replace(recipe, formats=recipe.formats | {"x.weight": "F32"}), "names x.weight")
    refused(dataclasses.replace(recipe, formats=recipe.formats | {name: "Q8_1"}), "unknown format 'Q8_1'")


def test_apply_says_where_importance_is_missing(tmp_path):
    embedded = open_checkpoint("dynq-tiny")
    name = "blk.1.attn_q.weight"
    recipe = recipe_for(embedded, "Q8_0")
    recipe.formats[name] = "IQ2_XS"
    for importance in (None, Importance({"other": np.ones((1, 4), np.float32)}, {"other": np.ones(1, np.float32)})):
        with pytest.raises(DynqError, match=f"{name}: IQ2_XS needs an importance matrix"):
            apply(describe.Described(tmp_path / "r", recipe, {}), embedded, importance, tmp_path / "a.gguf")
