"""Encode, allocate and export give the same bytes on any machine: their hashes are written down here.

A change of an encoder, of the allocator or of the file's header changes them, and says so in CHANGELOG.md. The new ones
are printed by ``python tests/test_bytes.py``. That no kind of processor does is tried by hand (LOG.md, "Nothing lost").
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dynq import codec, export, formats
from dynq.allocate import allocate
from dynq.checkpoint import open_checkpoint
from dynq.recipe import Recipe

CODES = {
    "F32": "20b9a916b3d1432b", "F16": "a236bf79ab563404", "BF16": "513d625264b4d1b2",
    "Q4_0": "23dc798181c5730c", "Q4_1": "4a952be2f611268f", "Q5_0": "5a606a2cb6cec77b",
    "Q5_1": "696aab4456937804", "Q8_0": "397f621b77749e42", "Q2_K": "82ddfc8935d2c20d",
    "Q3_K": "7fe3c42f85be0c91", "Q4_K": "9db9c4d495456185", "Q5_K": "6b5de15d59c7b61e",
    "Q6_K": "340573d5b3bb606a", "IQ1_S": "5e7a25d34c548242", "IQ1_M": "835140090264f7a1",
    "IQ2_XXS": "cc7c1077f6358fc3", "IQ2_XS": "b466735fb0fa6875", "IQ2_S": "5988ee4906e6e61b",
    "IQ3_XXS": "1f3dd5b661ab5bd7", "IQ3_S": "73007fcc56925a7b", "IQ4_NL": "afb9072ea7790ab1",
    "IQ4_XS": "db90379b3e0e38a4", "TQ1_0": "8ffda712322a8dce", "TQ2_0": "0f3228d10cc93113",
    "MXFP4": "6aacd08f00c2a121", "NVFP4": "2df66c4754a7c442", "Q1_0": "1975479e3270053a",
}  # fmt: skip
RECIPE = "a14ca857658738be"
GGUF = "213d7c76af892b74"
CHOICES = ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    """int64 of 0 to 65535. PCG64's own words are the same for every version of NumPy, its distributions are not."""
    return (np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(48)).astype(np.int64).reshape(shape)


def weights(rows: int, n: int) -> np.ndarray:
    """float32, like a bell (sums of four), rows of several sizes, outliers: whole numbers times a power of two."""
    bell = whole_numbers(0, 4, rows, n).sum(0) - 2 * 65535
    bell[:, 7::97] *= 8
    return (bell * (1 + np.arange(rows))[:, None]).astype(np.float32) * np.float32(2**-22)


def encoded(name: str) -> str:
    """The hash of a tensor's bytes on every level, with importance and, where a format can do without, without it."""
    found = hashlib.sha256()
    importance = (1 + whole_numbers(1, 512) ** 2 >> 12).astype(np.float32)
    for level in codec.LEVELS:
        for columns in (importance,) if formats.get(name).needs_importance else (importance, None):
            found.update(codec.quantize(weights(6, 512), name, columns, level=level))
    return found.hexdigest()[:16]


def allocated() -> Recipe:
    """dynq-tiny at 3.4 bpw by losses that fall with the format's bits, times whole numbers."""
    tensors = open_checkpoint("dynq-tiny").tensors
    names = [name for name, info in tensors.items() if info.quantizable]
    loss = (1 + whole_numbers(2, len(names), len(CHOICES))) / (1e9 * 4 ** np.arange(len(CHOICES)))
    rows = [(name, fmt, float(loss[i, j])) for i, name in enumerate(names) for j, fmt in enumerate(CHOICES)]
    columns = zip(("tensor", "format", "predicted_kld"), map(list, zip(*rows, strict=True)), strict=True)
    return allocate(pa.table(dict(columns)), tensors, "3.4bpw", metadata={})


def exported(path: Path) -> str:
    """The hash of dynq-tiny's file by that recipe, of no version of dynq."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "__version__", "")
        found: str = export.export(open_checkpoint("dynq-tiny"), allocated(), None, path)["sha256"]
    return found[:16]


def sha(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.to_json().encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", CODES)
def test_codes(name: str) -> None:
    assert encoded(name) == CODES[name]


def test_a_recipe() -> None:
    assert sha(allocated()) == RECIPE


def test_a_file(tmp_path: Path) -> None:
    assert exported(tmp_path / "m.gguf") == GGUF


if __name__ == "__main__":
    print({name: encoded(name) for name in formats.FORMATS})
    print(f"RECIPE = {sha(allocated())!r}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"GGUF = {exported(Path(folder) / 'm.gguf')!r}")
