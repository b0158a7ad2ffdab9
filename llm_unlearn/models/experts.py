"""Mixtures of experts: which modules route, what they say, and which parameters are stacked expert matrices.

Routers are found by the structure of the loaded model, not by names of architectures: by the classes that transformers records as
`router_logits`, and as the siblings of stacked expert matrices with one output row per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_unlearn.spec import Refused

RECORDED = "router_logits"
"""The name under which transformers records the outputs of routers."""


@dataclass(frozen=True)
class Experts:
    """The routers and expert matrices of a model; both empty for a dense model."""

    routers: dict[str, nn.Module]
    """Module name -> module, of everything that decides where a token goes or how much an expert counts."""
    matrices: dict[str, nn.Parameter]
    """Parameter name -> (E, …) expert matrices that no linear layer owns."""

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all routers."""
        return {f"{name}.{inner}": one for name, router in self.routers.items() for inner, one in router.named_parameters()}

    def router_of(self, name: str) -> str | None:
        """The router that is, or owns, the module or parameter of this name."""
        return next((router for router in self.routers if name == router or name.startswith(f"{router}.")), None)


def experts_of(net: nn.Module) -> Experts:
    """Find the routers and expert matrices of a transformers model, with weights or on the meta device."""
    modules = dict(net.named_modules())
    stacks = {name: sizes for name, module in modules.items() if (sizes := {len(one) for one in _stacked(module, 3)})}
    routers = {name: module for name, module in modules.items() if _is_recorded(net, module) and not _holds(name, stacks)}
    for name, sizes in stacks.items():
        parent = name.rpartition(".")[0]
        beside = {child: module for child, module in _children(modules, parent) if child != name and not _holds(child, stacks)}
        routers |= {child: module for child, module in beside.items() if _rows(module) in sizes}
    blocks = {name.rpartition(".")[0] for name in routers}
    for block in blocks:  # the gate of a shared expert: one number, by which its output is multiplied
        routers |= {child: module for child, module in _children(modules, block) if _rows(module) == 1}
    routers = {name: module for name, module in routers.items() if not any(name.startswith(f"{other}.") for other in routers)}
    matrices = {
        f"{name}.{inner}": one
        for block in sorted(blocks)
        for name, module in modules.items()
        if name.startswith(f"{block}.") and not any(name == router or name.startswith(f"{router}.") for router in routers)
        for inner, one in module.named_parameters(recurse=False)
        if any(one is stacked for stacked in (_stacked(module, 3) or _stacked(module, 2)))
    }
    order = {name: i for i, name in enumerate(modules)}
    return Experts(dict(sorted(routers.items(), key=lambda one: order[one[0]])), matrices)


@dataclass(frozen=True)
class Router:
    """A router whose logits transformers records."""

    name: str
    module: nn.Module
    index: int
    """Index in the tuple that the module returns."""

    @property
    def rows(self) -> int:
        """E, by the last of its matrices."""
        return [len(one) for one in self.module.parameters() if one.ndim == 2][-1]

    def logits(self, made: Any) -> Tensor:
        """(…, E) of what the module has returned."""
        found = made[self.index] if isinstance(made, (tuple, list)) else made
        return torch.as_tensor(found)


def recorded_routers(net: nn.Module) -> tuple[Router, ...]:
    """Return the routers whose logits can be read, in the order of the model.

    Raises:
        Refused: the model has none.
    """
    classes = _recorded_classes(net)
    routers = tuple(
        Router(name, module, index)
        for name, module in experts_of(net).routers.items()
        for index in [index for kind, index in classes.items() if isinstance(module, kind)][:1]
    )
    if not routers:
        raise Refused(
            f"objective: router_kl needs a mixture of experts, and {type(net).__name__} has no routers. Take the term out."
        )
    return routers


@contextmanager
def recording(routers: Iterable[Router]) -> Iterator[dict[str, Tensor]]:
    """Inside, collect the logits of routers as the model runs: name -> (B·L, E)."""
    found: dict[str, Tensor] = {}

    def keep(router: Router) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            logits = router.logits(made)
            found[router.name] = logits.reshape(-1, logits.shape[-1])

        return hook

    handles = [router.module.register_forward_hook(keep(router)) for router in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_recorded(net: nn.Module, module: nn.Module) -> bool:
    """Return whether transformers takes this module's output for router logits."""
    return any(isinstance(module, recorded) for recorded in _recorded_classes(net))


def _recorded_classes(net: nn.Module) -> dict[type[nn.Module], int]:
    """Class -> which of the outputs of its modules transformers records."""
    found: dict[type[nn.Module], int] = {}
    for part in net.modules():
        if isinstance(part, PreTrainedModel):
            recorders: Any = (getattr(part, "_can_record_outputs", None) or {}).get(RECORDED, ())
            for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
                kind = getattr(recorder, "target_class", recorder)
                if isinstance(kind, type):
                    found[kind] = int(getattr(recorder, "index", 0))
    return found


def _stacked(module: nn.Module, dimensions: int) -> list[nn.Parameter]:
    """Return matrices of a number of dimensions that a module owns itself, where it is no layer of PyTorch."""
    if isinstance(module, (nn.Linear, nn.Embedding, Conv1D, _ConvNd)):
        return []
    return [one for one in module.parameters(recurse=False) if one.ndim == dimensions]


def _holds(name: str, stacks: dict[str, set[int]]) -> bool:
    return any(stack == name or stack.startswith(f"{name}.") for stack in stacks)


def _children(modules: dict[str, nn.Module], parent: str) -> Iterator[tuple[str, nn.Module]]:
    prefix = f"{parent}." if parent else ""
    yield from ((f"{prefix}{name}", child) for name, child in modules[parent].named_children())


def _rows(module: nn.Module) -> int | None:
    """Rows of the one matrix that a module without parts owns; None for any other."""
    own = [one for one in module.parameters(recurse=False) if one.ndim == 2]
    return len(own[0]) if len(own) == 1 and not list(module.children()) else None
