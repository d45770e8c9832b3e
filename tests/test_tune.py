"""Tuned scales: the gradient against differences of another decoding, what may change, and that nothing loses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch

from dynq import codec, formats, schedule, tune
from dynq import loss as loss_of_tuning
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.kernels import halves, scales
from dynq.latent import movable
from dynq.layer_inputs import kept_aside
from dynq.torch_model import load_model, set_tensor

# llama's q and k rows are permuted; every kind of scale is there, and formats that have none to tune
FORMATS = ("Q2_K", "Q4_1", "IQ4_XS", "Q3_K", "MXFP4", "Q5_K", "IQ1_M", "F16", "IQ2_XS", "Q4_0")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model of two layers, its teacher, its encoded tensors, and text."""
    kind, settings = tiny_models.MODELS["llama-biased"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.MODELS, "wide", (kind, {**settings, **SIZES}))
        checkpoint = open_checkpoint(tiny_models.make("wide", tmp_path_factory.mktemp("model")))
    names = [n for n, info in checkpoint.tensors.items() if info.quantizable]
    chosen = {n: FORMATS[i % len(FORMATS)] for i, n in enumerate(names)}
    tensors = {}
    for n, info in checkpoint.tensors.items():
        fmt = chosen.get(n, "F32")
        tensors[n] = fmt, codec.quantize(checkpoint.read(n), fmt, np.ones(info.row))
    tokens = np.random.default_rng(0).integers(2, 300, (6, 24))
    return SimpleNamespace(
        checkpoint=checkpoint, teacher=load_model(checkpoint), tensors=tensors, fit=tokens[:4], aside=tokens[4:]
    )


def tuned(start, **settings):
    settings = {"passes": 3, "rate": 0.02, "codes": 0.02, **settings}
    return tune.tune(start.checkpoint, start.teacher, start.tensors, start.fit, start.aside, **settings)


@pytest.fixture(scope="module")
def result(start):
    return tuned(start)


def decoded(start, tensors):
    return _of(start.checkpoint, tensors)


def _of(checkpoint, tensors):
    for name, (fmt, data) in tensors.items():
        yield name, codec.dequantize(data, fmt).reshape(checkpoint.tensors[name].shape)


def divergence(teacher, model, tokens) -> float:
    """Mean KLD at every position that has a token after it, by torch's own functions in float64."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(input_ids=ids).logits[:, :-1].double(), -1) for m in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def loss(teacher, model, tokens) -> float:
    """What is made small for one chunk: the divergence, and the relative errors of what layers give to the next."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    given = []
    for m in (teacher, model):
        with torch.no_grad():
            answer = m(input_ids=ids, output_hidden_states=True, output_router_logits=True)
        given.append([*answer.hidden_states[1:], *(r[None] for r in getattr(answer, "router_logits", None) or ())])
    w, x = given
    errors = [((a - b).double() ** 2).sum(-1) / (a.double() ** 2).sum(-1) for a, b in zip(w, x, strict=True)]
    return divergence(teacher, model, tokens) + schedule.HINTS * float(torch.stack(errors).mean())


def start_divergence(start) -> float:
    return divergence(start.teacher, load_model(start.checkpoint, decoded(start, start.tensors)), start.aside)


def blanked(fmt, data):
    """The bytes without the half floats."""
    out = data.reshape(-1, formats.get(fmt).block_bytes).copy()
    halves.put(fmt, out, np.zeros_like(halves.get(fmt, out)))
    return out


@pytest.mark.parametrize("name", [name for name in halves.AT if name in formats.FORMATS])
def test_decoding_is_linear_in_the_half_floats_of_the_table(name):
    form, rng = formats.get(name), np.random.default_rng(1)
    data = codec.quantize(rng.normal(size=(1, 4 * form.block)).astype(np.float32), name, np.ones(4 * form.block))
    blocks = data.reshape(4, -1)
    values = halves.get(name, blocks)
    again = blocks.copy()
    halves.put(name, again, values)
    assert np.array_equal(again, blocks) and (values != 0).all()
    whole = codec.dequantize(blocks, name)
    parts = []
    for part in range(len(values)):
        only = np.zeros_like(values)
        only[part] = 2 * values[part]
        halves.put(name, again, only)
        assert np.array_equal(halves.get(name, again), only)
        parts.append(codec.dequantize(again, name))
    np.testing.assert_allclose(sum(parts), 2 * whole, atol=1e-5)
    assert not codec.dequantize(blanked(name, blocks), name).any()


def test_the_table_lacks_only_formats_without_half_floats():
    assert set(formats.FORMATS) - set(halves.AT) == {"F32", "F16", "BF16", "MXFP4", "NVFP4"}


@pytest.fixture
def search(start):
    """Not at the start, where all multipliers are 1."""
    tokens, rng = start.fit[:1], np.random.default_rng(2)
    search = tune._Search(start.checkpoint, start.teacher, start.tensors, tokens, tokens, 0.0, 0.02, tune.unknown)
    for b in search.blocks:
        b.m.copy_(torch.from_numpy(rng.uniform(0.9, 1.1, b.m.shape)))
    search.move([b.m for b in search.blocks])
    return search


def test_the_bytes_hold_the_weights_that_are_measured(start, search):
    for b in search.blocks:
        if b.latent is not None:  # far enough for some to take another code
            b.latent.z += torch.from_numpy(np.random.default_rng(4).normal(size=b.latent.z.shape).astype(np.float32))
            b.latent.moved()
    search.move([b.rounded(b.m) for b in search.blocks])
    model = load_model(start.checkpoint)
    for b in search.blocks:
        m, codes = b.state()
        written = b.fmt, b.encoded(b.rounded(m), codes)
        if codes is not None:
            assert not np.array_equal(blanked(b.fmt, written[1]), blanked(b.fmt, b.data)), b.name
        set_tensor(model, start.checkpoint, b.name, next(decoded(start, {b.name: written}))[1])
        parameter = model.get_parameter(start.checkpoint.architecture.parameter(b.name)).detach()
        torch.testing.assert_close(b.parameter.detach(), parameter, rtol=1e-5, atol=1e-6, msg=b.name)


def test_rounded_answers_point_the_same_way(start, search, monkeypatch):
    """Steps of rough models: the gradient through activations in bfloat16 is that of float32 but for its noise."""
    monkeypatch.setattr(loss_of_tuning, "has_bfloat16", lambda: True)
    found = []
    for rough in (False, True):
        search.gradient(np.array([0]), rough)
        found.append(torch.cat([b.m.grad.flatten() for b in search.blocks]))
    assert not torch.equal(*found)
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99


def test_gradient_of_the_multipliers_against_differences(start, search):
    rng, eps = np.random.default_rng(3), 4e-3
    search.gradient(np.array([0]))
    names = {b.name for b in search.blocks}
    assert {fmt for n, (fmt, _) in start.tensors.items() if n in names} == set(FORMATS) - {"MXFP4", "F16"} | {"F32"}
    assert {b.fmt for b in search.blocks if b.latent is not None} == set(FORMATS) - {"MXFP4", "F16", "IQ1_M"}
    start_m = {b.name: b.m.numpy().copy() for b in search.blocks}
    model = load_model(start.checkpoint, decoded(start, start.tensors))
    for name, m in start_m.items():
        set_tensor(model, start.checkpoint, name, scaled(start, name, m))
    for b in search.blocks:
        for part in range(len(b.m)):
            direction = np.zeros_like(start_m[b.name])
            direction[part] = rng.normal(size=direction[part].shape)
            slope = float((b.m.grad.numpy() * direction).sum())
            found = []
            for sign in (eps, -eps):
                set_tensor(model, start.checkpoint, b.name, scaled(start, b.name, start_m[b.name] + sign * direction))
                found.append(loss(start.teacher, model, start.fit[:1]))
            set_tensor(model, start.checkpoint, b.name, scaled(start, b.name, start_m[b.name]))
            assert (found[0] - found[1]) / (2 * eps) == pytest.approx(slope, rel=0.05, abs=2e-3), (b.name, part)


def test_chunks_side_by_side_have_the_gradient_of_one_after_the_other(start, search, monkeypatch):
    found = []
    search.tokens = start.fit[:3]
    for room in (schedule.TOGETHER, 1):
        monkeypatch.setattr(schedule, "TOGETHER", room)
        value = search.gradient(np.array([0, 2, 1]))
        gradients = [b.m.grad for b in search.blocks] + [b.latent.grad for b in search.blocks if b.latent is not None]
        found.append((value, [x.clone() for x in gradients]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for together, apart in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-2, atol=1e-4 * float(apart.abs().max()))


def test_products_are_rounded_where_errors_are_large_beside_that(start, monkeypatch):
    def precision(rough):
        seen = []
        monkeypatch.setattr(tune, "ROUGH", rough)
        real = loss_of_tuning.divergence
        with monkeypatch.context() as patch:
            see = lambda *a: seen.append(torch.get_float32_matmul_precision()) or real(*a)  # noqa: E731
            patch.setattr(loss_of_tuning, "divergence", see)
            tuned(start, passes=1)
        return set(seen)

    before = torch.get_float32_matmul_precision()
    assert precision(0.0) == {"medium"} and precision(1.0) == {before} != {"medium"}
    assert torch.get_float32_matmul_precision() == before


def test_codes_that_begin_in_the_middle_of_their_cell_stay_longer(start, result):
    decoded_now = dict(decoded(start, start.tensors))

    def aims(name):
        return decoded_now[name].reshape(-1, decoded_now[name].shape[-1])

    assert tuned(start, aims=aims).codes < 0.5 * result.codes


def scaled(start, name, m):
    """Weights with multipliers, by decoding each half float alone."""
    fmt, data = start.tensors[name]
    if fmt == "F32":
        return data.view(np.float32) * m[0, :, 0]
    blocks = data.reshape(-1, formats.get(fmt).block_bytes)
    values, total = halves.get(fmt, blocks), 0.0
    for part, mine in enumerate(m):
        only, bare = np.zeros_like(values), blocks.copy()
        only[part] = values[part]
        halves.put(fmt, bare, only)
        total = total + codec.dequantize(bare, fmt) * mine.reshape(-1, 1)
    return total.astype(np.float32).reshape(start.checkpoint.tensors[name].shape)


def test_only_half_floats_and_vectors_change_where_codes_stay(start):
    found = tuned(start, codes=0)
    for name, (fmt, data) in start.tensors.items():
        new_fmt, new = found.tensors[name]
        assert (new_fmt, new.shape, new.dtype) == (fmt, data.shape, np.uint8)
        if fmt in halves.AT:
            assert np.array_equal(blanked(fmt, new), blanked(fmt, data)) and not np.array_equal(new, data), name
        elif fmt == "F32":
            assert not np.array_equal(new, data), name
        else:
            assert np.array_equal(new, data), name


def test_codes_change_and_integer_scales_do_not(start, result):
    for name, (fmt, data) in start.tensors.items():
        if not movable(fmt):
            continue
        (_, _, *old), (_, _, *new) = (
            scales.read(fmt, x.reshape(-1, formats.get(fmt).block_bytes)) for x in (data, result.tensors[name][1])
        )
        assert all(map(np.array_equal, old, new)), name
        assert not np.array_equal(blanked(fmt, data), blanked(fmt, result.tensors[name][1])), name


def test_codes_gain_beside_scales(start, result):
    assert 0.001 < result.codes < 0.5
    assert result.kld[1] < tuned(start, codes=0).kld[1]


def test_the_written_weights_are_closer_to_the_teacher(start, result):
    after = divergence(start.teacher, load_model(start.checkpoint, decoded(start, result.tensors)), start.aside)
    assert result.kld == pytest.approx((start_divergence(start), after), rel=1e-3)
    assert after < 0.98 * result.kld[0]


def test_norms_alone_change_the_divergence(start, result):
    vectors = {n: x for n, x in result.tensors.items() if x[0] == "F32"}
    model = load_model(start.checkpoint, decoded(start, start.tensors | vectors))
    assert abs(divergence(start.teacher, model, start.aside) / result.kld[0] - 1) > 1e-3


def test_what_routers_give_is_a_hint_as_well(tmp_path):
    """All experts are used: no choice between them makes the divergence jump. The gradient of a norm against
    differences, which are 8 % off where routers do not count."""
    sizes = {"num_experts_per_tok": 6, "num_experts": 6, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(tiny_models.make("qwen3moe", tmp_path / "m", **sizes))
    tensors = {}
    for n, info in checkpoint.tensors.items():
        fmt = "Q4_0" if info.quantizable else "F32"
        tensors[n] = fmt, codec.quantize(checkpoint.read(n), fmt)
    tokens = np.random.default_rng(0).integers(2, 300, (1, 24))
    teacher, name = load_model(checkpoint), "blk.0.ffn_norm.weight"
    search = tune._Search(checkpoint, teacher, tensors, tokens, tokens, 0.0, 0.0, tune.unknown)
    search.gradient(np.array([0]))
    [norm] = [b for b in search.blocks if b.name == name]
    direction = np.random.default_rng(3).normal(size=norm.m.numel()).astype(np.float32)
    model, eps, found = load_model(checkpoint, _of(checkpoint, tensors)), 4e-3, []
    for sign in (eps, -eps):
        set_tensor(model, checkpoint, name, checkpoint.read(name) * (1 + sign * direction))
        found.append(loss(teacher, model, tokens))
    slope = float((norm.m.grad.numpy().ravel() * direction).sum())
    assert (found[0] - found[1]) / (2 * eps) == pytest.approx(slope, rel=0.01)


def test_an_absurd_rate_does_no_harm(start):
    found = tuned(start, rate=1e4)
    assert min(x for _, x in found.history) > found.kld[0]  # every multiplier stands at its limits
    assert found.kld[0] == found.kld[1] == pytest.approx(start_divergence(start), rel=1e-3)
    assert all(np.array_equal(found.tensors[n][1], x[1]) for n, x in start.tensors.items())


def test_nothing_changes_where_nothing_is_gained(start):
    perfect = load_model(start.checkpoint, decoded(start, start.tensors))
    found = tune.tune(start.checkpoint, perfect, start.tensors, start.fit, start.aside, passes=2)
    assert found.kld[0] == found.kld[1]
    assert all(np.array_equal(found.tensors[n][1], x[1]) for n, x in start.tensors.items())


def test_the_seed_decides_the_bytes(start, result):
    again, other = tuned(start), tuned(start, seed=1)
    assert all(np.array_equal(again.tensors[n][1], x[1]) for n, x in result.tensors.items())
    assert any(not np.array_equal(other.tensors[n][1], x[1]) for n, x in result.tensors.items())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries sum by threads")
def test_the_number_of_threads_does_not(start, tmp_path_factory):
    before, found = torch.get_num_threads(), []
    tokens = np.random.default_rng(1).integers(2, 300, (3, 512))
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            new = tune.tune(start.checkpoint, start.teacher, start.tensors, tokens[:2], tokens[2:], passes=2)
            found.append((new.kld, new.history, {name: data.tobytes() for name, (_, data) in new.tensors.items()}))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("chunks, passes, each", [(3, 2, 4), (160, 2, 4), (316, 2, 4), (640, 2, 8), (1272, 1, 8)])
def test_a_long_text_fills_larger_steps_not_more_of_them(chunks, passes, each):
    assert schedule.chunks_a_step(chunks, passes) == each


@pytest.mark.parametrize("chunks, passes", [(630, 1), (1272, 1), (312, 2), (152, 4), (3, 4), (0, 4)])
def test_a_short_text_is_read_again(chunks, passes):
    """As often as 160 steps of four chunks take, four times at most; or as asked."""
    assert schedule.passes_over(chunks, -1) == passes
    assert schedule.passes_over(chunks, 0) == 0 and schedule.passes_over(chunks, 3) == 3
    assert schedule.passes_over(chunks, -2) == min(2 * passes, 4)


def test_a_long_text_says_more_by_its_kld():
    assert schedule.hints_weight(156 * 512) == schedule.HINTS
    assert schedule.hints_weight(4 * 160 * 512) == schedule.HINTS / 2


def test_text_of_no_chunks_is_one_clear_line(start):
    with pytest.raises(DynqError, match=r"kept aside are \[chunks, n_ctx\], got shape \(0, 24\)"):
        tune.tune(start.checkpoint, start.teacher, start.tensors, start.fit, start.aside[:0])


def test_nothing_is_tuned_of_what_loses_nothing(start):
    sixteen = {}
    for name, info in start.checkpoint.tensors.items():
        fmt = "F16" if info.quantizable else "F32"
        sixteen[name] = fmt, codec.quantize(start.checkpoint.read(name), fmt)
    found = tune.tune(start.checkpoint, start.teacher, sixteen, start.fit, start.aside)
    assert found.steps == 0 and found.kld[0] == found.kld[1] < 1e-5
    assert all(found.tensors[name][1] is data for name, (_, data) in sixteen.items())


def test_source_for_an_export(start, tmp_path):
    def stream(passes, domains, report="told.json"):
        def encoded(chosen):
            return ((name, chosen[name], start.tensors[name][1]) for name in chosen)

        chosen = {name: fmt for name, (fmt, _) in start.tensors.items()}
        tokens = np.concatenate([start.fit, start.aside]).astype(np.int32)
        reads = {"teacher": start.teacher, "tokens": tokens, "domains": domains, "passes": passes, "codes": True}
        found = tune.tuned(encoded, start.checkpoint, chosen, **reads, report=tmp_path / report)
        return {name: data for name, _, data in found}, json.loads((tmp_path / report).read_text())

    got, told = stream(2, ["a"] * 6)
    aside = kept_aside(["a"] * 6)
    assert aside.tolist() == [False, False, False, True, False, False]
    tokens = np.concatenate([start.fit, start.aside]).astype(np.int32)
    by_hand = tune.tune(start.checkpoint, start.teacher, start.tensors, tokens[~aside], tokens[aside], passes=2)
    assert list(got) == list(start.tensors)
    assert all(np.array_equal(got[name], data) for name, (_, data) in by_hand.tensors.items())
    assert tuple(told["kld"]) == by_hand.kld and told["kld"][1] < told["kld"][0]
    got, told = stream(2, list("abcdef"))  # no domain has enough chunks
    assert "6 chunks of calibration text are too few" in told["reason"]
    assert all(np.array_equal(got[name], data) for name, (_, data) in start.tensors.items())
