"""The original that files are measured against: its model, its text, its log-probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld, precision
from dynq.evaluate.kept import digest
from dynq.folder import RunFolder, content_hash
from dynq.text import labels, load_text, text_files
from dynq.torch_model import load_model, load_tokenizer

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Text:
    """What is read: tokens int32 ``[n_chunks, n_ctx]``, domain after domain, and how many chunks each domain has."""

    description: str
    sha256: str
    tokens: np.ndarray
    domains: dict[str, int]

    def domain(self, chunk: int) -> str:
        """The domain that a chunk belongs to."""
        ends = np.cumsum(list(self.domains.values()))
        return list(self.domains)[int(np.searchsorted(ends, chunk, side="right"))]


class Original:
    """The original model: its text and its log-probabilities, made when they are first needed.

    device: where it runs. cluster: whose workers compute the log-probabilities.
    """

    def __init__(self, checkpoint: Checkpoint, folder: RunFolder, device: str = "cpu", cluster: Client | None = None):
        self.checkpoint = checkpoint
        self.folder = folder
        self.device = device
        self._cluster = cluster

    @cached_property
    def model(self) -> Any:
        return load_model(self.checkpoint, device=self.device)

    def text(self, spec: str, *, n_ctx: int, n_chunks: int, seed: int) -> Text:
        """Chunks of each text file, kept as ``text.json``. DynqError where one does not fill a single chunk."""
        files = text_files(spec)
        if missing := [path for path in files if not path.is_file()]:
            raise DynqError(f"{missing[0]}: no such file (--text)")
        about = [self.checkpoint.fingerprint, n_ctx, n_chunks, seed, *((p.name, content_hash(p)) for p in files)]
        key = digest(about)
        if (self.folder / "text.json").exists():
            kept = self.folder.read_json("text.json")
            if kept["key"] == key:
                return Text(kept["description"], kept["sha256"], np.array(kept["tokens"], np.int32), kept["domains"])
        tokens_of = load_tokenizer(self.checkpoint)
        names = dict(zip(files, labels(files), strict=True)) if files else {"": "sampled"}
        parts = {
            name: load_text(
                str(file),
                tokens_of,
                n_ctx=n_ctx,
                n_chunks=n_chunks,
                seed=seed,
                model=None if files else self.model,
                split="evaluate",
            )
            for file, name in names.items()
        }
        tokens = np.concatenate([part.tokens for part in parts.values()])
        text = Text(
            "; ".join(part.description for part in parts.values()),
            hashlib.sha256(repr(tokens.shape).encode() + tokens.astype("<i4").tobytes()).hexdigest(),
            tokens,
            {name: len(part.tokens) for name, part in parts.items()},
        )
        self.folder.write_json(
            "text.json",
            {
                "key": key,
                "description": text.description,
                "sha256": text.sha256,
                "domains": text.domains,
                "tokens": tokens.tolist(),
            },
        )
        return text

    def reference(self, text: Text) -> kld.Reference:
        """The original's log-probabilities on the text; those of another text or model give way to them."""
        name = f"reference-{digest([self.checkpoint.fingerprint, text.sha256])}"
        path = self.folder / name
        if path.with_suffix(".json").exists() and path.with_suffix(".u16").exists():
            return kld.open_reference(path)
        for old in self.folder.path.glob("reference-*"):
            old.unlink()  # vocabulary x tokens x 2 bytes: by far the largest files here
        if self._cluster:
            return precision.reference_by_workers(self._cluster, self.checkpoint, text.tokens, path)
        return kld.make_reference(self.model, text.tokens, path, desc="original")

    def release(self) -> None:
        """Give the model's memory back, before another one is loaded."""
        self.__dict__.pop("model", None)
