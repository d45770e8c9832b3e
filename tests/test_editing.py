"""A recipe under a person's hands: what is set stays, the rest is solved again, everything can be undone."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from dynq import formats, mixes
from dynq.allocate import allocate
from dynq.budget import Budget
from dynq.checkpoint import TensorInfo
from dynq.editing import Draft
from dynq.errors import DynqError
from dynq.knapsack import choose, frontier
from dynq.recipe import Recipe

SHAPES = {"attn_q": (256, 256), "attn_v": (128, 256), "ffn_down": (256, 1024), "attn_output": (256, 96)}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
FORMATS = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")


def model(layers=4):
    infos = [TensorInfo("token_embd.weight", (512, 256), "BF16"), TensorInfo("output_norm.weight", (256,), "F32")]
    for layer in range(layers):
        infos += [TensorInfo(f"blk.{layer}.{kind}.weight", shape, "BF16") for kind, shape in SHAPES.items()]
        infos.append(TensorInfo(f"blk.{layer}.attn_norm.weight", (256,), "F32"))
    return {info.name: info for info in infos}


def table(tensors, candidates=FORMATS, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for info in tensors.values():
        if not info.quantizable:
            continue
        scale = 10 ** rng.uniform(-4, -1)
        for fmt in dict.fromkeys(formats.usable(f, info.row) for f in candidates):
            loss = scale * 4.0 ** (2 - formats.get(fmt).bpw) * rng.lognormal(0, 0.3)
            rows.append({"tensor": info.name, "format": fmt, "predicted_kld": 0.0 if fmt == "F16" else loss})
    return pa.Table.from_pylist(rows)


@pytest.fixture
def budget():
    tensors = model()
    return Budget(table(tensors), tensors, metadata=METADATA, header_bytes=4096)


@pytest.fixture
def draft(budget):
    return Draft(budget, "3.5bpw", provenance={"model": "abc"})


VALUES = [f"blk.{layer}.attn_v.weight" for layer in range(4)]

# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["3.5bpw", "700kB", "like:Q4_K_M"])
def test_the_problem_of_a_target_is_that_of_allocate(budget, target):
    tensors = model()
    expected = allocate(table(tensors), tensors, target, metadata=METADATA, header_bytes=4096)
    problem = budget.at(target)
    assert problem.recipe(problem.solve(), {}) == expected
    assert Draft(budget, target).recipe() == expected


def test_frontier_is_the_hull_of_what_the_solver_finds():
    rng = np.random.default_rng(1)
    size = [np.sort(rng.choice(10**5, 8, replace=False)) for _ in range(30)]
    loss = [np.sort(rng.random(8))[::-1] * rng.lognormal(0, 2) for _ in range(30)]
    sizes, losses = frontier(size, loss)
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
    assert (np.diff(losses) / np.diff(sizes) <= np.r_[np.diff(losses)[1:] / np.diff(sizes)[1:], 0] + 1e-15).all()
    for k in (0, 1, len(sizes) // 2, len(sizes) - 1):
        picked = choose(size, loss, int(sizes[k]))
        assert sum(x[j] for x, j in zip(loss, picked, strict=True)) == pytest.approx(losses[k], rel=1e-9)
    assert losses[-1] == pytest.approx(sum(x.min() for x in loss), rel=1e-12)


def test_quick_solution_fits_and_is_near(budget):
    for bpw in (2.5, 3.0, 4.1, 5.7):
        problem = budget.at(f"{bpw}bpw")
        quick, exact = problem.chosen(problem.solve(exact=False)), problem.chosen(problem.solve())
        assert sum(o.bytes for o in quick.values()) <= problem.room
        assert sum(o.loss for o in exact.values()) <= sum(o.loss for o in quick.values())
        frontier_ = budget.frontier()
        line = np.interp(problem.budget, frontier_.tensor_bytes, frontier_.kld)
        assert line <= sum(o.loss for o in exact.values()) * (1 + 1e-9)


def test_mixes_have_the_sizes_and_losses_of_their_formats(budget):
    tensors, known = model(), {(r["tensor"], r["format"]): r["predicted_kld"] for r in table(model()).to_pylist()}
    sizes = [mix.tensor_bytes for mix in budget.mixes]
    assert sizes == sorted(set(sizes))
    by_name = {mix.name: mix for mix in budget.mixes}
    found = by_name["Q4_K_M"]
    assert found.tensor_bytes == mixes.mix_bytes("Q4_K_M", tensors, METADATA, True)
    losses = [known[name, fmt] for name, fmt in found.formats.items() if tensors[name].quantizable]
    assert found.kld == pytest.approx(sum(losses))
    assert by_name["IQ2_M"].kld is None  # takes IQ2_S, which nobody measured


def test_without_importance_no_mix_that_needs_it():
    tensors = model()
    plain = [f for f in FORMATS if not formats.get(f).needs_importance]
    shown = Budget(table(tensors, plain), tensors, metadata=METADATA, has_importance=False).mixes
    assert {"Q2_K", "Q4_K_M"} <= {mix.name for mix in shown}
    assert not any(formats.get(fmt).needs_importance for mix in shown for fmt in mix.formats.values())


def test_too_small_is_one_line(budget):
    with pytest.raises(DynqError, match=r"smallest possible is .* bpw"):
        budget.at("1bpw")


# --- the draft --------------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_recipe(draft):
    for target in ("3.5bpw", "700kB", "like:Q4_K_M"):
        draft.aim(target)
        totals, recipe = draft.totals(), draft.recipe()
        assert (totals.tensor_bytes, totals.bpw) == (recipe.tensor_bytes, recipe.bpw)
        assert totals.kld == pytest.approx(recipe.predicted_kld)
        assert totals.used == recipe.provenance["allocation"]["used_bytes"] <= totals.budget
        assert (totals.target, recipe.provenance["model"]) == (target, "abc")
    assert sum(draft.shares().values()) == pytest.approx(1)
    assert all(sum(parts.values()) == pytest.approx(1) for parts in draft.layer_shares().values())
    assert list(draft.layer_shares()) == [None, 0, 1, 2, 3]


def test_alternatives_tell_what_setting_does(draft):
    before = draft.totals()
    for told in draft.alternatives(VALUES):
        draft.set(VALUES, told.format)
        after = draft.totals()
        assert after.used - before.used == told.bytes
        assert after.kld - before.kld == pytest.approx(told.kld, abs=1e-12)
        draft.undo()
    assert draft.totals() == before


def test_what_is_set_stays_when_the_rest_is_solved_again(draft):
    assert draft.set(VALUES, "Q8_0") == 4
    over = draft.totals()
    assert over.used > over.budget
    draft.solve()
    assert draft.totals().used <= draft.totals().budget
    assert {draft.state.formats[name] for name in VALUES} == {"Q8_0"}
    pins = draft.recipe().provenance["allocation"]["pins"]
    assert pins == dict.fromkeys(VALUES, "Q8_0")
    problem = draft.budget.at("3.5bpw").pinned(pins)
    assert draft.state.formats == problem.solve()
    draft.aim("4bpw")
    assert {draft.state.formats[name] for name in VALUES} == {"Q8_0"}
    draft.pin(VALUES, on=False)
    draft.solve()
    assert draft.state.formats == draft.budget.at("4bpw").solve()


def test_a_row_that_does_not_divide_takes_the_fallback(draft):
    draft.set(["blk.0.attn_output.weight", "blk.0.attn_q.weight"], "Q4_K")
    assert draft.state.formats["blk.0.attn_output.weight"] == "Q5_0"
    assert draft.state.formats["blk.0.attn_q.weight"] == "Q4_K"


def test_steps_go_along_what_is_useful(draft):
    name = "blk.1.ffn_down.weight"
    draft.set([name], "IQ2_XXS")
    losses = [draft.chosen()[name].loss]
    while draft.step([name], up=True):
        losses.append(draft.chosen()[name].loss)
    assert draft.state.formats[name] == "F16" and losses == sorted(losses, reverse=True) and len(losses) > 4
    while draft.step([name], up=False):
        pass
    assert draft.state.formats[name] == "IQ2_XXS"


def test_undo_and_redo(draft):
    seen = [draft.state]
    draft.set(VALUES, "Q6_K")
    seen.append(draft.state)
    draft.pin(["token_embd.weight"])
    seen.append(draft.state)
    draft.aim("5bpw")
    seen.append(draft.state)
    for state in seen[-2::-1]:
        draft.undo()
        assert draft.state == state
    assert not draft.can_undo
    draft.undo()  # nothing left: nothing happens
    for state in seen[1:]:
        draft.redo()
        assert draft.state == state
    draft.undo()
    draft.set(VALUES, "Q2_K")
    assert not draft.can_redo


def test_a_slider_is_one_step_to_undo(draft):
    start = draft.state
    for target in ("3.6bpw", "3.8bpw", "4.2bpw"):
        draft.aim(target, moving=True)
    draft.aim("4.2bpw")
    draft.set(VALUES, "Q8_0")
    draft.undo()
    assert draft.totals().target == "4.2bpw"
    draft.undo()
    assert draft.state == start and not draft.can_undo


def test_listeners_hear_every_change(draft):
    heard = []
    draft.listen(lambda: heard.append(draft.totals().target))
    draft.aim("4bpw")
    draft.set(VALUES, "Q8_0")
    draft.pin(VALUES)  # they are pinned: no change
    draft.undo()
    assert heard == ["4bpw", "4bpw", "4bpw"]


def test_saved_and_loaded(draft, tmp_path):
    draft.set(VALUES, "Q8_0")
    draft.solve()
    draft.recipe().save(tmp_path / "mine.recipe.json")
    other = Draft(draft.budget, "3.5bpw")
    other.load(Recipe.load(tmp_path / "mine.recipe.json"))
    assert (other.state.formats, other.state.pinned) == (draft.state.formats, frozenset(VALUES))
    assert other.can_undo


def test_starts_from_a_recipe_that_was_searched(draft):
    draft.set(VALUES, "Q8_0")
    made = draft.recipe()
    searched = replace(made, provenance=made.provenance | {"search": {"kld_held_out": [0.2, 0.1]}})
    other = Draft(draft.budget, "3.5bpw", start=searched)
    assert (other.state.formats, other.state.pinned) == (draft.state.formats, frozenset(VALUES))
    assert not other.can_undo
    assert other.recipe() == made


def test_mistakes_are_one_line_and_change_nothing(draft):
    before = draft.state
    with pytest.raises(DynqError, match="IQ1_S is no option of any of 4 tensors"):
        draft.set(VALUES, "IQ1_S")
    with pytest.raises(DynqError, match=r"blk\.9"):
        draft.pin(["blk.9.attn_q.weight"])
    with pytest.raises(DynqError, match="another model"):
        draft.load(Recipe({"blk.0.attn_q.weight": "Q4_K"}, "4bpw", 1, 4.0, None))
    with pytest.raises(DynqError, match="no option here"):
        draft.load(Recipe(draft.recipe().formats | {VALUES[0]: "IQ1_S"}, "4bpw", 1, 4.0, None))
    draft.pin(draft.state.formats)
    with pytest.raises(DynqError, match=r"smallest possible .*, with 17 pinned"):
        draft.aim("2.5bpw")
    draft.undo()
    assert draft.state == before
