"""Two models' predictions of the next token compared, in one pass over the vocabulary.

The readable twin is `dynq.evaluate.kld.compare_in_torch`. Exponentials are float32 (a polynomial that the compiler can
vectorise: reduction by ln 2 and the coefficients of Cephes' expf, relative error below 2e-7), sums float64.
"""

import numpy as np

from dynq.kernels._jit import kernel

LANES = 64  # tokens at a time; each lane has sums of its own
_LOWEST = np.float32(-87.0)  # e^-87 is about the smallest normal float32
_LOG2E = np.float32(1.44269504)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE = np.float32(1.0)


@kernel
def exponentials(x, power, out):
    """out = e^x for float32 x ``[LANES]`` of at most 0; power: int32 ``[LANES]``, scratch."""
    for j in range(LANES):
        y = x[j] if x[j] > _LOWEST else _LOWEST
        n = (y * _LOG2E + _ROUND) - _ROUND
        r = y - n * _LN2_HIGH - n * _LN2_LOW
        p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
        out[j] = p * r * r + r + _ONE
        power[j] = (np.int32(n) + np.int32(127)) << np.int32(23)
    scale = power.view(np.float32)
    for j in range(LANES):
        out[j] *= scale[j]


@kernel
def compare_rows(logits, codes, step, offset, targets, normalise, floor, out, same_top):
    """Fill out float64 ``[n, 3]`` (kld, nll, nll_base) and same_top bool ``[n]``.

    logits float32 ``[n, v]``: the measured model's. The other's log-probabilities are ``offset[i] + step[i] * codes``
    (float32 ``[n]``, uint16 ``[n, v]``), normalised here if asked; tokens at or below `floor` do not count in the KLD.
    targets int64 ``[n]``: the token that follows. Logits that are not finite give a KLD that is not.
    """
    n, v = logits.shape
    whole = v - v % LANES
    q, p = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    exp_q, exp_p = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best, power = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    sum_q, sum_p, terms = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    for i in range(n):
        row, code, first, width = logits[i], codes[i], offset[i], step[i]
        best[:] = -np.inf
        for k in range(0, whole, LANES):
            part = row[k : k + LANES]  # j cannot be negative: an index such as k + j would keep the loop scalar
            for j in range(LANES):
                best[j] = part[j] if part[j] > best[j] else best[j]
        top = best.max()
        for k in range(whole, v):
            top = max(top, row[k])
        sum_q[:], sum_p[:], terms[:] = 0, 0, 0
        for k in range(0, v, LANES):
            count = min(LANES, v - k)
            part, own = row[k : k + count], code[k : k + count]
            for j in range(count):
                q[j] = part[j] - top
                p[j] = first + width * np.float32(own[j])
            for j in range(count, LANES):
                q[j], p[j] = _LOWEST, _LOWEST
            exponentials(q, power, exp_q)
            exponentials(p, power, exp_p)
            if count < LANES:
                exp_q[count:], exp_p[count:] = 0, 0
            for j in range(LANES):
                weight = exp_p[j] if p[j] > floor else np.float32(0)
                sum_q[j] += exp_q[j]
                sum_p[j] += weight
                terms[j] += weight * (p[j] - q[j])
        log_q, mass = np.log(sum_q.sum()), sum_p.sum()
        log_p = np.log(mass) if normalise else 0.0
        out[i, 0] = (terms.sum() + mass * (log_q - log_p)) / (mass if normalise else 1.0)
        out[i, 1] = log_q - (row[targets[i]] - top)
        out[i, 2] = log_p - (first + width * np.float32(code[targets[i]]))
        base_top = code.max() if width > 0 else code.min()
        at = 0
        while at < v - 1 and row[at] != top and code[at] != base_top:
            at += 1
        same_top[i] = row[at] == top and code[at] == base_top
