"""The entries of a code book nearest to points, for weights that move between codes (dynq.latent).

As in dynq.kernels.nearest only entries near the rounded point are looked at, and no weight counts more than another.
Where seven signs are stored for eight weights and the eighth would be wrong, the weight turns for which that costs
least, ``4 |x| v`` for one of value v, after the entries have been chosen.
"""

import numpy as np

from dynq.kernels._jit import kernel

F = np.float32
ZERO = np.float32(0)
FAR = np.float32(3e38)
LAST = np.int32(0x7FFFFFFF)


@kernel
def entries(x, values, low, spacing, top, even):
    """Replace points by entries with signs: float32 x [groups, 8], in the book's units, in place.

    values int8 [points, dim, count]: `dynq.kernels.grids.coordinates`; low, spacing, top: of the book's values; even:
    whether the number of minus signs must be even.
    """
    _, dim, count = values.shape
    far = np.empty(count, np.float32)
    bits = far.view(np.int32)  # in the same order as the squares: the compiler finds the least of integers side by side
    for g in range(x.shape[0]):
        turn, cost, minus = 0, FAR, 0
        for o in range(0, 8, dim):
            point, base = 0, 1
            for i in range(o, o + dim):
                q = np.rint((abs(x[g, i]) - low) / spacing)
                q = q if q > ZERO else ZERO
                q = q if q < top else top
                point += base * int(q)
                base *= int(top) + 1
            for c in range(count):
                far[c] = ZERO
            for i in range(dim):
                own = abs(x[g, o + i])
                for c in range(count):
                    miss = own - F(values[point, i, c])
                    far[c] += miss * miss
            least = LAST
            for c in range(count):
                least = min(least, bits[c])
            best = count
            for c in range(count):
                best = min(best, c if bits[c] == least else count)
            for i in range(dim):
                value = F(values[point, i, best])
                loss = abs(x[g, o + i]) * value
                if loss < cost:
                    turn, cost = o + i, loss
                if x[g, o + i] < ZERO:
                    minus += 1
                    value = -value
                x[g, o + i] = value
        if even and minus % 2 == 1:
            x[g, turn] = -x[g, turn]
