"""The workbench in a real JupyterLab, in the order of a first day: drag a scale, run the long steps, edit a recipe.

One folder is made on the way, so each test goes on from the one before. Screenshots of the widgets go to shots/.
"""

import json

import pytest
from browser import expect, needs_browser
from conftest import notebook
from nbformat.v4 import new_code_cell, new_notebook

from dynq.recipe import Recipe

pytestmark = needs_browser
SMALL = {"n_chunks": 4, "n_ctx": 64, "keep": 16, "threads": 2}
PER_TENSOR = {"formats": ["Q2_K", "Q4_K"], "n_swaps": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("ui") / "run"


def total(widget, name):
    return widget.locator(f"[data-total={name}]")


def test_a_scale_is_dragged_and_a_block_is_read(lab):
    lab.open("01.ipynb", notebook("01_one_block", threads=2))
    lab.run_all()
    scale = lab.page.locator(".dq-scale")
    scale.wait_for(timeout=90_000)
    told = scale.locator("[aria-live=polite]")
    before = told.inner_text()
    scale.locator("input[type=range]").focus()
    lab.page.keyboard.press("ArrowRight")
    expect(told).not_to_have_text(before)
    before = told.inner_text()
    scale.locator("svg").first.scroll_into_view_if_needed()
    chart = scale.locator("svg").first.bounding_box()
    x, y = chart["x"] + 0.8 * chart["width"], chart["y"] + 0.75 * chart["height"]
    lab.page.mouse.move(x, y)
    lab.page.mouse.down()
    lab.page.mouse.move(x - 60, y, steps=5)
    lab.page.mouse.up()
    expect(told).not_to_have_text(before)
    scale.get_by_role("button").click()
    expect(told).to_contain_text("the encoder has")
    lab.shoot(scale, "scale-drag")

    block = lab.page.locator(".dq-blocks")
    block.wait_for()
    detail = block.locator("[aria-live=polite]")
    picture = block.locator("[role=group]")
    picture.focus()
    lab.page.keyboard.press("ArrowRight")
    expect(detail).to_contain_text("weight 0:")
    block.locator("select").nth(1).select_option("Q4_K")
    expect(block.locator(".dq-soft").last).to_contain_text("144 bytes for 256 weights")
    picture.hover(position={"x": 300, "y": 60})
    expect(detail).to_contain_text("weight")
    lab.shoot(block, "block-inspector")


def test_panel_runs_cancels_and_goes_on(lab, run):
    lab.open("03.ipynb", notebook("03_calibrate", run=str(run), **SMALL))
    lab.run_to("RunPanel(Job(")
    panel = lab.page.locator(".dq-run")
    panel.wait_for(timeout=90_000)
    state = lambda step: panel.locator(f"tr:has([data-step='{step}']) [data-state]")  # noqa: E731
    start = lambda step: panel.locator(f"[data-do=start][data-step='{step}']")  # noqa: E731
    cancel = panel.locator("[data-do=cancel]")
    expect(state("calibrate")).to_have_text("to do")
    expect(cancel).to_be_disabled()
    start("sensitivity").focus()
    lab.page.keyboard.press("Enter")
    expect(state("calibrate")).to_have_text("running", timeout=60_000)
    expect(start("sensitivity")).to_be_disabled()
    expect(total(panel, "log")).to_contain_text("03_calibrate", timeout=60_000)
    lab.shoot(panel, "run-panel")
    cancel.click()
    expect(panel.locator(".dq-message")).to_contain_text("go on from here", timeout=60_000)
    assert json.loads((run / "job.json").read_text())["state"] == "cancelled"
    assert not list(run.glob("*.partial"))

    start("calibrate").click()
    expect(state("calibrate")).to_have_text("running", timeout=60_000)

    # in the middle of it page and kernel go, and the job does not: a new panel finds it
    lab.page.goto("about:blank")
    lab.end_kernels()
    assert json.loads((run / "job.json").read_text())["state"] == "running"
    lab.open("03.ipynb", notebook("03_calibrate", run=str(run), **SMALL))
    lab.run_to("RunPanel(Job(")
    expect(total(panel, "job")).to_contain_text("calibrate", timeout=90_000)
    expect(state("calibrate")).to_have_text("done", timeout=90_000)
    assert (run / "imatrix.gguf").exists()
    lab.shoot(panel, "run-panel-done")


def test_a_recipe_is_edited_and_saved(lab, run):
    from dynq.folder import RunFolder
    from dynq.jobs import Job

    job = Job(RunFolder(run), steps=["sensitivity", "allocate"], values=SMALL | PER_TENSOR)
    job.start("allocate.3.5bpw")
    lab.open("05.ipynb", notebook("05_allocate", run=str(run), threads=2))
    assert job.wait(120).state == "done", job.log()
    lab.run_all()
    explorer, grid = lab.page.locator(".dq-budget"), lab.page.locator(".dq-grid")
    explorer.wait_for(timeout=90_000)
    grid.wait_for(timeout=60_000)
    sizes = [total(widget, "size") for widget in (explorer, grid)]
    before = [size.inner_text() for size in sizes]
    formats = (
        "() => [...document.querySelectorAll('.dq-grid td[data-tensor]')].map((cell) => cell.dataset.format).join()"
    )
    recipe = lab.page.evaluate(formats)
    slider = explorer.locator("input[type=range]")
    slider.focus()
    for _ in range(10):
        lab.page.keyboard.press("PageUp")
    for size, text in zip(sizes, before, strict=True):
        expect(size).not_to_have_text(text)
    assert lab.page.evaluate(formats) != recipe
    lab.shoot(explorer, "budget-explorer")
    explorer.locator("[data-unit=like]").click()
    expect(total(explorer, "target")).to_contain_text("like:")
    explorer.locator("select").select_option("Q3_K_M")
    expect(total(grid, "target")).to_have_text("like:Q3_K_M")

    name = "blk.3.attn_v.weight"
    cell = grid.locator(f"[data-tensor='{name}']")
    cell.click()
    lab.page.keyboard.press("ArrowRight")
    expect(grid.locator("[aria-selected=true]")).to_have_attribute("data-tensor", "blk.3.attn_output.weight")
    lab.page.keyboard.press("ArrowLeft")
    chosen = "Q2_K" if cell.get_attribute("data-format") != "Q2_K" else "Q4_K"
    grid.locator(f".dq-picker button[data-format={chosen}]").click()
    expect(cell).to_have_attribute("data-format", chosen)
    expect(cell).to_have_attribute("data-pinned", "")
    grid.locator("[data-do=solve]").click()
    expect(grid.locator(".dq-message")).to_contain_text("chosen anew")
    expect(cell).to_have_attribute("data-format", chosen)
    grid.locator("[data-filter=ffn_up]").click()
    expect(grid.locator("[data-tensor='blk.3.ffn_up.weight']")).to_have_count(0)
    grid.locator("[data-filter=ffn_up]").click()
    lab.shoot(grid, "recipe-grid")

    edited = run / "3.5bpw-edited.recipe.json"
    panel = lab.page.locator(".dq-run")
    panel.locator("[data-do=start]").first.click()
    expect(panel.locator(".dq-message")).to_contain_text("save the edited recipe first")
    grid.locator("[data-do=save]").click()
    expect(grid.locator(".dq-message")).to_contain_text("saved as")
    saved = Recipe.load(edited)
    assert saved.formats[name] == chosen and saved.target == "like:Q3_K_M"
    panel.locator("[data-do=start]").first.click()
    expect(total(panel, "job")).to_contain_text("export.3.5bpw", timeout=60_000)
    panel.locator("[data-do=cancel]").click()
    expect(panel.locator(".dq-message")).to_contain_text("go on from here", timeout=60_000)


def test_a_text_is_read_token_by_token(lab):
    cell = """from test_widgets import reading
from dynq_widgets import DivergenceReader
DivergenceReader(lambda chunk: reading(f"chunk {chunk} "), 3)"""
    lab.open(
        "reader.ipynb",
        new_notebook(
            cells=[new_code_cell(cell)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        ),
    )
    lab.run_all()
    reader = lab.page.locator(".dq-reader")
    reader.wait_for(timeout=90_000)
    expect(total(reader, "chunk")).to_contain_text("1 of 3")
    reader.locator("[data-do=next]").click()
    expect(total(reader, "chunk")).to_contain_text("2 of 3")
    reader.locator("[data-place='2']").click()
    expect(total(reader, "kld")).to_have_text("2.00")
    lab.page.keyboard.press("ArrowLeft")
    expect(total(reader, "kld")).to_have_text("0.200")
    reader.locator("[data-do=worst]").click()
    lab.shoot(reader, "divergence-reader")
