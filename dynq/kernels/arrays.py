"""Arrays of NumPy or of torch: what the two name alike is written once, for the processor and for a graphics card.

``xp = namespace(x)``, then ``xp.where``, ``xp.clip`` and so on. New tensors lie on the device of `torch.device`'s
context.
"""

import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor


def namespace(x: Array) -> ModuleType:
    """numpy or torch, by what x is."""
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules["torch"]


def dense(x: Array) -> Array:
    """x in C order, the same array where it is."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def single(x: Array) -> Array:
    """x in float32."""
    return namespace(x).asarray(x, dtype=namespace(x).float32)


def host(x: Array) -> np.ndarray:
    """x in NumPy."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()
