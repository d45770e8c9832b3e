"""The allocator: the solver against exact ones, targets, pins, profiles, and what it says to a user's mistake."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from dynq import formats, mixes
from dynq.allocate import allocate, parse_pins, parse_target
from dynq.checkpoint import TensorInfo
from dynq.errors import DynqError
from dynq.knapsack import choose

# --- the solver -------------------------------------------------------------------------------------------------------


def total(table, picked):
    return sum(row[j] for row, j in zip(table, picked, strict=True))


def by_brute_force(size, loss, budget):
    every = itertools.product(*(range(len(row)) for row in size))
    return min(total(loss, picked) for picked in every if total(size, picked) <= budget)


def by_milp(size, loss, budget):
    lengths = [len(row) for row in size]
    n = sum(lengths)
    one_each = coo_matrix((np.ones(n), (np.repeat(np.arange(len(size)), lengths), np.arange(n))))
    flat, scale = np.concatenate(loss), max(map(max, size))
    found = milp(
        flat / flat.max(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.concatenate(size)[None] / scale, -np.inf, budget / scale),
        ],
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert found.status == 0
    return float(flat @ found.x.round())


def like_a_model(rng, n, width):
    """Tensors of a few shapes, one large; losses that fall by about 4 for each bit and differ by tensor."""
    bits = np.array([2.06, 2.31, 2.5, 2.625, 3.06, 3.4375, 4.25, 4.5, 4.5, 5.0, 5.5, 5.5, 6.0, 6.5625, 8.5, 16.0])
    size, loss = [], []
    for i in range(n):
        weights = 128256 * 4096 if i == 0 else 4096 * int(rng.choice([1024, 4096, 14336]))
        chosen = np.sort(rng.choice(bits, width, replace=False))
        size.append((weights * chosen / 8).astype(np.int64))
        loss.append(10 ** rng.uniform(-5, -2) * 4.0 ** (2 - chosen) * rng.lognormal(0, 0.3, width))
    return size, loss


def at_random(rng, n, width):
    return [rng.integers(1, 10**6, width) for _ in range(n)], [rng.random(width) for _ in range(n)]


@pytest.mark.parametrize("make", [like_a_model, at_random])
@pytest.mark.parametrize(("n", "width"), [(12, 5), (60, 10), (200, 15)])
def test_as_good_as_an_exact_solver(make, n, width):
    rng = np.random.default_rng(n)
    for _ in range(3):
        size, loss = make(rng, n, width)
        low, high = sum(map(min, size)), sum(row[x.argmin()] for row, x in zip(size, loss, strict=True))
        budget = int(low + (high - low) * rng.uniform(0.05, 0.8))
        picked = choose(size, loss, budget)
        assert total(size, picked) <= budget
        assert total(loss, picked) <= by_milp(size, loss, budget) * (1 + 1e-8)


numbers = st.tuples(st.integers(1, 60), st.integers(0, 40).map(lambda x: x / 8))
problems = st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda rows: ([[b for b, _ in row] for row in rows], [[x for _, x in row] for row in rows])
)


@settings(max_examples=200, deadline=None)
@given(problems, st.integers(0, 120))
def test_small_ones_are_exact_and_never_over(problem, spare):
    size, loss = problem
    budget = sum(map(min, size)) + spare
    picked = choose(size, loss, budget)
    assert total(size, picked) <= budget
    assert total(loss, picked) == pytest.approx(by_brute_force(size, loss, budget), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.lists(st.floats(0, 1.1), min_size=2, max_size=6))
def test_a_larger_budget_is_never_worse(seed, n, parts):
    size, loss = like_a_model(np.random.default_rng(seed), n, 8)
    low, high = sum(map(min, size)), sum(map(max, size))
    losses = [total(loss, choose(size, loss, int(low + (high - low) * part))) for part in sorted(parts)]
    for smaller, larger in itertools.pairwise(losses):
        assert larger <= smaller * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 1))
def test_what_is_left_over_is_too_little_for_any_step(seed, n, part):
    size, loss = like_a_model(np.random.default_rng(seed), n, 8)
    low, high = sum(map(min, size)), sum(map(max, size))
    budget = int(low + (high - low) * part)
    picked = choose(size, loss, budget)
    left = budget - total(size, picked)
    for row, losses, j in zip(size, loss, picked, strict=True):
        assert not np.any((losses < losses[j]) & (row - row[j] <= left))


def test_enough_for_all_takes_the_best_of_each_in_the_fewest_bytes():
    size, loss = [[5, 9, 7], [4, 8]], [[3.0, 1.0, 1.0], [2.0, 2.5]]
    assert choose(size, loss, 100) == [2, 0]
    assert choose(size, loss, 11) == [2, 0]
    assert choose(size, loss, 10) == [0, 0]
    assert choose([], [], 0) == []
    with pytest.raises(ValueError, match="need 9 bytes"):
        choose(size, loss, 8)


# --- a table, a target, a recipe --------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 8,
}
MEASURED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16")


def model(embd=256, ff=512):
    shapes = {"token_embd.weight": (300, embd)}
    for i in range(4):
        shapes |= {f"blk.{i}.attn_norm.weight": (embd,)}
        shapes |= {f"blk.{i}.attn_{kind}.weight": (embd, embd) for kind in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_up.weight": (ff, embd), f"blk.{i}.ffn_down.weight": (embd, ff)}
    shapes |= {"output_norm.weight": (embd,), "output.weight": (300, embd)}
    return {name: TensorInfo(name, shape, "BF16") for name, shape in shapes.items()}


def sensitivities(tensors, measured=MEASURED):
    rng = np.random.default_rng(0)
    rows = [
        (name, fmt, 10 ** rng.uniform(-4, -2) * 4.0 ** (2 - formats.get(fmt).bpw))
        for name, tensor in tensors.items()
        if tensor.quantizable
        for fmt in measured
    ]
    return pa.table(dict(zip(("tensor", "format", "predicted_kld"), map(list, zip(*rows, strict=True)), strict=True)))


TENSORS = model()
TABLE = sensitivities(TENSORS)
WEIGHTS = sum(tensor.n_weights for tensor in TENSORS.values())


def run(target, tensors=TENSORS, table=TABLE, **options):
    return allocate(table, tensors, target, metadata=METADATA, **options)


def test_bits_per_weight_count_everything():
    recipe = run("3.5bpw", provenance={"seed": 7})
    assert list(recipe.formats) == list(TENSORS)
    assert recipe.formats["blk.0.attn_norm.weight"] == recipe.formats["output_norm.weight"] == "F32"
    assert recipe.tensor_bytes == sum(formats.tensor_bytes(f, TENSORS[n].shape) for n, f in recipe.formats.items())
    assert 3.45 < recipe.bpw == 8 * recipe.tensor_bytes / WEIGHTS <= 3.5
    known = {(row["tensor"], row["format"]): row["predicted_kld"] for row in TABLE.to_pylist()}
    assert recipe.predicted_kld == pytest.approx(sum(known.get(item, 0.0) for item in recipe.formats.items()))
    assert recipe.target == "3.5bpw" and recipe.provenance["seed"] == 7
    assert "note" not in recipe.provenance["allocation"]


def test_a_file_counts_header_and_padding():
    tensors = model(embd=40, ff=96)  # rows of 40 weights: F16 only
    tensors["token_embd.weight"] = TensorInfo("token_embd.weight", (301, 32), "BF16")  # Q8_0: 34 bytes a row
    table = sensitivities(tensors)
    for size in range(150_000, 250_000, 5_555):
        recipe = run(f"{size / 1000}kB", tensors, table, header_bytes=1234)
        padded = [-(-formats.tensor_bytes(f, tensors[n].shape) // 32) * 32 for n, f in recipe.formats.items()]
        assert recipe.provenance["allocation"]["used_bytes"] == sum(padded) + 1234 <= size


def test_as_large_as_a_mix_at_most():
    recipe = run("like:Q3_K_M")
    size = mixes.mix_bytes("Q3_K_M", TENSORS, METADATA, True)
    assert 0.98 * size < recipe.tensor_bytes <= size


def test_fallbacks_are_merged():
    tensors = model(embd=288, ff=512)
    recipe = run("5bpw", tensors, sensitivities(tensors, ("Q2_K", "Q4_K", "Q6_K")))
    assert set(recipe.formats.values()) <= {"F32", "Q2_K", "Q4_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0"}
    for name, fmt in recipe.formats.items():
        assert formats.usable(fmt, tensors[name].row) == fmt


def test_pins_bounds_and_profiles():
    pins = parse_pins(["blk.*=Q4_K", "blk.*.attn_v.weight = Q6_K", "output.weight>=Q6_K", "token_embd.weight<=Q3_K"])
    recipe = run("9bpw", pins=pins)
    assert {recipe.formats[f"blk.{i}.attn_v.weight"] for i in range(4)} == {"Q6_K"}
    assert {recipe.formats[f"blk.{i}.ffn_up.weight"] for i in range(4)} == {"Q4_K"}
    assert recipe.formats["output.weight"] == "F16" and recipe.formats["token_embd.weight"] == "Q3_K"
    assert run("4.5bpw", pins={"output.weight": "BF16"}).formats["output.weight"] == "BF16"  # not measured, no loss
    arm = run("5bpw", profile="cpu-arm").formats.values()
    assert set(arm) <= {"F32", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16"}
    bounded = run("5bpw", profile="cpu-arm", pins={"*": ">=Q4_0"}).formats.values()  # a bound keeps to the profile,
    assert set(bounded) <= {"F32", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16"}
    assert (
        run("5bpw", profile="cpu-arm", pins={"output.weight": "Q6_K"}).formats["output.weight"] == "Q6_K"
    )  # a pin may not


def test_more_than_the_largest_takes_it_and_says_so():
    recipe = run("20bpw")
    assert {recipe.formats[name] for name, tensor in TENSORS.items() if tensor.quantizable} == {"F16"}
    assert "is the largest" in recipe.provenance["allocation"]["note"]


@pytest.mark.parametrize(
    ("target", "unit"), [("1.5bpw", " bpw"), ("0.2MB", " MB"), ("0.0002 GiB", " GiB"), ("1000B", " B")]
)
def test_too_small_says_the_smallest_in_the_same_unit_and_that_one_works(target, unit):
    with pytest.raises(DynqError, match="smallest possible") as error:
        run(target, header_bytes=5000)
    smallest = str(error.value).rpartition("is ")[2]
    assert smallest.endswith(unit)
    recipe = run(smallest, header_bytes=5000)
    assert sum(fmt == "Q2_K" for fmt in recipe.formats.values()) > 20
    with pytest.raises(DynqError, match="MB of tensor data"):
        run("like:Q2_K", pins={"*": ">=Q8_0"})


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3.5bpw", "bpw", 3.5),
        (" 3.5 Bits", "bpw", 3.5),
        ("8GB", "file", 8e9),
        ("750mb", "file", 750e6),
        ("2.5GiB", "file", 2.5 * 2**30),
        ("6346016 B", "file", 6346016),
        ("like:q4_k_m", "like", 0.0),
    ],
)
def test_targets(text, kind, value):
    target = parse_target(text)
    assert (target.kind, target.value, target.text) == (kind, value, text)


@pytest.mark.parametrize(
    "text", ["", "8", "GB", "-3bpw", "0bpw", "nanbpw", "3,5bpw", "8GBit", "1e9GB", "like:", "like:Q9"]
)
def test_what_is_not_a_target(text):
    with pytest.raises(DynqError, match=r"3\.5bpw|Q4_K_M"):
        parse_target(text)


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ({"blk.0.attn_w.weight": "Q4_K"}, "matches no tensor; near: blk.0.attn_"),
        ({"*.attn_norm.weight": "Q4_K"}, "keeps in F32"),
        ({"output.weight": "Q9_K"}, "unknown format 'Q9_K'"),
        ({"output.weight": "Q4_1"}, "no sensitivity was measured"),
    ],
)
def test_pins_that_cannot_be(pins, says):
    with pytest.raises(DynqError) as error:
        run("4bpw", pins=pins)
    assert says in str(error.value)


def test_other_mistakes_are_named():
    with pytest.raises(DynqError, match="cpu-arm"):
        run("4bpw", profile="gpu")
    with pytest.raises(DynqError, match="measure more formats"):
        run("4bpw", table=sensitivities(TENSORS, ("Q4_K",)), profile="cpu-arm")
    with pytest.raises(DynqError, match="no row for blk"):
        run("4bpw", table=TABLE.slice(0, 10))
    with pytest.raises(DynqError, match="another model's table"):
        run("4bpw", {k: v for k, v in TENSORS.items() if k != "output.weight"})
    bad = TABLE.set_column(2, "predicted_kld", pa.array([math.nan] * TABLE.num_rows))
    with pytest.raises(DynqError, match="nan for token_embd"):
        run("4bpw", table=bad)
    with pytest.raises(DynqError, match="write TENSORS=FORMAT"):
        parse_pins(["output.weight"])
