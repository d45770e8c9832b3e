"""A model over several graphics cards: its decoder layers in order, the first ones on the first card.

One card computes at a time, and hands on what its last layer gives; what stands before and behind the layers is on the
first card. All weights stay where they are, so a model that fits onto the cards together runs as one in memory does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dynq.devices import free
from dynq.layerwise import decoder_layers


def shares(sizes: Sequence[int], besides: int, room: Sequence[int]) -> list[int]:
    """The card of each layer, in order: each card takes the same part of its room.

    sizes: bytes of each layer; besides: bytes of what is on the first card in any case; room: bytes of each card.
    """
    part = (besides + sum(sizes)) / sum(room)
    found, card, taken = [], 0, float(besides)
    for size in sizes:
        while card + 1 < len(room) and taken + size / 2 > part * room[card]:  # more than half of it is beyond the share
            card, taken = card + 1, 0.0
        found.append(card)
        taken += size
    return found


def spread(model: Any, cards: Sequence[str]) -> None:
    """Give each part of a model that holds no weights yet its place, and let what is computed move along."""
    layers = decoder_layers(model)
    sizes = [_bytes(layer) for layer in layers]
    for layer, card in zip(layers, shares(sizes, _bytes(model) - sum(sizes), list(map(free, cards))), strict=True):
        put(layer, cards[card])
        layer.register_forward_pre_hook(partial(_bring, device=cards[card]), with_kwargs=True)
    model.model.layers = torch.nn.ModuleList()
    put(model, cards[0])
    model.model.layers = layers
    model.model.norm.register_forward_pre_hook(partial(_bring, device=cards[0]), with_kwargs=True)
    model.spread_over = list(cards)


def put(module: Any, device: str) -> None:
    """Put a module that holds no weights yet onto a device."""
    for parameter in module.parameters():
        parameter.data = torch.empty_like(parameter, device=device)
    module.to(device)  # buffers
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):  # no buffer either: frequencies of RoPE
                setattr(part, name, value.to(device))


def _bring(module: Any, args: Any, kwargs: Any, *, device: str) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(value: Any, device: str) -> Any:
    """Every tensor in it on a device; caches, which keep each layer's own tensors, as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _bytes(module: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
