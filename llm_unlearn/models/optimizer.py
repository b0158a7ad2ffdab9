"""Optimizers: of torch, of bitsandbytes for 8-bit states, and the second-order one of the literature on unlearning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused


def make_optimizer(train: Train, weights: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over the trainable weights; norms and biases do not decay.

    Raises:
        Refused: an 8-bit optimizer where there is no CUDA device or no bitsandbytes.
    """
    weights = list(weights)
    matrices, vectors = [one for one in weights if one.ndim > 1], [one for one in weights if one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr)
    if train.optimizer == "sophia":
        return Sophia(groups, lr=train.lr)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr)
    if device.type != "cuda":
        raise Refused(f"train.optimizer: {train.optimizer} runs on CUDA devices only, and this run is on {device.type}; use adamw.")
    try:
        from bitsandbytes import optim
    except ImportError:
        raise Refused(f"train.optimizer: {train.optimizer} needs bitsandbytes; pip install 'llm-unlearn[quantize]'.") from None
    kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=train.lr)
    return optimizer


class Sophia(torch.optim.Optimizer):
    """Second-order steps with a diagonal Hessian estimate, as SOUL uses them (Jia et al. 2024, 2404.18239; Liu et al. 2023,
    2305.14342): m ← β1 m + (1 − β1) g, h ← β2 h + (1 − β2) g², θ ← θ − lr · clip(m / max(ρh, ε), ±1)."""

    def __init__(
        self, groups: Any, lr: float, betas: tuple[float, float] = (0.9, 0.95), rho: float = 0.04, eps: float = 1e-5
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the gradients that are there."""
        loss = closure() if closure else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["m"], state["h"] = torch.zeros_like(weight), torch.zeros_like(weight)
                m = state["m"].lerp_(weight.grad, 1 - beta1)
                h = state["h"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_((m / (group["rho"] * h).clamp(min=group["eps"])).clamp(-1, 1), alpha=-group["lr"])
        return loss
