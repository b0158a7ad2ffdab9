"""Nothing is drawn at random while a model is trained, on architectures that draw in train mode."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_cases import write_case

from llm_unlearn.cli import main
from llm_unlearn.models.load import read_config
from llm_unlearn.models.scores import checkpoint_activations
from llm_unlearn.models.training_mode import check_training_mode, enable_training
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
RANDOM: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3),
    "phimoe": transformers.PhimoeConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "opt, layers dropped": transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        layerdrop=0.5, dropout=0.0,
    ),
    "gpt2, dropout": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip


def passes(net: Any, count: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [net(input_ids=torch.arange(12)[None], use_cache=False).logits for _ in range(count)]


@pytest.mark.parametrize("name", RANDOM)
def test_passes_while_training_are_those_of_evaluation(name: str) -> None:
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(RANDOM[name]).eval()
    (measured,) = passes(net, 1)
    net.train()
    assert any(not torch.equal(one, measured) for one in passes(net, 8)), "this architecture draws in train mode"
    enable_training(net)
    assert all(torch.equal(one, measured) for one in passes(net, 8))
    check_training_mode(net)
    checkpoint_activations(net)
    enable_training(net)
    recomputing = [module for module in net.modules() if module.training]
    assert recomputing and all(module.gradient_checkpointing for module in recomputing)


@pytest.mark.parametrize(("always", "said"), [(True, "other numbers each time"), (False, "than when it is evaluated")])
def test_a_source_of_another_kind_is_refused(always: bool, said: str) -> None:
    """Noise that does not ask whether it is trained, and a layer that must be in train mode but changes what it computes."""

    class Odd(torch.nn.Linear):
        __module__ = "torch.nn" if always else "bitsandbytes.nn"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            return made + torch.randn_like(made) if always else made * (2.0 if self.training else 1.0)

    net = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()
    net.model.layers[0].mlp.down_proj = Odd(64, 32, bias=False).eval()
    with pytest.raises(Refused, match=f"LlamaForCausalLM: computes other numbers.*{said.removeprefix('other numbers ')}"):
        check_training_mode(net)
    assert not net.training and not net.model.layers[0].mlp.down_proj.training, "left as it was"


def test_noise_of_routers_is_off_in_training(tokenizer: Any, tmp_path: Path) -> None:
    settings = SMALL | {"vocab_size": 1024, "hidden_size": 64}
    config = transformers.MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert read_config(Model(base=str(tmp_path / "base"))).router_jitter_noise == 0.3, "Phi-3.5-MoE always routes by it"
    recipe = write_case(tmp_path, tmp_path / "base", adapter={"rank": 2, "targets": "q_proj"})
    assert main(["run", str(recipe), "evaluation=null"]) == 0
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    beta = 0.1
    assert first["forget"] == pytest.approx(2 / beta * math.log(2), rel=1e-5), "npo of a model that is its own reference"
    assert first["retain"] == pytest.approx(0.0, abs=1e-6)
