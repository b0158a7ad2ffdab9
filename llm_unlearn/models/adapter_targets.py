"""Which modules and parameters an adapter setting means in a loaded model, and what a model has adapted.

`targets_of(net, adapter)` answers before anything is changed, on real weights as on the meta device, so `plan` and `run` refuse
alike. `load.add_adapter` gives its answer to peft: `Targets.modules` as `target_modules` and `Targets.parameters` as
`target_parameters`, all of them full names, so that neither a list of layers nor a table of peft changes what is meant.
`trainable_weights` checks and lists what peft
has made of it.

- `all-linear`: every linear layer (of PyTorch, of GPT-2, quantized) that a forward pass calls, except the output head and routers,
  and all expert matrices.
- names: each is the end of the name of a layer, of a module that owns a matrix, or of a parameter; a router is adapted only if a
  name is its own. A single text that is no such end is read as a regular expression for whole names, as peft does.
- `layers`: only what lies in these decoder layers.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_unlearn.models.experts import Experts, experts_of
from llm_unlearn.models.structure import decoder_layers
from llm_unlearn.sections import Adapter
from llm_unlearn.spec import Refused

ALL = "all-linear"
LINEAR = (nn.Linear, Conv1D)
WHOLE = (*LINEAR, nn.Embedding)
"""Layers that peft adapts as a whole."""


@dataclass(frozen=True)
class Targets:
    """Full names, in the order of the model."""

    modules: tuple[str, ...]
    """Layers that peft wraps."""
    parameters: tuple[str, ...]
    """Matrices that peft adapts by themselves: of experts, of routers, and of layers whose name peft takes for an expert's."""


def targets_of(net: nn.Module, adapter: Adapter) -> Targets:
    """Return what an adapter setting means in a model.

    Args:
        net: a transformers causal LM without an adapter.

    Raises:
        Refused: a name is that of nothing that can be adapted, nothing is left, or a chosen layer shares its weights with others.
    """
    experts = experts_of(net)
    if adapter.targets == ALL:
        head = net.get_output_embeddings()  # type: ignore[operator]
        layers = [name for name, layer in net.named_modules() if isinstance(layer, LINEAR) and layer is not head]
        passed_by = _passed_by(net)
        modules = [name for name in layers if not experts.router_of(name) and name not in passed_by]
        parameters = list(experts.matrices)
    else:
        modules, parameters = _named(net, adapter.targets, experts)
    if adapter.layers is not None:
        inside = _in_layers(net, adapter.layers)
        modules, parameters = ([name for name in names if inside(name)] for names in (modules, parameters))
    if not modules and not parameters:
        where = f" in layers {list(adapter.layers)}" if adapter.layers is not None else ""
        raise Refused(f"model.adapter.targets: {adapter.targets!r} leaves nothing to adapt{where}. {_known(net, experts)}")
    return _for_peft(net, modules, parameters)


def _named(net: nn.Module, targets: str | tuple[str, ...], experts: Experts) -> tuple[list[str], list[str]]:
    """The layers, and the parameters, that names end; each name must end some."""
    names = (targets,) if isinstance(targets, str) else targets
    modules, parameters = _candidates(net, experts)
    matches = {name: [one for one in (*modules, *parameters) if _ends(one, name)] for name in names}
    if isinstance(targets, str) and not matches[targets]:
        with contextlib.suppress(re.error):
            matches[targets] = [one for one in (*modules, *parameters) if re.fullmatch(targets, one)]
    if unknown := [name for name, found in matches.items() if not found]:
        text, leaves = "ends no name of a layer that can be adapted", {one.rpartition(".")[2] for one in (*modules, *parameters)}
        near = difflib.get_close_matches(unknown[0], sorted(leaves), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Refused(f"model.adapter.targets: {', '.join(map(repr, unknown))} {text}.{hint} {_known(net, experts)}")
    chosen = {one for found in matches.values() for one in found}
    if passed_by := sorted(chosen & _passed_by(net)):
        text = "an adapter on it has no effect: this architecture reads its weight without calling it, or never uses it"
        raise Refused(f"model.adapter.targets: {passed_by[0]} is not supported; {text}. Leave it out.")
    own = [parameters[one] for one in parameters if one in chosen]
    return [one for one in modules if one in chosen], sorted({name for names in own for name in names}, key=_order(net))


def _candidates(net: nn.Module, experts: Experts) -> tuple[list[str], dict[str, list[str]]]:
    """Names of layers, and names of modules or parameters -> the parameters that they mean."""
    layers = [name for name, one in net.named_modules() if isinstance(one, WHOLE) and not experts.router_of(name)]
    parameters: dict[str, list[str]] = {}
    for name, one in (*experts.weights.items(), *experts.matrices.items()):
        if one.ndim in (2, 3):
            owner = experts.router_of(name) or name.rpartition(".")[0]
            parameters[name] = [name]
            parameters.setdefault(owner, []).append(name)
            parameters.setdefault(name.rpartition(".")[0], []).append(name)
    return layers, parameters


def _in_layers(net: nn.Module, layers: Iterable[int]) -> Callable[[str], bool]:
    """Return a test of whether a module or parameter lies in one of these decoder layers, and in these alone."""
    name, blocks = decoder_layers(net)
    if beyond := sorted(layer for layer in layers if layer >= len(blocks)):
        raise Refused(
            f"model.adapter.layers: {beyond[0]} does not exist; the decoder layers of this model are 0 to {len(blocks) - 1}."
        )
    chosen = tuple(f"{name}.{layer}." for layer in layers)
    owners: dict[int, set[int]] = {}
    for layer, block in enumerate(blocks):
        for weight in block.parameters():
            owners.setdefault(id(weight), set()).add(layer)
    weights = dict(net.named_parameters(remove_duplicate=False))

    def inside(one: str) -> bool:
        if not one.startswith(f"{name}."):
            return False
        mine = [weights[one]] if one in weights else list(net.get_submodule(one).parameters())
        used = set[int]().union(*(owners.get(id(weight), set()) for weight in mine))
        if used & set(layers) and (others := sorted(used - set(layers))):
            text = f"{one} is shared by decoder layers {sorted(used)}, and an adapter on it changes all of them"
            raise Refused(f"model.adapter.layers: {text}. Add {', '.join(map(str, others))}, or leave it out of targets.")
        return one.startswith(chosen) or bool(used & set(layers))

    return inside


def _for_peft(net: nn.Module, modules: list[str], parameters: list[str]) -> Targets:
    """The same split as peft needs it: a layer whose name peft would take for that of experts (`gate_proj` of a shared expert) is
    adapted by its weight."""
    mistaken = {leaf for leaf in {name.rpartition(".")[2] for name in modules} if _is_renamed(net, leaf)}
    whole = [name for name in modules if name.rpartition(".")[2] not in mistaken]
    alone = [f"{name}.weight" for name in modules if name.rpartition(".")[2] in mistaken]
    weights = dict(net.named_parameters())
    for name in alone:
        if not weights[name].is_floating_point():
            layer = name.removesuffix(".weight")
            text = f"peft takes {layer} for an expert of this architecture and cannot adapt its quantized weight"
            raise Refused(f"model.adapter.targets: {text}. Set model.quantize: null, or name targets without it.")
    return Targets(tuple(whole), tuple(sorted({*alone, *parameters}, key=_order(net))))


def _is_renamed(net: nn.Module, leaf: str) -> bool:
    """Return whether peft, for adapters of earlier versions of transformers, reads this name as that of an expert or a router."""
    config = peft.LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, net, None)
    except ValueError:  # half of a matrix that this architecture keeps in one
        return True
    return leaf not in config.target_modules


def _passed_by(net: nn.Module) -> set[str]:
    """Linear layers on which an adapter would do nothing: those that a forward pass on text does not call, as it reads their weight
    itself (`dt_proj` of Mamba) or never needs them (a vision tower), and those that peft knows to be passed by in fused kernels."""
    layers = [name for name, layer in net.named_modules() if isinstance(layer, LINEAR)]
    called = _called(net)
    return {name for name in layers if (called is not None and name not in called) or _is_refused_by_peft(net, name)}


def _is_refused_by_peft(net: nn.Module, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), net, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


@torch.no_grad()
def _called(net: Any) -> set[str] | None:
    """Names of the layers that a forward pass over a few tokens calls, tried on the meta device where the weights lie there; None
    where the architecture cannot be tried so."""
    called: set[str] = set()
    devices = {weight.device.type: weight.device for weight in net.parameters()}
    device = devices.get("meta") or next(iter(devices.values()))  # XLNet leaves one parameter on the CPU in any context
    ids = torch.ones((1, 8), dtype=torch.long, device=device)
    mask = {"attention_mask": torch.ones((1, 1, 8, 8), dtype=torch.bool, device=device)}  # whole: nothing is asked of its values
    handles = [
        layer.register_forward_pre_hook(_noting(called, name)) for name, layer in net.named_modules() if isinstance(layer, LINEAR)
    ]
    own = getattr(net.config, "_experts_implementation", None)
    try:
        if device.type != "meta":
            net(input_ids=ids, use_cache=False)
            return called
        if own:
            net.set_experts_implementation("batched_mm")  # the others look at how many tokens each expert gets
        for more in (mask, {}):
            with contextlib.suppress(Exception), torch.device("meta"):
                net(input_ids=ids, use_cache=False, **more)
                return called
        return None
    finally:
        for handle in handles:
            handle.remove()
        if own and device.type == "meta":
            net.set_experts_implementation(own)


def _noting(called: set[str], name: str) -> Callable[..., None]:
    return lambda layer, given: called.add(name)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _order(net: nn.Module) -> Callable[[str], int]:
    places = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    return lambda name: places[name]


def _known(net: nn.Module, experts: Experts) -> str:
    """Return the names that can be given, in words."""
    layers, _ = _candidates(net, experts)
    routers = sorted({without_layer(name).rpartition(".")[2] for name in experts.routers})
    names = sorted({name.rpartition(".")[2] for name in layers} | {name.rpartition(".")[2] for name in experts.matrices})
    return f"Layers here: {', '.join(names)}{f'; routers: {chr(44).join(routers)}' if routers else ''}."


def without_layer(name: str) -> str:
    """`model.layers.3.mlp.gate` -> `mlp.gate`; a name outside of any numbered list stays as it is."""
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"^.*?\.\d+\.", "", name, count=1))
