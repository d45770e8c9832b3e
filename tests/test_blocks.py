"""Blocks looked at closely, in a model and in a file, and the views on them."""

import json
import re

import numpy as np
import pytest
from dynq_widgets.block_inspector import BlockInspector
from dynq_widgets.scale_drag import ScaleDrag
from test_describe import recipe_for

from dynq import DynqError, dequantize, open_checkpoint, quantize, weighted_error
from dynq.blocks import Blocks, by_hand, format_errors
from dynq.export import export
from dynq.imatrix import Importance
from dynq.svg_blocks import draw, draw_layout

NAME = "blk.3.ffn_down.weight"


@pytest.fixture(scope="module")
def model():
    return open_checkpoint("dynq-tiny")


@pytest.fixture(scope="module")
def importance(model):
    rng = np.random.default_rng(0)
    sums = {NAME: rng.lognormal(0, 1, (1, model.tensors[NAME].row)).astype(np.float32)}
    return Importance(sums, {NAME: np.ones(1, np.float32)})


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_K", "IQ2_XXS"])
def test_a_block_is_that_of_the_whole_tensor(model, importance, fmt):
    weights, mean = model.read(NAME)[:8], importance.mean(NAME)
    decoded = dequantize(quantize(weights, fmt, mean, threads=1), fmt, threads=1)
    block = Blocks(model, importance=importance).block(NAME, fmt, 5, 2)
    here = slice(2 * len(block.decoded), 3 * len(block.decoded))
    np.testing.assert_array_equal(block.decoded, decoded[5, here])
    np.testing.assert_array_equal(block.original, weights[5, here])
    assert block.error == pytest.approx(weighted_error(weights[5, here], decoded[5, here], mean[here]))
    assert 0 < block.relative_error < 0.3


def test_blocks_of_a_file_with_and_without_its_model(model, tmp_path):
    file = tmp_path / "q4.gguf"
    export(model, recipe_for(model, "Q4_K"), None, file, threads=1)
    wanted = dequantize(quantize(model.read(NAME)[7:8], "Q4_K", threads=1), "Q4_K", threads=1)[0, 256:512]
    for blocks in (Blocks(gguf=file), Blocks(model, gguf=file)):
        assert blocks.formats(NAME) == ["Q4_K"]
        np.testing.assert_array_equal(blocks.block(NAME, "Q4_K", 7, 1).decoded, wanted)
    assert Blocks(gguf=file).block(NAME, "Q4_K").error is None
    assert "the original is not known" in BlockInspector(Blocks(gguf=file), NAME).twin()
    with pytest.raises(DynqError, match="cannot be looked at in Q6_K; it can in Q4_K"):
        blocks.block(NAME, "Q6_K")
    with pytest.raises(DynqError, match="no model and no GGUF"):
        Blocks()
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(DynqError, match="not a GGUF file"):
        Blocks(gguf=tmp_path / "no.gguf")


def test_what_cannot_be_looked_at(model):
    blocks = Blocks(model)
    assert "IQ2_XXS" not in blocks.formats(NAME) and "IQ4_XS" in blocks.formats(NAME)  # no importance
    for arguments, words in (
        (("blk.99.ffn_up.weight", "Q4_K"), "there is no tensor blk.99"),
        ((NAME, "IQ2_XXS"), "cannot be looked at"),
        ((NAME, "Q4_K", 256, 0), "rows 0 to 255 of blocks 0 to 3"),
    ):
        with pytest.raises(DynqError, match=words):
            blocks.block(*arguments)


def test_scales_by_hand_are_those_of_the_formula():
    weights = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    own = np.linspace(0.1, 3, 32, dtype=np.float32)
    hand = by_hand(weights, "Q4_0", own, n=51)
    scale = float(hand.scales[30])
    codes = np.clip(np.rint(weights / scale), -8, 7)
    assert hand.error["off"][30] == pytest.approx(float(((weights - scale * codes) ** 2).sum()), rel=1e-6)
    assert hand.error["on"][25] == pytest.approx(float((weights**2) @ (own / own.mean())), rel=1e-4)  # scale 0
    assert hand.importance.mean() == pytest.approx(1) and hand.scales[hand.nearest(scale)] == scale
    np.testing.assert_allclose(hand.decoded(scale), scale * codes, rtol=1e-5)
    for which in ("off", "on"):
        d, error = hand.encoder[which]
        columns = hand.importance if which == "on" else None
        assert error == pytest.approx(weighted_error(weights, hand.decoded(d).astype(np.float32), columns), rel=1e-4)
    with pytest.raises(DynqError, match="more numbers in a block than one scale"):
        by_hand(np.zeros(256, np.float32), "Q4_K")
    with pytest.raises(DynqError, match="has 32 weights"):
        by_hand(np.zeros(16, np.float32), "Q4_0")


def test_errors_of_formats_are_relative_and_sorted(model, importance):
    found = format_errors(model.read(NAME)[:4], importance.mean(NAME), ["Q8_0", "IQ2_XXS", "Q4_K"], threads=1)
    assert [one.format for one in found] == ["IQ2_XXS", "Q4_K", "Q8_0"]
    assert 1 > found[0].error > found[1].error > found[2].error > 0
    assert found[0].flat > found[0].error and found[0].needs_importance


def test_the_drawing_frames_the_bits_of_a_weight(model, importance):
    block = Blocks(model, importance=importance).block(NAME, "Q4_K")
    drawing = draw(block, mark=70)
    assert drawing.geometry["bits"]["columns"] == 16 and len(drawing.svg) < 60_000
    frames = re.search(r'<path d="([^"]*)" fill="none" stroke="currentColor"', draw_layout("Q4_K", 70))[1]
    assert frames.count("M") == 16 + 16 + 6 + 6 + 4  # d, dmin, scale, min, code


def test_inspector_answers_what_the_page_asks(model, importance):
    view = BlockInspector(Blocks(model, importance=importance), NAME, "Q4_K", 1, 1)
    assert json.loads(json.dumps(view.shown))["blocks"] == 4
    view.asked = view.asked | {"format": "Q4_0", "index": 31, "row": 10**9}
    assert (view.block.format, view.block.row, view.block.index) == ("Q4_0", 255, 31)
    view.asked = view.asked | {"tensor": "token_embd.weight", "format": "IQ2_XXS"}  # not without importance
    assert view.shown["tensor"] == "token_embd.weight" and view.block.format != "IQ2_XXS"
    view.asked = view.asked | {"tensor": "<b>"}
    assert "there is no tensor" in view.shown["message"] and view.block.tensor == "token_embd.weight"
    page = view.twin()
    assert "<svg" in page and "<table>" in page and "<script" not in page


def test_scale_to_drag_begins_where_the_largest_weight_fits(model):
    hand = by_hand(model.read(NAME)[0, :32], "Q4_0")
    view = ScaleDrag(hand)
    assert abs(view.scale - hand.full_range) <= abs(hand.scales[1] - hand.scales[0])
    assert len(view.block["error"]["on"]) == len(hand.scales) == 401
    assert "<svg" in view.twin() and "weight by weight" in view.twin()
