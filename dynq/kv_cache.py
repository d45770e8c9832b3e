"""Keys and values of the tokens so far, with room for more.

transformers joins what it keeps with each new token's, a copy of all for every token of an answer: more time than the
model's own products on a processor. Here the new ones are written behind the old ones, in arrays that grow now and
then.
"""

from collections.abc import Mapping
from math import log2
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

LEAST = 64  # tokens of room that are made at a time, or
SHARE = 4  # one for each so many
ROWS = 32, 128  # conversations that are sampled together, at least and at most: more of them share what a step costs
BATCHES = 8  # of them at once, a thread for each
BYTES = 1 << 30  # of their keys and values, in float32; beyond the least as many as that takes
CARD = 8  # share of a card's memory for one batch of all of them: it waits for the calls of each step, not for products
MOST = 4096  # of them on a card


def width(config: Mapping[str, Any]) -> int:
    """Keys and values of a token in a layer, numbers; config: transformers'."""
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 0)
    return 2 * heads * int(config.get("head_dim") or 64)


def rows(values: int, tokens: int) -> int:
    """How many conversations of so many tokens, each of so many numbers in all layers, are sampled together.

    What is sampled depends on it, so it depends on the model alone.
    """
    return max(ROWS[0], min(ROWS[1], BYTES // max(4 * tokens * values, 1)))


def at_once(values: int, tokens: int, vocab: int, card: float = 0) -> int:
    """How many such conversations are begun together: `BATCHES` batches, or on a card more, where its memory is large.

    card: its free bytes, of which the power of two below counts: what is sampled shall not depend on a few of them.
    A conversation takes keys and values in bfloat16, and three rows of the vocabulary in float32 for a token.
    """
    share = 2 ** int(log2(card / CARD)) if card > CARD else 0
    return max(BATCHES * rows(values, tokens), min(MOST, share // (2 * tokens * values + 12 * vocab)))


def with_room(cache: Any) -> Any:
    """A cache as a model returned it, its layers that keep every token with room for more; other layers as they are."""
    for at, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[at] = _Roomy(layer)
    return cache


def rows_can_leave(cache: Any) -> bool:
    """Whether some rows of the batch can be kept alone; not with the states of linear attention."""
    layers = getattr(cache, "layers", None)
    return layers is not None and all(hasattr(layer, "batch_select_indices") for layer in layers)


class _Roomy(DynamicLayer):
    """keys, values: [batch, heads, tokens, width], the first tokens of arrays that are longer."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._longer: tuple[torch.Tensor, ...] = ()
        self._written: tuple[torch.Tensor, ...] = ()  # keys and values as `update` left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held, new = (self.keys, self.values), (key_states, value_states)
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        # whoever chose rows or cut tokens has put other arrays in place
        ours = len(self._written) == 2 and all(a is b for a, b in zip(held, self._written, strict=True))
        if not ours or end > self._longer[0].shape[-2]:
            self._longer = tuple(_longer(one, end + max(LEAST, end // SHARE)) for one in held)
        for one, states in zip(self._longer, new, strict=True):
            one[..., length:end, :] = states
        self.keys, self.values = self._written = (self._longer[0][..., :end, :], self._longer[1][..., :end, :])
        return self.keys, self.values


def _longer(held: torch.Tensor, tokens: int) -> torch.Tensor:
    found = held.new_empty((*held.shape[:-2], tokens, held.shape[-1]))
    found[..., : held.shape[-2], :] = held
    return found
