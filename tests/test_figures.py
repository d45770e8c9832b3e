"""Figures and tables are made from the same numbers."""

import re

import numpy as np
import pyarrow as pa
import pytest

from dynq import figures, figures_sensitivity, figures_text
from dynq.checkpoint import TensorInfo
from dynq.evaluate.greedy import Divergence
from dynq.evaluate.pair import Encoded
from dynq.imatrix import Importance
from dynq.recipe import Recipe

TENSORS = {
    info.name: info
    for info in (
        TensorInfo("token_embd.weight", (512, 256), "BF16"),
        TensorInfo("blk.0.attn_q.weight", (256, 256), "BF16"),
        TensorInfo("blk.0.attn_norm.weight", (256,), "F32"),
        TensorInfo("blk.1.attn_q.weight", (256, 256), "BF16"),
        TensorInfo("blk.1.ffn_down.weight", (256, 1024), "BF16"),
    )
}
FORMATS = {
    "token_embd.weight": "Q6_K",
    "blk.0.attn_q.weight": "Q4_K",
    "blk.0.attn_norm.weight": "F32",
    "blk.1.attn_q.weight": "Q2_K",
    "blk.1.ffn_down.weight": "Q4_K",
}
RECIPE = Recipe(FORMATS, "4bpw", 1000, 4.0, 0.1)


def cells(picture):
    """The cells of a picture's table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", picture.table)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def sensitivity_table(measured):
    rows = [
        {
            "tensor": name,
            "kind": TENSORS[name].kind,
            "format": fmt,
            "bpw": bpw,
            "predicted_kld": 0.1 / bpw,
            "predicted_error": 0.001,
            "measured_kld": measured.get((name, fmt)),
        }
        for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight")
        for fmt, bpw in (("Q4_K", 4.5), ("Q2_K", 2.625))
    ]
    return pa.Table.from_pylist(rows)


def test_table_escapes_and_aligns():
    page = figures.html_table([{"a<b": "<script>", "n": 1234567, "x": 0.123456, "none": None, "yes": True}], "t & t")
    assert "<script>" not in page and "&lt;script&gt;" in page and "a&lt;b" in page and "t &amp; t" in page
    assert '<td style="text-align:right">1,234,567</td>' in page and ">0.1235<" in page
    assert "<td></td>" in page and '<td style="text-align:left">True</td>' in page
    assert "nothing to show" in figures.html_table([], "x")


def test_importance_map_finds_the_loud_channel():
    loud = np.ones((1, 256), np.float32)
    loud[0, 7] = 100
    names = ("blk.0.attn_q.weight", "blk.1.attn_q.weight")
    importance = Importance(dict.fromkeys(names, loud * 10), {n: np.array([10], np.float32) for n in names})
    picture = figures.importance_map(importance, TENSORS)
    z = np.array(picture.figure.data[0].z)
    assert z.shape == (2, 256) and (z.argmax(axis=1) == 7).all()
    assert cells(picture)[1] == ["attn_q", "2", "100", f"{(100 + 1) / 355:.4g}"]


def test_importance_map_keeps_the_peak_of_wide_layers():
    wide = np.ones((1, 1024), np.float32)
    wide[0, 513] = 50
    importance = Importance({"blk.1.ffn_down.weight": wide}, {"blk.1.ffn_down.weight": np.ones(1, np.float32)})
    z = np.array(figures.importance_map(importance, TENSORS, "ffn_down", bins=64).figure.data[0].z)
    assert z.shape == (1, 64) and z[0, 513 // 16] == pytest.approx(np.log10(50 / wide.mean()))


def test_sensitivity_map_orders_formats_by_size_and_adds_up():
    picture = figures_sensitivity.sensitivity_map(sensitivity_table({}))
    assert list(picture.figure.data[0].x) == ["Q2_K", "Q4_K"]
    assert cells(picture) == [["kind", "Q2_K", "Q4_K"], ["attn_q", f"{0.2 / 2.625:.4g}", f"{0.2 / 4.5:.4g}"]]


def test_prediction_scatter_shows_what_was_measured():
    table = sensitivity_table({("blk.0.attn_q.weight", "Q4_K"): 0.02})
    picture = figures_sensitivity.prediction_scatter(
        table, {"rank": {"Q4_K": 0.95, "Q2_K": None}, "ratio": {"attn_q": 1.25}, "n": 1}
    )
    assert list(picture.figure.data[0].x) == [0.02]
    assert "Q4_K 0.95" in picture.figure.layout.title.text and "Q2_K" not in picture.figure.layout.title.text
    assert cells(picture)[:2] == [["kind", "median of predicted / measured"], ["attn_q", "1.25"]]
    assert len(cells(picture)) == 4
    figures_sensitivity.prediction_scatter(
        sensitivity_table({}), {"rank": {}, "ratio": {}, "n": 0}
    )  # nothing measured is no error


def test_recipe_grid_stands_by_layer_and_kind():
    picture = figures.recipe_grid(RECIPE, TENSORS, dict.fromkeys(TENSORS, "Q3_K"))
    heat = picture.figure.data[0]
    assert list(heat.x) == ["token_embd", "attn_q", "ffn_down"] and list(heat.y) == ["no layer", "0", "1"]
    assert [list(row) for row in heat.text] == [["Q6_K", "", ""], ["", "Q4_K", ""], ["", "Q2_K", "Q4_K"]]
    table = {row[0]: row for row in cells(picture)}
    assert table["attn_q"][1:] == ["2", f"{(4.5 + 2.625) / 2:.4g}", f"{3.4375:.4g}", "1 Q2_K, 1 Q4_K"]


def test_search_steps_shows_what_was_accepted_and_taken():
    change = {"blk.0.attn_q.weight": ["Q4_K", "Q3_K"], "blk.1.attn_q.weight": ["Q2_K", "Q3_K"]}
    tried = {"tried": change, "estimate": -0.01, "kld": [0.3, 0.29], "t": -2.5, "bytes": 998}
    lines = [
        {"start": True, "bytes": 1000, "kld_held_out": 0.31},
        tried | {"accepted": True, "kld_held_out": 0.28},
        tried | {"accepted": False},
        tried | {"accepted": True, "kld_held_out": 0.29},
    ]
    picture = figures.search_steps(lines)
    assert picture.figure.layout.title.text == "2 of 3 proposals accepted, step 1 taken"
    assert list(picture.figure.data[0].y) == [0.31, 0.28, 0.29] and list(picture.figure.data[1].x) == [1]
    _, start, first, _ = cells(picture)
    assert start[:3] == ["0", "start", "1,000"] and start[-1] == "0.31"
    assert first[1] == "blk.0.attn_q Q4_K to Q3_K, blk.1.attn_q Q2_K to Q3_K"
    assert first[2:] == ["998", "-0.01", "-0.01", "-2.5", "0.28"]
    assert len(cells(figures.search_steps(lines[:1]))) == 2


def test_bytes_by_format_adds_up():
    picture = figures.bytes_by_format(RECIPE, TENSORS)
    table = {row[0]: row for row in cells(picture)}
    assert int(table["Q4_K"][-1].replace(",", "")) == (256 * 256 + 256 * 1024) * 9 // 16
    assert sum(sum(bar.y) for bar in picture.figure.data) == pytest.approx(
        sum(int(row[-1].replace(",", "")) for name, row in table.items() if name not in ("format", "F32")) / 1e6
    )


def test_frontier_draws_each_kind():
    statistics = {"Mean KLD": 0.2, "Mean KLD ±": 0.01, "99.9% KLD": 2.0, "Mean PPL(Q)": 9, "Mean PPL(base)": 8}
    statistics["Same top p"] = 0.75
    files = [
        {"label": label, "kind": kind, "tensor_bytes": size, "bpw": 3.0, "statistics": statistics}
        for label, kind, size in (
            ("IQ2_M", "mix", 5),
            ("dynq 3bpw", "dynamic", 6),
            ("uniform Q3_K", "uniform", 6),
            ("Q2_K", "other mix", 6),
            ("IQ3_S", "mix", 7),
        )
    ]
    picture = figures.frontier({"files": files, "model": {"name": "m"}})
    assert [list(trace.text) for trace in picture.figure.data] == [["IQ2_M", "IQ3_S"], ["Q2_K"], ["Q3_K"], ["3bpw"]]
    assert [row[0] for row in cells(picture)] == ["file", "IQ2_M", "dynq 3bpw", "uniform Q3_K", "Q2_K", "IQ3_S"]
    looks = {(trace.marker.color, trace.marker.symbol[0]) for trace in picture.figure.data}
    assert len({colour for colour, _ in looks}) == len({symbol for _, symbol in looks}) == 4
    only = figures.frontier({"files": files[:1], "model": {"name": "m"}})
    assert [list(trace.text) for trace in only.figure.data] == [["IQ2_M"]]
    assert cells(picture)[1][-1] == "75"


def test_gains_and_losses_cancel_in_the_mean_only():
    parted = Divergence(4, 3, 0.75, 0.3, 0.95, 2.0, 2.0, [0, 0, 1])
    statistics = {"Mean PPL(Q)/PPL(base)": 1.0, "Mean PPL(Q)/PPL(base) ±": 0.1, "Same top p": 0.5}
    pair = [
        Encoded(f"Q{at}", statistics | {"Mean KLD": kld, "Mean KLD ±": 0.0}, np.array([-by, 0, by, 0]), parted)
        for at, by, kld in ((5, 0.2, 0.01), (4, 9.0, 0.5))
    ]
    picture = figures.gains_and_losses(pair)
    for trace in picture.figure.data:
        assert sum(trace.y) == pytest.approx(100)  # far changes count too
        assert trace.y[trace.x.index(pytest.approx(0, abs=1e-9))] == 50
    assert picture.figure.data[1].y[0] == picture.figure.data[1].y[-1] == 25
    _, narrow, wide = cells(picture)
    assert narrow[3:6] == ["0.05", "-0.05", "0"] and wide[3:6] == ["2.25", "-2.25", "0"]
    assert (narrow[6], wide[6], wide[-1]) == ("0.01", "0.5", "3 of 4")


@pytest.mark.parametrize("static", [True, False])
def test_static_display_is_one_page_with_its_table(monkeypatch, static):
    shown = []
    monkeypatch.setenv("DYNQ_DISPLAY", "static" if static else "")
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(figures.go.Figure, "show", lambda self: shown.append("figure"))
    figures.recipe_grid(RECIPE, TENSORS)._ipython_display_()
    if static:
        (page,) = shown
        assert "<table>" in page.data and "plotly" in page.data and len(page.data) < 30_000
    else:
        assert shown[0] == "figure" and "<table>" in shown[1].data


def test_nothing_fed_back_is_said_in_the_picture():
    infos = {"blk.0.attn_q.weight": TensorInfo("blk.0.attn_q.weight", (256, 256), "BF16")}
    told = {"tensor": "blk.0.attn_q.weight", "format": "Q4_K", "reason": "too little text", "gain": 1.0, "coupled": 1.0}
    empty = figures.feedback_gain([told | {"level": "search"}], infos)
    assert "no tensor is fed back" in empty.figure.layout.annotations[0].text and "too little text" in empty.table
    assert not figures.feedback_gain([told | {"level": "feedback", "gain": 0.8}], infos).figure.layout.annotations


def test_curves_of_a_layer_join_what_no_smaller_format_beats():
    picture = figures_sensitivity.tensor_curves(sensitivity_table({}), layer=0)
    drawn = picture.figure.data
    names = {row["tensor"] for row in sensitivity_table({}).to_pylist() if row["tensor"].startswith("blk.0.")}
    assert names and len(drawn) == 2 * len(names)
    for line in drawn[::2]:
        assert len(line.y) > 1 and (np.diff(line.y) < 0).all()
    assert all(name in picture.table for name in names)


def test_special_tokens_are_coloured_and_text_is_escaped():
    class Tokenizer:
        all_special_ids = (1,)
        words = ("<b>", "<|end|>", "a\n")

        def decode(self, ids):
            return "".join(self.words[i] for i in ids)

    page = figures_text.tokens_shown(Tokenizer(), [0, 1, 2])
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert page.count("#E69F00") == 1 and page.index("#E69F00") < page.index("&lt;|end|&gt;")
    assert "a⏎" in page and page.count("<br>") == 1
