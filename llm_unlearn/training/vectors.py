"""Arithmetic on gradients and weights: lists of tensors, one per trainable weight, taken as one vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

Gradient = list["Tensor"]
"""One tensor per trainable weight, in their order."""


def dot(a: Gradient, b: Gradient) -> float:
    """⟨a, b⟩, on all processes where the tensors are spread over them"""
    import torch
    from torch.distributed.tensor import DTensor

    parts = [(x * y).sum() for x, y in zip(a, b, strict=True)]
    parts = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    return float(torch.stack(parts).double().sum()) if parts else 0.0


def norm(a: Gradient) -> float:
    """‖a‖₂; not a number where an entry is none"""
    return float(max(dot(a, a), 0.0) ** 0.5)  # in this order: max(0.0, nan) is 0.0


def plus(a: Gradient, b: Gradient, factor: float = 1.0) -> Gradient:
    """a + factor · b"""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def zeros(like: Gradient) -> Gradient:
    return [x.new_zeros(x.shape) for x in like]


def put(weights: Sequence[nn.Parameter], values: Gradient) -> None:
    """θ ← values"""
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)


def shift(weights: Sequence[nn.Parameter], by: Gradient, factor: float) -> None:
    """θ ← θ + factor · by"""
    for weight, one in zip(weights, by, strict=True):
        weight.data.add_(one, alpha=factor)


def blend(weights: Sequence[nn.Parameter], origin: Gradient, share: float) -> None:
    """θ ← origin + share · (θ − origin); at share 0 exactly the origin, whatever θ was"""
    if share == 0:
        put(weights, origin)
        return
    for weight, one in zip(weights, origin, strict=True):
        weight.data.sub_(one).mul_(share).add_(one)


@contextmanager
def moved(weights: Sequence[nn.Parameter], along: Gradient, factor: float) -> Iterator[None]:
    """Inside, θ + factor · along; afterwards exactly θ again."""
    start = [weight.detach().clone() for weight in weights]
    shift(weights, along, factor)
    try:
        yield
    finally:
        put(weights, start)
