"""What a run exports, opened in a browser: the report, and the executed notebooks as pages."""

import runpy
from pathlib import Path

import pytest
from browser import browser, listen, needs_browser, serve_plotly

from dynq import run as runner

page_of = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build.py"), run_name="build")["page"]

pytestmark = needs_browser
DEAD = ("model not found", "Error displaying widget", "Error creating widget", "Loading widget")


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def check(page, complaints, figures):
    """All figures drawn: in each a line, a bar, a mark, an image, or words why there is none. No widget, no complaint."""
    page.wait_for_function("n => document.querySelectorAll('.plotly-graph-div .main-svg .xy').length >= n", arg=figures)
    graphs = page.locator(".plotly-graph-div")
    assert graphs.count() == figures
    empty = """() => [...document.querySelectorAll('.plotly-graph-div')].filter((graph) => graph.clientHeight < 100 ||
        ![...graph.querySelectorAll('.overplot path, .overplot image, .annotation-text')].some((mark) => mark.getBoundingClientRect().width > 0)
        ).map((graph) => graph.textContent.slice(0, 80))"""
    assert page.evaluate(empty) == []
    text = page.locator("body").inner_text()
    assert not [words for words in DEAD if words.lower() in text.lower()]
    assert page.locator(".dq, .jupyter-widgets, .widget-area").count() == 0
    assert complaints == []


def test_report_is_drawn_without_a_network(quick_run, chromium):
    page = chromium.new_page()
    complaints, asked = listen(page), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((quick_run[0] / "report.html").as_uri())
    check(page, complaints, (quick_run[0] / "report.html").read_text().count('class="plotly-graph-div"'))
    assert len(asked) == 1, asked
    assert page.locator("h1").inner_text() == "dynq-tiny"
    page.close()


@pytest.mark.parametrize("name", runner.NOTEBOOKS)
def test_executed_notebook_is_drawn(quick_run, chromium, tmp_path, name):
    (path,) = (quick_run[0] / "notebooks").glob(f"{name}*.ipynb")
    text = page_of(path, list(runner.NOTEBOOKS))
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page = chromium.new_page()
    serve_plotly(page)
    page.route("https://cdn.jsdelivr.net/npm/mathjax@3/**", lambda route: route.fulfill(body=""))  # formulas stay TeX
    complaints = listen(page)
    page.goto((tmp_path / "page.html").as_uri())
    figures = text.count('class="plotly-graph-div"')
    assert figures >= 1
    check(page, complaints, figures)
    page.close()
