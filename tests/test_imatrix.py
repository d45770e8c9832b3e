import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from dynq.checkpoint import TensorInfo
from dynq.errors import DynqError
from dynq.imatrix import Importance, read_imatrix, write_imatrix


@pytest.fixture
def importance() -> Importance:
    rng = np.random.default_rng(0)
    names = {"blk.1.ffn_up.weight": (1, 48), "blk.0.ffn_down_exps.weight": (4, 32), "output.weight": (1, 7)}
    sums = {name: rng.random(shape, dtype=np.float32) * 1000 for name, shape in names.items()}
    counts = {name: np.full(shape[0], 512, np.float32) for name, shape in names.items()}
    counts["blk.0.ffn_down_exps.weight"] = np.array([1000, 3, 0, 40], np.float32)
    sums["blk.0.ffn_down_exps.weight"][2] = 0
    return Importance(sums, counts, ["prompts über alles.txt", "b.txt"], chunk_count=2, chunk_size=256)


def legacy_bytes(entries: list[tuple[str, int, np.ndarray]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += values.astype("<f4").tobytes()
    return data + tail


def test_written_file_is_read_back_unchanged(tmp_path: Path, importance: Importance) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance)
    back = read_imatrix(path)
    assert list(back.sums) == sorted(importance.sums)
    for name in importance.sums:
        np.testing.assert_array_equal(back.sums[name], importance.sums[name])
        np.testing.assert_array_equal(back.counts[name], importance.counts[name])
        assert back.sums[name].dtype == back.counts[name].dtype == np.float32
    assert (back.datasets, back.chunk_count, back.chunk_size) == (importance.datasets, 2, 256)
    assert [file.name for file in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_layout_is_that_of_llama_imatrix(tmp_path: Path, importance: Importance) -> None:
    """Names, key types and dimensions as tools/imatrix/imatrix.cpp writes them (dimensions in GGUF order)."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance)
    reader = GGUFReader(path)
    fields = {name: [t.name for t in field.types] for name, field in reader.fields.items() if "GGUF." not in name}
    assert fields == {
        "general.type": ["STRING"],
        "imatrix.datasets": ["ARRAY", "STRING"],
        "imatrix.chunk_count": ["UINT32"],
        "imatrix.chunk_size": ["UINT32"],
    }
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        ("blk.0.ffn_down_exps.weight.in_sum2", [32, 4]),
        ("blk.0.ffn_down_exps.weight.counts", [1, 4]),
        ("blk.1.ffn_up.weight.in_sum2", [48]),
        ("blk.1.ffn_up.weight.counts", [1]),
        ("output.weight.in_sum2", [7]),
        ("output.weight.counts", [1]),
    ]


def test_bytes_do_not_depend_on_insertion_order(tmp_path: Path, importance: Importance) -> None:
    write_imatrix(tmp_path / "a", importance)
    reordered = Importance(
        dict(reversed(importance.sums.items())), dict(reversed(importance.counts.items())), importance.datasets, 2, 256
    )
    write_imatrix(tmp_path / "b", reordered)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_mean_of_a_plain_layer(importance: Importance) -> None:
    name = "blk.1.ffn_up.weight"
    mean = importance.mean(name)
    assert mean is not None and mean.shape == (48,) and mean.dtype == np.float32
    np.testing.assert_allclose(mean, importance.sums[name][0] / 512, rtol=1e-6)
    assert importance.mean("blk.9.ffn_up.weight") is None
    importance.counts[name][:] = 0
    assert importance.mean(name) is None


def test_experts_shrink_toward_their_common_mean(importance: Importance) -> None:
    name = "blk.0.ffn_down_exps.weight"
    sums, counts = importance.sums[name], importance.counts[name]
    mean = importance.mean(name)
    assert mean is not None and mean.shape == (4, 32)
    pooled = sums.sum(axis=0) / counts.sum()
    np.testing.assert_allclose(mean[2], pooled, rtol=1e-6)  # no token: exactly the common mean, and no ones
    np.testing.assert_allclose(mean[0], sums[0] / 1000, rtol=0.02, atol=0.02 * pooled.max())
    own = sums[1] / 3  # three tokens: between its own and the common mean, nearer to the common one
    weight = (mean[1] - pooled) / (own - pooled)
    np.testing.assert_allclose(weight, 3 / 19, rtol=1e-3)
    assert importance.rare() == {name: [1, 2]}
    assert importance.rare(1) == {name: [2]}
    assert importance.rare(0) == {}


def test_row_splits_a_merged_tensor_and_names_a_wrong_model(importance: Importance) -> None:
    mean = importance.mean("blk.1.ffn_up.weight", row=16)
    whole = importance.mean("blk.1.ffn_up.weight", row=48)
    assert mean is not None and whole is not None and mean.shape == (3, 16) and whole.shape == (48,)
    np.testing.assert_array_equal(mean.ravel(), whole)
    for name in ("blk.1.ffn_up.weight", "blk.0.ffn_down_exps.weight"):
        with pytest.raises(DynqError, match=rf"{name} has .* rows have 17"):
            importance.mean(name, row=17)


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [(b"", 0, []), (struct.pack("<i", 5), 5, []), (struct.pack("<ii", 5, 3) + b"abc", 5, ["abc"])],
)
def test_legacy_file(tmp_path: Path, tail: bytes, chunks: int, datasets: list[str]) -> None:
    values = np.arange(6)
    path = tmp_path / "old.dat"
    path.write_bytes(legacy_bytes([("blk.0.attn_q.weight", 4, values), ("blk.0.attn_k.weight", 0, values)], tail))
    importance = read_imatrix(path)
    np.testing.assert_array_equal(importance.mean("blk.0.attn_q.weight"), np.float32(values / 4))
    np.testing.assert_array_equal(importance.mean("blk.0.attn_k.weight"), np.float32(values))  # 0 calls: means already
    experts = importance.mean("blk.0.attn_q.weight", row=3)
    assert experts is not None and experts.shape == (2, 3)
    assert (importance.chunk_count, importance.datasets) == (chunks, datasets)


def test_every_truncation_is_a_clear_error(tmp_path: Path, importance: Importance) -> None:
    write_imatrix(tmp_path / "whole", importance)
    gguf = (tmp_path / "whole").read_bytes()
    legacy = legacy_bytes([("blk.0.attn_q.weight", 4, np.arange(6))], struct.pack("<ii", 5, 3) + b"abc")
    path = tmp_path / "cut"
    optional_tail = len(legacy) - 11, len(legacy) - 7  # after the entries, after the chunk count: valid old files
    for data, step, fine in ((gguf[:-32], 37, ()), (legacy, 3, optional_tail)):
        for size in range(0, len(data), step):
            if size in fine:
                continue
            path.write_bytes(data[:size])
            with pytest.raises(DynqError, match="cut"):
                read_imatrix(path)


def test_wrong_files_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DynqError, match=r"missing\.gguf"):
        read_imatrix(tmp_path / "missing.gguf")
    with pytest.raises(DynqError, match="cannot be read"):
        read_imatrix(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Not an importance matrix, just some words in a file.\n" * 9)
    with pytest.raises(DynqError, match=r"text\.txt: no importance matrix"):
        read_imatrix(text)
    model = tmp_path / "model.gguf"
    writer = GGUFWriter(model, "llama")
    writer.add_tensor("output.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DynqError, match=r"model\.gguf: a GGUF file of type 'model'"):
        read_imatrix(model)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_impossible_values_are_named(tmp_path: Path, importance: Importance, bad: float) -> None:
    importance.sums["blk.1.ffn_up.weight"][0, 5] = bad
    with pytest.raises(DynqError, match=r"sums of blk\.1\.ffn_up\.weight hold .* at position 5"):
        write_imatrix(tmp_path / "imatrix.gguf", importance)
    path = tmp_path / "old.dat"
    path.write_bytes(legacy_bytes([("x", 1, np.array([1.0, bad]))]))
    with pytest.raises(DynqError, match=r"sums of x hold .* at position 1"):
        read_imatrix(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, importance: Importance, monkeypatch) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DynqError, match="the disk is full"):
        write_imatrix(path, importance)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_real_quantizer_takes_a_file_without_datasets(tmp_path: Path, importance: Importance) -> None:
    """llama-quantize refuses a file that lacks imatrix.datasets, so the key is there even when nobody named a text."""
    importance.datasets = []
    write_imatrix(tmp_path / "imatrix.gguf", importance)
    assert read_imatrix(tmp_path / "imatrix.gguf").datasets == ["unnamed"]


def test_a_foreign_matrix_is_completed_and_another_models_is_refused():
    tensors = {
        name: TensorInfo(name, shape, "F32")
        for name, shape in (
            ("blk.0.attn_q.weight", (4, 32)),
            ("blk.0.ffn_up.weight", (4, 32)),
            ("blk.0.n.weight", (32,)),
        )
    }
    ones, counts = np.ones((1, 32), np.float32), np.ones(1, np.float32)
    foreign = Importance({"blk.0.attn_q.weight": 2 * ones}, {"blk.0.attn_q.weight": counts})
    own = Importance(dict.fromkeys(tensors, ones), dict.fromkeys(tensors, counts))
    assert foreign.check_model(tensors, "their.gguf") == ["blk.0.ffn_up.weight"]
    both = foreign.completed(own)
    assert both.mean("blk.0.attn_q.weight")[0] == 2 and both.mean("blk.0.ffn_up.weight")[0] == 1
    assert both.check_model(tensors, "both") == []
    with pytest.raises(DynqError, match=r"their.gguf: has none of the model's tensors"):
        Importance({}, {}).check_model(tensors, "their.gguf")
    for length in (24, 64):
        other = Importance({"blk.0.attn_q.weight": np.ones((1, length), np.float32)}, {"blk.0.attn_q.weight": counts})
        with pytest.raises(DynqError, match="another model"):
            other.check_model(tensors, "their.gguf")
