"""Models that lie elsewhere: on the Hugging Face hub, or behind a URL that fsspec reads (s3://, hf://, https://, ...).

What a model is made of is copied once to a folder of the user's, and opened there as any other. Of a URL that is

    CACHE/HASH OF THE URL/files/HASH OF A FILE'S ADDRESS, SIZE AND TAG     what was copied, whole or not there
    CACHE/HASH OF THE URL/HASH OF ALL OF THEM/NAME/                        the model: links to those files

so files of another state of the same URL never mix, only those that have changed are copied again, and a copy that was
cut off goes on after its last whole file. CACHE is $DYNQ_CACHE, else dynq/ in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dynq import shards
from dynq.errors import DynqError
from dynq.files import is_plain, replacing
from dynq.progress import progress

try:
    import fcntl
except ImportError:  # Windows: two copies of one model at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

CACHE = "DYNQ_CACHE"
"""Environment variable with the folder of the copies."""

_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md")
_UNWANTED = "consolidated*"  # the same weights once more, as Mistral's own code names them
_MOST = 10_000  # files of a model; the largest have a few hundred
# What tells one state of a file from another, the surest first, as file systems call it: hashes, versions, times.
# An address to which a server leads on is none: it may be signed anew each time.
_TAGS = (
    *("etag", "md5", "md5hash", "contentmd5", "checksum", "digest", "sha256", "sha", "blobid", "oid", "crc32c", "crc"),
    *("generation", "versionid", "lastmodified", "modificationtime", "mtime", "updated", "modified", "modify"),
    "created",
)


class _File(NamedTuple):
    """A file behind a URL: its address in the file system, size and tag."""

    address: str
    size: int
    tag: str


# --- the hub --------------------------------------------------------------------------------------------------------


def from_hub(model: str) -> Path:
    """The folder in which the hub's own client keeps a model, by its id."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED), ignore_patterns=["*/*", _UNWANTED]))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise DynqError(
            f"{model}: no such path here, and the Hugging Face hub did not give it: {_reason(error)}"
        ) from error


# --- URLs -----------------------------------------------------------------------------------------------------------


def is_url(model: str) -> bool:
    """Whether a model is given as a URL: PROTOCOL://..."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", model))


def copied(url: str) -> Path:
    """The copy of a model: a Hugging Face directory, or a GGUF file, all shards of a split one beside it.

    DynqError: no file system for such a URL, nothing there, not reached, a name that is none, no room.
    """
    files, system = _files_at(url)
    name, place = _name(url), cache() / _hash([url])
    state = _hash(f"{file}\0{known}" for file, known in sorted(files.items()))
    folder = place / state / ("gguf" if name in files else name)
    blobs = {file: place / "files" / _hash(map(str, known)) for file, known in files.items()}
    if not all((folder / file).is_file() for file in files):
        with _reading(url), _alone(place, url):
            _copy(system, url, {blobs[file]: known for file, known in files.items() if not blobs[file].exists()})
            folder.mkdir(parents=True, exist_ok=True)
            for file, blob in blobs.items():
                if not (folder / file).exists():
                    (folder / file).symlink_to(Path("../../files") / blob.name)
    return folder / name if name in files else folder


def cache() -> Path:
    """The folder of the copies: $DYNQ_CACHE, else dynq/ where programs of this user keep what can be made again."""
    chosen = os.environ.get(CACHE)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dynq"
    return Path(chosen or usual).expanduser().absolute()


def _files_at(url: str) -> tuple[dict[str, _File], Any]:
    """What a model behind a URL is made of, by name; the file system. Nothing of it is kept from an earlier look."""
    if urlsplit(url).password:
        raise DynqError(
            f"{url.partition('://')[0]}://: a password in the URL would stand in what a run writes; leave it out, "
            "fsspec takes it from its own configuration (~/.config/fsspec)"
        )
    system, path = _system(url)
    with _reading(url):
        system.invalidate_cache()
        if _name(url).endswith(".gguf"):
            return {name: _known(url, system.info(address)) for name, address in _shards(path).items()}, system
        return _directory(system, url, path), system


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DynqError(f"{url}: URLs are read by fsspec, which is not installed; pip install fsspec") from None
    with _reading(url):
        try:
            system, path = url_to_fs(url)
        except ImportError as error:
            lacks = getattr(error.__cause__, "name", None)
            install = f"pip install {lacks.partition('.')[0]}" if lacks else str(error)
            raise DynqError(f"{url}: {protocol}:// needs a package that is not installed; {install}") from None
        except ValueError as error:
            raise DynqError(f"{url}: not a URL that fsspec reads ({_reason(error)})") from None
    if protocol in ("file", "local") and not url.partition("://")[2].startswith("/"):
        raise DynqError(f"{url}: write the whole path, {protocol}:///...")
    return system, path


def _name(url: str) -> str:
    """What the model is called: the last part of the URL's path, or what stands before it where there is none."""
    protocol, _, rest = url.partition("://")
    if protocol in ("http", "https"):
        rest = rest.partition("?")[0]
    name = rest.rstrip("/").rpartition("/")[2]
    if protocol == "hf":
        name = name.partition("@")[0]  # the revision
    if not is_plain(name):
        raise DynqError(f"{url}: {name!r} is no name of a model's folder or file")
    return name


def _shards(path: str) -> dict[str, str]:
    """Name -> address of a GGUF file, or of all shards of a split one. What a web address asks for stays at its end."""
    plain, question, asked = path.partition("?") if path.startswith(("http://", "https://")) else (path, "", "")
    folder, slash, name = plain.rpartition("/")
    names = [file.name for file in shards.named(Path(name))]
    return {name: f"{folder}{slash}{name}{question}{asked}" for name in names}


def _directory(system: Any, url: str, path: str) -> dict[str, _File]:
    """The files of a Hugging Face directory, without what lies below it and what no model needs."""
    found: dict[str, str] = {}
    others = []
    for entry in system.ls(path, detail=True):
        folder, _, name = str(entry["name"]).rpartition("/")
        if entry["type"] != "file" or folder.strip("/") != path.strip("/"):
            continue
        if not any(fnmatchcase(name, pattern) for pattern in _WANTED) or fnmatchcase(name, _UNWANTED):
            others.append(name)
            continue
        if not is_plain(name):
            raise DynqError(f"{url}: {name!r} is no name of a file of a model")
        found[name] = entry["name"]
    if len(found) > _MOST:
        raise DynqError(f"{url}: {len(found):,} files, more than any model has")
    if "config.json" not in found or not any(name.endswith(".safetensors") for name in found):
        gguf = [name for name in others if name.endswith(".gguf")]
        hint = f"; name the file itself, {url.rstrip('/')}/{min(gguf)}" if gguf else ""
        if not hint and any(name.endswith(".bin") for name in others):
            hint = "; convert weights in PyTorch's format first (transformers: save_pretrained)"
        raise DynqError(f"{url}: no config.json with *.safetensors is there, which are what is read{hint}")
    return {name: _known(url, system.info(address)) for name, address in found.items()}


def _known(url: str, info: Mapping[str, Any]) -> _File:
    """What a file system says of a file. DynqError where that is no file of a known size."""
    size, address = info.get("size"), str(info["name"])
    if info.get("type") != "file" or type(size) is not int or size < 0:
        raise DynqError(f"{url}: {address} is no file, or does not say how large it is")
    tags = {re.sub("[-_]", "", key).lower(): value for key, value in info.items()}
    return _File(address, size, next((f"{key}={tags[key]}" for key in _TAGS if tags.get(key)), ""))


def _copy(system: Any, url: str, missing: Mapping[Path, _File]) -> None:
    """Copy files to their places. DynqError: no room, or one that is not as it was said to be."""
    if not missing:
        return
    folder = next(iter(missing)).parent
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob("*.partial"):  # of a process that was killed
        rest.unlink()
    needed, free = sum(file.size for file in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise DynqError(
            f"{url}: its copy needs {needed:,} bytes, {cache()} has room for {free:,}; make room there, "
            f"or set {CACHE} to a folder on a larger disk"
        )
    with progress(total=needed, desc=f"copy {_name(url)}", unit="B") as bar:
        done = 0
        for place, file in missing.items():
            with replacing(place, file.size) as beside:
                system.get_file(file.address, str(beside), callback=_counter(url, file, bar, done))
                if (size := beside.stat().st_size) != file.size:
                    raise DynqError(f"{url}: {file.address} came with {size:,} bytes of {file.size:,}; try again")
                system.invalidate_cache()
                if _known(url, system.info(file.address)) != file:
                    raise DynqError(f"{url}: {file.address} has changed while it was copied; run the command again")
            done += file.size
            bar.update(done - bar.n)


def _counter(url: str, file: _File, bar: Any, done: int) -> Any:
    """What a file system tells of the bytes of a file that it has copied. done: of the files before it."""
    from fsspec.callbacks import TqdmCallback  # of this kind, for the hub's file system then copies in parallel

    class Counter(TqdmCallback):
        def __init__(self) -> None:
            super().__init__()
            self.tqdm = bar

        def call(self, *_: Any, **__: Any) -> None:
            if self.value > file.size:
                raise DynqError(f"{url}: {file.address} is longer than the {file.size:,} bytes that it should have")
            bar.update(done + self.value - bar.n)

        def close(self) -> None:
            """The bar goes on with the next file."""

    return Counter()


@contextmanager
def _alone(place: Path, url: str) -> Iterator[None]:
    """Of processes that copy the same model one goes on, the others wait. A process that died has no lock."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("a")
    except OSError as error:
        raise DynqError(
            f"{url}: its copy cannot be kept in {cache()} ({error.strerror}); set {CACHE} to another folder"
        ) from None
    with lock as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{url}: another process copies it; waiting", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """DynqError for whatever a file system, its client or the network raises."""
    try:
        yield
    except DynqError:
        raise
    except FileNotFoundError:
        raise DynqError(f"{url}: nothing is there, or it is not reached; look at the address and the network") from None
    except Exception as error:
        raise DynqError(
            f"{url}: not read ({_reason(error)}); look at the address, the network and your credentials"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _hash(parts: Iterable[str]) -> str:
    """A name for what the parts say."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]
