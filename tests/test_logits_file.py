"""llama-perplexity's logits file: a small one made by hand, read and scored by a slow twin of llama-perplexity."""

import struct

import numpy as np
import pytest
import torch
from test_kld import Bigram

from dynq.errors import DynqError
from dynq.evaluate import kld, logits_file

V, CTX, CHUNKS = 7, 12, 4
SCORED = CTX - 1 - CTX // 2


def by_hand(path, tokens, logits, truncate=0):
    """The file, value by value in Python's floats; logits [chunks, scored, V]. Returns (codes, scales, lowests)."""
    data = b"_logits_" + struct.pack("<Iii", CTX, V, CHUNKS) + b"".join(struct.pack("<i", t) for t in tokens.ravel())
    stored = []
    for row in logits.reshape(-1, V).astype(float):
        log_sum = np.log(sum(np.exp(x - row.max()) for x in row))
        low = max(row.min(), row.max() - 16)
        scale = (row.max() - low) / 65535
        codes = [round((x - low) / scale) if x > low else 0 for x in row]
        stored.append((codes, scale, low - row.max() - log_sum))
        data += struct.pack("<ff", *stored[-1][1:]) + struct.pack(f"<{V + 1}H", *codes, 0)  # 7 to the next even number
    path.write_bytes(data[: len(data) - truncate])
    return stored


def twin(tokens, stored, logits):
    """Columns kld, nll, nll_base, p_diff, same_top: what llama-perplexity adds up, one value at a time."""
    rows = []
    for i, (codes, scale, low) in enumerate(stored):
        chunk, at = divmod(i, SCORED)
        q = logits[chunk, at].astype(float)
        q = q - np.log(np.exp(q).sum())
        base = [scale * code + low for code in codes]
        divergence = sum(np.exp(b) * (b - x) for b, x in zip(base, q, strict=True) if b > -16)
        target = tokens[chunk, CTX // 2 + at + 1]
        top = max(range(V), key=base.__getitem__) == max(range(V), key=q.__getitem__)
        rows.append((divergence, -q[target], -base[target], np.exp(q[target]) - np.exp(base[target]), top))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.fixture
def setup(tmp_path):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, (CHUNKS, CTX)).astype(np.int32)
    a = rng.normal(0, 4, (V, V)).astype(np.float32)
    a[:, 3] -= 25  # below the clip
    b = a + rng.normal(0, 0.5, (V, V)).astype(np.float32)
    places = tokens[:, CTX // 2 : -1]
    return tokens, a, b, by_hand(tmp_path / "base.logits", tokens, a[places]), b[places]


def test_scores_equal_the_twin(setup, tmp_path):
    tokens, _, b, stored, logits = setup
    reference = logits_file.read(tmp_path / "base.logits")
    np.testing.assert_array_equal(reference.tokens, tokens)
    scores = kld.measure(Bigram(torch.from_numpy(b)), reference, desc="")
    ours = (scores.kld, scores.nll, scores.nll_base, scores.p_diff, scores.same_top)
    for column, expected in zip(ours, twin(tokens, stored, logits), strict=True):
        np.testing.assert_allclose(column, expected, rtol=2e-6, atol=2e-6)
    assert (scores.nll_base > 16).any()  # a clipped token was among the targets


def test_written_file_equals_the_one_made_by_hand(setup, tmp_path):
    tokens, a, *_ = setup
    log_probs = kld.log_probabilities(Bigram(torch.from_numpy(a)), tokens, CTX // 2, desc="")
    logits_file.write(tmp_path / "ours.logits", tokens, V, log_probs)
    ours, hand = (logits_file.read(tmp_path / name) for name in ("ours.logits", "base.logits"))
    assert (tmp_path / "ours.logits").stat().st_size == (tmp_path / "base.logits").stat().st_size
    assert np.abs(ours.rows[..., 4:].astype(int) - hand.rows[..., 4:]).max() <= 1
    for chunk in range(CHUNKS):
        torch.testing.assert_close(ours.coded(chunk).log_probs(), hand.coded(chunk).log_probs(), atol=3e-4, rtol=0)


def test_equal_logits_are_one_code(tmp_path):
    logits_file.write(tmp_path / "flat", np.zeros((1, 4), np.int32), 2, [torch.full((1, 2), -np.log(2.0))])
    assert logits_file.read(tmp_path / "flat").coded(0).log_probs().tolist() == [[pytest.approx(-np.log(2))] * 2]


def test_bos_takes_the_place_of_first_tokens(setup, tmp_path):
    reference = logits_file.read(tmp_path / "base.logits")
    assert (reference.starting_with(5).tokens[:, 0] == 5).all()
    np.testing.assert_array_equal(reference.starting_with(None).tokens, setup[0])


def test_a_bad_file_is_one_line(setup, tmp_path):
    tokens, a, *_ = setup
    path = tmp_path / "bad"
    with pytest.raises(DynqError, match="cannot be read: No such file"):
        logits_file.read(path)
    path.write_bytes(b"GGUF" * 9)
    with pytest.raises(DynqError, match="not a logits file"):
        logits_file.read(path)
    path.write_bytes(b"_logits_" + struct.pack("<Ii", 512, 7))
    with pytest.raises(DynqError, match="damaged"):
        logits_file.read(path)
    by_hand(path, tokens, a[tokens[:, CTX // 2 : -1]], truncate=2)
    with pytest.raises(DynqError, match="truncated"):
        logits_file.read(path)
    by_hand(path, tokens + V, a[tokens[:, CTX // 2 : -1]])
    with pytest.raises(DynqError, match="outside of the vocabulary"):
        logits_file.read(path)
