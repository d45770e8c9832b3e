"""Models behind URLs: servers of them for tests, and what a copy must be."""

import contextlib
import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynq import remote
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.folder import content_hash


def refuses(url: str, *said: str) -> None:
    """The URL is refused in one line that says this, and no copy of a file is left."""
    with pytest.raises(DynqError) as caught:
        open_checkpoint(url)
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert message.startswith(url) and "\n" not in message
    assert not [file for file in remote.cache().rglob("files/*") if file.suffix]


def same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.name == other.name and one.metadata == other.metadata and one.tensors == other.tensors
    assert one.fingerprint == other.fingerprint
    for name in one.tensors:
        assert np.array_equal(one.read(name), other.read(name))


def edit(file: Path, data: bytes, later: int = 5) -> None:
    """Write a file anew, so many seconds after it was written."""
    time = file.stat().st_mtime + later
    file.write_bytes(data)
    os.utime(file, (time, time))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Hub(Quiet):
    """As much of the hub as its client asks for, of one model: what it is, what lies in it, its files."""

    def do_GET(self) -> None:
        if self.path.startswith("/owner/name/resolve/main/"):
            self.path = self.path.removeprefix("/owner/name/resolve/main")
            super().do_GET()
            return
        said: Any = {"error": "none"}
        if self.path.startswith("/api/models/owner/name/tree/main"):
            files = [p for p in Path(self.directory).iterdir() if p.is_file()]
            said = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": content_hash(p)} for p in files]
        elif self.path.startswith("/api/models/owner/name"):
            said = {"id": "owner/name", "siblings": []}
        data = json.dumps(said).encode()
        self.send_response(404 if said == {"error": "none"} else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served(folder: Path, kind: type[Quiet] = Quiet) -> Iterator[str]:
    """A web server of a folder; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
