"""Twin of dynq.kernels.iquants, .lattice and .nearest: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

Arrays are [blocks, sub-blocks, weights], or [blocks, sub-blocks, groups, ...] where a group shares an entry of the code
book. Layouts and method are described in the kernels' files.
"""

import numpy as np

from dynq.kernels.grids import Grid, Plan, entry_at, grid, neighbours, plan_of
from dynq.kernels.nearest import LIMIT, MASK, NUMBER, TINY
from dynq.reference.scalar import _bytes, _float, _seen, _stored, _sum, _unit

F = np.float32
_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, 256] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    w = np.ones(x.shape, F) if w is None else w
    return np.concatenate(_pack(name, *fit(name, x, w, grid(name), plan_of(name, level))), axis=1)


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, 256]."""
    book = grid(name)
    entries, signs, levels = _unpack(name, data)
    step = _float(data, 0) * (F(0.5) + levels.astype(F)) * F(2 * book.step)
    plusminus = F(1) - F(2) * np.unpackbits(signs, axis=1, bitorder="little").astype(F)
    return np.repeat(step, book.sub, axis=1) * book.entries[entries].reshape(len(data), 256) * plusminus


# --- the search ------------------------------------------------------------------------------------------------------


def fit(name: str, x: np.ndarray, w: np.ndarray, book: Grid, plan: Plan) -> tuple[np.ndarray, ...]:
    """Entries [blocks, groups], signs [blocks, 32], levels [blocks, subs], half floats d [blocks]."""
    shape = (len(x), 256 // book.sub, book.sub)
    unit = _unit(x)
    x, w = (x * unit[:, None]).reshape(shape), w.reshape(shape)
    unit = unit * F(book.step)
    signs = np.packbits(np.signbit(x), axis=2, bitorder="little")
    odd = _odd(signs) & book.even  # then the stored seven cannot all be right
    x = np.abs(x)
    values = neighbours(name, plan.count)
    values = values.reshape(len(values), -1, book.dim, 16).swapaxes(1, 2).reshape(len(values), book.dim, -1).astype(F)
    d, levels = _trials(x, w, odd, _scales(x, w, book, plan), unit, book, plan, values[..., : plan.near])
    best = np.full(len(x), np.inf, F)
    kept: tuple[np.ndarray, ...] = ()
    for _ in range(plan.rounds + 1):
        scale = d[:, None] * levels
        g, flips = _assign(x, w, odd, scale, book, values)
        miss = x - scale[..., None] * g
        error = _sum(_sum(w * miss * miss))
        new = (_number(np.abs(g).reshape(*x.shape[:2], -1, book.dim), book), signs ^ flips, levels, d)
        kept = kept or new
        better = error < best
        best = np.where(better, error, best)
        kept = tuple(np.where(better.reshape(-1, *[1] * (n.ndim - 1)), n, k) for n, k in zip(new, kept, strict=True))
        sll, sxl = _sum(w * g * g), _sum(w * g * x)
        inverse = np.where(d > TINY, F(1) / d, F(0))[:, None]
        levels = np.clip(np.rint((sxl / sll * inverse - F(1)) * F(0.5)), F(0), F(15)) * F(2) + F(1)
        aa, ax = _sum(levels * levels * sll), _sum(levels * sxl)
        d = np.where(ax > 0, _seen(ax / aa, unit), d)
    numbers, signs, levels, d = kept
    blocks = len(x)
    return (
        entry_at(name)[numbers].reshape(blocks, -1),
        signs.reshape(blocks, 32),
        (levels * F(0.5)).astype(np.uint8),
        _stored(d / unit),
    )


def _odd(signs: np.ndarray) -> np.ndarray:
    """Whether the number of minus signs is odd."""
    return np.unpackbits(signs[..., None], axis=-1).sum(-1) % 2 == 1


def _value(t: np.ndarray, book: Grid) -> np.ndarray:
    """The values nearest to t, counted from the lowest."""
    return np.clip(np.rint((t - book.low) * (F(1) / book.spacing)), F(0), book.top)


def _scales(x: np.ndarray, w: np.ndarray, book: Grid, plan: Plan) -> np.ndarray:
    """A scale for each sub-block, the code book left aside."""
    largest = x.max(axis=-1)
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    for t in plan.tries:
        inverse = np.where(largest > TINY, F(t) / largest, F(0))
        value = book.low + _value(x * inverse[..., None], book) * book.spacing
        sll, sxl = _sum(w * value * value), _sum(w * value * x)
        s = sxl / sll
        better = s * sxl > best
        best, scale = np.where(better, s * sxl, best), np.where(better, s, scale)
    return scale


def _points(x: np.ndarray, scale: np.ndarray, book: Grid) -> tuple[np.ndarray, np.ndarray]:
    """x in units of the scale [.., groups, dim], and the rounded points' numbers [.., groups]."""
    inverse = np.where(scale > TINY, F(1) / scale, F(0))
    t = np.minimum(x * inverse[..., None], LIMIT).reshape(*x.shape[:2], -1, book.dim)
    return t, _number(t, book)


def _number(t: np.ndarray, book: Grid) -> np.ndarray:
    """The number of the point nearest to t, [.., dim]."""
    return (_value(t, book).astype(np.int64) * len(book.values) ** np.arange(book.dim)).sum(-1)


def _over(terms: np.ndarray) -> np.ndarray:
    """Sum over a group's weights, [.., dim, candidates], four by four."""
    fours = [_sum(terms[..., i : i + 4, :].swapaxes(-1, -2)) for i in range(0, terms.shape[-2], 4)]
    return fours[0] + fours[1] if len(fours) == 2 else fours[0]


def _assign(
    x: np.ndarray, w: np.ndarray, odd: np.ndarray, scale: np.ndarray, book: Grid, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best entries' values, minus where the sign is to be wrong, like x; those places as bits [.., octets]."""
    t, points = _points(x, scale, book)
    g = values[points]
    w = w.reshape(t.shape)
    miss = t[..., None] - g
    error = _over(w[..., None] * miss * miss)
    turned = error + F(4) * ((w * t)[..., None] * g).min(axis=-2)
    keep, turn = (_keys(e) for e in (error, turned))
    each = 8 // book.dim
    keep, turn = (k.reshape(*odd.shape, each) for k in (keep, turn))
    if each == 1:
        first = odd
        keys = np.where(odd[..., None], turn, keep)
    else:
        a, b, c, d = (_error(k) for k in (keep[..., 0], keep[..., 1], turn[..., 0], turn[..., 1]))
        first = odd & (c + b <= a + d)
        second = odd & ~first
        keys = np.stack([np.where(first, turn[..., 0], keep[..., 0]), np.where(second, turn[..., 1], keep[..., 1])], -1)
    numbers = keys.reshape(points.shape) & NUMBER
    g = np.take_along_axis(g, numbers[..., None, None].astype(np.int64), -1)[..., 0]
    cost = (w * t * g).reshape(*odd.shape, 8)
    half = np.arange(8) // book.dim == np.where(first, 0, 1)[..., None]
    where = np.where(half, cost, np.inf).argmin(-1)
    flip = odd[..., None] & (np.arange(8) == where[..., None])
    g = np.where(flip, -g.reshape(flip.shape), g.reshape(flip.shape)).reshape(x.shape)
    return g, np.packbits(flip, axis=-1, bitorder="little")[..., 0]


def _keys(error: np.ndarray) -> np.ndarray:
    """The least error's bits, the last eight of them the candidate's number."""
    return (error.view(np.int32) & MASK | np.arange(error.shape[-1], dtype=np.int32)).min(-1)


def _error(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys & MASK).view(F)


def _trials(
    x: np.ndarray,
    w: np.ndarray,
    odd: np.ndarray,
    scale: np.ndarray,
    unit: np.ndarray,
    book: Grid,
    plan: Plan,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The stored float of each super-block and the levels (odd) of its sub-blocks."""
    t, points = _points(x, scale, book)
    g = values[points]
    x, w = x.reshape(t.shape), w.reshape(t.shape)
    terms = (F(2) * w * x)[..., None] * g
    gain, norm = _over(terms), _over(w[..., None] * g * g)
    turned = gain - F(2) * terms.min(axis=-2)
    if book.dim == 8:
        gain = np.where(odd[..., None], turned, gain)
    best, d, levels = np.full(len(x), np.inf, F), np.zeros(len(x), F), np.ones(scale.shape, F)
    for end in plan.ends:
        trial = _seen(scale.max(axis=1) / F(end), unit)
        inverse = np.where(trial > TINY, F(1) / trial, F(0))[:, None]
        lowest = np.floor((scale * inverse - F(plan.choices - 1)) * F(0.5))
        lowest = np.clip(lowest, F(0), F(16 - plan.choices)) * F(2) + F(1)
        least, level = np.full(scale.shape, np.inf, F), lowest
        for c in range(plan.choices):
            s = (lowest + F(2 * c)) * trial[:, None]
            error = (s[..., None, None] * norm - gain).min(axis=-1)
            if book.dim == 4:
                pairs = error.reshape(*odd.shape, 2)
                flips = (s[..., None, None] * norm - turned).min(axis=-1).reshape(*odd.shape, 2)
                joint = np.minimum(flips[..., 0] + pairs[..., 1], pairs[..., 0] + flips[..., 1])
                joint = np.stack([joint, np.zeros_like(joint)], -1)
                error = np.where(odd[..., None], joint, pairs).reshape(error.shape)
            error = s * _sum(error)
            better = error < least
            least, level = np.where(better, error, least), np.where(better, lowest + F(2 * c), level)
        total = _sum(least)
        better = total < best
        best, d = np.where(better, total, best), np.where(better, trial, d)
        levels = np.where(better[:, None], level, levels)
    return d, levels


# --- the layout ------------------------------------------------------------------------------------------------------


def _pack(name: str, entries: np.ndarray, signs: np.ndarray, levels: np.ndarray, d: np.ndarray) -> list[np.ndarray]:
    blocks, low = len(d), entries.astype(np.uint8)
    nibbles = levels[:, ::2] | levels[:, 1::2] << 4
    if name in ("IQ2_XXS", "IQ3_XXS"):
        word = (signs & 127).reshape(blocks, 8, 4).astype(np.uint32) << _SEVENS
        word = (np.bitwise_or.reduce(word, axis=2) | levels.astype(np.uint32) << np.uint32(28)).view(np.uint8)
        if name == "IQ3_XXS":
            return [_bytes(d), low, word]
        both = np.concatenate([low.reshape(blocks, 8, 4), word.reshape(blocks, 8, 4)], axis=2)
        return [_bytes(d), both.reshape(blocks, 64)]
    if name == "IQ2_XS":
        return [_bytes(d), (entries | (signs & 127).astype(np.uint16) << 9).view(np.uint8), nibbles]
    bits = 2 if name == "IQ2_S" else 1
    high = (entries >> 8).astype(np.uint8).reshape(blocks, 8, -1) << np.arange(0, 8, bits, dtype=np.uint8)
    high = np.bitwise_or.reduce(high, axis=2)
    return [_bytes(d), low, signs, high, nibbles] if name == "IQ2_S" else [_bytes(d), low, high, signs, nibbles]


def _unpack(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries [blocks, groups], signs [blocks, 32], levels [blocks, subs]."""
    blocks = len(data)
    if name in ("IQ2_XXS", "IQ3_XXS"):
        if name == "IQ2_XXS":
            both = data[:, 2:].reshape(blocks, 8, 8)
            entries, words = both[..., :4].reshape(blocks, 32), both[..., 4:]
        else:
            entries, words = data[:, 2:66], data[:, 66:]
        word = np.ascontiguousarray(words).reshape(blocks, 32).view(np.uint32)
        seven = (word[..., None] >> _SEVENS & np.uint32(127)).reshape(blocks, 32).astype(np.uint8)
        return entries, _eight(seven), word >> np.uint32(28)
    levels = data[:, -4:] if name == "IQ3_S" else data[:, -8:]
    levels = np.stack([levels & 15, levels >> 4], axis=2).reshape(blocks, -1)
    if name == "IQ2_XS":
        both = np.ascontiguousarray(data[:, 2:66]).view(np.uint16)
        return both & 511, _eight((both >> 9).astype(np.uint8)), levels
    low, high, signs = (
        (data[:, 2:34], data[:, 66:74], data[:, 34:66])
        if name == "IQ2_S"
        else (data[:, 2:66], data[:, 66:74], data[:, 74:106])
    )
    bits = 2 if name == "IQ2_S" else 1
    high = high[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    return low | high.reshape(blocks, -1).astype(np.uint16) << 8, signs, levels


def _eight(seven: np.ndarray) -> np.ndarray:
    return seven | _odd(seven).astype(np.uint8) << 7
