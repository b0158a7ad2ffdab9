"""Sequences laid end to end, without padding, where a model's attention can keep them apart.

Linear layers, norms and the head see each token by itself, so only attention must know where a sequence begins. On CUDA in half
precision that is PyTorch's variable-length attention; elsewhere queries, keys and values are put into a padded grid for attention
alone. FlashAttention, where a model was loaded with it, reads the same arguments. Whether a model can be trusted with it is
tried, not assumed.

T tokens of B sequences, L the longest, H heads of size d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_unlearn.data.batch import Packing

NAME = "sdpa_or_packed"


def arguments(packing: Packing | None) -> dict[str, Any]:
    """What a transformers model is given besides ids. The mask of one element says: ask for no other."""
    if packing is None:
        return {}
    starts, longest = packing.starts, packing.longest
    return {
        "position_ids": packing.position_ids,
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=starts.device),
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
        "packed_at": packing.place,
    }  # fmt: skip


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, packed_at: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, in the place of its own `sdpa`: (1, H, T, d) -> (1, T, H, d) where sequences lie end to
    end, and as ever where they do not."""
    if packed_at is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return found
    if others.get("softcap") or others.get("position_bias") is not None or others.get("s_aux") is not None:
        raise NotImplementedError("attention of this kind over sequences that lie end to end")
    starts, longest = others["cu_seq_lens_q"], int(others["max_length_q"])
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # (T, H, d)
        out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=groups > 1)
        assert isinstance(out, Tensor)
        return out[None], None
    count = len(starts) - 1
    q, k, v = (_spread(one, packed_at, count, longest) for one in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    made = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)  # (B, H, L, d)
    return made.transpose(1, 2).flatten(0, 1).index_select(0, packed_at)[None], None


def _spread(one: Tensor, at: Tensor, count: int, longest: int) -> Tensor:
    """(1, H, T, d) -> (B, H, L, d), padded on the right."""
    rows = one[0].transpose(0, 1)  # (T, H, d)
    grid = rows.new_zeros((count * longest, *rows.shape[1:])).index_copy(0, at, rows)
    return grid.view(count, longest, *rows.shape[1:]).transpose(1, 2)


def offer(net: Any, longest: int) -> bool:
    """Let a transformers model read sequences that lie end to end; False where its kind of attention cannot.

    Args:
        longest: tokens of the longest sequence. Where attention reaches less far back, packing is not offered.
    """
    kind, config = net.config._attn_implementation, net.config.get_text_config()
    if any(longest > (getattr(config, reach, None) or longest) for reach in ("sliding_window", "attention_chunk_size")):
        return False
    if kind == "sdpa":
        net.set_attn_implementation(NAME)
    return kind in ("sdpa", NAME) or str(kind).startswith("flash_attention")


def withdraw(net: Any) -> None:
    """Undo `offer`."""
    if net.config._attn_implementation == NAME:
        net.set_attn_implementation("sdpa")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
