"""dynq: the best GGUF file of a language model for a given size.

Nothing heavy is imported here: ``dynq.quantize`` and its kin load their module on first use.
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Intel's MKL, which multiplies for torch on x86, then sums in an order that does not depend on the number of threads.
# That costs no time (LOG, "Nothing lost"). MKL looks when it first multiplies, so it is said here.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Threads of GNU's OpenMP, torch's on Linux, spin 300,000 times before they sleep, which a machine with other work pays
# for many times over; asleep at once they cost an idle one a quarter (LOG, "Tuning"). Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# public name -> the module that holds it
_HOME = {
    "quantize": "dynq.codec",
    "dequantize": "dynq.codec",
    "weighted_error": "dynq.codec",
    "open_checkpoint": "dynq.checkpoint",
    "Recipe": "dynq.recipe",
    "DynqError": "dynq.errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
