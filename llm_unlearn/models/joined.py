"""Several LoRA adapters of one base as one: their updates added up, each with a factor, exactly."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_unlearn.models.load import trainable

WEIGHTS = "adapter_model.safetensors"


def join(parts: Sequence[dict[str, Tensor]], factor: float) -> dict[str, Tensor]:
    """The weights of one adapter whose update is factor · Σ_k B_k A_k: the A matrices one below the other, the B matrices side by
    side, so that nothing is rounded but the product with the factor.

    Args:
        parts: A (r, D_in) and B (D_out, r) of each adapter, by the names that peft gives them in a model.

    Returns:
        A (n·r, D_in) and B (D_out, n·r), by the names under which peft saves them.
    """
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        whole = [one[name] for one in parts]
        made = torch.cat(whole, dim=0) if ".lora_A." in name else torch.cat(whole, dim=1) * factor
        joined[name.replace(".default.", ".")] = made.contiguous()
    return joined


def save_joined(model: Any, parts: Sequence[dict[str, Tensor]], factor: float, folder: Path) -> None:
    """Write n adapters of `model`'s own shape as one that peft can load: rank n·r, and alpha n times as large, so that the update
    counts as often as in each of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha, config.inference_mode = config.r * len(parts), config.lora_alpha * len(parts), True
    config.save_pretrained(str(folder))
    save_file(join(parts, factor), str(folder / WEIGHTS), metadata={"format": "pt"})


def adapter_blocks(model: Any, block: tuple[int, int] | None) -> set[str]:
    """Names of the adapter's weights in the i-th of n blocks of decoder layers, counted from the top; None names all.

    The layers are those that the adapter stands in; where they do not divide by n, the blocks at the top have one more.
    """
    names = list(trainable(model))
    if block is None:
        return set(names)
    number, count = block
    layers = sorted({_layer(name) for name in names}, reverse=True)
    if len(layers) < count:
        raise ValueError(f"{len(layers)} layers cannot be cut into {count} blocks")
    size, more = divmod(len(layers), count)
    first = number * size + min(number, more)
    mine = set(layers[first : first + size + (number < more)])
    return {name for name in names if _layer(name) in mine}


def _layer(name: str) -> int:
    """The number of the decoder layer in a weight's name: the first part of it that is a number."""
    return next(int(part) for part in name.split(".") if part.isdigit())
