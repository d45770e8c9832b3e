"""Notebooks 00 to 02, which explain: run in batch, what their words claim holds in the numbers that they show."""

import os
import re
from math import log2
from pathlib import Path

import nbformat
import papermill
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
TEACHING = ("00_start_here", "01_one_block", "02_formats")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """name -> the notebook, executed once; without a run folder, as on the first day."""
    made = {}
    before = os.environ.get("DYNQ_DISPLAY")
    os.environ["DYNQ_DISPLAY"] = "static"

    def run(name, **parameters):
        key = (name, *parameters.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            out, here = folder / "out.ipynb", Path.cwd()
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{name}.ipynb"),
                str(out),
                {"threads": 1} | parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(folder),
            )
            assert Path.cwd() == here
            made[key] = nbformat.read(out, 4)
        return made[key]

    yield run
    if before is None:
        del os.environ["DYNQ_DISPLAY"]
    else:
        os.environ["DYNQ_DISPLAY"] = before


def pages(notebook):
    """The HTML outputs, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def tables(notebook):
    """Every table as rows {column: text}, in order."""
    found = []
    for page in re.findall(r"<table>(.*?)</table>", "".join(pages(notebook)), re.S):
        rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
    return found


@pytest.mark.parametrize("name", TEACHING)
def test_batch_shows_pages_and_no_widgets(executed, name):
    notebook = executed(name)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert "widgets" not in notebook.metadata
    assert any("plotly" in page for page in pages(notebook)) and len(tables(notebook)) >= 2
    assert len(nbformat.writes(notebook)) < 300_000


def test_fewer_bits_leave_the_original_earlier(executed):
    answers, sizes = tables(executed("00_start_here"))
    assert len(answers) == 4 and len(answers[0]) == 1 + len(sizes)
    original, *_, last = answers[0].values()
    assert "Paris" in last and list(answers[0].values())[1] == last != original  # the capital survives at 2 bits
    kept = [int(row["tokens before they part"].split(" of ")[0]) for row in sizes]
    assert sizes[0]["same answers"] == "4 of 4" and kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0] / 4
    bytes_of = [float(row["MB (10^6 bytes)"]) for row in sizes]
    assert bytes_of == sorted(bytes_of, reverse=True)


def test_the_encoder_finds_what_hands_find(executed):
    notebook = executed("01_one_block")
    weights, scales, fields, worst = tables(notebook)
    assert len(weights) == 32
    row = {row["scale"]: {key: float(value) for key, value in row.items() if key != "scale"} for row in scales}
    for which in ("off", "on"):
        error = f"error, importance {which}"
        assert row[f"the encoder, importance {which}"][error] <= row[f"best of 401, importance {which}"][error]
        assert row[f"the encoder, importance {which}"][error] < row["largest weight to the end of the levels"][error]
    on, off = row["the encoder, importance on"], row["the encoder, importance off"]
    assert abs(on["d"]) < 0.9 * abs(off["d"])  # the scale becomes smaller ...
    assert on["error, importance on"] < 0.8 * off["error, importance on"]
    largest = max(weights, key=lambda row: abs(float(row["original"])))
    assert float(largest["stored"]) < float(largest["original"]) - abs(on["d"]) / 2  # ... and sacrifices the largest
    assert float(largest["importance"]) < 0.5
    assert float(worst[0]["stored"]) == pytest.approx(float(largest["stored"]), rel=1e-3)  # the same block in bits
    assert sum(float(row["bits per weight"]) for row in fields) == 4.5


def test_importance_of_a_run(executed, quick_run):
    """Another importance, another error; the scales that do not know it stay."""
    (_, own, *_), (_, other, *_) = (tables(executed("01_one_block", **p)) for p in ({}, {"run": str(quick_run[0])}))
    assert [row["error, importance off"] for row in own[:3]] == [row["error, importance off"] for row in other[:3]]
    assert own[0]["error, importance on"] != other[0]["error, importance on"]


def test_other_blocks_do_as_told(executed):
    """What "Try this" of 01 promises."""
    _, scales, *_ = tables(executed("01_one_block", row=23, block=31))
    row = {row["scale"]: {key: float(value) for key, value in row.items() if key != "scale"} for row in scales}
    hand, encoder = row["best of 401, importance off"], row["the encoder, importance off"]
    assert hand["error, importance off"] < encoder["error, importance off"] and hand["d"] * encoder["d"] < 0


def test_bits_buy_error_and_books_need_importance(executed):
    notebook = executed("02_formats", run="runs/none")
    errors, packed, book, *_, gains = tables(notebook)
    error = {row["format"]: float(row["relative error"]) for row in errors}
    bpw = {row["format"]: float(row["bits per weight"]) for row in errors}
    line = [row["format"] for row in errors if row["on the line"]]
    assert {"IQ2_XXS", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"} <= set(line) and "TQ1_0" not in line
    assert [error[name] for name in line] == sorted((error[name] for name in line), reverse=True)
    for many, few in (("Q8_0", "IQ1_S"), ("Q6_K", "Q3_K"), ("Q5_K", "IQ2_XXS")):
        assert 1.7 < log2(error[few] / error[many]) / (bpw[many] - bpw[few]) < 2.1  # nearly four times for a bit
    assert 1.8 < error["TQ2_0"] / error["IQ2_XXS"] < 2.5 and bpw["TQ2_0"] == bpw["IQ2_XXS"]
    assert sum(float(row["bits per weight"]) for row in packed) == 4.5
    assert {row["field"] for row in book} == {"d", "scale", "signs", "entry"}
    more = {row["format"]: float(row["more, %"]) for row in gains}
    wanted = [row["format"] for row in gains if row["importance"]]
    assert len(wanted) == 6
    books = [more[name] for name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S")]
    assert min(books) > 1.2 * max(value for name, value in more.items() if not name.startswith("IQ"))
    assert max(more[name] for name in ("TQ1_0", "TQ2_0", "Q1_0", "MXFP4")) < 2


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_notebook_ends_with_something_to_do(path):
    """Three changes to make and a question whose answer is folded; parameters that are named are there."""
    notebook = nbformat.read(path, 4)
    last = notebook.cells[-1]
    assert last.cell_type == "markdown" and last.source.startswith("## Try this")
    changes, question = last.source.split("**A question.**")
    assert len(re.findall(r"^- ", changes, re.M)) == 3
    assert re.search(r"\?\s*<details><summary>An answer</summary>\n\n.+\n\n</details>$", question.strip(), re.S)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+):", parameters.source, re.M)
    assert set(re.findall(r"`(\w+) = ", changes)) <= {*names, "tensor"}


def test_all_notebooks_are_there():
    assert [path.stem for path in ALL] == [
        *("00_start_here", "01_one_block", "02_formats", "03_calibrate", "04_sensitivity"),
        *("05_allocate", "06_export", "07_evaluate"),
    ]
    start = (NOTEBOOKS / "00_start_here.ipynb").read_text()
    assert all(f"({path.name})" in start for path in ALL[1:])
