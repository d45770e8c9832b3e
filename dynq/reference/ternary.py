"""Twin of dynq.kernels.ternary: TQ1_0, TQ2_0, Q1_0 and Q2_0. Layout and method are described there."""

import numpy as np

from dynq.kernels.ternary import FULL, Q2_0, SENT, STEPS
from dynq.reference.scalar import _bytes, _float, _join, _round, _split, _stored, _sum, _unit, fit_block

F = np.float32
# first weight, first byte, bytes, trits a byte
TRITS = ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4))


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, block] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    w = np.ones(x.shape, F) if w is None else w
    if name == "Q2_0":
        codes, d = iterate_q2_0(x, w) if level == "plain" else fit_block(x, w, Q2_0)[:2]
        return np.concatenate([_bytes(d), _join(codes, 16, 2, 1)], axis=1)
    unit = _unit(x)
    a = np.abs(x * unit[:, None])
    if name == "Q1_0":
        d = _stored(_sum(w * a) / _sum(w) / unit)
        return np.concatenate([_bytes(d), np.packbits(x >= 0, axis=1, bitorder="little")], axis=1)
    d = _stored((iterate_scale if level == "plain" else best_scale)(a, w) / unit)
    high = d.astype(F)[:, None] * F(0.5)
    codes = (x > high).astype(np.uint8) + (x >= -high)
    data = [_join(codes, 2, 2, 32)] if name == "TQ2_0" else [_join_trits(codes, *stretch) for stretch in TRITS]
    return np.concatenate([*data, _bytes(d)], axis=1)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, block]."""
    if name == "Q1_0":
        d = _float(blocks, 0)
        return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d)
    if name == "Q2_0":
        return _float(blocks, 0) * (_split(blocks[:, 2:], 16, 2, 1).astype(F) - F(1))
    if name == "TQ2_0":
        codes = _split(np.ascontiguousarray(blocks[:, :64]), 2, 2, 32)
    else:
        codes = np.concatenate([_split_trits(blocks, *stretch) for stretch in TRITS], axis=1)
    return _float(blocks, blocks.shape[1] - 2) * (codes.astype(F) - F(1))


def _products(a: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Importance, and importance x |w|, as integers."""
    v = np.rint(w * (FULL / w.max(axis=1, keepdims=True))).astype(np.int32)
    return np.rint(v.astype(F) * a * F(0.5)).astype(np.int32), v


def iterate_scale(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The scale for |x| [blocks, 256], by least squares from 1.5 times the mean, or by one step from the largest."""
    p, v = _products(a, w)
    best, kept = np.zeros(len(a), F), np.zeros(len(a), F)
    scale = F(3) * p.sum(axis=1).astype(F) / v.sum(axis=1).astype(F)
    for step in range(STEPS + 1):
        if step == STEPS:
            scale = a.max(axis=1)
        beyond = a > scale[:, None] * F(0.5)
        above, below = ((n * beyond).sum(axis=1).astype(F) for n in (p, v))
        scale = F(2) * above / below
        better = scale * above > best
        best, kept = np.where(better, scale * above, best), np.where(better, scale, kept)
    return kept


def best_scale(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The best scale for |x| [blocks, 256]: of all sets of largest weights the one that least squares likes most."""
    p, v = _products(a, w)
    order = np.lexsort((-v, -a), axis=1)
    above, below = (np.take_along_axis(n, order, 1).cumsum(axis=1).astype(F) for n in (p, v))
    best = (above * (above / below)).argmax(axis=1)[:, None]
    above, below = (np.take_along_axis(n, best, 1)[:, 0] for n in (above, below))
    return F(2) * above / below


def iterate_q2_0(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes from 0 and half floats d of blocks [blocks, 64]: least squares from each place of SENT."""
    unit = _unit(x)
    y = x * unit[:, None]
    p, v = _products(y, w)
    best, kept = np.zeros(len(x), F), np.ones(len(x), F)
    for step in range(len(SENT) + 1):
        inverse = SENT[step] / np.abs(y).max(axis=1) if step < len(SENT) else F(1) / kept
        q = np.clip(np.rint(y * inverse[:, None]), F(-1), F(2)).astype(np.int32)
        above, below = (n.sum(axis=1).astype(F) for n in (p * q, v * q * q))
        scale = F(2) * above / below
        better = scale * above > best
        best, kept = np.where(better, scale * above, best), np.where(better, scale, kept)
    d = _stored(np.where(best > 0, kept / unit, F(0)))
    return (_round(x, d.astype(F)[:, None], 0, -1, 2) + F(1)).astype(np.uint8), d


def _join_trits(codes: np.ndarray, first: int, _: int, width: int, trits: int) -> np.ndarray:
    """Weights from `first` on to bytes: width of them, `trits` in each, the first one most significant."""
    digits = codes[:, first : first + width * trits].reshape(len(codes), trits, width).astype(np.uint32)
    number = (digits * 3 ** np.arange(4, 4 - trits, -1, dtype=np.uint32)[:, None]).sum(axis=1)
    return ((number * 256 + 242) // 243).astype(np.uint8)


def _split_trits(blocks: np.ndarray, _: int, at: int, width: int, trits: int) -> np.ndarray:
    """The inverse of _join_trits: bytes from `at` on to [blocks, width * trits] codes."""
    powers = 3 ** np.arange(trits, dtype=np.uint32)[:, None]
    rest = blocks[:, None, at : at + width] * powers & 255
    return (rest * 3 >> 8).reshape(len(blocks), -1)
