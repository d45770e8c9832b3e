"""Small random GGUFs of architectures that llama.cpp runs and dynq does not know: gpt2 and mamba."""

from pathlib import Path

import gguf
import numpy as np
import tiny_models

from dynq import tokenizer
from dynq.imatrix import Importance

VOCAB, WIDTH, LAYERS = 384, 256, 2


def _gpt2(writer: gguf.GGUFWriter) -> dict[str, tuple[int, ...]]:
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "position_embd.weight": (512, WIDTH)}
    shapes |= {"output_norm.weight": (WIDTH,), "output_norm.bias": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (WIDTH,), "attn_qkv": (3 * WIDTH, WIDTH), "ffn_norm": (WIDTH,)}
    layer |= {"attn_output": (WIDTH, WIDTH), "ffn_up": (2 * WIDTH, WIDTH), "ffn_down": (WIDTH, 2 * WIDTH)}
    for i in range(LAYERS):
        for kind, shape in layer.items():
            shapes |= {f"blk.{i}.{kind}.weight": shape, f"blk.{i}.{kind}.bias": shape[:1]}
    return shapes


def _mamba(writer: gguf.GGUFWriter) -> dict[str, tuple[int, ...]]:
    inner, state, rank = 2 * WIDTH, 16, 32
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(LAYERS)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = {"attn_norm.weight": (WIDTH,), "ssm_in.weight": (2 * inner, WIDTH), "ssm_conv1d.weight": (inner, 4)}
        layer |= {"ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.bias": (inner,)}
        layer |= {"ssm_dt.weight": (inner, rank), "ssm_a": (inner, state), "ssm_d": (inner,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (layer | {"ssm_out.weight": (WIDTH, inner)}).items()}
    return shapes


def make(arch: str, path: Path, *, seed: int = 0, quantized: bool = False) -> Path:
    """Matrices are F16 (Q8_0 if quantized), the rest is F32. Some keys have types that dynq itself never writes."""
    tokens = path.with_name("tokens")
    text = [f"the quick brown fox {i * i} jumps over the lazy dog" for i in range(200)]
    tokens.mkdir(exist_ok=True)
    tiny_models.byte_level("gpt-2", text, tokens, vocab_size=VOCAB - 60, alphabet=[chr(i) for i in range(33, 127)])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    shapes = {"gpt2": _gpt2, "mamba": _mamba}[arch](writer)
    for key, value in tokenizer.from_directory(tokens, VOCAB).items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    writer.add_uint64("a.large.number", 5)
    writer.add_float64("a.precise.number", 0.1)
    writer.add_int8("a.small.number", -5)
    writer.add_key_value("some.bytes", b"\x00\xff\x80", gguf.GGUFValueType.ARRAY)
    writer.add_key_value("some.words", ["é", "", "日本"], gguf.GGUFValueType.ARRAY)
    writer.add_string("a.word", "última")
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = rng.normal(0, 1.5 / np.sqrt(shape[-1]), shape).astype(np.float32)
        if name.endswith("norm.weight"):
            values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name.endswith("ssm_a"):
            values = -np.abs(values) - 0.5
        elif name.endswith(("ssm_x.weight", "ssm_in.weight")):
            values[:, :8] *= 4  # channels that are louder than others
        if len(shape) > 1 and name.endswith(".weight") and "conv1d" not in name:
            if quantized and name.startswith("blk."):
                data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                continue
            values = values.astype(np.float16)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def importance(path: Path, *, seed: int = 0) -> Importance:
    """Importance of the kind that llama-imatrix finds, of every matrix but the embedding."""
    rng = np.random.default_rng(seed)
    sums = {
        tensor.name: rng.gamma(0.5, 10, (1, int(tensor.shape[0]))).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight") and "_embd" not in tensor.name
    }
    return Importance(sums, {name: np.array([64], np.float32) for name in sums}, ["text"], 1, 64)
