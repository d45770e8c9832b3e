"""Work on a cluster of two processes: the bytes of one process, also where a worker is killed."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
import tiny_models
import torch

from dynq import cluster, codec, jobs, memory
from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.encoding import encode
from dynq.errors import DynqError
from dynq.evaluate import compare, files, kld, precision
from dynq.evaluate.original import Text
from dynq.export import export
from dynq.folder import RunFolder, content_hash
from dynq.formats import usable
from dynq.layer_inputs import feed_back
from dynq.recipe import Recipe
from dynq.sensitivity import measure_swaps, read_table, sensitivity
from dynq.threads import one_thread_each
from dynq.torch_model import load_model

pytest.importorskip("distributed", reason="Dask is an extra: pip install 'dynq[cluster]'")

N_CTX = 32
DOMAINS = ["code", "chats"] * 6


@pytest.fixture(scope="module")
def client():
    with cluster.started(2) as address:
        client = cluster.connect(address)
        yield client
        client.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its calibration text, a folder that is calibrated, the importance."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_models.make("llama", tmp_path_factory.mktemp("tiny"), intermediate_size=256, num_hidden_layers=1)
    checkpoint = open_checkpoint(model)
    tokens = np.random.default_rng(0).integers(2, 300, (len(DOMAINS), N_CTX)).astype(np.int32)
    importance = calibrate(checkpoint, load_model(checkpoint), tokens, folder, keep=48, threads=1)
    return checkpoint, tokens, folder, importance


def chosen(checkpoint, fmt):
    return {name: usable(fmt, info.row) if info.quantizable else info.kept for name, info in checkpoint.tensors.items()}


def kill_a_worker(client):
    """kill -9 of a worker's process; gives its number."""
    pid = next(iter(client.run(os.getpid).values()))
    os.kill(pid, signal.SIGKILL)
    return pid


def killing(client, stream, after):
    """The stream, with a worker killed once so many tensors have come."""
    for i, tensor in enumerate(stream):
        if i == after:
            kill_a_worker(client)
        yield tensor


def double(x):
    return 2 * x


def refuse(x):
    raise DynqError(f"{x} is refused")


def kill_own(x):
    os.kill(os.getpid(), signal.SIGKILL)


def set_allowed_failures(n, dask_scheduler):
    dask_scheduler.allowed_failures = n  # before it gives a task up; each death costs seconds


def test_results_come_in_order_with_and_without_a_cluster(client):
    numbers = list(range(40))
    for where in (None, client):
        assert list(cluster.tasks(double, iter(numbers), where, total=40, desc="double")) == [2 * n for n in numbers]


def test_a_task_uses_one_core(client):
    assert list(cluster.tasks(lambda _: codec.cores(), iter([0]), client, total=1, desc="", unit="")) == [1]


def test_items_are_taken_as_results_are_given(client):
    taken = []
    stream = cluster.tasks(double, (taken.append(n) or n for n in range(100)), client)
    assert next(stream) == 0
    assert len(taken) <= cluster.AHEAD * 2 + 1
    stream.close()


def test_the_dashboards_link_stands_in_the_log_and_a_job_finds_it(client, tmp_path, capsys):
    cluster.connect(client.scheduler.address).close()
    watched = jobs._Watched(io.StringIO(), RunFolder(tmp_path), ["calibrate"])
    watched.write("03_calibrate\n" + capsys.readouterr().err)
    watched.note()
    look = jobs.Job(RunFolder(tmp_path), "dynq-tiny").look()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", look.dashboard)


def test_a_mistake_comes_back_as_it_is_and_says_where(client):
    with pytest.raises(DynqError, match=r"worker tcp://\S+: 3 is refused"):
        list(cluster.tasks(refuse, [3], client))


def test_calibration_gives_the_same_bytes(client, made, tmp_path):
    checkpoint, tokens, folder, importance = made
    found = calibrate(checkpoint, load_model(checkpoint), tokens, tmp_path, keep=48, cluster=client)
    assert content_hash(tmp_path / "fisher") == content_hash(folder / "fisher")
    assert all(np.array_equal(sums, importance.sums[name]) for name, sums in found.sums.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two workers, and a model of three layers that neither has the memory for."""
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("small"), num_hidden_layers=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(memory.LIMIT, f"{2 * memory.resident(checkpoint)}B")
        with cluster.started(2) as address:
            patch.undo()
            client = cluster.connect(address)
            yield client, checkpoint
            client.close()


def calibrated_and_measured(checkpoint, tokens, folder, client=None):
    """The files of calibration and sensitivities."""
    folder.mkdir()
    importance = calibrate(checkpoint, load_model(checkpoint), tokens, folder, keep=48, threads=1, cluster=client)
    sensitivity(checkpoint, folder, importance, ["Q4_0"], threads=1, cluster=client)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_share_a_model_larger_than_their_memory(small, made, tmp_path):
    """Importance, Fisher samples and sensitivities of halves of the text; swaps and an evaluation of it."""
    (small, checkpoint), tokens = small, made[1]
    assert cluster.runs(small, checkpoint, range(5), 1) == [range(3), range(3, 5)]
    one = calibrated_and_measured(checkpoint, tokens, tmp_path / "one")
    many = calibrated_and_measured(checkpoint, tokens, tmp_path / "many", small)
    assert one.keys() == many.keys() and [name for name in one if one[name] != many[name]] == []
    with one_thread_each(1):
        reference = kld.make_reference(load_model(checkpoint, streamed=True), tokens[:3], tmp_path / "here", desc="")
    there = precision.reference_by_workers(small, checkpoint, tokens[:3], tmp_path / "there")
    assert there.depth.tobytes() == reference.depth.tobytes()
    reference = kld.make_reference(load_model(checkpoint), tokens[:3], tmp_path / "swaps", first=0, desc="")
    table, model = read_table(tmp_path / "many"), load_model(checkpoint)
    table = measure_swaps(checkpoint, model, tmp_path / "many", table, [0], reference, None, cluster=small)
    assert table["measured_kld"][0].as_py() is not None  # here, where there is room


def test_a_streamed_calibration_goes_on_though_a_worker_dies(small, made, tmp_path):
    """Killed when its first layer is on the disk: another takes its sequences, and what it had written is gone."""
    (small, checkpoint), tokens = small, np.tile(made[1], (4, 1))
    one = calibrated_and_measured(checkpoint, tokens, tmp_path / "one")
    aside, tried = tmp_path / "many" / "fisher.parts", set()
    processes = [psutil.Process(pid) for pid in small.run(os.getpid).values()]

    def kill_when_it_has_begun():
        while not list(aside.glob("*/*/*.safetensors")):
            time.sleep(0.01)
        next(one for one in processes if any(str(aside) in used.path for used in one.memory_maps())).kill()
        while aside.exists():
            tried.update(path.name for path in aside.glob("*"))
            time.sleep(0.01)

    killer = threading.Thread(target=kill_when_it_has_begun)
    killer.start()
    many = calibrated_and_measured(checkpoint, tokens, tmp_path / "many", small)
    killer.join()
    assert len(tried) >= 3  # two runs of sequences, one of them once more
    assert one.keys() == many.keys() and [name for name in one if one[name] != many[name]] == []


def test_feedback_gives_the_same_bytes(client, made, tmp_path):
    checkpoint, tokens, _, importance = made
    formats, model = chosen(checkpoint, "Q4_0"), load_model(checkpoint)
    back = partial(feed_back, checkpoint, formats, importance, model, tokens, DOMAINS)
    one = list(back(tmp_path / "one", threads=1))
    many = list(back(tmp_path / "many", cluster=client))
    assert [(name, fmt, data.tobytes()) for name, fmt, data in many] == [(n, f, d.tobytes()) for n, f, d in one]
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == names  # no Hessian is left
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert len(names) == len(formats)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_sensitivities_and_swaps_are_the_same_bytes(client, made, tmp_path, two_threads):
    checkpoint, tokens, folder, importance = made
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fisher").symlink_to(folder / "fisher")
    model = load_model(checkpoint)
    reference = kld.make_reference(model, tokens[:3], tmp_path / "swaps", first=0, desc="")
    found = {}
    for name, how in {"one": {"threads": 2}, "many": {"cluster": client}}.items():
        table = sensitivity(checkpoint, tmp_path / name, importance, ["Q4_0", "Q8_0"], **how)
        rows = range(0, len(table), 5)
        known = model if name == "one" else None
        table = measure_swaps(checkpoint, known, tmp_path / name, table, rows, reference, importance, **how)
        found[name] = (tmp_path / name / "sensitivity.parquet").read_bytes()
        assert sum(value is not None for value in table["measured_kld"].to_pylist()) == len(rows)
    assert found["one"] == found["many"]


def test_an_evaluation_gives_the_same_numbers(client, made, tmp_path):
    checkpoint, tokens, _, importance = made
    file = tmp_path / "file.gguf"
    export(checkpoint, Recipe(chosen(checkpoint, "Q8_0"), "", 0, 0.0, None), importance, file, threads=1)
    contenders = {
        file: compare.Contender("a file", "dynamic", {}, file.name),
        None: compare.Contender("a mix", "mix", chosen(checkpoint, "Q4_0")),
    }
    found = {}
    for name, model, where in (("one", load_model(checkpoint), None), ("many", None, client)):
        (tmp_path / name).mkdir()
        meter = compare.Torch(checkpoint, model, importance, tokens[:5], 1, where)
        reference = meter.reference(tmp_path / name / "reference")
        scores = [meter.score(contender, path, reference) for path, contender in contenders.items()]
        found[name] = scores, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert found["one"] == found["many"]
    assert found["many"][1].keys() == {"reference.u16", "reference.json"}  # the mix is gone
    assert found["one"][0][0]["statistics"]["Mean KLD"] < found["one"][0][1]["statistics"]["Mean KLD"]


def test_files_are_compared_as_in_one_process(client, made, tmp_path):
    checkpoint, tokens, _, _ = made
    file = tmp_path / "file.gguf"
    export(checkpoint, Recipe(chosen(checkpoint, "Q8_0"), "", 0, 0.0, None), None, file, threads=1)
    text = Text("random", "hash", tokens[:4], {"a": 1, "b": 3})
    log = tmp_path / "base.logits"
    found = {}
    for name, where in (("one", None), ("many", client)):
        folder = RunFolder(tmp_path / name)
        how = {"with_mixes": True, "threads": 1, "cluster": where}
        found[name] = files.against_original(checkpoint, [file], folder, text=text, write_logits=log, **how)
        again = files.against_logits(log, [file], RunFolder(tmp_path / f"{name}-logits"), cluster=where)
        assert {entry["kind"] for entry in found[name]["files"]} == {"file", "mix"} and not found[name]["failed"]
        found[name] = found[name], again, sorted(path.name for path in folder.path.iterdir())
    assert found["one"] == found["many"]


def test_another_model_at_the_same_path_is_refused(client, made, tmp_path):
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path / "m", num_hidden_layers=1))
    _ = checkpoint._stamp
    tiny_models.make("llama", tmp_path / "m", num_hidden_layers=1, seed=1)
    with pytest.raises(DynqError, match="not the model that the run reads"):
        list(encode(checkpoint, {"token_embd.weight": "Q8_0"}, None, cluster=client))


def test_encoded_files_are_the_same_bytes_though_a_worker_dies(client, made, tmp_path):
    checkpoint, _, _, importance = made
    recipe = Recipe(chosen(checkpoint, "Q4_0"), "", 0, 0.0, None)
    one = export(checkpoint, recipe, importance, tmp_path / "one.gguf", level="search", threads=1)

    def source(formats):
        stream = encode(checkpoint, formats, importance, level="search", cluster=client)
        return killing(client, stream, after=3)

    many = export(checkpoint, recipe, importance, tmp_path / "many.gguf", source=source)
    assert many == one
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_a_task_that_kills_its_workers_is_given_up(client):
    client.run_on_scheduler(set_allowed_failures, 0)
    with pytest.raises(DynqError, match=r"blk\.0: workers died on it, 1 in turn"):
        list(cluster.tasks(kill_own, [("blk.0", 1)], client))
    client.run_on_scheduler(set_allowed_failures, 3)


def test_addresses_where_nothing_answers(monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS", 1)
    assert cluster.connect("") is None
    for address in ("tcp://127.0.0.1:9", "tcp://nowhere.invalid:8786", "tcp://127.0.0.1:99999"):
        with pytest.raises(DynqError, match="no Dask scheduler answers there"):
            cluster.connect(address)
    for address in ("nowhere", "tcp://", "foo://here:1", "here:8786"):
        with pytest.raises(DynqError, match=r"no address of a scheduler .* write tcp://HOST:PORT"):
            cluster.connect(address)


def test_without_dask_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DynqError, match=r"pip install 'dynq\[cluster\]'"):
        cluster.connect("tcp://127.0.0.1:9")
    with pytest.raises(DynqError, match=r"pip install 'dynq\[cluster\]'"), cluster.started(1):
        pass


def test_dask_is_not_imported_where_there_is_no_cluster():
    code = "import sys, dynq.calibrate, dynq.layer_inputs, dynq.run, dynq.sensitivity, dynq.evaluate.files\n"
    code += "from dynq.cluster import joined, tasks\n"
    code += "with joined('', None) as none: assert list(tasks(abs, [-1], none)) == [1]\n"
    code += "assert not {'dask', 'distributed'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
