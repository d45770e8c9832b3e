"""A run folder: what was made from what, so that nothing is made twice and nothing stale is kept.

Every step of a run names its parameters, the content hashes of what it reads, and the files it writes. ``run.json``
keeps all of that, and on which processor and with how many threads a step was made, without times or host names: the
same inputs give the same bytes on one machine. A step whose record still holds is
skipped; one that was cut off goes on from the part files it left.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import dynq
from dynq.errors import DynqError
from dynq.files import load_json, replacing, sha256, taking_apart
from dynq.progress import progress

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint
    from dynq.imatrix import Importance

try:
    import fcntl
except ImportError:  # Windows: two runs at once in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("gguf", "numba", "numpy", "pyarrow", "torch", "transformers", "xllamacpp")
_LARGE = 1 << 30  # bytes: a hash that takes seconds shows a bar
LOCKED = "DYNQ_LOCKED"
"""Environment variable with the folder that a parent process has locked for its kernels."""


def file_safe(target: str) -> str:
    """A target as part of a file name: "like:Q4_K_M" becomes "like-Q4_K_M"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"\s+", "", target))


def content_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and contents of all files below a folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        lines = [f"{p.relative_to(path).as_posix()}\0{content_hash(p)}\n" for p in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    size = path.stat().st_size
    if size < _LARGE:
        return sha256(path)
    with progress(total=size, desc=f"hash {path.name}", unit="B", leave=False) as bar:
        return sha256(path, bar.update)


class RunFolder:
    """The folder of one run. A relative path counts from here, or, within the notebooks' folder, from the one above.

    force: parameters other than those that the folder was made with are accepted, and what depends on them is made
    anew. Without it they are a DynqError that names them.
    """

    def __init__(self, path: str | Path, *, force: bool = False):
        here = Path.cwd()
        if here.name == "notebooks" and (here.parent / "dynq").is_dir():
            here = here.parent  # Jupyter starts a notebook in the notebook's own folder
        self.path = (here / Path(path).expanduser()).resolve()
        self.force = force

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def state(self) -> dict[str, Any]:
        """The contents of ``run.json``; without steps where there is none yet."""
        path = self / "run.json"
        if not path.exists():
            return {"steps": {}}
        try:
            state = load_json(path, "")
        except DynqError as error:
            raise DynqError(f"{path}: not readable ({error}); delete it, the run starts anew") from None
        steps = state.get("steps")
        if not isinstance(steps, dict) or not all(map(_is_step, steps.values())) or not _can_be_written(state):
            raise DynqError(f"{path}: not the record of a run; delete it, the run starts anew")
        return state

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder beside its place, then rename it."""
        (self / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self / name) as beside:
            beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder; DynqError where it is missing."""
        try:
            return json.loads((self / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DynqError(f"{self / name}: not there yet; run the notebooks before this one first") from None
        except (ValueError, RecursionError) as error:
            raise DynqError(
                f"{self / name}: not readable as JSON ({error}); make the step that wrote it anew"
            ) from None

    def checkpoint(self) -> "Checkpoint":
        """The model that the folder was calibrated with. DynqError where there is none, or where it has changed."""
        from dynq.checkpoint import open_checkpoint

        made = self.state["steps"].get("calibrate")
        if not made or made["state"] != "done":
            raise DynqError(f"{self.path}: nothing is calibrated here; run notebook 03_calibrate in it first")
        with taking_apart(self / "run.json"):
            model, requantize = str(made["parameters"]["model"]), bool(made["parameters"]["allow_requantize"])
            fingerprint = made["inputs"]["model"]
        checkpoint = open_checkpoint(model, requantize)
        if checkpoint.fingerprint != fingerprint:
            raise DynqError(f"{checkpoint.path}: has changed since {self.path} was calibrated; calibrate again")
        return checkpoint

    def importance(self) -> "Importance | None":
        """The importance that tensors are encoded with; None where there is none of a model that cannot be run."""
        from dynq.imatrix import read_imatrix

        file = self / "imatrix.gguf"
        return read_imatrix(file) if file.exists() else None

    def calibrated(self, checkpoint: "Checkpoint", *names: str) -> list[str]:
        """Those of what calibration leaves that the model has: one that cannot be run may lack any of them."""
        return [name for name in names if checkpoint.architecture.known or (self / name).exists()]

    def text(
        self,
        split: str,
        spec: str,
        *,
        checkpoint: "Checkpoint",
        model: Callable[[], Any],
        n_ctx: int,
        n_chunks: int,
        seed: int,
        name: str = "text",
        device: str = "cpu",
    ) -> dict[str, Any]:
        """The tokens of one split, made once, as ``<split>-text.json``: description, sha256, domains, tokens.

        split, spec, n_ctx, n_chunks, seed: as `dynq.text.load_text` takes them; model: gives the original, called only
        if the text must be sampled, and device: where that is; name: what the user calls `spec`, for messages.
        """
        from dynq.text import check_held_out, load_text, text_files
        from dynq.torch_model import load_tokenizer

        files = text_files(spec)
        inputs = {"model": checkpoint.fingerprint}
        for path in files:
            if not path.is_file():
                raise DynqError(f"{path}: no such file ({name})")
            inputs[str(path)] = content_hash(path)
        if split == "evaluate":
            calibrated = self.state["steps"].get("calibrate-text", {}).get("parameters", {})
            check_held_out(calibrated.get("text", ""), spec)
        file = f"{split}-text.json"
        settings = {name: spec, "n_ctx": n_ctx, "n_chunks": n_chunks, "seed": seed}
        settings |= {} if files else {"device": device}
        with self.step(f"{split}-text", parameters=settings, inputs=inputs, outputs=[file]) as todo:
            if todo:
                text = load_text(
                    spec,
                    load_tokenizer(checkpoint),
                    n_ctx=n_ctx,
                    n_chunks=n_chunks,
                    seed=seed,
                    model=None if files else model(),
                    split=split,
                )
                kept = {"description": text.description, "sha256": text.sha256, "domains": list(text.domains)}
                self.write_json(file, kept | {"tokens": text.tokens.tolist()})
        found: dict[str, Any] = self.read_json(file)
        return found

    def check(self, name: str, parameters: Mapping[str, Any]) -> None:
        """DynqError if the step was made with other values of these parameters and `force` is not set.

        Parameters that the step does not record (threads, say) do not count.
        """
        recorded = self.state["steps"].get(name, {}).get("parameters", {})
        for key, old in recorded.items():
            if not self.force and key in parameters and parameters[key] != old:
                raise DynqError(
                    f"{self.path}: {name} was made with {key}={old!r}, now it is {parameters[key]!r}; "
                    "choose another folder (--out, run), or --force to make anew what depends on it"
                )

    @contextmanager
    def step(
        self,
        name: str,
        *,
        parameters: Mapping[str, Any],
        outputs: Iterable[str],
        files: Iterable[str] = (),
        inputs: Mapping[str, str] | None = None,
        parts: Iterable[str] = (),
    ) -> Iterator[bool]:
        """A step of the run: ``with folder.step(...) as todo: if todo: ...``; what it made is recorded at the end.

        parameters: plain JSON values that a user sets. files: names in the folder that the step reads; inputs: name ->
        hash of what else it reads. outputs: names in the folder (files or folders) that it writes. parts: names that a
        cut-off step leaves behind to go on from; they are kept only where parameters and inputs are the same.
        """
        parameters, outputs = json.loads(json.dumps(dict(parameters))), list(outputs)
        self.check(name, parameters)
        for file in files:
            if not (self / file).exists():
                raise DynqError(f"{self / file}: not there yet; run the notebooks before this one first")
        hashes = {file: content_hash(self / file) for file in files}
        self._check_made(hashes)
        reads = {**(inputs or {}), **hashes, "dynq": dynq.__version__}
        record: dict[str, Any] = {"state": "started", "parameters": parameters, "inputs": reads, "outputs": {}}
        record["machine"] = {"processor": _processor(), "threads": _threads()}
        old = self.state["steps"].get(name, {})
        same = old.get("parameters") == parameters and old.get("inputs") == reads
        if same and old["state"] == "done" and list(old["outputs"]) == list(outputs):
            if all((self / n).exists() and content_hash(self / n) == h for n, h in old["outputs"].items()):
                print(f"{name}: nothing it depends on has changed, kept")
                yield False
                return
            same = False
        with self.lock():
            if not (same and old["state"] == "started"):
                # an output of before that is none now: a shard of a file that is cut otherwise, say
                for part in (*parts, *(old.get("outputs", {}).keys() - set(outputs))):
                    _remove(self / part)
            self._record(name, record)
            try:
                yield True
            except DynqError:
                if not any(_holds_something(self / part) for part in parts):
                    self._forget(name)  # nothing to go on from: other parameters may mend the mistake
                raise
            record["outputs"] = {file: content_hash(self / file) for file in outputs}
            self._record(name, record | {"state": "done"})

    def _check_made(self, hashes: Mapping[str, str]) -> None:
        """DynqError for a file that is not what the step which is recorded for it has made."""
        for name, step in self.state["steps"].items():
            for file, made in step["outputs"].items():
                if hashes.get(file, made) != made:
                    raise DynqError(
                        f"{self / file}: not what {name} has made, changed since or damaged; make that step anew"
                    )

    def _forget(self, name: str) -> None:
        self._write_steps({key: step for key, step in self.state["steps"].items() if key != name})

    def _record(self, name: str, record: dict[str, Any]) -> None:
        self._write_steps(self.state["steps"] | {name: record})

    def _write_steps(self, steps: Mapping[str, Any]) -> None:
        versions = {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}
        # by name, so that the order in which steps were first run does not show
        self.write_json(
            "run.json", {"dynq": dynq.__version__, "versions": versions, "steps": {k: steps[k] for k in sorted(steps)}}
        )

    @contextmanager
    def lock(self) -> Iterator[TextIO | None]:
        """Keep other processes out of the folder. The system frees the lock of a process that died.

        Gives the locked file: a child that inherits it has the lock too. None within a parent's lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            inherited = fcntl is None or os.environ.get(LOCKED) == str(self.path)
            opened = None if inherited else (self / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise DynqError(
                f"{self.path}: cannot be written to ({error.strerror}); choose another folder (--out, run)"
            ) from error
        if opened is None:
            yield None
            return
        with opened as file:
            _lock(file, self.path)
            yield file


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another"
        raise DynqError(f"{path}: process {holder} works in this folder; wait or choose another --out") from None
    sign(file, os.getpid())


def sign(file: TextIO, pid: int) -> None:
    """Write into a locked file whose the lock is."""
    file.truncate(0)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its holder
        os.write(file.fileno(), str(pid).encode())


def _is_step(value: Any) -> bool:
    kinds = {"state": str, "parameters": dict, "inputs": dict, "outputs": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(map(_is_inside, value["outputs"]))  # what a step no longer writes is removed


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder, or in one below it."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode(errors="replace")) < 256 for part in parts)
    return plain and name.isprintable() and not set(name) & set("\\:")


def _can_be_written(state: dict[str, Any]) -> bool:
    """Without infinite numbers and halves of characters, which JSON can hold."""
    try:
        json.dumps(state, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _threads() -> int:
    """Those that torch takes, which a notebook sets first of all."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else os.cpu_count() or 1


def _processor() -> str:
    """Its name, as far as the system tells: bytes of sums depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
