"""Retraining: the model that never saw the forget set, with which every other way is compared."""

from __future__ import annotations

from typing import Literal

from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Evaluation, Model, Problems, Train
from llm_unlearn.spec import spec


@spec
class Retrain:
    """Fine-tune `model.base`, as it was before it saw any of the data, on the retain set alone: NLL per token. The gold standard of
    unlearning (Cao & Yang 2015; survey 2405.07406, §2), and what it costs is what other ways save."""

    name: Literal["retrain"] = "retrain"

    @property
    def terms(self) -> dict[str, Term]:
        """The objective that it stands for."""
        return {"retain": Term(loss=NLL())}

    def problems(self, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
        """It goes with every setting."""
        return ()
