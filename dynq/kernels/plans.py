"""How the scalar block formats are searched: the numbers that kernels and their twins share, by level."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Plan:
    """How a block format is searched. ``w ~ scale * q + offset``, q in low..high; offset 0 unless `affine`.

    width: weights of a block; sub: those that share a scale; bottom, top: range of the stored integer scales (and
    minima) of a K format; tries: the steps that the range is spread over, and where it starts (parts of the range);
    moves: how the codes of the best so far are stretched and shifted (by steps); deltas: tries for the super-block's
    float, as differences from the end of the range of scales; rounds: descents over the stored numbers.
    """

    affine: bool
    width: int
    sub: int
    low: int
    high: int
    tries: tuple[tuple[float, float], ...]
    moves: tuple[tuple[float, float], ...] = ((1, 0),)
    bottom: int = 0
    top: int = 0
    deltas: tuple[float, ...] = ()
    rounds: int = 2


def _spread(first: float, last: float, count: int, starts: tuple[float, ...] = (0,)) -> tuple[tuple[float, float], ...]:
    return tuple((steps, start) for start in starts for steps in np.linspace(first, last, count).tolist())


_DELTAS = tuple(np.linspace(-1.2, 1.2, 9).tolist())
_NONE: tuple[tuple[float, float], ...] = ()
# Chosen on normally distributed weights: with 37 tries the error of Q2_K and Q4_K falls by 0.1 to 0.2 % only.
PLANS = {
    "Q4_0": Plan(False, 32, 32, -8, 7, _spread(7.0, 9.5, 13)),
    "Q4_1": Plan(True, 32, 32, 0, 15, _spread(14.0, 16.8, 15)),
    "Q5_0": Plan(False, 32, 32, -16, 15, _spread(15.0, 17.5, 13)),
    "Q5_1": Plan(True, 32, 32, 0, 31, _spread(30.0, 33.0, 15)),
    "Q8_0": Plan(False, 32, 32, -128, 127, ((128, 0),), _NONE),
    "Q2_K": Plan(True, 256, 16, 0, 3, _spread(2.1, 3.9, 13), bottom=0, top=15, deltas=_DELTAS),
    "Q3_K": Plan(False, 256, 16, -4, 3, _spread(3.0, 5.5, 12), _NONE, -32, 31, _DELTAS),
    "Q4_K": Plan(True, 256, 32, 0, 15, _spread(14.0, 16.8, 15), bottom=0, top=63, deltas=_DELTAS),
    "Q5_K": Plan(True, 256, 32, 0, 31, _spread(30.0, 33.0, 15), bottom=0, top=63, deltas=_DELTAS),
    "Q6_K": Plan(False, 256, 16, -32, 31, _spread(31.0, 34.0, 12), _NONE, -128, 127, _DELTAS),
}


def _around(high: int) -> tuple[tuple[float, float], ...]:
    """Moves that change few codes each: the largest code by up to 0.6 steps, the start by up to half a step."""
    return tuple((1 + k / high, shift) for k in (-0.6, -0.3, 0, 0.3, 0.6) for shift in (-0.5, -0.25, 0, 0.25, 0.5))


def _wider(plan: Plan) -> Plan:
    """The plan of level `search`: tries that cut off an outlier of little importance, then small moves from the best.

    Chosen on dynq-tiny's tensors with importance of three widths; what else was tried is in LOG.md.
    """
    high = plan.high
    if not plan.affine:
        end = -plan.low
        tries = _spread(end - 1, 1.25 * end, 14) + _spread(1.3 * end, 2.2 * end, 10)
        return replace(plan, tries=tries, moves=tuple((1 + k / (4 * end), 0) for k in (-2, -1, 0, 1, 2)))
    if high == 3:
        return replace(plan, tries=_spread(2.2, 4.6, 7, (0, 1 / 12, 2 / 12, 3 / 12)), moves=((1, 0), (1, 0)))
    cut = _spread(1.05 * high, 1.35 * high, 4, (0.07, 0.14, 0.2))
    return replace(plan, tries=plan.tries + cut, moves=_around(high))


_SEARCH = {name: plan if name == "Q8_0" else _wider(plan) for name, plan in PLANS.items()}
# Without importance llama.cpp is quick. It only rounds blocks of 32, as `plain` does, so `search` makes one try there
# with least squares; Q3_K errs no more with four tries than with twelve.
_UNWEIGHTED = {
    "plain": {"Q3_K": replace(PLANS["Q3_K"], tries=_spread(3.3, 4.8, 4), rounds=1, deltas=_DELTAS[::2])},
    "search": {n: replace(p, tries=p.tries[6:7], moves=_NONE, rounds=0) for n, p in PLANS.items() if p.width == 32}
    | {"Q3_K": PLANS["Q3_K"]},
}


def pairs(values: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Tries or moves as the kernels take them: float32 [n, 2]."""
    return np.array(values, np.float32).reshape(-1, 2)


def plan_of(name: str, level: str, weighted: bool = True) -> Plan:
    """The plan of a format on a level, `plain` or `search`, with importance or without."""
    plans = PLANS if level == "plain" else _SEARCH
    return plans[name] if weighted else _UNWEIGHTED[level].get(name, plans[name])
