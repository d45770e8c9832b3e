"""The real engine and transformers agree on exported files, and disagree on files that are wrong on purpose."""

import math
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from families import BITS, EXACT, FLIPS, MODELS, WRONG
from families.common import Wrong, rope
from safetensors.torch import load_file, save_file

from dynq import architectures, libllama
from dynq.allocate import allocate
from dynq.architectures.rope import Rope
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from dynq.engine import Engine
from dynq.errors import DynqError
from dynq.export import export
from dynq.recipe import Recipe
from dynq.sensitivity import sensitivity
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
    steady = open_checkpoint(tiny_models.make(name, tmp_path / "all", **FLIPS[name])) if name in FLIPS else checkpoint
    difference, entropy = compare(steady, write(steady, tmp_path / "16.gguf", "F16"))
    assert entropy < 0.5
    assert difference < 0.05  # llama.cpp rounds the activations to F16 as well where the weights are
    difference, _ = compare(checkpoint, write(checkpoint, tmp_path / "32.gguf", "F32"))
    assert difference < EXACT.get(name, 0.002)


@pytest.mark.parametrize("model", ["dynq-tiny", "llama"])
def test_engine_agrees_on_trained_weights(model: str, tmp_path: Path) -> None:
    if model != "dynq-tiny" and not (SHARED / model).is_dir():
        pytest.skip(f"{SHARED / model}, a trained model, is not here")
    checkpoint = open_checkpoint(model if model == "dynq-tiny" else SHARED / model)
    difference, _ = compare(checkpoint, write(checkpoint, tmp_path / "16.gguf", "F16"))
    assert difference < 0.05


def altered(right: Checkpoint, wrong: Wrong) -> Checkpoint:
    merged = right.metadata | {f"{right.architecture.name}.{key}": value for key, value in wrong.metadata.items()}
    change = wrong.change
    return Checkpoint(
        right.name,
        right.path,
        right.architecture,
        {key: value for key, value in merged.items() if value is not None},
        {name: info for name, info in right.tensors.items() if name != wrong.left_out},
        (lambda name: change(name, right.read(name))) if change else right.read,
        [],
    )


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{w.model}: {w.what}" for w in WRONG])
def test_wrong_export_is_seen(wrong: Wrong, tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    right = tiny(wrong.model)
    path = write(altered(right, wrong), tmp_path / "wrong.gguf", "F16")
    right = copy(right)
    right.config = right.config | wrong.config
    difference, _ = compare(right, path)
    assert difference > 0.5


@pytest.mark.parametrize("name", BITS)
def test_engine_and_torch_measure_the_same_divergence(name: str, tmp_path: Path) -> None:
    """The whole way at 3.5 bits: calibrate, sensitivity, allocate, export; KLD in torch and in the engine."""
    sizes = {"hidden_size": 256, "intermediate_size": 256} | BITS[name]
    checkpoint = open_checkpoint(tiny_models.make(name, tmp_path / "model", **sizes))
    model, folder = load_model(checkpoint), tmp_path / "run"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(2, tiny_models.VOCAB - 64, (6, 64)).astype(np.int32)
    importance = calibrate(checkpoint, model, tokens[:4], folder, keep=128)
    table = sensitivity(checkpoint, folder, importance, ("Q2_K", "Q3_K", "Q4_K", "Q6_K"), threads=1)
    recipe = allocate(table, checkpoint.tensors, "3.5bpw", metadata=checkpoint.metadata)
    export(checkpoint, recipe, importance, tmp_path / "3.5bpw.gguf", threads=1)
    quantized = open_checkpoint(tmp_path / "3.5bpw.gguf", allow_requantize=True)
    weights = {name: quantized.read(name) for name in quantized.tensors}
    with torch.no_grad():
        ids = torch.from_numpy(tokens[4:].astype(np.int64))
        p = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
        q = torch.log_softmax(load_model(checkpoint, weights.items())(ids).logits[:, :-1].double(), -1)
    with libllama.Llama(libllama.find("xllamacpp"), tmp_path / "3.5bpw.gguf", n_ctx=64, threads=1) as engine:
        logits = np.stack([engine.logits(chunk, 0) for chunk in tokens[4:]])
    e = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    in_torch, in_engine = (float((p.exp() * (p - other)).sum(-1).mean()) for other in (q, e))
    assert min(in_torch, in_engine) > 0.05
    assert in_engine == pytest.approx(in_torch, rel=0.1)


def test_every_family_has_its_models() -> None:
    """A family needs: a tiny model for each model_type, wrong exports, a 3.5bpw file, and its row in README."""
    model_types = {model_type for model_type, _ in MODELS.values()}
    assert set(architectures.supported()) - model_types == set()
    named = {gguf.MODEL_ARCH_NAMES[family.arch]: family.model_types for family in architectures.FAMILIES}
    measured = {MODELS[name][0] for name in BITS}
    wrong = {MODELS[w.model][0] for w in WRONG}
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for arch, types in named.items():
        assert measured & set(types), f"no 3.5bpw file of {arch}"
        assert wrong & set(types), f"no wrong export of {arch}"
        assert f"`{arch}`" in readme, f"{arch} is not in README's table of architectures"


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_engine_refuses_wrong_head_size(name: str, tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    missing = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"))
    path = write(altered(tiny(name), Wrong(name, "", metadata=missing)), tmp_path / "wrong.gguf", "F16")
    with pytest.raises(DynqError, match="does not open"):
        Engine(path)


@pytest.mark.parametrize("name", MODELS)
def test_put_is_inverse_of_take(name: str, tiny: Callable[[str], Checkpoint]) -> None:
    checkpoint = tiny(name)
    model = load_model(checkpoint)
    kept = set(model.state_dict())
    parameters = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in kept}
    filled = {parameter: torch.zeros_like(values) for parameter, values in parameters.items()}
    for tensor in checkpoint.tensors:
        slot = checkpoint.architecture.slot_of(tensor)
        if slot.parameter in parameters:  # not what transformers computes, rope frequencies
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


def test_longrope_is_known_by_its_tensors(tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """llama.cpp's converter writes no type."""
    right = tiny("phi-long")
    path = write(altered(right, Wrong("", "", metadata={"rope.scaling.type": None})), tmp_path / "m.gguf", "F16")
    one, other = load_model(right), load_model(open_checkpoint(path))
    with torch.no_grad():  # the prompt is shorter than the original context, twice it is longer
        for tokens in (torch.tensor([PROMPT]), torch.tensor([PROMPT * 2])):
            torch.testing.assert_close(one(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_predict_further_tokens_are_left_out(tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """GLM-4.5 and its relatives have one after the last layer, in safetensors and in llama.cpp's GGUF."""
    right = tiny("glm4moe")
    directory = shutil.copytree(right.path, tmp_path / "glm4moe")
    stored = load_file(directory / "model.safetensors")
    further = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in stored.items() if "layers.2." in name}
    further["model.layers.3.eh_proj.weight"] = torch.zeros(128, 256)
    save_file(stored | further, directory / "model.safetensors", metadata={"format": "pt"})
    assert list(open_checkpoint(directory).tensors) == list(right.tensors)
    with_it = altered(right, Wrong("", "", metadata={"block_count": 4, "nextn_predict_layers": 1}))
    with_it.tensors |= {
        name.replace("blk.2.", "blk.3."): TensorInfo(name.replace("blk.2.", "blk.3."), info.shape, info.dtype)
        for name, info in right.tensors.items()
        if info.layer == 2
    }
    with_it.tensors["blk.3.nextn.eh_proj.weight"] = TensorInfo("blk.3.nextn.eh_proj.weight", (128, 256), "F32")
    with_it._read = lambda name: (
        np.zeros((128, 256), np.float32) if "eh_proj" in name else right.read(name.replace("blk.3.", "blk.2."))
    )
    back = open_checkpoint(write(with_it, tmp_path / "m.gguf", "F16"))
    assert list(back.tensors) == list(right.tensors)
    assert {k: v for k, v in back.metadata.items() if k.startswith("glm4moe.")} == pytest.approx(
        {k: v for k, v in right.metadata.items() if k.startswith("glm4moe.")}
    )


def test_early_qwen2moe_files_open(tiny: Callable[[str], Checkpoint]) -> None:
    """Without the sizes of experts in the metadata, and the shared expert's gate a vector."""
    checkpoint = tiny("qwen2moe")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    sizes = ("qwen2moe.expert_feed_forward_length", "qwen2moe.expert_shared_feed_forward_length")
    early = {key: value for key, value in checkpoint.metadata.items() if key not in sizes}
    config = architectures.for_gguf(early, shapes).config
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (96, 192)
    gate = "blk.1.ffn_gate_inp_shexp.weight"
    assert shapes[gate] == (1, 128) and not checkpoint.tensors[gate].quantizable
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    vector = load_model(checkpoint, (weights | {gate: weights[gate][0]}).items())
    for one, other in zip(load_model(checkpoint).parameters(), vector.parameters(), strict=True):
        assert torch.equal(one, other)


def test_llama4_beyond_its_first_chunk(tmp_path: Path) -> None:
    """At position 8192 a chunk begins, and queries grow: numbers that no metadata holds. Medians, since where the best
    two experts of a token are equally good rounding decides."""
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    checkpoint = open_checkpoint(
        tiny_models.make("llama4-scout", tmp_path / "model", max_position_embeddings=16384, **sizes)
    )
    tokens = np.random.default_rng(0).integers(2, tiny_models.VOCAB - 64, 8300).astype(np.int32)
    first, path = 8200, write(checkpoint, tmp_path / "32.gguf", "F32")
    with libllama.Llama(libllama.find("xllamacpp"), path, n_ctx=8448, threads=1) as engine:
        here = torch.log_softmax(torch.from_numpy(engine.logits(tokens, first)).double(), -1)
    model = load_model(checkpoint)

    def median(**change: Any) -> float:
        config = transformers.Llama4TextConfig.from_dict(checkpoint.config | change)
        other = transformers.AutoModelForCausalLM.from_config(config, dtype="float32").eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            there = other(ids, logits_to_keep=len(tokens) - first).logits[0, :-1]
        return float((torch.log_softmax(there.double(), -1) - here).abs().amax(-1).median())

    assert median() < 0.02  # the cache of keys and values is F16
    assert median(attn_temperature_tuning=False) > 0.1
    assert median(attention_chunk_size=16384) > 0.5


def test_shared_keys_and_values_are_left_out(tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """Gemma 4's checkpoints, and the GGUFs that llama.cpp makes of them, hold some for the layers that use others'."""
    right = tiny("gemma4")
    directory = shutil.copytree(right.path, tmp_path / "gemma4")
    stored = load_file(directory / "model.safetensors")
    unused = {
        name.replace(f"layers.{layer}.", f"layers.{layer + 2}."): tensor.clone()
        for name, tensor in stored.items()
        for layer in (0, 1)
        if f"layers.{layer}.self_attn." in name and name.endswith(("k_proj.weight", "v_proj.weight", "k_norm.weight"))
    }
    assert len(unused) == 6 and not set(unused) & set(stored)
    save_file(stored | unused, directory / "model.safetensors", metadata={"format": "pt"})
    assert list(open_checkpoint(directory).tensors) == list(right.tensors)
    with_them = altered(right, Wrong("", "", metadata={"attention.head_count_kv": 2}))
    more = [f"blk.{layer}.attn_{kind}.weight" for layer in (2, 3) for kind in ("k", "v", "k_norm")]
    for name in more:
        first = right.tensors[name.replace("blk.2", "blk.0").replace("blk.3", "blk.1")]
        with_them.tensors[name] = TensorInfo(name, first.shape, first.dtype)
    with_them._read = lambda name: (
        np.ones(with_them.tensors[name].shape, np.float32) if name in more else right.read(name)
    )
    path = write(with_them, tmp_path / "m.gguf", "F16")
    assert set(more) < {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    back = open_checkpoint(path)
    assert list(back.tensors) == list(right.tensors)
    assert compare(right, write(back, tmp_path / "again.gguf", "F16"))[0] < 0.05


def test_rope_settings_old_and_new_config_agree() -> None:
    new = Rope.from_config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}})
    old = Rope.from_config({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}})
    assert new == old
    assert Rope.from_config({"rope_theta": 1e6, "rope_scaling": None}) == Rope(1e6)
    assert Rope.from_config({}) == Rope(10000.0)


@pytest.mark.parametrize(("model", "blends"), [("llama", True), ("llama4-scout", False)])
def test_llama3_factors_are_those_of_transformers(model: str, blends: bool) -> None:
    config = {"rope_parameters": tiny_models.MODELS[model][1]["rope_parameters"]}
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=32, **config), device=None)
    rope = Rope.from_config(config)
    factors = rope.factors(32)
    assert factors is not None
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any() == blends
    np.testing.assert_allclose(rope.inverse_frequencies(32) / factors, theirs.numpy(), rtol=1e-5)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"rope_theta": 300.0, "original_max_position_embeddings": 256}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_GEMMA4 = {"model_type": "gemma4_text", "num_hidden_layers": 6, "vocab_size_per_layer_input": tiny_models.VOCAB}
_QWEN35 = {"model_type": "qwen3_5_text", "rms_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are .*llama, .*mistral, .*qwen2, .*qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "field 'hidden_size': TypeError"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "longrope"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "no_rope_layers other than every 4th layer"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layers other than every 4th layer"),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 12, "num_hidden_layers": 4},
            "sliding",
        ),
        ({"model_type": "smollm3", "attention_bias": True}, "attention_bias and mlp_bias"),
        ({"model_type": "smollm3", "rope_parameters": _LLAMA3}, "rope type 'llama3' is not supported for smollm3"),
        ({"model_type": "phi3", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "glm4", "rope_parameters": _LLAMA3}, "rope type 'llama3' is not supported for glm4"),
        ({"model_type": "granitemoeshared", "num_local_experts": 0}, "num_local_experts 0"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm True is not supported with 3 layers"),
        ({"model_type": "cohere", "num_hidden_layers": 64}, "use_qk_norm False is not supported with 64 layers"),
        ({"model_type": "cohere", "tie_word_embeddings": False}, "tie_word_embeddings false is not supported for coh"),
        ({"model_type": "cohere2", "attention_bias": True}, "attention_bias is not supported for cohere2"),
        ({"model_type": "cohere2", "sliding_window": None}, "sliding_window null"),
        ({"rope_scaling": _YARN | {"beta_fast": 8.0}}, "beta_fast 8.0 of yarn is not supported"),
        ({"rope_scaling": _YARN | {"truncate": False}}, "truncate False of yarn is not supported"),
        ({"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale 1.0 of yarn"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is not supported for qwen2"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "qwen2_moe is supported with norm_topk_prob false"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe is supported with norm_topk_prob true"),
        ({"model_type": "qwen2_moe", "mlp_only_layers": [0]}, "layers without experts are not supported"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, "layers without experts are not supported"),
        ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias false"),
        ({"model_type": "llama4_text", "attention_chunk_size": 64}, "attention_chunk_size 64 is not supported"),
        ({"model_type": "llama4_text", "use_qk_norm": False}, "use_qk_norm False is not supported"),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0, 1]}, r"no_rope_layers \[1, 0, 1\]"),
        ({"model_type": "llama4_text", "moe_layers": [1]}, r"moe_layers \[1\]"),
        ({"model_type": "qwen3", "rope_parameters": _LLAMA3}, "rope type 'llama3' is not supported for qwen3"),
        ({"model_type": "gpt_oss", "rope_parameters": _LLAMA3}, "rope type 'llama3' is not supported for gpt_oss"),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported, only 7.0 is"),
        ({"model_type": "gpt_oss", "attention_bias": False}, "attention_bias false"),
        ({"model_type": "gpt_oss", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gpt_oss", "tie_word_embeddings": True}, "tie_word_embeddings is not supported for gpt_oss"),
        ({"model_type": "qwen3_5_text"}, "rms_norm_eps 1e-05"),
        (_QWEN35 | {"linear_value_head_dim": 64}, "linear_key_head_dim and linear_value_head_dim that differ"),
        (_QWEN35 | {"linear_num_value_heads": 24}, "24 linear value heads do not share 16 key heads"),
        (_QWEN35 | {"attention_bias": True}, "attention_bias"),
        (_QWEN35 | {"model_type": "qwen3_next", "mlp_only_layers": [1]}, "mlp_only_layers"),
        (_QWEN35 | {"model_type": "qwen3_next", "norm_topk_prob": False}, "norm_topk_prob false"),
        (_GEMMA4 | {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input"),
        (_GEMMA4 | {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        (_GEMMA4 | {"attention_bias": True}, "attention_bias"),
        (_GEMMA4 | {"num_kv_shared_layers": 1, "num_hidden_layers": 12}, "must leave a sliding and a full layer"),
        (_GEMMA4 | {"per_layer_config": {"0": {"head_dim": 64}}}, "one width for all full attention"),
        (_QWEN35 | rope(mrope_section=[4, 2, 2], partial_rotary_factor=0.5), r"mrope_section \[4, 2, 2\]"),
    ],
)
def test_unsupported_config(change: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", **tiny_models.COMMON} | change
    with pytest.raises(DynqError, match=message):
        architectures.for_config(config)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("granite", {"rope.scaling.finetuned": False}, "no rotary positions"),
        ("glm4", {"rope.dimension_sections": [8, 12, 12, 0]}, "a model that sees"),
        ("cohere-large", {"block_count": 63}, "use_qk_norm True is not supported with 63 layers"),
    ],
)
def test_unsupported_gguf(name: str, metadata: dict[str, Any], message: str, tiny: Callable[[str], Checkpoint]) -> None:
    wrong = altered(tiny(name), Wrong("", "", metadata=metadata))
    with pytest.raises(DynqError, match=message):
        architectures.for_gguf(wrong.metadata, {n: info.shape for n, info in wrong.tensors.items()})


def test_gpt_oss_opens_as_published_with_a_warning() -> None:
    """Its yarn is the one llama.cpp cannot follow: the ends of the ramp are 8.09 and 17.4 there, 8 and 18 here."""
    config = transformers.GptOssConfig(num_hidden_layers=2).to_dict()
    assert config["rope_parameters"]["truncate"] is False
    with pytest.warns(UserWarning, match="truncate false"):
        metadata = architectures.for_config(config).metadata()
    assert metadata["gpt-oss.rope.scaling.factor"] == 32
