"""A model taken apart: what comes before its decoder layers, each layer, what comes after them.

A model that is larger than memory is read layer by layer from its checkpoint, each time that a layer is called. Its
backward pass keeps on disk what each layer was given and computes the layer once more when its turn comes (Chen et al.
2016, "Training Deep Nets with Sublinear Memory Cost", with a segment for each layer), for all sequences before the next
layer is read: memory is two layers, of which one is just being read, and the activations of the sequences that are
computed at once, whatever the depth.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch

from dynq.checkpoint import Checkpoint
from dynq.progress import progress


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a transformers model."""
    return model.model.layers


_MMAP_THRESHOLD, _FROM = -3, 1 << 22  # glibc's number of that setting; bytes


class Reader:
    """Reads the weights of a layer when it is called, and lets go of those of the layer before.

    While a layer computes, a thread of its own reads the one that comes next, on a card into a stream of its own: there
    are at most two layers in memory.

    fill: puts a tensor of the checkpoint, by its GGUF name, into the model. device: where the layers are to be.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, fill: Callable[[str], None], device: str = "cpu"):
        self.checkpoint = checkpoint
        self.alone = Lock()
        self._fill = fill
        self._layers = list(decoder_layers(model))
        self._shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in self._layers]
        self._names: list[list[str]] = [[] for _ in self._layers]
        self._here = -1
        self._ahead: tuple[int, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "next layer")
        if sys.platform == "linux":
            # glibc keeps what is freed in pieces under 32 MiB, and layer by layer more of it: 600 MiB after ten
            with suppress(AttributeError):  # another C library
                ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _FROM)
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        for name in checkpoint.tensors:
            layer = checkpoint.tensors[name].layer
            if layer is not None:
                self._names[layer].append(name)
        for i, layer in enumerate(self._layers):
            self._let_go(i)
            then = (i + 1) % len(self._layers)
            layer.register_forward_pre_hook(lambda *_, i=i, then=then: self.load(i, then))
        model.layer_reader = self

    def load(self, i: int, then: int) -> None:
        """Have layer i in memory, and begin to read the layer `then` if there is one; no other stays.

        Nothing where i is there already.
        """
        if i == self._here:
            return
        before, self._here = self._here, -1
        ahead, reading = self._ahead or (-1, None)
        self._ahead = None
        if reading:
            reading.result()
        for old in {before, ahead} - {i, -1}:
            self._let_go(old)
        if ahead != i:
            self._follow()
            self._read(i)
        if self._stream:  # what computes waits for the copies
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._here = i
        if then != i and 0 <= then < len(self._layers):
            self._follow()
            self._ahead = then, self._thread.submit(self._read, then)

    def _follow(self) -> None:
        """Copies that follow wait for what was computed before: it may still read the memory that they get."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @torch.inference_mode(False)
    def _read(self, i: int) -> None:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for name, parameter in self._layers[i].named_parameters():
                parameter.data = torch.empty(self._shapes[i][name], dtype=parameter.dtype, device=parameter.device)
            for name in self._names[i]:
                self._fill(name)

    @torch.inference_mode(False)
    def _let_go(self, i: int) -> None:
        for parameter in self._layers[i].parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def reader(model: Any) -> Reader | None:
    """What reads the model's layers when they are called; None where they are all in memory."""
    return getattr(model, "layer_reader", None)


def alone(model: Any) -> AbstractContextManager[Any]:
    """A context for one thread at a time where layers are read one by one, all into one place; else for any number."""
    own = reader(model)
    return own.alone if own else nullcontext()


@dataclass
class Entered:
    """One batch at the first layer. hidden: ``[batch, n_ctx, width]``, with its graph. calls: what each layer is given
    besides: positions, masks."""

    hidden: torch.Tensor
    calls: list[tuple[tuple, dict[str, Any]]]


class _AtTheLast(Exception):
    pass


def enter(model: Any, ids: torch.Tensor) -> Entered:
    """Run what comes before the layers. ids: int64 ``[batch, n_ctx]``."""
    layers = decoder_layers(model)
    entered: list[Entered] = []

    def stands_in(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not entered:
            entered.append(Entered(hidden, []))
        entered[0].calls.append((args, kwargs))
        if len(entered[0].calls) == len(layers):
            raise _AtTheLast
        return hidden

    model.model.layers = torch.nn.ModuleList(_StandIn(layer, stands_in) for layer in layers)
    try:
        model(input_ids=ids, use_cache=False)
    except _AtTheLast:
        return entered[0]
    finally:
        model.model.layers = layers
    raise AssertionError("the model has not called its layers")


class _StandIn(torch.nn.Module):
    """Has a layer's attributes, which the model may look at, and not its forward pass."""

    def __init__(self, layer: Any, forward: Callable[..., torch.Tensor]):
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "forward", forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)


def leave(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, n_ctx, n_vocab]`` of what the last layer of a model with a `reader` gives."""
    logits: torch.Tensor = model.layer_reader.checkpoint.architecture.logits(model.lm_head(model.model.norm(hidden)))
    return logits


@torch.no_grad()
def through(model: Any, tokens: np.ndarray, desc: str = "") -> list[torch.Tensor]:
    """What the last layer of a model with a `reader` gives for each chunk of int32 ``[n_chunks, n_ctx]``: all chunks
    through a layer, then the next. float32 ``[1, n_ctx, width]`` each; desc: of a progress bar, none without."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    entered = [enter(model, ids[i : i + 1]) for i in range(len(ids))]
    hidden = [one.hidden for one in entered]
    layers = decoder_layers(model)
    for i in progress(range(len(layers)), desc=desc, unit="layer") if desc else range(len(layers)):
        model.layer_reader.load(i, i + 1)
        for chunk, one in enumerate(entered):
            args, kwargs = one.calls[i]
            hidden[chunk] = layers[i](hidden[chunk], *args, **kwargs)
    return hidden
