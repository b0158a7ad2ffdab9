"""Adapter targets in a model: routers, expert matrices, chosen layers, hybrids, and what peft makes of it."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_llama
from mixtures import KINDS, make_mixture
from transformers import AutoModelForCausalLM

from llm_unlearn.models.adapter_targets import targets_of
from llm_unlearn.models.experts import experts_of
from llm_unlearn.models.load import add_adapter
from llm_unlearn.models.trainable_weights import adapted, choose_weights, frozen_routers
from llm_unlearn.sections import Adapter
from llm_unlearn.spec import Refused

IDS = torch.arange(1, 9)[None]


def on_meta(kind: str) -> Any:
    """The same architecture without weights, as `plan` builds it."""
    config = make_mixture(kind).config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def moved(model: Any) -> Any:
    """An adapted model whose B are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.1)
    return model


def routers_that_route(net: Any) -> set[str]:
    """Modules in whose forward pass, or of whose output, experts are chosen: found by watching `torch.topk`, for comparison."""
    stack: list[str] = []
    found: set[str] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "topk":
                found.add(stack[-1])
            return func(*args, **(kwargs or {}))

    handles = []
    for name, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: stack.pop() and None))
    with torch.no_grad(), Watch():
        net(IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next", "jamba", "granitemoehybrid"])
def test_routers_are_the_modules_that_choose_experts(kind: str) -> None:
    net = make_mixture(kind)
    routers = {name for name in experts_of(net).routers if not name.endswith("shared_expert_gate")}
    assert routers and routers == routers_that_route(net)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_adapts_every_matrix_that_is_no_router_and_reaches_the_output(kind: str) -> None:
    net = make_mixture(kind)
    targets, foreseen = targets_of(net, Adapter()), targets_of(on_meta(kind), Adapter())
    assert targets == foreseen  # plan and run mean the same
    matrices = {name.removesuffix(".weight") for name, one in net.named_parameters() if one.ndim in (2, 3) and "_bias" not in name}
    routers = set(experts_of(net).routers)
    left_out = matrices - set(targets.modules) - {name.removesuffix(".weight") for name in targets.parameters}
    left_out = {name for name in left_out if "adapter_list" not in name}  # Zamba2's blocks have some that another block uses
    known = ("embed_tokens", "lm_head", "conv1d", "A_log", "conv.conv", "dt_proj", "mamba.out_proj")
    assert {name for name in left_out - routers if not name.endswith(known)} == set()
    with torch.no_grad():
        before = net(IDS).logits
    model = add_adapter(net, Adapter(rank=2), seed=0)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moved(model)
    loss = model(IDS).logits.float().square().mean()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    unreached = [name for name, one in zip(trained, gradients, strict=True) if one is None or not one.any()]
    assert unreached == []
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_loaded_and_merged_by_plain_peft(kind: str, tmp_path: Path) -> None:
    model = moved(add_adapter(make_mixture(kind), Adapter(rank=2), seed=0)).eval()
    model.save_pretrained(str(tmp_path))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        own = model(IDS).logits
        other = peft.PeftModel.from_pretrained(make_mixture(kind), str(tmp_path)).eval()
        assert torch.equal(other(IDS).logits, own)
        assert torch.allclose(other.merge_and_unload()(IDS).logits, own, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba"])
def test_layers_keep_experts_and_leave_out_other_layers(kind: str) -> None:
    model = add_adapter(make_mixture(kind), Adapter(rank=2, layers=(1,)), seed=0)
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert all(".layers.1." in name for name in names)
    whole = targets_of(make_mixture(kind), Adapter())
    mine = [name for name in (*whole.modules, *whole.parameters) if ".layers.1." in name]
    assert sum(group.count for group in adapted(model)) == len(mine) == len(names)
    assert any("experts" in group.name for group in adapted(model))


def test_a_router_is_adapted_where_it_is_named_and_only_there() -> None:
    net = make_mixture("qwen3_moe")
    model = moved(add_adapter(net, Adapter(rank=2, targets=("q_proj", "mlp.gate")), seed=0))
    assert [group.name for group in adapted(model)] == ["self_attn.q_proj", "mlp.gate"]
    assert frozen_routers(model) == []
    with torch.no_grad():
        chosen = model(IDS, output_router_logits=True).router_logits[0]
        with model.disable_adapter():
            before = model(IDS, output_router_logits=True).router_logits[0]
    assert not torch.allclose(chosen, before)
    assert [group.name for group in frozen_routers(add_adapter(make_mixture("qwen3_moe"), Adapter(rank=2), seed=0))] == ["mlp.gate"]


def test_full_weights_leave_routers_frozen_unless_they_are_named() -> None:
    def trained(names: tuple[str, ...] | None) -> set[str]:
        net = make_mixture("qwen3_moe")
        choose_weights(net, names)
        return {name for name, weight in net.named_parameters() if weight.requires_grad}

    everything = set(dict(make_mixture("qwen3_moe").named_parameters()))
    gates = {name for name in everything if name.endswith("mlp.gate.weight")}
    assert len(gates) == 2 and trained(None) == everything - gates
    assert trained(("layers.1.mlp",)) == {name for name in everything if "layers.1.mlp" in name} - gates
    assert trained(("layers.1.mlp.gate",)) == {"model.layers.1.mlp.gate.weight"}
    assert trained(("gate.weight",)) == gates
    assert trained(("weight",)).isdisjoint(gates)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_names_that_end_nothing_are_refused_and_what_exists_is_listed(kind: str) -> None:
    net = make_llama() if kind == "llama" else make_mixture(kind)
    with pytest.raises(Refused, match=r"'nowhere' ends no name .*Layers here: .*q_proj"):
        targets_of(net, Adapter(targets=("q_proj", "nowhere")))
    with pytest.raises(Refused, match=r"model.adapter.layers: 7 does not exist"):
        targets_of(net, Adapter(layers=(7,)))
    assert targets_of(net, Adapter(targets="q_proj")) == targets_of(net, Adapter(targets=("q_proj",)))
    assert len(targets_of(net, Adapter(targets=r".*\.[qk]_proj")).modules) == 2 * net.config.num_hidden_layers


def test_a_layer_that_is_only_read_is_left_out_and_refused_by_name() -> None:
    for net in (make_mixture("jamba"), on_meta("jamba")):
        assert not any(name.endswith("dt_proj") for name in targets_of(net, Adapter()).modules)
        with pytest.raises(Refused, match="dt_proj is not supported; an adapter on it has no effect"):
            targets_of(net, Adapter(targets=("dt_proj",)))


def test_experts_by_the_name_of_their_matrix_or_of_their_module() -> None:
    net = make_mixture("mixtral")
    assert targets_of(net, Adapter(targets=("gate_up_proj",))).parameters == tuple(
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)
    )
    assert len(targets_of(net, Adapter(targets=("experts",))).parameters) == 4
