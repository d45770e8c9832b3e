"""Twins of dynq.kernels.legacy and dynq.kernels.kquants: Q4_0 to Q8_0, Q2_K to Q6_K.

Arrays are [blocks, sub-blocks, weights]; what a kernel does for a lane is done here for all blocks at once, in float32
and in the same order, so the bytes are the same. The bit layouts are drawn in dynq.kernels.legacy and .kquants, the
method is described in dynq.kernels.fit.
"""

import numpy as np

from dynq.kernels.fit import SINGULAR
from dynq.kernels.plans import Plan, plan_of

F = np.float32


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, block] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    plan = plan_of(name, level, w is not None)
    weight = np.ones(x.shape, F) if w is None else w
    if plan.width == 256:
        data = np.concatenate(_pack_super(name, *fit_super(x, weight, plan)), axis=1)
        if level == "plain":
            return data
        plain = encode(name, x, w, "plain")
        ours, theirs = (_block_errors(x, weight, decode(name, found)) for found in (data, plain))
        return np.where((theirs < ours)[:, None], plain, data)
    rounded = name == "Q8_0" or (w is None and level == "plain")
    codes, d, m = (round_block if rounded else fit_block)(x, weight, plan)
    if name == "Q8_0":
        return np.concatenate([_bytes(d), codes ^ np.uint8(128)], axis=1)
    pairs = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    parts = [_bytes(d)] + [_bytes(m)] * plan.affine + [fifth] * (plan.high - plan.low == 31) + [pairs]
    return np.concatenate(parts, axis=1)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, block]."""
    plan = plan_of(name, "plain")
    if name == "Q8_0":
        return _float(blocks, 0) * blocks[:, 2:].view(np.int8).astype(F)
    if plan.width == 32:
        pairs = blocks[:, -16:]
        q = np.concatenate([pairs & 15, pairs >> 4], axis=1)
        if name[1] == "5":
            fifth = np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little")
            q = q | fifth << 4
        out = _float(blocks, 0) * (q.astype(F) + F(plan.low))
        return out + _float(blocks, 2) if plan.affine else out
    q, scales, mins, d, dmin = _unpack_super(name, blocks)
    out = (d * scales)[:, :, None] * (q.reshape(len(q), scales.shape[1], -1).astype(F) + F(plan.low))
    out = out - (dmin * mins)[:, :, None] if plan.affine else out
    return out.reshape(len(q), -1)


# --- the search ------------------------------------------------------------------------------------------------------


def _sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis from first to last, as the kernels do (np.sum adds in pairs)."""
    return np.cumsum(terms, axis=-1, dtype=F)[..., -1]


def _block_errors(x: np.ndarray, w: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    miss = x.astype(np.float64) - decoded
    return np.cumsum(w * miss * miss, axis=1)[:, -1]


def _stored(value: np.ndarray) -> np.ndarray:
    return np.clip(value, -65504, 65504).astype(np.float16)


def _seen(value: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """A float as the decoder will see it, in the scaled world."""
    return _stored(value / unit).astype(F) * unit


def _unit(x: np.ndarray) -> np.ndarray:
    """Per block the power of two that brings its largest weight between 1 and 2: float32 [blocks]."""
    exponent = np.minimum(np.abs(x).max(axis=1).view(np.uint32) >> np.uint32(23), np.uint32(253))
    return ((np.uint32(254) - exponent) << np.uint32(23)).view(F)


def _round(x: np.ndarray, scale: np.ndarray, offset: np.ndarray | float, low: float, high: float) -> np.ndarray:
    inverse = np.where(scale != 0, F(1) / scale, F(0))
    return np.clip(np.rint((x - offset) * inverse), F(low), F(high))


def search_affine(x: np.ndarray, w: np.ndarray, plan: Plan, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each group [..., sub]: tries, then refinements, ranked by least squares' gain."""
    lowest = x.min(axis=-1) if signed else np.minimum(x.min(axis=-1), F(0))
    spread = x.max(axis=-1) - lowest
    sw, sx = _sum(w), _sum(w * x)
    scale, offset, best = spread / F(plan.high), lowest, np.full(spread.shape, -np.inf, F)
    for t in range(len(plan.tries) + len(plan.moves)):
        if t < len(plan.tries):
            steps, at = plan.tries[t]
            start, inverse = lowest + F(at) * spread, np.where(spread > 0, F(steps) / spread, F(0))
        else:
            stretch, shift = plan.moves[t - len(plan.tries)]
            start, inverse = offset + F(shift) * scale, np.where(scale > 0, F(stretch) / scale, F(0))
        q = np.clip(np.rint((x - start[..., None]) * inverse[..., None]), F(0), F(plan.high))
        sl, sll, sxl = _sum(w * q), _sum(w * q * q), _sum(w * q * x)
        determinant = sw * sll - sl * sl
        s = (sw * sxl - sx * sl) / determinant
        m = (sll * sx - sl * sxl) / determinant
        free = (m <= 0) | signed
        s, m = np.where(free, s, sxl / sll), np.where(free, m, F(0))
        gain = s * sxl + m * sx
        better = (determinant > SINGULAR * sw * sll) & (s > 0) & (gain > best)
        best, scale, offset = np.where(better, gain, best), np.where(better, s, scale), np.where(better, m, offset)
    return scale, offset


def search_symmetric(x: np.ndarray, w: np.ndarray, plan: Plan) -> np.ndarray:
    """Scale of each group [..., sub]; the largest |x| is sent to minus each try."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], -1)[..., 0]
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    for t in range(len(plan.tries) + len(plan.moves)):
        tried = t < len(plan.tries)
        over, step = (largest, F(-plan.tries[t][0])) if tried else (scale, F(plan.moves[t - len(plan.tries)][0]))
        inverse = np.where(over != 0, step / over, F(0))
        q = np.clip(np.rint(x * inverse[..., None]), F(plan.low), F(plan.high))
        sll, sxl = _sum(w * q * q), _sum(w * q * x)
        s = sxl / sll
        better = (sll > 0) & (s * sxl > best)
        best, scale = np.where(better, s * sxl, best), np.where(better, s, scale)
    return scale


def _level_scale(v: np.ndarray, weight: np.ndarray, plan: Plan, unit: np.ndarray) -> np.ndarray:
    """The super-block's float for the scales (or minima) v [blocks, subs]."""
    end = F(plan.bottom or plan.top)
    largest = np.take_along_axis(v, np.abs(v).argmax(axis=1)[:, None], 1)
    scale, best = np.zeros_like(largest[:, 0]), np.zeros_like(largest[:, 0])
    for delta in plan.deltas:
        q = np.clip(np.rint(v * ((end + F(delta)) / largest)), F(plan.bottom), F(plan.top))
        vq, qq = _sum(weight * q * v), _sum(weight * q * q)
        better = (qq > 0) & (vq / qq * vq > best)
        scale = np.where(better, vq / qq, scale)
        best = np.where(better, scale * vq, best)
    return _seen(scale, unit)


def _levels(v: np.ndarray, d: np.ndarray, plan: Plan) -> np.ndarray:
    q = np.where(d[:, None] != 0, np.rint(v / d[:, None]), F(0))
    return np.clip(q, F(plan.bottom), F(plan.top))


def fit_super(x: np.ndarray, w: np.ndarray, plan: Plan) -> tuple[np.ndarray, ...]:
    """Codes from 0 [blocks, 256], scales and minima [blocks, subs], half floats d and dmin [blocks]: K formats."""
    shape = (len(x), 256 // plan.sub, plan.sub)
    unit = _unit(x)
    x, w = (x * unit[:, None]).reshape(shape), w.reshape(shape)
    sw, sx = _sum(w), _sum(w * x)
    if plan.affine:
        scale, offset = search_affine(x, w, plan, signed=False)
    else:
        scale, offset = search_symmetric(x, w, plan), np.zeros(shape[:2], F)
    d, dm = _level_scale(scale, sw, plan, unit), _level_scale(-offset, sw, plan, unit)
    ls, lm = _levels(scale, d, plan), _levels(-offset, dm, plan)
    kept = [d, dm, ls, lm]
    best = np.full(len(x), np.inf, F)
    for r in range(plan.rounds + 1):
        scale, offset = d[:, None] * ls, -(dm[:, None] * lm)
        shifted = x - offset[..., None]
        q = _round(shifted, scale[..., None], 0, plan.low, plan.high)
        miss = shifted - q * scale[..., None]
        error = _sum(_sum(w * miss * miss))
        better = error < best
        best = np.where(better, error, best)
        kept = [
            np.where(better if a.ndim == 1 else better[:, None], a, k)
            for a, k in zip((d, dm, ls, lm), kept, strict=True)
        ]
        if r == plan.rounds:
            break
        sl, sll, sxl = _sum(w * q), _sum(w * q * q), _sum(w * q * x)
        if plan.affine:
            d, dm, ls, lm = _descend_affine(plan, sw, sx, sl, sll, sxl, scale, ls, lm, unit, d, dm)
        else:
            wish = np.clip(np.rint(sxl / sll / d[:, None]), F(plan.bottom), F(plan.top))
            ls = np.where((sll > 0) & (d[:, None] != 0), wish, ls)
            aa, ax = _sum(ls * ls * sll), _sum(ls * sxl)
            d = np.where(aa > 0, _seen(ax / aa, unit), d)
    d, dm, ls, lm = kept
    scale, offset = d[:, None] * ls, -(dm[:, None] * lm)
    codes = _round(x, scale[..., None], offset[..., None], plan.low, plan.high) - F(plan.low)
    return codes.reshape(len(x), 256).astype(np.uint8), ls, lm, _stored(d / unit), _stored(dm / unit)


def _descend_affine(
    plan: Plan,
    sw: np.ndarray,
    sx: np.ndarray,
    sl: np.ndarray,
    sll: np.ndarray,
    sxl: np.ndarray,
    scale: np.ndarray,
    ls: np.ndarray,
    lm: np.ndarray,
    unit: np.ndarray,
    d: np.ndarray,
    dm: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes fixed: per sub-block the best stored (scale, min), then the best two floats of the super-block."""
    D, DM, top = d[:, None], dm[:, None], F(plan.top)
    determinant = sw * sll - sl * sl
    wish = np.where(determinant > SINGULAR * sw * sll, (sw * sxl - sx * sl) / determinant, scale)
    middle = np.where(D > 0, np.rint(wish / D), F(0))
    least = np.full(ls.shape, np.inf, F)
    for step in (-1, 0, 1):
        level = np.clip(middle + F(step), F(0), top)
        s = D * level
        low = np.clip(np.where(DM > 0, np.rint((s * sl - sx) / sw / DM), F(0)), F(0), top)
        m = -(DM * low)
        error = s * (s * sll + F(2) * (m * sl - sxl)) + m * (m * sw - F(2) * sx)
        better = error < least
        least, ls, lm = np.where(better, error, least), np.where(better, level, ls), np.where(better, low, lm)
    aa, ab, bb = _sum(ls * ls * sll), _sum(ls * lm * sl), _sum(lm * lm * sw)
    ax, bx = _sum(ls * sxl), _sum(lm * sx)
    determinant = aa * bb - ab * ab
    s, m = (bb * ax - ab * bx) / determinant, (ab * ax - aa * bx) / determinant
    regular = determinant > SINGULAR * aa * bb
    both = regular & (s > 0) & (m > 0)
    alone = ~regular & (aa > 0) & (bb == 0) & (ax > 0)
    d = np.where(both, _seen(s, unit), np.where(alone, _seen(ax / aa, unit), d))
    return d, np.where(both, _seen(m, unit), dm), ls, lm


def fit_block(x: np.ndarray, w: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes from 0 and half floats d, m of blocks of 32, searched: Q4_0, Q4_1, Q5_0, Q5_1 with importance."""
    unit = _unit(x)
    x = x * unit[:, None]
    sw, sx = _sum(w), _sum(w * x)
    if plan.affine:
        scale, offset = search_affine(x, w, plan, signed=True)
    else:
        scale, offset = search_symmetric(x, w, plan), np.zeros(len(x), F)
    best, kept = np.full(len(x), np.inf, F), (scale, offset)
    for _ in range(plan.rounds + 1):
        scale, offset = _seen(scale, unit), _seen(offset, unit)
        shifted = x - offset[:, None]
        q = _round(shifted, scale[:, None], 0, plan.low, plan.high)
        miss = shifted - q * scale[:, None]
        error = _sum(w * miss * miss)
        better = error < best
        best = np.where(better, error, best)
        kept = np.where(better, scale, kept[0]), np.where(better, offset, kept[1])
        sl, sll, sxl = _sum(w * q), _sum(w * q * q), _sum(w * q * x)
        if plan.affine:
            determinant = sw * sll - sl * sl
            regular = determinant > SINGULAR * sw * sll
            scale = np.where(regular, (sw * sxl - sx * sl) / determinant, scale)
            offset = np.where(regular, (sll * sx - sl * sxl) / determinant, offset)
        else:
            scale = np.where(sll > 0, sxl / sll, scale)
    scale, offset = kept
    codes = _round(x, scale[:, None], offset[:, None], plan.low, plan.high) - F(plan.low)
    return codes.astype(np.uint8), _stored(scale / unit), _stored(offset / unit)


def round_block(x: np.ndarray, w: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As fit_block, without a search: the range, or the largest, decides the scale. `w` is not looked at."""
    if plan.affine:
        lowest, highest = x.min(axis=1), x.max(axis=1)
        d, m = _stored(highest / F(plan.high) - lowest / F(plan.high)), _stored(lowest)
    else:
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], 1)[:, 0]
        to_high = plan.high == 127  # Q8_0: both signs fit
        d = _stored(np.abs(largest) / F(plan.high) if to_high else largest / F(plan.low))
        m = np.zeros(len(x), np.float16)
    codes = _round(x, d.astype(F)[:, None], m.astype(F)[:, None], plan.low, plan.high) - F(plan.low)
    return codes.astype(np.uint8), d, m


# --- the layout of super-blocks --------------------------------------------------------------------------------------


def _bytes(halves: np.ndarray) -> np.ndarray:
    return halves.reshape(-1, 1).view(np.uint8)


def _float(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(F)


def _join(codes: np.ndarray, runs: int, bits: int, run: int) -> np.ndarray:
    """[blocks, 256] to bytes: in each of `runs` stretches byte k holds codes k, k + run, ..., lowest first."""
    parts = codes.reshape(len(codes), runs, -1, run)
    shifts = (bits * np.arange(parts.shape[2], dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), -1)


def _split(data: np.ndarray, runs: int, bits: int, run: int) -> np.ndarray:
    """The inverse of _join: bytes to [blocks, 256] codes of `bits` bits."""
    parts = data.reshape(len(data), runs, 1, run)
    shifts = (np.arange(0, 8, bits, dtype=np.uint8))[:, None]
    return (parts >> shifts & np.uint8((1 << bits) - 1)).reshape(len(data), -1)


def _pack_super(
    name: str, codes: np.ndarray, ls: np.ndarray, lm: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> list[np.ndarray]:
    floats = [_bytes(d), _bytes(dmin)]
    if name == "Q2_K":
        return [ls.astype(np.uint8) | lm.astype(np.uint8) << 4, _join(codes, 2, 2, 32), *floats]
    if name == "Q6_K":
        low, high = _join(codes & 15, 2, 4, 64), _join(codes >> 4, 2, 2, 32)
        return [low, high, ls.astype(np.int8).view(np.uint8), floats[0]]
    if name == "Q3_K":
        s = (ls + 32).astype(np.uint8)
        scales = [s[:, :8] & 15 | (s[:, 8:] & 15) << 4]
        scales.append(np.bitwise_or.reduce([(s[:, 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4)]))
        return [_join(codes >> 2, 1, 1, 32), _join(codes & 3, 2, 2, 32), *scales, floats[0]]
    s, m = ls.astype(np.uint8), lm.astype(np.uint8)
    (a, b), (e, f) = (s[:, :4], s[:, 4:]), (m[:, :4], m[:, 4:])
    scales = [a | (b >> 4) << 6, e | (f >> 4) << 6, b & 15 | (f & 15) << 4]
    fifth = [_join(codes >> 4, 1, 1, 32)] if name == "Q5_K" else []
    return [*floats, *scales, *fifth, _join(codes & 15, 4, 4, 32)]


def _unpack_super(name: str, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes from 0, scales and minima as float32 [blocks, subs], d and dmin float32 [blocks, 1]."""
    none = np.zeros((len(data), 1), F)
    if name == "Q2_K":
        s = data[:, :16]
        q = _split(data[:, 16:80], 2, 2, 32)
        return q, (s & 15).astype(F), (s >> 4).astype(F), _float(data, 80), _float(data, 82)
    if name == "Q6_K":
        q = _split(data[:, :128], 2, 4, 64) | _split(data[:, 128:192], 2, 2, 32) << 4
        scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8)
        return q, scales.astype(F), none, _float(data, 208), none
    if name == "Q3_K":
        q = _split(data[:, 32:96], 2, 2, 32) | _split(data[:, :32], 1, 1, 32) << 2
        low = np.concatenate([data[:, 96:104] & 15, data[:, 96:104] >> 4], axis=1)
        high = np.concatenate([data[:, 104:108] >> 2 * i & 3 for i in range(4)], axis=1)
        return q, (low | high << 4).astype(F) - F(32), none, _float(data, 108), none
    a, e, both = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = np.concatenate([a & 63, both & 15 | (a >> 6) << 4], axis=1)
    mins = np.concatenate([e & 63, both >> 4 | (e >> 6) << 4], axis=1)
    q = _split(data[:, -128:], 4, 4, 32)
    if name == "Q5_K":
        q = q | _split(data[:, 16:48], 1, 1, 32) << 4
    return q, scales.astype(F), mins.astype(F), _float(data, 0), _float(data, 2)
