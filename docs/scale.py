"""docs/scale.md: a mixture of 671 billion weights on eight cards and on 32 workers, on paper.

    python docs/scale.py    # writes scale.md beside this file; tests/test_scale.py compares the two

The shapes are DeepSeek V3's, by its config.json, through the architecture's own names; the needs of each step are those
that `dynq run` is reckoned by (`dynq.needs`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
import transformers

from dynq import architectures, needs
from dynq.allocate import candidates
from dynq.checkpoint import TensorInfo
from dynq.machine import CORE, F32, Machine
from dynq.needs import COMPARED, MIXED, Need, Shape

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_group": 8,
    "topk_group": 4,
    "tie_word_embeddings": False,
}
CHUNKS, N_CTX, KEEP, EVAL_CHUNKS, BPW = 32, 512, 1024, 16, 3.5
CONTENDERS, MIXES = 4, 3  # the file, two mixes, one format throughout
CARD = 5.4e12  # operations a second of calibration on one H100 (LOG, "Devices and memory")
CARD_MEMORY = 80e9
CARD_PRODUCTS = 28.0  # sensitivity's products on one H100, times those of 16 cores (the same)
UNPACKED = 1.1e-9  # seconds of one thread for each weight in float8 that is read (tests/bench/reading.py)
MANY = 0.5  # of a core's speed alone is left where 16 of a processor compute: 0.86 TFLOP/s in calibration (the same)


@dataclass(frozen=True)
class Place:
    """hosts with so many cores each, cards in all; read: bytes a second of one host; memory: bytes of one host."""

    name: str
    hosts: int
    cores: int
    cards: int
    read: float
    memory: float

    @property
    def rate(self) -> float:
        """Reference cores in all."""
        return self.hosts * self.cores * MANY


CARDS = Place("8 cards", 1, 128, 8, 4e9, 1e12)
WORKERS = Place("32 workers", 32, 16, 0, 1e9, 128e9)


def shape() -> Shape:
    """DeepSeek V3 without the layer that predicts further tokens, its products in float8."""
    architecture = architectures.for_config(CONFIG)
    with torch.device("meta"):
        config = transformers.CONFIG_MAPPING["deepseek_v3"].from_dict(architecture.config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    there = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {
        name: TensorInfo(name, slot.shape(tuple(there[slot.parameter].shape)), "")
        for name, slot in architecture.slots.items()
        if slot.parameter in there
    }
    stored = sum(i.n_weights * (1 if i.quantizable and i.layer is not None else 2) for i in tensors.values())
    return Shape.from_config(tensors, architecture.config, stored)


@dataclass(frozen=True)
class Line:
    """A step in a place. read: bytes of all hosts together, apiece: of the one that reads most.

    preparing: weights unpacked, decoded, in one process also encoded, by the thread that reads; ahead: while the layer
    before computes, else one follows the other.
    """

    step: str
    read: float
    apiece: float
    flops: float
    reading: float
    preparing: float
    computing: float
    ahead: bool

    @property
    def hours(self) -> float:
        before = self.reading + self.preparing
        return (max(before, self.computing) if self.ahead else before + self.computing) / 3600

    @property
    def bound(self) -> str:
        parts = {"reading": self.reading, "preparing": self.preparing, "computing": self.computing}
        if self.ahead and self.computing > self.reading + self.preparing:
            return "computing"
        return max(parts, key=lambda name: 0 if self.ahead and name == "computing" else parts[name])


def lines(model: Shape, place: Place) -> list[Line]:
    machine, size = Machine(1, CORE, place.memory), BPW / 8 * model.n
    encoders = needs.sensitivity(model, candidates([], "all"), "plain", KEEP, 0, 0, machine)
    export = needs.export(model, "export", size, "search", 0, CHUNKS, CHUNKS, N_CTX, 1, machine)
    by_tensors = [_by_tensors(encoders, model, place, 1, 0.0), _by_tensors(export, model, place, 1, 2 * size)]
    return [_calibrate(model, place), *by_tensors, *_evaluate(model, place, size)]


def _by_tensors(need: Need, model: Shape, place: Place, times: int, by_one: float) -> Line:
    """Every tensor is read so many times, by one host each time; by_one: bytes that one host writes and reads back."""
    apiece = times * model.stored / place.hosts
    computing = (need.flops / CORE + need.spent) / place.rate
    if place.cards:  # products with samples, on one of them
        products = need.flops / CORE
        computing = need.spent / place.rate + products / (16 * MANY * CARD_PRODUCTS)
    read = times * model.stored + by_one
    own = (apiece + by_one) / place.read, UNPACKED * apiece, computing
    return Line(need.step, read, apiece + by_one, need.flops, *own, False)


def _calibrate(model: Shape, place: Place) -> Line:
    """One card, or on each worker a thread for each of its sequences; every host reads all layers twice."""
    need = needs.calibrate(model, CHUNKS, N_CTX, KEEP, Machine(1, CORE, place.memory))
    threads = min(place.cores, -(-CHUNKS // place.hosts))
    alone = (need.flops / CORE + need.spent) / (place.hosts * threads)
    computing = need.flops / CARD if place.cards else alone
    read, unpacking = place.hosts * need.read, UNPACKED * need.read
    return Line("calibrate", read, need.read, need.flops, need.read / place.read, unpacking, computing, True)


def _evaluate(model: Shape, place: Place, size: float) -> list[Line]:
    """In one process all cores share a sequence, and mixes are encoded each time that they are read. On a cluster mixes
    become files first, and a worker has one thread for its sequences."""
    need = needs.evaluate(model, "evaluate", [size], MIXES, EVAL_CHUNKS, N_CTX, Machine(1, CORE, 1.0), beside=False)
    encoding, decoding = MIXES * MIXED["plain"] * model.n, CONTENDERS * COMPARED / 2 * model.n
    forward = need.flops / CORE + need.spent - encoding - decoding
    if place.hosts == 1:
        read, rate = model.stored * (1 + MIXES) + size, place.cores * MANY
        preparing = UNPACKED * model.stored * (1 + MIXES) + (encoding + decoding) / rate
        return [Line("evaluate", read, read, need.flops, read / place.read, preparing, forward / rate, True)]
    made = _by_tensors(Need("evaluate: mixes", 0.0, spent=encoding), model, place, MIXES, MIXES * 2 * size)
    hosts, apiece = min(place.hosts, EVAL_CHUNKS), model.stored + CONTENDERS * size
    preparing = UNPACKED * model.stored + decoding
    own = apiece / place.read, preparing, forward / hosts
    return [made, Line("evaluate", hosts * apiece, apiece, need.flops, *own, True)]


def table(model: Shape, place: Place) -> str:
    rows = ["| step | read in all | by one host | operations | reading | preparing | computing | hours | bound by |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    found = lines(model, place)
    for line in found:
        rows.append(
            f"| {line.step} | {line.read / 1e12:.2f} TB | {line.apiece / 1e12:.2f} TB | {line.flops:.1e} "
            f"| {line.reading / 3600:.2f} h | {line.preparing / 3600:.2f} h | {line.computing / 3600:.2f} h "
            f"| {line.hours:.2f} | {line.bound} |"
        )
    total, longest = sum(line.hours for line in found), max(found, key=lambda line: line.hours)
    rows.append(
        f"| in all | {sum(line.read for line in found) / 1e12:.2f} TB | | | | | | **{total:.1f}** | {longest.step} |"
    )
    return "\n".join(rows)


def card(model: Shape) -> dict[str, float]:
    """Bytes of a card that layers go to one by one: bfloat16 in calibration, float32 in evaluation."""
    machine, size = Machine(1, CORE, CARDS.memory, card=CARD_MEMORY, calibrated=2), BPW / 8 * model.n
    return {
        "calibrate": needs.calibrate(model, CHUNKS, N_CTX, KEEP, machine).card,
        "evaluate": needs.evaluate(model, "evaluate", [size], 0, 1, N_CTX, machine, beside=False).card,
    }


def memory(model: Shape, place: Place) -> dict[str, float]:
    """Bytes that one host holds: a sequence at a time in calibration, a matrix in sensitivity."""
    machine = Machine(1, CORE, place.memory)
    size = BPW / 8 * model.n
    return {
        "calibrate": needs.calibrate(model, 1, N_CTX, KEEP, machine).memory,
        "sensitivity": needs.sensitivity(model, ["Q4_K"], "plain", KEEP, 0, 0, machine).memory,
        "export": needs.export(model, "export", size, "search", 0, 1, 1, N_CTX, 1, machine).memory,
        "evaluate": needs.evaluate(model, "evaluate", [size], 0, 1, N_CTX, machine, beside=False).memory,
    }


def page() -> str:
    model = shape()
    tokens, encoders = CHUNKS * N_CTX, model.encoded(candidates([], "all"), "plain")
    held, on_card = memory(model, WORKERS), card(model)
    experts = [p for p in model.products if "_exps" in p.name]
    stack = experts[0].experts * experts[0].rows * experts[0].n_in
    sums = {place: sum(line.hours for line in lines(model, place)) for place in (CARDS, WORKERS)}
    longest = {place: max(lines(model, place), key=lambda line: line.hours) for place in (CARDS, WORKERS)}
    calibration = lines(model, CARDS)[0]
    reckoned = needs.calibrate(model, CHUNKS, N_CTX, KEEP, Machine(1, CORE, WORKERS.memory))
    text = f"""\
# 671 billion weights, on paper

Nothing here was run. `docs/scale.py` writes this page from the shapes of DeepSeek V3 (its config.json) and the
functions that `dynq run` is reckoned by (`dynq/needs.py`); a test compares the two.

## The model

- {model.layers} layers, {len(experts) // 3} of them with {experts[0].experts} experts of three matrices
  {experts[0].rows} x {experts[0].n_in}: {len(experts)} stacks of
  {experts[0].experts} x {experts[0].rows} x {experts[0].n_in} = {stack:,} weights.
- N = {model.n:,} weights, of which a token meets P = {model.active:,} ({model.used} experts a layer, the
  head included).
- As published, matrices in float8: {model.stored / 1e9:.0f} GB. Two layers in float32, one that computes and the
  one that is being read: 4 x {model.two_layers:,} = {F32 * model.two_layers / 1e9:.1f} GB; embedding and head
  {F32 * model.ends / 1e9:.1f} GB.

## The run

{CHUNKS} sequences of {N_CTX} tokens of the user's text, T = {tokens:,}; {KEEP} samples a layer; the
{len(candidates([], "all"))} candidates; one file of {BPW} bits a weight =
{BPW / 8 * model.n / 1e9:.0f} GB, encoded by `search`; evaluated on {EVAL_CHUNKS} sequences beside two mixes and
one format throughout. The model fits into neither place as a whole, so there is no feedback, no tuning and no
measured swap, and text must be given.

- **calibrate**: 6 P T = 6 x {model.active / 1e9:.1f}e9 x {tokens:,} = {6 * model.active * tokens:.1e}
  operations, forward, backward and the cross-token factor.
  All layers are read twice, the next while one computes. {CHUNKS} sequences' samples take
  {reckoned.kept / 1e9:.0f} GB of disk, most of it the sums of inputs of each expert and sequence; inputs and
  gradients of layers {reckoned.passing / 1e9:.0f} GB in passing.
- **sensitivity**: every tensor is encoded in every candidate, {encoders / model.n * 1e9:.0f} ns a weight in all
  on one core: {encoders / 3600:.0f} core hours. Products with samples are
  {needs.sensitivity(model, candidates([], "all"), "plain", KEEP, 0, 0, Machine(1, CORE, 1)).flops:.1e}
  operations: a sample meets one expert of a stack.
- **export**: {MIXED["search"] * 1e9:.0f} ns a weight; the file is written and read back by one host.
- **evaluate**: 2 P T for the original and {CONTENDERS} others; {MIXES} of them are mixes: one process encodes
  them as it reads, a cluster makes a file of each first, for its workers to read.

A core is one of a Xeon of 2023 with AVX-512, {CORE / 1e9:.0f} GFLOP/s alone, of which {MANY} are left where 16
compute. Preparing is to unpack float8, counted for one thread of a host at {UNPACKED * 1e9:.1f} ns a weight, and what
else is done with weights as they are read. In calibration and evaluation, layer by layer, reading and preparing go on
while the layer before computes, and the longer of the two counts; in the other steps all are added up.

## Eight cards

One host with 8 H100, {CARDS.cores} cores and {CARDS.memory / 1e12:.0f} TB of memory, disks of
{CARDS.read / 1e9:.0f} GB/s. Together the cards hold {8 * CARD_MEMORY / 1e9:.0f} GB, in bfloat16 the model has
{2 * model.n / 1e9:.0f}, so layers are read one by one, and that is done with one card: **the other seven have
nothing to do**. Workers of a cluster compute on processors. Calibration at {CARD / 1e12} TFLOP/s, as measured
(choosing samples, on the processor, takes most of it), needs {on_card["calibrate"] / 1e9:.0f} GB of the card;
sensitivity's products are {CARD_PRODUCTS:.0f} times as fast as on 16 cores. Evaluation, in float32, would need
{on_card["evaluate"] / 1e9:.0f} GB, so
`dynq run --device cuda` is refused on a card of {CARD_MEMORY / 1e9:.0f} GB: notebooks 03 and 04 are given
`device = "cuda"`, the others `"cpu"`. Encoders and evaluation are counted on the processor.

@cards@

## 32 workers

Each 16 cores, {WORKERS.memory / 1e9:.0f} GB of memory and {WORKERS.read / 1e9:.0f} GB/s from a shared store,
which must give {WORKERS.hosts * WORKERS.read / 1e9:.0f} GB/s to all; each one process of 16 threads
(`dask worker --nworkers 1 --nthreads 16`), which hold one model. Tensors are tasks in sensitivity and export. In
calibration and evaluation runs of consecutive sequences are: each worker has one sequence, computed by one thread, and
reads all layers, so the same bytes travel {WORKERS.hosts} (evaluation: {EVAL_CHUNKS}) times. Samples are written to
the shared folder by those who chose them; encoded tensors travel to the one that writes. A worker prepares with one
thread; in evaluation that is mostly to decode the file and the mixes.

@workers@

## What bounds it

- On the cards {longest[CARDS].step} takes longest, {longest[CARDS].hours:.1f} of {sums[CARDS]:.1f} hours, bound
  by {longest[CARDS].bound}; on the workers {longest[WORKERS].step}, {longest[WORKERS].hours:.1f} of
  {sums[WORKERS]:.1f}, bound by {longest[WORKERS].bound}.
- On the card calibration waits for layers: {6 * model.active * tokens:.1e} operations are
  {6 * model.active * tokens / CARD / 60:.0f} minutes of it, reading and unpacking
  {(calibration.reading + calibration.preparing) / 60:.0f}. Seven more cards would gain nothing.
- Memory of a worker that has one sequence or one tensor: calibrate {held["calibrate"] / 1e9:.0f} GB (two layers
  and both ends in float32 are {F32 * (model.two_layers + model.ends) / 1e9:.0f} of it), sensitivity
  {held["sensitivity"] / 1e9:.0f} GB (20 bytes a weight of the head: of a stack of experts one matrix at a time
  is in memory), export {held["export"] / 1e9:.0f} GB (the same; a stack of experts that is being encoded has
  {BPW / 8 * stack / 1e9:.1f}, and each of the 16 threads one), evaluate {held["evaluate"] / 1e9:.0f} GB.
  The most of them, {max(held.values()) / 1e9:.0f} GB, fits into {WORKERS.memory / 1e9:.0f} GB.
"""
    return _filled(text).replace("@cards@", table(model, CARDS)).replace("@workers@", table(model, WORKERS))


def _filled(text: str) -> str:
    """Paragraphs and items of lists in lines of 110 characters, however long their numbers are."""
    out: list[str] = []
    for block in text.strip().split("\n\n"):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", block)]
        indents = ["  " if item.startswith("- ") else "" for item in items]
        lines = [fill(i, 110, subsequent_indent=x, break_on_hyphens=False) for i, x in zip(items, indents, strict=True)]
        out.append("\n".join(lines))
    return "\n\n".join(out) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
