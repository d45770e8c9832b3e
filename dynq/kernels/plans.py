"""How the scalar block formats are searched: the numbers that kernels and their twins share, by level."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """How a block format is searched. ``w ~ scale * q + offset``, q in low..high; offset 0 unless `affine`.

    width: weights of a block; sub: those that share a scale; bottom, top: range of the stored integer scales (and
    minima) of a K format; tries: the steps that the range is spread over; refinements: least squares steps after the
    tries; deltas: the same tries for the super-block's float, as differences from the end of the range; rounds:
    descents over the stored numbers.
    """

    affine: bool
    width: int
    sub: int
    low: int
    high: int
    tries: tuple[float, ...]
    refinements: int
    bottom: int = 0
    top: int = 0
    deltas: tuple[float, ...] = ()
    rounds: int = 2


def _spread(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, count).tolist())


_DELTAS = _spread(-1.2, 1.2, 9)
# Chosen on normally distributed weights: with 37 tries the error of Q2_K and Q4_K falls by 0.1 to 0.2 % only.
PLANS = {
    "Q4_0": Plan(False, 32, 32, -8, 7, _spread(7.0, 9.5, 13), 1),
    "Q4_1": Plan(True, 32, 32, 0, 15, _spread(14.0, 16.8, 15), 1),
    "Q5_0": Plan(False, 32, 32, -16, 15, _spread(15.0, 17.5, 13), 1),
    "Q5_1": Plan(True, 32, 32, 0, 31, _spread(30.0, 33.0, 15), 1),
    "Q8_0": Plan(False, 32, 32, -128, 127, _spread(128, 128, 1), 0),
    "Q2_K": Plan(True, 256, 16, 0, 3, _spread(2.1, 3.9, 13), 1, 0, 15, _DELTAS),
    "Q3_K": Plan(False, 256, 16, -4, 3, _spread(3.0, 5.5, 12), 0, -32, 31, _DELTAS),
    "Q4_K": Plan(True, 256, 32, 0, 15, _spread(14.0, 16.8, 15), 1, 0, 63, _DELTAS),
    "Q5_K": Plan(True, 256, 32, 0, 31, _spread(30.0, 33.0, 15), 1, 0, 63, _DELTAS),
    "Q6_K": Plan(False, 256, 16, -32, 31, _spread(31.0, 34.0, 12), 0, -128, 127, _DELTAS),
}


def plan_of(name: str, level: str) -> Plan:
    """The plan of a format on a level, `plain` or `search`."""
    return PLANS[name]
