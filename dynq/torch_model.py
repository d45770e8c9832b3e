"""The model in transformers, filled from a checkpoint's tensors: for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers
from transformers.initialization import no_init_weights

from dynq import tokenizer
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.layerwise import Reader
from dynq.progress import progress


def load_model(
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, np.ndarray]] | None = None,
    dtype: str = "float32",
    *,
    streamed: bool = False,
) -> Any:
    """The transformers model of a checkpoint, in eval mode, on the CPU.

    Args:
        checkpoint: where the config comes from, and the weights if none are given.
        weights: pairs (GGUF name, float32 array in GGUF's layout) instead of the checkpoint's own. They may come in
            any order but must fill the whole model.
        dtype: "float32", "bfloat16" or "float16".
        streamed: each decoder layer is read from the checkpoint when it is called, see `dynq.layerwise`.

    Raises:
        DynqError: a weight is missing or has the wrong shape.
    """
    if not checkpoint.architecture.known:
        raise DynqError(
            f"{checkpoint.path}: dynq does not know the architecture {checkpoint.architecture.name!r} and cannot run "
            "it; `dynq run` quantizes it by estimates, and measures the result in llama.cpp"
        )
    # null is a value: without "sliding_window": null Mistral's would be 4096
    settings = checkpoint.config | {"tie_word_embeddings": checkpoint.tied}
    config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    attention = "eager" if settings.get("attn_logit_softcapping") else "sdpa"  # sdpa has no soft cap
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    model.set_experts_implementation("eager")  # a product for each expert, which `dynq.recorder` knows
    model.tie_weights()
    checkpoint.architecture.complete(model)
    names = list(checkpoint.tensors)
    if streamed:
        if weights is not None:
            raise ValueError("weights that are given are in memory already")
        # what was allocated above was never written to, so it has taken no memory
        Reader(model, checkpoint, lambda name: set_tensor(model, checkpoint, name, checkpoint.read(name)))
        names = [name for name in names if checkpoint.tensors[name].layer is None]
    if weights is None:
        weights = ((name, checkpoint.read(name)) for name in names)
    filled = set()
    for name, array in progress(weights, total=len(names), desc="load", unit="tensor", leave=False):
        set_tensor(model, checkpoint, name, array)
        filled.add(checkpoint.architecture.parameter(name))
    missing = [name for name, p in model.named_parameters() if name not in filled and p.numel()]
    if missing:
        raise DynqError(f"{checkpoint.path}: no weights for {missing[0]} and {len(missing) - 1} more parameters")
    return model.eval()


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
    if wanted != array.shape:
        raise DynqError(f"tensor {gguf_name}: shape {array.shape}, but config.json implies {wanted}")
    values = checkpoint.architecture.to_torch(gguf_name, array)
    with torch.no_grad():
        slot.put(target, torch.from_numpy(np.require(values, requirements=["C", "W"])).to(target.device))


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer: the directory's tokenizer.json, or one rebuilt from the GGUF metadata."""
    if (checkpoint.path / "tokenizer.json").is_file():
        # False and not None, which would ask on the terminal whether to run what a checkpoint brings along
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    return tokenizer.from_gguf(checkpoint.metadata)
