"""An adapter that begins where the forget set lives (FILA; LoKU, Cha et al. 2024, 2408.06621).

The weights W of a layer are split as W = (W − B0 A0) + B A, with B A = B0 A0 at first; B0 A0 is the best approximation of rank r
to W when row i is weighted by √Σ_j F_f/F_r, the importance of its weights to the forget set over that to the retain set. The base
itself is left as it is: a second, frozen adapter takes B0 A0 away, so that "adapters off" is still the model as it was, and the
saved adapter holds both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_unlearn.models.adapter_files import save_config
from llm_unlearn.spec import Refused

START = "start"
"""The name of the frozen adapter."""


def adapted_weights(model: Any) -> dict[str, nn.Parameter]:
    """The base weights that have an adapter, by the name of their layer.

    Raises:
        Refused: one of them is no linear layer.
    """
    layers = _layers(model)
    if other := [
        name
        for name, layer in layers.items()
        if "default" not in layer.lora_A or getattr(getattr(layer.get_base_layer(), "weight", None), "ndim", 0) != 2
    ]:
        raise Refused(f"model.adapter.init: fila splits linear layers, and {other[0]} is none; see model.adapter.targets.")
    return {name: layer.get_base_layer().weight for name, layer in layers.items()}


@torch.no_grad()
def begin(model: Any, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> None:
    """Set A, B and the frozen counterpart of every adapted layer.

    Args:
        forget: layer -> F_f, the diagonal Fisher information of its weights on the forget set, of their shape.
        retain: the same of the retain set.
    """
    config = copy.deepcopy(model.peft_config["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.add_adapter(START, config)
    model.base_model.set_adapter(["default", START])
    for name, layer in _layers(model).items():
        given = (layer.get_base_layer().weight.float(), forget[name], retain[name])
        weight, f, r = (one.T if layer.fan_in_fan_out else one for one in given)
        b, a = factors(weight, f, r, config.r)
        scale = layer.scaling["default"] ** 0.5
        layer.lora_A["default"].weight.copy_(a / scale)
        layer.lora_B["default"].weight.copy_(b / scale)
        layer.lora_A[START].weight.copy_(a / scale)
        layer.lora_B[START].weight.copy_(-b / scale)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name and f".{START}." not in name)


def factors(weight: Tensor, forget: Tensor, retain: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(out, in) three times -> B (out, r), A (r, in): the minimum of ‖D (W − B A)‖_F, D_ii = √Σ_j F_f,ij / F_r,ij. Where W has
    fewer than r rows or columns, what is left over of B and A is 0."""
    level = 1e-3 * retain.sum() / retain.numel() + 1e-30
    rows = (forget / (retain + level)).sum(-1).sqrt()
    rows = rows.clamp(min=float(rows.max()) * 1e-4 + 1e-12)
    u, s, v = torch.linalg.svd(rows[:, None] * weight, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = (u[:, :rank] * root) / rows[:, None], root[:, None] * v[:rank]
    left = rank - len(root)
    return nn.functional.pad(b, (0, left)), nn.functional.pad(a, (0, 0, 0, left))


def begun(model: Any) -> bool:
    """Whether this model's adapter has a frozen counterpart."""
    return isinstance(model, peft.PeftModel) and START in model.peft_config


def save(model: Any, folder: Path) -> None:
    """Write both adapters as one of twice the rank, which fits the untouched base."""
    config = copy.deepcopy(model.peft_config["default"])
    mine, start = (peft.get_peft_model_state_dict(model, adapter_name=name) for name in ("default", START))
    config.r, config.lora_alpha, config.inference_mode = 2 * config.r, 2 * config.lora_alpha, True
    joined = {
        name: torch.cat([one, start[name]], dim=0 if "lora_A" in name else 1).detach().cpu().contiguous()
        for name, one in mine.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(joined, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    save_config(config, folder)


def _layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
