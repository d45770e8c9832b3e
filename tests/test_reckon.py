"""Whole commands: what is shown, what is refused, what costs nothing."""

import io
import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import unknown_models
from conftest import PARAMETERS, TARGET, dynq_command

from dynq import devices, memory, reckon
from dynq import run as runner
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate.tasks import Asked
from dynq.folder import RunFolder
from dynq.machine import CORE, Machine
from dynq.needs import Need
from dynq.recipe import Recipe
from dynq.reckon import Reckoning
from dynq.sweep import Sweep, reckoned

MACHINE = Machine(2, CORE, 8 * 2**30)
STEPS = [Need("one", 2**30, kept=100, passing=1000, begun=20), Need("two", 2**31, kept=50, passing=300, begun=30)]


def test_disk_is_what_was_kept_and_what_passes() -> None:
    own = Reckoning(STEPS, MACHINE, 1100, {})
    assert (own.peak, own.memory, own.seconds) == (1100, 2**31, 50)
    assert own.lacks() == ""
    assert "1.07 KiB of disk are needed, 1.07 KiB are free" in replace(own, disk=1099).lacks()
    later = Reckoning([STEPS[0], Need("two", 0, passing=1050)], MACHINE, 1e9, {})
    assert later.peak == 1150  # what the first keeps is still there


def test_the_table_is_for_what_takes_over_a_minute() -> None:
    shown = io.StringIO()
    Reckoning(STEPS, MACHINE, 1e9, {}).tell(shown)
    assert shown.getvalue() == ""
    Reckoning([*STEPS, Need("three", 0, begun=3600)], MACHINE, 1e9, {}).tell(shown)
    lines = shown.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step", "one", "two", "three", "in", "free:"]
    assert lines[1].split("  ")[0] == "one" and "1.07 KiB" in lines[1] and "20 s" in lines[1]
    assert "61 min" in lines[4] and "2 GiB" in lines[4]
    assert lines[5].startswith("free: 8 GiB of memory")


def test_memory_is_refused_with_numbers_and_what_to_do() -> None:
    large = Reckoning([Need("export.3bpw", 10 * 2**30)], MACHINE, 1e9, {"export.3bpw": "take -p tune=0"})
    said = "export.3bpw needs about 10 GiB of memory, 8 GiB are free; take -p tune=0, or --yes"
    with pytest.raises(DynqError, match=said):
        large.tell(io.StringIO())
    shown = io.StringIO()
    large.tell(shown, yes=True)
    assert shown.getvalue().endswith("8 GiB are free; take -p tune=0; going on\n")
    Reckoning([Need("export.3bpw", 8.5 * 2**30)], MACHINE, 1e9, {}).tell(io.StringIO())  # within the reckoning's error


def test_what_does_not_fit_on_the_card_is_refused_with_numbers() -> None:
    card = replace(MACHINE, card=2 * 2**30)
    own = [Need("calibrate", 2**20, begun=70, card=2.1 * 2**30), Need("evaluate", 2**20, card=10 * 2**30)]
    shown = io.StringIO()
    Reckoning(own[:1], card, 1e9, {}).tell(shown)  # within the reckoning's error
    lines = shown.getvalue().splitlines()
    assert lines[0].split() == ["step", "memory", "card", "disk", "time"] and "2.1 GiB" in lines[1]
    assert lines[2].startswith("free: 8 GiB of memory, 2 GiB of the card, 954 MiB of disk; times are those without")
    said = "evaluate needs about 10 GiB of the card's memory, 2 GiB are free; take --device cpu, or --yes"
    with pytest.raises(DynqError, match=said):
        Reckoning(own, card, 1e9, {}).tell(io.StringIO())
    assert Reckoning(own, card, 1e9, {}).card == 10 * 2**30


def test_a_run_on_a_card_is_reckoned_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def here(threads: int = 0, device: str = "cpu") -> Machine:
        asked.append(device)
        return replace(MACHINE, card=None if device == "cpu" else 2e9, calibrated=4 if device == "cpu" else 2)

    monkeypatch.setattr(Machine, "here", here)
    checkpoint, folder = open_checkpoint("dynq-tiny"), RunFolder(tmp_path / "run")
    tasks = runner.plan("dynq-tiny", [TARGET], folder, PARAMETERS | {"device": "cuda"})
    steps = {task.step: task.parameters for task in tasks}
    on_card = reckon.of_run(checkpoint, steps, folder)
    alone = reckon.of_run(checkpoint, steps_of(folder), folder)
    assert asked == ["cuda", "cpu"] and alone.card == 0
    uses = {need.step.partition(".")[0]: need.card > 0 for need in on_card.needs}
    assert uses == {"calibrate": True, "sensitivity": True, "allocate": False, "export": True, "evaluate": True}
    assert on_card.memory < alone.memory and on_card.lacks() == ""
    assert "of the card's memory" in replace(on_card, machine=replace(on_card.machine, card=1e6)).lacks()
    searched = {step: own | ({"search": "1min"} if "search" in own else {}) for step, own in steps.items()}
    allocate = next(n for n in reckon.of_run(checkpoint, searched, folder).needs if n.step.startswith("allocate"))
    assert allocate.card > 2 * 4 * checkpoint.n_weights
    unknown = open_checkpoint(unknown_models.make("gpt2", tmp_path / "gpt2.gguf"))
    reckon.of_run(unknown, steps, folder)
    assert asked[-1] == "cpu"  # it is not run
    need = memory.resident(checkpoint)
    for room, place in ((2 * need, "cuda:0"), (need, "auto")):  # of two cards
        monkeypatch.setattr(devices, "cards", lambda: ["cuda:0", "cuda:1"])
        monkeypatch.setattr(devices, "free", lambda card, room=room: room)
        reckon.of_run(checkpoint, {step: own | {"device": "auto"} for step, own in steps.items()}, folder)
        assert asked[-1] == place


def steps_of(folder: RunFolder, *targets: str) -> dict:
    tasks = runner.plan("dynq-tiny", targets or [TARGET], folder, PARAMETERS)
    return {task.step: task.parameters for task in tasks}


def test_steps_that_are_done_cost_nothing(tmp_path: Path) -> None:
    folder, checkpoint = RunFolder(tmp_path), open_checkpoint("dynq-tiny")
    steps = steps_of(folder)

    def todo() -> list[str]:
        return [need.step for need in reckon.of_run(checkpoint, steps_of(folder), folder).needs]

    assert todo() == list(steps)
    for name in ("calibrate", "sensitivity"):
        (folder / name).write_text("made")
        with folder.step(name, parameters=steps[name] | {"more": 1}, outputs=[name]):
            pass
    assert todo() == [f"allocate.{TARGET}", f"export.{TARGET}", "evaluate"]
    (folder / "sensitivity").unlink()
    assert todo() == ["sensitivity", f"allocate.{TARGET}", f"export.{TARGET}", "evaluate"]
    for name in steps:
        (folder / name).write_text("made")
        own = {key: value for key, value in steps[name].items() if key != "targets"}  # an input, no parameter
        with folder.step(name, parameters=own, outputs=[name]):
            pass
    assert todo() == []
    assert [need.step for need in reckon.of_run(checkpoint, steps_of(folder, "3bpw", TARGET), folder).needs] == [
        "allocate.3bpw",
        "export.3bpw",
        "evaluate",
    ]


def test_text_that_is_sampled_costs_and_text_that_is_there_does_not(tmp_path: Path) -> None:
    folder, checkpoint = RunFolder(tmp_path / "run"), open_checkpoint("dynq-tiny")
    (tmp_path / "text.txt").write_text("some words")
    first = reckon.of_run(checkpoint, steps_of(folder), folder).needs[0]
    steps = steps_of(folder)
    steps["calibrate"] = steps["calibrate"] | {"text": str(tmp_path / "text.txt")}
    assert reckon.of_run(checkpoint, steps, folder).needs[0].begun < first.begun
    with folder.step("calibrate-text", parameters={"n_ctx": 64, "n_chunks": 3}, outputs=[]):
        pass
    assert reckon.of_run(checkpoint, steps_of(folder), folder).needs[0].begun == first.begun  # another text
    folder = RunFolder(folder.path, force=True)
    with folder.step("calibrate-text", parameters={"n_ctx": 64, "n_chunks": 4}, outputs=[]):
        pass
    assert reckon.of_run(checkpoint, steps_of(folder), folder).needs[0].begun < first.begun


def test_a_model_that_cannot_be_run_is_read_and_encoded_only(tmp_path: Path) -> None:
    model, folder = unknown_models.make("gpt2", tmp_path / "gpt2.gguf"), RunFolder(tmp_path / "run")
    steps = {task.step: task.parameters for task in runner.plan(str(model), [TARGET], folder)}
    found = {need.step: need for need in reckon.of_run(open_checkpoint(model), steps, folder).needs}
    assert list(found) == list(steps)
    assert not any(need.flops for need in found.values())
    assert found["calibrate"].seconds(MACHINE) < found["sensitivity"].seconds(MACHINE)
    assert found[f"export.{TARGET}"].kept > 0 and found[f"export.{TARGET}"].passing == 0


def test_command_refuses_before_any_work(tmp_path: Path) -> None:
    done = dynq_command("run", "dynq-tiny", "--target", "3bpw", "--out", tmp_path / "run", DYNQ_MEMORY="100MB")
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dynq: calibrate needs about") and "95.4 MiB are free" in last and "--yes" in last
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_recipe_is_not_applied_where_it_cannot_fit(tmp_path: Path) -> None:
    Recipe(dict.fromkeys(open_checkpoint("dynq-tiny").tensors, "Q8_0"), "", 0, 8.5, None).save(tmp_path / "r.json")
    command = ("recipe", "apply", tmp_path / "r.json", "dynq-tiny", "--out", tmp_path / "m.gguf")
    done = dynq_command(*command, DYNQ_MEMORY="10MB")
    assert done.returncode == 2 and "dynq: apply needs about" in done.stderr and "9.54 MiB are free" in done.stderr
    assert not (tmp_path / "m.gguf").exists()
    done = dynq_command(*command, "--yes", DYNQ_MEMORY="10MB")
    assert done.returncode == 0 and "going on" in done.stderr and (tmp_path / "m.gguf").exists()


def test_a_full_disk_is_refused_and_yes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from dynq import cli

    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage(10**9, 10**9, 1000))
    monkeypatch.setattr(runner, "execute", lambda tasks, folder, workers: {"went": "on"})
    command = ["dynq", "run", "dynq-tiny", "--target", "3bpw", "--out", str(tmp_path / "a" / "run"), "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as refused:
        cli.main()
    said = capsys.readouterr()
    assert refused.value.code == 2 and said.out == ""
    assert "MiB of disk are needed, 0.977 KiB are free" in said.err.splitlines()[-1]
    assert asked[-1] == tmp_path  # the run folder is not there yet, nor is the one above it
    monkeypatch.setattr("sys.argv", [*command, "--yes"])
    with pytest.raises(SystemExit) as went:
        cli.main()
    said = capsys.readouterr()
    assert went.value.code in (0, None)
    assert json.loads(said.out)["went"] == "on" and "in all" in said.err


def test_files_that_were_measured_cost_nothing(tmp_path: Path) -> None:
    checkpoint, folder = open_checkpoint("dynq-tiny"), RunFolder(tmp_path / "out")
    files = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for i, path in enumerate(files):
        path.write_bytes(bytes(1000 + i))

    def needed(**more: object) -> list[Need]:
        settings = {"text": "", "n_ctx": 64, "n_chunks": 4, "with_mixes": False, "asked": Asked()} | more
        return list(reckon.of_evaluation(checkpoint, files, folder, **settings).needs)

    assert [need.step for need in needed()] == ["text", "evaluate"]
    assert [need.step for need in needed(asked=Asked(greedy=3, where=5))] == [
        "text",
        "evaluate",
        "greedy answers",
        "where",
    ]
    both, alone = needed()[1], needed(with_mixes=True)[1]
    assert alone.flops == both.flops * 7 / 3  # the original, two files, four mixes
    folder.write_json("evaluation.json", {"files": [{"file_bytes": 1000}]})
    assert needed()[1].flops == both.flops * 2 / 3
    folder.write_json("evaluation.json", {"files": [{"file_bytes": 1000}, {"file_bytes": 1001}]})
    assert needed() == []


def test_a_sweep_is_the_sum_of_its_runs(tmp_path: Path) -> None:
    asked = Sweep(["dynq-tiny", "not/there/at/all"], [TARGET], [0, 1], PARAMETERS)
    found = reckoned(asked, RunFolder(tmp_path))
    assert [need.step for need in found.needs] == ["dynq-tiny-seed0", "dynq-tiny-seed1"]
    one = reckon.of_run(open_checkpoint("dynq-tiny"), steps_of(RunFolder(tmp_path / "x")), RunFolder(tmp_path / "x"))
    first = found.needs[0]
    assert first.memory == one.memory and first.kept + first.passing == one.peak
    assert found.peak == pytest.approx(first.kept + one.peak)
