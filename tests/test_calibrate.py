"""Calibration: the same bytes whatever the number of threads, and layer by layer what the whole model gives."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from families import MODELS
from safetensors.torch import load_file

from dynq import layerwise, memory
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld, precision
from dynq.fisher import Fisher
from dynq.torch_model import load_model


def _text(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(2, tiny_models.VOCAB - 64, (n, 24)).astype(np.int32)


def _samples(folder: Path) -> dict[str, bytes]:
    """Every sampled tensor of every sequence, whatever the files."""
    found: dict[str, bytes] = {}
    for path in sorted((folder / "fisher").glob("*.safetensors")):
        sequence = path.name[:5]
        found |= {f"{sequence} {name}": values.numpy().tobytes() for name, values in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("llama")))


def test_bytes_do_not_depend_on_threads(llama: Checkpoint, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        calibrate(llama, load_model(llama), _text(), tmp_path / str(threads), keep=12, threads=threads)
    names = sorted(str(path.relative_to(tmp_path / "1")) for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert names == ["fisher/00000.safetensors", "fisher/00001.safetensors", "fisher/00002.safetensors", "imatrix.gguf"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make(name, tmp_path / "model"))
    if not checkpoint.architecture.layers_apart:
        with pytest.raises(DynqError, match="layers depend on each other"):
            load_model(checkpoint, streamed=True)
        return
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    text = _text()
    calibrate(checkpoint, load_model(checkpoint), text, whole, keep=12, threads=2)
    calibrate(checkpoint, load_model(checkpoint, streamed=True), text, parts, keep=12, threads=2)
    assert _samples(whole) == _samples(parts)
    assert (whole / "imatrix.gguf").read_bytes() == (parts / "imatrix.gguf").read_bytes()
    one, other = Fisher(whole / "fisher"), Fisher(parts / "fisher")
    assert (one.tokens, one.group, one.unit, one.shapes) == (other.tokens, other.group, other.unit, other.shapes)
    assert not list(parts.glob("layers-*"))


def test_a_streamed_model_has_one_layer_in_memory_and_the_same_logits(llama: Checkpoint) -> None:
    model = load_model(llama, streamed=True)
    layers = layerwise.decoder_layers(model)
    ids = torch.from_numpy(_text(1).astype(np.int64))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(llama)(ids).logits)
    held = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert held[-1] > 0 and not any(held[:-1])


def test_a_model_beyond_the_limit_is_streamed_and_measured_the_same(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _text()
    reference = kld.make_reference(load_model(llama), text, tmp_path / "reference", desc="")
    rounded = {name: np.round(llama.read(name) * 16) / 16 for name in llama.tensors}
    whole = kld.measure(load_model(llama, read=rounded.__getitem__), reference, desc="")
    monkeypatch.setenv(memory.LIMIT, f"{memory.resident(llama)}B")
    streamed = load_model(llama, read=rounded.__getitem__)
    assert layerwise.reader(streamed)
    parts, arithmetic = precision.measure(streamed, reference, desc="")
    assert arithmetic.dtype == "float32"
    np.testing.assert_allclose(parts.kld, whole.kld, rtol=1e-3, atol=1e-6)  # the head sees other numbers of rows
    assert parts.kld.mean() > 0.01
    monkeypatch.setenv(memory.LIMIT, f"{2 * memory.resident(llama)}B")
    assert not layerwise.reader(load_model(llama))


def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.LIMIT, "3.5bpw")
    with pytest.raises(DynqError, match=r"DYNQ_MEMORY='3\.5bpw' is not a number of bytes"):
        memory.available()
