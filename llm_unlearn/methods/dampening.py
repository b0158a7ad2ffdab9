"""Edits of single weights by their Fisher information: selective synaptic dampening, and Fisher forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from llm_unlearn.methods.edits import BOTH, At, Situation, edit_problems
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.spec import PositiveFloat, PositiveFloats, PositiveInt, spec
from llm_unlearn.training.vectors import Gradient


@spec
class Dampening:
    """Selective synaptic dampening (SSD, Foster et al. 2023, 2308.07707, eq. 6 and 7): where F_f > α F, θ ← min(λ F/F_f, 1) θ, F_f
    the diagonal Fisher information of the forget set and F that of the forget and the retain set together. No training. Full
    weights only: a fresh adapter has B = 0."""

    name: Literal["dampening"] = "dampening"
    alpha: PositiveFloats = (100.0, 70.0, 50.0, 30.0, 20.0, 15.0, 10.0, 7.0, 5.0, 3.0, 2.0)
    """α: how many times as important to the forget set a weight must be. The smaller, the more weights; name large ones first.
    Above n/n_f, the size of both sets over that of the forget set, there are none."""
    damping: PositiveFloat = 1.0
    """λ: how much is left of a weight that is chosen."""
    rows: PositiveInt = 256
    """Examples of each stream that importance is measured on."""

    knob: ClassVar[str] = "alpha"
    terms: ClassVar[Mapping[str, Term]] = BOTH
    whole: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    problems = edit_problems

    def prepare(self, situation: Situation) -> At:
        import torch

        theta, n_f, n_r = situation.weights, situation.rows("forget"), situation.rows("retain")
        f, r = situation.fisher("forget", self.rows), situation.fisher("retain", self.rows)
        every = [(n_f * a + n_r * b) / (n_f + n_r) for a, b in zip(f, r, strict=True)]

        def at(alpha: float) -> Gradient:
            chosen = [a > alpha * b for a, b in zip(f, every, strict=True)]
            situation.note("dampened", sum(int(one.sum()) for one in chosen) / sum(one.numel() for one in chosen))
            return [
                torch.where(mine, w * (self.damping * b / a).clamp(max=1), w)
                for mine, w, a, b in zip(chosen, theta, f, every, strict=True)
            ]

        return at


@spec
class FisherNoise:
    """Fisher forgetting (Golatkar et al. 2020, 1911.04933): θ ← θ_r + s (F_r/F̄_r)^(−1/4) ξ, ξ standard normal from the seed, F_r
    the diagonal Fisher information of the retain set and F̄_r its mean, so that what the retain set does not need is drowned. θ_r
    is its optimum: θ itself, or θ fine-tuned on the retain set (`tune`). Full weights only."""

    name: Literal["fisher_noise"] = "fisher_noise"
    scale: PositiveFloats = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
    """s, the paper's (λσ²)^(1/4) over F̄_r^(1/4): the noise on a weight of average importance."""
    floor: PositiveFloat = 1e-2
    """F_r is at least so many times its mean: where it vanishes, the noise would be without bound. (The paper's code cuts too.)"""
    rows: PositiveInt = 256
    """Examples of the retain set that importance is measured on."""
    tune: bool = False
    """First fine-tune on the retain set, by the recipe's `train`: the shift of the paper's equation."""

    knob: ClassVar[str] = "scale"
    terms: ClassVar[Mapping[str, Term]] = {"retain": Term(loss=NLL())}
    whole: ClassVar[bool] = True

    @property
    def trains(self) -> bool:
        return self.tune

    problems = edit_problems

    def prepare(self, situation: Situation) -> At:
        if self.tune:
            situation.train()
        theta, noise, r = situation.weights, situation.noise(), situation.fisher("retain", self.rows)
        average = float(sum(one.double().sum() for one in r)) / sum(one.numel() for one in r)
        situation.note("fisher", average)

        def at(s: float) -> Gradient:
            return [
                w + s * (a.clamp(min=self.floor * average) / average) ** -0.25 * xi
                for w, a, xi in zip(theta, r, noise, strict=True)
            ]

        return at
