"""Keys and values with room for more: what transformers' own cache holds, and the answers that it gives."""

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers.cache_utils import DynamicCache

from dynq import kv_cache
from dynq.checkpoint import open_checkpoint
from dynq.text import answer_batch
from dynq.torch_model import load_model

FAMILIES = ["llama", "gemma3", "deepseek2", "qwen3next"]
"""Plain; with a window; keys and values of other widths; some layers with a state instead."""


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of three rows and two heads, of different widths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, tokens, 8, generator=generator), torch.randn(3, 2, tokens, 5, generator=generator)


def test_what_is_held() -> None:
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        cache.update(*states(7, 0), 0)
    kv_cache.with_room(caches[1])
    for step in range(200):  # beyond the room of several arrays
        if step in (50, 51, 120):
            for cache in caches:
                cache.batch_select_indices(torch.tensor([1, 2, 0]) if step < 100 else torch.tensor([2, 0]))
        if step == 90:
            for cache in caches:
                cache.crop(-5)
        rows = 3 if step < 120 else 2
        new = [one[:rows] for one in states(1 + step % 2, step)]
        theirs, ours = (cache.update(*new, 0) for cache in caches)
        assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_what_was_given_out_stays() -> None:
    cache = DynamicCache()
    cache.update(*states(3, 0), 0)
    kv_cache.with_room(cache)
    first, _ = cache.update(*states(1, 1), 0)
    kept = first.clone()
    cache.update(*states(1, 2), 0)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(open_checkpoint(tiny_models.make(name, tmp_path / "model")))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    stop = set(range(20, 30))  # so that rows end, and leave the batch

    def answers() -> list[list[int]]:
        return answer_batch(model, prompts, 90, stop, torch.Generator().manual_seed(3), None)

    ours = answers()
    assert max(map(len, ours)) > 20
    monkeypatch.setattr(kv_cache, "with_room", lambda cache: cache)
    assert answers() == ours
