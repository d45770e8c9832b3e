"""Where it hurts: the worst tokens against a search by hand; restoring all tensors leaves no divergence."""

import numpy as np
import pytest
import torch

from dynq import export, formats
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld, where
from dynq.mixes import mix
from dynq.recipe import Recipe
from dynq.torch_model import load_model, load_tokenizer


@pytest.fixture(scope="module")
def original():
    return open_checkpoint("dynq-tiny")


@pytest.fixture(scope="module")
def tokenizer(original):
    return load_tokenizer(original)


@pytest.fixture(scope="module")
def reference(original, tokenizer, tmp_path_factory):
    text = "The capital of France is Paris. Water boils at one hundred degrees. " * 6
    tokens = np.array(tokenizer.encode(text)[:64], np.int32).reshape(2, 32)
    return kld.make_reference(load_model(original), tokens, tmp_path_factory.mktemp("reference") / "r", desc="")


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    """A GGUF whose attn_v of layer 3 is worse than all else."""
    path = tmp_path_factory.mktemp("file") / "file.gguf"
    chosen = mix("Q4_K_M", original.tensors, original.metadata, False) | {"blk.3.attn_v.weight": "Q2_K"}
    chosen |= {name: "F32" for name in original.tensors if name.startswith("blk.5.")}
    export.export(original, Recipe(chosen, "", 0, 0.0, None), None, path, threads=1)
    return open_checkpoint(path, allow_requantize=True)


@pytest.fixture
def quantized(file):
    return load_model(file)


def test_worst_tokens(original, quantized, reference, tokenizer):
    scores = kld.measure(quantized, reference, desc="")
    worst = where.worst_tokens(quantized, reference, scores, tokenizer, k=3, before=4)
    assert [token.kld for token in worst] == sorted(scores.kld, reverse=True)[:3]
    first = worst[0]
    tokens = reference.tokens[first.chunk]
    assert first.before == tokenizer.decode(tokens[first.position - 4 : first.position].tolist())
    assert first.followed.token == tokens[first.position] and first.position > reference.first
    ids = torch.tensor([tokens[: first.position].tolist()])
    with torch.inference_mode():
        p, q = (model(ids).logits[0, -1].double().softmax(-1) for model in (load_model(original), quantized))
    assert float((p * (p / q).log()).sum()) == pytest.approx(first.kld, rel=0.02, abs=1e-4)
    for found, probabilities in ((first.original_top, p), (first.file_top, q)):
        assert [guess.token for guess in found] == probabilities.topk(5).indices.tolist()
    for guess in (*first.original_top, *first.file_top, first.followed):
        assert guess.text == tokenizer.decode([guess.token])
        assert guess.original == pytest.approx(float(p[guess.token]), rel=0.01, abs=1e-5)
        assert guess.file == pytest.approx(float(q[guess.token]), rel=0.01, abs=1e-5)


def test_token_inside_a_character_is_shown(tokenizer):
    inside = tokenizer.encode("日")[0]
    assert "\ufffd" in tokenizer.decode([inside]) and "\ufffd" not in where.token_text(tokenizer, inside)


def test_restoring_all_leaves_no_divergence(original, file, quantized, reference):
    before = {name: values.clone() for name, values in quantized.state_dict().items()}
    costs = where.cost_of_tensors(quantized, original, file, reference, by="model")
    (row,) = costs.rows
    assert costs.kld > 1e-3 and abs(row.kld) < 1e-6 and row.saved == pytest.approx(costs.kld, abs=1e-6)
    stored = [info for info in file.tensors.values() if info.dtype not in ("F32", "F16")]
    assert row.bytes == sum(formats.tensor_bytes(info.dtype, info.shape) for info in stored)
    assert sorted(row.tensors) == sorted(info.name for info in stored)
    assert all(torch.equal(values, before[name]) for name, values in quantized.state_dict().items())


def test_the_worst_tensor_is_found(original, file, quantized, reference):
    costs = where.cost_of_tensors(quantized, original, file, reference, among=["attn_v"])
    assert len(costs.rows) == 11 and costs.skipped == 0  # layer 5 is whole
    assert costs.rows[0].name == "blk.3.attn_v.weight" and costs.rows[0].formats == "Q2_K"
    assert costs.rows[0].bytes == formats.tensor_bytes("Q2_K", original.tensors["blk.3.attn_v.weight"].shape)
    for row in costs.rows:
        assert row.saved == pytest.approx(costs.kld - row.kld) and row.saved_error > 0


def test_layers_and_kinds(original, file, quantized, reference):
    layers = where.cost_of_tensors(quantized, original, file, reference, by="layer", limit=3, chunks=1)
    assert layers.skipped == 11 and {row.name for row in layers.rows} <= {
        "token_embd.weight",
        "blk.6",
        "output_norm.weight",
    }
    (kind,) = where.cost_of_tensors(quantized, original, file, reference, by="kind", among=["ffn_up"], chunks=1).rows
    assert kind.name == "ffn_up" and len(kind.tensors) == 11


def test_a_file_that_loses_nothing_has_no_rows(original, reference):
    costs = where.cost_of_tensors(load_model(original), original, original, reference, by="layer", among=["blk.0"])
    assert costs.rows == [] and abs(costs.kld) < 1e-6


def test_mistakes_are_named(original, file, quantized, reference):
    with pytest.raises(DynqError, match="cannot be grouped by 'block'; there are tensor, layer, kind, model"):
        where.cost_of_tensors(quantized, original, file, reference, by="block")
    with pytest.raises(DynqError, match="no tensor, layer or kind is called attn_w"):
        where.cost_of_tensors(quantized, original, file, reference, among=["attn_w"])


def test_an_output_stored_apart_is_restored_from_the_tied_embedding(original):
    assert original.tied and where._source("output.weight", original, original) == "token_embd.weight"
    with pytest.raises(DynqError, match=r"has no tensor blk.0.attn_q.bias; not the same model"):
        where._source("blk.0.attn_q.bias", original, original)
