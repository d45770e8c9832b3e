"""Importance to look at, in seconds: what notebooks show that do not need a calibrated run."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint
from dynq.folder import RunFolder
from dynq.imatrix import Importance, read_imatrix
from dynq.text import encode, prompts
from dynq.torch_model import load_model, load_tokenizer


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
