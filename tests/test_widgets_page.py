"""The widgets in a real page, with no Jupyter around: texts of a model stay texts, and what the run panel sends."""

from types import SimpleNamespace

import numpy as np
import pytest
from browser import browser, listen, needs_browser
from test_editing import METADATA, table
from test_widgets import EVIL, job, synced, views  # noqa: F401

pytest.importorskip("anywidget")

from dynq_widgets import BlockInspector, RunPanel, ScaleDrag

from dynq.blocks import Blocks, by_hand
from dynq.budget import Budget
from dynq.checkpoint import Checkpoint, TensorInfo
from dynq.editing import Draft

pytestmark = needs_browser
# draws a view from its module and its traits, with a model that keeps what is sent
DRAW = """async ([source, traits]) => {
  const heard = {};
  const model = window.model = {
    sent: [], get: (name) => traits[name], set: (name, value) => { traits[name] = value; }, save_changes() {}, off() {},
    on: (event, handler) => (heard[event] ??= []).push(handler), send: (what) => model.sent.push(what),
    change: (name, value) => { traits[name] = value; (heard[`change:${name}`] ?? []).forEach((handler) => handler()); },
  };
  const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  document.body.replaceChildren(document.createElement("div"));
  module.default.render({ model, el: document.body.firstChild });
}"""
FOUND = """() => [...document.body.querySelectorAll("*")].filter((node) => ["img", "script"].includes(node.localName)
  || [...node.attributes].some(({ name }) => name.startsWith("on"))).map((node) => node.outerHTML)"""


@pytest.fixture
def page():
    with browser() as chromium:
        page = chromium.new_page()
        page.complaints = listen(page)
        yield page
        assert page.complaints == []


def draw(page, view):
    page.add_style_tag(content=view._css)
    page.evaluate(DRAW, [view._esm, synced(view)])


def test_text_of_a_model_is_never_markup(page, job):  # noqa: F811
    name = f"blk.0.{EVIL}.weight"
    tensors = {n: TensorInfo(n, (256, 256), "BF16") for n in ("token_embd.weight", name)}
    weights = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    blocks = Blocks(Checkpoint(EVIL, None, SimpleNamespace(config={}), {}, tensors, lambda _: weights, []))
    draft = Draft(Budget(table(tensors), tensors, metadata=METADATA), "4bpw")
    panel, block, scale = RunPanel(job), BlockInspector(blocks, name), ScaleDrag(by_hand(weights[0, :32], "Q4_0"))
    for view in (*views(draft, EVIL), panel, block, scale):
        draw(page, view)
        for node in page.locator("[data-tensor], [data-place], [tabindex]").all()[:20]:
            if node.is_visible():
                node.hover()
                node.click()
                page.keyboard.press("ArrowRight")
        assert page.locator(".dq").count() == 1 and page.evaluate(FOUND) == [], type(view)
    draw(page, block)
    page.locator("[role=group]").press("ArrowRight")
    assert page.locator("[aria-live]").inner_text().startswith("weight 0:") and page.locator("svg path").count() > 5
    assert EVIL in page.locator("select").first.inner_text()
    draw(page, panel)
    assert EVIL in page.locator("pre").inner_text()


def test_what_was_refused_goes_on_when_ticked(page, job):  # noqa: F811
    panel = RunPanel(job)
    draw(page, panel)
    yes, start = page.locator("[data-do=yes]"), page.locator("[data-do=start][data-step=sensitivity]")
    assert yes.is_hidden()
    refused = panel.shown["job"] | {"state": "refused", "error": "calibrate needs about 9 GB of memory, 1 GB are free"}
    page.evaluate("shown => model.change('shown', shown)", panel.shown | {"job": refused})
    assert "9 GB" in page.locator(".dq-message").inner_text() and yes.is_visible() and not yes.is_checked()
    start.click()
    page.evaluate("shown => model.change('shown', shown)", panel.shown | {"job": refused})
    yes.check()
    start.click()
    assert [what.get("yes") for what in page.evaluate("model.sent") if what["do"] == "start"] == [False, True]
    page.evaluate("shown => model.change('shown', shown)", panel.shown)
    assert yes.is_hidden()
