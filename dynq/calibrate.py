"""Calibration: text through the model, importance and Fisher samples out.

Importance is llama.cpp's: for every linear layer the sum over tokens of x_j^2 for each input channel j (tools/imatrix
of llama.cpp), written as ``imatrix.gguf``. The head is collected too, as ``llama-imatrix --process-output`` does; in a
tied model it stands under ``token_embd.weight``, because that is the tensor that multiplies.

Each sequence is computed by one thread, several side by side, and is written by itself; sums run over sequences in
their order. So the result is the same bytes whatever the number of threads, or of the workers of a cluster, and whether
the model is in memory or read layer by layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dynq import layerwise
from dynq.checkpoint import Checkpoint
from dynq.cluster import held, runs, tasks, threads_here
from dynq.errors import DynqError
from dynq.files import disk_array, replacing
from dynq.fisher import Fisher, sequence_samples, true_fisher_backward
from dynq.folder import RunFolder
from dynq.imatrix import Importance, read_imatrix, write_imatrix
from dynq.progress import progress
from dynq.recorder import HEAD, Recorder
from dynq.text import encode, prompts
from dynq.threads import each, one_thread_each
from dynq.torch_model import load_model, load_tokenizer

if TYPE_CHECKING:
    from distributed import Client

ON_CARD = 2
"""Sequences at once on a graphics card: it computes one while the other's samples are drawn and written."""


def calibrate(
    checkpoint: Checkpoint,
    model: Any,
    tokens: np.ndarray,
    folder: Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    keep: int = 1024,
    source: str = "",
    cluster: Client | None = None,
) -> Importance:
    """Write ``fisher/*.safetensors`` and ``imatrix.gguf`` into the run folder; return the importance.

    tokens: int32 ``[n_chunks, n_ctx]``; model: the transformers model of the checkpoint, in float32 or bfloat16;
    threads: sequences that are computed at once on a CPU; keep: Fisher samples per layer over all sequences; source:
    said in the imatrix as its data set; cluster: whose workers take a sequence each, in a model of their own on the
    CPU, and write it beside ``fisher/``. Sequences that are there already are not computed again, so an interrupted
    calibration goes on where it stopped: the caller clears ``fisher/`` when the inputs have changed.

    A model whose layers are read one by one (`layerwise.reader`) is computed layer by layer, all sequences in each, the
    same bytes in the end; cut off, it begins anew. Workers that read it so take a run of consecutive sequences each, of
    which all are there when the last one is.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DynqError(f"calibration text of shape {tokens.shape}: need [chunks, tokens per chunk >= 2]")
    fisher = folder / "fisher"
    fisher.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    job = _Job(checkpoint, model, tokens, fisher, seed, -(-keep // len(tokens)))
    todo, reader = job.todo(), layerwise.reader(model)
    with _aside(folder) as aside, one_thread_each(threads if model.device.type == "cpu" else ON_CARD) as workers:
        if cluster:
            _by_workers(job, todo, cluster, aside)
        elif reader:
            _layer_by_layer(job, reader, workers, todo, aside, "calibrate layer by layer")
        else:
            _at_once(job, workers, todo)
    importance = _importance(checkpoint, Fisher(fisher), tokens, source)
    write_imatrix(folder / "imatrix.gguf", importance)
    return importance


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder for what is not whole yet, without what a calibration that was killed has left in it."""
    aside = folder / "fisher.parts"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # Windows keeps an open memory map; a worker may still write


@dataclass(frozen=True)
class _Job:
    """What a calibration computes with: `share` Fisher samples per layer of each sequence, written to `fisher`."""

    checkpoint: Checkpoint
    model: Any
    tokens: np.ndarray
    fisher: Path
    seed: int
    share: int

    def ids(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens[i : i + 1].astype(np.int64)).to(self.model.device)

    def recorder(self) -> Recorder:
        return Recorder(self.model, self.checkpoint)

    def backward(self, i: int, logits: torch.Tensor) -> None:
        """The backward pass of sequence i from its logits, with labels that are its own."""
        log_p = torch.log_softmax(logits.float(), dim=-1)
        true_fisher_backward(log_p, torch.Generator().manual_seed(self.seed * 1_000_003 + i))

    def save(self, i: int, recorder: Recorder, path: Path | None = None) -> list[str]:
        """Write the samples of what was recorded of sequence i, to its file or as a part of it; the units in it."""
        units = recorder.used
        samples, groups = sequence_samples(recorder, self.share, self.seed * 1_000_003 + i)
        about = {
            "tokens": self.tokens.shape[1] if HEAD in units else 0,
            "groups": groups,
            "tensors": {name: unit for name, unit in recorder.tensors.items() if unit in units},
            "shapes": {unit: list(recorder.units[unit].shape) for unit in units},
            "flipped": sorted(recorder.flipped),
        }
        _write(path or self.file(i), samples, about)
        return units

    def join(self, i: int, parts: Sequence[Path]) -> None:
        """Write the file of sequence i, whose parts these are; they are gone then."""
        samples: dict[str, torch.Tensor] = {}
        abouts = []
        for part in parts:
            with safe_open(part, framework="pt") as file:
                abouts.append(json.loads(file.metadata()["about"]))
                samples |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        about: dict[str, Any] = {"tokens": sum(one["tokens"] for one in abouts)}
        about |= {key: {k: v for one in abouts for k, v in one[key].items()} for key in ("groups", "tensors", "shapes")}
        about["flipped"] = sorted({unit for one in abouts for unit in one["flipped"]})
        _write(self.file(i), samples, about)
        samples.clear()  # Windows removes no file that is mapped
        for part in parts:
            part.unlink()

    def file(self, i: int) -> Path:
        return self.fisher / f"{i:05d}.safetensors"

    def todo(self) -> list[int]:
        return [i for i in range(len(self.tokens)) if not self.file(i).exists()]

    def record(self, i: int) -> Recorder:
        """Both passes of sequence i through the whole model."""
        recorder = self.recorder()
        with recorder:
            logits = self.model(input_ids=self.ids(i), use_cache=False).logits
        self.backward(i, logits)
        recorder.check_used(recorder.used)
        return recorder


def _write(path: Path, samples: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    with replacing(path) as beside:
        # one key: safetensors writes several in an order that changes from run to run
        save_file(samples, beside, {"about": json.dumps(about, sort_keys=True)})


def _at_once(job: _Job, workers: ThreadPoolExecutor, todo: Sequence[int]) -> None:
    def one(i: int) -> None:
        job.save(i, job.record(i))

    with progress(total=len(todo), desc="calibrate", unit="sequence") as bar:
        each(workers, one, todo, bar)


def _by_workers(job: _Job, todo: Sequence[int], cluster: Client, aside: Path) -> None:
    shares = [todo[run.start : run.stop] for run in runs(cluster, job.checkpoint, range(len(todo)), 1)]
    there = partial(_written_there, replace(job, model=None), aside.resolve())
    done = tasks(there, shares, cluster, total=len(shares), desc="calibrate", unit="run")
    for share, name in zip(shares, done, strict=True):
        for i in share:
            replace(job, fisher=aside / name).file(i).replace(job.file(i))


def _written_there(job: _Job, aside: Path, share: Sequence[int]) -> str:
    """On a worker: write the files of some sequences into a new folder beside; its name."""
    model = held(("calibrate", job.checkpoint), lambda: load_model(job.checkpoint).requires_grad_(False))
    try:
        own = Path(mkdtemp(dir=aside))
    except OSError as error:
        raise DynqError(f"{aside}: cannot be written to ({error.strerror}); workers share the run folder") from None
    job, reader = replace(job, model=model, fisher=own), layerwise.reader(model)
    with layerwise.alone(model):
        if reader:
            with one_thread_each(threads_here()) as workers:
                _layer_by_layer(job, reader, workers, share, own, "")
        else:
            for i in share:
                job.save(i, job.record(i))
    return own.name


def _layer_by_layer(
    job: _Job, reader: layerwise.Reader, workers: ThreadPoolExecutor, todo: Sequence[int], aside: Path, desc: str
) -> None:
    """Sequences through a layer, all of them, then the next layer; what each is given, later its gradient, is kept on
    disk, and so are the samples of each layer."""
    if not todo:
        return
    model, everyone = job.model, range(len(todo))
    layers = layerwise.decoder_layers(model)
    recorders = [job.recorder() for _ in everyone]  # of the embedding
    entered = []
    for at, i in enumerate(todo):
        with recorders[at]:
            entered.append(layerwise.enter(model, job.ids(i)))
    shape = entered[0].hidden.shape[1:]
    with TemporaryDirectory(dir=aside, ignore_cleanup_errors=True) as beside:
        kept = disk_array(Path(beside) / "hidden.f32", np.float32, (len(layers) + 1, len(everyone), *shape))
        parts: list[list[Path]] = [[] for _ in everyone]
        used: set[str] = set()

        def read(layer: int, at: int) -> torch.Tensor:
            return torch.from_numpy(np.array(kept[layer, at])[None]).to(model.device, model.dtype)

        def write(layer: int, at: int, values: torch.Tensor | None) -> None:
            assert values is not None  # a gradient is there once the backward pass has run
            kept[layer, at] = values.detach().float().cpu().numpy()[0]

        def save(at: int, recorder: Recorder) -> None:
            parts[at].append(Path(beside) / f"{at:05d}.{len(parts[at]):05d}.safetensors")
            used.update(job.save(todo[at], recorder, parts[at][-1]))

        def forward(layer: int) -> Callable[[int], None]:
            def one(at: int) -> None:
                args, kwargs = entered[at].calls[layer]
                with torch.no_grad():
                    write(layer + 1, at, layers[layer](read(layer, at), *args, **kwargs))

            return one

        def head(at: int) -> None:
            recorder, hidden = job.recorder(), read(len(layers), at).requires_grad_()
            with recorder:
                logits = layerwise.leave(model, hidden)
            job.backward(todo[at], logits)
            write(len(layers), at, hidden.grad)
            save(at, recorder)

        def backward(layer: int) -> Callable[[int], None]:
            def one(at: int) -> None:
                args, kwargs = entered[at].calls[layer]
                recorder, hidden = job.recorder(), read(layer, at).requires_grad_()
                with recorder:
                    out = layers[layer](hidden, *args, **kwargs)
                out.backward(read(layer + 1, at))
                write(layer, at, hidden.grad)
                save(at, recorder)

            return one

        for at in everyone:
            write(0, at, entered[at].hidden)
        steps = (2 * len(layers) + 1) * len(everyone)
        with progress(total=steps, desc=desc, unit="step") if desc else nullcontext() as bar:
            last = len(layers) - 1
            for layer in range(len(layers)):
                reader.load(layer, layer + 1 if layer < last else last - 1)
                each(workers, forward(layer), everyone, bar)
            each(workers, head, everyone, bar)
            for layer in reversed(range(len(layers))):
                reader.load(layer, layer - 1)
                each(workers, backward(layer), everyone, bar)
        for at in everyone:
            entered[at].hidden.backward(read(0, at))
            save(at, recorders[at])
        recorders[0].check_used(used)
        for at, i in enumerate(todo):
            job.join(i, parts[at])


def importance_to_look_at(
    checkpoint: Checkpoint, run: str | Path = "", *, chunks: int = 4, n_ctx: int = 128
) -> Importance:
    """The importance of a run folder where there is one of this model, else from a few hundred tokens, in seconds.

    Enough to see what importance does, not to encode a file with: the text is the prompts that come with dynq.
    DynqError: the run's importance matrix is that of another model.
    """
    file = RunFolder(run) / "imatrix.gguf"
    if run and file.is_file():
        importance = read_imatrix(file)
        importance.check_model(checkpoint.tensors, str(file))
        return importance
    text = "\n\n".join(turn["content"] for conversation in prompts("calibrate") for turn in conversation)
    tokens = np.array(encode(load_tokenizer(checkpoint), text)[: chunks * n_ctx], np.int32).reshape(chunks, n_ctx)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps an open memory map
        return calibrate(checkpoint, load_model(checkpoint), tokens, Path(folder), keep=chunks, source="prompts")


def _importance(checkpoint: Checkpoint, fisher: Fisher, tokens: np.ndarray, source: str) -> Importance:
    sums, counts = {}, {}
    for name in fisher.unit:
        tensor = "token_embd.weight" if name == HEAD and checkpoint.tied else name
        found = fisher.in_sum2(name)
        if found is None:
            continue  # an embedding has no inputs; llama-imatrix leaves it out too
        if name != HEAD:
            unit = fisher.unit[name]
            columns = checkpoint.architecture.slot_of(name).columns(fisher.shapes[unit], unit in fisher.flipped)
            if columns is None:
                continue
            found = found[0][:, columns], found[1]
        sums[tensor], counts[tensor] = found[0].astype(np.float32), found[1].astype(np.float32)
    return Importance(
        sums={n: sums[n] for n in checkpoint.tensors if n in sums},
        counts={n: counts[n] for n in checkpoint.tensors if n in counts},
        datasets=[source] if source else [],
        chunk_count=len(tokens),
        chunk_size=tokens.shape[1],
    )
