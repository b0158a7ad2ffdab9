"""Routing of a mixture of experts: read off a forward pass, or forced to be that of another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.models.experts import experts_of, recorded_routers
from llm_unlearn.models.load import causal
from llm_unlearn.models.structure import body_of
from llm_unlearn.spec import Refused


@dataclass(frozen=True)
class Routing:
    """Router logits of one forward pass, in the order of the model; T = B·L tokens."""

    logits: tuple[Tensor, ...]
    """(T, E) of each router."""
    chosen: tuple[Tensor, ...]
    """(T, k) numbers of the experts that each router chooses, ascending; none where the architecture does not tell."""


class Reader:
    """Reads the routing of a model while it runs inside `reading`."""

    def __init__(self, model: Any) -> None:
        """
        Raises:
            Refused: the model has no routers.
        """
        net = causal(model)
        self.routers, self.found = recorded_routers(net), dict[tuple[str, str], Tensor]()
        modules, owners = dict(net.named_modules()), {name.rpartition(".")[0] for name in experts_of(net).matrices}
        blocks = {router.name: f"{_block(router.name)}." for router in self.routers}
        self.users = {name: [modules[owner] for owner in owners if owner.startswith(block)] for name, block in blocks.items()}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, keep what the routers say; `routing` has that of the last pass."""
        self.found.clear()
        handles = []
        for router in self.routers:
            handles.append(router.module.register_forward_hook(self._said(router.name, router.logits)))
            for module in self.users[router.name]:
                handles.append(module.register_forward_pre_hook(self._used(router.name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def routing(self) -> Routing:
        """The routing of the last pass."""
        names = [router.name for router in self.routers]
        logits = tuple(self.found[name, "logits"] for name in names)
        chosen = [self.found[name, "chosen"] for name in names if (name, "chosen") in self.found]
        return Routing(logits, tuple(chosen) if len(chosen) == len(logits) else ())

    def _said(self, name: str, logits_of: Callable[[Any], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            logits = logits_of(made).detach()
            self.found[name, "logits"] = logits.reshape(-1, logits.shape[-1]).float()
            self._keep(name, made if isinstance(made, (tuple, list)) else ())

        return hook

    def _used(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, named: Any) -> None:
            self._keep(name, (*given, *named.values()))

        return hook

    def _keep(self, name: str, values: Iterable[Any]) -> None:
        """Of several values, the (T, k) whole numbers."""
        for value in values:
            if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool:
                self.found[name, "chosen"] = value.detach().sort(-1).values


def _block(router: str) -> str:
    """The name of the module that a router stands in, without adapters."""
    return router.replace(".base_layer", "").rpartition(".")[0]


@contextmanager
def forced_routing(model: Any, original: Any) -> Iterator[None]:
    """Inside, every router of a model returns what the original model's router returns for the same tokens, so that it uses the
    original's experts and gates. The original runs once for each pass of the model.

    Raises:
        Refused: the two do not have the same routers.
    """
    net, other = causal(model), causal(original)
    mine, theirs = _routers(net), _routers(other)
    if not mine:
        raise Refused(f"{type(net).__name__} is no mixture of experts: it has no routers whose choice could be forced.")
    shapes = [{name: [tuple(one.shape) for one in router.parameters()] for name, router in each.items()} for each in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise Refused(f"the routers of {type(net).__name__} and those of the original model differ in number or shape.")
    said: dict[str, list[Any]] = {}

    def ask(body: nn.Module, given: Any, named: Any) -> None:
        said.clear()
        with torch.no_grad():
            body_of(other)[1](*given, **named)

    def keep(name: str) -> Callable[..., None]:
        return lambda router, given, made: said.setdefault(name, []).append(made)

    def force(name: str) -> Callable[..., Any]:
        return lambda router, given, made: said[name].pop(0)  # one that several layers share is called several times

    handles = [body_of(net)[1].register_forward_pre_hook(ask, with_kwargs=True)]
    handles += [router.register_forward_hook(keep(name)) for name, router in theirs.items()]
    handles += [router.register_forward_hook(force(name)) for name, router in mine.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routers(net: nn.Module) -> dict[str, nn.Module]:
    """Routers by their names in the model without adapters."""
    return {name.replace(".base_layer", ""): router for name, router in experts_of(net).routers.items()}


def share_changed(one: Routing, other: Routing, at: Tensor) -> Tensor | None:
    """(N,) share of routers that choose another set of experts at these tokens; None where choices cannot be read."""
    if not one.chosen or len(one.chosen) != len(other.chosen):
        return None
    changed = [(a[at] != b[at]).any(-1) for a, b in zip(one.chosen, other.chosen, strict=True)]
    return torch.stack(changed).double().sum(0) / len(changed)


def distance(one: Routing, other: Routing, at: Tensor) -> Tensor:
    """(N,) mean over routers of the Jensen–Shannon distance √JSD (base 2, 0 to 1) of their distributions at these tokens."""
    found = []
    for a, b in zip(one.logits, other.logits, strict=True):
        p, q = a[at].double().log_softmax(-1), b[at].double().log_softmax(-1)  # (N, E)
        middle = torch.logaddexp(p, q) - math.log(2)
        nats = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
        found.append((nats.clamp(min=0) / math.log(2)).sqrt())
    return torch.stack(found).sum(0) / len(found)
