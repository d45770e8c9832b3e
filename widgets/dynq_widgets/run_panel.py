"""The run panel: the long steps of a run folder, started, watched and cancelled from the page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from traitlets import Dict

from dynq.errors import DynqError
from dynq.figures import html_table
from dynq.jobs import Job, Look
from dynq_widgets.view import LIVE, View, source


class RunPanel(View):
    """Start, watch and cancel a `dynq.jobs.Job`. It runs in a process of its own: page and kernel may go meanwhile.

    A new panel on the same folder finds it again, running or ended.
    """

    _esm = source("common.js", "run_panel.js")
    _css = source("theme.css", "run_panel.css")

    shown = Dict().tag(sync=True)  # of the folder; "looks" counts, so that every look is answered
    message = Dict().tag(sync=True)

    def __init__(self, job: Job):
        self.job = job
        super().__init__(shown=self._shown(0))
        if LIVE:
            self.on_msg(lambda _, content, __: self.do(content))

    def do(self, what: Mapping[str, Any]) -> None:
        """Carry out what the browser asks for: {"do": "start", "last": "sensitivity", "yes": false}, "cancel",
        "look". yes: as in `Job.start`."""
        try:
            if what["do"] == "start":
                self.message = {}
                self.job.start(what.get("last"), yes=what.get("yes") is True)
            elif what["do"] == "cancel":
                self.message = {} if self.job.cancel() else {"kind": "info", "text": "nothing runs here"}
            elif what["do"] != "look":
                raise DynqError(f"the panel does not know how to {what['do']}")
            self.shown = self._shown(self.shown["looks"] + 1)
        except (DynqError, OSError) as error:
            self.message = {"kind": "error", "text": str(error)}

    def _shown(self, looks: int) -> dict[str, Any]:
        look = self.job.look()
        steps = self.job.states()
        if look and look.state == "running":
            at = look.steps[look.at]
            steps |= {name: "waits" for name in look.steps[look.at :] if name in steps}
            steps |= {at: "running"} if at in steps else {}
        return {
            "folder": str(self.job.folder.path),
            "steps": list(steps.items()),
            "job": look and {**look._asdict(), "at": look.steps[look.at], "said": _said(look)},
            "log": self.job.log(),
            "looks": looks,
        }

    def twin(self) -> str:
        shown = self._shown(0)
        rows = [{"step": name, "state": state} for name, state in shown["steps"]]
        page = html_table(rows, f"Steps in {self.job.folder.path.name}")
        if not shown["job"]:
            return page
        about = ". ".join(filter(None, (shown["job"]["said"], shown["job"]["error"])))
        log = escape("\n".join(shown["log"]))
        return f"{page}<p>{escape(about)}</p><pre>{log}</pre>"


def _said(look: Look) -> str:
    """A job in one line."""
    minutes, seconds = divmod(int(look.seconds), 60)
    lasted = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    if look.state == "running":
        return ", ".join(filter(None, (look.steps[look.at], look.bar, f"{lasted} in all")))
    return f"{look.steps[look.at]}: {look.state} after {lasted}"
