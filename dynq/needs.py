"""What each step of a run needs, before it begins: memory, disk, bytes read and time, from shapes and parameters.

Arithmetic on a `Shape`; the docstring of each function has its formula. N are all weights, P those that a token is
multiplied by, A the values that its products read and give, V the vocabulary, T the tokens of a text, D its domains.
Constants of time are seconds of one core that multiplies float32 matrices at `CORE` operations a second (a Xeon of
2023 with AVX-512), measured on dynq-tiny and on a llama of 58 M weights; one matrix product on the machine at hand
scales them (`dynq.machine`). Memory is what comes on top of the idle interpreter. Right to about a factor of two.

With a card the model, its activations and what is multiplied by samples lie there; tensors on their way, encoders and
export stay on the processor. Time is reckoned for the processor alone: how much faster a card is hangs on what is done
beside its products, and no product of matrices tells that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from dynq import feedback, formats, kv_cache, memory
from dynq.calibrate import ON_CARD
from dynq.layer_inputs import BUDGET, WIDE
from dynq.machine import CORE, F32, Machine
from dynq.schedule import chunks_a_step, side_by_side
from dynq.tune import COPIES

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint, TensorInfo

LOADED = 4e9  # bytes of weights a second from memory, one thread, where few tokens are multiplied by them
FORWARD = 2.5e-9  # seconds for each value that a product reads or gives: norms, activations, attention
PROBE = 3.5e-9  # for each weight and sequence: the cross-token factor's rounding error
CHOSEN = 60e-9  # for each entry of the vocabulary and token: softmax and labels drawn from it
HEAD = 40e-9  # for each entry of the vocabulary and sample: the head's exact divergence
COMPARED = 10e-9  # for each weight and format beside encoder and product: decode, subtract, sum up
FED_BACK = 0.4e-6  # for each weight that error feedback encodes, tries included
MOVED = 40e-9  # for each weight and step of tuning where codes move: latent numbers, Adam, the nearest points
CALLED = 1.1e-3  # for each layer and step of sampling: what a call costs before it computes
CACHED = 0.1e-9  # for each byte of keys and values that a step of sampling reads
STARTED = 5.0  # for each notebook: its process, what it imports, its pictures
ENCODE = {  # for each weight, `plain` and `search`: 128 x 4096 weights with importance
    "F32": (0.3e-9, 0.3e-9),
    "F16": (0.8e-9, 0.8e-9),
    "BF16": (0.7e-9, 0.7e-9),
    "Q4_0": (11e-9, 15e-9),
    "Q4_1": (13e-9, 27e-9),
    "Q5_0": (10e-9, 14e-9),
    "Q5_1": (12e-9, 27e-9),
    "Q8_0": (1.9e-9, 1.9e-9),
    "Q2_K": (24e-9, 61e-9),
    "Q3_K": (13e-9, 35e-9),
    "Q4_K": (17e-9, 50e-9),
    "Q5_K": (15e-9, 50e-9),
    "Q6_K": (11e-9, 30e-9),
    "IQ1_S": (47e-9, 123e-9),
    "IQ1_M": (41e-9, 127e-9),
    "IQ2_XXS": (71e-9, 159e-9),
    "IQ2_XS": (77e-9, 165e-9),
    "IQ2_S": (48e-9, 150e-9),
    "IQ3_XXS": (80e-9, 305e-9),
    "IQ3_S": (60e-9, 209e-9),
    "IQ4_NL": (31e-9, 68e-9),
    "IQ4_XS": (34e-9, 83e-9),
    "TQ1_0": (1.6e-9, 5.7e-9),
    "TQ2_0": (1.5e-9, 4.8e-9),
    "MXFP4": (3.3e-9, 3.3e-9),
    "NVFP4": (6.4e-9, 11e-9),
    "Q1_0": (1.5e-9, 1.5e-9),
}
MIXED = {"plain": 30e-9, "search": 80e-9, "feedback": 80e-9}  # the same of a recipe or mix whose formats are not known

PROMPTS = 1.5  # tokens computed for one of a sampled text: prompts, what is cut off
TRIED = 5  # shrinkages of feedback's seven
BESIDES = 192 << 20  # bytes: llama.cpp, the kernels of many formats, what is freed and kept, in export and evaluation
ON_ITS_WAY = 12  # bytes of main memory for each weight of a tensor that goes to a card: read, laid out anew, pinned


class Need(NamedTuple):
    """What a step needs. memory, kept, passing, read: bytes; kept stays on the disk, passing goes when the step ends.

    flops: operations of matrix products; spent: seconds of a core of `CORE` for all else; begun: seconds that pass
    whatever the machine. at_once: threads that it can use at most. card: bytes on the card, where one computes.
    """

    step: str
    memory: float
    kept: float = 0.0
    passing: float = 0.0
    read: float = 0.0
    flops: float = 0.0
    spent: float = 0.0
    begun: float = 0.0
    at_once: int = 1 << 16
    card: float = 0.0

    @property
    def disk(self) -> float:
        return self.kept + self.passing

    def seconds(self, machine: Machine) -> float:
        """read / disk's bytes a second + (flops / CORE + spent) x CORE / core's speed / threads + begun."""
        cores = (self.flops / CORE + self.spent) * CORE / machine.flops
        return self.read / machine.read + cores / min(machine.threads, self.at_once) + self.begun


class Product(NamedTuple):
    """A matrix, or a stack, that tokens are multiplied by. used: matrices of it that one token passes; reads: the first
    of those that have the same input."""

    name: str
    rows: int
    n_in: int
    experts: int
    used: int
    reads: str


@dataclass(frozen=True)
class Shape:
    """What counts of a model. tensors: as a checkpoint has them; used: experts of a stack that a token passes; kv:
    keys and values of a token in a layer; stored: bytes of the source; known: whether torch runs it here."""

    tensors: Mapping[str, TensorInfo]
    used: int
    kv: int
    stored: float
    known: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shape:
        stored = sum(path.stat().st_size for path in checkpoint.files)
        return cls.from_config(checkpoint.tensors, checkpoint.config, stored, checkpoint.architecture.known)

    @classmethod
    def from_config(
        cls, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], stored: float, known: bool = True
    ) -> Shape:
        """config: transformers'."""
        used = int(config.get("num_experts_per_tok") or config.get("top_k_experts") or 1)
        return cls(tensors, used, kv_cache.width(config), stored, known)

    @cached_property
    def products(self) -> list[Product]:
        tied = "output.weight" not in self.tensors
        found = []
        for name, info in self.tensors.items():
            if info.quantizable and (name != "token_embd.weight" or tied):
                count = info.n_matrices
                used = min(count, self.used) if "_exps" in name else count  # DeepSeek's k_b and v_b are stacks of heads
                reads = name.replace("attn_k.", "attn_q.").replace("attn_v.", "attn_q.").replace("ffn_up", "ffn_gate")
                found.append(Product(name, info.shape[-2], info.row, count, used, reads))
        return found

    @cached_property
    def n(self) -> int:
        """N"""
        return sum(info.n_weights for info in self.tensors.values())

    @cached_property
    def active(self) -> int:
        """P"""
        return sum(p.rows * p.n_in * p.used for p in self.products)

    @cached_property
    def values(self) -> int:
        """A"""
        return sum((p.rows + p.n_in) * p.used for p in self.products)

    @cached_property
    def probed(self) -> int:
        """Weights of the largest matrix whose rounding error calibration looks at: not the head's."""
        return max(p.rows * p.n_in for p in self.products if p.name not in ("output.weight", "token_embd.weight"))

    @property
    def vocab(self) -> int:
        return self._embedding[0]

    @property
    def width(self) -> int:
        return self._embedding[1]

    @property
    def _embedding(self) -> tuple[int, ...]:
        """Of a model that cannot be run none may be there."""
        return self.tensors["token_embd.weight"].shape if "token_embd.weight" in self.tensors else (0, 0)

    @cached_property
    def layers(self) -> int:
        return 1 + max((info.layer or 0 for info in self.tensors.values()), default=0)

    @cached_property
    def ends(self) -> int:
        """Weights outside of layers."""
        return sum(info.n_weights for info in self.tensors.values() if info.layer is None)

    @cached_property
    def two_layers(self) -> int:
        """Weights of the two neighbouring layers that are largest together: one computes, the other is read."""
        sizes = [0] * (self.layers + 1)
        for info in self.tensors.values():
            if info.layer is not None:
                sizes[info.layer] += info.n_weights
        return max(map(sum, pairwise(sizes)))

    @cached_property
    def largest(self) -> int:
        """Weights of the largest tensor."""
        return max(info.n_weights for info in self.tensors.values())

    @cached_property
    def matrix(self) -> int:
        """Weights of the largest matrix: of a stack one expert counts."""
        return max(prod(info.shape[-2:]) for info in self.tensors.values())

    def streamed(self, free: float, weight: int = F32) -> bool:
        """Whether layers are read one by one (`dynq.memory.fits`). weight: bytes of one."""
        return weight * self.n > memory.for_weights(free)

    def held(self, free: float, weight: int = F32) -> float:
        """Bytes of a model in memory: 4 N, or where it is streamed 4 (its ends + two layers)."""
        return weight * (self.ends + self.two_layers if self.streamed(free, weight) else self.n)

    def passes(self, free: float, times: float = 1, weight: int = F32) -> float:
        """Bytes read for so many passes: the source once, and where it is streamed each time."""
        return self.stored * (times if self.streamed(free, weight) else 1)

    @property
    def on_its_way(self) -> float:
        """Bytes of main memory while the model goes to a card."""
        return float(ON_ITS_WAY * self.largest)

    def logits(self, tokens: int) -> float:
        """Bytes of logits, log-probabilities and what is between: 32 for each of V and token."""
        return 32.0 * self.vocab * tokens

    def forward(self, tokens: float) -> float:
        """Seconds beside the products of a forward pass: A T FORWARD."""
        return self.values * tokens * FORWARD

    def encoded(self, fmts: Iterable[str], level: str) -> float:
        """Seconds to encode every tensor in each of these formats."""
        at = 0 if level == "plain" else 1
        sizes: dict[int, int] = {}
        for info in self.tensors.values():
            if info.quantizable:
                sizes[info.row] = sizes.get(info.row, 0) + info.n_weights
        return sum(
            size * ENCODE.get(fmt, (MIXED["plain"], MIXED["search"]))[at]
            for row, size in sizes.items()
            for fmt in dict.fromkeys(formats.usable(name, row) for name in fmts)
        )


def sampled(
    shape: Shape,
    step: str,
    tokens: int,
    n_ctx: int,
    machine: Machine,
    *,
    at_once: int = 0,
    weight: int = F32,
) -> Need:
    """Text that the model writes.

    at_once: conversations, by default a batch of `dynq.kv_cache.rows` for each thread; weight: bytes of one. Memory:
    the model, for a text a copy in bfloat16, keys and values of all conversations, twice; a card has all of them at
    once, 2 G / n_ctx, or `kv_cache.at_once`. G = 1.5 T tokens are computed. Steps: n_ctx / 2 for each batch, batches
    3 + 2 G / (n_ctx conversations). Seconds: steps x (CALLED x layers, on one thread, + 4 P / LOADED) + G x n_ctx / 2 x
    CACHED x keys and values; 4 P operations a token: half of them for padding.
    """
    rows = kv_cache.rows(shape.kv * shape.layers, n_ctx)
    held, made = F32 * shape.n, PROMPTS * tokens
    full = kv_cache.at_once(shape.kv * shape.layers, n_ctx, shape.vocab, machine.card or 0)
    together = max(at_once, min(2 * made / n_ctx, full))
    if not at_once:
        at_once = rows * min(machine.threads, kv_cache.BATCHES)
        held += 2 * shape.n if memory.takes_copy(shape.n, machine.memory - held) else 0
    steps = (3 + 2 * made / (at_once * n_ctx)) * n_ctx / 2
    cache = F32 * shape.kv * shape.layers * n_ctx / 2
    card = weight * (shape.n + together * 2 * shape.kv * shape.layers * n_ctx)
    return Need(
        step,
        **machine.holds(held + 4 * at_once * cache, card, shape.on_its_way),
        read=shape.stored,
        flops=4 * shape.active * made,
        spent=steps * F32 * shape.active / LOADED + made * cache * CACHED,
        begun=steps * CALLED * shape.layers,
    )


def calibrate(shape: Shape, chunks: int, n_ctx: int, keep: int, machine: Machine) -> Need:
    """Forward, backward, samples.

    Memory: the model + for each thread 8 n_ctx A (of one layer where it is streamed) + 32 n_ctx V + 12 x the largest
    matrix in a layer; on a card two sequences side by side, in bfloat16 half of the model and activations. Disk: keep x
    (2 bytes a value + 24 an input) + 8 bytes an input channel, expert and sequence, where q, k and v have one input,
    gate and up too; in passing, streamed, 4 (layers + 1) T width + one sequence's part of that. 6 P T operations;
    seconds 3 A T FORWARD + N PROBE for each sequence + T V CHOSEN.
    """
    free, weight = machine.free, machine.calibrated
    tokens, streamed = chunks * n_ctx, shape.streamed(free, weight)
    share = 1 / shape.layers if streamed else 1
    side_by_side = min(machine.threads, chunks)
    each = 2 * weight * n_ctx * shape.values * share + shape.logits(n_ctx) + 12 * shape.probed
    model = shape.held(free, weight)
    inputs = {p.reads: p for p in shape.products}.values()
    channels = sum(p.n_in * p.experts for p in inputs)
    kept = keep * (sum(2 * p.rows for p in shape.products) + sum(2 * p.n_in + 24 for p in inputs))
    kept += (8 * chunks + 4) * channels
    return Need(
        "calibrate",
        **machine.holds(model + side_by_side * each, model + min(ON_CARD, chunks) * each, shape.on_its_way),
        kept=kept,
        passing=F32 * (shape.layers + 1) * tokens * shape.width + kept / chunks if streamed else 0,
        read=shape.passes(free, 2, weight),
        flops=6 * shape.active * tokens,
        spent=3 * shape.forward(tokens) + chunks * shape.n * PROBE + tokens * shape.vocab * CHOSEN,
        at_once=side_by_side,
    )


def sensitivity(
    shape: Shape, fmts: Iterable[str], level: str, keep: int, swaps: int, swap_tokens: int, machine: Machine
) -> Need:
    """Every tensor encoded, decoded and multiplied by the samples, in every format; some swaps measured.

    Memory: 20 bytes a weight of the largest matrix + 12 bytes a value of its samples; for swaps the model, 10 bytes a
    weight of the largest tensor and logits. On a card 12 of the 20 and the samples, and the model. Disk in passing: 2 V
    for each token of the swaps. 2 keep N operations a format (of experts: of one); seconds: encoders + N COMPARED a
    format + keep V HEAD a format. Each swap is a forward pass.
    """
    fmts = list(fmts)
    swaps = 0 if shape.streamed(machine.free) else swaps
    multiplied = sum(p.rows * p.n_in for p in shape.products)
    passes = (swaps + 1) * swap_tokens if swaps else 0
    samples = 12.0 * keep * max((p.rows + p.n_in for p in shape.products), default=0)
    swapped = F32 * shape.n + shape.logits(swap_tokens) if swaps else 0.0  # the model where it is computed
    return Need(
        "sensitivity",
        **machine.holds(
            alone=max(20 * shape.matrix + samples, swapped + 10 * shape.largest if swaps else 0),
            card=max(12 * shape.matrix + samples, swapped),
            beside=max(20 * shape.matrix, shape.on_its_way if swaps else 0),
        ),
        passing=2 * shape.vocab * swap_tokens if swaps else 0,
        read=shape.stored * (2 if swaps else 1),
        flops=2 * keep * multiplied * len(fmts) + 2 * shape.active * passes,
        spent=shape.encoded(fmts, level)
        + (shape.n * COMPARED + keep * shape.vocab * HEAD) * len(fmts)
        + shape.forward(passes)
        + swaps * shape.n / max(1, len(shape.products)) * MIXED["search"],
    )


class _Fed(NamedTuple):
    """A tensor that is fed back. wide: rows that are coupled; domains: that its inputs are summed up by."""

    product: Product
    wide: int
    domains: int

    @property
    def collected(self) -> float:
        """Bytes of its sums."""
        return 8.0 * self.product.experts * (self.domains * self.product.n_in**2 + self.wide**2)

    @property
    def working(self) -> float:
        """Bytes that encoding one of its matrices takes beside them, and what is kept of others of a stack."""
        others = 3.0 * self.product.experts * self.product.rows * self.product.n_in if self.product.experts > 1 else 0.0
        return (16.0 * self.domains + 60) * self.product.n_in**2 + 60 * self.wide**2 + others

    @property
    def tried(self) -> int:
        """Rows of a matrix that are encoded, tries included."""
        return self.product.rows + TRIED * feedback.TRIAL_ROWS + feedback.GUARD_ROWS * self.guards

    @property
    def guards(self) -> int:
        """Domains that are left out in turn."""
        return self.domains if self.product.experts == 1 else 0

    def flops(self, tokens: int) -> float:
        """Of sums over a text of so many tokens, and of encoding."""
        p, n, r = self.product, self.product.n_in, self.wide
        encoded = 8.0 * self.tried * n**2 + 4 * (TRIED + self.guards) * n**3
        coupled = r * (8 * n**2 + 2 * r * n + 18 * r**2)
        return 2.0 * tokens * p.used * (n**2 + r**2) + p.experts * (encoded + coupled)


def _fed_back(shape: Shape, domains: int) -> list[_Fed]:
    """All but what is looked up, and stacks of experts that are too large for `layer_inputs.BUDGET`."""
    found = []
    for p in shape.products:
        fed = _Fed(p, p.rows if p.rows <= max(p.n_in, WIDE) else 0, domains if p.experts == 1 else 1)
        if (p.experts == 1 and p.name != "token_embd.weight") or ("_exps" in p.name and fed.collected <= BUDGET):
            found.append(fed)
    return found


def export(
    shape: Shape,
    step: str,
    size: float,
    level: str,
    tune: int,
    measured: int,
    chunks: int,
    n_ctx: int,
    domains: int,
    machine: Machine,
    *,
    codes: bool = False,
) -> Need:
    """Encode, feed back, tune, write.

    size: of the file; measured: chunks that feedback reads, chunks: those that tuning does. Memory: 4.9 bytes a weight
    of the largest matrix + 1 of the largest tensor; feedback: the model + 8 D x row^2 + 8 x rows^2 (where rows are
    coupled; D = 1 for each expert) summed over its products, `layer_inputs.BUDGET` at most, a third of it without
    experts, + the largest (16 D + 60) x row^2 + 60 x rows^2 + 3 bytes a weight of a stack, of one tensor (more are
    encoded side by side where there is room), or for each thread a sequence forward and backward, or a second model
    (`stages`); tuning: 8.7 N + two files + 4 x the largest tensor + a chunk forward and backward, or several
    (`schedule.side_by_side`); 4 N (1 + `tune.COPIES`) in place of 8.7 N where codes move, for which there must be room.
    On a card the model, and what tuning holds besides files and a tensor. Disk: the file; in passing its parts, 2 N
    more where codes move. Operations: feedback reads the text (6 P T + 2 T x (row^2 + rows^2)) and encodes, 8 x row a
    weight (twice where rows are coupled, and 2 x rows) and 4 row^3 for each of 5 tries and D guards (none of experts),
    18 rows^3; tuning 8 P T a pass, the original's answers among them. Seconds: N COMPARED / 2 a step of tuning, N MOVED
    where codes move.
    """
    streamed = shape.streamed(machine.free) or not shape.known
    fed_back, tune = level == "feedback" and not streamed, 0 if streamed else tune
    read, tokens = measured * n_ctx, chunks * n_ctx
    own = 4.9 * shape.matrix + shape.largest
    held, flops, spent = own, 0.0, shape.n * MIXED[level]
    card, beside = (1.0 * F32 * shape.n, max(own, shape.on_its_way)) if fed_back or tune else (0.0, own)
    sequence = 8 * n_ctx * shape.values + shape.logits(n_ctx)  # forward and backward
    if fed_back:
        fed = _fed_back(shape, domains)
        sums = [f.collected for f in fed]
        # of tensors that are not stacked `layer_inputs` counts what is made of the sums too, twice their size
        at_most = BUDGET if any(f.product.experts > 1 for f in fed) else BUDGET / 3
        hessians = min(sum(sums), max(at_most, *sums)) if sums else 0.0
        encoding = max((f.working for f in fed), default=0.0) + own
        at_once = min(machine.threads, measured)
        held = F32 * shape.n + max(hessians + max(encoding, at_once * sequence), F32 * shape.n + sequence)
        card, beside = card + sequence, max(beside, hessians + encoding)  # Hessians only where it has room to spare
        flops += 6 * read * shape.active + sum(f.flops(read) for f in fed)
        spent += 4 * shape.forward(read) + read * shape.vocab * CHOSEN
        spent += FED_BACK * sum(f.product.experts * (f.tried + f.wide) * f.product.n_in for f in fed)
    codes = codes and tune > 0
    if tune:
        room = memory.for_weights(machine.free - F32 * shape.n - (size if machine.card is None else 0))
        codes = codes and F32 * COPIES * shape.n <= room
        copies = F32 * (1.0 + COPIES) if codes else 8.7
        step_of = chunks_a_step(chunks, tune)
        computed = copies * shape.n + min(step_of, side_by_side(n_ctx, shape.vocab)) * sequence
        held = max(held, computed + 2 * size + F32 * shape.largest)
        card, beside = computed, max(beside, 2 * size + shape.on_its_way)
        flops += 8 * tune * shape.active * tokens
        spent += 4 * tune * shape.forward(tokens) + tune * tokens * shape.vocab * COMPARED
        spent += tune * ceil(chunks / step_of) * shape.n * (COMPARED / 2 + (MOVED if codes else 0))
    return Need(
        step,
        **machine.holds(held, card, beside),
        kept=size,
        passing=size + 2.0 * shape.n * codes if fed_back else 0,
        read=shape.stored * (1 + (fed_back or tune > 0)) + 2 * size,
        flops=flops,
        spent=spent,
    )


def evaluate(
    shape: Shape, step: str, files: list[float], mixes: int, chunks: int, n_ctx: int, machine: Machine, *, beside: bool
) -> Need:
    """Files and mixes against the original.

    files: their bytes; mixes: encoded in memory; beside: whether the original stays there meanwhile. Memory: the
    original, then 6 N for the other (4 and 2 for its products in bfloat16; 4 on a card), or its ends and two layers
    where that is too much + logits of n_ctx tokens. Disk in passing: V T (half of the tokens are scored, 2 bytes).
    2 P T operations for each of them and the original; seconds: forward + half T V COMPARED, N for each to decode and
    each mix to encode.
    """
    tokens, others = chunks * n_ctx, len(files) + mixes
    original, second = shape.held(machine.free), (6.0 if machine.card is None else 4.0) * shape.n
    left = machine.free - original if beside else machine.free
    if F32 * shape.n > memory.for_weights(left):
        second = F32 * (shape.ends + shape.two_layers) + 8.0 * tokens * shape.width
    held = (original + second if beside else max(original, second)) + shape.logits(n_ctx)
    return Need(
        step,
        **machine.holds(held, held, shape.on_its_way),
        passing=float(shape.vocab * tokens),
        read=shape.passes(machine.free, 1 + mixes) + sum(files),
        flops=2.0 * shape.active * tokens * (1 + others),
        spent=(shape.forward(tokens) + tokens / 2 * shape.vocab * COMPARED) * (1 + others)
        + shape.n * (mixes * MIXED["plain"] + others * COMPARED / 2),
    )
