"""The mixes against libllama's own decisions: recorded ones always, live ones where llama-cpp-python is installed."""

import importlib.util
import json
import math

import pytest
from llama_quantize import FILE_TYPES
from record_mixes import DATA, MODELS, decisions, runs

from dynq import mixes
from dynq.allocate import parse_target
from dynq.errors import DynqError

RECORD = json.loads(DATA.read_text())["models"]


def ours(title: str, mix: str, has_importance: bool) -> dict[str, str] | None:
    """`runs` of what dynq makes of it; None where it refuses."""
    model = MODELS[title]
    try:
        return runs(mixes.mix(mix, model.tensors(), model.metadata(), has_importance))
    except DynqError:
        return None


def test_record_holds_every_model_and_mix():
    assert set(RECORD) == set(MODELS)
    assert set(FILE_TYPES) - set(mixes.MIXES) <= {"Q2_0"}  # gguf 0.19 does not know the format
    assert all(set(found) == set(FILE_TYPES) for found in RECORD.values())


@pytest.mark.parametrize("title", MODELS)
def test_same_as_recorded(title):
    for mix in mixes.MIXES:
        found = RECORD[title][mix]
        assert ours(title, mix, False) == found["without"], mix
        assert ours(title, mix, True) == found.get("with importance", found["without"]), mix


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python (the extra bench)")
def test_same_as_libllama_here():
    # the record holds them all; a few are enough to see that another build decides as the recorded one did
    few = [title for title, model in MODELS.items() if model.layers < 30 or "70B" in title][::2]
    for title, mix, has_importance, found in decisions(few):
        if mix in mixes.MIXES:
            theirs = found.types and runs(found.types)
            assert ours(title, mix, has_importance) == theirs, (title, mix, has_importance)


def test_order_of_tensors_does_not_matter():
    model = MODELS["llama, 32 layers, 4 heads shared (8B)"]
    tensors = model.tensors()
    backwards = dict(reversed(tensors.items()))
    found = mixes.mix("Q4_K_M", backwards, model.metadata(), True)
    assert list(found) == list(backwards)
    assert found == mixes.mix("Q4_K_M", tensors, model.metadata(), True)


def test_head_counts_per_layer():
    model = MODELS["llama, 32 layers, 4 heads shared (8B)"]
    metadata = model.metadata() | {"llama.attention.head_count": [32] * 32, "llama.attention.head_count_kv": [8] * 32}
    assert mixes.mix("Q2_K", model.tensors(), metadata, True) == mixes.mix(
        "Q2_K", model.tensors(), model.metadata(), True
    )


def test_what_is_missing_is_named():
    model = MODELS["llama, 4 layers, no shared heads"]
    with pytest.raises(DynqError, match="Q4_K_M"):
        mixes.mix("Q4_K_XL", model.tensors(), model.metadata(), True)
    with pytest.raises(DynqError, match=r"llama\.block_count"):
        mixes.mix("Q4_K_M", model.tensors(), {"general.architecture": "llama", "llama.attention.head_count": 8}, True)


def test_every_mix_is_a_target():
    for name in mixes.MIXES:
        assert parse_target(f"like:{name.lower()}").like == name


def test_bytes_by_hand():
    model = MODELS["llama, 4 layers, no shared heads"]._replace(layers=1)
    # Q4_0: 18 bytes for 32; q, k, v, o, gate, up of 2 x 256 and down of 2 x 512; output (Q6_K, 210 for 256) and
    # embedding of 4 x 256; three norms of 256 floats
    by_hand = (6 * 512 + 1024 + 1024) // 32 * 18 + 4 * 210 + 3 * 256 * 4
    assert mixes.mix_bytes("Q4_0", model.tensors(), model.metadata(), False) == by_hand


@pytest.mark.parametrize(
    "title", ["llama, 32 layers, 4 heads shared (8B)", "llama, 6 layers, rows of 288 and 512, tied"]
)
def test_neighbours_enclose_every_size(title):
    model = MODELS[title]
    arguments = model.tensors(), model.metadata(), True
    size = {name: mixes.mix_bytes(name, *arguments) for name in mixes.BASELINES}
    assert list(size.values()) == sorted(size.values())
    for tensor_bytes in range(min(size.values()), max(size.values()), 10007):
        below, above, inside = mixes.neighbours(tensor_bytes, *arguments)
        assert inside and size[below] <= tensor_bytes <= size[above]
        assert not any(size[below] < s < size[above] for s in size.values())


def test_neighbours_at_the_ends():
    model = MODELS["llama, 32 layers, 4 heads shared (8B)"]
    arguments = model.tensors(), model.metadata(), True
    size = {name: mixes.mix_bytes(name, *arguments) for name in mixes.BASELINES}
    assert mixes.neighbours(size["Q4_K_M"], *arguments) == ("Q4_K_M", "Q4_K_M", True)
    assert mixes.neighbours(1, *arguments) == ("IQ1_S", "IQ1_S", False)
    assert mixes.neighbours(10**12, *arguments) == ("F16", "F16", False)


def test_neighbours_without_importance_need_none():
    title = "llama, 32 layers, 4 heads shared (8B)"
    arguments = MODELS[title].tensors(), MODELS[title].metadata(), False
    assert mixes.neighbours(1, *arguments) == ("Q2_K", "Q2_K", False)
    sizes = [mixes.mix_bytes(name, *arguments) for name in mixes.MIXES]
    found = {name for size in sizes for name in mixes.neighbours(size, *arguments)[:2]}
    assert {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "F16"} <= found
    assert not any("needs importance" in RECORD[model][name] for model in RECORD for name in found)


def test_interpolation_is_linear_in_the_logarithm():
    low, high = (100.0, 0.4), (200.0, 0.1)
    assert mixes.interpolate_kld(150, low, high) == pytest.approx(0.2)
    assert mixes.interpolate_kld(150, high, low) == pytest.approx(0.2)
    assert mixes.interpolate_kld(125, low, high) == pytest.approx(math.exp(0.75 * math.log(0.4) + 0.25 * math.log(0.1)))
    assert (mixes.interpolate_kld(100, low, high), mixes.interpolate_kld(200, low, high)) == (0.4, 0.1)
    assert (mixes.interpolate_kld(1, low, high), mixes.interpolate_kld(999, low, high)) == (0.4, 0.1)
    assert mixes.interpolate_kld(100, low, low) == 0.4
    for tensor_bytes in (100, 150, 200, 300):  # the larger mix is the worse one: no rival
        assert mixes.interpolate_kld(tensor_bytes, (100, 0.1), (200, 0.4)) == 0.1
    with pytest.raises(ValueError, match="logarithm"):
        mixes.interpolate_kld(150, (100, 0.0), high)
