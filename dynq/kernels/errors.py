"""Error metrics, in float64: numba's `float` of a float32 is a float32, hence np.float64."""

import numpy as np

from dynq.kernels._jit import kernel


@kernel
def weighted_error(weights, decoded, importance, out):
    """out[r] = sum_j importance_j (w_rj - what_rj)^2 of each row; float32 [rows, n] twice, float64 [n], float64 [rows].

    Four running sums, so that the additions need not wait for one another; their order is fixed.
    """
    rows, n = weights.shape
    for r in range(rows):
        a, b, c, e = 0.0, 0.0, 0.0, 0.0
        for j in range(0, n - 3, 4):
            p = np.float64(weights[r, j]) - np.float64(decoded[r, j])
            q = np.float64(weights[r, j + 1]) - np.float64(decoded[r, j + 1])
            s = np.float64(weights[r, j + 2]) - np.float64(decoded[r, j + 2])
            t = np.float64(weights[r, j + 3]) - np.float64(decoded[r, j + 3])
            a += importance[j] * p * p
            b += importance[j + 1] * q * q
            c += importance[j + 2] * s * s
            e += importance[j + 3] * t * t
        for j in range(n - n % 4, n):
            p = np.float64(weights[r, j]) - np.float64(decoded[r, j])
            a += importance[j] * p * p
        out[r] = (a + b) + (c + e)


@kernel
def block_errors(x, w, decoded, out):
    """out[b] = sum_i w (x - decoded)^2 of each block, from first to last in float64.

    x, decoded float32 [blocks, n]; w float32 [blocks of a row, n].
    """
    per_row = w.shape[0]
    for b in range(x.shape[0]):
        total = 0.0
        for i in range(x.shape[1]):
            miss = np.float64(x[b, i]) - np.float64(decoded[b, i])
            total += np.float64(w[b % per_row, i]) * miss * miss
        out[b] = total
