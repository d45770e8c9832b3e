"""Calibration: text through the model, importance and Fisher samples out.

Importance is llama.cpp's: for every linear layer the sum over tokens of x_j^2 for each input channel j (tools/imatrix
of llama.cpp), written as ``imatrix.gguf``. The head is collected too, as ``llama-imatrix --process-output`` does; in a
tied model it stands under ``token_embd.weight``, because that is the tensor that multiplies.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.fisher import Fisher, batch_samples, true_fisher_backward
from dynq.folder import RunFolder
from dynq.imatrix import Importance, read_imatrix, write_imatrix
from dynq.progress import progress
from dynq.recorder import HEAD, Recorder
from dynq.text import encode, prompts
from dynq.torch_model import load_model, load_tokenizer


def calibrate(
    checkpoint: Checkpoint,
    model: Any,
    tokens: np.ndarray,
    folder: Path,
    *,
    seed: int = 0,
    batch: int = 4,
    keep: int = 1024,
    source: str = "",
) -> Importance:
    """Write ``fisher/*.safetensors`` and ``imatrix.gguf`` into the run folder; return the importance.

    tokens: int32 ``[n_chunks, n_ctx]``; model: the float32 transformers model of the checkpoint; batch: sequences that
    go through it at once; keep: Fisher samples per layer over all batches; source: said in the imatrix as its data
    set. Batches that are there already are not computed again, so an interrupted calibration goes on where it stopped:
    the caller clears ``fisher/`` when the inputs have changed.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DynqError(f"calibration text of shape {tokens.shape}: need [chunks, tokens per chunk >= 2]")
    fisher = folder / "fisher"
    fisher.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(model, checkpoint)
    if any(parameter.ndim == 3 for parameter in recorder.units.values()):
        batch = 1  # an expert's tokens do not tell which sequence they are of
    starts = range(0, len(tokens), batch)
    todo = [(i, start) for i, start in enumerate(starts) if not (fisher / f"{i:05d}.safetensors").exists()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for i, start in progress(todo, desc="calibrate", unit="batch"):
        recorder.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        ids = torch.from_numpy(tokens[start : start + batch].astype(np.int64)).to(model.device)
        with recorder:
            log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        true_fisher_backward(log_p, generator)
        share = -(-keep * len(ids) // len(tokens))
        samples, groups = batch_samples(recorder, len(ids), share, generator)
        batch_of = {
            "tokens": ids.numel(),
            "groups": groups,
            "tensors": recorder.tensors,
            "shapes": {unit: list(parameter.shape) for unit, parameter in recorder.units.items()},
            "flipped": sorted(recorder.flipped),
        }
        with replacing(fisher / f"{i:05d}.safetensors") as beside:
            # one key: safetensors writes several in an order that changes from run to run
            save_file(samples, beside, {"batch": json.dumps(batch_of)})
    recorder.clear()
    importance = _importance(checkpoint, Fisher(fisher), tokens, source)
    write_imatrix(folder / "imatrix.gguf", importance)
    return importance


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
