"""Optimizers of torch and, for 8-bit states, of bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from llm_unlearn.recipe import Train
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
