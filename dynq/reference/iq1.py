"""Twins of dynq.kernels.iq1 and .iq1_search, where layouts and method are described: IQ1_S and IQ1_M.

Arrays are [blocks, groups, weights in group], or [blocks, sub-blocks] for scales.
"""

import numpy as np
from gguf import quants

from dynq.kernels.iq1 import SHARES
from dynq.kernels.iq1_search import SEARCHES, Search
from dynq.reference.scalar import _bytes, _float, _seen, _stored, _sum, _unit

F = np.float32


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, 256] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    w = np.ones(x.shape, F) if w is None else w
    return _pack(name, *fit(x, w, *SHARES[name], SEARCHES[level]))


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, 256]."""
    entries, signs, levels, d = _unpack(name, data)
    step = np.repeat(d * (2 * levels.astype(F) + F(1)), SHARES[name][0], axis=1)
    delta = np.where(signs == 1, F(-0.125), F(0.125))
    return (step[:, :, None] * (_grid()[entries] + delta[:, :, None])).reshape(len(data), 256)


# --- the search ------------------------------------------------------------------------------------------------------


def fit(
    x: np.ndarray, w: np.ndarray, run: int, share: int, search: Search
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries, signs [blocks, 32], levels [blocks, 32 / run] and half floats d [blocks]."""
    unit = _unit(x)
    x, w = (x * unit[:, None]).reshape(-1, 32, 8), w.reshape(-1, 32, 8)
    sx, sl = _start(x, w, run, share, search)
    d, level = _scales(sx, sl, search, unit)
    best = np.full(len(x), np.inf, F)
    kept = [np.zeros((len(x), 32), int), np.zeros((len(x), 32), bool), level, d]
    for neighbours in search.passes:
        entry, sign, sx, sl = _choose(x, w, run, share, d, level, neighbours)
        d, level = _scales(sx, sl, search, unit)
        step = d[:, None] * (F(2) * level + F(1))
        total = _total(step * (step * sl - F(2) * sx))
        better = total < best
        best = np.where(better, total, best)
        kept = [
            np.where(better if a.ndim == 1 else better[:, None], a, k)
            for a, k in zip((entry, sign, level, d), kept, strict=True)
        ]
    return kept[0], kept[1], kept[2], _stored(kept[3] / unit)


def _total(terms: np.ndarray) -> np.ndarray:
    """_sum, begun with 0 as the kernels begin theirs: never -0."""
    return _sum(terms) + F(0)


def _sub(groups: np.ndarray, run: int) -> np.ndarray:
    """Sums over the groups of each sub-block."""
    return _total(groups.reshape(len(groups), -1, run))


def _least_squares(x: np.ndarray, w: np.ndarray, level: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cost less the weights' own, sum w l x and sum w l l of groups whose numbers are `level`."""
    sxl, sll = _total(w * level * x), _total(w * level * level)
    return step * (step * sll - F(2) * sxl), sxl, sll


def _cheaper(cost: np.ndarray, share: int) -> np.ndarray:
    """Where cost[1] is less than cost[0], summed over the groups that must agree: bool [blocks, 32]."""
    return np.repeat(_sub(cost[1], share) < _sub(cost[0], share), share, axis=1)


def _start(x: np.ndarray, w: np.ndarray, run: int, share: int, search: Search) -> tuple[np.ndarray, np.ndarray]:
    size = np.sqrt(_sub(_total(w * x * x), run) / _sub(_total(w), run))
    sx, sl, best = np.zeros_like(size), np.ones_like(size), np.zeros_like(size)
    for t in range(len(search.starts) + search.refinements):
        tried = size * F(search.starts[t]) if t < len(search.starts) else sx / sl
        step = np.repeat(tried, run, axis=1)
        inverse = np.where(step > 0, F(1) / step, F(0))[:, :, None]
        sums = []
        for delta in (F(0.125), F(-0.125)):
            q = np.clip(np.rint(x * inverse - delta), F(-1), F(1))
            sums.append(_least_squares(x, w, q + delta, step))
        cost, sxl, sll = np.stack(sums, axis=1)
        flip = _cheaper(cost, share)
        new_sx, new_sl = (_sub(np.where(flip, a[1], a[0]), run) for a in (sxl, sll))
        gain = new_sx / new_sl * new_sx
        better = (gain > best) & (new_sx > 0)
        best, sx, sl = np.where(better, gain, best), np.where(better, new_sx, sx), np.where(better, new_sl, sl)
    return sx, sl


def _level(step: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(F(0.5) * (step * inverse[:, None] - F(1))), F(0), F(7))


def _scales(sx: np.ndarray, sl: np.ndarray, search: Search, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best d [blocks] and levels [blocks, subs] where the entries are fixed."""
    step = sx / sl
    largest = np.maximum(step.max(axis=1), F(0))
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    for t in range(len(search.ends) + 1):
        inverse = F(search.ends[t]) / largest if t < len(search.ends) else F(1) / scale
        factor = F(2) * _level(step, inverse) + F(1)
        xl, ll = _total(factor * sx), _total(factor * factor * sl)
        gain = xl / ll * xl
        better = (largest > 0) & (xl > 0) & (gain > best)
        scale, best = np.where(better, xl / ll, scale), np.where(better, gain, best)
    d = _seen(scale, unit)
    return d, _level(step, np.where(d > 0, F(1) / d, F(0)))


def _choose(
    x: np.ndarray, w: np.ndarray, run: int, share: int, d: np.ndarray, level: np.ndarray, neighbours: int
) -> tuple[np.ndarray, ...]:
    """Entries and signs [blocks, 32], least squares' sums [blocks, subs], for the best scale of each sub-block."""
    sw, swx = _total(w), _total(np.abs(w * x))
    best = np.full(level.shape, np.inf, F)
    kept: list[np.ndarray] = []
    for k in range(-neighbours, neighbours + 1):
        size = d[:, None] * (F(2) * np.clip(level + F(k), F(0), F(7)) + F(1))
        step = np.repeat(size, run, axis=1)
        limit = F(8 * 4095) / np.maximum(step * sw + swx, F(1e-20))
        entry, sums = [], []
        for delta in (F(0.125), F(-0.125)):
            entry.append(_cheapest(x, w * limit[:, :, None], step[:, :, None], delta))
            sums.append(_least_squares(x, w, _grid()[entry[-1]] + delta, step))
        cost, sxl, sll = np.stack(sums, axis=1)
        flip = _cheaper(cost, share)
        sx, sl = (_sub(np.where(flip, a[1], a[0]), run) for a in (sxl, sll))
        total = size * (size * sl - F(2) * sx)
        new = [np.where(flip, entry[1], entry[0]), flip, sx, sl]
        better = total < best
        best = np.where(better, total, best)
        wide = np.repeat(better, run, axis=1)
        kept = [np.where(wide if a.shape[1] == 32 else better, a, b) for a, b in zip(new, kept or new, strict=True)]
    return tuple(kept)


def _cheapest(x: np.ndarray, w: np.ndarray, step: np.ndarray, delta: np.float32) -> np.ndarray:
    """Each group's cheapest entry, costs in integers: [blocks, 32]. Of equals, in the order of the first four numbers,
    then of rows of eight; in a row the cheapest last four."""
    plus = w * (step * (F(1) + F(2) * delta) - F(2) * x)
    minus = w * (step * (F(1) - F(2) * delta) + F(2) * x)
    cost = np.stack([minus, np.zeros_like(plus), plus], axis=-1)
    cost = np.minimum(cost - cost.min(axis=-1, keepdims=True), F(4095)).astype(np.int16)
    digits = np.indices((3, 3, 3, 3)).reshape(4, 81)
    halves = [sum(cost[:, :, h + i, digits[i]] for i in range(4)) for h in (0, 4)]  # [blocks, 32, 81]
    found, least = np.zeros(x.shape[:2], int), np.full(x.shape[:2], 32767, np.int16)
    place = (_grid().astype(int) + 1).reshape(2048, 2, 4) @ [27, 9, 3, 1]
    for quadruple in range(81):
        members = np.flatnonzero(place[:, 0] == quadruple)
        for row in np.split(members, range(8, len(members), 8)):
            second = halves[1][:, :, place[row, 1]]
            total = halves[0][:, :, quadruple] + second.min(axis=-1)
            better = total < least
            found, least = np.where(better, row[second.argmin(axis=-1)], found), np.where(better, total, least)
    return found


def _grid() -> np.ndarray:
    """The code book as gguf-py has it: float32 [2048, 8] of -1, 0, 1."""
    quants.IQ1_S.init_grid()
    return np.array(quants.IQ1_S.grid, F).reshape(2048, 8)


# --- the layouts -----------------------------------------------------------------------------------------------------


def _pack(name: str, entries: np.ndarray, signs: np.ndarray, levels: np.ndarray, d: np.ndarray) -> np.ndarray:
    low, high = entries.astype(np.uint8), entries >> 8
    if name == "IQ1_S":
        words = (high.reshape(-1, 8, 4) << 3 * np.arange(4)).sum(axis=2)
        words = words | levels.astype(int) << 12 | signs[:, ::4].astype(int) << 15
        return np.concatenate([_bytes(d), low, words.astype("<u2").view(np.uint8)], axis=1)
    nibbles = (high | signs.astype(int) << 3).astype(np.uint8)
    words = (levels.astype(int).reshape(-1, 4, 4) << 3 * np.arange(4)).sum(axis=2)
    words = words | (d.view(np.uint16).astype(int)[:, None] >> 4 * np.arange(4) & 15) << 12
    return np.concatenate([low, nibbles[:, ::2] | nibbles[:, 1::2] << 4, words.astype("<u2").view(np.uint8)], axis=1)


def _unpack(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries, signs, levels [blocks, 8 or 16] and d float32 [blocks, 1]."""
    if name == "IQ1_S":
        words = np.ascontiguousarray(data[:, 34:]).view("<u2").astype(int)
        high = (words[:, :, None] >> 3 * np.arange(4) & 7).reshape(-1, 32)
        return data[:, 2:34] | high << 8, np.repeat(words >> 15, 4, axis=1), words >> 12 & 7, _float(data, 0)
    words = np.ascontiguousarray(data[:, 48:]).view("<u2").astype(int)
    nibbles = np.stack([data[:, 32:48] & 15, data[:, 32:48] >> 4], axis=2).reshape(-1, 32).astype(int)
    d = (words >> 12 << 4 * np.arange(4)).sum(axis=1).astype(np.uint16).view(np.float16).astype(F)
    levels = (words[:, :, None] >> 3 * np.arange(4) & 7).reshape(-1, 16)
    return data[:, :32] | (nibbles & 7) << 8, nibbles >> 3, levels, d[:, None]
