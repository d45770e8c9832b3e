"""The widgets without a browser: what goes to it and comes back, and the twins that stand where none is."""

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
from test_editing import METADATA, VALUES, model, table

pytest.importorskip("anywidget")

from dynq_widgets import BlockInspector, BudgetExplorer, DivergenceReader, RecipeGrid, RunPanel, ScaleDrag
from ipywidgets.widgets.widget import _instances

from dynq.budget import Budget
from dynq.checkpoint import TensorInfo
from dynq.editing import Draft
from dynq.errors import DynqError
from dynq.evaluate.reading import Reading, ReadToken
from dynq.evaluate.where import Guess
from dynq.folder import RunFolder
from dynq.jobs import Job
from dynq.recipe import Recipe

MIME = "application/vnd.jupyter.widget-view+json"
EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("DYNQ_DISPLAY", raising=False)


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv("DYNQ_DISPLAY", "static")


@pytest.fixture
def draft():
    tensors = model()
    return Draft(Budget(table(tensors), tensors, metadata=METADATA, header_bytes=4096), "3.5bpw")


def reading(text="Paris"):
    guesses = [Guess(i, f"{text}{i}", 0.5 / (i + 1), 0.1 * (i + 1)) for i in range(5)]
    tokens = [ReadToken(text, 0.02 * 10**i, guesses[i], guesses, guesses[::-1]) for i in range(3)]
    return Reading(f"{text} is ", tokens)


def views(draft, text="Paris"):
    beside = Draft(draft.budget, "5bpw")
    return [
        RecipeGrid(draft),
        RecipeGrid(draft, beside=beside),
        RecipeGrid(draft, beside=beside.recipe()),
        BudgetExplorer(draft),
        DivergenceReader(lambda i: reading(text), 2),
    ]


class _Page(HTMLParser):
    """What tags and attributes a page has, and its text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.handlers, self.text, self._inside = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data


# --- live -------------------------------------------------------------------------------------------------------------


def synced(view):
    """What the browser gets of a view's own traits, as JSON takes it."""
    own = [name for cls in type(view).__mro__[:2] for name in cls.__dict__ if view.has_trait(name)]
    return json.loads(json.dumps({name: getattr(view, name) for name in own if not name.startswith("_")}))


def test_live_views_are_widgets_and_their_state_is_json(draft):
    for view in views(draft):
        bundle, _ = view._repr_mimebundle_()
        assert bundle[MIME]["model_id"] == view.model_id
        assert synced(view)
        assert "export default" in view._esm and "var(--jp-" in view._css


def test_modules_hold_no_markup_from_strings():
    for view in (RecipeGrid, BudgetExplorer, DivergenceReader, RunPanel, BlockInspector, ScaleDrag):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", view._esm)


def test_grid_shows_the_draft(draft):
    grid = RecipeGrid(draft)
    grid.do({"do": "set", "names": VALUES, "format": "Q8_0"})
    assert grid.message == {"kind": "info", "text": "4 of 4 tensors: Q8_0, pinned"}
    shown = dict(zip([cell[0] for cell in grid.cells], grid.state["formats"], strict=True))
    assert shown == draft.state.formats and {shown[name] for name in VALUES} == {"Q8_0"}
    assert {grid.cells[i][0] for i in grid.state["pinned"]} == set(VALUES)
    assert grid.state["totals"] == draft.totals()._asdict()
    assert sum(grid.state["shares"]) == pytest.approx(1, abs=1e-3)
    assert set(shown.values()) <= set(grid.palette)
    assert (grid.state["can_undo"], grid.state["can_redo"]) == (True, False)


def test_grid_does_what_the_browser_asks(draft):
    grid, start = RecipeGrid(draft), draft.state
    # as the browser sends it
    grid._handle_custom_msg({"do": "step", "names": VALUES, "up": True}, [])
    assert draft.state.pinned == set(VALUES)
    grid.do({"do": "pin", "names": VALUES[:1], "on": False})
    assert draft.state.pinned == set(VALUES[1:])
    grid.do({"do": "solve"})
    assert draft.totals().used <= draft.totals().budget
    for _ in range(3):
        grid.do({"do": "undo"})
    assert draft.state == start and not grid.state["can_undo"]
    grid.do({"do": "redo"})
    assert draft.state.pinned == set(VALUES)


def test_selection_asks_for_what_it_may_become(draft):
    grid = RecipeGrid(draft)
    grid.selection = [*VALUES, "no such tensor"]
    told = {row["format"]: row for row in grid.alternatives}
    assert told == {alternative.format: alternative._asdict() for alternative in draft.alternatives(VALUES)}
    grid.do({"do": "set", "names": VALUES, "format": "Q8_0"})
    told = {row["format"]: row for row in grid.alternatives}
    assert told["Q8_0"]["bytes"] == 0 and told["F16"]["bytes"] > 0


def test_mistakes_are_said_and_change_nothing(draft):
    grid, before = RecipeGrid(draft, path="notes.txt"), draft.state
    asked = (
        ({"do": "set", "names": VALUES, "format": "IQ1_S"}, "IQ1_S is no option"),
        ({"do": "set", "names": [EVIL], "format": "Q4_K"}, "no tensor"),
        ({"do": "save"}, "draft.recipe.json"),
        ({"do": "dance"}, "dance"),
    )
    for what, said in asked:
        grid.path = "notes.txt" if what["do"] == "save" else "x.recipe.json"
        grid.do(what)
        assert grid.message["kind"] == "error" and said in grid.message["text"]
    assert draft.state == before


def test_recipe_is_saved_loaded_and_exported(draft, tmp_path):
    grid = RecipeGrid(draft, path=tmp_path / "mine.recipe.json")
    grid.do({"do": "set", "names": VALUES, "format": "Q8_0"})
    edited = draft.state
    grid.do({"do": "save"})
    assert str(tmp_path) in grid.message["text"]
    assert Recipe.load(tmp_path / "mine.recipe.json") == draft.recipe()
    grid.do({"do": "export"})
    lines = (tmp_path / "mine.tensor-types.txt").read_text().splitlines()
    assert rf"^{VALUES[0]}$=q8_0".replace(".", r"\.") in lines
    draft.aim("5bpw")
    draft.pin(VALUES, on=False)
    grid.do({"do": "load"})
    assert (draft.state.formats, draft.state.pinned) == (edited.formats, edited.pinned)
    grid.path = str(tmp_path / "other.recipe.json")
    grid.do({"do": "load"})
    assert grid.message["kind"] == "error" and "no such recipe" in grid.message["text"]
    grid.path = str(tmp_path / "no folder" / "other.recipe.json")
    grid.do({"do": "save"})
    assert grid.message["kind"] == "error" and "does not exist" in grid.message["text"]


def test_two_recipes_side_by_side(draft):
    other = Draft(draft.budget, "5bpw")
    live, fixed = RecipeGrid(draft, beside=other), RecipeGrid(draft, beside=other.recipe())
    assert live.other["formats"] == fixed.other["formats"] == list(other.state.formats.values())
    assert live.other["shares"] == pytest.approx(fixed.other["shares"], abs=1e-4)
    assert live.other_cells == fixed.other_cells == live.cells
    other.aim("4bpw")
    assert live.other["totals"]["target"] == "4bpw" and fixed.other["totals"]["target"] == "5bpw"
    larger = model(6)
    beside = Draft(Budget(table(larger), larger, metadata=METADATA), "4bpw")
    assert len(RecipeGrid(draft, beside=beside).other_cells) == len(beside.state.formats)


def test_explorer_moves_the_draft_and_the_grid_follows(draft):
    grid, explorer, start = RecipeGrid(draft), BudgetExplorer(draft), draft.state
    for target in ("3.8bpw", "4.4bpw"):
        explorer.wanted = {"target": target, "moving": True}
    explorer.wanted = {"target": "like:Q4_K_M", "moving": False}
    totals = grid.state["totals"]
    assert totals == explorer.state["totals"] == draft.totals()._asdict() and totals["target"] == "like:Q4_K_M"
    assert totals["tensor_bytes"] <= next(mix["bytes"] for mix in explorer.mixes if mix["name"] == "Q4_K_M")
    grid.do({"do": "undo"})
    assert draft.state == start and explorer.state["totals"]["target"] == "3.5bpw"
    explorer.wanted = {"target": "1bpw"}
    assert explorer.message["kind"] == "error" and "smallest possible" in explorer.message["text"]
    explorer.wanted = {"target": EVIL}
    assert explorer.message["kind"] == "error" and draft.state == start
    explorer.wanted = {"target": "700kB"}
    assert explorer.message == {} and explorer.state["totals"]["used"] <= 700_000


def test_frontier_follows_the_pins(draft):
    explorer = BudgetExplorer(draft)
    before = explorer.frontier
    draft.aim("4bpw")
    assert explorer.frontier is before
    draft.set(["token_embd.weight"], "F16")
    assert explorer.frontier["bytes"][0] > before["bytes"][0]
    assert explorer.scale["low"] == before["bytes"][0]
    assert len(explorer.frontier["bytes"]) == len(explorer.frontier["kld"]) <= 240


def test_reader_turns_to_other_chunks():
    read = []
    reader = DivergenceReader(lambda i: read.append(i) or reading(f"chunk {i} "), 3)
    assert reader.page["before"] == "chunk 0  is " and read == [0]
    reader.chunk = 2
    assert reader.page["chunk"] == 2 and reader.page["tokens"][0]["piece"] == "chunk 2 "
    reader.chunk = 0
    reader.chunk = 99  # no such chunk: the last one
    assert reader.chunk == 2 and read == [0, 2]
    token = reader.page["tokens"][2]
    assert token["kld"] == pytest.approx(2.0) and 0.9 < token["shade"] < 1
    assert len(token["original"]) == len(token["file"]) == 5


# --- static -----------------------------------------------------------------------------------------------------------


def test_static_views_are_html_with_a_table_and_no_widget(draft, static):
    before = len(_instances)
    for view in views(draft):
        bundle = view._repr_mimebundle_()
        assert MIME not in bundle
        assert "table" in _Page(bundle["text/html"]).tags
    assert len(_instances) == before, "nothing of a widget is kept in the notebook"


def test_twins_say_it_without_scripts(draft, static):
    grid, two, _, explorer, reader = (_Page(view._repr_mimebundle_()["text/html"]).text for view in views(draft))
    for text in (grid, two):
        assert "attn_v" in text and "Where the bits go" in text
    assert two.count("Where the bits go") == 2
    assert "Q4_K_M" in explorer and "draft for 3.5bpw" in explorer and "no layer" in explorer
    assert "Paris0" in reader and "mean KLD 0.740" in reader


def test_text_of_a_model_is_never_markup(static):
    infos = [
        TensorInfo("token_embd.weight", (512, 256), "BF16"),
        TensorInfo(f"blk.0.{EVIL}.weight", (256, 256), "BF16"),
    ]
    tensors = {info.name: info for info in infos}
    draft = Draft(Budget(table(tensors), tensors, metadata=METADATA), "4bpw")
    for view in views(draft, EVIL):
        page = _Page(view._repr_mimebundle_()["text/html"])
        assert "img" not in page.tags and page.handlers == []
    assert EVIL in _Page(views(draft, EVIL)[-1].twin()).text


def test_without_anywidget_there_are_the_twins():
    lines = (
        "import pytest, sys",
        "sys.modules['anywidget'], pytest.importorskip = None, print",
        "from test_widgets import METADATA, Budget, Draft, model, table, views",
        "tensors = model()",
        "draft = Draft(Budget(table(tensors), tensors, metadata=METADATA), '4bpw')",
        "for view in views(draft): print(*view._repr_mimebundle_())",
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1:-1] == 5 * ["text/html text/plain"]


def test_importing_the_views_leaves_torch_alone():
    program = "import dynq_widgets, sys; print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout == "False\n", done.stderr


# --- the run panel ----------------------------------------------------------------------------------------------------


class _Pretended(Job):
    """A job that starts nothing: what the panel asks for is written down."""

    def start(self, last=None, *, yes=False):
        if last == "calibrate":
            raise DynqError("process 7 works in this folder")
        self.asked = last, yes


@pytest.fixture
def job(tmp_path):
    """A folder whose job, this very process, is in its second step."""
    folder, process = RunFolder(tmp_path), psutil.Process()
    with folder.step("calibrate", parameters={"model": "dynq-tiny"}, outputs=[]):
        pass
    record = {"state": "running", "pid": process.pid, "born": process.create_time(), "error": "", "ended": None}
    record |= {"steps": ["calibrate", "sensitivity", "evaluate"], "at": 1, "started": time.time() - 70, "written": 1.0}
    folder.write_json("job.json", record | {"bar": f"{EVIL}: 3/4", "part": 0.75})
    (tmp_path / "job.log").write_text(f"03_calibrate\n{EVIL}\n")
    return _Pretended(folder)


def test_panel_shows_the_job_of_the_folder(job):
    panel = RunPanel(job)
    assert MIME in panel._repr_mimebundle_()[0] and synced(panel)["shown"] == json.loads(json.dumps(panel.shown))
    assert [state for _, state in panel.shown["steps"]] == ["done", "running", "to do", "to do", "waits"]
    assert panel.shown["job"]["at"] == "sensitivity" and panel.shown["job"]["part"] == 0.75
    assert re.fullmatch(r"sensitivity, .*: 3/4, 1 min 1\d s in all", panel.shown["job"]["said"])
    assert panel.shown["log"] == ["03_calibrate", EVIL]


def test_panel_does_what_the_browser_asks(job):
    panel = RunPanel(job)
    panel._handle_custom_msg({"do": "look"}, [])
    panel.do({"do": "start", "last": "sensitivity"})
    assert job.asked == ("sensitivity", False) and panel.message == {} and panel.shown["looks"] == 2
    panel.do({"do": "start", "last": "sensitivity", "yes": True})
    assert job.asked == ("sensitivity", True)
    panel.do({"do": "start", "last": "calibrate"})
    assert panel.message == {"kind": "error", "text": "process 7 works in this folder"}
    (job.folder / "job.json").unlink()
    panel.do({"do": "cancel"})
    assert panel.message["text"] == "nothing runs here" and panel.shown["job"] is None
    (job.folder / "run.json").write_text("{")
    panel.do({"do": "look"})
    assert panel.message["kind"] == "error" and "not readable" in panel.message["text"]


def test_panel_s_twin(job, static):
    bundle = RunPanel(job)._repr_mimebundle_()
    page = _Page(bundle["text/html"])
    assert MIME not in bundle and {"table", "pre"} <= set(page.tags)
    assert "img" not in page.tags and page.handlers == [] and EVIL in page.text
    for word in ("calibrate", "done", "running", "waits", "03_calibrate"):
        assert word in page.text
    (job.folder / "job.json").unlink()
    assert "pre" not in _Page(RunPanel(job).twin()).tags
