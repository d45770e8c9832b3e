"""Models that write text in bfloat16, and how many conversations they write together."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from dynq import kv_cache, torch_model
from dynq.checkpoint import open_checkpoint
from dynq.text import answer_batch
from dynq.torch_model import load_model


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "has_bfloat16", lambda: True)


def test_a_processor_that_imitates_bfloat16_takes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "has_bfloat16", lambda: False)
    model = load_model(open_checkpoint(tiny_models.make("llama", tmp_path / "model")))
    assert torch_model.rounded(model) is model


@pytest.mark.usefixtures("native")
def test_a_copy_that_does_not_fit_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(open_checkpoint(tiny_models.make("llama", tmp_path / "model")))
    room = 2 * 2 * sum(p.numel() for p in model.parameters())
    for free, copied in ((room, True), (room - 1, False)):
        monkeypatch.setattr(torch_model.memory, "available", lambda free=free: free)
        assert (torch_model.rounded(model) is not model) == copied


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_copy_says_nearly_the_same(name: str, tmp_path: Path) -> None:
    """In every architecture: all of it is bfloat16, the original stays, and it answers."""
    model = load_model(open_checkpoint(tiny_models.make(name, tmp_path / "model")))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copy = torch_model.rounded(model)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert len(list(copy.parameters())) == len(list(model.parameters()))  # tied ones are one
    ids = torch.arange(5, 45).view(2, 20)
    with torch.inference_mode():
        p, q = (m(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, copy))
    # where a token goes to another expert it is more
    assert 0 < float((p.exp() * (p - q)).sum(-1).median()) < 0.01
    answers = answer_batch(copy, [[5, 6, 7], [8]], 12, {2}, torch.Generator().manual_seed(1), None)
    assert all(0 < len(answer) <= 12 for answer in answers)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_conversations_that_are_written_together() -> None:
    """As many as a GiB holds the keys and values of, in float32, between 32 and 128."""
    small = {"num_key_value_heads": 2, "head_dim": 64}
    assert kv_cache.width(small) == 256 and kv_cache.rows(12 * 256, 512) == 128
    assert kv_cache.rows(28 * 256, 512) == 2**30 // (4 * 512 * 28 * 256) == 73
    assert kv_cache.rows(32 * 2048, 512) == 32


def test_conversations_that_a_card_begins_together() -> None:
    """At least eight batches as on a processor; more where an eighth of its memory holds them, 4,096 at most."""
    small, large, vocab = 12 * 256, 32 * 2048, 1000
    assert kv_cache.at_once(small, 512, vocab) == kv_cache.at_once(small, 512, vocab, 20e9) == 8 * 128
    each = 2 * 512 * small + 12 * vocab
    for card in (64.1, 100, 127.9):  # a few bytes more or less make no other text
        assert kv_cache.at_once(small, 512, vocab, card * 2**30) == 8 * 2**30 // each == 2720
    assert kv_cache.at_once(small, 512, vocab, 140e9) == 4096
    assert kv_cache.at_once(large, 512, vocab, 128 * 2**30) == 8 * 32
    assert kv_cache.at_once(large, 64, vocab, 0.0) == 8 * kv_cache.rows(large, 64)


def test_the_head_is_not_copied_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last positions of a batch are a matrix in memory, for which torch takes one product."""
    model = load_model(open_checkpoint(tiny_models.make("llama", tmp_path / "model")))
    seen: list[bool] = []

    def look(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].is_contiguous() and inputs[0].shape[1] == 1)

    model.get_output_embeddings().register_forward_pre_hook(look)
    answer_batch(model, [[5, 6, 7], [8]], 4, set(), torch.Generator().manual_seed(1), None)
    assert len(seen) == 4 and all(seen)
