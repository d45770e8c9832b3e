"""Stacks of experts: what each reads and gives out, against its module's own inputs, and each encoded by that."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from dynq import calibrate as calibration
from dynq import feedback, layer_inputs, output_gradients
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.encoding import quantize_tensor
from dynq.figures import feedback_gain
from dynq.imatrix import Importance
from dynq.layer_inputs import collect, feed_back, products, reports
from dynq.recorder import Recorder
from dynq.torch_model import load_model

N_CTX = 48
DOMAINS = ["code", "chats"] * 8
# where experts are stacked otherwise: gate and up in one parameter, [in, out] and every other, all see all tokens,
# routed by groups beside a dense layer, beside a dense branch, blocks of their own
FAMILIES = [
    "qwen3moe",
    "gpt-oss",
    "llama4-scout",
    "deepseek2",
    "gemma4-moe",
    "glm4moe",
    "mixtral",
    "granitemoe",
    "qwen35moe",
]


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 300, (len(DOMAINS), N_CTX)).astype(np.int32)


def _stacks(checkpoint: Checkpoint) -> list[str]:
    return [name for name, info in checkpoint.tensors.items() if info.quantizable and "_exps" in info.kind]


def _given(read: list[layer_inputs.Read], row: int) -> list[tuple[list, list]]:
    """What each expert is encoded by: its own inputs, those of all where these are too few for rows so long."""
    fit, aside = (
        [feedback.Hessian(sum(h.matrix for h in some), sum(h.tokens for h in some))]
        for some in ([one.fit[0] for one in read], [one.aside[0] for one in read])
    )
    enough = (one.fit[0].tokens >= row and one.aside[0].tokens >= row / 4 for one in read)
    return [(one.fit, one.aside) if own else (fit, aside) for one, own in zip(read, enough, strict=True)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, object, np.ndarray, Importance]:
    path = tiny_models.make("qwen3moe", tmp_path_factory.mktemp("tiny"))
    checkpoint, folder = open_checkpoint(path), tmp_path_factory.mktemp("run")
    model = load_model(checkpoint)
    return checkpoint, model, _tokens(), calibration.calibrate(checkpoint, model, _tokens(), folder, keep=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_experts_are_found_in_the_order_of_columns_and_rows(family: str, tmp_path: Path) -> None:
    checkpoint, tokens = open_checkpoint(tiny_models.make(family, tmp_path / "tiny")), _tokens()[:4]
    model = load_model(checkpoint)
    importance = calibration.calibrate(checkpoint, model, tokens, tmp_path, keep=32)
    found = products(checkpoint, model)
    stacks = _stacks(checkpoint)
    assert stacks and set(stacks) <= set(found)
    inputs = collect(model, checkpoint, stacks, tokens, DOMAINS[:4])
    for name in stacks:
        order = checkpoint.architecture.slot_of(name).columns(*found[name])
        assert order is not None and len(inputs[name]) == checkpoint.tensors[name].shape[0]
        for e, one in enumerate(inputs[name]):
            both = [*one.fit, *one.aside]
            assert sum(h.tokens for h in both) == importance.counts[name][e]
            squares = sum(h.matrix.diagonal()[order] for h in both)
            np.testing.assert_allclose(squares, importance.sums[name][e], rtol=1e-4, atol=1e-6)

    slot, name = checkpoint.architecture.slot_of, stacks[0]
    shape, flipped = found[name]
    every = np.arange(shape[-1 if flipped else -2])
    as_torch = output_gradients.collect(model, checkpoint, {name: every}, tokens)[name]
    for tensor in (
        n for n in stacks if checkpoint.architecture.parameter(n) == checkpoint.architecture.parameter(name)
    ):
        rows = layer_inputs._rows(checkpoint, tensor, found[tensor])
        own = output_gradients.collect(model, checkpoint, {tensor: rows}, tokens)[tensor]
        for e, (theirs, ours) in enumerate(zip(as_torch, own, strict=True)):
            size = theirs[0].diagonal()
            spread = np.broadcast_to(size[None, None, :] if flipped else size[None, :, None], shape)
            np.testing.assert_array_equal(ours[0].diagonal(), slot(tensor).gather(spread)[e, :, 0])
    assert any(fit.any() for fit, _ in as_torch)


def test_an_expert_reads_what_its_router_sends(mixture) -> None:
    """The module's own inputs and choices: gate and up read the stream, down what both make of it."""
    checkpoint, model, tokens, _ = mixture
    experts = model.model.layers[1].mlp.experts
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), experts.register_forward_pre_hook(lambda _, args: given.append((args[0], args[1]))):
        for row in tokens:
            model(torch.from_numpy(row[None].astype(np.int64)))
    names = [f"blk.1.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    gate, up, _ = (checkpoint.read(name).astype(np.float64) for name in names)
    found = collect(model, checkpoint, names, tokens, DOMAINS, threads=2)
    assert found[names[0]] is found[names[1]]
    aside = layer_inputs.kept_aside(DOMAINS)
    for kept in (False, True):
        for e in range(len(gate)):
            own = [(x, chosen) for (x, chosen), judges in zip(given, aside, strict=True) if judges == kept]
            x = np.concatenate([x[(chosen == e).any(-1)].double().numpy() for x, chosen in own])
            between = x @ gate[e].T
            between = between / (1 + np.exp(-between)) * (x @ up[e].T)
            for name, read in ((names[0], x), (names[2], between)):
                [h] = found[name][e].aside if kept else found[name][e].fit
                assert h.tokens == len(read)
                np.testing.assert_allclose(h.matrix, read.T @ read, rtol=1e-3, atol=1e-4 * np.abs(h.matrix).max())


def test_bytes_do_not_depend_on_threads(mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model, tokens, _ = mixture
    monkeypatch.setattr(layer_inputs, "_ROWS", 50)
    names = _stacks(checkpoint)[:3]
    rows = {name: np.arange(checkpoint.tensors[name].shape[1]) for name in names}
    found = set()
    for threads in (1, 2, 3):
        inputs = collect(model, checkpoint, names, tokens, DOMAINS, threads=threads)
        sums = [h.matrix.tobytes() for one in inputs.values() for e in one for h in [*e.fit, *e.aside]]
        gradients = output_gradients.collect(model, checkpoint, rows, tokens, threads=threads)
        found.add((*sums, *(part.tobytes() for one in gradients.values() for pair in one for part in pair)))
    assert len(found) == 1


def test_each_expert_is_encoded_by_its_own_inputs(mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, model, tokens, importance = mixture
    name = "blk.0.ffn_up_exps.weight"
    chosen = {name: "Q4_0", "blk.0.ffn_down_exps.weight": "Q4_0", "blk.0.ffn_gate_exps.weight": "Q8_0"}
    back = partial(feed_back, checkpoint, chosen, importance, model, tokens, DOMAINS)
    made = {n: data.copy() for n, _, data in back(tmp_path / "a", threads=1, aims=True)}
    told = {entry["tensor"]: entry for entry in reports(tmp_path / "a", list(chosen))}
    assert told[name]["level"] == "feedback" and 0 < told[name]["gain"] < 1

    mean, inputs = (
        importance.mean(name, checkpoint.tensors[name].row),
        collect(model, checkpoint, [name], tokens, DOMAINS),
    )
    rows = layer_inputs._rows(checkpoint, name, products(checkpoint, model)[name])
    gradients = output_gradients.collect(model, checkpoint, {name: rows}, tokens)[name]
    weights, levels, best = checkpoint.read(name), [], []
    assert mean is not None
    for e, ((fit, aside), own) in enumerate(zip(_given(inputs[name], 128), gradients, strict=True)):
        by_hand = feedback.encode(weights[e], "Q4_0", fit, aside, mean[e], gradients=own, guard=False, threads=1)
        assert np.array_equal(made[name][e], by_hand.data)
        levels.append(by_hand.level)
        best.append(weights[e] if by_hand.best is None else by_hand.best)
    assert levels.count("feedback") >= 2
    assert np.array_equal(layer_inputs.aim(tmp_path / "a", name), np.concatenate(best).astype(np.float16))
    gate = "blk.0.ffn_gate_exps.weight"
    assert told[gate]["level"] == "search" and told[gate]["reason"] == "Q8_0 has no feedback"
    assert np.array_equal(made[gate], quantize_tensor(checkpoint, gate, "Q8_0", importance, "search", 1))

    # several threads, and a bunch a tensor: the same bytes
    monkeypatch.setattr(layer_inputs, "BUDGET", layer_inputs._size(checkpoint, name, 2))
    assert all(np.array_equal(data, made[n]) for n, _, data in back(tmp_path / "b", threads=3))
    # no room for what all experts of a stack read
    monkeypatch.setattr(layer_inputs, "BUDGET", 1)
    list(back(tmp_path / "c", threads=1))
    [told_of] = [entry for entry in reports(tmp_path / "c", list(chosen)) if entry["tensor"] == name]
    assert told_of["level"] == "search" and told_of["reason"].startswith("what its experts read would take 0.0 GiB")


def test_workers_read_what_was_written_for_them(mixture, tmp_path: Path) -> None:
    checkpoint, model, tokens, _ = mixture
    names = [f"blk.0.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    read = collect(model, checkpoint, names, tokens, DOMAINS)
    rows = {names[2]: np.arange(checkpoint.tensors[names[2]].shape[1])}
    gradients = output_gradients.collect(model, checkpoint, rows, tokens)[names[2]]
    read[names[2]] = [one._replace(gradients=own) for one, own in zip(read[names[2]], gradients, strict=True)]
    written = layer_inputs._written(read, tmp_path / "hessians")
    assert written[names[0]] == written[names[1]] != written[names[2]]  # gate and up read the same
    for name in names:
        for one, other in zip(read[name], layer_inputs._read(*written[name]), strict=True):
            for mine, theirs in zip([*one.fit, *one.aside], [*other.fit, *other.aside], strict=True):
                assert mine.tokens == theirs.tokens and np.array_equal(mine.matrix, theirs.matrix)
            assert (one.gradients is None) == (other.gradients is None) == (name != names[2])
            for mine, theirs in zip(one.gradients or (), other.gradients or (), strict=True):
                assert np.array_equal(mine, theirs)


def test_an_expert_that_hardly_a_token_reached_is_encoded_without(mixture, tmp_path: Path) -> None:
    """Down projections: what one reads says nothing of another's."""
    checkpoint, model, tokens, importance = mixture
    name = "blk.0.ffn_down_exps.weight"
    few, domains = tokens[:6], DOMAINS[:6]  # 288 tokens, two experts each: some have less than a row's 96
    [(_, _, data)] = feed_back(checkpoint, {name: "Q4_0"}, importance, model, few, domains, tmp_path / "p", threads=1)
    [told] = reports(tmp_path / "p", [name])
    read = collect(model, checkpoint, [name], few, domains)[name]
    starved = [e for e, one in enumerate(read) if one.fit[0].tokens < checkpoint.tensors[name].row]
    assert starved and told["reason"].startswith(f"{len(starved)} of {len(read)} experts: "), told
    searched = quantize_tensor(checkpoint, name, "Q4_0", importance, "search", 1)
    plain = quantize_tensor(checkpoint, name, "Q4_0", importance, "plain", 1)
    for e in starved:
        assert np.array_equal(data[e], searched[e]) or np.array_equal(data[e], plain[e])
    assert told["reason"] in feedback_gain([told], checkpoint.tensors).table


def test_one_that_reads_the_stream_has_the_inputs_of_all_then(mixture, tmp_path: Path) -> None:
    checkpoint, model, tokens, importance = mixture
    name = "blk.0.ffn_up_exps.weight"
    few, domains = tokens[:14], DOMAINS[:14]
    [(_, _, data)] = feed_back(checkpoint, {name: "Q4_0"}, importance, model, few, domains, tmp_path / "p", threads=1)
    read = collect(model, checkpoint, [name], few, domains)[name]
    rows = layer_inputs._rows(checkpoint, name, products(checkpoint, model)[name])
    gradients = output_gradients.collect(model, checkpoint, {name: rows}, few)[name]
    mean, weights = importance.mean(name, None), checkpoint.read(name)
    given = _given(read, 128)
    starved = [e for e, (one, (fit, _)) in enumerate(zip(read, given, strict=True)) if fit is not one.fit]
    assert 0 < len(starved) < len(read)
    how = {"guard": False, "threads": 1}
    by_hand = [
        feedback.encode(w, "Q4_0", *both, m, gradients=g, **how)
        for w, both, m, g in zip(weights, given, mean, gradients, strict=True)
    ]
    assert np.array_equal(data, np.stack([one.data for one in by_hand]))
    assert by_hand[starved[0]].level == "feedback"
    alone = [read[starved[0]].fit, read[starved[0]].aside]
    assert "are needed" in feedback.encode(weights[starved[0]], "Q4_0", *alone, mean[starved[0]], **how).reason


def test_a_stack_of_one_expert_stays_a_stack(tmp_path: Path) -> None:
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(tiny_models.make("qwen3moe", tmp_path / "tiny", **sizes))
    name, tokens = "blk.0.ffn_up_exps.weight", _tokens()[:8]
    [(_, _, data)] = feed_back(
        checkpoint, {name: "Q4_0"}, None, load_model(checkpoint), tokens, DOMAINS[:8], tmp_path / "p", threads=1
    )
    [told] = reports(tmp_path / "p", [name])
    assert data.shape == quantize_tensor(checkpoint, name, "Q4_0", None, "search", 1).shape
    assert told["level"] == "feedback" and len(told["ratios"]) == 1


def test_what_is_told_of_a_stack_are_means_by_tokens() -> None:
    def encoded(level: str, ratio: float, coupled: float, reason: str) -> feedback.Encoded:
        shrinkage = 0.5 if level == "feedback" else None
        return feedback.Encoded(np.zeros((1, 18), np.uint8), level, shrinkage, (ratio,), reason, coupled)

    made = [encoded("feedback", 0.5, 0.9, ""), encoded("search", 1.0, 1.0, "few"), encoded("feedback", 0.25, 0.5, "")]
    told = layer_inputs._told_of_stack(made, [30, 0, 10])
    assert told["ratios"] == [pytest.approx(0.5**0.75 * 0.25**0.25)] and told["level"] == "feedback"
    assert told["coupled"] == pytest.approx((30 * 0.9 + 1.0 + 10 * 0.5) / 41)
    assert told["reason"] == "1 of 3 experts: few" and told["shrinkage"] == 0.5


def test_the_recorder_sees_only_what_it_is_told_to(mixture) -> None:
    checkpoint, model, tokens, _ = mixture
    names = ["blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight"]
    recorder = Recorder(model, checkpoint, names)
    with torch.no_grad(), recorder:
        model(torch.from_numpy(tokens[:1].astype(np.int64)))
    assert sorted(recorder.used) == sorted(names) == sorted(recorder.tensors)
