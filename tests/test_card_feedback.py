"""Error feedback on torch tensors, as a card has it, against the processor's: nearly all codes the same, no more error.

Tensors here lie on the processor (`cpu:0`), so that all but the compiler of the kernels is what a card gets; where
there is a card it is asked too.
"""

import numpy as np
import pytest
import torch
from codes import codes
from test_feedback import NAMES, correlated, gaussian

from dynq import codec, compensate, feedback
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.kernels import arrays, scales

DEVICES = ["cpu:0", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no card"))]
ROWS = 160


@pytest.fixture(scope="module")
def trained() -> np.ndarray:
    """The first rows of a trained matrix."""
    return open_checkpoint("dynq-tiny").read("blk.1.ffn_down.weight")[:ROWS].astype(np.float32)


def both(weights: np.ndarray, name: str, device: str) -> tuple[float, float]:
    """Share of equal codes, and the card's output error over the processor's."""
    n, form = weights.shape[1], scales.grid(name)
    assert form is not None
    h = feedback.hessian(correlated(3 * n, n, 0)).matrix
    ours, theirs = (feedback._feedback(weights, form, arrays.placed(h, d), 0.1, 1) for d in (device, "cpu"))
    metric = feedback.Hessian(compensate.shrunk(h, 0.1), 1)
    errors = [feedback.output_error(weights, codec.dequantize(data, name), metric) for data in (ours, theirs)]
    return float((codes(name, ours) == codes(name, theirs)).mean()), errors[0] / errors[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_trained_weights(name: str, device: str, trained: np.ndarray):
    equal, error = both(trained, name, device)
    assert equal >= 0.999
    assert error == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_1", "IQ4_NL", "IQ1_M", "IQ3_S"])
def test_odd_rows(name: str, device: str):
    """Zeros, equal weights, denormals, outliers."""
    weights = gaussian(9, 512)
    weights[1], weights[2], weights[3], weights[4, 7], weights[5, 300], weights[6, :256] = 0, 0.3, 1e-41, 1e30, 3e38, 0
    form, h = scales.grid(name), feedback.hessian(correlated(1024, 512, 0)).matrix
    assert form is not None
    ours, theirs = (feedback._feedback(weights, form, arrays.placed(h, d), 0.2, 1) for d in (device, "cpu"))
    assert (codes(name, ours) == codes(name, theirs)).mean() >= 0.999
    decoded = codec.dequantize(ours, name)
    assert np.isfinite(decoded).all() and (decoded[1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_choice(device: str):
    """Shrinkage, ratios and what is refused are those of the processor."""
    weights = gaussian(40, 256)
    fit, aside = ([correlated(400, 256, seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    ours, theirs = (feedback.encode(weights, "Q3_K", fit, aside, device=d) for d in (device, "cpu"))
    assert ours.level == theirs.level == "feedback" and ours.shrinkage == theirs.shrinkage
    np.testing.assert_allclose(ours.ratios, theirs.ratios, rtol=1e-3)
    foreign = correlated(600, 256, 1, mixing=5)
    refused = [feedback.encode(weights, "Q3_K", fit, [aside[0], foreign], device=d) for d in (device, "cpu")]
    assert refused[0].reason.split("(")[0] == refused[1].reason.split("(")[0]
    np.testing.assert_array_equal(refused[0].data, refused[1].data)
    with pytest.raises(DynqError, match="negative diagonal"):
        feedback.encode(weights, "Q4_K", feedback.Hessian(-np.eye(256), 512), aside, device=device)
