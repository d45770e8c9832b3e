"""The model in transformers, filled from a checkpoint's tensors: for calibration and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import transformers
from transformers.initialization import no_init_weights

from dynq import memory, tokenizer
from dynq.checkpoint import Checkpoint
from dynq.devices import AUTO, CPU, check_device, has_bfloat16
from dynq.errors import DynqError
from dynq.layerwise import Reader, reader
from dynq.progress import progress
from dynq.spread import put, spread
from dynq.threads import first_calls


def load_model(
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, np.ndarray]] | None = None,
    dtype: str = "float32",
    *,
    device: str = CPU,
    streamed: bool | None = None,
    read: Callable[[str], np.ndarray] | None = None,
) -> Any:
    """The transformers model of a checkpoint, in eval mode.

    Args:
        checkpoint: where the config comes from, and the weights if none are given.
        weights: pairs (GGUF name, float32 array in GGUF's layout) instead of the checkpoint's own. They may come in
            any order but must fill the whole model.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", a card ("cuda", "cuda:1"), or "auto": a card, or all of them where only they take the model.
        streamed: whether each decoder layer is read when it is called, see `dynq.layerwise`; by default where the
            model does not fit into the memory of the device.
        read: gives a tensor by its GGUF name, instead of `checkpoint.read`.

    Raises:
        DynqError: a weight is missing or has the wrong shape; streamed layers that are not apart.
    """
    if not checkpoint.architecture.known:
        raise DynqError(
            f"{checkpoint.path}: dynq does not know the architecture {checkpoint.architecture.name!r} and cannot run "
            "it; `dynq run` quantizes it by estimates, and measures the result in llama.cpp"
        )
    # null is a value: without "sliding_window": null Mistral's would be 4096
    settings = checkpoint.config | {"tie_word_embeddings": checkpoint.tied}
    config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    # sdpa has no soft cap; None is sdpa where the model can use it
    attention = "eager" if settings.get("attn_logit_softcapping") else None
    check_device(device)
    _check_size(checkpoint, config)
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
        )
    model.set_experts_implementation("eager")  # a product for each expert, which `dynq.recorder` knows
    model.tie_weights()
    checkpoint.architecture.complete(model)
    names, read = list(checkpoint.tensors), read or checkpoint.read
    places = memory.places(checkpoint, device, dtype)
    if streamed is None:
        streamed = weights is None and len(places) == 1 and not memory.fits(checkpoint, places[0], dtype)
    first_calls()
    if streamed:
        if not checkpoint.architecture.layers_apart:
            raise DynqError(f"{checkpoint.name}: its layers depend on each other, it must fit into memory as a whole")
        # what was allocated above was never written to, so it has taken no memory
        Reader(model, checkpoint, lambda name: set_tensor(model, checkpoint, name, read(name)), places[0])
        names = [name for name in names if checkpoint.tensors[name].layer is None]
    if len(places) > 1 and not streamed:
        spread(model, places)
    elif places[0] != CPU:
        put(model, places[0])
    if places[0] != CPU:
        torch.backends.cudnn.allow_tf32 = False  # as it is for products: see `dynq.devices`
    if weights is None:
        weights = ((name, read(name)) for name in names)
    filled = set()
    for name, array in progress(weights, total=len(names), desc="load", unit="tensor", leave=False):
        set_tensor(model, checkpoint, name, array)
        filled.add(checkpoint.architecture.parameter(name))
    missing = [name for name, p in model.named_parameters() if name not in filled and p.numel()]
    if missing:
        raise DynqError(f"{checkpoint.path}: no weights for {missing[0]} and {len(missing) - 1} more parameters")
    return model.eval()


def _check_size(checkpoint: Checkpoint, config: Any) -> None:
    """DynqError where the config describes another size than the checkpoint has, before memory is taken for it."""
    with torch.device("meta"), no_init_weights():
        described = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    n = sum(parameter.numel() for parameter in described.parameters())
    if n > 2 * checkpoint.n_weights:  # a tied head counts twice
        raise DynqError(
            f"{checkpoint.path}: config.json describes a model of {n:,} weights, its tensors hold "
            f"{checkpoint.n_weights:,}; fetch it again"
        )


def device_of(model: Any) -> str:
    """Where another model of this kind is to be loaded: as `load_model` takes it."""
    return AUTO if hasattr(model, "spread_over") else str(model.device)


def rounded(model: Any) -> Any:
    """A model that writes text: a copy in bfloat16 on a processor that has it and memory for it, else the model itself.

    A step of sampling takes half to two thirds of the time. Weights of most models are bfloat16 anyway; what the rest
    changes of a probability is little beside what sampling is for.
    """
    here = model.device.type == CPU and model.dtype == torch.float32 and has_bfloat16()
    if not here or not memory.takes_copy(sum(p.numel() for p in model.parameters()), memory.available()):
        return model
    held = {p: p.to(torch.bfloat16) for p in model.parameters()}
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(value, requires_grad=False) for p, value in held.items()})


def check_in_memory(model: Any, what: str) -> None:
    """DynqError where the layers of a model are read one by one and `what` would read all of them over and over."""
    if reader(model):
        limit = f"in memory, which the model does not fit into ({memory.available(device_of(model)) / 2**30:.1f} GiB)"
        raise DynqError(f"{what} needs the model {limit}; leave it out, or take a larger machine")


def set_tensor(model: Any, checkpoint: Checkpoint, gguf_name: str, array: np.ndarray) -> None:
    """Copy one tensor (float32, GGUF's layout) into the model in place. Tied weights follow.

    Raises:
        DynqError: the model has no such parameter, or one of another shape.
    """
    slot = checkpoint.architecture.slot_of(gguf_name)
    module, _, leaf = slot.parameter.rpartition(".")
    try:
        target = getattr(model.get_submodule(module), leaf)
    except AttributeError:
        target = None
    if target is None:
        raise DynqError(f"tensor {gguf_name}: config.json describes a model without {slot.parameter}")
    wanted = slot.shape(tuple(target.shape))
    if _counted(wanted) != _counted(array.shape):
        raise DynqError(f"tensor {gguf_name}: shape {array.shape}, but config.json implies {wanted}")
    values = checkpoint.architecture.to_torch(gguf_name, array)
    held = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if target.is_cuda:
        held = held.pin_memory().to(target.device, non_blocking=True)
    with torch.no_grad():
        slot.put(target, held)


def _counted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions that ggml counts: some converters write a matrix of one row as a vector."""
    return _counted(shape[1:]) if shape[:1] == (1,) and len(shape) > 1 else shape


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer: the directory's tokenizer.json, or one rebuilt from the GGUF metadata."""
    if (checkpoint.path / "tokenizer.json").is_file():
        try:
            # False and not None, which would ask on the terminal whether to run what a checkpoint brings along
            return transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
        except Exception as error:  # its own, the tokenizers library's and Python's errors
            raise DynqError(f"{checkpoint.path}: transformers does not open its tokenizer: {error}") from error
    return tokenizer.from_gguf(checkpoint.metadata)
