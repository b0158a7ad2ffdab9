"""The texts that a model is writing at once, side by side: some can leave, and others take their place, with what has been computed
of them.

Shapes: B texts, L tokens of the longest one, padding on the left; in a cache H heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CUTTABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
"""Kinds of layers of transformers' caches that hold nothing but keys and values (B, H, L, D) of the last tokens, or nothing at all.
By name, as others inherit from these and hold more."""


@dataclass
class Desk:
    """The texts that are being written, padded on the left, and what has been computed of them."""

    rows: list[int]  # (B) which asks they are
    ids: Tensor  # (B, L) prompts, and what has been written
    mask: Tensor  # (B, L) 0 where there is padding
    numbers: Tensor  # (B, tokens) what chance each draws with; (B, 0) where nothing is drawn
    cache: Any = None  # of all but the last token; None: they are to be read from their beginning

    def only(self, on: Tensor) -> Desk:
        """Those of some rows (n,), without the padding that none of them needs."""
        rows, mask = [self.rows[b] for b in on.tolist()], self.mask[on]
        free = int((mask.shape[1] - mask.sum(1)).min()) if rows else 0
        return Desk(rows, self.ids[on, free:], mask[:, free:], self.numbers[on], _only(self.cache, on, free))

    def beside(self, other: Desk) -> Desk:
        """These and others, which have been computed as far as these."""
        ids, mask = (_stacked(one, two, 1) for one, two in ((self.ids, other.ids), (self.mask, other.mask)))
        numbers = torch.cat([self.numbers, other.numbers])
        return Desk(self.rows + other.rows, ids, mask, numbers, _beside(self.cache, other.cache))


def _only(cache: Any, rows: Tensor, free: int) -> Any:
    """What was computed of some rows, without what they all have on the left as padding; None of a kind that cannot be cut, and the
    rows are then read again from their beginning."""
    layers = getattr(cache, "layers", [])
    if not layers or not {type(layer).__name__ for layer in layers} <= CUTTABLE:
        return None
    cache.batch_select_indices(rows)
    for layer in layers:
        if layer.keys is None:
            continue
        keep = layer.keys.shape[-2] - free
        if layer.is_sliding:  # holds the last ones only, and counts all
            layer.cumulative_length -= free
            keep = min(layer.keys.shape[-2], layer.cumulative_length)
        layer.keys, layer.values = layer.keys[:, :, -keep:], layer.values[:, :, -keep:]
    return cache


def _beside(cache: Any, other: Any) -> Any:
    """What was computed of some rows and of others, as of one batch."""
    length = max(cache.get_seq_length(), other.get_seq_length())
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if layer.keys is None:
            continue
        layer.keys, layer.values = _stacked(layer.keys, more.keys, 2), _stacked(layer.values, more.values, 2)
        if layer.is_sliding:
            layer.cumulative_length = length
    return cache


def _stacked(rows: Tensor, others: Tensor, dim: int) -> Tensor:
    """(B, …) and (B', …) -> (B + B', …), which end alike along `dim`: the shorter ones get zeros in front."""
    width = max(rows.shape[dim], others.shape[dim])
    both = []
    for one in (rows, others):
        front = one.new_zeros(*one.shape[:dim], width - one.shape[dim], *one.shape[dim + 1 :])
        both.append(torch.cat([front, one], dim))
    return torch.cat(both)


def padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids and mask, padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
