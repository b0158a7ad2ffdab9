"""Parts of a transformers causal LM, found by their structure: its body and its decoder layers.

Attributes such as `base_model_prefix` differ between architectures and are wrong in some (Llama-4), so the module tree decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.spec import Refused

STRIDE = 7919
"""Distance of the ids that a model is tried on. Special tokens lie together, and a sequence of them alone is ill-conditioned: on
SmolLM2 the rounding of bfloat16 moves single states by more than their own length, and that of float32 moves logits by 1e-3."""


def spread_ids(net: Any, sequences: int, length: int) -> Tensor:
    """Return ids (sequences, length) from all over a model's vocabulary, on its device."""
    places = torch.arange(1, sequences * length + 1, device=net.device).view(sequences, length)
    return places * STRIDE % int(net.config.get_text_config().vocab_size)


def decoder_layers(net: Any) -> tuple[str, nn.ModuleList]:
    """Return the full name and the list of a model's decoder layers, at any depth.

    These are the outermost `nn.ModuleList` of `num_hidden_layers` modules; of several, the one that holds most weights, as
    attention or mixers lie in it.

    Raises:
        Refused: no list has that length.
    """
    depth = int(net.config.get_text_config().num_hidden_layers)
    lists = {name: part for name, part in net.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth}
    outermost = {name: part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outermost:
        raise Refused(f"{type(net).__name__}: its {depth} decoder layers were not found; this architecture is not supported.")
    name = max(outermost, key=lambda one: sum(weight.numel() for weight in outermost[one].parameters()))
    return name, outermost[name]


def body_of(net: Any) -> tuple[str, Any]:
    """Return the attribute name and the module of everything below the output head; it returns `last_hidden_state`.

    It is the module that `base_model_prefix` names, or, where that names none, the child that holds the decoder layers.

    Raises:
        Refused: the model has no such part.
    """
    prefix = str(net.base_model_prefix)
    if prefix in net._modules:
        return prefix, net._modules[prefix]
    name, _, inner = decoder_layers(net)[0].partition(".")
    if not inner:
        raise Refused(f"{type(net).__name__}: its decoder is no part of its own; this architecture is not supported.")
    return name, net._modules[name]


def check_decoder(net: Any) -> None:
    """Check that a model predicts each token from those before it, by a head that reads its last hidden states.

    Raises:
        Refused: its layers are those of an encoder, or its head has layers of its own.
    """
    kind = type(net).__name__
    _, layers = decoder_layers(net)
    causal = [getattr(part, "is_causal", None) for part in layers.modules()]
    said = getattr(net.config, "is_decoder", None) is False  # GPT-NeoX says so too, and is causal
    if said and False in causal and True not in causal:
        raise Refused(
            f"{kind}: its layers read the tokens that follow, as an encoder does (is_decoder: false). Take a causal language model."
        )
    head = net.get_output_embeddings()
    owner = next((part for part in net.modules() if any(child is head for child in part.children())), None)
    beside = (
        [name for name, child in owner.named_children() if child is not head and any(True for _ in child.parameters())]
        if owner
        else []
    )
    if owner is not None and owner is not net and beside:
        raise Refused(f"{kind}: its head has layers of its own ({', '.join(beside)}); this architecture is not supported.")
