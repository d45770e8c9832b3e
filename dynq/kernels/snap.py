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


@kernel
def entries(x, values, dim, low, spacing, top, even):
    """Replace points by entries with signs: float32 x [groups, 8], in the book's units, in place.

    values int8 [points, count * dim]: `dynq.kernels.grids.neighbours`; low, spacing, top: of the book's values; even:
    whether the number of minus signs must be even.
    """
    far = np.empty(16, np.float32)
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
            best, least = 0, FAR
            for at in range(0, values.shape[1], 16 * dim):  # sixteen entries lie together, coordinate after coordinate
                for c in range(far.shape[0]):
                    far[c] = ZERO
                for i in range(dim):
                    own, first = abs(x[g, o + i]), at + 16 * i
                    for c in range(far.shape[0]):
                        miss = own - F(values[point, first + c])
                        far[c] += miss * miss
                for c in range(far.shape[0]):
                    if far[c] < least:
                        best, least = at + c, far[c]
            for i in range(dim):
                value = F(values[point, best + 16 * i])
                loss = abs(x[g, o + i]) * value
                if loss < cost:
                    turn, cost = o + i, loss
                if x[g, o + i] < ZERO:
                    minus += 1
                    value = -value
                x[g, o + i] = value
        if even and minus % 2 == 1:
            x[g, turn] = -x[g, turn]
