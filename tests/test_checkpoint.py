"""Opening models: every source reads alike, and damage is named in one line."""

import contextlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from dynq.architectures import for_gguf
from dynq.architectures.rope import Rope
from dynq.checkpoint import TensorInfo, open_checkpoint
from dynq.errors import DynqError
from dynq.export import export
from dynq.gguf_reader import Reader
from dynq.recipe import Recipe
from dynq.torch_model import load_model, load_tokenizer, set_tensor


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A sharded random Llama."""
    directory = tiny_models.make("llama", tmp_path / "llama", shard="400KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def edit(path: Path, **changes: Any) -> None:
    loaded = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in loaded.items() if value is not None}))


def write_gguf(directory: Path, path: Path, fmt: str) -> Path:
    checkpoint = open_checkpoint(directory)
    export(checkpoint, Recipe(dict.fromkeys(checkpoint.tensors, fmt), "", 0, 0.0, None), None, path, threads=1)
    return path


def refuses(model: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(DynqError, match=message) as caught:
        checkpoint = open_checkpoint(model, **options)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert "\n" not in str(caught.value)


def test_embedded_model() -> None:
    checkpoint = open_checkpoint("dynq-tiny")
    assert checkpoint.name == "dynq-tiny"
    assert checkpoint.architecture.name == "qwen3"
    assert checkpoint.tied and not checkpoint.requantized
    assert checkpoint.n_weights == 13_901_568
    info = checkpoint.tensors["blk.11.ffn_down.weight"]
    assert (info.shape, info.row, info.dtype, info.layer, info.kind) == ((256, 1024), 1024, "BF16", 11, "ffn_down")
    array = checkpoint.read(info.name)
    assert array.dtype == np.float32 and array.shape == info.shape and array.flags.c_contiguous
    assert len(checkpoint.fingerprint) == 64
    assert checkpoint.metadata["general.name"] == "Dynq Tiny"
    assert "general.file_type" not in checkpoint.metadata


def test_same_weights_as_transformers() -> None:
    checkpoint = open_checkpoint("dynq-tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="float32").eval()
    tokens = torch.tensor([load_tokenizer(checkpoint)("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("name", "shape", "quantizable", "kind", "layer"),
    [
        ("blk.3.attn_q.weight", (8, 8), True, "attn_q", 3),
        ("token_embd.weight", (8, 8), True, "token_embd", None),
        ("blk.12.ffn_down_exps.weight", (4, 8, 8), True, "ffn_down_exps", 12),
        ("blk.0.attn_norm.weight", (8,), False, "attn_norm", 0),
        ("blk.0.attn_q_norm.weight", (2, 8), False, "attn_q_norm", 0),
        ("blk.0.attn_q.bias", (8,), False, "attn_q.bias", 0),
        ("blk.0.ffn_gate_inp.weight", (8, 8), False, "ffn_gate_inp", 0),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 8), False, "ffn_gate_inp_shexp", 0),
        ("rope_freqs.weight", (8,), False, "rope_freqs", None),
    ],
)
def test_tensor_info(name: str, shape: tuple[int, ...], quantizable: bool, kind: str, layer: int | None) -> None:
    info = TensorInfo(name, shape, "F32")
    assert (info.quantizable, info.kind, info.layer, info.row) == (quantizable, kind, layer, 8)
    assert info.n_weights == np.prod(shape)


def test_shards_make_no_difference(llama: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_models.make("llama", tmp_path / "whole"))
    parts = open_checkpoint(llama)
    assert list(parts.tensors) == list(whole.tensors)
    assert all(np.array_equal(parts.read(name), whole.read(name)) for name in whole.tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_types(dtype: str, llama: Path) -> None:
    for shard in llama.glob("*.safetensors"):
        save_file({name: t.to(getattr(torch, dtype)) for name, t in load_file(shard).items()}, shard)
    checkpoint = open_checkpoint(llama)
    stored = {name: t for shard in llama.glob("*.safetensors") for name, t in load_file(shard).items()}
    for name in ("blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"):
        assert checkpoint.tensors[name].dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        parameter = checkpoint.architecture.parameter(name)
        assert np.array_equal(checkpoint.read(name), stored[parameter].float().numpy())


def test_old_config_is_the_same_model(llama: Path) -> None:
    """Configs from before transformers 5 keep the rope settings under other names."""
    new = open_checkpoint(llama)
    rope = json.loads((llama / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    older = shutil.copytree(llama, llama.with_name("older"))
    edit(older / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    old = open_checkpoint(older)
    named = {key: value for key, value in new.metadata.items() if old.metadata[key] != value}
    assert old.metadata.keys() == new.metadata.keys() and all("name" in key for key in named), named
    assert np.array_equal(old.read("rope_freqs.weight"), new.read("rope_freqs.weight"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(old)(tokens).logits, load_model(new)(tokens).logits)


@pytest.mark.parametrize(
    ("keys", "kind", "factor"),
    [
        ({"scaling.factor": 4.0}, "linear", 4.0),
        ({"scale_linear": 2.0}, "linear", 2.0),
        ({"scaling.factor": 1.0}, "default", None),
    ],
)
def test_rope_factor_without_a_type_is_linear(keys: dict, kind: str, factor: float | None) -> None:
    rope = Rope.from_gguf({f"llama.rope.{key}": value for key, value in keys.items()}, "llama", 32)
    assert (rope.type, rope.settings.get("factor")) == (kind, factor)


def test_partly_rotated_heads_are_refused(llama: Path, tmp_path: Path) -> None:
    metadata = {**open_checkpoint(llama).metadata, "llama.rope.dimension_count": 4}
    shapes = {name: info.shape for name, info in open_checkpoint(llama).tensors.items()}
    with pytest.raises(DynqError, match="4 of 32 dimensions of a head are rotated"):
        for_gguf(metadata, shapes)


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_gguf_reads_like_the_directory(fmt: str, llama: Path, tmp_path: Path) -> None:
    there, back = open_checkpoint(llama), open_checkpoint(write_gguf(llama, tmp_path / "m.gguf", fmt))
    assert not back.requantized
    assert back.metadata.keys() == there.metadata.keys()
    for key, value in there.metadata.items():
        assert back.metadata[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    for name in there.tensors:
        tolerance = {"F32": 0, "F16": 0, "BF16": 2**-8}[fmt]  # the matrices are F16 numbers
        np.testing.assert_allclose(back.read(name), there.read(name), rtol=tolerance)


def test_quantized_gguf_needs_permission(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "q.gguf", "Q8_0")
    refuses(path, r"already quantized \(Q8_0\).*--allow-requantize")
    checkpoint = open_checkpoint(path, allow_requantize=True)
    assert checkpoint.requantized
    original = open_checkpoint(llama).read("blk.0.ffn_up.weight")
    assert 0 < np.abs(checkpoint.read("blk.0.ffn_up.weight") - original).max() < 0.01


def test_fingerprint_is_of_the_content(llama: Path, tmp_path: Path) -> None:
    first = open_checkpoint(llama).fingerprint
    moved = llama.rename(tmp_path / "elsewhere")
    assert open_checkpoint(moved).fingerprint == first
    shard = next(iter(sorted(moved.glob("model-*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert open_checkpoint(moved).fingerprint != first


def test_set_tensor_follows_tied_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make("llama-tied", tmp_path / "m"))
    model = load_model(checkpoint)
    array = np.random.default_rng(0).normal(size=checkpoint.tensors["token_embd.weight"].shape).astype(np.float32)
    set_tensor(model, checkpoint, "token_embd.weight", array)
    assert np.array_equal(model.lm_head.weight.detach().numpy(), array)
    with pytest.raises(DynqError, match="shape"):
        set_tensor(model, checkpoint, "token_embd.weight", array[:5])
    with pytest.raises(DynqError, match=r"blk\.77"):
        set_tensor(model, checkpoint, "blk.77.attn_q.weight", array)


def test_load_model_from_given_weights(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    given = [(name, checkpoint.read(name)) for name in reversed(checkpoint.tensors)]
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint, given)(tokens).logits, load_model(checkpoint)(tokens).logits)
    with pytest.raises(DynqError, match=r"no weights for .* and 3 more"):
        load_model(checkpoint, given[4:])
    half = load_model(checkpoint, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16


def test_tied_head_stored_twice_is_left_out(tmp_path: Path) -> None:
    directory = tiny_models.make("llama-tied", tmp_path / "m")
    stored = load_file(directory / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, directory / "model.safetensors")
    assert "output.weight" not in open_checkpoint(directory).tensors


def test_gguf_with_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """As llama.cpp's converter writes Qwen3.5: behind the others, counted with them; they are left out."""
    there = open_checkpoint(tiny_models.make("qwen35moe", tmp_path / "m"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen35moe")
    tensors = {name: there.read(name) for name in there.tensors}
    more = {name.replace("blk.3.", "blk.4."): array for name, array in tensors.items() if name.startswith("blk.3.")}
    for name, array in (tensors | more | {"blk.4.nextn.eh_proj.weight": np.ones((4, 8), np.float32)}).items():
        writer.add_tensor(name, array)
    changed = {"block_count": 5, "nextn_predict_layers": 1}
    changed["attention.recurrent_layers"] = [*there.metadata["qwen35moe.attention.recurrent_layers"], False]
    for key, value in (there.metadata | {f"qwen35moe.{key}": value for key, value in changed.items()}).items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = open_checkpoint(tmp_path / "m.gguf")
    assert back.metadata == there.metadata | {
        k: pytest.approx(v) for k, v in there.metadata.items() if type(v) is float
    }
    assert {n: i.shape for n, i in back.tensors.items()} == {n: i.shape for n, i in there.tensors.items()}
    for name in there.tensors:
        assert np.array_equal(back.read(name), tensors[name])


def test_reader_agrees_with_gguf(llama: Path, tmp_path: Path) -> None:
    """The fast reading of arrays gives what gguf's own gives."""
    path = write_gguf(llama, tmp_path / "m.gguf", "F16")
    writer = gguf.GGUFWriter(tmp_path / "arrays.gguf", "llama")
    arrays: dict[str, list[Any]] = {
        "s": ["", "é", "x" * 300], "i": [1, -2], "f": [0.5, 1e-9], "b": [True, False]
    }  # fmt: skip
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in (path, tmp_path / "arrays.gguf"):
        ours, theirs = Reader(file), gguf.GGUFReader(file)
        assert {k: (f.contents(), f.types) for k, f in ours.fields.items()} == {
            k: (f.contents(), f.types) for k, f in theirs.fields.items()
        }
        for one, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert one.name == other.name and np.array_equal(one.data, other.data)


# --- what is damaged is named -----------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    refuses(tmp_path / "none" / "such", "no such file or directory")
    refuses("nothing-here", "no such file or directory")


def test_hub_not_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refuses("owner/name", "owner/name: no such path here, and the Hugging Face hub did not give it: no connection")


def test_code_of_a_checkpoint_is_never_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for config, model nor tokenizer, and nobody is asked: input() would wait for an answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    marker = tmp_path / "ran"
    (llama / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass A:\n    pass\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.A")
    edit(llama / "config.json", auto_map=classes)
    edit(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]})
    checkpoint = open_checkpoint(llama)
    load_model(checkpoint)
    load_tokenizer(checkpoint)
    edit(llama / "tokenizer_config.json", tokenizer_class="ATokenizer")  # one that transformers does not have
    with contextlib.suppress(Exception):  # whatever it says of it
        load_tokenizer(checkpoint)
    assert not marker.exists()


def test_towers_are_left_out_and_said(llama: Path) -> None:
    assert open_checkpoint(llama).notes == []
    added = {"vision_tower.blocks.0.weight": torch.zeros(4, 4), "model.visual.proj.bias": torch.zeros(4)}
    file = sorted(llama.glob("model-*.safetensors"))[0]
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(llama)
    (note,) = checkpoint.notes
    assert note.startswith("2 tensors for images or sound are left out") and "mmproj" in note
    assert not any("vis" in name for name in checkpoint.tensors)


def test_directory_without_config(tmp_path: Path) -> None:
    refuses(tmp_path, r"not a Hugging Face model directory, config\.json is missing")


def test_config_that_is_not_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    refuses(llama, r"config\.json: not readable as JSON")


def test_unsupported_architecture(llama: Path) -> None:
    edit(llama / "config.json", model_type="mamba")
    refuses(llama, "'mamba' is not supported; supported are .*llama, .*mistral, .*qwen2, .*qwen3, .*qwen3_moe")


def test_no_weights(llama: Path) -> None:
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    refuses(llama, r"no model\.safetensors")


def test_missing_shard(llama: Path) -> None:
    shard = sorted(llama.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuses(llama, f"{shard.name}: this shard is missing")


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1])
def test_truncated_shard(keep: float, llama: Path) -> None:
    shard = sorted(llama.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refuses(llama, f"{shard.name}: truncated")


def test_shard_of_rubbish(llama: Path) -> None:
    shard = sorted(llama.glob("model-*.safetensors"))[1]
    shard.write_bytes(struct.pack("<Q", 8) + b"rubbish!" + bytes(100))
    refuses(llama, f"{shard.name}: not readable as JSON")


def test_missing_tensor(llama: Path) -> None:
    shard = next(p for p in llama.glob("model-*.safetensors") if "model.norm.weight" in load_file(p))
    save_file({name: t for name, t in load_file(shard).items() if name != "model.norm.weight"}, shard)
    refuses(llama, r"1 tensors are missing, the first is model\.norm\.weight")


def test_config_of_another_size(llama: Path) -> None:
    edit(llama / "config.json", vocab_size=500)
    refuses(llama, r"model\.embed_tokens\.weight has shape \(384, 128\), config\.json implies \(500, 128\)")


def test_tensor_without_a_place(llama: Path) -> None:
    shard = next(iter(llama.glob("model-*.safetensors")))
    save_file(load_file(shard) | {"model.layers.0.mixer.A_log": torch.zeros(3)}, shard)
    refuses(llama, r"model\.layers\.0\.mixer\.A_log has no place in the architecture llama")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(value: float, dtype: torch.dtype, llama: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    shard = next(p for p in llama.glob("model-*.safetensors") if name in load_file(p))
    stored = load_file(shard)
    stored[name] = stored[name].to(dtype)
    stored[name][3, 17] = value
    stored[name][9, 2] = value
    save_file(stored, shard)
    refuses(llama, rf"{shard.name}: tensor {name} \(blk\.1\.attn_k\.weight\) holds {value} at \[3, 17\] \(2 such")


def test_type_that_is_not_read(llama: Path) -> None:
    shard = next(iter(llama.glob("model-*.safetensors")))
    stored = load_file(shard)
    name = next(iter(stored))
    save_file(stored | {name: stored[name].to(torch.float8_e5m2)}, shard)
    refuses(llama, rf"tensor {name} has type F8_E5M2, which is not read; known are F64, F32, F16, BF16, F8_E4M3, U8")


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"something else")
    refuses(path, "not a GGUF file")


@pytest.mark.parametrize("keep", [10, 2000, 0.5, -1])
def test_truncated_gguf(keep: float, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf", "F16")
    content = path.read_bytes().rstrip(b"\0") if keep == -1 else path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refuses(path, r"m\.gguf: (truncated, tensor|the GGUF header is cut off)")


def test_gguf_with_nan(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf", "F16")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data[7, 5] = np.nan
    reader.data.flush()
    refuses(path, r"tensor blk\.1\.ffn_up\.weight holds nan at \[7, 5\]")


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "mixtral"])
def test_experts_one_at_a_time_are_those_of_the_stack(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make(name, tmp_path / "hf"))
    recipe = Recipe(dict.fromkeys(checkpoint.tensors, "Q8_0"), "Q8_0", 0, 0.0, None)
    export(checkpoint, recipe, None, tmp_path / "m.gguf")
    for opened in (checkpoint, open_checkpoint(tmp_path / "m.gguf", allow_requantize=True)):
        stacks = [n for n, info in opened.tensors.items() if len(info.shape) == 3]
        assert len(stacks) in (9, 12)
        for n in [*stacks, "token_embd.weight"]:
            whole = opened.read(n)
            found = list(opened.matrices(n))
            np.testing.assert_array_equal(np.stack(found) if n in stacks else found[0], whole)
