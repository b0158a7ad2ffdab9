"""What several LoRA adapters of one base are together: one adapter, or the mean of what each predicts."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_unlearn.hub.fetching import COMBINATION_FILE
from llm_unlearn.methods.combination import Combination
from llm_unlearn.methods.exact import Exact
from llm_unlearn.models import combined
from llm_unlearn.models.adapter_files import save_config
from llm_unlearn.models.load import trainable

WEIGHTS = "adapter_model.safetensors"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Served:
    """What serves: the content of an adapter's folder."""

    adapters: Mapping[str, Weights]
    """Weights by the folder inside that they lie in; "" is the folder itself."""
    ranks: int = 1
    """How many adapters' ranks each of them has."""
    combination: Combination | None = None
    """How their predictions are combined, where there are several."""

    def save(self, model: Any, folder: Path) -> None:
        """Write it, for adapters of `model`'s own shape. Of n ranks, alpha is n times as large too, so that an update counts as
        often as in each of them."""
        shutil.rmtree(folder, ignore_errors=True)
        config = copy.deepcopy(model.peft_config["default"])
        config.r, config.lora_alpha, config.inference_mode = config.r * self.ranks, config.lora_alpha * self.ranks, True
        for name, weights in self.adapters.items():
            (folder / name).mkdir(parents=True)
            save_config(config, folder / name)
            save_file(weights, str(folder / name / WEIGHTS), metadata={"format": "pt"})
        if self.combination:
            combined.write(self.combination, folder)

    def differs(self, folder: Path) -> list[str]:
        """The files in a folder whose content is not this, bit by bit."""
        found = [str(Path(name) / WEIGHTS) for name, one in self.adapters.items() if not _same(one, folder / name / WEIGHTS)]
        there = combined.read(folder) if combined.is_combined(folder) else None
        return found + [COMBINATION_FILE] * (there != self.combination)


def _same(weights: Weights, path: Path) -> bool:
    there = load_file(path) if path.is_file() else {}
    return weights.keys() == there.keys() and all(torch.equal(one, there[name]) for name, one in weights.items())


def served(parts: Mapping[str, Weights], method: Exact) -> Served:
    """What adapters are together; of one alone, both ways are the adapter itself.

    Args:
        parts: the weights of each by its name, under the names that peft gives them in a model.
    """
    if method.aggregate == "average" and len(parts) > 1:
        count = len(parts)
        mean = Combination(rule="average", members=tuple(parts), weights=(1 / count,) * count)
        return Served({name: join([one], 1.0) for name, one in parts.items()}, combination=mean)
    return Served({"": join(list(parts.values()), method.weight or 1 / len(parts))}, len(parts))


def join(parts: Sequence[Weights], factor: float) -> Weights:
    """The weights of one adapter whose update is factor · Σ_k B_k A_k: the A matrices one below the other, the B matrices side by
    side, so that nothing is rounded but the product with the factor.

    Args:
        parts: A (r, D_in) and B (D_out, r) of each adapter, by the names that peft gives them in a model.

    Returns:
        A (n·r, D_in) and B (D_out, n·r), by the names under which peft saves them.
    """
    joined: Weights = {}
    for name in parts[0]:
        whole = [one[name] for one in parts]
        made = torch.cat(whole, dim=0) if ".lora_A." in name else torch.cat(whole, dim=1) * factor
        joined[name.replace(".default.", ".")] = made.contiguous()
    return joined


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
