"""KL divergence, perplexity and top-1 agreement, scored as ``llama-perplexity --kl-divergence`` does it.

The text is cut into chunks of n_ctx tokens; each chunk is one forward pass, and the predictions from position
n_ctx / 2 on are scored (tools/perplexity of llama.cpp). The reference's log-probabilities are computed once and kept
in a file of 16 bits each, with 32 nats of range below the best token. llama.cpp's own file keeps 16; at 24 a confident
position over 150,000 tokens still shows a divergence of 7e-5 from itself.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dynq import layerwise
from dynq.errors import DynqError
from dynq.files import disk_array, replacing
from dynq.kernels import divergence
from dynq.progress import progress

BATCH = 2  # chunks in one pass, and of a task where workers share them
RANGE = 32.0  # nats below the best token that the file can tell apart; step RANGE / 65535 = 0.0005
STEP = np.float32(RANGE / 65535)
TOP_PERCENTILES = (99.9, 99.0, 95.0, 90.0)
LOW_PERCENTILES = (10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True)
class Coded:
    """Log-probabilities of a chunk as they are stored: ``offset + step * codes``.

    codes uint16 ``[scored, n_vocab]``; step, offset float32 ``[scored]``; normalise: whether they are to be made to sum
    to 1 again.
    """

    codes: np.ndarray
    step: np.ndarray
    offset: np.ndarray
    normalise: bool

    def log_probs(self, device: Any = "cpu") -> torch.Tensor:
        """float32 ``[scored, n_vocab]``."""
        codes, step, offset = (torch.from_numpy(np.array(x)).to(device) for x in (self.codes, self.step, self.offset))
        log_p = codes.float().mul_(step[:, None]).add_(offset[:, None])
        return _normalised(log_p) if self.normalise else log_p


class Base(Protocol):
    """What a model is measured against: `Reference`, or a file of llama-perplexity's."""

    @property
    def tokens(self) -> np.ndarray:
        """int32 ``[n_chunks, n_ctx]``."""

    @property
    def first(self) -> int:
        """The first scored position."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def floor(self) -> float | None:
        """Tokens at or below this log-probability do not count in the KLD; None: all count."""

    def coded(self, chunk: int) -> Coded: ...


@dataclass(frozen=True)
class Reference:
    """The original model's log-probabilities on the evaluation text.

    tokens int32 ``[n_chunks, n_ctx]``; positions ``first .. n_ctx - 2`` of each chunk are scored; depth uint16
    ``[n_chunks, scored, n_vocab]`` (a memory map): how many steps a token lies below the best one. path: of its files,
    as which it travels to other processes.
    """

    tokens: np.ndarray
    first: int
    depth: np.ndarray
    path: Path | None = None

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.path is None else (open_reference, (self.path,))

    @property
    def scored(self) -> int:
        """Scored predictions in one chunk."""
        return self.tokens.shape[1] - 1 - self.first

    @property
    def n_vocab(self) -> int:
        return int(self.depth.shape[2])

    @property
    def floor(self) -> None:
        return None

    def coded(self, chunk: int) -> Coded:
        return coded(self.depth[chunk])


def coded(depth: np.ndarray) -> Coded:
    """What `depth_of` gives: rounded to 16 bits, so the log-probabilities are to be normalised again."""
    zero = np.zeros(len(depth), np.float32)
    return Coded(depth, zero - STEP, zero, normalise=True)


@torch.inference_mode()
def log_probabilities(
    model: Any, tokens: np.ndarray, first: int, *, batch: int = BATCH, desc: str = "reference"
) -> Iterator[torch.Tensor]:
    """Log-probabilities of a model chunk by chunk, float32 ``[scored, n_vocab]`` on the model's device."""
    for logits in each_chunk(model, tokens, first, batch, desc):
        yield log_softmax(logits)


@torch.inference_mode()
def each_chunk(model: Any, tokens: np.ndarray, first: int, batch: int, desc: str) -> Iterator[torch.Tensor]:
    """Logits float32 ``[scored, n_vocab]`` of each chunk."""
    if layerwise.reader(model):
        for hidden in layerwise.through(model, tokens, desc):
            yield layerwise.leave(model, hidden[:, first:-1])[0].float()
        return
    for chunks in _batches(range(len(tokens)), batch, desc):
        yield from forward(model, tokens[chunks.start : chunks.stop], first)


def forward(model: Any, tokens: np.ndarray, first: int) -> torch.Tensor:
    """Logits float32 ``[chunks, scored, n_vocab]`` of a few chunks."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    # logits_to_keep spares the head the positions that are not scored
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
    return logits[:, :-1].float()


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits float32 ``[..., n_vocab]``."""
    return _normalised(logits - logits.amax(-1, keepdim=True))


def _normalised(below: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits whose largest is 0, in place.

    torch.log_softmax is 1e-5 nats too high over 150,000 tokens: in a KLD a floor, where the other side has none.
    """
    return below.sub_(below.exp().sum(-1, keepdim=True).log_())


def _batches(chunks: range, batch: int, desc: str) -> Iterator[range]:
    parts = [chunks[start : start + batch] for start in range(0, len(chunks), batch)]
    yield from progress(parts, desc=desc, unit="batch") if desc else parts


def make_reference(
    model: Any, tokens: np.ndarray, path: Path, *, first: int | None = None, batch: int = BATCH, desc: str = "reference"
) -> Reference:
    """Run the original once over tokens int32 ``[n_chunks, n_ctx]`` and keep its log-probabilities under ``path``.

    ``path`` names two files, ``path.json`` and ``path.u16``. first: the first scored position, n_ctx / 2 by default.
    Raises DynqError where the disk has no room, before anything is computed.
    """
    first = tokens.shape[1] // 2 if first is None else first
    log_probs = log_probabilities(model, tokens, first, batch=batch, desc=desc)
    return keep_reference(log_probs, tokens, first, model.config.get_text_config().vocab_size, path)


def keep_reference(
    log_probs: Iterable[torch.Tensor], tokens: np.ndarray, first: int, n_vocab: int, path: Path
) -> Reference:
    """Keep log-probabilities, float32 ``[scored, n_vocab]`` for each chunk of tokens, as `make_reference` does."""
    return keep_depths(map(depth_of, log_probs), tokens, first, n_vocab, path)


def depth_of(log_p: torch.Tensor) -> np.ndarray:
    """Log-probabilities float32 ``[scored, n_vocab]`` of a chunk as a `Reference` keeps them."""
    steps = (log_p.amax(-1, keepdim=True) - log_p).div_(float(STEP)).round_().clamp_(max=65535)
    return steps.to(torch.uint16).cpu().numpy()


def keep_depths(depths: Iterable[np.ndarray], tokens: np.ndarray, first: int, n_vocab: int, path: Path) -> Reference:
    """`keep_reference` of what `depth_of` gives for each chunk."""
    shape = (len(tokens), tokens.shape[1] - 1 - first, n_vocab)
    need, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free:
        raise DynqError(
            f"{path.parent}: the reference's log-probabilities need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
            "free; take fewer chunks or another folder"
        )
    with replacing(path.with_suffix(".u16")) as beside:
        depth = disk_array(beside, np.uint16, shape)
        for chunk, steps in enumerate(depths):
            depth[chunk] = steps
        depth.flush()
        del depth
    header = {"first": first, "n_vocab": shape[2], "tokens": tokens.tolist()}
    path.with_suffix(".json").write_text(json.dumps(header))
    return open_reference(path)


def open_reference(path: Path) -> Reference:
    """Open what `make_reference` wrote; nothing but the tokens is read into memory."""
    header = json.loads(path.with_suffix(".json").read_text())
    tokens = np.array(header["tokens"], dtype=np.int32)
    shape = (len(tokens), tokens.shape[1] - 1 - header["first"], header["n_vocab"])
    file = path.with_suffix(".u16")
    size, expected = file.stat().st_size, 2 * int(np.prod(shape))
    if size != expected:
        raise DynqError(f"{file}: {size} bytes where {expected} are expected; delete it, it is made anew")
    return Reference(tokens, header["first"], np.memmap(file, np.uint16, "r", shape=shape), path.absolute())


@dataclass(frozen=True)
class TokenScores:
    """One entry for each scored token, float64 ``[n]`` each (same_top: bool).

    kld in nats; nll and nll_base: -log p of the token that follows in the text, quantized and original; p_diff: change
    of its probability.
    """

    kld: np.ndarray
    nll: np.ndarray
    nll_base: np.ndarray
    p_diff: np.ndarray
    same_top: np.ndarray


def measure(
    model: Any, reference: Base, *, skip: int = 0, chunks: int | None = None, batch: int = BATCH, desc: str = "evaluate"
) -> TokenScores:
    """Scores of a model against the reference, token by token, on its first ``chunks`` chunks (all by default).

    The first ``skip`` of them are left out. An empty desc means no progress bar.
    """
    if model.config.get_text_config().vocab_size != reference.n_vocab:
        raise DynqError(
            f"the model has {model.config.get_text_config().vocab_size} tokens in its vocabulary, the reference "
            f"{reference.n_vocab}: not the same model"
        )
    total = len(reference.tokens) if chunks is None else min(chunks, len(reference.tokens))
    rows = range(skip, total)
    return score(each_chunk(model, reference.tokens[skip:total], reference.first, batch, desc), reference, rows)


@torch.inference_mode()
def score(logits: Iterable[torch.Tensor], reference: Base, rows: Iterable[int] | None = None) -> TokenScores:
    """Scores of logits float32 ``[scored, n_vocab]``, one for each of these chunks of the reference, by default all."""
    parts = []
    for chunk, own in zip(range(len(reference.tokens)) if rows is None else rows, logits, strict=True):
        targets = reference.tokens[chunk, reference.first + 1 :].astype(np.int64)
        compare = _compare if own.device.type == "cpu" else compare_in_torch
        parts.append(compare(own, reference.coded(chunk), targets, reference.floor))
    values, same_top = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    kld, nll, nll_base = np.ascontiguousarray(values.T)
    return TokenScores(kld, nll, nll_base, np.exp(-nll) - np.exp(-nll_base), same_top)


def _compare(
    logits: torch.Tensor, base: Coded, targets: np.ndarray, floor: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `compare_in_torch` gives, by the compiled kernel on as many threads as torch has."""
    values, same_top = np.empty((len(targets), 3)), np.empty(len(targets), np.bool_)
    rows, lowest = logits.contiguous().numpy(), np.float32(-np.inf if floor is None else floor)

    def work(part: np.ndarray) -> None:
        own = slice(part[0], part[-1] + 1)
        coded = (np.ascontiguousarray(x[own]) for x in (base.codes, base.step, base.offset))
        divergence.compare_rows(rows[own], *coded, targets[own], base.normalise, lowest, values[own], same_top[own])

    threads = min(torch.get_num_threads(), len(targets))
    parts = np.array_split(np.arange(len(targets)), threads)
    if threads == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return values, same_top


def compare_in_torch(
    logits: torch.Tensor, base: Coded, targets: np.ndarray, floor: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """float64 ``[scored, 3]`` (kld, nll, nll_base) and same_top bool ``[scored]``, on the device of the logits.

    logits float32 ``[scored, n_vocab]``; targets int64 ``[scored]``: the tokens that follow.
    """
    lq, lp = log_softmax(logits), base.log_probs(logits.device)
    target = torch.from_numpy(targets).to(logits.device)
    nll, nll_base = (-x.gather(-1, target[:, None])[:, 0] for x in (lq, lp))
    terms = lp.exp() * (lp - lq)
    if floor is not None:
        terms[lp <= floor] = 0
    values = torch.stack([terms.sum(-1), nll, nll_base], -1).double()
    return values.cpu().numpy(), (lp.argmax(-1) == lq.argmax(-1)).cpu().numpy()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, as llama-perplexity computes them."""
    n = len(values)
    return float(values.mean()), float(np.sqrt(max(values.var(), 0.0) / (n - 1))) if n > 10 else 0.0


def statistics(scores: TokenScores) -> dict[str, float]:
    """The table that ``llama-perplexity --kl-divergence`` prints, under its names; errors end in " ±".

    Probability changes and agreements are fractions, not percent.
    """
    out: dict[str, float] = {}

    def put(name: str, value: float, error: float) -> None:
        out[name], out[f"{name} ±"] = float(value), float(error)

    (nll, nll_error), (base, base_error) = mean_and_error(scores.nll), mean_and_error(scores.nll_base)
    n = len(scores.nll)
    covariance = float(np.mean(scores.nll * scores.nll_base) - nll * base) / (n - 1) if n > 10 else 0.0
    ppl, ppl_base = np.exp(nll), np.exp(base)
    put("Mean PPL(Q)", ppl, ppl * nll_error)
    put("Mean PPL(base)", ppl_base, ppl_base * base_error)
    out["Cor(ln(PPL(Q)), ln(PPL(base)))"] = covariance / (nll_error * base_error) if nll_error * base_error else 1.0
    ratio_error = float(np.sqrt(max(nll_error**2 + base_error**2 - 2 * covariance, 0.0)))
    put("Mean ln(PPL(Q)/PPL(base))", nll - base, ratio_error)
    put("Mean PPL(Q)/PPL(base)", np.exp(nll - base), np.exp(nll - base) * ratio_error)
    difference = (ppl * nll_error) ** 2 + (ppl_base * base_error) ** 2 - 2 * ppl * ppl_base * covariance
    put("Mean PPL(Q)-PPL(base)", ppl - ppl_base, np.sqrt(max(difference, 0.0)))
    put("Mean KLD", *mean_and_error(scores.kld))
    _spread(out, "KLD", scores.kld, TOP_PERCENTILES, LOW_PERCENTILES)
    put("Mean Δp", *mean_and_error(scores.p_diff))
    _spread(out, "Δp", scores.p_diff, (*TOP_PERCENTILES, 75.0), (25.0, *LOW_PERCENTILES))
    square, square_error = mean_and_error(scores.p_diff**2)
    rms = np.sqrt(square)
    put("RMS Δp", rms, 0.5 / rms * square_error if rms else 0.0)
    same = float(scores.same_top.mean())
    put("Same top p", same, np.sqrt(same * (1 - same) / (n - 1)))
    return out


def _spread(
    out: dict[str, float], name: str, values: np.ndarray, above: tuple[float, ...], below: tuple[float, ...]
) -> None:
    out[f"Maximum {name}"] = float(values.max())
    out.update({f"{p}% {name}": float(np.percentile(values, p)) for p in above})
    out[f"Median {name}"] = float(np.median(values))
    out.update({f"{p}% {name}": float(np.percentile(values, p)) for p in below})
    out[f"Minimum {name}"] = float(values.min())
