"""What a model says of a text, kept small: not its answers but what its head makes them of.

An answer is a number for every token of the vocabulary, 150,000 of them; the head reads a few thousand. So these are
kept, and a chunk's answers are computed when they are asked for, by one product of matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynq.checkpoint import Checkpoint
from dynq.evaluate import kld
from dynq.progress import progress


class Teacher:
    """A model's answers to tokens int ``[n_chunks, n_ctx]``, at every position that has a token behind it.

    Runs the model once, without its head. In memory: 4 bytes for each token and input of the head, on the model's
    device. Something that `kld.measure` compares with (`kld.Base`).
    """

    first, floor = 0, None

    def __init__(self, checkpoint: Checkpoint, model: Any, tokens: np.ndarray, desc: str):
        self.tokens = tokens
        self._head, self._after = model.get_output_embeddings(), checkpoint.architecture.logits
        chunks = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            self._read = [
                model.model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]
                for ids in (progress(chunks, desc=desc, unit="chunk") if desc else chunks)
            ]

    @property
    def n_vocab(self) -> int:
        return int(self._head.weight.shape[0])

    @torch.no_grad()
    def log_probs(self, chunk: int) -> torch.Tensor:
        """float32 ``[n_ctx - 1, n_vocab]``, on the model's device."""
        return kld.log_softmax(self._after(self._head(self._read[chunk])).float())

    def coded(self, chunk: int) -> kld.Coded:
        return kld.coded(kld.depth_of(self.log_probs(chunk)))
