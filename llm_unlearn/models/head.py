"""The output head of a model: what makes logits of its last hidden states."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings of a soft cap on logits: Gemma 2, RecurrentGemma, xLSTM."""


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
        cap = next((float(value) for name in CAPS if (value := getattr(config, name, None))), None)
        return Head(layer, int(config.vocab_size), scale, cap)

    def __call__(self, states: Tensor, room: Tensor | None = None) -> Tensor:
        """(N, D) -> (N, V) float32

        Args:
            room: of `room`, written over; without gradient only.
        """
        if room is None:
            return self.finish(self.layer(states).float())
        assert isinstance(self.layer, nn.Linear)
        return self.finish(torch.mm(states, self.layer.weight.T, out=room[: len(states)]))

    def room(self, rows: int) -> Tensor | None:
        """Memory for the logits of so many rows, to be used again and again: on a CPU, taking it anew costs as much as filling it.
        None where the head makes its logits otherwise than by one product in float32."""
        layer = self.layer
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or layer.bias is not None:
            return None
        plain = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return layer.weight.new_empty((rows, layer.out_features), requires_grad=False) if plain else None

    def finish(self, logits: Tensor) -> Tensor:
        """What the layer gives, scaled and capped."""
        logits = logits * self.scale if self.scale != 1 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def without_adapter(self) -> Head:
        """Return the head with its adapter left out. A loss reads a reference's logits after the pass, when the adapter is on
        again."""
        return replace(self, layer=self.layer.get_base_layer()) if isinstance(self.layer, BaseTunerLayer) else self

    def frozen_copy(self) -> Head:
        """The head as it is now, whatever becomes of the model; the one part of it that full-weight training must keep twice."""
        return Head(copy.deepcopy(self.layer).requires_grad_(False), self.vocabulary, self.scale, self.cap)
