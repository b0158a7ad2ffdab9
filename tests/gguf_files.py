"""Tiny GGUF files, written as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip
"""Part of a name in transformers' Llama -> the same in GGUF."""


def write_gguf(
    path: Path,
    net: Any,
    tokenizer: Any,
    precision: str = "F32",
    architecture: str = "llama",
    drop: tuple[str, ...] = (),
    **keys: int,
) -> dict[str, np.ndarray]:
    """Write a Llama and its tokenizer.

    Args:
        precision: F32, F16 or Q8_0, of every matrix; vectors stay F32.
        drop: names of GGUF tensors to leave out.
        keys: further numbers of the header; `__` stands for a dot.

    Returns:
        The value of every tensor after a reader has made float32 of it, by its name in transformers.
    """
    import gguf

    kind, config = gguf.GGMLQuantizationType[precision], net.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if precision == 'F32' else 'MOSTLY'}_{precision}"])
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    expected = {}
    for name, tensor in net.state_dict().items():
        values = tensor.float().numpy()
        theirs = name
        for ours, short in NAMES.items():
            theirs = theirs.replace(ours, short)
        if theirs in drop:
            continue
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        rows = values if not heads else values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        data = gguf.quants.quantize(np.ascontiguousarray(rows), stored)
        writer.add_tensor(theirs, data, raw_dtype=stored)
        read = gguf.quants.dequantize(data, stored)
        expected[name] = read if not heads else read.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write a byte-level BPE tokenizer, its special tokens and its chat template."""
    import json

    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [vocabulary.get(i, f"[PAD{i}]") for i in range(size)]
    special = set(tokenizer.all_special_ids) | {i for i, one in tokenizer.added_tokens_decoder.items() if one.special}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 5 if i not in vocabulary else 1 for i in range(size)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
