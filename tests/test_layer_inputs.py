"""What layers read, and encoding by it: against plain NumPy sums, and `feedback.encode` called by hand."""

import json

import numpy as np
import pytest
import tiny_models
import torch

from dynq import feedback, layer_inputs, output_gradients
from dynq.checkpoint import open_checkpoint
from dynq.encoding import quantize_tensor
from dynq.errors import DynqError
from dynq.imatrix import Importance
from dynq.layer_inputs import collect, feed_back, reports
from dynq.torch_model import load_model

N_CTX = 32
DOMAINS = ["code", "chats"] * 9


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory):
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("tiny"), intermediate_size=256))
    tokens = np.random.default_rng(0).integers(2, 300, (len(DOMAINS), N_CTX)).astype(np.int32)
    return checkpoint, load_model(checkpoint), tokens


def _importance(checkpoint) -> Importance:
    rng = np.random.default_rng(1)
    sums = {n: rng.random((1, i.row), np.float32) + 0.1 for n, i in checkpoint.tensors.items() if i.quantizable}
    counts = {name: np.ones(1, np.float32) for name in sums}
    return Importance(sums, counts, [], 1, N_CTX)


LAYERS = {
    "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj",
    "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj",
}


def test_hessians_are_sums_over_each_domain_and_part(parts_of) -> None:
    checkpoint, model, tokens = parts_of
    layers = {name: model.get_submodule(path) for name, path in LAYERS.items()}
    found = collect(model, checkpoint, list(layers), tokens, DOMAINS, threads=2)

    read: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0].double().numpy()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row in tokens:
            model(torch.from_numpy(row[None].astype(np.int64)))
    for handle in handles:
        handle.remove()
    aside = {domain: [i for i, d in enumerate(DOMAINS) if d == domain][3::4] for domain in ("code", "chats")}
    for name, [(fit, kept, _)] in found.items():
        for k, domain in enumerate(("code", "chats")):
            own = [i for i, d in enumerate(DOMAINS) if d == domain]
            for hessian, rows in (
                (fit[k], [i for i in own if i not in aside[domain]]),
                (kept[k], aside[domain]),
            ):
                x = np.concatenate([read[name][i][0] for i in rows])
                assert hessian.tokens == len(x) == len(rows) * N_CTX
                np.testing.assert_allclose(hessian.matrix, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())
    assert found["blk.1.attn_q.weight"] is found["blk.1.attn_v.weight"]


def test_hessians_do_not_depend_on_threads(parts_of, monkeypatch) -> None:
    checkpoint, model, tokens = parts_of
    monkeypatch.setattr(layer_inputs, "_ROWS", 100)  # the last piece is smaller
    found = [
        {name: [h.matrix.tobytes() for h in [*one.fit, *one.aside]] for name, [one] in read.items()}
        for read in (collect(model, checkpoint, list(LAYERS), tokens, DOMAINS, threads=n) for n in (1, 2, 3))
    ]
    assert found[0] == found[1] == found[2]


def test_what_is_never_multiplied_by_is_named(parts_of, monkeypatch) -> None:
    checkpoint, model, tokens = parts_of
    monkeypatch.setattr(model.model.layers[2], "forward", lambda x, *_, **__: x)
    with pytest.raises(DynqError, match=r"^blk\.2\.ffn_down\.weight: the model multiplies nothing by it$"):
        collect(model, checkpoint, list(LAYERS), tokens[:2], DOMAINS[:2])


def test_feed_back_gives_the_bytes_of_feedback_encode_and_goes_on(parts_of, tmp_path, monkeypatch) -> None:
    checkpoint, model, tokens = parts_of
    importance = _importance(checkpoint)
    chosen = {n: ("Q4_0" if i.quantizable else "F32") for n, i in checkpoint.tensors.items()}
    chosen["blk.1.ffn_down.weight"] = "Q8_0"  # feedback does not know it

    def run(parts):
        return {
            name: (fmt, data.copy())
            for name, fmt, data in feed_back(checkpoint, chosen, importance, model, tokens, DOMAINS, parts, threads=1)
        }

    whole = run(tmp_path / "a")
    assert list(whole) == list(chosen)
    told = {entry["tensor"]: entry for entry in reports(tmp_path / "a", list(chosen))}
    assert told["token_embd.weight"]["level"] == told["blk.1.ffn_down.weight"]["level"] == "search"
    levels = [entry["level"] for entry in told.values()]
    assert levels.count("feedback") > 5, told
    assert json.loads(json.dumps(told)) == told

    name = next(n for n, entry in told.items() if entry["level"] == "feedback")
    [inputs] = collect(model, checkpoint, [name], tokens, DOMAINS)[name]
    mean = importance.mean(name, checkpoint.tensors[name].row)
    rows = layer_inputs._rows(checkpoint, name, layer_inputs.products(checkpoint, model)[name])
    [gradients] = output_gradients.collect(model, checkpoint, {name: rows}, tokens)[name]
    by_hand = feedback.encode(
        checkpoint.read(name), "Q4_0", inputs.fit, inputs.aside, mean, gradients=gradients, threads=1
    )
    assert np.array_equal(by_hand.data, whole[name][1])
    assert by_hand.coupled == told[name]["coupled"]
    assert sum(entry["coupled"] < 1 for entry in told.values()) > 5, told
    for n in ("token_embd.weight", "blk.1.ffn_down.weight"):
        assert np.array_equal(whole[n][1], quantize_tensor(checkpoint, n, chosen[n], importance, "search", 1))

    # cut off after some tensors, and with room for one tensor's Hessians at a time: the same bytes
    stream = feed_back(checkpoint, chosen, importance, model, tokens, DOMAINS, tmp_path / "b", threads=1)
    for _ in range(7):
        next(stream)
    stream.close()
    kept = sorted((tmp_path / "b").iterdir())
    assert len(kept) == 7
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(layer_inputs, "BUDGET", 1)
    again = run(tmp_path / "b")
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert all(np.array_equal(again[n][1], whole[n][1]) for n in chosen)

    # so are those with several threads
    stream = feed_back(checkpoint, chosen, importance, model, tokens, DOMAINS, tmp_path / "c", threads=3)
    assert all(np.array_equal(data, whole[name][1]) for name, _, data in stream)

    # what weights would best be is kept where that is asked for, and a part without it is made anew
    stream = feed_back(checkpoint, chosen, importance, model, tokens, DOMAINS, tmp_path / "c", threads=1, aims=True)
    assert all(np.array_equal(data, whole[name][1]) for name, _, data in stream)
    assert np.array_equal(layer_inputs.aim(tmp_path / "c", name), by_hand.best.astype(np.float16))
    assert layer_inputs.aim(tmp_path / "c", "token_embd.weight") is None
    assert layer_inputs.aim(tmp_path / "b", name) is layer_inputs.aim(tmp_path, name) is None
    assert reports(tmp_path / "c", list(chosen)) == list(told.values())

    # a part of another format is made anew
    other = dict(chosen, **{name: "Q4_1"})
    made = next(
        data
        for n, _, data in feed_back(checkpoint, other, importance, model, tokens, DOMAINS, tmp_path / "b", threads=1)
        if n == name
    )
    assert made.shape[-1] != whole[name][1].shape[-1]


def test_a_single_text_is_fed_back_without_the_guard(parts_of, tmp_path) -> None:
    checkpoint, model, tokens = parts_of
    chosen = {n: ("Q4_0" if i.quantizable else "F32") for n, i in checkpoint.tensors.items()}
    importance = _importance(checkpoint)
    for _ in feed_back(checkpoint, chosen, importance, model, tokens, ["a"] * len(tokens), tmp_path / "p", threads=1):
        pass
    assert [entry["level"] for entry in reports(tmp_path / "p", list(chosen))].count("feedback") > 5


def test_gradients_are_in_the_order_of_rows(parts_of, tmp_path, monkeypatch) -> None:
    """Of a layer whose rows GGUF orders otherwise (halves of a head that are rotated)."""
    checkpoint, model, tokens = parts_of
    name, layer = "blk.1.attn_q.weight", model.model.layers[1].self_attn.q_proj
    slot = checkpoint.architecture.slot_of(name)
    assert not slot.same
    given = {}
    encode = feedback.encode
    monkeypatch.setattr(feedback, "encode", lambda *args, **how: given.update(how) or encode(*args, **how))
    list(feed_back(checkpoint, {name: "Q4_0"}, None, model, tokens, DOMAINS, tmp_path / "p", threads=1))
    everything = np.arange(layer.out_features)
    [as_torch] = output_gradients.collect(model, checkpoint, {name: everything}, tokens, threads=1)[name]
    for own, theirs in zip(given["gradients"], as_torch, strict=True):
        size = np.broadcast_to(theirs.diagonal()[:, None], tuple(layer.weight.shape))
        np.testing.assert_array_equal(own.diagonal(), slot.gather(size)[:, 0])
        assert not np.array_equal(own.diagonal(), theirs.diagonal())


def test_inputs_are_in_the_order_of_columns(tmp_path, monkeypatch) -> None:
    """Of a layer whose columns GGUF orders otherwise: W H W^T sums the squares of the outputs that it has in torch."""
    checkpoint = open_checkpoint(tiny_models.make("qwen35", tmp_path / "tiny"))
    model, name, domains = load_model(checkpoint), "blk.0.ssm_out.weight", ["a"] * 4
    tokens = np.random.default_rng(0).integers(2, 300, (len(domains), N_CTX)).astype(np.int32)
    outputs: list[np.ndarray] = []
    with torch.no_grad():
        layer = model.model.layers[0].linear_attn.out_proj
        with layer.register_forward_hook(lambda _, args, out: outputs.append(out.double().numpy()[0])):
            for row in tokens[:3]:
                model(torch.from_numpy(row[None].astype(np.int64)))
    encode, given = feedback.encode, list[feedback.Hessian]()
    monkeypatch.setattr(
        feedback, "encode", lambda w, fmt, fit, *rest, **how: given.extend(fit) or encode(w, fmt, fit, *rest, **how)
    )
    list(feed_back(checkpoint, {name: "Q4_0"}, None, model, tokens, domains, tmp_path / "p", threads=1))
    weights = checkpoint.read(name).astype(np.float64)
    energy = ((weights @ given[0].matrix) * weights).sum(1)
    np.testing.assert_allclose(energy, np.square(np.concatenate(outputs)).sum(0), rtol=1e-4)


@pytest.mark.parametrize(
    "domains, aside",
    [("a", []), ("aa", [1]), ("aaa", [2]), ("aaaa", [3]), ("aaaaaaa", [3]), ("abab", [2, 3]), ("aabaaacaa", [4])],
)
def test_every_domain_of_two_chunks_has_one_that_judges(domains, aside) -> None:
    assert np.flatnonzero(layer_inputs.kept_aside(list(domains))).tolist() == aside


def test_no_more_are_kept_aside_of_a_domain_than_asked():
    found = layer_inputs.kept_aside(list("aaaaaaaaaaaaabb"), 2)
    assert np.flatnonzero(found).tolist() == [3, 7, 14]
