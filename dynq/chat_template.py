"""A model's chat template, filled in by a process of its own.

A template is a program of a stranger. transformers runs it in jinja's sandbox, which keeps it from files and from
Python, but not from loops without end or texts without bounds, and a single step can take minutes that no signal
interrupts. So it runs where it can be ended: in a child that lives on between conversations, with half a second of
computing for each and a limit to its memory.
"""

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dynq.errors import DynqError

_SECONDS = 0.5  # of computing for one conversation; real templates take a hundredth
_WAIT = 30.0  # seconds on the clock, for systems that do not count computing time, and for busy ones
_MEMORY = 400 << 20  # bytes beyond what the child has when it starts

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


class TemplateError(Exception):
    """The template itself does not take the conversation (`raise_exception`), or is no template."""


def render(template: str, messages: list[dict[str, str]], *, answer: bool, values: dict[str, Any]) -> str:
    """The conversation as the template writes it. answer: up to where the model's answer begins; values: what else the
    template may name (the special tokens).

    TemplateError if it refuses. DynqError if it does not end, or takes too much memory.
    """
    global _child
    request = {"template": template, "messages": messages, "answer": answer, "values": values}
    with _lock:
        if _child is None or _child.poll() is not None:
            _child = _started()
        child = _child
        assert child.stdin is not None and child.stdout is not None
        timer = threading.Timer(_WAIT, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except OSError:
            reply = b""
        finally:
            timer.cancel()
        if not reply.endswith(b"\n"):
            _end()
            raise DynqError(
                f"the model's chat template does not end within {_SECONDS:g} s of computing, or takes more than "
                f"{_MEMORY >> 20} MiB; take another one (tokenizer_config.json, chat_template.jinja), or none"
            )
    answered: dict[str, str] = json.loads(reply)
    if "refused" in answered:
        raise TemplateError(answered["refused"])
    return answered["text"]


def _started() -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-m", "dynq.chat_template"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,  # where the package is found, whatever the path of this process is
    )
    assert child.stdout is not None
    if child.stdout.readline() != b"ready\n":
        raise DynqError("the process that fills in chat templates does not start; is transformers installed?")
    return child


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.kill()
        _child.wait()


# --- the child --------------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Answer requests, one a line, until the parent is gone. Beyond its limits the system ends the process."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(_SECONDS)
        try:
            texts, _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=request["answer"],
                **request["values"],
            )
            answered = {"text": texts[0]}
        except MemoryError:
            sys.exit(1)
        except Exception as error:  # whatever a template does wrong
            answered = {"refused": f"{type(error).__name__}: {error}"[:1000]}
        reply = json.dumps(answered)
        _limit_time(0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def _limit_time(seconds: float) -> None:
    """The process is ended once it has computed for so long (0: never); Windows cannot count that."""
    with contextlib.suppress(ImportError, AttributeError):
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    """Where the system tells how much address space there is now (Linux), no more than _MEMORY may come."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve()
