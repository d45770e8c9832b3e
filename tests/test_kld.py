"""Scores against slow NumPy twins, hand-computed cases, and the rule that a model does not diverge from itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynq.errors import DynqError
from dynq.evaluate import kld

V, CTX, CHUNKS = 50, 16, 5


class Bigram(torch.nn.Module):
    """A causal model whose logits depend on the last token alone."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(vocab_size=table.shape[1])
        self.config.get_text_config = lambda: self.config

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


@pytest.fixture
def setup(tmp_path):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (CHUNKS, CTX)).astype(np.int32)
    a = torch.from_numpy(rng.normal(0, 3, (V, V)).astype(np.float32))
    b = a + torch.from_numpy(rng.normal(0, 0.5, (V, V)).astype(np.float32))
    return tokens, a, b, kld.make_reference(Bigram(a), tokens, tmp_path / "ref", desc="")


def naive(tokens, a, b, first):
    """Token by token, in float64."""
    rows = []
    for chunk in tokens:
        for i in range(first, CTX - 1):
            la, lb = (np.asarray(t[chunk[i]], dtype=np.float64) for t in (a, b))
            la, lb = la - np.log(np.exp(la).sum()), lb - np.log(np.exp(lb).sum())
            nxt = chunk[i + 1]
            kl = (np.exp(la) * (la - lb)).sum()
            rows.append((kl, -lb[nxt], -la[nxt], np.exp(lb[nxt]) - np.exp(la[nxt]), la.argmax() == lb.argmax()))
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_scores_equal_the_naive_twin(setup):
    tokens, a, b, reference = setup
    scores = kld.measure(Bigram(b), reference, desc="")
    for ours, theirs in zip(
        (scores.kld, scores.nll, scores.nll_base, scores.p_diff, scores.same_top),
        naive(tokens, a, b, CTX // 2),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=4e-4)  # the file's step
    assert len(scores.kld) == CHUNKS * (CTX - 1 - CTX // 2)


@pytest.mark.parametrize("v", [1, 63, 64, 200, 5000])
@pytest.mark.parametrize("floor", [None, -16.0])
def test_the_kernel_equals_its_twin(v, floor):
    rng = np.random.default_rng(v)
    n = 20
    logits = torch.from_numpy(rng.normal(0, 6, (n, v)).astype(np.float32))
    codes = rng.integers(0, 65536, (n, v)).astype(np.uint16)
    codes[: n // 2, 0], logits[: n // 2, 0] = (0 if floor is None else 65535), 40  # agreement at the top
    logits[:, -1] = -300.0  # beyond e^-87
    step = np.full(n, (-32.0 if floor is None else 16.5) / 65535, np.float32)
    offset = np.full(n, 0.0 if floor is None else -16.6, np.float32)
    coded = kld.Coded(codes, step, offset, normalise=floor is None)
    targets = rng.integers(0, v, n)
    values, same_top = kld._compare(logits, coded, targets, floor)
    twin, same_twin = kld.compare_in_torch(logits.double(), coded, targets, floor)
    np.testing.assert_allclose(values, twin, rtol=2e-6, atol=1e-5)
    assert np.array_equal(same_top, same_twin)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_show(bad):
    logits = torch.zeros(2, 100)
    logits[1, 70] = bad
    coded = kld.Coded(np.zeros((2, 100), np.uint16), *np.zeros((2, 2), np.float32), normalise=True)
    values, _ = kld._compare(logits, coded, np.zeros(2, np.int64), None)
    assert np.isfinite(values[0]).all() and not np.isfinite(values[1, 0])


def test_a_model_does_not_diverge_from_itself(setup):
    _, a, _, reference = setup
    stats = kld.statistics(kld.measure(Bigram(a), reference, desc=""))
    assert stats["Same top p"] == 1.0
    assert abs(stats["Mean KLD"]) < 1e-6 and stats["Maximum KLD"] < 1e-6
    assert stats["Mean PPL(Q)/PPL(base)"] == pytest.approx(1, abs=1e-4)


def test_range_of_the_file_is_32_nats(tmp_path):
    table = torch.full((2, 2), 0.0)
    table[:, 1] = -31.0  # beyond the 16 nats of llama.cpp's file
    tokens = np.zeros((1, 4), np.int32)
    reference = kld.make_reference(Bigram(table), tokens, tmp_path / "ref", desc="")
    assert float(reference.coded(0).log_probs()[0, 1]) == pytest.approx(-31.0, abs=1e-3)


def test_a_large_vocabulary_adds_no_divergence():
    table = torch.from_numpy(np.random.default_rng(0).normal(0, 4, (1, 150_000)).astype(np.float32))
    found = next(kld.log_probabilities(Bigram(table), np.zeros((1, 6), np.int32), 2, desc=""))
    error = found[0].double() - torch.log_softmax(table[0].double(), -1)
    assert abs(float(error.mean())) < 1e-6  # torch.log_softmax: 1.3e-5


def test_statistics_of_a_case_computed_by_hand():
    n = 200
    value = np.arange(n, dtype=np.float64) / (n - 1)
    scores = kld.TokenScores(
        kld=value,
        nll=np.full(n, np.log(3.0)),
        nll_base=np.full(n, np.log(2.0)),
        p_diff=value - 0.5,
        same_top=value < 0.75,
    )
    stats = kld.statistics(scores)
    assert stats["Mean KLD"] == pytest.approx(0.5)
    # variance of the uniform grid (n + 1) / (12 (n - 1)), over n - 1
    assert stats["Mean KLD ±"] == pytest.approx(np.sqrt((n + 1) / (12 * (n - 1)) / (n - 1)))
    assert stats["90.0% KLD"] == pytest.approx(0.9) and stats["Median KLD"] == pytest.approx(0.5)
    assert stats["Minimum Δp"] == pytest.approx(-0.5) and stats["Maximum KLD"] == 1.0
    assert stats["Mean PPL(Q)"] == pytest.approx(3.0) and stats["Mean PPL(Q)/PPL(base)"] == pytest.approx(1.5)
    assert stats["Mean ln(PPL(Q)/PPL(base))"] == pytest.approx(np.log(1.5))
    assert stats["Same top p"] == 0.75
    assert stats["RMS Δp"] == pytest.approx(np.sqrt(np.mean((value - 0.5) ** 2)))


def test_another_vocabulary_is_refused(setup):
    *_, reference = setup
    with pytest.raises(DynqError, match="60 tokens in its vocabulary, the reference 50"):
        kld.measure(Bigram(torch.zeros(V, 60)), reference, desc="")


def test_a_truncated_reference_is_refused(setup, tmp_path):
    with (tmp_path / "ref.u16").open("r+b") as f:
        f.truncate(100)
    with pytest.raises(DynqError, match="100 bytes"):
        kld.open_reference(tmp_path / "ref")


def test_a_full_disk_is_said_before_the_work(setup, tmp_path, monkeypatch):
    tokens, a, *_ = setup
    monkeypatch.setattr(kld.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DynqError, match="GiB are free"):
        kld.make_reference(Bigram(a), tokens, tmp_path / "other", desc="")
