"""Calibration: text through the model, importance and Fisher samples out.

Importance is llama.cpp's: for every linear layer the sum over tokens of x_j^2 for each input channel j (tools/imatrix
of llama.cpp), written as ``imatrix.gguf``. The head is collected too, as ``llama-imatrix --process-output`` does; in a
tied model it stands under ``token_embd.weight``, because that is the tensor that multiplies.

Each sequence is computed by one thread, several side by side, and is written by itself; sums run over sequences in
their order. So the result is the same bytes whatever the number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save, save_file

from dynq import layerwise
from dynq.checkpoint import Checkpoint
from dynq.cluster import held, tasks
from dynq.errors import DynqError
from dynq.files import disk_array, replacing
from dynq.fisher import Fisher, sequence_samples, true_fisher_backward
from dynq.folder import RunFolder
from dynq.imatrix import Importance, read_imatrix, write_imatrix
from dynq.progress import progress
from dynq.recorder import HEAD, Recorder
from dynq.text import encode, prompts
from dynq.threads import each, one_thread_each
from dynq.torch_model import check_in_memory, load_model, load_tokenizer

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
    CPU. Sequences that are there already are not computed again, so an interrupted calibration goes on where it
    stopped: the caller clears ``fisher/`` when the inputs have changed.

    A model whose layers are read one by one (`layerwise.reader`) is computed layer by layer: a part of ``fisher/`` for
    each sequence and layer, the same samples in all. Cut off, it begins anew. No cluster helps with that.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DynqError(f"calibration text of shape {tokens.shape}: need [chunks, tokens per chunk >= 2]")
    fisher = folder / "fisher"
    fisher.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    job = _Job(checkpoint, model, tokens, fisher, seed, -(-keep // len(tokens)))
    reader = layerwise.reader(model)
    with one_thread_each(threads if model.device.type == "cpu" else ON_CARD) as workers:
        if reader:
            _layer_by_layer(job, reader, workers, folder)
        elif cluster:
            _by_workers(job, cluster)
        else:
            _at_once(job, workers)
    importance = _importance(checkpoint, Fisher(fisher), tokens, source)
    write_imatrix(folder / "imatrix.gguf", importance)
    return importance


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

    def samples(self, i: int, recorder: Recorder) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The samples of what was recorded of sequence i, and the metadata of their file."""
        units = recorder.used
        samples, groups = sequence_samples(recorder, self.share, self.seed * 1_000_003 + i)
        about = {
            "tokens": self.tokens.shape[1] if HEAD in units else 0,
            "groups": {first: groups[first] for first in sorted(groups)},
            "tensors": {name: unit for name, unit in recorder.tensors.items() if unit in units},
            "shapes": {unit: list(recorder.units[unit].shape) for unit in units},
            "flipped": sorted(recorder.flipped),
        }
        # one key: safetensors writes several in an order that changes from run to run
        return samples, {"about": json.dumps(about)}

    def file(self, i: int, part: str = "") -> Path:
        return self.fisher / f"{i:05d}{part}.safetensors"

    def save(self, i: int, recorder: Recorder, part: str = "") -> list[str]:
        """Write the samples of what was recorded of sequence i; the units that these are."""
        samples, about = self.samples(i, recorder)
        with replacing(self.file(i, part)) as beside:
            save_file(samples, beside, about)
        return recorder.used

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


def _at_once(job: _Job, workers: ThreadPoolExecutor) -> None:
    def one(i: int) -> None:
        job.save(i, job.record(i))

    todo = job.todo()
    with progress(total=len(todo), desc="calibrate", unit="sequence") as bar:
        each(workers, one, todo, bar)


def _by_workers(job: _Job, cluster: Client) -> None:
    todo = job.todo()
    there = partial(_sequence_there, replace(job, model=None))
    for i, data in zip(
        todo, tasks(there, todo, cluster, total=len(todo), desc="calibrate", unit="sequence"), strict=True
    ):
        with replacing(job.file(i)) as beside:
            beside.write_bytes(data)


def _sequence_there(job: _Job, i: int) -> bytes:
    """On a worker: the file of sequence i."""

    def load() -> Any:
        model = load_model(job.checkpoint)
        check_in_memory(model, "calibration by the workers of a cluster")
        return model.requires_grad_(False)

    job = replace(job, model=held(("calibrate", job.checkpoint), load))
    samples, about = job.samples(i, job.record(i))
    return save(samples, about)


def _layer_by_layer(job: _Job, reader: layerwise.Reader, workers: ThreadPoolExecutor, folder: Path) -> None:
    """All sequences through a layer, then the next layer; what each is given, later its gradient, is kept on disk."""
    model, everyone = job.model, range(len(job.tokens))
    layers = layerwise.decoder_layers(model)
    recorders = [job.recorder() for _ in everyone]  # of the embedding
    entered = []
    for i in everyone:
        with recorders[i]:
            entered.append(layerwise.enter(model, job.ids(i)))
    shape = entered[0].hidden.shape[1:]
    with TemporaryDirectory(dir=folder, prefix="layers-", ignore_cleanup_errors=True) as beside:
        kept = disk_array(Path(beside) / "hidden.f32", np.float32, (len(layers) + 1, len(everyone), *shape))

        def read(layer: int, i: int) -> torch.Tensor:
            return torch.from_numpy(np.array(kept[layer, i])[None]).to(model.device, model.dtype)

        def write(layer: int, i: int, values: torch.Tensor | None) -> None:
            assert values is not None  # a gradient is there once the backward pass has run
            kept[layer, i] = values.detach().float().cpu().numpy()[0]

        def forward(layer: int) -> Callable[[int], None]:
            def one(i: int) -> None:
                args, kwargs = entered[i].calls[layer]
                with torch.no_grad():
                    write(layer + 1, i, layers[layer](read(layer, i), *args, **kwargs))

            return one

        used: set[str] = set()

        def head(i: int) -> None:
            recorder, hidden = job.recorder(), read(len(layers), i).requires_grad_()
            with recorder:
                logits = layerwise.leave(model, hidden)
            job.backward(i, logits)
            write(len(layers), i, hidden.grad)
            used.update(job.save(i, recorder, ".head"))

        def backward(layer: int) -> Callable[[int], None]:
            def one(i: int) -> None:
                args, kwargs = entered[i].calls[layer]
                recorder, hidden = job.recorder(), read(layer, i).requires_grad_()
                with recorder:
                    out = layers[layer](hidden, *args, **kwargs)
                out.backward(read(layer + 1, i))
                write(layer, i, hidden.grad)
                used.update(job.save(i, recorder, f".{layer:05d}"))

            return one

        for i in everyone:
            write(0, i, entered[i].hidden)
        steps = (2 * len(layers) + 1) * len(everyone)
        with progress(total=steps, desc="calibrate layer by layer", unit="step") as bar:
            last = len(layers) - 1
            for layer in range(len(layers)):
                reader.load(layer, layer + 1 if layer < last else last - 1)
                each(workers, forward(layer), everyone, bar)
            each(workers, head, everyone, bar)
            for layer in reversed(range(len(layers))):
                reader.load(layer, layer - 1)
                each(workers, backward(layer), everyone, bar)
        for i in everyone:
            entered[i].hidden.backward(read(0, i))
            used.update(job.save(i, recorders[i], ".embedding"))
        recorders[0].check_used(used)


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
