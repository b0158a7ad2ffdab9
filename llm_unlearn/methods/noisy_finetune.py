"""Noisy fine-tuning: certified unlearning by noise on the way from a clipped model, with nothing asked of the loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Evaluation, Model, Problems, Train
from llm_unlearn.source import missing
from llm_unlearn.spec import Part, PositiveFloat, PositiveInt, Share, spec


@spec
class NoisyFinetune:
    """Fine-tune full weights on the retain set, the first steps with noise, so that with (ε, δ) nobody can tell where they began:
    at the model that saw the forget set, or at one that did not (Koloskova et al. 2025, 2506.06985, gradient clipping).

    d is the distance of the weights from the `reference`, which never saw the forget set. First d ← d · min(1, radius / ‖d‖); then
    `noisy_steps` times d ← (1 − decay) d − rate · clip(∇ NLL) + N(0, σ²), the gradient cut to norm `clip`; then the optimizer goes
    on without noise, from fresh states. What it costs is the noise on every weight: the bound does not know which of them matter.
    docs/privacy.md has the proof (shifted interpolation, Bok et al. 2024, 2403.00278) and what it supposes."""

    name: Literal["noisy_finetune"] = "noisy_finetune"
    reference: str
    """A model of the same architecture that never saw the forget set, such as the public one that was fine-tuned."""
    epsilon: PositiveFloat
    """ε of the certificate; the noise is found from it."""
    delta: Part
    """δ of the certificate."""
    radius: PositiveFloat
    """C₀: how far from the reference the weights may begin."""
    noisy_steps: PositiveInt = 10
    """T: so many of the run's steps are noisy; the rest is plain fine-tuning."""
    clip: PositiveFloat = 1.0
    """C₁: the largest norm of a gradient in a noisy step."""
    rate: PositiveFloat = 1e-3
    """γ: the step size of a noisy step."""
    decay: Share = 0.0
    """How much of d each noisy step takes back."""
    reproducible: bool = False
    """Draw the noise from the recipe's `seed` instead of a secret key: for tests. Whoever knows the seed can take it away."""

    @property
    def terms(self) -> dict[str, Term]:
        """The objective that it stands for."""
        return {"retain": Term(loss=NLL())}

    def problems(self, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
        """Where the certificate would not hold, it is not given."""
        if missing(self.reference):
            yield f"no such folder: {self.reference} (looked from {Path.cwd()}).", "method", "reference"
        if model.adapter:
            text = "the weights below it saw the forget set, and would stay as they are; give model.adapter: null."
            yield text, "model", "adapter"
        if train.rules:
            yield "the proof knows no step but its own; give rules: [].", "train", "rules"
        if train.stop:
            yield "where a run ends would tell of the forget rows it looks at; give stop: null.", "train", "stop"
        if train.privacy:
            yield "is another guarantee, of the rows trained on; give it in a run of its own.", "train", "privacy"

    @property
    def sensitivity(self) -> float:
        """Δ: T noisy steps tell two beginnings apart as well as one Gaussian mechanism with this sensitivity and the same σ.

        Two runs come no further apart in a step than from z to c z + s, c = 1 − decay, s = 2 γ C₁; z = 2 C₀ at first. Of that the
        noise hides a_t, and all of it by the last step: Σ c^(T−t) a_t = 2 C₀ c^T + s Σ c^k. Δ² is the least Σ a_t².
        """
        kept = [(1 - self.decay) ** k for k in range(self.noisy_steps)]
        apart = 2 * self.radius * (1 - self.decay) ** self.noisy_steps + 2 * self.rate * self.clip * sum(kept)
        return apart / math.sqrt(sum(one**2 for one in kept))

    @property
    def sigma(self) -> float:
        """The noise's standard deviation on each weight, in each noisy step."""
        return self.sensitivity / told_apart(self.epsilon, self.delta)


def delta_of(mu: float, epsilon: float) -> float:
    """δ(ε) of a Gaussian mechanism with sensitivity / σ = μ (Balle & Wang 2018, 1805.06530, theorem 8):
    Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    from scipy.special import log_ndtr

    return math.exp(log_ndtr(mu / 2 - epsilon / mu)) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))


def told_apart(epsilon: float, delta: float) -> float:
    """The largest μ whose Gaussian mechanism is (ε, δ)-private, from below, by bisection: δ(ε) grows with μ."""
    low, high = 0.0, 1.0
    while delta_of(high, epsilon) <= delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, epsilon) <= delta else (low, middle)
    return low
