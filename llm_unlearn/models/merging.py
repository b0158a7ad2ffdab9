"""Merge an adapter into its base, checked: the merged weights give the logits that base and adapter gave."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm_unlearn.models.quantized import is_quantized
from llm_unlearn.models.structure import spread_ids
from llm_unlearn.spec import Refused, reason


def merge_adapter(model: Any, name: str) -> Any:
    """Merge the adapter of a peft model into its base, and return the base.

    A head that shares its weight with the embedding gets a weight of its own first where either of them is adapted: merging would
    otherwise change the other one too.

    Args:
        name: what the user calls the adapter.

    Raises:
        Refused: the base is quantized, the adapter's kind cannot be merged, or the merged model gives other logits.
    """
    net = model.get_base_model()
    if is_quantized(net):
        raise Refused(
            f"{name}: an adapter cannot be merged into quantized weights without a loss. Use a base that is not quantized."
        )
    expected = _logits(model)
    _untie(net)
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"{name}: this adapter cannot be merged ({reason(error)}). Use it beside its base.") from error
    found = _logits(merged)
    half = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in merged.parameters())
    differences = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-12)
    apart = float(differences.median())  # a wrong merge shows in every sequence, float32's rounding may be large in one
    if not apart <= (5e-2 if half else 1e-3):
        raise Refused(f"{name}: merged into its base it gives other logits, {100 * apart:.2g} % apart. Use it beside its base.")
    return merged


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Return logits (5, 8, V) on tokens from all over the vocabulary, in evaluation mode."""
    was = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        return torch.as_tensor(model(input_ids=spread_ids(model, 5, 8), use_cache=False).logits).float()
    finally:
        for module, training in was:
            module.training = training


def _untie(net: Any) -> None:
    """Give a tied head a weight of its own, if the head or the embedding has an adapter."""
    ends = [net.get_input_embeddings(), net.get_output_embeddings()]
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embedding, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    for config in {id(one): one for one in (net.config, net.config.get_text_config())}.values():
        config.tie_word_embeddings = False
