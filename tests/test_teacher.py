"""A teacher's answers against those of the model itself."""

import numpy as np
import pytest
import tiny_models
import torch

from dynq.checkpoint import open_checkpoint
from dynq.evaluate import kld
from dynq.teacher import Teacher
from dynq.torch_model import load_model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gemma4", "granite", "cohere", "gpt-oss", "qwen35"])
def test_answers_are_those_of_the_model(name, tmp_path):
    """Scales, soft caps, heads that are tied: whatever stands between the head and the answer."""
    checkpoint = open_checkpoint(tiny_models.make(name, tmp_path / "model"))
    model = load_model(checkpoint)
    tokens = np.random.default_rng(0).integers(2, 300, (2, 12))
    teacher = Teacher(checkpoint, model, tokens, "")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)).logits[:, :-1]
    assert teacher.n_vocab == logits.shape[-1]
    for chunk in range(2):
        torch.testing.assert_close(teacher.log_probs(chunk), torch.log_softmax(logits[chunk], -1), rtol=1e-4, atol=1e-4)


def test_it_is_what_a_reference_is(tmp_path):
    checkpoint = open_checkpoint(tiny_models.make("llama-tied", tmp_path / "model"))
    model, other = load_model(checkpoint), load_model(checkpoint)
    with torch.no_grad():
        other.model.norm.weight *= 0.9
    tokens = np.random.default_rng(0).integers(2, 300, (3, 16)).astype(np.int32)
    teacher = Teacher(checkpoint, model, tokens, "")
    reference = kld.make_reference(model, tokens, tmp_path / "reference", first=0, desc="")
    found, wanted = (kld.measure(other, base, desc="") for base in (teacher, reference))
    np.testing.assert_allclose(found.kld, wanted.kld, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.nll_base, wanted.nll_base, rtol=1e-3, atol=1e-3)
    assert np.array_equal(found.same_top, wanted.same_top) and found.kld.mean() > 1e-3
