"""Checkpoints in float8 with tiles of scales, and in MXFP4: read as torch, transformers and a scalar twin read them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit, refuses
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dynq import codec, safetensors_reader
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.kernels import floats
from dynq.kernels import packed as kernels
from dynq.reference import packed as reference
from dynq.torch_model import load_model

State = dict[str, torch.Tensor]
MATRIX = "model.layers.1.mlp.up_proj.weight"
V_PROJ = "model.layers.0.self_attn.v_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def change(directory: Path, how: Callable[[State], State]) -> Path:
    path = directory / "model.safetensors"
    state = how(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return directory


# --- float8 -----------------------------------------------------------------------------------------------------------


def in_float8(state: State, tile: tuple[int, int], scale_type: torch.dtype = torch.float32) -> State:
    """Every projection in random codes, all 254 that are numbers, with a scale for each tile."""
    generator = torch.Generator().manual_seed(0)
    packed = dict(state)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        shape = state[name].shape
        codes = torch.randint(0, 127, shape, generator=generator) + 128 * torch.randint(
            0, 2, shape, generator=generator
        )
        tiles = [-(-size // side) for size, side in zip(shape, tile, strict=True)]
        packed[name] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = (torch.rand(tiles, generator=generator) * 0.01 + 0.001).to(scale_type)
    return packed


def float8(directory: Path, tile: tuple[int, int] | None, **options: Any) -> Path:
    settings = {"quant_method": "fp8"} | ({"weight_block_size": list(tile)} if tile else {})
    edit(directory / "config.json", quantization_config=settings)
    return change(directory, lambda state: in_float8(state, tile or (128, 128), **options))


def twin(codes: np.ndarray, scales: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """OCP's E4M3, one number at a time."""
    out = np.empty(codes.shape, np.float32)
    for (i, j), code in np.ndenumerate(codes):
        exponent, mantissa = int(code) >> 3 & 15, int(code) & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        out[i, j] = np.float32(-size if code & 128 else size) * scales[i // tile[0], j // tile[1]]
    return out


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Sizes that tiles of 128 divide, and 160 rows of feed-forward, which they do not."""
    return tiny_models.make("llama-tied", tmp_path / "llama", hidden_size=256)


@pytest.mark.parametrize("tile", [(128, 128), (32, 64), (100, 7), None])
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
def test_float8(tile: tuple[int, int] | None, scale_type: torch.dtype, llama: Path) -> None:
    checkpoint = open_checkpoint(float8(llama, tile, scale_type=scale_type))
    stored = load_file(llama / "model.safetensors")
    rows, columns = tile or (128, 128)
    divided = 0
    for gguf_name, name in [("blk.1.ffn_up.weight", MATRIX), ("blk.0.attn_v.weight", V_PROJ)]:
        codes, scales = stored[name], stored[f"{name}_scale_inv"]
        read = checkpoint.read(gguf_name)
        assert checkpoint.tensors[gguf_name].dtype == "F8_E4M3"
        assert np.array_equal(read, twin(codes.view(torch.uint8).numpy(), scales.float().numpy(), (rows, columns)))
        if codes.shape[0] % rows == 0 and codes.shape[1] % columns == 0:  # transformers wants whole tiles
            divided += 1
            theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
            assert np.array_equal(read, theirs.numpy())
    assert divided or tile == (100, 7)


def test_every_code_of_float8_is_what_torch_says(llama: Path) -> None:
    path = float8(llama, (128, 128))
    stored = load_file(path / "model.safetensors")
    assert len(np.unique(stored[V_PROJ].view(torch.uint8).numpy())) == 254
    change(path, lambda state: state | {f"{V_PROJ}_scale_inv": torch.ones_like(state[f"{V_PROJ}_scale_inv"])})
    assert torch.equal(load_model(open_checkpoint(path)).get_parameter(V_PROJ), stored[V_PROJ].float())


def test_experts_in_float8_one_by_one_and_stacked(tmp_path: Path) -> None:
    """DeepSeek V3's matrices of experts, and the stack that transformers saves of them."""
    directory = tiny_models.make("deepseek3", tmp_path / "model")
    edit(directory / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [32, 48]})
    apart = open_checkpoint(change(directory, lambda state: in_float8(state, (32, 48))))
    name = "model.layers.2.mlp.experts.{}.down_proj.weight"
    stored = load_file(directory / "model.safetensors")
    wanted = [
        Fp8Dequantize(None)._dequantize_one(stored[n], stored[f"{n}_scale_inv"], torch.float32)
        for n in map(name.format, range(8))
    ]
    assert np.array_equal(apart.read("blk.2.ffn_down_exps.weight"), torch.stack(wanted).numpy())

    def stacked(state: State) -> State:
        names = [name.format(i) for i in range(8)]
        whole = {"model.layers.2.mlp.experts.down_proj": torch.stack([state[n].view(torch.uint8) for n in names])}
        whole = {n: t.view(torch.float8_e4m3fn) for n, t in whole.items()}
        whole["model.layers.2.mlp.experts.down_proj_scale_inv"] = torch.stack([state[f"{n}_scale_inv"] for n in names])
        return {n: t for n, t in state.items() if n.removesuffix("_scale_inv") not in names} | whole

    together = open_checkpoint(change(directory, stacked))
    assert np.array_equal(together.read("blk.2.ffn_down_exps.weight"), torch.stack(wanted).numpy())
    assert np.array_equal(np.stack(list(together.matrices("blk.2.ffn_down_exps.weight"))), torch.stack(wanted).numpy())


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def cut(
    name: str, *, to: tuple[slice, ...] | None = None, dtype: torch.dtype | None = None
) -> Callable[[State], State]:
    return lambda state: state | {name: (state[name][to] if to else state[name]).to(dtype or state[name].dtype)}


SCALE = f"{MATRIX}_scale_inv"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (without(SCALE), rf"{MATRIX} is packed \(F8_E4M3\), but {SCALE} is missing"),
        (without(MATRIX), rf"tensor {SCALE} has no place"),
        (
            cut(SCALE, to=(slice(0, 1),)),
            rf"{SCALE} has shape \[1, 2\], {MATRIX} \[160, 256\] in tiles of \[128, 128\] wants \[2, 2\]",
        ),
        (lambda state: state | {SCALE: state[SCALE].repeat(2, 1)}, r"has shape \[4, 2\].* wants \[2, 2\]"),
        (lambda state: state | {SCALE: torch.tensor(0.5)}, r"has shape \[\].* wants \[2, 2\]"),
        (lambda state: state | {MATRIX: state[MATRIX][0]}, r"has shape \[256\]: only matrices have tiles with scales"),
        (cut(SCALE, dtype=torch.uint8), rf"{MATRIX} is in F8_E4M3 with scales in U8, which is not read"),
        (cut(MATRIX, dtype=torch.bfloat16), rf"{MATRIX} is in BF16 with scales in F32, which is not read"),
        (lambda state: state | {SCALE: state[SCALE] * float("nan")}, rf"{MATRIX} \(blk\.1\.ffn_up\.weight\) holds nan"),
        (lambda state: state | {MATRIX: state[MATRIX].view(torch.uint8)}, r"with scales in F32, which is not read"),
    ],
)
def test_damaged_float8(how: Callable[[State], State], message: str, llama: Path) -> None:
    refuses(change(float8(llama, None), how), message)


@pytest.mark.parametrize("tile", [[0, 128], [128, -128], [128.0, 128], [128], [True, 128], ["128", 128], 128, {"a": 1}])
def test_tiles_that_are_none(tile: Any, llama: Path) -> None:
    edit(float8(llama, None) / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": tile})
    refuses(llama, r"config\.json(: damaged|.* says tiles of)")


# --- MXFP4 ------------------------------------------------------------------------------------------------------------


def in_mxfp4(state: State) -> State:
    """Every stack of experts [expert, in, out] in random blocks, all 256 bytes, and scales from 2^-13 to 2^-4."""
    generator = torch.Generator().manual_seed(0)
    packed = {}
    for name, tensor in state.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        experts, n_in, n_out = tensor.shape
        blocks = torch.randint(0, 256, (experts, n_out, n_in // 32, 16), generator=generator)
        packed[f"{name}_blocks"] = blocks.to(torch.uint8)
        packed[f"{name}_scales"] = torch.randint(114, 124, blocks.shape[:3], generator=generator).to(torch.uint8)
    return packed


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    directory = tiny_models.make("gpt-oss", tmp_path / "gpt-oss")
    edit(directory / "config.json", quantization_config={"quant_method": "mxfp4"})
    return change(directory, in_mxfp4)


def test_mxfp4(gpt_oss: Path) -> None:
    stored = load_file(gpt_oss / "model.safetensors")
    checkpoint = open_checkpoint(gpt_oss)
    model = load_model(checkpoint)
    for name in (EXPERTS, EXPERTS.replace("gate_up", "down")):
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(model.get_parameter(name), theirs)
    gates = checkpoint.read("blk.1.ffn_gate_exps.weight")
    assert checkpoint.tensors["blk.1.ffn_gate_exps.weight"].dtype == "MXFP4"
    assert np.array_equal(np.stack(list(checkpoint.matrices("blk.1.ffn_gate_exps.weight"))), gates)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    blocks, scales = stored[f"{EXPERTS}_blocks"].numpy(), stored[f"{EXPERTS}_scales"].numpy()
    for expert, row, column in [(0, 0, 0), (3, 5, 33), (5, 159, 127), (2, 80, 64), (4, 7, 94)]:
        byte = int(blocks[expert, 2 * row, column // 32, column % 32 // 2])  # gates are the even rows
        code = byte >> 4 if column % 2 else byte & 15
        scale = 2.0 ** (int(scales[expert, 2 * row, column // 32]) - 127)
        assert gates[expert, row, column] == magnitudes[code & 7] * (-1.0 if code & 8 else 1.0) * scale


def test_mxfp4_reaches_from_the_smallest_to_the_largest_scale(gpt_oss: Path) -> None:
    """2^-127, which is no normal float32, to 6 * 2^125: the greatest that a float32 holds; 255 stands for NaN."""
    name = f"{EXPERTS}_scales"

    def extreme(state: State) -> State:
        scales = state[name].clone()
        scales[0], scales[1] = 0, 252
        return state | {name: scales}

    checkpoint = open_checkpoint(change(gpt_oss, extreme))
    stored = load_file(gpt_oss / "model.safetensors")
    theirs = convert_moe_packed_tensors(stored[f"{EXPERTS}_blocks"], stored[name], dtype=torch.float32)
    ups = checkpoint.read("blk.1.ffn_up_exps.weight")
    assert np.array_equal(ups, theirs[..., 1::2].swapaxes(1, 2).numpy())
    assert 0 < np.abs(ups[0][ups[0] != 0]).min() == 2.0**-128 and np.abs(ups[1]).max() == 6 * 2.0**125
    refuses(change(gpt_oss, lambda state: state | {name: torch.full_like(state[name], 255)}), "holds")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (without(f"{EXPERTS}_scales"), rf"{EXPERTS}_blocks is packed \(U8\), but its scales or its blocks are missing"),
        (without(f"{EXPERTS}_blocks"), rf"{EXPERTS}_scales is packed \(U8\), but its scales or its blocks are missing"),
        (
            lambda state: {name: t for name, t in state.items() if not name.startswith(EXPERTS)},
            rf"missing, the first is {EXPERTS}",
        ),
        (cut(f"{EXPERTS}_scales", to=(slice(0, 6), slice(0, 7))), rf"{EXPERTS}_scales has shape \[6, 7, 4\]"),
        (cut(f"{EXPERTS}_blocks", to=(..., slice(0, 8))), r"has shape \[6, 320, 4, 8\], MXFP4 wants \[6, 320, 4, 16\]"),
        (cut(f"{EXPERTS}_scales", dtype=torch.float32), rf"{EXPERTS}_scales is in F32, MXFP4 wants U8"),
    ],
)
def test_damaged_mxfp4(how: Callable[[State], State], message: str, gpt_oss: Path) -> None:
    refuses(change(gpt_oss, how), message)


# --- both -------------------------------------------------------------------------------------------------------------


def test_other_packings_are_refused_by_name(llama: Path) -> None:
    edit(llama / "config.json", quantization_config={"quant_method": "awq"})
    refuses(llama, r"quantized already \(awq\)")


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    directory = tiny_models.make("deepseek3", tmp_path / "model")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    change(directory, cut(name, to=(slice(0, 1),)))
    refuses(directory, rf"{name} has shape \[1, 128\], the stack blk\.2\.ffn_up_exps\.weight wants \[96, 128\]")


def test_header_whose_sizes_do_not_fit(llama: Path) -> None:
    path = llama / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[MATRIX]["shape"][0] += 1
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    refuses(llama, rf"tensor {MATRIX} has 163,840 bytes, its shape wants 164,864")


# --- kernels and their twins ------------------------------------------------------------------------------------------

CODES = np.arange(256, dtype=np.uint8)


def same(ours: np.ndarray, wanted: np.ndarray, largest: int) -> None:
    """Bit for bit, but for NaN, of which there are many; `largest` says whether there is any, or infinity."""
    nan = np.isnan(wanted)
    assert np.array_equal(nan, np.isnan(ours))
    assert np.array_equal(ours[~nan].view(np.uint32), wanted[~nan].view(np.uint32))
    assert (largest < 0x7F800000) == np.isfinite(wanted).all()
    if not nan.any():
        assert largest == np.abs(wanted).max().view(np.uint32)


@pytest.mark.parametrize("finite", [True, False])
def test_every_code_of_the_wide_floats(finite: bool) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for decode, wanted in ((floats.decode_bf16, reference.bf16(bits)), (floats.decode_f16, reference.f16(bits))):
        chosen = np.isfinite(wanted) if finite else ...
        out = np.empty_like(wanted[chosen])
        same(
            out,
            wanted[chosen],
            decode(bits[chosen].ravel(), out.view(np.uint32 if decode is floats.decode_bf16 else np.float32)),
        )


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.37, 2.0**-140, 1e-30, 7.5e35, 1e36, np.inf, np.nan])
def test_every_code_of_float8_with_any_scale(scale: float) -> None:
    """Products that are no normal float32, and such that a float32 does not hold."""
    for codes in (CODES, CODES[CODES & 127 != 127]):
        scales, out = np.full((1, 1), scale, np.float32), np.empty((1, len(codes)), np.float32)
        with np.errstate(all="ignore"):
            wanted = reference.e4m3(codes[None], scales, (1, 256))
        same(out, wanted, kernels.decode_e4m3(codes[None], scales, np.zeros(1, np.int64), 256, out))


def test_every_code_and_scale_of_mxfp4() -> None:
    blocks, tables = CODES.reshape(16, 16), (kernels.pairs(), kernels.powers())
    for scale in range(256):
        scales, out = np.full(16, scale, np.uint8), np.empty((16, 32), np.float32)
        with np.errstate(all="ignore"):
            wanted = reference.mxfp4(blocks, scales).reshape(16, 32)
        same(out, wanted, kernels.decode_pairs(blocks, scales, *tables, out.view(np.uint64), out))


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few thousand weights in many pieces, by three threads."""
    monkeypatch.setattr(safetensors_reader, "_PIECE", 1000)
    monkeypatch.setattr(codec, "cores", lambda: 3)


STORED = {  # entries of a stack of 5 x 66 x 96 weights, and how NumPy reads them
    "BF16": lambda rng: (rng.integers(0, 0x7F80, (5, 66, 96)).astype("<u2"), reference.bf16),
    "F16": lambda rng: (rng.integers(0, 0x7C00, (5, 66, 96)).astype("<u2"), reference.f16),
    "F32": lambda rng: (rng.normal(size=(5, 66, 96)).astype("<f4"), lambda x: x),
    "F64": lambda rng: (rng.normal(size=(5, 66, 96)), lambda x: x.astype(np.float32)),
    "F8_E4M3": lambda rng: (
        rng.integers(0, 127, (5, 66, 96)).astype("u1"),
        lambda x: reference.e4m3(x, np.ones((5, 1, 1), np.float32), (66, 96)),
    ),
}


def stored(path: Path, name: str, dtype: str, values: np.ndarray) -> safetensors_reader._Stored:
    """Values in a file of their own, behind what belongs to another tensor."""
    (path / name).write_bytes(bytes(37) + values.tobytes())
    return safetensors_reader._Stored(path / name, name, dtype, values.shape, 37)


@pytest.mark.parametrize("dtype", STORED)
def test_pieces_are_the_whole(dtype: str, tmp_path: Path, pieces: None) -> None:
    values, by_numpy = STORED[dtype](np.random.default_rng(0))
    item, wanted = stored(tmp_path, "x", dtype, values), by_numpy(values)
    found, finite = item.load()
    assert finite and np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
    out = np.zeros((2, 1, 66, 96), np.float32)
    given, _ = item.one(3).load(out[1])
    assert given is not out and np.shares_memory(given, out)
    assert np.array_equal(out[1, 0], wanted[3]) and not out[0].any()


@pytest.mark.parametrize("tile", [(128, 128), (1, 1), (7, 100), (32, 32), (66, 5)])
def test_pieces_of_float8_are_the_whole(tile: tuple[int, int], tmp_path: Path, pieces: None) -> None:
    rng = np.random.default_rng(0)
    codes = (rng.integers(0, 127, (5, 66, 96)) + 128 * rng.integers(0, 2, (5, 66, 96))).astype(np.uint8)
    scales = rng.normal(size=(5, -(-66 // tile[0]), -(-96 // tile[1]))).astype(np.float32)
    parts = stored(tmp_path, "x", "F8_E4M3", codes), stored(tmp_path, "s", "F32", scales)
    item = safetensors_reader._Scaled(*parts, tile)
    wanted = reference.e4m3(codes, scales, tile)
    found, finite = item.load()
    assert finite and np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
    assert np.array_equal(item.one(2).load()[0][0], wanted[2])


def test_pieces_of_mxfp4_are_the_whole(tmp_path: Path, pieces: None) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (5, 66, 3, 16)).astype(np.uint8)
    scales = rng.integers(0, 253, (5, 66, 3)).astype(np.uint8)
    item = safetensors_reader._Mxfp4(stored(tmp_path, "b", "U8", blocks), stored(tmp_path, "s", "U8", scales))
    wanted = reference.mxfp4(blocks, scales).swapaxes(1, 2)
    found, finite = item.load()
    assert finite and np.array_equal(found, wanted) and np.array_equal(np.signbit(found), np.signbit(wanted))
    out = np.zeros((1, 96, 66), np.float32)
    item.one(4).load(out)
    assert np.array_equal(out[0], wanted[4])


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        *(("BF16", 0x7F80), ("BF16", 0xFFC1), ("F16", 0xFC00), ("F16", 0x7C01)),
        *(("F32", np.nan), ("F64", -1e39), ("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF)),
    ],
)
def test_one_value_that_is_not_finite_is_found_in_any_piece(
    dtype: str, code: float, tmp_path: Path, pieces: None
) -> None:
    values, by_numpy = STORED[dtype](np.random.default_rng(0))
    for place in [(0, 0, 0), (2, 65, 31), (4, 65, 95)]:
        damaged = values.copy()
        damaged[place] = code
        with np.errstate(over="ignore"):
            value = by_numpy(damaged)[place]
        with pytest.raises(DynqError, match=re.escape(f"x (blk) holds {value} at {list(place)} (1 such values)")):
            safetensors_reader._finite(stored(tmp_path, "x", dtype, damaged), "blk")


def test_file_that_was_cut_meanwhile(tmp_path: Path, pieces: None) -> None:
    item = stored(tmp_path, "x", "BF16", np.zeros(5000, np.uint16))
    item.path.write_bytes(item.path.read_bytes()[:-1])
    with pytest.raises(DynqError, match="tensor x: the file ends before it does"):
        item.load()
