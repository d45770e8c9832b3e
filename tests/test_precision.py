"""bfloat16 is used only where its own divergence does not show, and then only in the products of linear layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from dynq import export
from dynq.checkpoint import open_checkpoint
from dynq.evaluate import compare, kld, precision
from dynq.torch_model import load_model

CHECKPOINT = "dynq-tiny"


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 8000, (4, 96)).astype(np.int32)


@pytest.fixture(scope="module")
def reference(tokens, tmp_path_factory) -> kld.Reference:
    model = load_model(open_checkpoint(CHECKPOINT))
    return kld.make_reference(model, tokens, tmp_path_factory.mktemp("reference") / "r", desc="")


@pytest.fixture
def with_bfloat16(monkeypatch) -> None:
    """Also where the processor would have to emulate it."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)


def quantized(fmt: str):
    checkpoint = open_checkpoint(CHECKPOINT)
    read = export.simulate(checkpoint, compare.uniform(fmt, checkpoint.tensors), None, threads=1)
    return load_model(checkpoint, read=read)


def test_a_coarse_file_is_measured_in_bfloat16(reference, with_bfloat16):
    model = quantized("Q3_K")
    scores, arithmetic = precision.measure(model, reference, desc="")
    exact = kld.measure(model, reference, desc="")
    mean = exact.kld.mean()
    assert arithmetic.dtype == "bfloat16" and 0 < arithmetic.floor < precision.SHARE * mean
    assert not np.array_equal(scores.kld, exact.kld)  # or it was float32 after all
    # beside the floor there is noise: about sqrt(2 KLD * 2 floor) a token
    noise = np.sqrt(4 * mean * arithmetic.floor / len(exact.kld))
    assert abs(scores.kld.mean() - mean) < arithmetic.floor + 4 * noise


def test_a_fine_file_is_measured_in_float32(reference, with_bfloat16):
    model = quantized("Q8_0")
    scores, arithmetic = precision.measure(model, reference, desc="")
    assert arithmetic.dtype == "float32" and arithmetic.floor > precision.SHARE * scores.kld.mean()
    assert np.array_equal(scores.kld, kld.measure(model, reference, desc="").kld)


def test_the_whole_text_has_the_last_word(reference, with_bfloat16, monkeypatch):
    """A first chunk that allows bfloat16, a text that does not."""
    model = quantized("Q8_0")
    least = precision._floor(model, precision.Bfloat16Products(model), reference.tokens) / precision.SHARE
    original, seen = kld.measure, []

    def measure(*args, chunks=None, **more):
        scores = original(*args, chunks=chunks, **more)
        seen.append((more.get("skip", 0), chunks))
        return replace(scores, kld=scores.kld + 1.5 * least) if chunks == 1 else scores

    monkeypatch.setattr(kld, "measure", measure)
    assert precision.measure(model, reference, desc="")[1].dtype == "float32"
    assert seen == [(0, 1), (1, None), (0, None)]


def test_the_original_does_not_diverge_from_itself(reference, with_bfloat16):
    scores, arithmetic = precision.measure(load_model(open_checkpoint(CHECKPOINT)), reference, desc="")
    assert arithmetic.dtype == "float32" and arithmetic.floor > 1e-5
    assert abs(scores.kld.mean()) < 1e-6 and scores.same_top.all()


def test_without_bfloat16_everything_is_float32(reference, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    model = quantized("Q3_K")
    scores, arithmetic = precision.measure(model, reference, desc="")
    assert arithmetic == precision.Arithmetic("float32", None)
    assert np.array_equal(scores.kld, kld.measure(model, reference, desc="").kld)


@torch.inference_mode()
def test_products_but_those_of_the_head_are_rounded(tokens, monkeypatch):
    """The twin: float32 products of rounded factors, rounded again."""
    model = load_model(open_checkpoint(CHECKPOINT))
    model.model.layers = model.model.layers[:1]
    exact = kld.forward(model, tokens[:1], 0)
    with precision.Bfloat16Products(model):
        found = kld.forward(model, tokens[:1], 0)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            monkeypatch.setattr(
                module, "forward", lambda x, m=module: rounded(functional.linear(rounded(x), rounded(m.weight)))
            )
    twin = kld.forward(model, tokens[:1], 0)
    # sums in another order round to a neighbour now and then; many layers would carry that on
    assert (found - twin).std() < 0.3 * (exact - twin).std()
    assert (found - exact).std() == pytest.approx(float((twin - exact).std()), rel=0.2)


@pytest.mark.parametrize("n", [1, 127, 128, 300])
def test_blocks_of_causal_attention(n):
    torch.manual_seed(n)
    query, (key, value) = torch.randn(2, 4, n, 16), torch.randn(2, 2, 2, n, 16)
    settings = {"scale": 0.3, "enable_gqa": True, "dropout_p": 0.0}
    whole = functional.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    torch.testing.assert_close(precision._causal_attention(query, key, value, **settings), whole)
