"""The encoding level `feedback`: the output error of a linear layer instead of the error of its weights.

With the inputs X of a layer y = W x the squared output error of a quantized What is ``|X (W - What)^T|^2 =
tr(D H D^T)``, D = W - What, H = X^T X. It is made small in three ways, the block formats untouched:

1. a walk over the columns from left to right, each choosing codes that make up for the errors before it (GPTQ,
   Frantar et al. 2022); a block's scales come from the plain encoder, run on the compensated weights, and each group
   takes the best of several scales around those; weights that share an entry of a code book are chosen together,
2. sweeps over the groups of weights that share a scale: all others fixed, choose scale and codes anew (coordinate
   descent on blocks of weights, as QuIP and QuantEase do on single ones),
3. after each sweep the best super-block floats d and dmin by least squares. Steps 2 and 3 are taken only where they
   lower ``tr(D H D^T)``.

Rows are independent in this; with the gradients of the outputs they make up for each other too (`dynq.coupling`).

An H of few inputs or domains is not the H of others. It is shrunk toward its diagonal by a fraction, the largest that
errs at most `TOLERANCE` more than the best on inputs kept aside, and a larger one where a domain that is left out of
the fit would lose. Where none serves, the tensor is encoded plainly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from dynq import codec, coupling, formats
from dynq.compensate import Metric, encode_rows, on_card, shrunk
from dynq.errors import DynqError
from dynq.kernels import scales
from dynq.kernels.arrays import Array, beside, host, namespace, placed, single

SHRINKAGE = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05)  # tried from the left, until the error rises
TOLERANCE = 0.01
GAIN = 0.98  # of the plain (or search) error, at most, in every domain: less of a gain may be chance
ROWS = 256  # rows worked on at a time; the bytes depend on it, as sums of matrix products do on their shape
GUARD, GUARD_ROWS = 0.99, 64  # largest error ratio of a domain that was left out, and the rows it is measured on
TRIAL_ROWS = 128  # rows on which the shrinkage is chosen
FITTED, ASIDE = 1, 0.25  # inputs needed per column; with fewer the tensor is not fed back
F = np.float32


@dataclass(frozen=True)
class Hessian:
    """Sum of w_s x_s x_s^T over the inputs x_s of a layer: matrix float [n, n], and how many inputs there were."""

    matrix: Array
    tokens: int

    def ordered(self, order: np.ndarray) -> "Hessian":
        """The same with the inputs in another order."""
        return Hessian(self.matrix[np.ix_(order, order)], self.tokens)


Inputs = np.ndarray | Hessian


@dataclass(frozen=True)
class Encoded:
    """data uint8 [..., row_bytes]; level: what was chosen, `feedback`, `search` or `plain`.

    shrinkage: of the Hessian, None without feedback. ratios: error on each of the inputs kept aside / plain's, of the
    rows that were tried; empty where nothing could be judged. reason: why there is no feedback, or "". coupled: error
    ``tr(G D H D^T)`` on what is kept aside over that of rows alone, 1 where rows are alone. best: see `best`, float32
    [rows, n], None without feedback.
    """

    data: np.ndarray
    level: str
    shrinkage: float | None
    ratios: tuple[float, ...]
    reason: str
    coupled: float = 1.0
    best: np.ndarray | None = None


def hessian(inputs: np.ndarray) -> Hessian:
    """The Hessian of inputs [tokens, n].

    Hessians of batches of one domain may be added. DynqError for another shape, NaN or infinity.
    """
    x = np.asarray(inputs, np.float64)
    if x.ndim != 2:
        raise DynqError(f"inputs of a layer are [tokens, n], got shape {x.shape}")
    if not np.isfinite(x).all():
        raise DynqError("inputs of a layer must be finite")
    return Hessian(x.T @ x, len(x))


def output_error(weights: np.ndarray, decoded: np.ndarray, inputs: Inputs) -> float:
    """|X (W - What)^T|^2 = tr(D H D^T) in float64; weights and decoded [rows, n]."""
    weights, decoded = np.asarray(weights), np.asarray(decoded)
    if weights.shape != decoded.shape or weights.ndim != 2:
        raise DynqError(f"weights {weights.shape} and decoded {decoded.shape} must be equal matrices")
    return _error(weights, decoded, _checked(inputs, weights.shape[-1], "cpu"))


# the products are small: threads of BLAS, beside our own over rows, take six times the processor's time
@threadpool_limits.wrap(limits=1, user_api="blas")
def encode(
    weights: np.ndarray,
    fmt: str,
    fit: Inputs | Sequence[Inputs],
    aside: Inputs | Sequence[Inputs],
    importance: np.ndarray | None = None,
    *,
    gradients: tuple[np.ndarray, np.ndarray] | None = None,
    guard: bool = True,
    threads: int | None = None,
    device: str = "cpu",
) -> Encoded:
    """Encode float32 weights [rows, n] so that the outputs of a layer err little.

    fit, aside: inputs [tokens, n] or their Hessians, one for each domain: those that are fitted, and those that decide
    how far the fit is trusted. The latter must come from other passages of text. When the shrinkage has been chosen,
    both are fitted.
    importance: float32 [n], of the plain encoding that feedback is measured against and falls back to; default: the
    mean square of all inputs.
    gradients: sums of |x|^2 g g^T [rows, rows] over tokens, x their inputs and g the gradient at their outputs
    (`dynq.output_gradients`), to fit and kept aside. With them rows are coupled where that pays on what is kept aside.
    guard: protect domains that were not calibrated. Each fitted domain is left out once and must not lose; this takes
    at least two domains. False where the model will see nothing but what is fitted here.
    device: as torch names it; the processor where a card has no room for the Hessians. On a card sums of products come
    in another order, so in a few rows of a thousand some codes may differ from the processor's.

    Falls back to the better of `search` and `plain`, and says why, for a format without feedback, too few inputs, or
    where inputs kept aside do not gain. The same input gives the same bytes, whatever `threads` is.
    DynqError for what `codec.quantize` refuses, and for Hessians that do not fit, are not finite, or have a negative
    diagonal.
    """
    weights = np.asarray(weights)
    if weights.ndim != 2:
        raise DynqError(f"feedback works on matrices [rows, n], got shape {weights.shape}")
    rows, n = weights.shape
    formats.row_bytes(fmt, n)
    domains = [[inputs] if isinstance(inputs, Hessian | np.ndarray) else inputs for inputs in (fit, aside)]
    device = _with_room(device, n, sum(map(len, domains)))
    fitted, kept = ([_checked(one, n, device) for one in some] for some in domains)
    both = _sum([*fitted, *kept], n)
    if importance is None and (both.matrix.diagonal().any() or formats.get(fmt).needs_importance):
        importance = host(both.matrix.diagonal())
    weights = np.ascontiguousarray(weights, dtype=F)
    candidates = {
        level: codec.quantize(weights, fmt, importance, level=level, threads=threads, device=device)
        for level in codec.LEVELS
    }
    trial = np.arange(min(rows, TRIAL_ROWS)) * rows // max(1, min(rows, TRIAL_ROWS))
    part = np.ascontiguousarray(weights[trial])

    def errors(data: np.ndarray) -> np.ndarray:
        decoded = codec.dequantize(data, fmt, threads=threads)
        return np.array([_error(part, decoded, h) for h in kept])

    plain, search = (errors(candidates[level][trial]) for level in codec.LEVELS)
    judged = plain > 0
    form, total, ratios = scales.grid(fmt), _sum(fitted, n), list[np.ndarray]()
    reason = _unfit(fmt, form, fitted, kept, total.matrix)
    if not reason and guard and sum(h.tokens > 0 for h in fitted) < 2:
        reason = "a single domain is fitted, which says nothing of others (guard=False allows it)"
    if not reason and not judged.any():
        reason = "plain encoding makes no error on the inputs kept aside"
    if form is not None and not reason:
        for shrinkage in SHRINKAGE:
            ratios.append(errors(_feedback(part, form, total.matrix, shrinkage, threads))[judged] / plain[judged])
            means = [_mean(r) for r in ratios]
            if means[-1] > (1 + TOLERANCE) * min(means):
                break
        # from the chosen shrinkage on to stronger ones, until no domain loses
        for at in range(int(np.argmax(means <= (1 + TOLERANCE) * np.min(means))), -1, -1):
            worst = ratios[at].max()
            if (ratios[at] > GAIN * np.minimum(1, search[judged] / plain[judged])).any():
                reason = f"inputs kept aside do not gain in every domain (error ratios up to {worst:.3f})"
                continue
            left_out = _left_out(part, form, fitted, SHRINKAGE[at], threads) if guard else 0.0
            if left_out > GUARD:
                reason = f"a domain that is left out loses (error ratio {left_out:.3f})"
                continue
            h = shrunk(both.matrix, SHRINKAGE[at])
            alone = _encoder(form, h, threads)
            data, coupled, R = alone(weights), 1.0, None
            if gradients is not None:
                data, coupled, R = _coupled(weights, form, alone, data, gradients, _sum(kept, n), threads)
            found = best(weights, codec.dequantize(data, fmt, threads=threads), h, R)
            return Encoded(data, "feedback", SHRINKAGE[at], tuple(map(float, ratios[at])), "", coupled, found)
    better = bool((search <= GAIN * plain).all())
    level = "search" if better else "plain"
    won = (search if better else plain)[judged] / plain[judged]
    return Encoded(candidates[level], level, None, tuple(map(float, won)), reason)


def best(weights: np.ndarray, decoded: np.ndarray, h: Array, R: np.ndarray | None) -> np.ndarray:
    """What each weight alone would best be, all others as decoded: float32 [rows, n].

    ``tr(G D H D^T)``, G = R R^T (rows alone: the identity), is a parabola in an entry of D = decoded - weights, and
    least where that is lower by ``(G D H)_ij / (G_ii H_jj)``.
    """
    error = beside(decoded - weights, h)
    pull = host(error @ single(h)) / host(single(h.diagonal()))
    if R is not None:
        G = (R @ R.T).astype(F)
        pull = G @ pull / G.diagonal()[:, None]
    return decoded - pull


def _coupled(
    weights: np.ndarray,
    form: scales.Grid,
    rows: Callable[[np.ndarray], np.ndarray],
    alone: np.ndarray,
    gradients: tuple[np.ndarray, np.ndarray],
    judge: Hessian,
    threads: int | None,
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """Bytes with rows coupled, their `Encoded.coupled`, and R; those of rows alone, and 1, where that does not pay."""
    factor = coupling.factor(*gradients)
    if factor is None:
        return alone, 1.0, None
    decoded = partial(codec.dequantize, fmt=form.name, threads=threads)
    data = coupling.encode(weights, factor, rows, decoded)
    new, old = (coupling.error(weights, decoded(each), gradients[1], host(judge.matrix)) for each in (data, alone))
    return (data, new / old, factor) if old > 0 and new <= coupling.GAIN * old else (alone, 1.0, None)


def too_few(fit: Sequence[Hessian], aside: Sequence[Hessian], n: int) -> str:
    """Why so many inputs do not serve a matrix of n columns, or ""."""
    fitted, kept = (sum(h.tokens for h in some) for some in (fit, aside))
    if fitted < FITTED * n:
        return f"{fitted} inputs to fit, at least {FITTED * n} are needed"
    return f"{kept} inputs kept aside, at least {ASIDE * n:.0f} are needed" if kept < ASIDE * n else ""


def _unfit(fmt: str, form: scales.Grid | None, fitted: Sequence[Hessian], kept: Sequence[Hessian], total: Array) -> str:
    """Why feedback cannot be tried, or ""."""
    if form is None:
        return f"{fmt} has no feedback"
    return too_few(fitted, kept, len(total)) or ("" if total.diagonal().any() else "all inputs are zero")


def _error(weights: np.ndarray, decoded: np.ndarray, h: Hessian) -> float:
    error = beside(weights.astype(np.float64) - decoded, h.matrix)
    return float(((error @ h.matrix) * error).sum())


def _left_out(
    part: np.ndarray, form: scales.Grid, fitted: list[Hessian], shrinkage: float, threads: int | None
) -> float:
    """The worst error ratio of a domain when only the others are known, to plain too: what others may fare like."""
    part, worst = part[:: max(1, len(part) // GUARD_ROWS)], 0.0
    for k, domain in enumerate(fitted):
        others = _sum([h for i, h in enumerate(fitted) if i != k], part.shape[1]).matrix
        if not domain.tokens or not others.diagonal().any():
            continue
        plain = codec.quantize(part, form.name, host(others.diagonal()), threads=threads)
        ours = _feedback(part, form, others, shrinkage, threads)
        after, before = (_error(part, codec.dequantize(x, form.name, threads=threads), domain) for x in (ours, plain))
        worst = max(worst, after / before) if before > 0 else worst
    return worst


def _mean(ratios: np.ndarray) -> float:
    return float(np.exp(np.log(np.maximum(ratios, 1e-30)).mean()))


def _checked(inputs: Inputs, n: int, device: str) -> Hessian:
    if not isinstance(inputs, Hessian):
        inputs = hessian(inputs)
    h = placed(np.asarray(inputs.matrix, dtype=np.float64), device)
    if h.shape != (n, n):
        raise DynqError(f"a Hessian has shape {tuple(h.shape)}, the rows have {n} weights")
    xp, diagonal = namespace(h), host(h.diagonal())
    if not xp.isfinite(h).all():
        raise DynqError("a Hessian is not finite")
    if (diagonal < 0).any():
        raise DynqError(f"a Hessian has a negative diagonal at column {int(np.argmax(diagonal < 0))}")
    if (abs(h - h.T) > 1e-4 * diagonal.max(initial=0)).any():
        raise DynqError("a Hessian is not symmetric")
    size = beside(np.sqrt(diagonal), h)
    if (abs(h) > 1.001 * size[:, None] * size + 1e-9 * diagonal.max(initial=0)).any():
        raise DynqError("a Hessian is no sum of x x^T: an entry is larger than its diagonal allows")
    return Hessian(h, inputs.tokens)


def _with_room(device: str, n: int, hessians: int) -> str:
    """The device, or the processor where so many Hessians and what is made of them do not fit."""
    if not device.startswith("cuda"):
        return device
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return device if (hessians + 8) * 8 * n * n < free else "cpu"


def _sum(parts: Sequence[Hessian], n: int) -> Hessian:
    total = beside(np.zeros((n, n)), parts[0].matrix) if parts else np.zeros((n, n))
    return Hessian(sum((h.matrix for h in parts), total), sum(h.tokens for h in parts))


def _feedback(weights: np.ndarray, form: scales.Grid, h: Array, shrinkage: float, threads: int | None) -> np.ndarray:
    """All three steps with one shrinkage, where h is: uint8 [rows, row_bytes]."""
    return _encoder(form, shrunk(h, shrinkage), threads)(weights)


def _encoder(form: scales.Grid, h: Array, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """`_feedback` of any rows, h shrunk; what depends on it alone is computed once."""
    metric = Metric.of(h, form.group)

    def encoded(weights: np.ndarray) -> np.ndarray:
        if not isinstance(h, np.ndarray):  # all rows at once keep a card busy
            with namespace(h).cuda.device_of(h):
                return encode_rows(weights, form, metric, on_card())
        out = np.empty((len(weights), formats.row_bytes(form.name, weights.shape[1])), np.uint8)

        def work(part: slice) -> None:
            out[part] = encode_rows(weights[part], form, metric)

        codec.spread(work, len(weights), ROWS, threads)
        return out

    return encoded
