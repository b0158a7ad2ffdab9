"""What a method that edits weights once, without training against a loss, may ask of the model at hand.

Such a method prepares its edit from gradients, and says what the weights are at each of its strengths. The run looks at all
strengths of the method's list, which begins with the mildest, by the probe of `train.stop`, and takes the one that comes nearest
to the dose within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Evaluation, Model, Problems, Train
from llm_unlearn.spec import PositiveFloats
from llm_unlearn.training.vectors import Gradient

At = Callable[[float], Gradient]
"""Strength -> the weights."""

FORGET = {"forget": Term(loss=NLL())}
BOTH = {"forget": Term(loss=NLL()), "retain": Term(loss=NLL())}
"""What a method reads: the log-likelihood of the answers of these streams."""


class Situation(Protocol):
    """What a method may ask: every answer is that of the whole stream on all processes, the same on each. ℓ_i is the negative
    log-likelihood of answer i, summed over its tokens."""

    @property
    def weights(self) -> Gradient:
        """A copy of θ, the trainable weights, as they are now."""
        ...

    @property
    def directions(self) -> Sequence[bool]:
        """Which of the weights say no more than in which directions another one moves the model: A of an adapter B·A with B = 0."""
        ...

    def rows(self, stream: str) -> int:
        """The number of a stream's examples."""
        ...

    def gradient(self, stream: str) -> Gradient:
        """(1/n) Σ_i ∇ℓ_i"""
        ...

    def fisher(self, stream: str, rows: int) -> Gradient:
        """The diagonal of the empirical Fisher information, (1/n) Σ_i (∇ℓ_i)², of `rows` of a stream's examples."""
        ...

    def curved(self, stream: str, rows: int, vector: Gradient) -> Gradient:
        """G v, G the Gauss–Newton matrix of (1/n) Σ_i ℓ_i on `rows` of a stream's examples."""
        ...

    def solved(self, stream: str, rows: int, damping: float, vector: Gradient) -> Gradient:
        """(G + δ)⁻¹ v, G as EK-FAC takes it: Q Λ Qᵀ layer by layer, Q from the covariances of a linear layer's inputs and of the
        gradients of its outputs."""
        ...

    def products(self, stream: str, vector: Gradient) -> list[float]:
        """⟨∇ℓ_i, v⟩ of each of a stream's examples."""
        ...

    def noise(self) -> Gradient:
        """Standard normal numbers in the shape of θ, from the run's seed."""
        ...

    def train(self) -> None:
        """Train the weights on the method's terms, as the recipe's `train` says."""
        ...

    def note(self, name: str, value: float) -> None:
        """Write a number into the next line of the log."""
        ...

    def tell(self, stream: str, values: Sequence[float]) -> None:
        """A value for each of a stream's examples, for the file of influences."""
        ...


class Strong(Protocol):
    """What every edit is: something that is done at a strength."""

    @property
    def name(self) -> str: ...
    @property
    def knob(self) -> str:
        """The setting that holds its strengths."""
        ...

    @property
    def whole(self) -> bool:
        """Whether it changes weights that are there, which a fresh adapter has not."""
        ...

    @property
    def trains(self) -> bool:
        """Whether there is a training inside."""
        ...


def strengths_of(method: Strong) -> PositiveFloats:
    """An edit's strengths, in the order in which they are looked at."""
    found: PositiveFloats = getattr(method, method.knob)
    return found


def edit_problems(method: Strong, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
    """An edit must find what it changes, and a dose by which its strength is chosen."""
    if method.whole and model.adapter:
        text = f"{method.name} changes weights that are there, and a fresh adapter has none; give model.adapter: null."
        yield text, "model", "adapter"
    if len(strengths_of(method)) > 1 and not train.stop:
        text = f"{len(strengths_of(method))} strengths, and no dose to choose one by; give train.stop, or one of them: [0.5]."
        yield text, "method", method.knob
    if train.rules and not method.trains:
        yield f"{method.name} takes no optimizer steps; take them out.", "train", "rules"
    if evaluation and evaluation.every:
        text = f"{method.name} has nothing to look at on the way but its strengths, which train.stop does; take it out."
        yield text, "evaluation", "every"
