import subprocess
import sys

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dynq import formats
from dynq.errors import DynqError


def test_sizes_are_those_of_gguf():
    for name, fmt in formats.FORMATS.items():
        kind = GGMLQuantizationType[name]
        assert (fmt.id, fmt.block, fmt.block_bytes) == (int(kind), *GGML_QUANT_SIZES[kind])


def test_bits_per_weight():
    assert formats.get("Q4_K").bpw == 4.5
    assert formats.get("Q2_K").bpw == 2.625
    assert formats.get("F16").bpw == 16


def test_bytes_of_rows_and_tensors():
    assert formats.row_bytes("Q4_K", 512) == 288
    assert formats.tensor_bytes("Q6_K", (3, 5, 256)) == 15 * 210
    assert formats.tensor_bytes("F32", (7,)) == 28


def test_errors_name_what_is_wrong():
    with pytest.raises(DynqError, match=r"Q9_X.*Q4_K"):
        formats.get("Q9_X")
    with pytest.raises(DynqError, match=r"300.*256.*F16"):
        formats.row_bytes("Q4_K", 300)


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"),
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("IQ1_M", 96, "IQ4_NL"),
        ("IQ2_XXS", 96, "IQ4_NL"),
        ("IQ3_S", 96, "IQ4_NL"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("TQ2_0", 96, "Q4_0"),
        ("IQ4_XS", 40, "F16"),
        ("IQ4_NL", 40, "F16"),
        ("MXFP4", 40, "F16"),
        ("Q6_K", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("F32", 7, "F32"),
    ],
)
def test_fallbacks_are_llama_cpps(name: str, n: int, expected: str):
    assert formats.usable(name, n) == expected


def test_the_table_imports_nothing_heavy():
    code = "import sys, dynq.formats; print([m for m in ('numba', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
