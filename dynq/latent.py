"""Weights that move between the codes of their format.

What a block can hold are points: equally spaced levels, IQ4's uneven ones, or the entries of a code book with their
signs. A tensor's latent numbers lie between them, in units of the levels' distance, and decode to the nearest point;
the gradient by a decoded weight is taken as that by its number (straight-through, Bengio et al. 2013). A number that
has moved far enough takes its weight to the next code. Scales are not touched here.

A step follows Adam's direction u (Kingma and Ba 2015), the mean of the last gradients over the root of their mean
square: 1 where they agree, about a quarter of that where they are noise. Here it is as long as u |u|, so a number goes
where gradients agree and stays where they do not. A weight whose best value lies between two codes is drawn to the
border from both sides and crosses it to and fro, for the gradient knows nothing of the border (Nagel et al. 2022,
"Overcoming Oscillations in Quantization-Aware Training"). So one that has changed its code `TURNS` times, which mostly
means there and back, keeps it from then on.

At the start each number decodes to the code that the encoder chose, and lies as far toward what its weight would best
be as that allows: codes that the encoder was in two minds about are the first to change.
"""

import numpy as np
import torch

from dynq import codec
from dynq.kernels import scales, snap
from dynq.kernels.grids import grid as lattice
from dynq.schedule import BETAS

TURNS = 2  # changes of a code after which it stays
EPS = 1e-8  # Adam's
EDGE = 0.98  # of the way to the border between two codes, at most, at the start
ROWS = 1 << 16  # groups of eight weights looked up at a time


def movable(fmt: str) -> bool:
    """Whether a format's codes can move: not those of IQ1, whose deltas are chosen with them, or without a grid."""
    form = scales.grid(fmt)
    return form is not None and (form.book is None or form.book.signs > 0)


class Latent:
    """The latent numbers of one tensor.

    z float32 [rows, n]; points float32 [rows, n]: what they decode to, in levels; size float32 [rows, groups]: of a
    level in each group of weights, the multipliers of the half floats 1; grad float32 [rows, n]: of the loss by z,
    summed up by `take`; mean, square float32 [rows, n]: Adam's, of grad over the steps; taken: how many steps; turns
    uint8 [rows, n]: how often each has changed its code.
    """

    def __init__(self, fmt: str, data: np.ndarray, weights: np.ndarray, device: torch.device | str):
        """data uint8 [..., row_bytes], weights float32 [rows, n]: toward them the numbers lie at the start."""
        form = scales.grid(fmt)
        assert form is not None and movable(fmt)
        self.form = form
        rows, n = weights.shape
        self.levels = torch.from_numpy(form.levels).to(device)
        self.borders = (self.levels[1:] + self.levels[:-1]) / 2
        self.distance = float(np.diff(form.levels).mean())
        halves = torch.arange(2 * form.levels[0], 2 * form.levels[-1] + 1, device=device) / 2
        self.by_half = self._levels_of(halves + 0.25)
        d, dmin, ls, lm = scales.read(fmt, data.reshape(rows * n // form.block, -1))
        step, offset = (
            torch.from_numpy(np.ascontiguousarray((x * y).T)).to(device).view(rows, n // form.group, 1)
            for x, y in ((d, ls), (-dmin, lm))
        )
        self.size = step.view(rows, -1)
        safe = torch.where(step == 0, 1.0, step)  # of size 0 all codes are alike

        def numbers(values: np.ndarray) -> torch.Tensor:
            """Weights in levels."""
            return torch.from_numpy(values).to(device).view(*step.shape[:2], -1).sub(offset).div_(safe).view(rows, n)

        held = self._levels_of(numbers(codec.dequantize(data, fmt)))
        room = torch.nn.functional.pad(self.levels.diff(), (1, 1), value=torch.inf)
        room = (EDGE / 2 * torch.minimum(room[:-1], room[1:]))[torch.bucketize(held, self.borders)]
        near = numbers(np.ascontiguousarray(weights)).sub_(held)
        self.z = torch.minimum(near, room).maximum(-room).add_(held).div_(self.distance)
        self.snap()
        wrong = (self.points != held).view(rows, -1, 8).any(-1).repeat_interleave(8, 1)
        self.z = torch.where(wrong, held / self.distance, self.z)
        self.snap()
        self.grad, self.mean, self.square = (torch.zeros_like(self.z) for _ in range(3))
        self.turns, self.taken = torch.zeros_like(self.z, dtype=torch.uint8), 0

    def _levels_of(self, values: torch.Tensor) -> torch.Tensor:
        """The levels nearest to values, float32."""
        return self.levels[torch.bucketize(values, self.borders)]

    @torch.no_grad()
    def snap(self) -> None:
        """Bring `points` to the numbers."""
        x = self.z * self.distance
        if self.form.book is not None:
            self.points = self._entries(x)
        elif torch.equal(self.levels.diff(), torch.ones_like(self.levels[1:])):
            self.points = x.round_().clamp_(self.levels[0], self.levels[-1])
        else:  # levels are integers, so the borders between them are multiples of a half
            low, high = 2 * self.levels[0], 2 * self.levels[-1]
            halves = x.mul_(2).floor_().clamp_(low, high).sub_(low).long()
            self.points = self.by_half[halves]

    def _entries(self, x: torch.Tensor) -> torch.Tensor:
        book = self.form.book
        assert book is not None
        groups = x.view(-1, 8)
        if x.device.type == "cpu":
            form, near = lattice(book.source), book.coordinates
            rest = form.low, form.spacing, form.top, book.signs == 2
            work = groups.numpy()
            codec.spread(lambda part: snap.entries(work[part], near, *rest), len(work), ROWS, torch.get_num_threads())
        else:
            for start in range(0, len(groups), ROWS):
                groups[start : start + ROWS] = nearest_entries(groups[start : start + ROWS], book)
        return x

    @torch.no_grad()
    def take(self, gradient: torch.Tensor, m: torch.Tensor) -> None:
        """Add to `grad` from the gradient by the weights [rows, n], where d is multiplied by m [rows, blocks]."""
        size = (self.size.view(*m.shape, -1) * m[..., None] * self.distance).view(*self.size.shape, 1)
        self.grad.view(*self.size.shape, -1).addcmul_(gradient.reshape(*self.size.shape, -1), size)

    @torch.no_grad()
    def step(self, length: float) -> None:
        """Take a step against `grad`, `length` of the distance of two codes where gradients agree, and decode."""
        self.taken += 1
        self.mean.lerp_(self.grad, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(self.grad, self.grad, value=1 - BETAS[1])
        root = self.square.div(1 - BETAS[1] ** self.taken).sqrt_().add_(EPS)
        u = self.mean.div(1 - BETAS[0] ** self.taken).div_(root)
        self.z.addcmul_(u, u.abs(), value=-length)
        self.moved()

    @torch.no_grad()
    def moved(self) -> None:
        """Keep the numbers within reach of the levels, bring back those that turn to and fro, and decode."""
        before = self.points
        self.z.clamp_(float(self.levels[0]) / self.distance - 0.5, float(self.levels[-1]) / self.distance + 0.5)
        self.z = torch.where(self.turns < TURNS, self.z, before / self.distance)
        self.snap()
        self.turns.add_(self.points != before).clamp_(max=TURNS)

    def weights(self, m: torch.Tensor) -> torch.Tensor:
        """Decoded, without offsets: float32 [rows, n], where d is multiplied by m [rows, blocks]."""
        size = (self.size.view(*m.shape, -1) * m[..., None]).view(*self.size.shape, 1)
        return (self.points.view(*self.size.shape, -1) * size).view(self.points.shape)

    def codes(self) -> torch.Tensor:
        """uint8 [rows, n], the numbers of `points` among the levels."""
        return torch.bucketize(self.points, self.borders).to(torch.uint8)


def encoded(fmt: str, data: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """uint8 bytes of `data`'s shape, with its scales and other codes, uint8 [rows, n]."""
    form = scales.grid(fmt)
    assert form is not None
    rows, n = codes.shape
    read = scales.read(fmt, data.reshape(rows * n // form.block, -1))
    by_row = (np.ascontiguousarray(x.reshape(-1, rows, n // form.block).transpose(2, 0, 1)) for x in read)
    d, dmin, ls, lm = (x.reshape(-1, rows) for x in by_row)
    out = np.empty_like(data.reshape(rows, -1))
    kept = scales.Scales(d, dmin, ls, lm, np.ones(rows, np.float32))
    scales.write(form, kept, np.ascontiguousarray(codes.T), out)
    return out.reshape(data.shape)


def nearest_entries(x: torch.Tensor, book: scales.Book) -> torch.Tensor:
    """What dynq.kernels.snap.entries does, with every entry looked at: float32 [groups, 8] of the points' own."""
    entries = torch.from_numpy(lattice(book.source).entries).to(x.device)
    size = x.abs().view(-1, book.dim)
    far = torch.addmm((entries**2).sum(1), size, entries.T, alpha=-2)
    found = entries[far.argmin(1)].view(-1, 8)
    sign = torch.where(x < 0, -1.0, 1.0)
    if book.signs == 2:
        turn = (x.abs() * found).argmin(1, keepdim=True)
        odd = sign.prod(1, keepdim=True) < 0
        sign = sign.scatter(1, turn, torch.where(odd, -1.0, 1.0) * sign.gather(1, turn))
    return found * sign
