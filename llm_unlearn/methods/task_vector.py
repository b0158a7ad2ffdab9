"""Task arithmetic: learn the forget set by heart, and go the other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from llm_unlearn.methods.edits import FORGET, At, Situation, edit_problems
from llm_unlearn.objectives.terms import Term
from llm_unlearn.spec import PositiveFloats, spec
from llm_unlearn.training.vectors import Gradient


@spec
class TaskVector:
    """θ ← θ − α (θ_f − θ), θ_f fine-tuned on the forget set by the recipe's `train` (Ilharco et al. 2022, 2212.04089, §3). With an
    adapter it is the negated adapter: A as fine-tuned, B ← −α B, exactly −α times the fine-tuning's change of every layer."""

    name: Literal["task_vector"] = "task_vector"
    scale: PositiveFloats = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """α"""

    knob: ClassVar[str] = "scale"
    terms: ClassVar[Mapping[str, Term]] = FORGET
    whole: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    problems = edit_problems

    def prepare(self, situation: Situation) -> At:
        start, directions = situation.weights, situation.directions
        situation.train()
        tuned = situation.weights

        def at(alpha: float) -> Gradient:
            return [
                theta_f if direction else theta - alpha * (theta_f - theta)
                for theta, theta_f, direction in zip(start, tuned, directions, strict=True)
            ]

        return at
