"""Twin of dynq.kernels.iq4: IQ4_NL and IQ4_XS. Layout and method are described there."""

import numpy as np
from gguf.quants import IQ4_NL

from dynq.kernels.iq4 import ENDS, ROUNDS, TRIES
from dynq.reference.scalar import _bytes, _float, _seen, _stored, _sum, _unit

F = np.float32
LEVELS = np.array(IQ4_NL.kvalues, F)
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / F(2)


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, 32 or 256] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    w = np.ones(x.shape, F) if w is None else w
    unit = _unit(x)
    x, w = ((a.reshape(len(a), -1, 32)) for a in (x * unit[:, None], w))
    scale, curvature = search_levels(x, w, TRIES[level])
    if name == "IQ4_NL":
        scale = fit_blocks(x, w, scale, unit)
        head = [_bytes(_stored(scale[:, 0] / unit))]
    else:
        d, integers = fit_super_blocks(x, w, scale, curvature, unit, ENDS[level])
        scale = d[:, None] * integers
        s = (integers + F(32)).astype(np.uint16)
        upper = np.bitwise_or.reduce((s >> 4) << 2 * np.arange(8, dtype=np.uint16), axis=1)
        head = [_bytes(_stored(d / unit)), _bytes(upper), (s[:, ::2] & 15 | (s[:, 1::2] & 15) << 4).astype(np.uint8)]
    codes = _codes(x, _over(F(1), scale))
    pairs = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([*head, pairs.reshape(len(x), -1)], axis=1)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, block]."""
    scale = _float(blocks, 0)
    if name == "IQ4_XS":
        lower = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
        upper = np.stack([blocks[:, 2:4] >> 2 * k & 3 for k in range(4)], axis=2).reshape(-1, 8)
        scale = scale * ((lower | upper << 4).astype(F) - F(32))
    pairs = blocks[:, 2 if name == "IQ4_NL" else 8 :].reshape(len(blocks), -1, 16)
    levels = LEVELS[np.concatenate([pairs & 15, pairs >> 4], axis=2)]
    return (scale[:, :, None] * levels).reshape(len(blocks), -1)


def _codes(x: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Codes of the levels nearest to x * inverse, uint8 like x [..., 32]; inverse [...]. A tie takes the lower."""
    return (x[..., None] * inverse[..., None, None] > MIDDLES).sum(axis=-1).astype(np.uint8)


def _over(value: np.ndarray | F, by: np.ndarray) -> np.ndarray:
    return np.where(by != 0, value / by, F(0))


def search_levels(x: np.ndarray, w: np.ndarray, tries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale of each group [..., 32] and the curvature of its error: tries, then one from the best scale."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], -1)[..., 0]
    scale, best, curvature = np.zeros_like(largest), np.zeros_like(largest), np.zeros_like(largest)
    for t in range(len(tries) + 1):
        q = LEVELS[_codes(x, _over(tries[t], largest) if t < len(tries) else _over(F(1), scale))]
        sll, sxl = _sum(w * q * q), _sum(w * q * x)
        s = sxl / sll
        better = s * sxl > best
        best = np.where(better, s * sxl, best)
        scale, curvature = np.where(better, s, scale), np.where(better, sll, curvature)
    return scale, curvature


def _measure(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The error of each group with the stored scales, and the sums that least squares needs."""
    q = LEVELS[_codes(x, _over(F(1), scale))]
    miss = x - scale[..., None] * q
    return _sum(w * miss * miss), _sum(w * q * q), _sum(w * q * x)


def fit_blocks(x: np.ndarray, w: np.ndarray, scale: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The stored scale of each block [blocks, 1, 32]: the best of three, each solved for the codes of the last."""
    best, kept = np.full(scale.shape, np.inf, F), scale
    for _ in range(ROUNDS + 1):
        scale = _seen(scale, unit[:, None])
        error, sll, sxl = _measure(x, w, scale)
        kept = np.where(error < best, scale, kept)
        best = np.minimum(error, best)
        scale = sxl / sll
    return kept


def fit_super_blocks(
    x: np.ndarray, w: np.ndarray, first: np.ndarray, curvature: np.ndarray, unit: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The stored floats d [blocks] and integers [blocks, 8] of super-blocks [blocks, 8, 32]."""
    best, kept_d, kept = np.full(len(x), np.inf, F), np.zeros(len(x), F), np.zeros_like(first)
    for ends in starts:
        d, scale = share_scale(first, curvature, unit, ends), first
        for _ in range(ROUNDS + 1):
            integers = _integers(scale, d)
            error, sll, sxl = _measure(x, w, d[:, None] * integers)
            error = _sum(error)
            better = error < best
            best, kept_d = np.where(better, error, best), np.where(better, d, kept_d)
            kept = np.where(better[:, None], integers, kept)
            ss, vs = _sum(integers * integers * sll), _sum(integers * sxl)
            d = np.where(ss > 0, _seen(vs / ss, unit), d)
            scale = sxl / sll
    return kept_d, kept


def _integers(scale: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(_over(scale, d[:, None])), F(-32), F(31))


def share_scale(scale: np.ndarray, curvature: np.ndarray, unit: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The float of each super-block for the scales [blocks, 8] of its sub-blocks."""
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], 1)[:, 0]
    d, best = np.zeros_like(largest), np.zeros_like(largest)
    for end in ends:
        integers = _integers(scale, largest / end)
        ss, vs = _sum(curvature * integers * integers), _sum(curvature * integers * scale)
        better = (ss > 0) & (vs / ss * vs > best)
        d = np.where(better, vs / ss, d)
        best = np.where(better, d * vs, best)
    return _seen(d, unit)
