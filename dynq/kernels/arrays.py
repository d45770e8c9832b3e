"""Arrays of NumPy or of torch: what the two name alike is written once, for the processor and for a graphics card.

``xp = namespace(x)``, then ``xp.where``, ``xp.clip`` and so on; the rest is here.
"""

import sys
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor


def namespace(x: Array) -> ModuleType:
    """numpy or torch, by what x is."""
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules["torch"]


def placed(x: np.ndarray, device: str) -> Array:
    """x on a card, or as it is where the device is `cpu`."""
    if device == "cpu":
        return x
    import torch

    return torch.from_numpy(x).to(device)


def beside(x: np.ndarray, other: Array) -> Array:
    """x as the other one is: of NumPy, or of torch on its device."""
    return x if isinstance(other, np.ndarray) else namespace(other).from_numpy(x).to(other.device)


def host(x: Array) -> np.ndarray:
    """x in NumPy."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def dense(x: Array) -> Array:
    """x in C order, the same array where it is."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def single(x: Array) -> Array:
    """x in float32."""
    return namespace(x).asarray(x, dtype=namespace(x).float32)


def double(x: Array) -> Array:
    """x in float64."""
    return namespace(x).asarray(x, dtype=namespace(x).float64)


def pick(x: Array, at: Array) -> Array:
    """x[at[j], j] for every j."""
    return np.take_along_axis(x, at[None], 0)[0] if isinstance(x, np.ndarray) else x.gather(0, at[None])[0]
