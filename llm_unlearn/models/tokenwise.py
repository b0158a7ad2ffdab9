"""Values of single tokens, and their gradient, taken while their logits are there: (N, V) never stands in memory.

A token's value depends on its own hidden state alone. So where the head is frozen, the value's gradient with respect to that state
is D numbers that do not wait for the backward pass: they are made beside the value, and the logits are forgotten. Where the head
is trained too, its own gradient Σ_n g_n ∂value_n/∂W needs the factors g_n that the backward pass brings. A loss per token enters
the total with one factor for all its tokens, which its gradient can be made without; other factors let the logits be made
a second time. (Taking the gradient in the forward pass: Hsu et al. 2024, Liger Kernel, 2410.10989, section 3.2.)

N tokens, n of them at once, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm_unlearn.models.head import Head

CACHED = 1 << 18
"""Logits that are worked on at once on a CPU, so that the steps in between stay in its cache."""


class Read(Protocol):
    """What is read of each token's logits."""

    @property
    def rows(self) -> int:
        """Tokens whose logits are held at once."""
        ...

    def values(self, logits: Tensor, part: slice) -> Tensor:
        """(n, V) float32, which of the N tokens they are -> (n,), each from its own row."""
        ...

    def slopes(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The same, and (n, V) the derivative of each value with respect to its own row; `logits` may be written over."""
        ...


@dataclass(frozen=True)
class OfLikelihood:
    """Values made of log p of a target token, whose derivative with respect to logits is onehot(y) − p."""

    targets: Tensor  # (N,)
    rows: int
    of: Callable[[Tensor, slice], Tensor] | None = None  # (n,) log p -> (n,); None for log p itself

    def values(self, logits: Tensor, part: slice) -> Tensor:
        logps = logits.gather(-1, self.targets[part, None])[:, 0] - logits.logsumexp(-1)
        return self.of(logps, part) if self.of else logps

    def slopes(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        few = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
        pairs = zip(torch.split(logits, few), torch.split(self.targets[part, None], few), strict=True)
        logps = torch.cat([self._onehot_less_p(z, y) for z, y in pairs])
        if self.of is None:
            return logps, logits
        with torch.enable_grad():
            leaf = logps.requires_grad_()
            values = self.of(leaf, part)
            (factor,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), logits.mul_(factor[:, None])

    @staticmethod
    def _onehot_less_p(z: Tensor, y: Tensor) -> Tensor:
        """(n, V) logits become onehot(y) − p in place; returns (n,) log p(y)."""
        most = z.amax(-1, keepdim=True)
        own = z.gather(-1, y)
        total = z.sub_(most).exp_().sum(-1, keepdim=True)
        z.div_(-total).scatter_add_(-1, y, torch.ones_like(own))
        return (own - most - total.log())[:, 0]


@dataclass(frozen=True)
class OfDistribution:
    """Values made of the whole distribution of the next token."""

    of: Callable[[Tensor, slice], Tensor]  # (n, V) logits -> (n,)
    rows: int

    def values(self, logits: Tensor, part: slice) -> Tensor:
        return self.of(logits, part)

    def slopes(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            values = self.of(leaf, part)
            (slopes,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slopes


def tokenwise(head: Head, states: Tensor, read: Read, one_factor: bool = False) -> Tensor:
    """(N, D) -> (N,)

    Args:
        one_factor: the values will enter what is differentiated with one factor for all of them. Where they do not, the gradient is
            right all the same, at the cost of another pass through the head.
    """
    layer = head.layer
    learns = states.requires_grad or any(weight.requires_grad for weight in layer.parameters())
    if not len(states):
        return read.values(head(states), slice(0, 0))
    if not torch.is_grad_enabled() or not learns:
        return torch.cat([read.values(head(states[part]), part) for part in parts(len(states), read.rows)])
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:  # somebody wants to see it called
        whole = len(states) <= read.rows
        found = [
            read.values(head(states), slice(None))
            if whole
            else checkpoint(_called, head, states[part], read, part, use_reentrant=False)
            for part in parts(len(states), read.rows)
        ]
        return torch.cat(found)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
    made: Tensor = _Tokenwise.apply(states, layer.weight, layer.bias, head, read, one_factor, dtype)  # type: ignore[no-untyped-call]
    return made


def _called(head: Head, states: Tensor, read: Read, part: slice) -> Tensor:
    return read.values(head(states), part)


def parts(count: int, rows: int) -> Iterator[slice]:
    """The tokens whose logits are held at once, part by part."""
    for start in range(0, count, rows):
        yield slice(start, min(count, start + rows))


class _Tokenwise(torch.autograd.Function):
    """Everything in the precision of the computation, `dtype`, but logits, values and the sums over parts."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, head: Head, read: Read, one_factor: bool, dtype: torch.dtype
    ) -> Tensor:
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.head, ctx.read, ctx.dtype, ctx.trains = head, _AsOutside.of(read, states.device.type, dtype), dtype, trains
        read = ctx.read
        values, slopes, sums = [], None, None
        with torch.autocast(states.device.type, enabled=False):
            work = _Work(states, weight, bias, head, dtype, read.rows)
            if trains and not one_factor:
                values = [read.values(work.logits(part), part) for part in parts(len(states), read.rows)]
            else:
                slopes = torch.empty_like(states)
                sums = work.sums() if trains else None
                for part in parts(len(states), read.rows):
                    found, slope = work.slopes(read, part)
                    values.append(found)
                    slopes[part] = slope @ work.weight
                    if sums:
                        sums.add(slope, work.states[part])
        ctx.sums = sums
        ctx.save_for_backward(states, weight, bias, slopes)
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, bias, found = ctx.saved_tensors
        slopes, sums, ctx.sums = found, ctx.sums, None
        if sums and bool((factor == factor[0]).all()):
            sums.scale(factor[0])
        elif ctx.trains:
            with torch.autocast(states.device.type, enabled=False):
                work = _Work(states, weight, bias, ctx.head, ctx.dtype, ctx.read.rows)
                sums, slopes = work.sums(), torch.empty_like(states) if slopes is None else slopes
                for part in parts(len(states), ctx.read.rows):
                    _, slope = work.slopes(ctx.read, part)
                    if found is None:
                        slopes[part] = slope @ work.weight
                    sums.add(slope, work.states[part] * factor[part, None].to(work.states), factor[part])
        of_states = slopes * factor[:, None].to(slopes) if ctx.needs_input_grad[0] else None
        of_weight = sums.weight.to(weight.dtype) if sums and ctx.needs_input_grad[1] else None
        of_bias = sums.bias.to(bias.dtype) if sums and sums.bias is not None and ctx.needs_input_grad[2] else None
        return of_states, of_weight, of_bias, None, None, None, None


@dataclass(frozen=True)
class _AsOutside:
    """A reading under the autocast that held where it was asked for: what it compares with comes from a head too, and must be
    rounded as these logits are. No copy of a weight is kept, since one made here would have no gradient elsewhere."""

    read: Read
    kind: str
    dtype: torch.dtype
    cast: bool

    @staticmethod
    def of(read: Read, kind: str, dtype: torch.dtype) -> _AsOutside:
        return _AsOutside(read, kind, dtype, torch.is_autocast_enabled(kind))

    @property
    def rows(self) -> int:
        return self.read.rows

    def values(self, logits: Tensor, part: slice) -> Tensor:
        with torch.autocast(self.kind, self.dtype, self.cast, cache_enabled=False):
            return self.read.values(logits, part)

    def slopes(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.kind, self.dtype, self.cast, cache_enabled=False):
            return self.read.slopes(logits, part)


class _Work:
    """The head's own arithmetic."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, head: Head, dtype: torch.dtype, rows: int) -> None:
        self.head, self.trained, self.bias = head, weight, bias
        self.states, self.weight = states.detach().to(dtype), weight.detach().to(dtype)
        self.room = head.room(min(rows, len(states))) if dtype == torch.float32 else None

    def linear(self, part: slice) -> Tensor:
        """(n, V) float32, what the layer gives."""
        if self.room is not None:
            states = self.states[part]
            return torch.mm(states, self.weight.T, out=self.room[: len(states)])
        bias = None if self.bias is None else self.bias.detach().to(self.weight)
        return F.linear(self.states[part], self.weight, bias).float()

    def logits(self, part: slice) -> Tensor:
        return self.head.finish(self.linear(part))

    def slopes(self, read: Read, part: slice) -> tuple[Tensor, Tensor]:
        """(n,) values, and (n, V) their derivative with respect to what the layer gives."""
        logits = self.logits(part)
        bend = 1 - (logits / self.head.cap) ** 2 if self.head.cap else None
        values, slope = read.slopes(logits, part)
        slope = slope if bend is None else slope.mul_(bend)
        slope = slope.mul_(self.head.scale) if self.head.scale != 1 else slope
        return values, slope.to(self.weight.dtype)

    def sums(self) -> _Sums:
        bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=torch.float32)
        return _Sums(torch.zeros_like(self.trained, dtype=torch.float32), bias)


@dataclass
class _Sums:
    """The gradient of the head's weights, summed up part by part in place, in float32."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)

    def add(self, slope: Tensor, states: Tensor, factor: Tensor | None = None) -> None:
        """(n, V), (n, D): += slopeᵀ · states."""
        if slope.dtype == self.weight.dtype:
            self.weight.addmm_(slope.T, states)
        else:
            self.weight += slope.T @ states
        if self.bias is not None:
            self.bias += (slope if factor is None else slope * factor[:, None].to(slope)).sum(0)

    def scale(self, factor: Tensor) -> None:
        self.weight *= factor
        if self.bias is not None:
            self.bias *= factor
