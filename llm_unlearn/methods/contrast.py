"""Ways to forget that leave the weights alone: an adapter learns what is to be forgotten, and is taken off the base's logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from llm_unlearn.methods.combination import Combination
from llm_unlearn.methods.edits import FORGET, At, Situation, Strong, edit_problems
from llm_unlearn.objectives.distribution import Entropy
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Evaluation, Model, Problems, Train
from llm_unlearn.spec import PositiveFloats, spec

ADAPTER = "default"
"""The adapter that a run trains."""


def contrast_problems(method: Strong, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
    """An edit's, and there must be an adapter of its own to be taken off the base."""
    yield from edit_problems(method, model, train, evaluation)
    if not model.adapter or model.adapter.init != "zero":
        yield f"{method.name} combines the base with an adapter of its own; give one with init: zero.", "model", "adapter"


@spec
class ULD:
    """z = z_base − w z_assistant (ULD, Ji et al. 2024, 2406.08607): the assistant learns the forget set by heart, and to be uniform
    on the retain set, where it takes nothing away: NLL on forget, KL(uniform ‖ p) on retain (up to a constant the paper's
    cross-entropy), as the recipe's `train` says.

    The paper's assistant is the base's first layers with LoRA, and its rows are augmented with paraphrases and wrong answers. This
    one is an adapter on the whole base, which costs a second run of the base per token and no second model, and its rows are those
    of the recipe."""

    name: Literal["uld"] = "uld"
    weight: PositiveFloats = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """w"""

    knob: ClassVar[str] = "weight"
    terms: ClassVar[Mapping[str, Term]] = {"forget": Term(loss=NLL()), "retain": Term(loss=Entropy())}
    whole: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    problems = contrast_problems

    def prepare(self, situation: Situation) -> At:
        return _learned(situation)

    def combination(self, strength: float) -> Combination:
        return Combination(rule="sum", members=(None, ADAPTER), weights=(1.0, -strength))


@spec
class Guided:
    """z = z_base − α relu(z_reinforced − z_base) (Eldan & Russinovich 2023, 2310.02238, §2.1), the reinforced model fine-tuned on
    the forget set by the recipe's `train`: what it finds likelier than the base is made less likely.

    The paper goes on to fine-tune the base on what these logits would write, with anchored terms replaced; here the combined model
    itself answers."""

    name: Literal["guided"] = "guided"
    alpha: PositiveFloats = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
    """α. Where the base knows the rows by heart, the reinforced model finds them hardly any likelier, and it takes more."""

    knob: ClassVar[str] = "alpha"
    terms: ClassVar[Mapping[str, Term]] = FORGET
    whole: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    problems = contrast_problems

    def prepare(self, situation: Situation) -> At:
        return _learned(situation)

    def combination(self, strength: float) -> Combination:
        return Combination(rule="excess", members=(None, ADAPTER), weights=(1.0, -strength))


Contrast = ULD | Guided


def _learned(situation: Situation) -> At:
    """The weights as the training left them, at every strength: what a strength moves is the combination."""
    situation.train()
    tuned = situation.weights
    return lambda strength: tuned
