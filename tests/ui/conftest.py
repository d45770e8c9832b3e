"""A real JupyterLab in a folder of its own, and a browser before it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import papermill
import pytest
from browser import browser, listen, serve_plotly

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOTS = Path(__file__).parent / "shots"
SETTINGS = {
    # no question about news, which would be fetched
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
HARMLESS = ()  # complaints that count for nothing, with their reason: so far there are none
# the notebook, and the place after the first cell that holds some words, or after the last
PLACE = """const notebook = jupyterapp.shell.currentWidget.content;
const end = words === null ? notebook.widgets.length :
    notebook.widgets.findIndex((cell) => cell.model.sharedModel.source.includes(words)) + 1;"""


class Lab:
    """A JupyterLab and the page that shows it."""

    def __init__(self, url, page, root):
        self.url, self.page, self.root = url, page, root

    def command(self, name, **arguments):
        """One of JupyterLab's own commands, as its menus call them; begun, not waited for."""
        self.page.evaluate("([name, given]) => { jupyterapp.commands.execute(name, given); }", [name, arguments])

    def open(self, name, notebook):
        """Save a notebook in the folder and open it; waits until it is drawn and its kernel is there."""
        papermill.iorw.write_ipynb(notebook, str(self.root / name))
        self.page.goto(f"{self.url}/lab/tree/{name}?reset")
        kernel = "jupyterapp.shell.currentWidget?.context?.sessionContext?.session?.kernel"
        self.page.wait_for_function(f"window.jupyterapp && {kernel}?.status === 'idle'", timeout=90_000)
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()

    def run_all(self, timeout=120_000):
        """Run all cells, and wait for the last: until then JupyterLab takes the focus from cell to cell."""
        self.command("notebook:run-all-cells")
        self._ran(None, timeout)

    def run_to(self, words, timeout=120_000):
        """Run the cells down to the first one whose source holds `words`."""
        self.page.evaluate(f"words => {{ {PLACE} notebook.activeCellIndex = end; }}", words)
        self.command("notebook:run-all-above")
        self._ran(words, timeout)

    def _ran(self, words, timeout):
        done = "notebook.widgets.slice(0, end).every((cell) => cell.model.type !== 'code' || cell.model.executionCount)"
        self.page.wait_for_function(f"words => {{ {PLACE} return {done}; }}", arg=words, timeout=timeout)

    def theme(self, name):
        self.command("apputils:change-theme", theme=f"JupyterLab {name}")
        self.page.locator(f"body[data-jp-theme-name='JupyterLab {name}']").wait_for(state="attached")

    def end_kernels(self):
        with urllib.request.urlopen(f"{self.url}/api/sessions") as answer:
            sessions = json.load(answer)
        for session in sessions:
            urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/api/sessions/{session['id']}", method="DELETE")
            ).close()

    def shoot(self, node, name):
        """A widget in light and dark, into shots/ (ignored by git), to be looked at."""
        SHOTS.mkdir(exist_ok=True)
        for theme in ("Dark", "Light"):
            self.theme(theme)
            node.scroll_into_view_if_needed()
            self.page.wait_for_timeout(300)
            node.screenshot(path=SHOTS / f"{name}-{theme.lower()}.png")


def notebook(name, **parameters):
    """One of the project's notebooks with parameters, as papermill puts them in."""
    loaded = papermill.iorw.load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
    return papermill.parameterize.parameterize_notebook(loaded, parameters)


@pytest.fixture(scope="session")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address and folder of a JupyterLab that nobody else configures."""
    base = tmp_path_factory.mktemp("lab")
    root = base / "notebooks"
    root.mkdir()
    for name, values in SETTINGS.items():
        file = base / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": base / "config",
        "JUPYTER_RUNTIME_DIR": base / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": base / "settings",
    }
    own |= {
        "JUPYTERLAB_WORKSPACES_DIR": base / "workspaces",
        "IPYTHONDIR": base / "ipython",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--port={port}",
    ]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={root}",
    ]
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {k: str(v) for k, v in own.items()}, stdout=log, stderr=log, cwd=root
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{url}/api", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (base / "log").read_text()
                time.sleep(0.2)
        yield url, root
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def lab(chromium, server):
    """A fresh page; at the end nothing may stand in its console as an error, and no kernel is left."""
    page = chromium.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(30_000)
    serve_plotly(page)
    complaints = listen(page, HARMLESS)
    found = Lab(server[0], page, server[1])
    yield found
    page.close()
    found.end_kernels()
    assert complaints == []
