"""Models behind URLs: what is opened is what lies there, copied once, whole; nothing of it is believed."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tiny_models
from copies import Hub, edit, refuses, same, served
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

from dynq import cli, cluster, remote
from dynq.checkpoint import open_checkpoint
from dynq.encoding import encode
from dynq.errors import DynqError
from dynq.export import export
from dynq.recipe import Recipe

BESIDE = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "run.sh": b"exit 1",
}
"""Files that lie beside models, and that none needs."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as it is published."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def split(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model as a GGUF in shards."""
    folder, checkpoint = tmp_path_factory.mktemp("split"), open_checkpoint(plain)
    recipe = Recipe(dict.fromkeys(checkpoint.tensors, "F32"), "a test", 0, 0.0, None)
    export(checkpoint, recipe, None, folder / "tiny.gguf", shard_bytes=200_000, threads=1)
    return sorted(folder.glob("*.gguf"))


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies."""
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def there(plain: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may change, with what lies beside."""
    shutil.copytree(plain, tmp_path / "there" / "tiny")
    for name, data in BESIDE.items():
        (file := tmp_path / "there" / "tiny" / name).parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "there" / "tiny"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was copied from a file:// URL."""
    found: Counter[str] = Counter()
    whole = LocalFileSystem.get_file

    def counted(self: Any, address: str, *rest: Any, **more: Any) -> None:
        found[Path(address).name] += 1
        whole(self, address, *rest, **more)

    monkeypatch.setattr(LocalFileSystem, "get_file", counted)
    return found


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_a_folder_is_copied_once_without_what_no_model_needs(there: Path, plain: Path, fetched: Counter[str]) -> None:
    checkpoint = open_checkpoint(there.as_uri())
    same(checkpoint, open_checkpoint(plain))
    assert checkpoint.url == there.as_uri() and remote.cache() in checkpoint.path.parents
    names = sorted(p.name for p in plain.iterdir())
    assert sorted(p.name for p in checkpoint.path.iterdir()) == names == sorted(fetched)
    same(open_checkpoint(f"{there.as_uri()}/"), checkpoint)  # another spelling, another copy
    fetched.clear()
    assert open_checkpoint(there.as_uri()).path == checkpoint.path and not fetched


def test_a_split_gguf_comes_with_all_its_shards(split: list[Path]) -> None:
    assert len(split) > 2
    for shard in (split[0], split[-1]):
        same(open_checkpoint(shard.as_uri()), open_checkpoint(shard))
    (less := split[0].parent / "less").mkdir()
    shutil.copy(split[0], less)
    refuses((less / split[0].name).as_uri(), "nothing is there")


def test_a_file_system_in_memory(plain: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(f"{plain}/", "/bucket/tiny", recursive=True)
    try:
        same(open_checkpoint("memory://bucket/tiny"), open_checkpoint(plain))
        system.pipe("/bucket/tiny/config.json", b"{}")
        with pytest.raises(DynqError, match=r"config\.json"):
            open_checkpoint("memory://bucket/tiny")
        refuses("memory://bucket/nothing", "nothing is there")
    finally:
        system.rm("/bucket", recursive=True)


def test_what_has_changed_is_copied_anew_and_nothing_else(there: Path, fetched: Counter[str]) -> None:
    first = open_checkpoint(there.as_uri())
    before = {name: first.read(name) for name in first.tensors}
    fetched.clear()
    other = tiny_models.make("llama", there.parent / "other", num_hidden_layers=1, seed=1)
    edit(there / "model.safetensors", (other / "model.safetensors").read_bytes())  # as many bytes
    second = open_checkpoint(there.as_uri())
    assert fetched == {"model.safetensors": 1}
    assert np.array_equal(second.read("output_norm.weight"), open_checkpoint(there).read("output_norm.weight"))
    assert second.fingerprint == open_checkpoint(there).fingerprint != first.fingerprint
    assert all(np.array_equal(first.read(name), before[name]) for name in before)  # what is open stays as it was
    (there / "generation_config.json").unlink()
    assert "generation_config.json" not in {p.name for p in open_checkpoint(there.as_uri()).path.iterdir()}


def test_where_copies_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(remote.CACHE, "here")
    assert remote.cache() == tmp_path / "here"
    monkeypatch.delenv(remote.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert remote.cache() == tmp_path / "xdg" / "dynq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert remote.cache() == Path.home() / ".cache" / "dynq"


def test_a_path_of_that_name_and_an_id_of_the_hub_stay_what_they_are(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain, tmp_path / "s3:" / "tiny")
    assert open_checkpoint("s3://tiny").url == ""
    assert not any(map(remote.is_url, ("owner/name", "dynq-tiny", "/a/b", "./s3:/a", "C:/models/a", "://a")))


def test_the_command_takes_one(
    plain: Path, split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dynq(*arguments: object) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["dynq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    for i, model in enumerate((plain, plain.as_uri(), split[0], split[0].as_uri())):
        code, said = dynq("recipe", "apply", split[0], model, "--out", tmp_path / f"{i}.gguf")
        assert code == 0, said
    made = [(tmp_path / f"{i}.gguf").read_bytes() for i in range(4)]
    assert made[0] == made[1] and made[2] == made[3]
    code, said = dynq("run", "file:///nowhere/a.gguf", "--target", "4bpw", "--out", tmp_path / "run")
    assert code == 2 and said.startswith("dynq: file:///nowhere/a.gguf: nothing is there") and said.count("\n") == 1


# --- what goes wrong --------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from fsspec.implementations.local import LocalFileSystem
from dynq import remote
whole, done = LocalFileSystem.get_file, []
def dying(self, address, beside, **more):
    if len(done) == 2:
        data = open(address, "rb").read()
        with open(beside, "wb") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(address)
    whole(self, address, beside, **more)
LocalFileSystem.get_file = dying
remote.copied(sys.argv[1])
"""

SLOW = """
import sys, time
from fsspec.implementations.local import LocalFileSystem
from dynq import remote
whole = LocalFileSystem.get_file
def slow(self, address, beside, **more):
    print(address, flush=True)
    time.sleep(0.2)
    whole(self, address, beside, **more)
LocalFileSystem.get_file = slow
print("=", remote.copied(sys.argv[1]))
"""


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_that_was_killed_is_no_copy_and_goes_on(
    changed: bool, there: Path, plain: Path, fetched: Counter[str]
) -> None:
    dead = subprocess.run([sys.executable, "-c", KILLED, there.as_uri()], capture_output=True)
    assert dead.returncode == -signal.SIGKILL
    assert [p.suffix for p in remote.cache().rglob("files/*")].count(".partial") == 1
    names = [p.name for p in plain.iterdir()]
    for name in names if changed else []:
        edit(there / name, (there / name).read_bytes())
    same(open_checkpoint(there.as_uri()), open_checkpoint(plain))
    assert len(fetched) == len(names) - (0 if changed else 2)  # two were whole
    assert not list(remote.cache().rglob("*.partial"))


def test_two_processes_at_once_copy_once(there: Path, plain: Path) -> None:
    command = [sys.executable, "-c", SLOW, there.as_uri()]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines()]
    assert sorted(Path(line).name for line in lines if line[0] != "=") == sorted(p.name for p in plain.iterdir())
    assert len({line for line in lines if line[0] == "="}) == 1
    assert sum("another process copies it; waiting" in err for _, err in said) == 1


def change_get(monkeypatch: pytest.MonkeyPatch, after: Callable[[str, Path], None]) -> None:
    """A file system in which something happens when model.safetensors is copied: called with both places."""
    whole = LocalFileSystem.get_file

    def changed(self: Any, address: str, beside: str, **more: Any) -> None:
        whole(self, address, beside, **more)
        if address.endswith("model.safetensors"):
            after(address, Path(beside))

    monkeypatch.setattr(LocalFileSystem, "get_file", changed)


def test_a_file_that_comes_short_changes_or_finds_a_full_disk(there: Path, plain: Path) -> None:
    url = there.as_uri()
    with pytest.MonkeyPatch.context() as patch:
        change_get(patch, lambda _, beside: os.truncate(beside, 1000))
        refuses(url, "model.safetensors came with 1,000 bytes of", "try again")
    with pytest.MonkeyPatch.context() as patch:
        change_get(patch, lambda address, _: edit(Path(address), Path(address).read_bytes()))
        refuses(url, "model.safetensors has changed while it was copied")
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        change_get(patch, full)
        with pytest.raises(DynqError, match="the disk is full"):
            open_checkpoint(url)
    same(open_checkpoint(url), open_checkpoint(plain))


def test_no_room(there: Path, monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    needed = sum(p.stat().st_size for p in there.iterdir() if p.is_file() and p.name not in BESIDE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    refuses(there.as_uri(), f"needs {needed:,} bytes", f"{cached} has room for {needed - 1:,}", remote.CACHE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": needed}))
    open_checkpoint(there.as_uri())


def test_a_folder_for_copies_that_is_none(there: Path, cached: Path) -> None:
    cached.touch()
    refuses(there.as_uri(), f"cannot be kept in {cached}", remote.CACHE)


class Hostile(AbstractFileSystem):
    """Lists what a test says, and gives more bytes than it said."""

    protocol = "hostile"
    cachable = False
    entries: tuple[dict[str, Any], ...] = ()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self.entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return next(entry for entry in self.ls("") if entry["name"] == path)

    def get_file(self, address: str, beside: str, callback: Any = None, **_: Any) -> None:
        with Path(beside).open("wb") as file:
            for _ in range(1 << 20):  # a terabyte
                file.write(b"x" * (1 << 20))
                callback.relative_update(1 << 20)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what hostile://m lists beside config.json: names, or entries."""
    fsspec.register_implementation("hostile", Hostile, clobber=True)

    def says(*more: Any) -> None:
        entries = [{"name": name, "size": 4, "type": "file"} if isinstance(name, str) else name for name in more]
        first = [{"name": f"/m/{name}", "size": 2, "type": "file"} for name in ("config.json", "model.safetensors")]
        monkeypatch.setattr(Hostile, "entries", (*first, *entries))

    yield says
    _registry.pop("hostile")


@pytest.mark.parametrize(
    "name", ["..\\x.json", "C:x.json", "a\0b.json", "a\nb.json", f"{'x' * 300}.json", "\udc80.json"]
)
def test_names_that_are_none_are_refused(name: str, hostile: Callable[..., None]) -> None:
    hostile(f"/m/{name}")
    refuses("hostile://m", "is no name of a file of a model")


def test_names_that_lead_elsewhere_are_left_out(hostile: Callable[..., None], tmp_path: Path) -> None:
    """They are none of the folder: nothing asks for them, and nothing is written there."""
    evil = ("/m/../../x.json", "/etc/x.json", "x.json", "/m/a/x.json", "/m/", "/m", "/m/..", f"/m/{tmp_path}/x.json")
    hostile(
        *evil, {"name": "/m/y.json", "size": 3, "type": "directory"}, {"name": "/m/z.json", "size": 3, "type": "link"}
    )
    files, _ = remote._files_at("hostile://m")
    assert sorted(files) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("size", [None, -1, "4", 4.0, True])
def test_sizes_that_are_none(size: Any, hostile: Callable[..., None]) -> None:
    hostile({"name": "/m/x.json", "size": size, "type": "file"})
    refuses("hostile://m", "does not say how large it is")


def test_sizes_and_numbers_that_lie(hostile: Callable[..., None]) -> None:
    hostile({"name": "/m/x.json", "size": 1 << 60, "type": "file"})
    refuses("hostile://m", f"needs {(1 << 60) + 4:,} bytes")
    hostile()
    refuses("hostile://m", "/m/config.json is longer than the 2 bytes that it should have")
    hostile(*(f"/m/{i}.json" for i in range(10_001)))
    refuses("hostile://m", "10,003 files, more than any model has")


@pytest.mark.parametrize("url", ["memory://", "memory://..", "memory://a/..", "memory://a/b\\c", "hf://a/@main"])
def test_a_model_without_a_name(url: str) -> None:
    with pytest.raises(DynqError, match="is no name of a model's folder or file"):
        open_checkpoint(url)


def test_folders_that_hold_no_model(there: Path) -> None:
    (there / "model.safetensors").unlink()
    refuses(there.as_uri(), "no config.json with *.safetensors is there", "convert weights in PyTorch's format first")
    (there / "b.gguf").touch()
    (there / "a.gguf").touch()
    refuses(there.as_uri(), f"name the file itself, {there.as_uri()}/a.gguf")
    refuses((there / "config.json").as_uri(), "no config.json with *.safetensors is there")
    refuses("file://a/b", "write the whole path, file:///")


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(DynqError, match=r"^ftp://: a password in the URL") as caught:
        open_checkpoint("ftp://me:secret@localhost/m.gguf")
    assert "secret" not in str(caught.value)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")):
        monkeypatch.delitem(_registry, protocol, raising=False)
        for name in [name for name in sys.modules if name.partition(".")[0] == package or name.endswith("fs.http")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        refuses(f"{protocol}://host/m.gguf", "needs a package that is not installed", f"pip install {package}")
    refuses("foo://host/m.gguf", "not a URL that fsspec reads", "foo")
    for name in [name for name in sys.modules if name.startswith("fsspec")]:
        monkeypatch.setitem(sys.modules, name, None)
    refuses("s3://host/m.gguf", "pip install fsspec")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub, at an address where nothing answers."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9"})
    refuses("hf://owner/name", "look at the address")


# --- servers ----------------------------------------------------------------------------------------------------------


def test_over_http(there: Path, split: list[Path]) -> None:
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp")
    for shard in split:
        shutil.copy(shard, there.parent)
    with served(there.parent) as address:
        same(open_checkpoint(f"{address}/{split[1].name}?download=true"), open_checkpoint(split[0]))
        first = open_checkpoint(f"{address}/tiny/")
        same(first, open_checkpoint(there))
        config = there / "config.json"
        edit(config, config.read_bytes().replace(b'"vocab_size": ', b'"vocab_size":  ').replace(b"  ", b" ", 1))
        second = open_checkpoint(f"{address}/tiny/")
        assert second.path != first.path and (second.path / "config.json").read_bytes() == config.read_bytes()
        refuses(f"{address}/none.gguf", "nothing is there")
        refuses(f"{address}/none/", "nothing is there")
    refuses("http://127.0.0.1:9/m.gguf", "or it is not reached")


def test_of_the_hub(there: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(there, Hub) as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
        shutil.copytree(plain, there.parent / "name")
        first = open_checkpoint("hf://owner/name")
        same(first, open_checkpoint(there.parent / "name"))
        assert sorted(p.name for p in first.path.iterdir()) == sorted(p.name for p in plain.iterdir())
        (there / "chat_template.jinja").write_text("{{ messages }}")
        assert (open_checkpoint("hf://owner/name").path / "chat_template.jinja").exists()
        assert open_checkpoint("hf://owner/name@main").path.name == "name"
        refuses("hf://owner/none", "look at the address")


def test_of_a_bucket(plain: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]) -> None:
    """S3's own protocol, spoken by moto's server."""
    pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    server = pytest.importorskip("moto.server", reason="the server is moto's").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}", "key": "a", "secret": "b"})
    try:
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(f"{plain}/", "bucket/models/tiny/", recursive=True)
        system.pipe("bucket/models/tiny/../x.json", b"{}")  # a key is any text
        first = open_checkpoint("s3://bucket/models/tiny")
        same(first, open_checkpoint(plain))
        assert sorted(p.name for p in first.path.iterdir()) == sorted(p.name for p in plain.iterdir())
        assert open_checkpoint("s3://bucket/models/tiny").path == first.path
        system.pipe("bucket/models/tiny/chat_template.jinja", b"{{ messages }}")
        assert open_checkpoint("s3://bucket/models/tiny").path != first.path
        refuses("s3://bucket/models/none", "nothing is there")
    finally:
        server.stop()


# --- workers ----------------------------------------------------------------------------------------------------------


def test_it_travels_as_its_url(there: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(there.as_uri())
    sent = pickle.dumps(checkpoint)
    assert str(cached).encode() not in sent
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "elsewhere"))
    found = pickle.loads(sent)
    same(found, checkpoint)
    assert found.path.is_relative_to(tmp_path / "elsewhere")


def test_another_state_of_the_url_is_refused(there: Path) -> None:
    sent = pickle.dumps(open_checkpoint(there.as_uri()))
    other = tiny_models.make("llama", there.parent / "other", num_hidden_layers=1, seed=1)
    edit(there / "model.safetensors", (other / "model.safetensors").read_bytes())
    with pytest.raises(DynqError, match=f"{there.as_uri()}: not the model that the run reads"):
        pickle.loads(sent)


def test_a_worker_copies_it_itself_and_gives_the_same_bytes(
    there: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("distributed", reason="Dask is an extra: pip install 'dynq[cluster]'")
    here, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    monkeypatch.setenv(remote.CACHE, str(elsewhere))  # the process takes this with it
    with cluster.started(1) as address:
        monkeypatch.setenv(remote.CACHE, str(here))
        with cluster.joined(address, None) as client:
            checkpoint = open_checkpoint(there.as_uri())
            formats = {name: "Q8_0" if info.quantizable else info.kept for name, info in checkpoint.tensors.items()}
            many = [(name, data.tobytes()) for name, _, data in encode(checkpoint, formats, None, cluster=client)]
    assert many == [(name, data.tobytes()) for name, _, data in encode(open_checkpoint(there), formats, None)]
    copies = [sorted(file.name for file in folder.rglob("files/*")) for folder in (here, elsewhere)]
    assert copies[0] == copies[1] and len(copies[0]) == len(list(checkpoint.path.iterdir()))
