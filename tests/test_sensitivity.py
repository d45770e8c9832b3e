"""Sampling, the two formulas, and prediction against measurement on the embedded model."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_models
import torch
from peak import Peak, in_a_new_process
from safetensors import safe_open

from dynq import codec, formats
from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.fisher import TOGETHER, Fisher, Samples, choose_tokens, probe_error, true_fisher_backward
from dynq.imatrix import read_imatrix
from dynq.sensitivity import (
    SCHEMA,
    agreement,
    head_divergence,
    measure_swaps,
    parameter_error,
    quadratic_form,
    read_table,
    sample_swaps,
    sensitivity,
)
from dynq.text import load_text
from dynq.threads import one_thread_each
from dynq.torch_model import load_model, load_tokenizer

FORMATS = ("Q2_K", "Q4_K")


@pytest.fixture(scope="module")
def tiny():
    checkpoint = open_checkpoint("dynq-tiny")
    return checkpoint, load_model(checkpoint)


@pytest.fixture(scope="module")
def tokens(tiny):
    checkpoint, model = tiny
    text = load_text("sampled", load_tokenizer(checkpoint), n_ctx=128, n_chunks=8, seed=3, model=model)
    return text.tokens


@pytest.fixture(scope="module")
def folder(tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    importance = calibrate(*tiny, tokens, folder, keep=512, source="test")
    sensitivity(tiny[0], folder, importance, FORMATS)
    return folder


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_chosen_tokens_estimate_any_sum_without_bias():
    rng = np.random.default_rng(0)
    size = torch.from_numpy(rng.lognormal(0, 2, 200))
    value = size * torch.from_numpy(rng.uniform(0.5, 2, 200))
    estimates = []
    for seed in range(300):
        index, weight = choose_tokens(size, 40, torch.Generator().manual_seed(seed))
        assert 39 <= len(index) <= 41 and len(set(index.tolist())) == len(index)
        estimates.append(float((weight * value[index]).sum()))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(value.sum())) < 4 * error
    # a uniform choice of as many would be far worse
    uniform = [float(value[torch.from_numpy(rng.choice(200, 40, False))].sum() * 5) for _ in range(300)]
    assert np.std(estimates) < 0.5 * np.std(uniform)


def test_the_largest_token_is_always_taken_with_weight_one():
    size = torch.ones(100, dtype=torch.float64)
    size[7] = 1e6
    for seed in range(20):
        index, weight = choose_tokens(size, 10, torch.Generator().manual_seed(seed))
        assert weight[index == 7].tolist() == [1.0]


def test_asking_for_more_tokens_than_there_are_takes_each_once():
    index, weight = choose_tokens(torch.rand(9, dtype=torch.float64), 50, torch.Generator().manual_seed(0))
    assert index.tolist() == list(range(9)) and weight.tolist() == [1.0] * 9


def test_probe_error_is_a_small_error_of_the_same_shape():
    weight = torch.randn(8, 72)
    error = probe_error(weight)
    assert error.shape == weight.shape
    assert 0 < float(error.square().mean() / weight.square().mean()) < 0.1


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_quadratic_form_equals_its_naive_twin():
    rng = np.random.default_rng(1)
    x, g, d, w = rng.normal(size=(7, 5)), rng.normal(size=(7, 4)), rng.normal(size=(4, 5)), rng.uniform(1, 3, 7)
    naive = sum(0.5 * w[s] * (g[s] @ d @ x[s]) ** 2 for s in range(7))
    f32 = lambda a: torch.from_numpy(a.astype(np.float32))  # noqa: E731
    samples = Samples(f32(x), f32(g), torch.from_numpy(w))
    value, _ = quadratic_form(samples.projections(f32(d)), samples)
    assert value == pytest.approx(naive, rel=1e-5)
    ids = torch.tensor([0, 3, 3])
    samples = Samples(ids, f32(g[:3]), torch.from_numpy(w[:3]))
    value, _ = quadratic_form(samples.projections(f32(d.T)), samples)
    assert value == pytest.approx(sum(0.5 * w[i] * (g[i] @ d.T[t]) ** 2 for i, t in enumerate(ids)), rel=1e-5)


def test_head_divergence_is_the_exact_kl():
    rng = np.random.default_rng(2)
    weight, error, h = rng.normal(size=(30, 6)), rng.normal(size=(30, 6)) * 0.7, rng.normal(size=(5, 6))
    scale = rng.uniform(1, 2, 5)
    exact = 0.0
    for s in range(5):
        p = np.exp(weight @ h[s])
        q = np.exp((weight + error) @ h[s])
        p, q = p / p.sum(), q / q.sum()
        exact += scale[s] * (p * np.log(p / q)).sum()
    tensors = [torch.from_numpy(a.astype(np.float32)) for a in (weight, error, h)]
    value, _ = head_divergence(tensors[0], tensors[1], Samples(tensors[2], tensors[2], torch.from_numpy(scale)))
    assert value == pytest.approx(exact, rel=1e-4)


# --- experts ----------------------------------------------------------------------------------------------------------


def _by_the_whole_stack(checkpoint, folder: Path, importance, threads: int) -> dict[tuple[str, str], tuple]:
    """What the experts of a mixture cost where each stack is in memory as one array."""
    fisher, found = Fisher(folder / "fisher"), {}
    kinds = {n: info.kind for n, info in checkpoint.tensors.items() if info.quantizable and n != "output.weight"}
    factors = fisher.cross_token(kinds)
    for name in (n for n in kinds if "_exps" in n):
        weight, samples, info = checkpoint.read(name), fisher.samples(name), checkpoint.tensors[name]
        mean = None if importance is None else importance.mean(name, info.row)
        for fmt in dict.fromkeys(formats.usable(fmt, info.row) for fmt in MIXTURE):
            if mean is None and formats.get(fmt).needs_importance:
                continue
            decoded = codec.dequantize(codec.quantize(weight, fmt, mean), fmt)
            error = parameter_error(checkpoint.architecture, name, decoded - weight, fisher.shapes[fisher.unit[name]])
            with one_thread_each(threads) as workers:
                value, deviation = quadratic_form(samples.projections(error, workers), samples)
            kld, error = (factors[info.kind] * v / fisher.tokens for v in (value, deviation))
            found[name, fmt] = (kld, error, codec.weighted_error(weight, decoded, mean))
    return found


MIXTURE = ("Q2_K", "IQ2_XXS", "Q4_0")


# saved apart, and fused here; turned, gate and up in turns; turned, one after the other; beside stacks of heads
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4-scout", "deepseek3"])
def test_experts_one_at_a_time_cost_what_their_stack_does(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.make(family, tmp_path / "model", num_hidden_layers=2))
    tokens = np.random.default_rng(0).integers(2, 300, (4, 96)).astype(np.int32)
    importance = calibrate(checkpoint, load_model(checkpoint), tokens, tmp_path, keep=3 * TOGETHER, threads=1)
    for mean in (importance, None):
        table = sensitivity(checkpoint, tmp_path, mean, MIXTURE, threads=1).to_pylist()
        rows = {(row["tensor"], row["format"]): row for row in table if "_exps" in row["tensor"]}
        wanted = _by_the_whole_stack(checkpoint, tmp_path, mean, 2)
        assert len(rows) >= 3 * len({fmt for _, fmt in wanted}) and rows.keys() == wanted.keys()
        assert {row["predicted_kld"] > 0 for row in rows.values()} == {True}
        for key, values in wanted.items():
            found = tuple(rows[key][column] for column in ("predicted_kld", "predicted_error", "weighted_error"))
            assert found[:2] == values[:2]  # the same bytes
            assert found[2] == pytest.approx(values[2], 1e-12)  # without importance summed in another order


def _taken_for_experts(n_experts: int, folder: Path) -> int:
    """Bytes that sensitivities take at the most, where an expert's matrix has 512 x 512 weights."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1, "num_experts": n_experts}
    checkpoint = open_checkpoint(tiny_models.make("qwen3moe", folder / "model", **sizes))
    assert checkpoint.tensors["blk.0.ffn_down_exps.weight"].shape == (n_experts, 512, 512)
    tokens = np.random.default_rng(0).integers(2, 300, (1, 64)).astype(np.int32)
    importance = calibrate(checkpoint, load_model(checkpoint), tokens, folder, keep=64, threads=1)
    sensitivity(checkpoint, folder, importance, ["Q4_K"], threads=1)  # first calls
    with Peak() as taken:
        sensitivity(checkpoint, folder, importance, ["Q4_K"], threads=1)
    return taken.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux tells it")
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """20 bytes a weight: 5 MB for one of 64 experts of 1 MB, 336 MB for their stack."""
    one = 20 * 512 * 512
    assert one < in_a_new_process(_taken_for_experts, 64, tmp_path) < 3 * one


# --- the embedded model -----------------------------------------------------------------------------------------------


def test_importance_is_the_mean_square_of_the_inputs(tiny, tokens, folder):
    checkpoint, model = tiny
    seen = []
    module = model.model.layers[2].mlp.down_proj
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(tokens.astype(np.int64)))
    handle.remove()
    expected = seen[0].double().square().mean((0, 1)).numpy()
    importance = read_imatrix(folder / "imatrix.gguf")
    np.testing.assert_allclose(importance.mean("blk.2.ffn_down.weight"), expected, rtol=1e-4)
    assert importance.chunk_count == 8 and importance.chunk_size == 128
    assert "token_embd.weight" in importance.sums  # tied: it multiplies as the head
    assert set(importance.sums) == {n for n, t in checkpoint.tensors.items() if t.quantizable}


def test_an_interrupted_calibration_ends_with_the_same_bytes(tiny, tokens, folder, tmp_path):
    calibrate(*tiny, tokens, tmp_path, keep=512, source="test")
    files = sorted((tmp_path / "fisher").iterdir())
    assert len(files) == len(tokens) == 8  # one for each sequence
    before = {f.name: f.read_bytes() for f in files}
    files[1].unlink()
    (tmp_path / "imatrix.gguf").unlink()
    calibrate(*tiny, tokens, tmp_path, keep=512, source="test")
    assert {f.name: f.read_bytes() for f in (tmp_path / "fisher").iterdir()} == before
    assert (tmp_path / "imatrix.gguf").read_bytes() == (folder / "imatrix.gguf").read_bytes()


def test_an_interrupted_table_ends_with_the_same_bytes(tiny, folder, tmp_path, monkeypatch):
    (tmp_path / "fisher").symlink_to(folder / "fisher")
    importance = read_imatrix(folder / "imatrix.gguf")
    done = 0
    real = codec.quantize

    def stops(*args, **kwargs):
        nonlocal done
        done += 1
        if done > 21:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(codec, "quantize", stops)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(tiny[0], tmp_path, importance, FORMATS)
    partial = tmp_path / "sensitivity.partial.jsonl"
    partial.write_text(partial.read_text() + '{"tensor": "blk.5.attn')  # killed in the middle of a line
    calls = done = -1000
    sensitivity(tiny[0], tmp_path, importance, FORMATS)
    assert done - calls == 2 * (85 - 10)  # ten tensors were there already
    assert not partial.exists()
    assert (tmp_path / "sensitivity.parquet").read_bytes() == (folder / "sensitivity.parquet").read_bytes()


def test_prediction_meets_measurement(tiny, tokens, folder):
    checkpoint, model = tiny
    table = read_table(folder)
    assert table.schema.equals(SCHEMA) and len(table) == 85 * len(FORMATS)
    rows = sample_swaps(table, 32, seed=1, among=FORMATS)
    assert len({table["kind"][i].as_py() for i in rows}) == 8
    reference = kld.make_reference(model, tokens, folder / "swaps", first=0, desc="")
    before = {n: p.clone() for n, p in model.named_parameters()}
    table = measure_swaps(checkpoint, model, folder, table, rows, reference, read_imatrix(folder / "imatrix.gguf"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # put back
    result = agreement(table)
    assert result["n"] == 32
    assert min(result["rank"].values()) > 0.9
    ratios = [r["predicted_kld"] / r["measured_kld"] for r in table.to_pylist() if r["measured_kld"]]
    assert 0.8 < np.median(ratios) < 1.25
    assert all(0.5 < r < 2 for r in result["ratio"].values())


def test_the_sequence_form_is_the_gradient_of_the_weight(tiny, tokens, tmp_path):
    """sum_s g_s^T D x_s = <D, dL/dW>: the file's number against autograd's, same labels."""
    checkpoint, model = tiny
    calibrate(checkpoint, model, tokens[:1], tmp_path, keep=16, seed=5)
    weight = model.model.layers[4].self_attn.v_proj.weight.requires_grad_(True)
    try:
        ids = torch.from_numpy(tokens[:1].astype(np.int64))
        log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, dim=-1)
        true_fisher_backward(log_p, torch.Generator().manual_seed(5 * 1_000_003))
        with torch.no_grad():
            expected = float((weight.grad.double() * probe_error(weight).double()).sum()) ** 2
    finally:
        weight.grad = None
        weight.requires_grad_(False)
    with safe_open(tmp_path / "fisher" / "00000.safetensors", framework="pt") as f:
        token_form, sequence_form = f.get_tensor("blk.4.attn_v.weight.cross").tolist()
    assert sequence_form == pytest.approx(expected, rel=1e-3)
    factor = Fisher(tmp_path / "fisher").cross_token({"blk.4.attn_v.weight": "attn_v"})
    assert factor == {"attn_v": pytest.approx(sequence_form / token_form)}


def test_agreement_sees_a_wrong_prediction():
    rows = [
        {"tensor": str(i), "kind": "k", "format": "Q4_K", "predicted_kld": 9.0 - i, "measured_kld": 1.0 + i}
        for i in range(6)
    ]
    result = agreement(pa.Table.from_pylist(rows, schema=SCHEMA))
    assert result["rank"]["Q4_K"] == pytest.approx(-1)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DynqError, match="notebook 03"):
        Fisher(tmp_path)
    with pytest.raises(DynqError, match="notebook 04"):
        read_table(tmp_path)
