"""What steps are reckoned to need: by hand for a few tensors, and beside what a small run takes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from peak import Peak, in_a_new_process

from dynq import codec, machine, needs
from dynq.calibrate import calibrate
from dynq.checkpoint import TensorInfo, open_checkpoint
from dynq.export import export
from dynq.machine import CORE, Machine
from dynq.needs import Need, Shape
from dynq.recipe import Recipe
from dynq.schedule import TOGETHER
from dynq.sensitivity import sensitivity
from dynq.torch_model import load_model

SHAPES = {
    "token_embd.weight": (100, 64),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.1.ffn_up_exps.weight": (4, 32, 64),
    "output.weight": (100, 64),
}
N = 2 * 6400 + 4096 + 8192 + 64 + 8192
P = 4096 + 8192 + 2 * 2048 + 6400
A = 128 + 192 + 2 * 96 + 164
LARGE = Machine(4, CORE, 1e12)


def shape(tied: bool = False) -> Shape:
    """Two of four experts are used; 4 keys and values of 8."""
    tensors = {n: TensorInfo(n, s, "BF16") for n, s in SHAPES.items() if not (tied and n == "output.weight")}
    return Shape.from_config(tensors, {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 8}, 2.0 * N)


def deep() -> Shape:
    """A third layer, of 9000 weights."""
    third = TensorInfo("blk.2.ffn_up.weight", (100, 90), "BF16")
    return replace(shape(), tensors=shape().tensors | {third.name: third})


def test_what_counts_of_a_model() -> None:
    own = shape()
    assert (own.n, own.active, own.values) == (N, P, A)
    assert (own.vocab, own.width, own.layers, own.kv) == (100, 64, 2, 64)
    assert own.ends == 2 * 6400 and own.two_layers == 4096 + 8192 + 64 + 8192
    assert deep().two_layers == 12352 + 8192  # neighbours: the first and the last never are there together
    one = Shape({"blk.0.attn_q.weight": TensorInfo("blk.0.attn_q.weight", (16, 8), "BF16")}, 1, 0, 0)
    assert one.two_layers == 128
    assert own.largest == 8192 and own.matrix == 8192 and own.probed == 8192
    assert shape(tied=True).active == P  # the embedding is the head then
    heads = Shape({"blk.0.attn_k_b.weight": TensorInfo("blk.0.attn_k_b.weight", (16, 8, 4), "BF16")}, 2, 0, 0)
    assert heads.active == 16 * 8 * 4  # a stack of heads, not of experts


def test_calibrate_by_hand() -> None:
    need = needs.calibrate(shape(), chunks=3, n_ctx=10, keep=5, machine=LARGE)
    each = 8 * 10 * A + 32 * 100 * 10 + 12 * 8192
    assert need.memory == 4 * N + 3 * each and need.at_once == 3
    channels = 64 + 64 + 4 * 64 + 64
    values = 128 + 192 + 96 + 164
    assert need.kept == 5 * (2 * values + 4 * 24) + 8 * 3 * channels + 4 * channels and need.passing == 0
    more = shape().tensors | {"blk.0.ffn_gate.weight": TensorInfo("blk.0.ffn_gate.weight", (128, 64), "BF16")}
    gated = needs.calibrate(replace(shape(), tensors=more), chunks=3, n_ctx=10, keep=5, machine=LARGE)
    assert gated.kept == need.kept + 5 * 2 * 128  # its input is that of ffn_up
    assert need.read == 2 * N and need.flops == 6 * P * 30
    spent = 3 * A * 30 * needs.FORWARD + 3 * N * needs.PROBE + 30 * 100 * needs.CHOSEN
    assert need.spent == pytest.approx(spent)
    assert need.seconds(LARGE) == pytest.approx((6 * P * 30 / CORE + spent) / 3 + 2 * N / LARGE.read)
    twice = Machine(4, CORE / 2, 1e12)
    assert need.seconds(twice) == pytest.approx(2 * (6 * P * 30 / CORE + spent) / 3 + 2 * N / LARGE.read)


def test_layer_by_layer_by_hand() -> None:
    """No room for 4 N: two layers and both ends are held, everything is read twice, inputs of layers go to the disk."""
    small, whole = Machine(1, CORE, 4 * N), needs.calibrate(deep(), 3, 10, 5, LARGE)
    assert deep().streamed(small.memory) and not deep().streamed(8 * N)
    need = needs.calibrate(deep(), chunks=3, n_ctx=10, keep=5, machine=small)
    held = 4 * (2 * 6400 + 12352 + 8192)
    assert need.memory == pytest.approx(held + 8 * 10 * (A + 190) / 3 + 32 * 100 * 10 + 12 * 9000)
    assert need.read == 4 * N and need.passing == 4 * 4 * 30 * 64 + whole.kept / 3
    assert (need.kept, whole.passing) == (whole.kept, 0)


def test_sensitivity_by_hand() -> None:
    need = needs.sensitivity(shape(), ["Q8_0", "Q4_0"], "search", 5, 3, 20, LARGE)
    own = 20 * 8192 + 12 * 5 * 192
    assert need.memory == 4 * N + 10 * 8192 + 32 * 100 * 20
    assert need.passing == 2 * 100 * 20
    multiplied = 4096 + 8192 + 2048 + 6400
    assert need.flops == 2 * 5 * multiplied * 2 + 2 * P * 4 * 20
    encoders = (N - 64) * (needs.ENCODE["Q8_0"][1] + needs.ENCODE["Q4_0"][1])
    swaps = A * 80 * needs.FORWARD + 3 * N / 4 * needs.MIXED["search"]
    assert need.spent == pytest.approx(encoders + 2 * (N * needs.COMPARED + 5 * 100 * needs.HEAD) + swaps)
    assert needs.sensitivity(shape(), ["Q8_0"], "plain", 5, 3, 20, Machine(1, CORE, 4 * N)).memory == own  # no swaps
    more = shape().tensors | {"blk.1.ffn_down_exps.weight": TensorInfo("blk.1.ffn_down_exps.weight", (9, 64, 32), "")}
    wide = replace(shape(), tensors=more)
    assert needs.sensitivity(wide, ["Q8_0"], "plain", 5, 0, 20, LARGE).memory == own  # of a stack one matrix counts
    swapped = needs.sensitivity(wide, ["Q8_0"], "plain", 5, 3, 20, LARGE)
    assert swapped.memory == 4 * (N + 9 * 2048) + 10 * 9 * 2048 + 32 * 100 * 20  # in a swap all of it


def test_export_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = needs.export(shape(), "export", 1000, "search", 0, 3, 3, 10, 2, LARGE)
    assert plain.memory == 4.9 * 8192 + 8192 and (plain.kept, plain.passing, plain.flops) == (1000, 0, 0)
    assert plain.spent == pytest.approx(N * needs.MIXED["search"])
    fed = needs.export(shape(), "export", 1000, "feedback", 0, 3, 3, 10, 2, LARGE)
    squares, wide = 3 * 64**2, (64, 128, 100)  # of three layers, all coupled
    experts = 4 * (64**2 + 32**2)  # all domains of an expert together
    sums = 8 * (2 * squares + sum(r**2 for r in wide) + experts)
    encoding = (16 * 2 + 60) * 64**2 + 60 * 128**2 + plain.memory
    assert fed.memory == 4 * N + sums + encoding
    assert fed.passing == 1000
    rows = [64 + 768, 128 + 768, 100 + 768]  # five tries of 128, two guards of 64
    summed = squares + sum(r**2 for r in wide) + 2 * (64**2 + 32**2)  # two of four experts a token
    encoded = sum(8 * r * 64**2 + 4 * 7 * 64**3 for r in rows) + 4 * (8 * (32 + 640) * 64**2 + 4 * 5 * 64**3)
    coupled = sum(r * (8 * 64**2 + 2 * r * 64 + 18 * r**2) for r in (*wide, *[32] * 4))
    assert fed.flops == 30 * (6 * P + 2 * summed) + encoded + coupled
    with monkeypatch.context() as tight:  # nor are experts fed back for which there is no room
        tight.setattr(needs, "BUDGET", 8 * experts - 1)
        without = needs.export(shape(), "export", 1000, "feedback", 0, 3, 3, 10, 2, LARGE)
        largest = 8 * (2 * 64**2 + 128**2)  # more than a third of the budget
        assert without.memory == pytest.approx(4 * N + largest + encoding)
        stack = 30 * 2 * 2 * (64**2 + 32**2) + 4 * (8 * (32 + 640) * 64**2 + 4 * 5 * 64**3)
        assert fed.flops - without.flops == stack + 4 * 32 * (8 * 64**2 + 2 * 32 * 64 + 18 * 32**2)
    assert needs.export(shape(), "export", 1000, "feedback", 0, 3, 9, 10, 2, LARGE) == fed  # only tuning reads more
    long = needs.export(shape(), "export", 1000, "feedback", 0, 9, 9, 1000, 2, LARGE)
    assert long.memory == 4 * N + sums + 4 * (8 * 1000 * A + 32 * 100 * 1000)  # four sequences, forward and backward
    tuned = needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, LARGE)
    assert tuned.memory == pytest.approx(8.7 * N + 2 * 1000 + 4 * 8192 + 4 * (8 * 10 * A + 32 * 100 * 10))  # four
    apart = needs.export(shape(), "export", 1000, "plain", 2, 3, 3, TOGETHER // 400, 2, LARGE)
    assert apart.memory == pytest.approx(8.7 * N + 2 * 1000 + 4 * 8192 + (8 * A + 32 * 100) * (TOGETHER // 400))
    assert tuned.passing == 0 and tuned.flops == 16 * P * 30
    moved = needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, LARGE, codes=True)
    assert moved.memory == pytest.approx(tuned.memory + (32 - 8.7) * N)  # the teacher, and seven copies
    assert moved.spent == pytest.approx(tuned.spent + 2 * N * needs.MOVED)
    both = needs.export(shape(), "export", 1000, "feedback", 2, 3, 3, 10, 2, LARGE, codes=True)
    assert (moved.passing, both.passing) == (0, 1000 + 2 * N)  # where they begin
    tight = Machine(4, CORE, 40 * N)  # not enough for all that beside the teacher
    assert needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, tight, codes=True) == tuned
    streamed = needs.export(shape(), "export", 1000, "feedback", 2, 3, 3, 10, 2, Machine(1, CORE, 4 * N))
    assert (streamed.memory, streamed.passing) == (plain.memory, 0)  # neither feedback nor tuning


def test_evaluate_by_hand() -> None:
    need = needs.evaluate(shape(), "evaluate", [1000.0], 2, 3, 10, LARGE, beside=True)
    assert need.memory == 10 * N + 32 * 100 * 10 and need.passing == 100 * 30
    assert need.flops == 2 * P * 30 * 4 and need.read == 2 * N + 1000
    assert needs.evaluate(shape(), "e", [1000.0], 2, 3, 10, LARGE, beside=False).memory == 6 * N + 32 * 100 * 10
    tight = needs.evaluate(shape(), "e", [1000.0], 0, 3, 10, Machine(1, CORE, 6 * N), beside=True)
    assert tight.memory == 8 * N + 8 * 30 * 64 + 32 * 100 * 10  # the other is read layer by layer: it has two of them
    three, free = 4 * (N + 9000), Machine(1, CORE, 6 * (N + 9000))
    tight = needs.evaluate(deep(), "e", [1000.0], 0, 3, 10, free, beside=True)
    assert tight.memory == three + 4 * (2 * 6400 + 12352 + 8192) + 8 * 30 * 64 + 32 * 100 * 10


# --- with a card ------------------------------------------------------------------------------------------------------

CARD = Machine(4, CORE, 1e12, card=1e12, calibrated=2)
WAY = 12 * 8192  # of the largest tensor


def with_card(free: float) -> Machine:
    return replace(CARD, card=free)


def test_calibration_on_a_card_by_hand() -> None:
    """The model in bfloat16, two sequences side by side; a card that does not take it has two layers at a time."""
    need = needs.calibrate(shape(), chunks=3, n_ctx=10, keep=5, machine=CARD)
    assert need.card == 2 * N + 2 * (4 * 10 * A + 32 * 100 * 10 + 12 * 8192) and need.memory == WAY
    alone = needs.calibrate(shape(), chunks=3, n_ctx=10, keep=5, machine=LARGE)
    assert alone.card == 0 and need == alone._replace(memory=WAY, card=need.card)  # time, disk and all else
    exact = needs.calibrate(shape(), chunks=1, n_ctx=10, keep=5, machine=replace(CARD, calibrated=4))
    assert exact.card == 4 * N + 8 * 10 * A + 32 * 100 * 10 + 12 * 8192
    assert needs.calibrate(shape(), 3, 10, 5, with_card(3 * N)).card == need.card
    layers = needs.calibrate(deep(), 3, 10, 5, with_card(2.5 * N))
    held = 2 * (2 * 6400 + 12352 + 8192)
    assert layers.card == held + 2 * (4 * 10 * (A + 190) / 3 + 32 * 100 * 10 + 12 * 9000)
    assert layers.read == 4 * N and layers.passing == 4 * 4 * 30 * 64 + layers.kept / 3


def test_sampling_on_a_card_by_hand() -> None:
    """All conversations at once: 90 tokens computed for 60 of text, 9 conversations of 20."""
    need = needs.sampled(shape(), "text", 60, 20, CARD, at_once=2, weight=2)
    assert need.card == 2 * (N + 9 * 2 * 64 * 2 * 20) and need.memory == WAY
    assert needs.sampled(shape(), "text", 60, 20, LARGE, at_once=2).memory == 4 * N + 4 * 2 * 4 * 64 * 2 * 10


def test_text_by_hand() -> None:
    """128 conversations for each of four threads, and a copy in bfloat16 where it fits; a card has 4,096 at most."""
    kept = 4 * 4 * 128 * 4 * 64 * 2 * 10
    assert needs.sampled(shape(), "text", 60, 20, LARGE).memory == (4 + 2) * N + kept
    assert needs.sampled(shape(), "text", 60, 20, replace(LARGE, memory=7.9 * N)).memory == 4 * N + kept
    long = needs.sampled(shape(), "text", 20 * 4000, 20, CARD, weight=2)
    assert long.card == 2 * (N + 4096 * 2 * 64 * 2 * 20)
    long = needs.sampled(shape(), "text", 20 * 4000, 20, with_card(1e6), weight=2)
    assert long.card == 2 * (N + 8 * 128 * 2 * 64 * 2 * 20)


def test_sensitivity_on_a_card_by_hand() -> None:
    """Tensors are encoded on the processor, errors and samples lie on the card; so does a model that is swapped."""
    own = 12 * 8192 + 12 * 5 * 192
    need = needs.sensitivity(shape(), ["Q8_0"], "plain", 5, 0, 20, CARD)
    assert (need.memory, need.card) == (20 * 8192, own)
    need = needs.sensitivity(shape(), ["Q8_0"], "plain", 5, 3, 20, CARD)
    assert (need.memory, need.card) == (20 * 8192, 4 * N + 32 * 100 * 20)
    assert needs.sensitivity(shape(), ["Q8_0"], "plain", 5, 3, 20, with_card(5 * N)).card == own  # no swaps


def test_export_on_a_card_by_hand() -> None:
    own, squares = 4.9 * 8192 + 8192, 3 * 64**2
    plain = needs.export(shape(), "export", 1000, "search", 0, 3, 3, 10, 2, CARD)
    assert (plain.memory, plain.card) == (own, 0)
    fed = needs.export(shape(), "export", 1000, "feedback", 0, 3, 3, 10, 2, CARD)
    sums = 8 * (2 * squares + 64**2 + 128**2 + 100**2 + 4 * (64**2 + 32**2))
    assert fed.memory == sums + (16 * 2 + 60) * 64**2 + 60 * 128**2 + own
    assert fed.card == 4 * N + 8 * 10 * A + 32 * 100 * 10
    activations = 4 * (8 * 10 * A + 32 * 100 * 10)  # of four chunks
    tuned = needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, CARD)
    assert tuned.memory == 2 * 1000 + WAY and tuned.card == pytest.approx(8.7 * N + activations)
    moved = needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, CARD, codes=True)
    assert moved.card == 32 * N + activations
    tight = with_card(40 * N)  # of which 36 are left, and 27 may be taken
    assert needs.export(shape(), "export", 1000, "plain", 2, 3, 3, 10, 2, tight, codes=True) == tuned
    streamed = needs.export(shape(), "export", 1000, "feedback", 2, 3, 3, 10, 2, with_card(4 * N))
    assert (streamed.memory, streamed.card, streamed.passing) == (own, 0, 0)


def test_evaluation_on_a_card_by_hand() -> None:
    """Both in float32."""
    need = needs.evaluate(shape(), "evaluate", [1000.0], 2, 3, 10, CARD, beside=True)
    assert (need.memory, need.card) == (WAY, 8 * N + 32 * 100 * 10)
    tight = needs.evaluate(shape(), "e", [1000.0], 0, 3, 10, with_card(6 * N), beside=True)
    assert tight.card == 8 * N + 8 * 30 * 64 + 32 * 100 * 10


def test_a_card_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(machine, "check_device", asked.append)
    monkeypatch.setattr(machine, "single", lambda device: "cpu" if device == "cpu" else "cuda:0")
    monkeypatch.setattr(machine, "calibration_dtype", lambda device: {"auto": "bfloat16", "cuda": "float32"}[device])
    free = {"cpu": 1000, "auto": 300, "cuda": 200}
    monkeypatch.setattr("dynq.memory.available", lambda device="cpu": free[device])
    found = [Machine.here(1, device) for device in ("cpu", "auto", "cuda")]
    assert [(m.memory, m.card, m.calibrated, m.free) for m in found] == [
        (1000, None, 4, 1000),
        (1000, 300, 2, 300),
        (1000, 200, 4, 200),
    ]
    assert asked == ["cpu", "auto", "cuda"]


def test_machine_is_measured_within_a_second() -> None:
    machine = Machine.here(2)
    assert machine.threads == 2 and 1e8 < machine.flops < 1e13 and machine.memory > 0
    assert Need("waits", 0, begun=3.0).seconds(machine) == 3.0


def _reckoned_and_taken(folder: Path) -> tuple[dict[str, needs.Need], dict[str, int], int, int]:
    """Three steps of a small run: what each was reckoned to need, bytes of memory it took; bytes of Fisher and file."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2}
    checkpoint = open_checkpoint(tiny_models.make("llama-tied", folder / "model", **sizes))
    own, machine = Shape.of(checkpoint), Machine(1, CORE, 1e12)
    codec.warmup(["Q4_K"])
    tokens = np.random.default_rng(0).integers(2, 300, (2, 128)).astype(np.int32)
    chosen = {name: "Q4_K" if info.quantizable else info.kept for name, info in checkpoint.tensors.items()}
    size = sum(info.n_weights * (4.5 if info.quantizable else 32) / 8 for info in checkpoint.tensors.values())
    taken, reckoned = {}, {}
    calibrate(checkpoint, load_model(checkpoint), tokens[:1], folder / "first", keep=64, threads=1)  # first calls
    with Peak() as taken["calibrate"]:
        calibrate(checkpoint, load_model(checkpoint), tokens, folder, keep=64, threads=1)
    reckoned["calibrate"] = needs.calibrate(own, 2, 128, 64, machine)
    with Peak() as taken["sensitivity"]:
        sensitivity(checkpoint, folder, None, ["Q4_K"], threads=1)
    reckoned["sensitivity"] = needs.sensitivity(own, ["Q4_K"], "plain", 64, 0, 0, machine)
    with Peak() as taken["export"]:
        export(checkpoint, Recipe(chosen, "Q4_K", 0, 0.0, None), None, folder / "m.gguf", threads=1)
    reckoned["export"] = needs.export(own, "export", size, "plain", 0, 2, 2, 128, 1, machine)
    fisher = sum(path.stat().st_size for path in (folder / "fisher").iterdir())
    return reckoned, {step: peak.bytes for step, peak in taken.items()}, fisher, (folder / "m.gguf").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux tells it")
def test_a_small_run_takes_what_was_reckoned(tmp_path: Path) -> None:
    """Memory and disk of three steps, within the factor of two that is stated."""
    reckoned, taken, fisher, file = in_a_new_process(_reckoned_and_taken, tmp_path)
    ratios = {step: need.memory / taken[step] for step, need in reckoned.items()}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    assert 0.5 < reckoned["calibrate"].kept / fisher < 2
    assert 0.9 < reckoned["export"].kept / file < 1.1
