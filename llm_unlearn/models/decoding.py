"""Check whether a model writes the same text in a padded batch and with a cache as alone and without one: tried, not assumed.

Recurrent architectures often read padding as text (RWKV ignores the attention mask), and some caches do not hold all that the next
token depends on. Such a model writes one text at a time, or reads the whole text for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from llm_unlearn.models.load import causal

TOKENS = 3
"""Tokens that are written in a trial."""


@dataclass(frozen=True)
class Decoding:
    """Ways of decoding that do not change what a model writes."""

    cached: bool = True
    """The cache of earlier tokens may be reused."""
    padded: bool = True
    """Prompts of different lengths may be in one batch, padded on the left."""


_KNOWN: WeakKeyDictionary[Any, Decoding] = WeakKeyDictionary()


def decoding_of(model: Any) -> Decoding:
    """Return how a model can be asked for texts, tried once for each model on two short prompts."""
    net = causal(model)
    if net not in _KNOWN:
        ids = torch.arange(1, 9, device=net.device) % net.config.get_text_config().vocab_size
        prompts = [ids[:3], ids[:8]]
        alone = [_logits(model, [prompt], cached=False) for prompt in prompts]
        cached = all(_near(model, [prompt], own, cached=True) for prompt, own in zip(prompts, alone, strict=True))
        _KNOWN[net] = Decoding(cached, _near(model, prompts, torch.cat(alone), cached))
    return _KNOWN[net]


def _near(model: Any, prompts: Sequence[Tensor], own: Tensor, cached: bool) -> bool:
    """Return whether logits are those that the model computes of each text alone, up to rounding."""
    try:
        other = _logits(model, prompts, cached)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return False
    half = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters())
    within = 2e-2 if half or torch.is_autocast_enabled(own.device.type) else 1e-3
    return torch.allclose(own, other, rtol=within, atol=within * float(own.abs().max()))


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[Tensor], cached: bool) -> Tensor:
    """(B, TOKENS, V) of the tokens that follow the prompts, which are padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest, device=ids.device) >= longest - len(prompt) for prompt in prompts]).long()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, use_cache=cached, output_logits=True, return_dict_in_generate=True
    )
    with without_defaults(causal(model)):
        return torch.stack(model.generate(input_ids=ids, attention_mask=mask, generation_config=settings).logits, 1).float()


@contextmanager
def without_defaults(net: Any) -> Iterator[None]:
    """Hide the model's generation_config.json, from which `generate` fills every setting that is left unset (penalties, forced and
    suppressed tokens, minimal lengths)."""
    own = net.generation_config
    try:
        net.generation_config = GenerationConfig()
        yield
    finally:
        net.generation_config = own
