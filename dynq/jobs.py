"""The long steps of a run in a process of their own, so that whoever starts them stays free, or may go away.

What a job does stands in its run folder: ``job.json``, written whole about once a second, and ``job.log``. Whoever
opens the folder finds it there, after a restart too. The job has the folder's lock from its first moment to its last:
it is handed over by the process that starts it, so there is never a second one. To cancel is Ctrl-C, as in a terminal.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TextIO

import psutil

from dynq import run as runner
from dynq.errors import DynqError
from dynq.folder import LOCKED, RunFolder, file_safe, sign
from dynq.progress import LineStream

STEPS = tuple(name.partition("_")[2] for name in runner.NOTEBOOKS)
_PER_TARGET = tuple(name.partition("_")[2] for name in runner.PER_TARGET)
_SECONDS = 1.0  # between two records while a bar moves
_TAIL = 1 << 14  # bytes of the log that are read for its last lines
_LINK = re.compile(r"cluster \S+: .*, dashboard (https?://\S+)$")  # as `dynq.cluster.connect` says it
_BAR = re.compile(r"(?:(?P<what>.*?): )?\s*(?P<part>\d+)%\|[^|]*\|\s*(?P<rest>.*)")


class Look(NamedTuple):
    """A job as it stands.

    state: "running", "done", "failed", "cancelled", "refused" where memory or disk do not suffice, or "killed" where
    its process is gone without a word. steps: what it does, in order; at: the one that it is in or ended in. seconds:
    from its start to now, or to its end. bar: the last progress bar in words; part: how much of it, 0 to 1. error: one
    line. dashboard: link to that of a cluster.
    """

    state: str
    steps: list[str]
    at: int
    seconds: float
    bar: str
    part: float | None
    error: str
    dashboard: str


class Job:
    """The steps of a run, to be started, watched and cancelled: what the run panel is a view of.

    folder: the run folder. model: as `dynq run` takes it; by default the one that the folder was calibrated with.
    targets: sizes, or names of edited recipes in the folder, which are only exported and evaluated. steps: those on
    offer, by default all. values: parameters of the notebooks by name; the others are as the folder was made.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: str | None = None,
        targets: Iterable[str] = ("3.5bpw",),
        *,
        steps: Iterable[str] = STEPS,
        values: Mapping[str, Any] | None = None,
    ):
        self.folder, self.model, self.targets, self.values = folder, model, list(targets), dict(values or {})
        self.steps = tuple(steps)
        if unknown := [step for step in self.steps if step not in STEPS]:
            raise DynqError(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
        self._process: subprocess.Popen[str] | None = None

    def states(self) -> dict[str, str]:
        """Every step on offer, one for each target where they differ: "done", "cut off" or "to do"."""
        records = self.folder.state["steps"]
        words = {"done": "done", "started": "cut off"}
        found = {}
        for step in self.steps:
            per_target = step in _PER_TARGET
            edited = [runner.is_edited(target, self.folder) for target in self.targets] if step == "allocate" else []
            names = [f"{step}.{file_safe(target)}" for target in self.targets] if per_target else [step]
            for name in (name for i, name in enumerate(names) if not (edited and edited[i])):
                found[name] = words.get(records.get(name, {}).get("state"), "to do")
        return found

    def start(self, last: str | None = None, *, yes: bool = False) -> None:
        """Begin, up to the step `last`: what is done and unchanged is skipped, what was cut off goes on.

        yes: go on where the estimate says that memory or disk do not suffice; else such a job is "refused".
        DynqError: a mistake in parameters or targets, as `dynq.run.plan` has it, or somebody works in the folder.
        """
        every = self._plan()
        tasks = [task for task in every if task.step.partition(".")[0] in self.steps]
        names = [task.step for task in tasks]
        if last is not None and last not in names:
            raise DynqError(f"{last} is not among the steps {', '.join(names)}")
        if last is not None:
            tasks = tasks[: names.index(last) + 1]
        with self.folder.lock() as lock:
            if lock is None:
                raise DynqError(f"{self.folder.path}: no background jobs here; use `dynq run` in a terminal")
            (self.folder / "job.json").unlink(missing_ok=True)
            with (self.folder / "job.log").open("w", encoding="utf-8") as log:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-m", "dynq.jobs", str(self.folder.path)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {LOCKED: str(self.folder.path)},
                    pass_fds=[lock.fileno()],
                    start_new_session=True,  # neither Ctrl-C nor the end of a notebook's kernel reaches it
                    text=True,
                )
            sign(lock, process.pid)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                json.dump({"force": self.folder.force, "tasks": tasks, "plan": every, "yes": yes}, pipe)
            while _record(self.folder) is None:  # from then on it can be cancelled
                if process.poll() is not None:
                    raise DynqError(f"{self.folder.path}: the job did not begin: {(self.log(1) or ['no word'])[0]}")
                time.sleep(0.05)

    def _plan(self) -> list[runner.Task]:
        made = self.folder.state["steps"].get("calibrate", {}).get("parameters", {})
        model = self.model or made.get("model")
        if not model:
            raise DynqError(f"{self.folder.path}: nothing is calibrated here; run notebook 03_calibrate in it first")
        for name in map(file_safe, self.targets):
            if name.endswith("-edited") and not (self.folder / f"{name}.recipe.json").exists():
                raise DynqError(f"{self.folder / name}.recipe.json: not there yet; save the edited recipe first")
        return runner.plan(model, self.targets, self.folder, self.values, as_made=True)

    def cancel(self) -> bool:
        """Ctrl-C to the job. What it made is kept, and a start goes on from there. False where none runs."""
        look, record = self.look(), _record(self.folder)
        if look is None or look.state != "running" or record is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], signal.SIGINT)
        return True

    def look(self) -> Look | None:
        """The last job of the folder, whoever started it; None where there was none."""
        if self._process is not None:
            self._process.poll()  # the system forgets a process that ended once somebody asks
        record = _record(self.folder)
        if record is None:
            return None
        state, until, error = record["state"], record["ended"], record["error"]
        if _lives(record):
            state, error = "running", ""  # to its last moment, for so long it has the lock
        elif state == "running":
            record = _record(self.folder) or record  # it may have ended meanwhile
            state, until, error = record["state"], record["ended"], record["error"]
            if state == "running":
                state, until = "killed", record["written"]
                error = "its process was killed, by the system if memory ran out; start again to go on"
        seconds = max(0.0, (until or time.time()) - record["started"])  # clocks go backwards
        dashboard = record.get("dashboard", "")
        return Look(state, record["steps"], record["at"], seconds, record["bar"], record["part"], error, dashboard)

    def wait(self, seconds: float | None = None) -> Look | None:
        """Until the job has ended, or for so long; how it stands then."""
        end = None if seconds is None else time.monotonic() + seconds
        while (look := self.look()) and look.state == "running" and (end is None or time.monotonic() < end):
            time.sleep(0.1)
        return look

    def log(self, lines: int = 12) -> list[str]:
        """The last lines of the job's log."""
        try:
            with (self.folder / "job.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                return file.read().decode(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []


def _record(folder: RunFolder) -> dict[str, Any] | None:
    """``job.json``, or None where there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise DynqError(
            f"{folder / 'job.json'}: not readable; delete it, only the last job's progress is lost"
        ) from None
    return record


def _lives(record: Mapping[str, Any]) -> bool:
    """Whether the job's process is there: number and hour of birth, for numbers are used again.

    A process counts as a zombie as soon as its first thread has ended; it has the lock until the last one has.
    """
    try:
        process = psutil.Process(record["pid"])
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return process.create_time() == record["born"] and not ended
    except psutil.NoSuchProcess:
        return False


# --- the job's own side -----------------------------------------------------------------------------------------------


class _Watched:
    """A stream to which the runner draws its bars: whole lines go to the log, the bar of the moment into the record.

    It counts as a terminal, so that every redrawn bar comes through.
    """

    def __init__(self, log: TextIO, folder: RunFolder, steps: list[str]):
        self._lines, self._folder = LineStream(log), folder
        process = psutil.Process()
        self.record: dict[str, Any] = {"state": "running", "pid": process.pid, "born": process.create_time()}
        self.record |= {"steps": steps, "at": 0, "started": time.time(), "ended": None, "error": ""}
        self.record |= {"bar": "", "part": None, "dashboard": ""}
        self._next = 0.0

    def note(self, **change: Any) -> None:
        """Write the record with these changes."""
        self.record |= change | {"written": time.time()}
        self._folder.write_json("job.json", self.record)
        self._next = time.monotonic() + _SECONDS

    def write(self, text: str) -> int:
        self._lines.write(text)
        for piece in re.split(r"[\r\n]", text):
            if bar := _BAR.match(piece):
                words = ": ".join(filter(None, (bar["what"], bar["rest"].strip())))
                self.record |= {"bar": words, "part": int(bar["part"]) / 100}
            elif link := _LINK.match(piece):
                self.record["dashboard"] = link[1]
        if time.monotonic() >= self._next:
            self.note()
        return len(text)

    def flush(self) -> None:
        self._lines.flush()

    def isatty(self) -> bool:
        return True


class _Refused(Exception):
    """What does not fit, with its numbers."""


def _check(folder: RunFolder, asked: set[str], plan: list[runner.Task], yes: bool) -> None:
    from dynq import reckon  # imports torch

    checkpoint = runner.opened(plan)
    if "calibrate" in asked:
        runner.check_sizes(plan, checkpoint)
    whole = reckon.of_run(checkpoint, {task.step: task.parameters for task in plan}, folder)
    reckoned = replace(whole, needs=[need for need in whole.needs if need.step in asked])
    if not yes and (lacks := reckoned.lacks()):
        raise _Refused(lacks)
    reckoned.tell(sys.stderr, yes=yes)


def _work(folder: RunFolder, tasks: list[runner.Task], plan: list[runner.Task], yes: bool = False) -> None:
    """The tasks of a plan; without one nothing is looked at beforehand."""
    watched = _Watched(sys.stderr, folder, [task.step for task in tasks])
    watched.note()
    end = {"state": "done"}
    try:
        if plan:
            _check(folder, {task.step for task in tasks}, plan, yes)
        for i, task in enumerate(tasks):
            watched.note(at=i, bar="", part=None)
            runner.execute_each([task], folder, stream=watched)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end = {"state": "cancelled", "error": "cancelled; start again to go on from here"}
    except _Refused as error:
        end = {"state": "refused", "error": f"{error}, or go on all the same"}
    except (DynqError, runner.RunFailed) as error:
        end = {"state": "failed", "error": " ".join(str(error).split())}
    except Exception as error:
        traceback.print_exc()
        end = {"state": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())} (see job.log)"}
    if end["state"] != "done":
        print(f"dynq: {end['error']}", file=sys.stderr, flush=True)
    watched.note(**end, ended=time.time())


def main() -> None:
    """``python -m dynq.jobs FOLDER``, as `Job.start` calls it: the tasks come through the standard input."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook's kernel ignores it, and so would its child
    given = json.load(sys.stdin)
    folder = RunFolder(sys.argv[1], force=given["force"])
    tasks, plan = ([runner.Task(*task) for task in given[name]] for name in ("tasks", "plan"))
    _work(folder, tasks, plan, given["yes"])


if __name__ == "__main__":
    main()
