"""docs/scale.md says what its script reckons."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", DOCS / "scale.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_is_reckoned(scale: ModuleType) -> None:
    assert (DOCS / "scale.md").read_text() == scale.page(), "run python docs/scale.py"


def test_shapes_are_those_published(scale: ModuleType) -> None:
    """671 billion weights without the layer that predicts further tokens, of which a token meets 37 billion (DeepSeek
    V3's technical report, with the embedding)."""
    model = scale.shape()
    assert 670.5e9 < model.n < 671.5e9
    assert 37e9 < model.active + model.vocab * model.width < 38e9
    experts = [p for p in model.products if "_exps" in p.name]
    assert len(experts) == 3 * 58 and {p.experts * p.rows * p.n_in for p in experts} == {256 * 7168 * 2048}


def test_every_step_fits_into_a_worker(scale: ModuleType) -> None:
    model = scale.shape()
    held = scale.memory(model, scale.WORKERS)
    assert set(held) == {"calibrate", "sensitivity", "export", "evaluate"}
    assert max(held.values()) < scale.WORKERS.memory
    head = (129280, 7168)  # larger than any expert
    assert held["sensitivity"] == 20 * head[0] * head[1] + 12 * scale.KEEP * sum(head)


def test_arithmetic_by_hand(scale: ModuleType) -> None:
    """With the numbers that stand in the page: one card of eight, a thread for the one sequence of each worker."""
    model = scale.shape()
    calibrate, sensitivity, _, evaluate = scale.lines(model, scale.CARDS)
    assert calibrate.read == 2 * model.stored and calibrate.reading == calibrate.read / 4e9
    assert calibrate.computing == pytest.approx(6 * model.active * 32 * 512 / 5.4e12)
    assert calibrate.preparing == 1.1e-9 * 2 * model.stored
    assert 3600 * calibrate.hours == calibrate.reading + calibrate.preparing > calibrate.computing
    encoders = model.encoded(scale.candidates([], "all"), "plain")
    assert encoders / 64 < 3600 * sensitivity.hours
    assert 3600 * evaluate.hours == max(evaluate.reading + evaluate.preparing, evaluate.computing)
    calibrate, sensitivity, _, mixes, evaluate = scale.lines(model, scale.WORKERS)
    assert calibrate.read == 32 * 2 * model.stored and sensitivity.apiece == model.stored / 32
    product = 6 * model.active * 32 * 512 / 155e9
    rest = 3 * model.values * 32 * 512 * 2.5e-9 + 32 * model.n * 3.5e-9 + 32 * 512 * 129280 * 60e-9
    assert calibrate.computing == pytest.approx((product + rest) / 32)
    assert sensitivity.computing == pytest.approx(
        scale.lines(model, scale.Place("one", 1, 16, 0, 1e9, 128e9))[1].computing / 32
    )
    file = 3.5 / 8 * model.n
    assert evaluate.read == 16 * (model.stored + 4 * file) and evaluate.computing < evaluate.preparing
    assert mixes.read == 3 * (model.stored + 2 * file) and mixes.apiece == 3 * (model.stored / 32 + 2 * file)


def test_two_layers_fit_on_a_card_in_bfloat16_alone(scale: ModuleType) -> None:
    model = scale.shape()
    held = scale.card(model)
    assert model.two_layers == 2 * 11_507_286_272
    assert 2 * (model.two_layers + model.ends) < held["calibrate"] < 80e9 < held["evaluate"]
