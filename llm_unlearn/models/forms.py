"""The same model in another form: read afresh, its adapter merged or left off or scaled, its weights quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_model

from llm_unlearn.models.combined import combination_of, counted
from llm_unlearn.models.load import Loaded, causal, has_adapter, load, read_config
from llm_unlearn.models.merging import merge_adapter
from llm_unlearn.models.quantized import BITS, own_quantization
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

Bits = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True)
class Again:
    """Reads one model as often as it is called, in the form asked for; fits `attacks.finding.Load`."""

    model: Model
    adapter: str | None
    device: torch.device
    identity: str = ""
    """Stands for the model, where that is asked."""

    def __call__(self, *, quantize: Bits | None = None, merged: bool = False, adapter: bool = True) -> Loaded:
        """
        Args:
            quantize: instead of what the model is loaded in.
            merged: the adapter is merged into the unquantized weights, as it is released, and they are quantized then.
            adapter: False leaves the adapter off.

        Raises:
            Refused: the model cannot be had in this form, and why.
        """
        wanted = replace(self.model, quantize=quantize or self.model.quantize)
        path = self.adapter if adapter else None
        if not merged or not (path or self.model.start):
            return load(wanted, self.device, adapter=path)
        own = own_quantization(read_config(self.model))
        if own and not wanted.quantize and own.format in BITS:
            wanted = replace(wanted, quantize=own.format)
        whole = load(replace(self.model, quantize=None), self.device, adapter=path, full_precision=True)
        if combination_of(whole.causal):
            raise Refused(f"{path}: combines the logits of several models, which no one set of weights does; it cannot be merged.")
        net = merge_adapter(whole.model, str(path)) if has_adapter(whole.model) else whole.model
        parts = (*whole.parts, "merged", wanted.quantize)
        if not wanted.quantize:
            return replace(whole, model=net, parts=parts)
        with TemporaryDirectory(prefix="llm-unlearn-") as folder:  # bitsandbytes quantizes what it reads, not what is in memory
            # every process for itself: save_pretrained writes on the first one only, and the others may not see its disk
            net.config.save_pretrained(folder)
            save_model(net, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
            whole.tokenizer.save_pretrained(folder)
            del net
            return replace(load(replace(wanted, base=folder, revision=None, start=None), self.device), parts=parts)


@contextlib.contextmanager
def adapter_scaled(model: Any, factor: float) -> Iterator[None]:
    """Inside, the adapter counts `factor` times: 0 is the model without it, −1 takes away what it adds. Where the base's logits are
    combined with others', these count so often; where probabilities are averaged, each member's adapter does.

    Raises:
        Refused: the adapter is of a kind that has no scale.
    """
    wanted = combination_of(causal(model))
    if wanted and wanted.rule != "average":
        with counted(causal(model), factor):
            yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and hasattr(layer, "scaling")]
    if not layers:
        raise Refused("this adapter has no scale that could be changed (LoRA has one).")
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scales in zip(layers, kept, strict=True):
            layer.scaling.update({name: factor * scale for name, scale in scales.items()})
        yield
    finally:
        for layer, scales in zip(layers, kept, strict=True):
            layer.scaling.update(scales)
