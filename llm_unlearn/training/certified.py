"""The noisy steps of certified unlearning: weights drawn near a reference, then moved by clipped gradients and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from llm_unlearn.data.chance import normals
from llm_unlearn.methods.noisy_finetune import NoisyFinetune
from llm_unlearn.models.load import load, trainable
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused
from llm_unlearn.training.sharded import check_whole
from llm_unlearn.training.vectors import Gradient, blend, norm, plus, put


@dataclass(frozen=True)
class Certified:
    """One run of noisy fine-tuning: its settings, its reference and its secret."""

    settings: NoisyFinetune
    reference: str
    """The folder of the reference."""
    key: bytes = field(repr=False)
    """What the noise is drawn from."""

    def begin(self, net: nn.Module, accelerator: Accelerator) -> Gradient:
        """Draw the weights to within C₀ of the reference's.

        Returns:
            The reference's weights, in the order of those that are trained.

        Raises:
            Refused: the reference has other weights, or a weight that is not trained is not the reference's.
        """
        check_whole(accelerator, "method")
        before = load(Model(base=self.reference, adapter=None), accelerator.device, train=True).model
        theirs, mine = dict(before.named_parameters()), trainable(net)
        for name, weight in net.named_parameters():
            if name not in theirs or theirs[name].shape != weight.shape:
                raise Refused(f"method.reference: {self.reference} has no weight like {name}; give a model of one architecture.")
            if name not in mine and not torch.equal(theirs[name].to(weight), weight):
                raise Refused(
                    f"model.trainable: {name} is not trained and differs from the reference's, so it may hold what is to be "
                    "forgotten; train it too."
                )
        origin = [theirs[name].detach().to(weight, copy=True) for name, weight in mine.items()]
        weights = list(mine.values())
        away = norm(plus([weight.detach() for weight in weights], origin, -1.0))
        blend(weights, origin, min(1.0, self.settings.radius / max(away, 1e-30)))
        return origin

    @torch.no_grad()
    def move(self, weights: Sequence[nn.Parameter], origin: Gradient, step: int) -> None:
        """Take one noisy step along the weights' gradients: d ← (1 − decay) d − γ clip(g) + N(0, σ²).

        A gradient that is not finite counts as 0: no longer than C₁, as the proof asks, so that no step has to end the run.
        """
        wanted = self.settings
        slopes = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        length = norm(slopes)
        if not math.isfinite(length):
            slopes, length = [torch.zeros_like(weight) for weight in weights], 0.0
        factor = wanted.rate * min(1.0, wanted.clip / max(length, 1e-30))
        made: Gradient = []
        for k, (weight, start, slope) in enumerate(zip(weights, origin, slopes, strict=True)):
            noise = torch.from_numpy(normals(self.key, "certified", step, k, count=weight.numel())).view(weight.shape)
            away = (1 - wanted.decay) * (weight - start) - factor * slope
            made.append(start + away + (wanted.sigma * noise).to(weight))
        put(weights, made)

    @property
    def said(self) -> str:
        """What is told before a run."""
        wanted = self.settings
        return "\n".join(
            [
                f"certified  (ε {wanted.epsilon:g}, δ {wanted.delta:g})-unlearning by {wanted.noisy_steps} noisy steps: "
                f"σ {wanted.sigma:.3g} on each weight, from at most {wanted.radius:g} around {wanted.reference}; it rests on:",
                *(f"           {one}" for one in self.assumptions),
            ]
        )

    def facts(self, kept: int) -> dict[str, Any]:
        """Return what is written beside the result.

        Args:
            kept: the step whose weights are kept; ε is None where these do not hold all noisy steps.
        """
        wanted = self.settings
        done = kept >= wanted.noisy_steps
        return {
            "kind": "certified unlearning",
            "epsilon": wanted.epsilon if done else None,
            "delta": wanted.delta, "noise": wanted.sigma, "radius": wanted.radius,
            "clip": wanted.clip, "rate": wanted.rate, "decay": wanted.decay, "noisy_steps": wanted.noisy_steps,
            "reference": wanted.reference, "unit": "the whole forget set", "assumptions": self.assumptions,
        }  # fmt: skip

    @property
    def assumptions(self) -> list[str]:
        """What the certificate rests on, besides the mechanism."""
        secret = "is the recipe's seed, and unknown to others" if self.settings.reproducible else "is deleted at the end of the run"
        return [
            "the reference, the settings and the retain set do not depend on the forget set (but for its size)",
            "only the weights at the end are given away: not the checkpoints, the log, or any model on the way",
            f"the key of the noise {secret}",
            "the model before is not given away, or no longer",
        ]


def certified_by(method: object, steps: int, key: bytes, where: Callable[[str], str]) -> Certified | None:
    """What a recipe's method asks for; None where it asks for no certificate.

    Args:
        steps: of the whole run.
        where: the name of a model -> its folder.

    Raises:
        Refused: the run is too short for the noisy steps.
    """
    if not isinstance(method, NoisyFinetune):
        return None
    if steps < method.noisy_steps:
        raise Refused(f"method.noisy_steps: {method.noisy_steps} of them, and the run has {steps} steps; give more train.steps.")
    return Certified(method, where(method.reference), key)
