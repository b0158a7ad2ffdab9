"""Quantized weights: what a base already is, what a recipe asks for, and what does not go with them.

A base is quantized by its own config.json (`quantization_config`) or because the recipe says so. The config, which `plan` has too,
or the loaded model is asked; the recipe knows only one of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Model, quantized_problems
from llm_unlearn.spec import Refused, reason

BITS = {"nf4": 4.24, "fp4": 4.24, "int8": 8.0}
"""Bits of a weight, the scales of its block included (double quantization: .127 bits)."""


@dataclass(frozen=True)
class Quantization:
    """Quantization of a model's weights."""

    format: Any
    """nf4, fp4, int8, or the name of another method, such as gptq."""
    own: bool
    """The base's files are quantized; otherwise its weights are quantized on loading."""
    bits: float
    """Of a weight."""

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.format} (as the base is)" if self.own else self.format


def is_quantized(net: Any) -> bool:
    """Return whether a loaded model computes with quantized weights."""
    return bool(getattr(net, "is_quantized", False)) or any(
        type(module).__module__.startswith("bitsandbytes.") for module in net.modules()
    )


def own_quantization(config: Any) -> Quantization | None:
    """Return how the files of a model are quantized, read from its config; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "bitsandbytes")
    if settings.get("load_in_8bit"):
        return Quantization("int8", True, BITS["int8"])
    if settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        return Quantization(kind, True, BITS.get(kind, 4.5))
    bits = settings.get("bits") or settings.get("num_bits") or (8 if "8" in method else 4)
    return Quantization(method, True, float(bits) + 0.25)


def quantization_of(config: Any, model: Model) -> Quantization | None:
    """Return how the weights of a recipe's model are kept when it is loaded.

    Args:
        config: of the base.

    Raises:
        Refused: the base is quantized already, in another format than the recipe asks for.
    """
    own = own_quantization(config)
    if own and model.quantize and model.quantize != own.format:
        text = f"found {model.quantize}, and the weights of {model.base} are {own.format} already"
        raise Refused(f"model.quantize: {text}. Set quantize: null, or use a base that is not quantized.")
    return own or (Quantization(model.quantize, False, BITS[model.quantize]) if model.quantize else None)


def check_quantized(recipe: Recipe, config: Any, device: torch.device) -> Quantization | None:
    """Check that a recipe can train on the weights of its base, as they are quantized; the same in `plan` and `run`.

    Raises:
        Refused: it cannot, and why.
    """
    found = quantization_of(config, recipe.model)
    if found is None or not found.own:  # what the recipe itself asks for was checked with the recipe
        return found
    check_package(config, recipe.model.base, device)
    for keys, text in quantized_problems(recipe.model, recipe.train, "a base that is not quantized"):
        raise Refused(f"model.base: the weights of {recipe.model.base} are {found.format} already. {'.'.join(keys)}: {text}")
    return found


def check_package(config: Any, name: str, device: torch.device) -> None:
    """Check that the package is there which reads a quantized base.

    Raises:
        Refused: it is not, or cannot be used on this machine.
    """
    own = own_quantization(config)
    if own is None:
        return
    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(device)}, weights_only=True)
    except (ImportError, ValueError, RuntimeError, TypeError, KeyError) as error:
        text = f"its weights are {own.format}, which cannot be read here ({reason(error)})"
        raise Refused(f"{name}: {text}. Install what it names, or use a base that is not quantized.") from error


def settings_for(model: Model, config: Any, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what transformers is told of quantization; a base that is quantized already computes in the recipe's precision.

    Raises:
        Refused: bitsandbytes is not installed, or the base is quantized in another format.
    """
    found = quantization_of(config, model)
    if found is None:
        return None
    if found.own:
        if isinstance(config.quantization_config, dict) and config.quantization_config.get("load_in_4bit"):
            config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise Refused(
            f"model.quantize: {model.quantize} needs bitsandbytes; install it with: pip install 'llm-unlearn[quantize]'."
        ) from None
    if model.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=model.quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def prepare_4bit_on_cpu(net: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for AVX512 in eval mode: gradients do not pass through the packed form, and
    saving loses precision.

    Raises:
        Refused: a layer's size does not divide by 32, which its CPU kernels need.
    """
    for name, layer in net.named_modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if int(layer.out_features) % 32:  # type: ignore[arg-type]
                raise Refused(
                    f"model.quantize: 4 bits on a CPU need output sizes that divide by 32; {name} has {layer.out_features}."
                )


def dequantized(net: Any, name: str) -> Any:
    """Return a model with its weights in full precision.

    Raises:
        Refused: its method has no way back.
    """
    if not is_quantized(net):
        return net
    try:
        return net.dequantize()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise Refused(
            f"{name}: its quantized weights cannot be turned back ({reason(error)}). Use a base that is not quantized."
        ) from error
