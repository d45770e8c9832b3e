"""The real engine and transformers agree on exported files, and disagree on files that are wrong on purpose."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import MODELS

from dynq import architectures
from dynq.architectures import ROPE_FREQS
from dynq.architectures.rope import Rope
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.engine import Engine
from dynq.errors import DynqError
from dynq.export import export
from dynq.recipe import Recipe
from dynq.torch_model import load_model

SHARED = Path(__file__).parents[2] / "shared" / "models"
PROMPT = list(range(40, 70))
N_TOKENS, TOP = 64, 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = open_checkpoint(tiny_models.make(name, tmp_path_factory.mktemp(name)))
        return made[name]

    return get


def write(checkpoint: Checkpoint, path: Path, fmt: str) -> Path:
    export(checkpoint, Recipe(dict.fromkeys(checkpoint.tensors, fmt), fmt, 0, 0.0, None), None, path, threads=1)
    return path


def compare(checkpoint: Checkpoint, path: Path) -> tuple[float, float]:
    """Largest difference of the engine's top log-probabilities from transformers' of the checkpoint, and the mean
    entropy over log V, along what the engine generates."""
    with Engine(path, n_ctx=256, threads=1, exact=True) as engine:
        generation = engine.generate(PROMPT, N_TOKENS, top=TOP, ignore_eos=True)
    assert len(generation.tokens) == len(generation.top_logprobs) == N_TOKENS
    with torch.no_grad():
        logits = load_model(checkpoint)(torch.tensor([PROMPT + generation.tokens])).logits[0, len(PROMPT) - 1 : -1]
    logp = torch.log_softmax(logits.double(), -1).numpy()
    difference = max(
        abs(logp[i, token] - value) for i, top in enumerate(generation.top_logprobs) for token, value in top.items()
    )
    return float(difference), tiny_models.mean_entropy(logits) / math.log(tiny_models.VOCAB)


@pytest.mark.parametrize("name", MODELS)
def test_engine_agrees_with_transformers(name: str, tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    checkpoint = tiny(name)
    difference, entropy = compare(checkpoint, write(checkpoint, tmp_path / "16.gguf", "F16"))
    assert entropy < 0.5
    assert difference < 0.05  # llama.cpp rounds the activations to F16 as well where the weights are
    difference, _ = compare(checkpoint, write(checkpoint, tmp_path / "32.gguf", "F32"))
    assert difference < 0.002


@pytest.mark.parametrize("model", ["dynq-tiny", "llama"])
def test_engine_agrees_on_trained_weights(model: str, tmp_path: Path) -> None:
    if model != "dynq-tiny" and not (SHARED / model).is_dir():
        pytest.skip(f"{SHARED / model}, a trained model, is not here")
    checkpoint = open_checkpoint(model if model == "dynq-tiny" else SHARED / model)
    difference, _ = compare(checkpoint, write(checkpoint, tmp_path / "16.gguf", "F16"))
    assert difference < 0.05


def other_order(name: str, array: np.ndarray) -> np.ndarray:
    """q and k in the order of rows that the family does not have."""
    for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
        if part in name:
            return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def without(*endings: str, to: float = 0.0) -> Callable[[str, np.ndarray], np.ndarray]:
    """Tensors with one of these name endings made constant."""
    return lambda name, array: np.full_like(array, to) if name.endswith(endings) else array


def keys(**changes: Any) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


# model, what is wrong, the change of tensors, the change of metadata (None: left out), a tensor left out
WRONG = [
    ("llama", "q and k not permuted", other_order, {}, None),
    ("llama", "rope base", None, keys(rope__freq_base=10000.0), None),
    ("llama", "no rope factors", None, {}, ROPE_FREQS),
    ("llama", "rope factors of one", without(ROPE_FREQS, to=1.0), {}, None),
    ("llama", "embedding for output", None, {}, "output.weight"),
    ("llama", "layer norms", without("attn_norm.weight", to=1.0), {}, None),
    ("llama-tied", "q and k not permuted", other_order, {}, None),
    ("llama-tied", "rope base", None, keys(rope__freq_base=10000.0), None),
    ("llama-biased", "no biases of q, k and v", without("attn_q.bias", "attn_k.bias", "attn_v.bias"), {}, None),
    ("llama-biased", "no other biases", without("attn_output.bias", "ffn_up.bias", "ffn_down.bias"), {}, None),
    ("llama-biased", "biases not permuted", lambda n, a: other_order(n, a) if a.ndim == 1 else a, {}, None),
    ("llama-linear", "no rope scaling", None, keys(rope__scaling__type=None, rope__scaling__factor=None), None),
    ("mistral", "q and k not permuted", other_order, {}, None),
    ("mistral", "rope base", None, keys(rope__freq_base=10000.0), None),
    ("qwen2", "no biases", without(".bias"), {}, None),
    ("qwen2", "q and k permuted", other_order, {}, None),
    ("qwen2", "rope base", None, keys(rope__freq_base=10000.0), None),
    ("qwen2-yarn", "no rope scaling", None, keys(rope__scaling__type="none"), None),
    ("qwen2-yarn", "half the rope scaling", None, keys(rope__scaling__factor=8.0), None),
    ("qwen3", "norm of q", without("attn_q_norm.weight", to=1.0), {}, None),
    ("qwen3", "norm of k", without("attn_k_norm.weight", to=1.0), {}, None),
    ("qwen3", "layer norms", without("ffn_norm.weight", to=1.0), {}, None),
    ("qwen3", "q and k permuted", other_order, {}, None),
    ("qwen3", "rope base", None, keys(rope__freq_base=10000.0), None),
]


def altered(
    right: Checkpoint,
    change: Callable[[str, np.ndarray], np.ndarray] | None,
    metadata: dict[str, Any],
    left_out: str | None,
) -> Checkpoint:
    merged = right.metadata | {f"{right.architecture.name}.{key}": value for key, value in metadata.items()}
    return Checkpoint(
        right.name,
        right.path,
        right.architecture,
        {key: value for key, value in merged.items() if value is not None},
        {name: info for name, info in right.tensors.items() if name != left_out},
        (lambda name: change(name, right.read(name))) if change else right.read,
        [],
    )


@pytest.mark.parametrize(
    ("name", "what", "change", "metadata", "left_out"), WRONG, ids=[f"{w[0]}: {w[1]}" for w in WRONG]
)
def test_wrong_export_is_seen(
    name: str, what: str, change: Any, metadata: Any, left_out: Any, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    wrong = altered(tiny(name), change, metadata, left_out)
    difference, _ = compare(tiny(name), write(wrong, tmp_path / "wrong.gguf", "F16"))
    assert difference > 0.5


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_engine_refuses_wrong_head_size(name: str, tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    missing = keys(attention__key_length=None, attention__value_length=None, rope__dimension_count=None)
    path = write(altered(tiny(name), None, missing, None), tmp_path / "wrong.gguf", "F16")
    with pytest.raises(DynqError, match="does not open"):
        Engine(path)


@pytest.mark.parametrize("name", MODELS)
def test_put_is_inverse_of_take(name: str, tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny(name)
    parameters = dict(load_model(checkpoint).named_parameters())
    filled = {parameter: torch.zeros_like(values) for parameter, values in parameters.items()}
    for tensor in checkpoint.tensors:
        slot = checkpoint.architecture.slot_of(tensor)
        if tensor != ROPE_FREQS:
            slot.put(filled[slot.parameter], torch.from_numpy(slot.take(parameters[slot.parameter].detach().numpy())))
    for parameter, values in parameters.items():
        torch.testing.assert_close(filled[parameter], values, rtol=1e-6, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """Hugging Face -> GGUF -> transformers gives the same weights and the same output."""
    there = tiny(name)
    back = open_checkpoint(write(there, tmp_path / "m.gguf", "F16"))
    assert back.tied == there.tied
    assert list(back.tensors) == list(there.tensors)
    one, other = load_model(there), load_model(back)
    for (left_name, left), (right_name, right) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert left_name == right_name
        assert torch.equal(left, right), left_name
    with torch.no_grad():
        tokens = torch.tensor([PROMPT])
        torch.testing.assert_close(one(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rope_settings_old_and_new_config_agree() -> None:
    new = Rope.from_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}})
    old = Rope.from_config({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}})
    assert new == old
    assert Rope.from_config({"rope_theta": 1e6, "rope_scaling": None}) == Rope(1e6)
    assert Rope.from_config({}) == Rope(10000.0)


def test_llama3_factors_are_those_of_transformers() -> None:
    config = tiny_models.MODELS["llama"][1]
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=32, **config), device=None)
    rope = Rope.from_config(config)
    factors = rope.factors(32)
    assert factors is not None
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any()
    np.testing.assert_allclose(rope.inverse_frequencies(32) / factors, theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "field 'hidden_size': TypeError"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "longrope"),
    ],
)
def test_unsupported_config(change: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", **tiny_models.COMMON} | change
    with pytest.raises(DynqError, match=message):
        architectures.for_config(config)
