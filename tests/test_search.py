"""The search on the true KLD: proposals, the paired test, estimate against measurement, and what it may never do."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from test_allocate import METADATA, TABLE, TENSORS

from dynq.allocate import Option, Problem
from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.fisher import Fisher
from dynq.imatrix import read_imatrix
from dynq.search import (
    Bench,
    allocations,
    exchanges,
    improve,
    nearby,
    paired,
    parse_seconds,
    significant,
)
from dynq.search_log import read_log
from dynq.sensitivity import sensitivity
from dynq.text import load_text, prompts
from dynq.torch_model import load_model, load_tokenizer, set_tensor

# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 0), ("90s", 90), ("10min", 600), (" 1.5 H ", 5400), ("2m", 120), (".5h", 1800)]
)
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "min", "-5min", "0s", "10 minutes or so", "1h30", "nan s", "5d"])
def test_what_is_no_time(text):
    with pytest.raises(DynqError, match="10min") as error:
        parse_seconds(text)
    assert repr(text) in str(error.value)


def test_paired_test_equals_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        for shift in (-0.5, -0.1, 0.1):
            before = rng.lognormal(0, 1, n)
            after = before + rng.normal(shift, 0.3, n)
            naive = stats.ttest_rel(after, before, alternative="less")
            assert paired(before, after) == pytest.approx(naive.statistic)
            assert significant(paired(before, after), n) == (naive.pvalue < 0.1)
    assert paired(np.ones(4), np.ones(4)) == 0 and not significant(0.0, 4)
    assert significant(paired(np.ones(4), np.full(4, 0.5)), 4)


def test_nearby_options_are_the_next_ones_that_nothing_beats():
    row = Problem.of(TABLE, TENSORS, "4bpw", metadata=METADATA).options["blk.0.ffn_up.weight"]
    for present in (o.format for o in row):
        near = nearby(row, present, 1)
        assert present in [o.format for o in near] and len(near) <= 3
        others = [o for o in near if o.format != present]
        assert not any(o.bytes <= kept.bytes and o.loss < kept.loss for kept in others for o in row)


def some_costs(problem, present, seed=0):
    """Losses of the table disturbed, against the present formats."""
    rng = np.random.default_rng(seed)
    costs = {}
    for name, row in problem.options.items():
        near = nearby(row, present[name])
        own = next(o.loss for o in near if o.format == present[name])
        costs[name] = {
            o.format: 0.0 if o.format == present[name] else (o.loss - own) + rng.normal(0, 1.5) * own for o in near
        }
    return costs


@pytest.mark.parametrize(
    ("target", "pins"), [("3.5bpw", {}), ("4bpw", {"blk.*.attn_v.weight": "Q6_K", "output.weight": ">=Q5_K"})]
)
def test_proposals_keep_bytes_and_pins(target, pins):
    problem = Problem.of(TABLE, TENSORS, target, metadata=METADATA, pins=pins)
    present = problem.solve()
    costs = some_costs(problem, present)
    total = lambda taken: sum(o.bytes for o in problem.chosen(taken).values())  # noqa: E731
    found = allocations(problem, present, costs, 0.1)
    counts = [len(p.formats) for p in found]
    assert counts and counts == sorted(counts), "few changes first"
    pairs = exchanges(problem, present, costs)
    assert pairs and [p.estimate for p in pairs] == sorted(p.estimate for p in pairs)
    assert all(p.estimate < 0 and len(p.formats) <= 2 for p in pairs)
    tensors = [name for p in pairs for name in p.formats]
    assert len(tensors) == len(set(tensors)), "each tensor once"
    for p in found + pairs:
        assert total(present | p.formats) <= problem.room
        assert p.estimate == pytest.approx(sum(costs[n][f] for n, f in p.formats.items()))
        assert all(present[n] != f for n, f in p.formats.items())
        if pins:
            assert not any("attn_v" in name for name in p.formats)
            assert p.formats.get("output.weight") in (None, "Q5_K", "Q6_K", "Q8_0", "F16", "Q5_1")


def test_the_first_exchange_is_the_best_of_all():
    problem = Problem.of(TABLE, TENSORS, "4bpw", metadata=METADATA)
    present = problem.solve()
    costs = some_costs(problem, present, 1)
    size = {name: {o.format: o.bytes for o in row} for name, row in problem.options.items()}
    left = problem.room - sum(size[n][present[n]] for n in size)
    one = [(n, f, c, size[n][f] - size[n][present[n]]) for n in costs for f, c in costs[n].items() if f != present[n]]
    best = min(c for _, _, c, b in one if b <= left)
    for a, b in itertools.combinations(one, 2):
        if a[0] != b[0] and a[3] + b[3] <= left:
            best = min(best, a[2] + b[2])
    assert exchanges(problem, present, costs)[0].estimate == pytest.approx(best)
    assert exchanges(problem, present, {name: {present[name]: 0.0} for name in present}) == []


# --- the embedded model -----------------------------------------------------------------------------------------------

FORMATS = ("Q2_K", "Q3_K", "Q4_K")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoint, tokens, a calibrated folder and its table. Its text is written: the same on every machine."""
    checkpoint = open_checkpoint("dynq-tiny")
    model = load_model(checkpoint)
    folder = tmp_path_factory.mktemp("run")
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in prompts("evaluate")), "utf-8")
    text = load_text(str(chats), load_tokenizer(checkpoint), n_ctx=64, n_chunks=18, seed=0)
    importance = calibrate(checkpoint, model, text.tokens, folder, keep=512, source="test")
    table = sensitivity(checkpoint, folder, importance, FORMATS, threads=1)
    return checkpoint, text.tokens, folder, table


def test_estimate_at_the_quantized_model_against_measured_swaps(run, tmp_path):
    """Its slope is the measured one. Its curvature is the original's, and rests on labels that are drawn once.

    Four draws were within a fifth of it. The worse the model, the smaller its own curvature (LOG, "Search").
    """
    checkpoint, tokens, folder, _ = run
    model = load_model(checkpoint)
    reference = kld.make_reference(model, tokens, tmp_path / "reference", first=0, desc="")
    importance = read_imatrix(folder / "imatrix.gguf")
    bench = Bench(checkpoint, model, Fisher(folder / "fisher"), importance, "plain", 1)
    problem = Problem.of(run[3], checkpoint.tensors, "3bpw", metadata=checkpoint.metadata)
    bench.put(dict.fromkeys(problem.options, "Q5_K"))
    gradients, before = bench.gradient(reference)
    np.testing.assert_allclose(before, bench.measure(reference), rtol=1e-3)
    changes = [Option(fmt, 0, 0.0) for fmt in ("Q4_K", "Q6_K")]
    rows = []
    # not the embedding: its cross-token factor rests on eighteen squares here
    for name in [n for n in problem.options if ".0." in n]:
        costs = bench.costs(name, changes, gradients[name])
        assert costs.pop("Q5_K") == 0.0
        here = bench.decoded(name, "Q5_K")
        for fmt, estimate in costs.items():
            change = bench.decoded(name, fmt) - here
            set_tensor(model, checkpoint, name, here - change)
            back = (bench.measure(reference) - before).mean()
            bench.put({name: fmt})
            there = (bench.measure(reference) - before).mean()
            first = (gradients[name].double() * torch.from_numpy(change).double()).sum().item()
            rows.append((estimate, there, back, first))
        bench.put({name: "Q5_K"})
    values = np.array(rows).reshape(-1, len(changes), 4)
    assert stats.spearmanr(values[..., 0], values[..., 1], axis=None).statistic > 0.9
    estimated, measured, back, first = values.sum(0).T
    np.testing.assert_allclose(estimated / measured, 1, atol=0.35)
    np.testing.assert_allclose(first, (measured - back) / 2, rtol=0.02)
    np.testing.assert_allclose(estimated - first, (measured + back) / 2, rtol=0.25)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def bad_start(problem, seed=0):
    """A recipe of the right size that no one would choose."""
    rng = np.random.default_rng(seed)
    taken = {name: min(row, key=lambda o: o.bytes).format for name, row in problem.options.items()}
    for name in rng.permutation(list(taken)):
        better = taken | {str(name): max(problem.options[name], key=lambda o: o.bytes).format}
        if sum(o.bytes for o in problem.chosen(better).values()) <= problem.room:
            taken = better
    return problem.recipe(taken, {"seed": seed})


@pytest.fixture(scope="module")
def searched(run, tmp_path_factory):
    checkpoint, tokens, folder, table = run
    pins = {"blk.[2-9].*": "Q3_K", "blk.*.attn_v.weight": ">=Q3_K"}
    problem = Problem.of(table, checkpoint.tensors, "3.4bpw", metadata=checkpoint.metadata, pins=pins)
    start = bad_start(problem)

    def search(folder, **options):
        own = options.pop("start", start)
        importance = read_imatrix(folder / "imatrix.gguf")
        args = checkpoint, load_model(checkpoint), problem, own, importance, tokens[:9], folder, "t"
        return improve(*args, **{"seconds": 1e9, "threads": 1, "max_tried": 7} | options)

    own = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(folder, own)
    return search, own, problem, start, search(own)


def test_a_bad_start_gets_better_within_its_bytes_and_pins(searched):
    _, folder, problem, _, found = searched
    told = found.provenance["search"]
    assert found.provenance["seed"] == 0 and found.provenance["allocation"]["budget_bytes"] == problem.budget
    assert told["accepted"] >= 1 and told["tried"] == 7 and told["level"] == "plain"
    assert told["kld_held_out"][1] < 0.9 * told["kld_held_out"][0] and told["kld_fit"][1] < told["kld_fit"][0]
    assert sum(o.bytes for o in problem.chosen(found.formats).values()) <= problem.room
    assert found.predicted_kld == pytest.approx(sum(o.loss for o in problem.chosen(found.formats).values()))
    for name, fmt in found.formats.items():
        if "attn_v" in name:
            assert fmt in ("Q3_K", "Q4_K")
        elif name[4:6] in [f"{i}." for i in range(2, 10)]:
            assert fmt in ("Q3_K", "F32")
    lines = read_log(folder / "t.search.jsonl")
    assert len(lines) == 8 and sum(line["accepted"] for line in lines[1:]) == told["accepted"]
    held = [line["kld_held_out"] for line in lines if "kld_held_out" in line]
    assert told["kld_held_out"] == [held[0], min(held)]
    assert not list(folder.glob("*.u16"))


@pytest.mark.parametrize("kept", [2, 5])
def test_a_search_that_was_cut_off_ends_the_same(searched, tmp_path, kept):
    search, folder, _, _, whole = searched
    cut = tmp_path / "run"
    shutil.copytree(folder, cut)
    lines = (folder / "t.search.jsonl").read_text().splitlines(keepends=True)
    half = lines[kept + 1][: lines[kept + 1].index("}") + 1]  # cut off where it looks like an end
    (cut / "t.search.jsonl").write_text("".join(lines[: kept + 1]) + half)
    assert search(cut).to_json() == whole.to_json()
    strip = lambda path: [line | {"seconds": 0} for line in read_log(path / "t.search.jsonl")]  # noqa: E731
    assert strip(cut) == strip(folder)


def test_the_held_out_part_decides(searched, tmp_path):
    """Steps that are worse on held-out text are not returned, whatever the tested part says."""
    search, folder, _, start, _ = searched
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    header, *lines = [json.loads(line) for line in (folder / "t.search.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        if line["accepted"]:
            line["kld_held_out"] = 2 * lines[0]["kld_held_out"]
    (other / "t.search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    found = search(other)
    assert found.formats == start.formats and found.provenance["search"]["taken"] == 0


def test_no_time_returns_the_start_and_another_start_begins_anew(searched, tmp_path):
    search, folder, problem, _, _ = searched
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    better = problem.recipe(problem.solve(), {})
    found = search(other, start=better, seconds=1e-3)
    assert found.formats == better.formats and len(read_log(other / "t.search.jsonl")) == 1
    assert found.tensor_bytes == better.tensor_bytes and found.predicted_kld == better.predicted_kld


def test_too_little_text(searched, run):
    _, folder, problem, start, _ = searched
    with pytest.raises(DynqError, match=r"at least 6 chunks.*not 5.*n_chunks"):
        improve(run[0], None, problem, start, None, run[1][:5], folder, "t", seconds=1.0)
