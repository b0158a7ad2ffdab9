"""Which weights of a model a run changes: those chosen of full weights, those that an adapter changes, and routers that stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from llm_unlearn.models.adapter_targets import Targets, without_layer
from llm_unlearn.models.experts import experts_of
from llm_unlearn.spec import Refused

PEFT = "0.21.2"
"""The version that this was tested with; earlier ones leave expert matrices out without a word."""

Weight = tuple[str, tuple[int, ...], int, int | None]
"""Name, shape, numbers that are trained, rank of the adapter."""


@dataclass(frozen=True)
class Group:
    """Weights of one kind: the same name in every decoder layer that has one, and the same shape."""

    name: str
    """Without the number of the layer."""
    shape: tuple[int, ...]
    count: int
    """Number of weights."""
    trainable: int
    """Numbers that are trained, in all of them together."""
    rank: int | None = None
    """Of the adapter; None where the weights themselves are trained, or frozen."""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Return name, shape, number of layers and rank as words of a table."""
        size, layers = "×".join(map(str, self.shape)), f"{self.count} layer{'s' if self.count > 1 else ''}"
        return self.name, size, layers, f"rank {self.rank}" if self.rank else ""

    @property
    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "shape": list(self.shape)}


LEAST = (27, 15, 9, 8)
"""Least widths of the columns name, shape, layers and rank."""


def table(groups: Sequence[Group]) -> list[str]:
    """Return the lines of a table of weights, its columns aligned."""
    rows = [group.cells for group in groups]
    widths = [max(least, *(len(row[i]) for row in rows)) for i, least in enumerate(LEAST)] if rows else []
    return ["  ".join(map(str.ljust, row, widths)) + f" {group.trainable:>13,}" for row, group in zip(rows, groups, strict=True)]


def choose_weights(net: nn.Module, names: tuple[str, ...] | None) -> None:
    """Train only the full weights whose name holds one of `names`, or all of them; before anything builds an optimizer on them.
    A router is trained only where a name is its own: `mlp.gate`, and not `layers.7.mlp`, which also holds it.

    Raises:
        Refused: one of the names is in no weight's name.
    """
    experts = experts_of(net)
    if names is None:
        for weight in experts.weights.values():
            weight.requires_grad_(False)
        return
    for wanted in names:
        if not any(wanted in name for name, _ in net.named_parameters()):
            known = ", ".join(list(dict(net.named_parameters()))[1:10])
            raise Refused(f"model.trainable: no weight has {wanted!r} in its name; the first weights here are {known}.")
    for name, weight in net.named_parameters():
        router = experts.router_of(name)
        start = 0 if router is None else router.rfind(".") + 1
        end = len(name) if router is None else len(router)
        weight.requires_grad_(any(_overlaps(name, wanted, start, end) for wanted in names))


def _overlaps(name: str, part: str, start: int, end: int) -> bool:
    """Return whether a part of a name touches what lies from `start` to `end`."""
    places = [place.start() for place in re.finditer(f"(?={re.escape(part)})", name)]
    return any(place < end and place + len(part) > start for place in places)


def check_adapted(model: nn.Module, targets: Targets) -> None:
    """Check that peft has adapted exactly what was meant, and keep what it writes down in one order.

    Raises:
        Refused: it left something out, or changed something besides.
    """
    changed = {_own_name(name, one) for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    meant = {*targets.modules, *(name.removesuffix(".weight") for name in targets.parameters)}
    if other := sorted(changed ^ meant):
        text = "is left out by this version of peft" if other[0] in meant else "is adapted by this version of peft unasked"
        raise Refused(f"model.adapter.targets: {other[0]} {text}. Install peft>={PEFT}.")
    config = model.peft_config["default"]  # type: ignore[union-attr, index]
    for name in ("target_modules", "target_parameters"):
        if isinstance(value := getattr(config, name), (set, list, tuple)):
            setattr(config, name, sorted(value))


def adapted(model: nn.Module) -> list[Group]:
    """Return what an adapter changes, grouped, in the order of the model; of a model without one, nothing."""
    found: list[Weight] = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            own = [one for part in (layer.lora_A, layer.lora_B) if "default" in part for one in part["default"].parameters()]
            embedding = [part["default"] for part in (layer.lora_embedding_A, layer.lora_embedding_B) if "default" in part]
            trained = sum(one.numel() for one in (*own, *embedding) if one.requires_grad)
            found.append((_own_name(name, layer), _shape(layer), trained, int(layer.r["default"])))
    return _grouped(found)


def trained(net: nn.Module) -> list[Group]:
    """Return the weights themselves that a run may change, grouped."""
    return _grouped([(name, tuple(one.shape), one.numel(), None) for name, one in net.named_parameters() if one.requires_grad])


def frozen_routers(net: nn.Module) -> list[Group]:
    """Return the router matrices that stay as they are; of an adapted model, those that have no adapter."""
    base = net.get_base_model() if isinstance(net, peft.PeftModel) else net
    changed = {_own_name(name, one) for name, one in base.named_modules() if isinstance(one, LoraLayer)}
    found: list[Weight] = []
    for name, one in experts_of(base).weights.items():
        plain = name.replace(".base_layer", "")
        if not one.requires_grad and plain not in changed and plain.removesuffix(".weight") not in changed and one.ndim > 1:
            found.append((plain, tuple(one.shape), 0, None))
    return _grouped(found)


def router_facts(net: nn.Module) -> dict[str, Any]:
    """Return what a run says of routers that it left as they are; of a dense model, nothing."""
    routers = frozen_routers(net)
    return {"frozen_routers": [group.facts for group in routers]} if routers else {}


def _own_name(name: str, layer: Any) -> str:
    """The name in the model without its adapter."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{plain}.{layer.parameter_name}".removesuffix(".weight") if isinstance(layer, ParamWrapper) else plain


def _shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, ParamWrapper):
        return tuple(layer.get_param().shape)
    return (int(layer.out_features), int(layer.in_features))  # of a quantized layer the weight itself is a row of bytes


def _grouped(found: list[Weight]) -> list[Group]:
    groups: dict[tuple[str, tuple[int, ...], int | None], list[int]] = {}
    for name, shape, trained, rank in found:
        groups.setdefault((without_layer(name).removesuffix(".weight"), shape, rank), []).append(trained)
    return [Group(name, shape, len(each), sum(each), rank) for (name, shape, rank), each in groups.items()]
