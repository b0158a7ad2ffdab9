"""The output head of a model: what makes logits of its last hidden states."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """The output head: linear layer, then the scale or soft cap that some architectures put on logits."""

    layer: nn.Module = field(repr=False)
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    @staticmethod
    def of(layer: nn.Module, config: Any) -> Head:
        """The head that an architecture makes of a layer (scale: Cohere, Granite; cap: Gemma)."""
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return Head(layer, int(config.vocab_size), scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, states: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32"""
        return self.finish(self.layer(states).float())

    def finish(self, logits: Tensor) -> Tensor:
        """What the layer gives, scaled and capped."""
        logits = logits * self.scale if self.scale != 1 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def frozen_copy(self) -> Head:
        """The head as it is now, whatever becomes of the model; the one part of it that full-weight training must keep twice."""
        return Head(copy.deepcopy(self.layer).requires_grad_(False), self.vocabulary, self.scale, self.cap)
