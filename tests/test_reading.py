"""A chunk read by two models: divergences as in `kld`, guesses as of a forward pass by hand, the text put together."""

import numpy as np
import pytest
import torch

from dynq import codec
from dynq.checkpoint import open_checkpoint
from dynq.evaluate import kld
from dynq.evaluate.reading import read
from dynq.torch_model import load_model, load_tokenizer, set_tensor

TEXT = "The capital of France is Paris. Wasser kocht bei hundert Grad, 水は百度で沸騰する。 Naïve café 🙂. "


@pytest.fixture(scope="module")
def models():
    checkpoint = open_checkpoint("dynq-tiny")
    original, file = load_model(checkpoint), load_model(checkpoint)
    for layer in range(12):
        name = f"blk.{layer}.ffn_down.weight"
        weight = checkpoint.read(name)
        set_tensor(file, checkpoint, name, codec.dequantize(codec.quantize(weight, "Q2_K", threads=1), "Q2_K"))
    return original, file, load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def tokens(models):
    return np.array(models[2].encode(TEXT * 3)[:96], np.int32)


def test_divergences_are_those_of_the_evaluation(models, tokens, tmp_path):
    original, file, tokenizer = models
    found = read(original, file, tokens, tokenizer)
    reference = kld.make_reference(original, tokens[None], tmp_path / "r", desc="")
    expected = kld.measure(file, reference, desc="").kld
    assert len(found.tokens) == len(expected) == 47
    np.testing.assert_allclose([token.kld for token in found.tokens], expected, rtol=0.01, atol=1e-4)
    assert found.mean_kld == pytest.approx(expected.mean(), rel=0.01) and found.mean_kld > 0.01


def test_guesses_are_both_models_own(models, tokens):
    original, file, tokenizer = models
    token = read(original, file, tokens, tokenizer, first=40, top=3).tokens[9]
    with torch.inference_mode():
        ids = torch.from_numpy(tokens[None, :50].astype(np.int64))
        p, q = (model(input_ids=ids).logits[0, -1].double().softmax(-1) for model in (original, file))
    assert token.followed.token == tokens[50]
    for guesses, own in ((token.original_top, p), (token.file_top, q)):
        assert [guess.token for guess in guesses] == own.topk(3).indices.tolist()
        for guess in (*guesses, token.followed):
            assert guess.original == pytest.approx(float(p[guess.token]), rel=1e-3)
            assert guess.file == pytest.approx(float(q[guess.token]), rel=1e-3)


def test_pieces_make_the_text(models, tokens):
    original, file, tokenizer = models
    found = read(original, file, tokens, tokenizer, first=20)
    whole = found.before + "".join(token.piece for token in found.tokens)
    assert whole == tokenizer.decode(tokens.tolist()).rstrip("\ufffd")


def test_a_model_does_not_diverge_from_itself(models, tokens):
    original, _, tokenizer = models
    assert all(token.kld < 1e-6 for token in read(original, original, tokens, tokenizer).tokens)
