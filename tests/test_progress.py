import io
import sys

import pytest

from dynq import progress as module
from dynq.progress import LineStream, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_gets_whole_lines_only():
    log = io.StringIO()
    assert list(progress(range(1000), desc="encode", file=log)) == list(range(1000))
    assert "\r" not in log.getvalue()
    lines = log.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("encode: 100%") and "1000/1000" in lines[0]


def test_terminal_redraws_its_line():
    terminal = Terminal()
    list(progress(range(5), desc="encode", file=terminal))
    assert terminal.getvalue().count("\r") >= 2
    assert terminal.getvalue().endswith("\n")


def test_manual_bar():
    log = io.StringIO()
    bar = progress(total=10, desc="read", unit="MB", file=log)
    bar.update(4)
    bar.update(6)
    bar.close()
    assert "10/10" in log.getvalue() and "MB" in log.getvalue()


def test_bar_that_does_not_stay_leaves_nothing_in_a_log():
    log = io.StringIO()
    list(progress(range(3), leave=False, file=log))
    assert log.getvalue() == ""


def test_line_stream_thins_a_bar_and_keeps_its_end(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    stream = LineStream(log, seconds=10)
    for percent in range(101):
        clock[0] = percent / 4  # 25 s in all: two lines on the way, and the last
        stream.write(f"\rat {percent}%")
    stream.write("\n")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and lines[-1] == "at 100%"


@pytest.mark.parametrize(
    "pieces", [["a warning\n", "more\n"], ["a war", "ning\nmo", "re", "\n"], ["a warning\r\nmore\r\n"]]
)
def test_line_stream_passes_lines_through(pieces):
    log = io.StringIO()
    stream = LineStream(log)
    for piece in pieces:
        stream.write(piece)
    assert log.getvalue() == "a warning\nmore\n"


def test_text_after_a_bar_does_not_join_it():
    log = io.StringIO()
    stream = LineStream(log, seconds=1e9)
    stream.write("\rbar  50%")
    stream.write("\rbar 100%")
    stream.write("\n")
    stream.write("done\n")
    assert log.getvalue() == "bar 100%\ndone\n"


@pytest.mark.parametrize(("static", "widget"), [(True, False), (False, True)])
def test_notebook_gets_a_widget_only_when_live(monkeypatch, static, widget):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(module, "_in_kernel", lambda: True)
    monkeypatch.setenv("DYNQ_DISPLAY", "static" if static else "")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress(total=1)
    bar.close()
    assert (type(bar).__module__ == "tqdm.notebook") is widget


def test_inner_bar_is_not_drawn_as_text():
    log = io.StringIO()
    for _ in progress(range(2), desc="outer", file=log):
        list(progress(range(2), desc="inner", file=log))
    assert "outer" in log.getvalue() and "inner" not in log.getvalue()
    list(progress(range(2), desc="next", file=log))
    assert "next" in log.getvalue()


def test_short_lived_bars_leave_nothing_even_late(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    stream = LineStream(log, seconds=10)
    for _ in range(3):
        clock[0] += 60
        stream.write("\rhash:   0%")
        stream.write("\r          ")
        stream.write("\r")
    assert log.getvalue() == ""
