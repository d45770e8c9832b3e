"""The kernels' sources as a card gets them, one lane a thread: compiled for the processor, they give the same bytes.

The fixture stands in for numba.cuda, of which a card's kernels use a few names. What it leaves open is the card's own
compiler, and that the last test looks at where there is a card.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from numba import njit

from dynq import codec, formats
from dynq.errors import DynqError
from dynq.kernels import FAMILIES, ON_CARD, feedback_card, on_card, scales
from dynq.kernels import feedback as kernels
from dynq.kernels import feedback_books as books

F = np.float32
NAMES = [name for name in formats.FORMATS if FAMILIES.get(name) in ON_CARD and name != "Q8_0"]
# one for each way that a kernel is compiled
DIFFERENT = ("Q4_0", "Q4_1", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_S")
CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")


def test_without_numba_cuda_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    with pytest.raises(DynqError, match="need numba-cuda"):
        codec.quantize(np.ones((1, 32), F), "Q4_0", np.ones(32), device="cuda")


class Launch:
    """A launched kernel, one thread after the other."""

    def __init__(self, function, position):
        self.function, self.position = function, position

    def __getitem__(self, shape):
        groups, threads = shape

        def launch(*arguments):
            assert groups * threads >= arguments[-1]
            for self.position.thread in range(groups * threads):
                self.function(*arguments)

        return launch


class Result(np.ndarray):
    def copy_to_host(self, out):
        out[:] = self


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    cuda, local, libdevice = ModuleType("cuda"), ModuleType("local"), ModuleType("libdevice")
    position = SimpleNamespace(thread=0)
    local.array, libdevice.rintf, libdevice.floorf, libdevice.fsqrt_rn = np.empty, np.rint, np.floor, np.sqrt
    cuda.local, cuda.libdevice, cuda.grid = local, libdevice, lambda _: position.thread

    def jit(function, device=False, lto=True):
        assert not lto
        return njit(error_model="numpy")(function) if device else Launch(function, position)

    cuda.jit, cuda.to_device, cuda.device_array_like = jit, np.copy, lambda x: np.full_like(x, 77).view(Result)
    caches = on_card.device_function, on_card._fit, feedback_card._launched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_card, "_cuda", lambda: cuda)
        patch.setattr(on_card, "_uncontracted", nullcontext)
        patch.setattr(on_card, "_TABLES", {})
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()


def awkward(n: int) -> np.ndarray:
    """Rows of ordinary weights, zeros, one outlier, equal weights, denormals: float32 [7, n]."""
    weights = (np.random.default_rng(n).standard_t(4, (7, n)) * 0.05).astype(F)
    weights[1], weights[3], weights[4], weights[2, 5], weights[5, : n // 2] = 0, 0.3, 1e-41, 1e30, 0
    return weights


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_thread_for_each_block_gives_the_same_bytes(name: str, stand_in: None):
    form = formats.get(name)
    weights = awkward(2 * form.block).reshape(-1, form.block)
    importance = np.random.default_rng(1).lognormal(0, 1.5, (2, form.block)).astype(F)
    ours, theirs = np.zeros((2, len(weights), form.block_bytes), np.uint8)
    with np.errstate(over="ignore"):
        FAMILIES[name].encode(name, weights, importance, "search", ours, on_card.run)
        FAMILIES[name].encode(name, weights, importance, "search", theirs)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["Q3_K", "IQ4_NL", "IQ1_M", "IQ3_S"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_thread_for_each_row_chooses_the_same(name: str, keep: bool, stand_in: None):
    form, rng, rows = scales.grid(name), np.random.default_rng(3), 9
    assert form is not None
    w, P = (rng.standard_normal((form.group, rows)).astype(F) for _ in range(2))
    R = np.triu(rng.standard_normal((form.group, form.group)) * 0.3).astype(F)
    np.fill_diagonal(R, rng.uniform(0.1, 2, form.group))
    step = (rng.uniform(0.5, 2, (3, rows)) / np.abs(form.levels).max()).astype(F)
    step[1, 2] = 0
    found = []
    for on in (True, False):
        E, codes, best = w * F(0.3), np.zeros(w.shape, np.uint8), np.full(rows, 99)
        if form.book is None:
            kernel, table, known = kernels.choose, (form.levels,), {}
        else:
            book = form.book
            kernel, known = books.choose, {"dim": book.dim}
            table = book.dim, book.values, book.candidates, book.signs, book.apart
        given = w, P, R, step, step * F(0.1), *table, keep, E, codes, best
        if on:
            known |= {"LANES": 1, "g": form.group}
            feedback_card._launched(kernel, tuple(sorted(known.items())))(rows, *given)
        else:
            kernel(*given)
        found.append((E.view(np.uint32), codes, best))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@CARD
@pytest.mark.parametrize("level", codec.LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_the_card_gives_the_same_bytes(name: str, level: str):
    n = 2 * formats.get(name).block
    weights, importance = awkward(n), np.random.default_rng(1).lognormal(0, 1.5, n)
    ours, theirs = (codec.quantize(weights, name, importance, level=level, device=d) for d in ("cuda", "cpu"))
    np.testing.assert_array_equal(ours, theirs)
