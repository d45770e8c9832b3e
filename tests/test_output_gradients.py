"""Second moments of gradients at the outputs of layers: against one token at a time, in float64."""

from functools import partial

import numpy as np
import pytest
import tiny_models
import torch

from dynq import output_gradients
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.fisher import true_fisher_backward
from dynq.torch_model import load_model

N_CTX = 24


Q, V, DOWN = "blk.1.attn_q.weight", "blk.1.attn_v.weight", "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 300, (6, N_CTX)).astype(np.int32)


def _layers(model) -> dict:
    layer = model.model.layers[1]
    return {V: layer.self_attn.v_proj, DOWN: layer.mlp.down_proj, Q: layer.self_attn.q_proj}


def _rows(model) -> dict:
    return {name: np.arange(layer.out_features) for name, layer in _layers(model).items()} | {Q: np.array([5, 3, 9])}


def test_sums_are_those_of_single_tokens(checkpoint, model, tokens) -> None:
    layers, order = _layers(model), _rows(model)
    found = output_gradients.collect(model, checkpoint, order, tokens, threads=2)
    wanted = {name: [np.zeros((len(rows), len(rows))) for _ in range(2)] for name, rows in order.items()}
    for i, chunk in enumerate(tokens):
        kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str, kept: dict, layer, args: tuple, out: torch.Tensor) -> None:
            kept[name] = args[0], out

        handles = [layer.register_forward_hook(partial(keep, name, kept)) for name, layer in layers.items()]
        hidden = model.get_input_embeddings()(torch.from_numpy(chunk[None].astype(np.int64))).detach().requires_grad_()
        log_p = torch.log_softmax(model(inputs_embeds=hidden, use_cache=False).logits.float(), -1)
        for handle in handles:
            handle.remove()
        for _, out in kept.values():
            out.retain_grad()
        true_fisher_backward(log_p, torch.Generator().manual_seed(i))
        for name, (inputs, out) in kept.items():
            rows = order[name]
            for x, g in zip(inputs[0].detach().double().numpy(), out.grad[0].double().numpy(), strict=True):
                wanted[name][i == 3] += (x @ x) * np.outer(g[rows], g[rows])
    for name, [sums] in found.items():
        for own, theirs in zip(sums, wanted[name], strict=True):
            assert own.dtype == np.float32
            np.testing.assert_allclose(own, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    turned = output_gradients.collect(model, checkpoint, {DOWN: order[DOWN][::-1].copy()}, tokens, threads=2)
    np.testing.assert_array_equal(turned[DOWN][0][0], found[DOWN][0][0][::-1, ::-1])


def test_bytes_do_not_depend_on_threads(checkpoint, model, tokens) -> None:
    found = [output_gradients.collect(model, checkpoint, _rows(model), tokens, threads=n) for n in (1, 2, 3)]
    assert len({tuple(part.tobytes() for [both] in one.values() for part in both) for one in found}) == 1


def test_one_chunk_or_no_layer_finds_nothing(checkpoint, model, tokens) -> None:
    assert output_gradients.collect(model, checkpoint, _rows(model), tokens[:1]) == {}
    assert output_gradients.collect(model, checkpoint, {}, tokens) == {}


def test_hooks_are_gone_and_gradients_are_off(checkpoint, model, tokens) -> None:
    output_gradients.collect(model, checkpoint, _rows(model), tokens[:2], threads=1)
    assert not any(module._forward_hooks for module in model.modules())
    out = model(torch.from_numpy(tokens[:1].astype(np.int64)))
    assert not out.logits.requires_grad
