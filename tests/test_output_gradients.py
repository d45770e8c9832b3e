"""Second moments of gradients at the outputs of layers: against one token at a time, in float64."""

from functools import partial

import numpy as np
import pytest
import tiny_models
import torch

from dynq import output_gradients
from dynq.checkpoint import open_checkpoint
from dynq.fisher import true_fisher_backward
from dynq.torch_model import load_model

N_CTX = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(open_checkpoint(tiny_models.make("llama", tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 300, (6, N_CTX)).astype(np.int32)


def _layers(model) -> dict:
    layer = model.model.layers[1]
    found = {"v": layer.self_attn.v_proj, "down": layer.mlp.down_proj}
    return {name: (one, np.arange(one.out_features)) for name, one in found.items()} | {
        "turned": (layer.mlp.down_proj, np.arange(layer.mlp.down_proj.out_features)[::-1].copy()),
        "some": (layer.self_attn.q_proj, np.array([5, 3, 9])),
    }


def test_sums_are_those_of_single_tokens(model, tokens) -> None:
    layers = _layers(model)
    found = output_gradients.collect(model, layers, tokens, threads=2)
    wanted = {name: [np.zeros((len(rows), len(rows))) for _ in range(2)] for name, (_, rows) in layers.items()}
    for i, chunk in enumerate(tokens):
        kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str, kept: dict, layer, args: tuple, out: torch.Tensor) -> None:
            kept[name] = args[0], out

        handles = [layer.register_forward_hook(partial(keep, name, kept)) for name, (layer, _) in layers.items()]
        hidden = model.get_input_embeddings()(torch.from_numpy(chunk[None].astype(np.int64))).detach().requires_grad_()
        log_p = torch.log_softmax(model(inputs_embeds=hidden, use_cache=False).logits.float(), -1)
        for handle in handles:
            handle.remove()
        for _, out in kept.values():
            out.retain_grad()
        true_fisher_backward(log_p, torch.Generator().manual_seed(i))
        for name, (inputs, out) in kept.items():
            rows = layers[name][1]
            for x, g in zip(inputs[0].detach().double().numpy(), out.grad[0].double().numpy(), strict=True):
                wanted[name][i == 3] += (x @ x) * np.outer(g[rows], g[rows])
    for name, sums in found.items():
        for own, theirs in zip(sums, wanted[name], strict=True):
            assert own.dtype == np.float32
            np.testing.assert_allclose(own, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(found["turned"][0], found["down"][0][::-1, ::-1])


def test_bytes_do_not_depend_on_threads(model, tokens) -> None:
    layers = _layers(model)
    found = [output_gradients.collect(model, layers, tokens, threads=n) for n in (1, 2, 3)]
    assert len({tuple(part.tobytes() for both in one.values() for part in both) for one in found}) == 1


def test_one_chunk_or_no_layer_finds_nothing(model, tokens) -> None:
    assert output_gradients.collect(model, _layers(model), tokens[:1]) == {}
    assert output_gradients.collect(model, {}, tokens) == {}


def test_hooks_are_gone_and_gradients_are_off(model, tokens) -> None:
    output_gradients.collect(model, _layers(model), tokens[:2], threads=1)
    assert not any(module._forward_hooks for module in model.modules())
    out = model(torch.from_numpy(tokens[:1].astype(np.int64)))
    assert not out.logits.requires_grad
