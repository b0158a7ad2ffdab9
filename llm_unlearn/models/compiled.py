"""Decoder layers whose forward pass is compiled, each by itself, for as long as a gradient is made.

What is compiled is a layer's `forward` and not its call: hooks, which come and go with the layers that a loss reads, and the
recomputation of gradient checkpointing stay outside. Outside of the context nothing is compiled, so that whatever looks at the
model, writes with it or saves it finds it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_unlearn.models.depth import blocks_of
from llm_unlearn.models.load import causal
from llm_unlearn.models.structure import body_of

VARIANTS = 64
"""Most compiled forms of a layer: with and without gradient, with the adapter on and off, end to end and padded, and PyTorch's
special cases of shapes. Beyond, PyTorch goes on without compiling."""


class Compiled:
    """The compiled forward passes of a model's decoder layers; they are made when they are first called."""

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        """
        Args:
            backend: one of PyTorch's.
        """
        _, blocks = blocks_of(body_of(causal(model))[1])
        # rounded where the layer itself rounds, and not only at the end of what is fused
        as_written: dict[str, Any] | None = {"emulate_precision_casts": True} if backend == "inductor" else None
        self.passes: dict[nn.Module, Callable[..., Any]] = {
            block: torch.compile(block.forward, dynamic=True, backend=backend, options=as_written) for block in blocks
        }

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the layers run compiled."""
        own = {block: vars(block).get("forward") for block in self.passes}
        try:
            for block, forward in self.passes.items():
                block.forward = forward
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                yield
        finally:
            for block, before in own.items():
                del block.forward
                if before is not None:
                    block.forward = before
