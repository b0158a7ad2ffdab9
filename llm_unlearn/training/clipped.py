"""The gradient of a private step: example by example, each cut to a norm, their sum with noise, over a constant.

Nothing here divides by what a window happens to hold: the true count is a property of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.chance import normals
from llm_unlearn.data.examples import Example
from llm_unlearn.models.scores import score
from llm_unlearn.objectives.terms import Term
from llm_unlearn.spec import Refused
from llm_unlearn.training.job import Job
from llm_unlearn.training.privacy import Mechanism
from llm_unlearn.training.sharded import check_whole
from llm_unlearn.training.vectors import Gradient
from llm_unlearn.training.window import Model, Window


class Clipped:
    """DP-SGD's gradient (Abadi et al. 2016, 1607.00133, algorithm 1), the same on all ranks."""

    def __init__(self, mechanism: Mechanism, model: Model, accelerator: Accelerator, recomputed: bool) -> None:
        """
        Args:
            recomputed: activations are computed again in the backward pass.

        Raises:
            Refused: a layer mixes the examples of a batch, or the model is spread over processes.
        """
        for name, layer in model.scorer.model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise Refused(
                    f"train.privacy: {name} is a {type(layer).__name__}: it mixes the examples of a batch, so that no gradient "
                    "belongs to one of them. Take a model without it, or privacy: null."
                )
        check_whole(accelerator, "train.privacy")
        self.mechanism, self.model, self.accelerator = mechanism, model, accelerator
        layers = [] if recomputed else _linear(model)
        self.layers = layers if layers and _side_by_side(model, layers, accelerator.device) else []
        """The layers that hold all that is trained, where a whole micro-batch can be taken apart; else one example at a time."""

    @classmethod
    def of(cls, job: Job, model: Model, accelerator: Accelerator) -> Clipped | None:
        """For a private job; None for any other."""
        return cls(job.private, model, accelerator, job.settings.gradient_checkpointing) if job.private else None

    def backward(self, window: Window, terms: Mapping[str, Term], factors: Mapping[str, float], step: int) -> dict[str, float]:
        """Set the weights' gradient: (Σ_i clip(∇ Σ factor · value_i) + N(0, σ²C² I)) / B, i over the window on all ranks.

        Args:
            factors: term -> its weight.
            step: which noise is drawn.

        Returns:
            Term -> mean of its loss over the window's units, on all ranks; for the log, and not private.
        """
        wanted, weights = self.mechanism.settings, self.model.weights
        total = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        sums = torch.zeros(len(terms), device=self.accelerator.device)
        for part in window.parts(terms, None if self.layers else 1):
            if part.batch is None:
                continue
            with _by_example(self.layers) as found, self.accelerator.autocast():
                units = window.units(terms, part, self.model)
                losses = torch.zeros(len(part.batch.examples), device=self.accelerator.device)
                for k, (name, term) in enumerate(terms.items()):
                    if name in units:
                        values, row = units[name]
                        sums[k] += values.detach().sum()
                        of_row = losses.new_zeros(losses.shape, dtype=values.dtype).index_add(0, row, values)
                        if wanted.per_example == "mean" and term.loss.needs.unit == "token":
                            of_row = of_row / torch.bincount(row, minlength=len(losses)).clamp(min=1)
                        losses = losses + factors[name] * of_row
            self._add(total, _gradients(losses, weights, found if self.layers else None))
        scale = self.mechanism.sigma * wanted.clip
        for k, (weight, one) in enumerate(zip(weights, total, strict=True)):
            noise = torch.from_numpy(normals(self.mechanism.key, "noise", step, k, count=weight.numel())).to(one)
            summed = self.accelerator.reduce(one, "sum") + scale * noise.view_as(weight)
            weight.grad = (summed / self.mechanism.expected).to(weight.dtype)
        return {name: mean for name, mean in window.totals(terms, sums).items() if window.denominator(name, terms[name])}

    def _add(self, total: Gradient, each: Gradient) -> None:
        """total += Σ_i clip(g_i); a gradient that is not finite counts as 0, so that no row decides whether the run ends.

        Args:
            each: a tensor (B, …) per weight.
        """
        squares = torch.stack([one.flatten(1).square().sum(1) for one in each]).sum(0)  # (B,)
        clip = self.mechanism.settings.clip
        finite = squares.isfinite()
        share = torch.where(finite, clip / squares.sqrt().clamp(min=clip), 0)  # min(1, C / ‖g_i‖)
        for so_far, one in zip(total, each, strict=True):
            kept = one if finite.all() else one[finite]
            so_far += torch.tensordot(share[finite].to(so_far), kept.to(so_far), 1)


def _linear(model: Model) -> list[nn.Linear]:
    """The linear layers whose weights are all that is trained; none where something else is trained besides."""
    layers = [layer for layer in model.scorer.model.modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad]
    return layers if {id(layer.weight) for layer in layers} == {id(weight) for weight in model.weights} else []


@contextmanager
def _by_example(layers: Sequence[nn.Linear]) -> Iterator[dict[int, Tensor]]:
    """Inside, a backward pass leaves Σ_t g_t x_tᵀ of each linear layer, example by example: id(weight) -> (B, out, in)."""
    found: dict[int, Tensor] = {}

    def forward(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x, key = given[0].detach(), id(layer.weight)

        def backward(slope: Tensor) -> None:
            kind = torch.promote_types(slope.dtype, torch.float32)
            one = torch.einsum("b...i,b...o->boi", x.to(kind), slope.to(kind))
            found[key] = found[key] + one if key in found else one

        if output.requires_grad:
            output.register_hook(backward)  # type: ignore[no-untyped-call]

    hooks = [layer.register_forward_hook(forward) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _gradients(losses: Tensor, weights: Sequence[Tensor], found: Mapping[int, Tensor] | None) -> Gradient:
    """The gradient of each example's loss: one tensor (B, …) per weight.

    Args:
        losses: (B,) one per example; without `found`, of a single one.
        found: what `_by_example` leaves.
    """
    slopes = torch.autograd.grad(losses.sum(), weights, allow_unused=True)
    if found is None:
        return [(torch.zeros_like(w) if one is None else one)[None] for w, one in zip(weights, slopes, strict=True)]
    return [found[id(w)] if id(w) in found else w.new_zeros((len(losses), *w.shape)) for w in weights]


def _side_by_side(model: Model, layers: Sequence[nn.Linear], device: torch.device) -> bool:
    """Whether these layers get a batch's examples side by side, as the hooks suppose, and not, say, dealt to experts: compared
    with one example at a time, on made-up tokens."""
    rows = [Example(tuple(range(1, 5 + k)), 2, "check", k) for k in range(3)]

    def each(some: Sequence[Example], hooked: Sequence[nn.Linear]) -> Gradient:
        with _by_example(hooked) as found:
            scores = score(model.scorer, model.head, lay_out(some).to(device))["check"]
            return _gradients(-scores.by_sequence(scores.logps), model.weights, found if hooked else None)

    together, single = each(rows, layers), [each([row], ()) for row in rows]
    return all(
        one.shape[0] == len(rows) and torch.allclose(one[k], own[0], rtol=1e-2, atol=1e-4)
        for k in range(len(rows))
        for one, own in zip(together, single[k], strict=True)
    )
