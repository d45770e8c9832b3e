"""llama.cpp runs every block format that dynq writes, and reads the same weights from its bytes as dynq's decoder.

No format is left out: the CPU backend has a dot product for each.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dynq import codec, formats
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.engine import Engine
from dynq.export import export
from dynq.imatrix import Importance
from dynq.recipe import Recipe
from dynq.torch_model import load_model

pytest.importorskip("xllamacpp")

LARGEST = 512  # no dimension of the model is larger
PROMPT, N_TOKENS = list(range(300, 330)), 4
BLOCK_FORMATS = [name for name, form in formats.FORMATS.items() if form.block > 1]


@pytest.fixture(scope="module")
def cut() -> Checkpoint:
    """The embedded model's first layer, its vocabulary and feed-forward cut off: 720,000 weights, quick to encode."""
    whole = open_checkpoint("dynq-tiny")
    tensors = {
        name: replace(info, shape=tuple(min(n, LARGEST) for n in info.shape))
        for name, info in whole.tensors.items()
        if info.layer in (None, 0)
    }
    metadata = whole.metadata | {
        "qwen3.block_count": 1,
        "qwen3.feed_forward_length": LARGEST,
        "tokenizer.ggml.tokens": whole.metadata["tokenizer.ggml.tokens"][:LARGEST],
        "tokenizer.ggml.token_type": whole.metadata["tokenizer.ggml.token_type"][:LARGEST],
        "tokenizer.ggml.merges": whole.metadata["tokenizer.ggml.merges"][: LARGEST - 259],  # 256 bytes, 3 special
    }

    def read(name: str) -> np.ndarray:
        return whole.read(name)[tuple(slice(n) for n in tensors[name].shape)]

    small = Checkpoint(whole.name, whole.path, whole.architecture, metadata, tensors, read, [])
    small.config = whole.config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    small.config |= {"intermediate_size": LARGEST, "vocab_size": LARGEST}
    return small


@pytest.fixture(scope="module")
def importance(cut: Checkpoint) -> Importance:
    rng = np.random.default_rng(0)
    quantizable = [info for info in cut.tensors.values() if info.quantizable]
    sums = {info.name: rng.uniform(0.5, 2, (1, info.row)).astype(np.float32) for info in quantizable}
    return Importance(sums, {name: np.ones(1, np.float32) for name in sums}, [])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_engine_reads_what_dynq_decodes(name: str, cut: Checkpoint, importance: Importance, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(cut, Recipe(dict.fromkeys(cut.tensors, name), name, 0, 0.0, None), importance, path, threads=1)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {name, "F32"}
    with Engine(path, n_ctx=64, threads=1, exact=True) as engine:
        generation = engine.generate(PROMPT, N_TOKENS, ignore_eos=True)
    assert len(generation.tokens) == len(generation.top_logprobs) == N_TOKENS

    def decoded(name: str) -> np.ndarray:
        data = np.asarray(tensors[name].data).view(np.uint8)
        return codec.dequantize(data, tensors[name].tensor_type.name, threads=1).reshape(cut.tensors[name].shape)

    model = load_model(cut, ((name, decoded(name)) for name in cut.tensors))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + generation.tokens])).logits[0, len(PROMPT) - 1 : -1]
    logp = torch.log_softmax(logits.double(), -1).numpy()
    differences = [
        abs(logp[i, token] - value) for i, top in enumerate(generation.top_logprobs) for token, value in top.items()
    ]
    # llama.cpp rounds activations to 8 bits, which moves them by up to 0.08 nats; the weights' own rounding, at 4 bits
    # and less, by 0.3 and more
    assert np.mean(differences) < 0.15
