"""Bodies and decoder layers found by structure, on architectures that name them differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from llm_unlearn.models.structure import body_of, decoder_layers
from llm_unlearn.models.trials import check_depth, check_head, last_norm
from llm_unlearn.spec import Refused

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OPT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA4 = {"intermediate_size_mlp": 64, "head_dim": 8}
CASES: dict[str, tuple[Any, str, str]] = {
    "llama": (transformers.LlamaConfig(**SMALL), "model", "model.layers"),
    "gpt2": (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "transformer", "transformer.h"),
    "opt": (transformers.OPTConfig(**OPT, word_embed_proj_dim=32), "model", "model.decoder.layers"),
    "opt, projected": (
        transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False), "model", "model.decoder.layers",
    ),
    "llama4": (transformers.Llama4TextConfig(**SMALL, **LLAMA4, num_local_experts=2), "model", "model.layers"),
    "as many experts as layers": (
        transformers.MixtralConfig(**SMALL, num_local_experts=2), "model", "model.layers",
    ),
    "mamba": (transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "backbone", "backbone.layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_body_and_layers_are_found_and_read_right(name: str) -> None:
    config, body, layers = CASES[name]
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert body_of(net) == (body, getattr(net, body))
    assert decoder_layers(net) == (layers, net.get_submodule(layers))
    assert decoder_layers(body_of(net)[1])[1] is net.get_submodule(layers)
    check_head(net)
    check_depth(net, (0,))
    assert isinstance(last_norm(net), torch.nn.Module)


def test_a_model_without_a_list_of_its_depth_is_refused() -> None:
    net = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    net.config.num_hidden_layers = 3
    with pytest.raises(Refused, match=r"LlamaForCausalLM: its 3 decoder layers were not found"):
        decoder_layers(net)
