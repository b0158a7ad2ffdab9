"""Small random models of every causal architecture that transformers brings: a config of few and small layers for each.

The sizes are set by the names that a config class uses for them; what a class asks for beyond that stands in `CHANGES`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The model types of transformers that have a causal language model."""

_POPULAR = (
    "bamba bloom cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 falcon falcon_h1 gemma gemma2 gemma3_text glm4 glm4_moe "
    "gpt2 gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid jamba lfm2 llama llama4_text mamba mamba2 minimax mistral "
    "mixtral nemotron olmo2 olmo3 olmoe opt phi phi3 qwen2 qwen3 qwen3_moe qwen3_next smollm3 stablelm starcoder2 zamba2"
)
POPULAR = frozenset(_POPULAR.split())
"""The model types that every run of the tests examines; the others are examined by `make test-long`."""

_NAMES = {
    1088: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length model_max_length "
    "original_max_position_embeddings",
    128: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size d_inner",
    64: "hidden_size n_embd d_model embedding_size d_embed word_embed_proj_dim attention_hidden_size lru_width kv_lora_rank "
    "q_lora_rank o_lora_rank",
    32: "image_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"
    " hidden_size_per_layer_input mamba_d_head",
    16: "head_dim kv_channels v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "index_head_dim global_head_dim swa_head_dim dim_head mamba_d_state state_size mamba_dt_rank time_step_rank",
    8: "patch_size qk_rope_head_dim rotary_dim sliding_window sliding_window_size window_size attention_chunk_size local_attention "
    "chunk_size mamba_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads n_routed_experts num_experts num_local_experts moe_num_experts "
    "swa_num_attention_heads linear_num_value_heads linear_num_heads n_mamba_heads mamba_n_heads mamba_num_heads laurel_rank "
    "index_topk",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "num_key_value_heads n_head_kv num_kv_heads num_global_key_value_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k_experts linear_num_key_heads index_n_heads",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts "
    "moe_num_shared_experts n_groups mamba_n_groups moe_layer_start_index",
}
LARGEST = 3_000_000
"""Weights of a small model."""
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
SCALES = dict.fromkeys(("initializer_range", "init_std"), 0.1)  # logits that differ by more than rounding

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": None},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 128},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> settings of its config that its sizes ask for, or without which it has only some of its kinds of layers."""


def small_config(kind: str) -> PreTrainedConfig:
    """Return a config of a model type with hidden size 64 and as few layers as it can have.

    Raises:
        Exception: whatever the class says of these sizes.
    """
    return _small(CONFIG_MAPPING[kind], CHANGES.get(kind, {}))


def _small(made_by: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    known = made_by().to_dict()
    sizes = {name: value for name, value in (SIZES | IDS | SCALES).items() if name in known}
    for name, part in made_by.sub_configs.items():
        if isinstance(known.get(name), dict) and hasattr(part, "model_type"):
            sizes[name] = _small(part, changes.get(name, {})).to_dict()
    if "kv_lora_rank" in known:  # latent attention: every head has keys of its own, and their size has two parts
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    if kinds := known.get("layer_types"):  # one layer of each kind
        kinds = list(dict.fromkeys(kinds))
        sizes["layer_types"] = kinds = kinds * (2 if len(kinds) == 1 else 1)
        sizes["num_hidden_layers"] = len(kinds)
    return made_by(**(sizes | {name: value for name, value in changes.items() if name not in made_by.sub_configs}))


def small_model(kind: str) -> Any:
    """Return a random model of a model type, in evaluation mode, the same every time.

    Raises:
        ValueError: its config leaves some part large.
    """
    config = small_config(kind)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    count = sum(weight.numel() for weight in outline.parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} weights at hidden size 64: a part of it has no size that its config sets")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
