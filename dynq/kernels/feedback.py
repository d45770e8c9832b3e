"""Error feedback: the codes of a few columns, given what the errors of all the others do to the output.

With ``H = R R^T`` (R upper triangular) the squared output error of a row is ``|e R|^2``, e the row of weight errors.
Component j of ``e R`` holds the errors of columns up to j only, so codes can be chosen from left to right, each one
making up for those before it: GPTQ (Frantar et al. 2022), in the form of Babai's nearest plane (Chen et al. 2025, "The
Geometry of LLM Quantization"). `choose` does that for the columns that share a scale, once for each scale it may have,
and keeps what errs least. P is what the errors of the columns outside add to ``e R``.

Rows are independent and lie side by side: arrays are [column, row], every inner loop runs over rows.
"""

import numpy as np

from dynq.kernels._jit import kernel

LANES = 64  # rows side by side: the scratch of 32 columns takes 40 KiB

ZERO = np.float32(0)
ONE = np.float32(1)
INFINITY = np.float32(np.inf)
TINY = np.float32(1e-30)  # a step below is none: its inverse would overflow, and rows are about 1 in size


@kernel
def choose(w, P, R, step, offset, levels, keep, E, codes, best):
    """Minimise ``|e R + P|^2`` with e = w - (step * levels[code] + offset), over codes and the steps and offsets given.

    w, P float32 [g, rows]; R float32 [g, g], upper triangular; step, offset float32 [candidates, rows]; levels float32
    [count], ascending, one apart where `count` levels are equally spaced.
    In and out: E float32 [g, rows], the errors w - what; codes uint8 [g, rows], indices of levels. Out: best int64
    [rows], the candidate taken. With `keep` a row's E and codes stay, and best is -1, unless that errs less.
    """
    g, rows = w.shape
    count = levels.shape[0]
    low, high = levels[0], levels[count - 1]
    uniform = True
    for p in range(count - 1):
        uniform &= levels[p + 1] - levels[p] == ONE
    X = np.zeros((g, LANES), np.float32)
    carry = np.zeros((g, LANES), np.float32)
    e = np.empty((g, LANES), np.float32)
    q = np.empty((g, LANES), np.float32)
    best_e = np.empty((g, LANES), np.float32)
    best_q = np.empty((g, LANES), np.float32)
    A = np.zeros((6, LANES), np.float32)
    s, o, inverse, r, cost, least = A[0], A[1], A[2], A[3], A[4], A[5]
    for first in range(0, rows, LANES):
        width = min(LANES, rows - first)
        for i in range(g):
            for j in range(width):
                X[i, j] = w[i, first + j]
                carry[i, j] = P[i, first + j]
        for j in range(width):
            best[first + j] = -1
        least[:] = ZERO if keep else INFINITY
        if keep:
            for i in range(g):
                for j in range(width):
                    best_e[i, j] = E[i, first + j]
            for i in range(g):
                for j in range(LANES):
                    r[j] = carry[i, j]
                for p in range(i + 1):
                    for j in range(LANES):
                        r[j] += best_e[p, j] * R[p, i]
                for j in range(LANES):
                    least[j] += r[j] * r[j]
        for k in range(step.shape[0]):
            for j in range(width):
                s[j] = step[k, first + j]
                o[j] = offset[k, first + j]
            for j in range(LANES):
                inverse[j] = ONE / s[j] if abs(s[j]) > TINY else ZERO
                cost[j] = ZERO
            for i in range(g):
                for j in range(LANES):
                    r[j] = carry[i, j]
                for p in range(i):
                    for j in range(LANES):
                        r[j] += e[p, j] * R[p, i]
                across = ONE / R[i, i]
                if uniform:
                    for j in range(LANES):
                        code = np.rint((X[i, j] + r[j] * across - o[j]) * inverse[j])
                        code = code if code > low else low
                        code = code if code < high else high
                        q[i, j] = code - low
                        e[i, j] = X[i, j] - (s[j] * code + o[j])
                else:
                    for j in range(LANES):
                        target = (X[i, j] + r[j] * across - o[j]) * inverse[j]
                        code = 0
                        for p in range(count - 1):
                            code += np.float32(2) * target > levels[p] + levels[p + 1]
                        q[i, j] = np.float32(code)
                        e[i, j] = X[i, j] - (s[j] * levels[code] + o[j])
                for j in range(LANES):
                    miss = r[j] + R[i, i] * e[i, j]
                    cost[j] += miss * miss
            for j in range(width):
                if cost[j] < least[j]:
                    least[j] = cost[j]
                    best[first + j] = k
                    for i in range(g):
                        best_e[i, j] = e[i, j]
                        best_q[i, j] = q[i, j]
        for i in range(g):
            for j in range(width):
                if best[first + j] >= 0:
                    E[i, first + j] = best_e[i, j]
                    codes[i, first + j] = np.uint8(np.int32(best_q[i, j]))
