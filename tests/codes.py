"""The codes of encoded blocks, for comparing two encodings: what is left when scales are taken away."""

import numpy as np

from dynq import codec, formats
from dynq.kernels import scales
from dynq.reference import feedback as twin


def codes(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, groups, weights of a group], indices of the format's levels, of data uint8 [rows, row_bytes]."""
    form = scales.grid(name)
    assert form is not None
    blocks = data.reshape(-1, formats.get(name).block_bytes)
    d, dmin, ls, lm = scales.read(name, blocks)
    step, offset = (d * ls).T[..., None], -(dmin * lm).T[..., None]
    decoded = codec.dequantize(blocks, name).reshape(len(blocks), -1, form.group)
    with np.errstate(all="ignore"):
        return twin.nearest(np.where(step != 0, (decoded - offset) / step, 0), form.levels)
