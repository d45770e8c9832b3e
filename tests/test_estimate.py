"""GGUFs of architectures that dynq does not know: estimated, carried over as they are, measured in llama.cpp."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import unknown_models
from conftest import dynq_command

from dynq import codec, mixes
from dynq.allocate import allocate
from dynq.checkpoint import TensorInfo, open_checkpoint
from dynq.engine import generate
from dynq.errors import DynqError
from dynq.estimate import PRIOR, class_of, estimate, factor, layer_count
from dynq.export import export
from dynq.gguf_reader import Reader
from dynq.imatrix import write_imatrix
from dynq.recipe import Recipe
from dynq.torch_model import load_model

ARCHITECTURES = ("gpt2", "mamba")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("unknown")
    return {arch: unknown_models.make(arch, folder / f"{arch}.gguf") for arch in ARCHITECTURES}


def raw(path: Path) -> dict[str, bytes]:
    """Every key as the file has it, found by the places of the keys' names alone."""
    data, reader = path.read_bytes(), gguf.GGUFReader(path)
    keys = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    ends = [field.offset for field in keys[1:]] + [reader.tensors[0].field.offset]
    return {field.name: data[field.offset : end] for field, end in zip(keys, ends, strict=True)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_not_quantized_is_carried_over_bit_for_bit(arch: str, models: dict[str, Path], tmp_path: Path) -> None:
    source, path = models[arch], tmp_path / "small.gguf"
    checkpoint = open_checkpoint(source)
    importance = unknown_models.importance(source)
    table = estimate(checkpoint, importance, ("Q2_K", "IQ3_XXS", "Q4_K", "Q6_K", "Q8_0"))
    recipe = allocate(table, checkpoint.tensors, "4.5bpw", metadata=checkpoint.metadata)
    export(checkpoint, recipe, importance, path, imatrix_file="imatrix.gguf")
    before, after = raw(source), raw(path)
    anew = {"general.file_type"}
    assert {key: after[key] for key in before.keys() - anew} == {key: before[key] for key in before.keys() - anew}
    assert Reader(source).packed() == before
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kept = 0
    for tensor in gguf.GGUFReader(source).tensors:
        other = written[tensor.name]
        assert list(tensor.shape) == list(other.shape)
        if not checkpoint.tensors[tensor.name].quantizable:
            kept += 1
            assert tensor.tensor_type == other.tensor_type and tensor.data.tobytes() == other.data.tobytes()
    assert kept and len({t.tensor_type for t in written.values()}) > 3
    if arch == "gpt2":
        assert written["position_embd.weight"].tensor_type.name == "F16"
    pytest.importorskip("xllamacpp")
    assert len(generate(path, [2, 3, 5], 4, top=5).tokens) > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_rules_of_llama_cpp_name_what_is_not_quantized(arch: str, models: dict[str, Path]) -> None:
    tensors = open_checkpoint(models[arch]).tensors
    kept = {info.kind for info in tensors.values() if not info.quantizable and len(info.shape) > 1}
    assert kept == {"gpt2": {"position_embd"}, "mamba": {"ssm_conv1d", "ssm_a"}}[arch]
    for name in ("blk.0.time_mix_w1.weight", "enc.blk.0.attn_rel_b.weight", "token_types.weight"):
        assert not TensorInfo(name, (64, 64), "F16").quantizable


def test_an_estimate_is_the_relative_error_times_the_class(models: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(models["gpt2"])
    importance = unknown_models.importance(models["gpt2"])
    rows = estimate(checkpoint, importance, ("Q3_K", "Q8_0")).to_pylist()
    found = {(row["tensor"], row["format"]): row["predicted_kld"] for row in rows}
    for name, fused in (
        ("blk.1.ffn_down.weight", ("ffn_down",)),
        ("blk.0.attn_qkv.weight", ("attn_q", "attn_k", "attn_v")),
    ):
        weight, mean = checkpoint.read(name).astype(np.float64), importance.mean(name).astype(np.float64)
        decoded = codec.dequantize(codec.quantize(checkpoint.read(name), "Q3_K", importance.mean(name)), "Q3_K")
        relative = (mean * (weight - decoded) ** 2).sum() / (mean * weight**2).sum()
        expected = relative * sum(PRIOR[kind] for kind in fused) / unknown_models.LAYERS
        assert found[name, "Q3_K"] == pytest.approx(expected, rel=1e-4)
        assert found[name, "Q8_0"] < found[name, "Q3_K"] / 50
    bare = estimate(checkpoint, None, ("IQ2_XXS", "Q3_K")).to_pylist()
    assert {row["format"] for row in bare} == {"Q3_K"}
    with pytest.raises(DynqError, match="IQ2_XXS all need importance"):
        estimate(checkpoint, None, ("IQ2_XXS",))


@pytest.mark.parametrize(
    ("name", "tied", "kind"),
    [
        ("token_embd.weight", True, "output"),
        ("token_embd.weight", False, "token_embd"),
        ("blk.3.ffn_down_exps.weight", False, "ffn_down"),
        ("blk.3.ffn_up_shexp.weight", False, "ffn_up"),
        ("dec.blk.3.cross_attn_q.weight", False, "attn_q"),
        ("blk.3.ssm_out.weight", False, "ssm_out"),
    ],
)
def test_classes(name: str, tied: bool, kind: str) -> None:
    info = TensorInfo(name, (64, 64), "F16")
    assert class_of(info, tied) == kind
    inside = [PRIOR[k] for k in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    assert factor("never_seen", 4) == pytest.approx(np.exp(np.mean(np.log(inside))) / 4)
    assert layer_count({"enc.blk.0.a": info, "dec.blk.0.a": info, "dec.blk.1.a": info, "x": info}) == 3


def test_a_model_that_is_not_known_is_not_run(models: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(models["mamba"])
    assert "sensitivities are estimated" in checkpoint.notes[0]
    with pytest.raises(DynqError, match="does not know the architecture 'mamba' and cannot run it"):
        load_model(checkpoint)
    quantized = unknown_models.make("gpt2", models["mamba"].with_name("q8.gguf"), quantized=True)
    with pytest.raises(DynqError, match="already quantized"):
        open_checkpoint(quantized)
    assert open_checkpoint(quantized, allow_requantize=True).requantized


def write_header(path: Path, arch: str, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_projector_is_left_alone(models: dict[str, Path], tmp_path: Path) -> None:
    for arch, kind in (("clip", "model"), ("clip", "mmproj")):
        with pytest.raises(
            DynqError, match=r"mmproj-x\.gguf: a projector for images or sound .*keep this file as it is"
        ):
            open_checkpoint(write_header(tmp_path / "mmproj-x.gguf", arch, kind))
    with pytest.raises(DynqError, match="of type 'adapter' and architecture 'llama', not a model"):
        open_checkpoint(write_header(tmp_path / "lora.gguf", "llama", "adapter"))
    model = tmp_path / "model.gguf"
    model.write_bytes(models["gpt2"].read_bytes())
    assert any("mmproj-x.gguf beside the model is left as it is" in note for note in open_checkpoint(model).notes)


def test_estimates_beat_the_mix_on_a_model_that_can_be_measured(quick_run, tmp_path) -> None:
    """The embedded model as if it could not be run: less predicted divergence than the mix of the same bytes, by the
    table that was measured. tests/bench/prior.py has what comes of it on text."""
    from dynq.calibrate import importance_to_look_at
    from dynq.sensitivity import sensitivity

    folder = shutil.copytree(quick_run[0], tmp_path / "run")  # a table is written there
    checkpoint = open_checkpoint("dynq-tiny")
    importance = importance_to_look_at(checkpoint, str(folder))
    names = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    target = "like:Q3_K_M"
    table = estimate(checkpoint, importance, names)
    recipe = allocate(table, checkpoint.tensors, target, metadata=checkpoint.metadata)
    mix = mixes.mix("Q3_K_M", checkpoint.tensors, checkpoint.metadata, True)
    true = {
        (r["tensor"], r["format"]): r["predicted_kld"]
        for r in sensitivity(checkpoint, folder, importance, names).to_pylist()
    }
    cost = [sum(true[key] for key in chosen.items() if key in true) for chosen in (recipe.formats, mix)]
    assert cost[0] < 0.9 * cost[1]


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = {"formats": ["Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q6_K"], "eval_n_ctx": 64, "eval_chunks": 4, "n_tokens": 4}


def run(model: Path, out: Path, *more: str, **parameters: object) -> subprocess.CompletedProcess:
    given = (x for k, v in (QUICK | parameters).items() for x in ("-p", f"{k}={v}"))
    return dynq_command("run", model, "--target", "5bpw", "--out", out, *given, *more)


def test_run_with_an_importance_matrix(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    imatrix = tmp_path / "given.gguf"
    write_imatrix(imatrix, unknown_models.importance(models["gpt2"]))
    done = run(models["gpt2"], tmp_path / "run", "--imatrix", str(imatrix), "--max-shard-size", "200kB")
    assert done.returncode == 0, done.stderr
    assert "sensitivities are estimated from the weights, not measured" in done.stderr
    assert "KLD ratio" in done.stdout and "estimated" in done.stdout
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    own = next(entry for entry in evaluation["files"] if entry["kind"] == "dynamic")
    assert own["dtype"] == "llama.cpp" and 0 < own["statistics"]["Mean KLD"] < 1
    assert len(evaluation["files"]) > 2 and all(entry["statistics"] for entry in evaluation["files"])
    parts = sorted((tmp_path / "run").glob("5bpw-*-of-*.gguf"))
    assert len(parts) > 1 and evaluation["targets"][0]["file"] == parts[0].name
    recipe = Recipe.from_gguf(parts[0])
    assert "estimated" in recipe.provenance and recipe.predicted_kld
    for page in ("report.html", "model-card.md"):
        text = (tmp_path / "run" / page).read_text()
        assert "estimate" in text and "not measured" in text
    again = run(models["gpt2"], tmp_path / "run", "--imatrix", str(imatrix), "--max-shard-size", "200kB")
    assert again.returncode == 0 and again.stdout == done.stdout


def test_run_without_data_and_without_engine(models: dict[str, Path], tmp_path: Path) -> None:
    """No importance matrix, and no llama.cpp to measure with: said, and the file is there."""
    hidden = "import sys; sys.modules.update(xllamacpp=None, llama_cpp=None)\n"
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(hidden)
    path = os.pathsep.join([str(tmp_path / "hide"), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = [x for k, v in QUICK.items() for x in ("-p", f"{k}={v}")]
    done = dynq_command("run", models["mamba"], "--target", "5bpw", "--out", tmp_path / "run", *given, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "no importance matrix: all inputs of a tensor count alike" in done.stderr
    assert "not measured: llama.cpp is not installed" in done.stdout
    assert (tmp_path / "run" / "5bpw.gguf").exists() and not (tmp_path / "run" / "imatrix.gguf").exists()
    assert "not measured" in (tmp_path / "run" / "report.html").read_text()
    assert "not measured" in (tmp_path / "run" / "model-card.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--imatrix", "OTHER"), "it was made from another model"),
        (("--max-shard-size", "5bpw"), "size '5bpw': write it as"),
        (("--search", "10s"), "cannot run the architecture 'gpt2', which --search would have to"),
        (("--text", "TEXT"), "cannot run the architecture 'gpt2', so there is nothing to calibrate"),
        (("--target", "1.8bpw"), "the smallest possible is"),
    ],
)
def test_mistakes_are_one_line(more: tuple[str, str], said: str, models: dict[str, Path], tmp_path: Path) -> None:
    write_imatrix(tmp_path / "other.gguf", unknown_models.importance(models["mamba"]))
    (tmp_path / "text.txt").write_text("text")
    paths = {"OTHER": str(tmp_path / "other.gguf"), "TEXT": str(tmp_path / "text.txt")}
    done = run(models["gpt2"], tmp_path / "run", *(paths.get(word, word) for word in more))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "run.json").exists()
