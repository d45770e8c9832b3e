"""Calibration: the same bytes whatever the number of threads, and layer by layer what the whole model gives."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from families import MODELS

from dynq import layerwise, memory
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld, precision
from dynq.torch_model import load_model


def _text(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(2, tiny_models.VOCAB - 64, (n, 24)).astype(np.int32)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("llama")))


def test_bytes_do_not_depend_on_threads(llama: Checkpoint, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        calibrate(llama, load_model(llama), _text(), tmp_path / str(threads), keep=12, threads=threads)
    one, three = _files(tmp_path / "1"), _files(tmp_path / "3")
    names = ["fisher/00000.safetensors", "fisher/00001.safetensors", "fisher/00002.safetensors", "imatrix.gguf"]
    assert sorted(one) == sorted(three) == names
    assert [name for name in names if one[name] != three[name]] == []
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("kind", "has", "lacks"), [("llama", "output", "token_embd"), ("gemma2", "token_embd", "output")]
)
def test_the_head_has_importance_and_a_look_up_has_none(kind: str, has: str, lacks: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make(kind, tmp_path / "model"))
    found = calibrate(checkpoint, load_model(checkpoint), _text(1), tmp_path, keep=1)
    missing = {name for name, info in checkpoint.tensors.items() if info.quantizable} - found.sums.keys()
    assert f"{has}.weight" in found.sums and f"{lacks}.weight" not in found.sums
    assert missing == ({"token_embd.weight"} if lacks == "token_embd" else set())


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
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
    assert _files(whole) == _files(parts)


@pytest.mark.parametrize("streamed", [True, False])
def test_it_goes_on_from_the_sequences_that_are_there(llama: Checkpoint, tmp_path: Path, streamed: bool) -> None:
    """Also where the other way made them; what a killed calibration left beside them is cleared away."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (cut / "fisher.parts" / "0").mkdir(parents=True)
    (cut / "fisher.parts" / "0" / "00000.safetensors").write_bytes(b"half")
    for folder in (whole, cut):
        folder.mkdir(exist_ok=True)
        calibrate(llama, load_model(llama, streamed=not streamed), _text(), folder, keep=12, threads=1)
    made = (cut / "fisher" / "00001.safetensors").stat().st_mtime_ns
    for name in ("00000", "00002"):
        (cut / "fisher" / f"{name}.safetensors").unlink()
    for _ in range(2):  # in the end nothing is to be done
        calibrate(llama, load_model(llama, streamed=streamed), _text(), cut, keep=12, threads=1)
        assert _files(whole) == _files(cut)
    assert (cut / "fisher" / "00001.safetensors").stat().st_mtime_ns == made


def _held(model: Any) -> list[int]:
    """The layers that are in memory."""
    layers = layerwise.decoder_layers(model)
    return [i for i, layer in enumerate(layers) if any(parameter.numel() for parameter in layer.parameters())]


def test_a_streamed_model_gives_the_same_logits(llama: Checkpoint) -> None:
    model = load_model(llama, streamed=True)
    assert _held(model) == []
    ids = torch.from_numpy(_text(1).astype(np.int64))
    with torch.inference_mode():  # twice: a text is sampled by calling the model over and over
        for _ in range(2):
            assert torch.equal(model(ids).logits, load_model(llama)(ids).logits)
    calibrated = [parameter.data.clone() for parameter in layerwise.decoder_layers(model)[-1].parameters()]
    assert calibrated and not any(values.is_inference() for values in calibrated)


def _watched(model: Any, reads: Callable[[int], None], computes: Callable[[int], None]) -> None:
    """Call `reads` before each tensor of a layer is read, `computes` in the middle of the layer's forward pass."""
    reader, fill = layerwise.reader(model), model.layer_reader._fill

    def filling(name: str) -> None:
        reads(reader.checkpoint.tensors[name].layer)
        fill(name)

    reader._fill = filling
    for i, layer in enumerate(layerwise.decoder_layers(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: computes(i))


def test_the_next_layer_is_read_while_one_computes(tmp_path: Path) -> None:
    """Each layer's forward pass goes on only when the next layer is being read, which can only be at the same time."""
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path / "model", num_hidden_layers=4))
    model, begun = load_model(checkpoint, streamed=True), [Event() for _ in range(4)]

    def computes(i: int) -> None:
        assert i in _held(model) and len(_held(model)) <= 2
        assert i == 3 or begun[i + 1].wait(30), f"layer {i + 1} is not read while layer {i} computes"

    _watched(model, lambda i: begun[i].set(), computes)
    layerwise.through(model, _text(2))
    assert _held(model) == [3]  # what nobody will ask for is not read


def test_two_layers_are_in_memory_at_most(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path / "model", num_hidden_layers=4))
    model, held, order = load_model(checkpoint, streamed=True), [], []

    def reads(i: int) -> None:
        held.append(_held(model))
        if order[-1:] != [i]:
            order.append(i)

    _watched(model, reads, lambda i: held.append(_held(model)))
    calibrate(checkpoint, model, _text(), tmp_path, keep=12, threads=2)
    assert order == [0, 1, 2, 3, 2, 1, 0]  # each once forward, once backward
    assert max(map(len, held)) == 2 and len(_held(model)) == 1


def test_an_error_in_the_next_layer_is_raised_where_it_is_called(llama: Checkpoint) -> None:
    model, last = load_model(llama, streamed=True), len(layerwise.decoder_layers(load_model(llama, streamed=True))) - 1

    def reads(i: int) -> None:
        if i == last:
            raise DynqError("a damaged file")

    _watched(model, reads, lambda i: None)
    for _ in range(2):
        with pytest.raises(DynqError, match="a damaged file"):
            layerwise.through(model, _text(1))


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
