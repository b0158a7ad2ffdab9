"""Does the model still prefer the right answer to wrong ones? Task scores for the sets that must be kept."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Knowing, choices, mean_over
from llm_unlearn.evaluation.tables import Sample, Tables
from llm_unlearn.spec import spec


@spec
class MultipleChoice:
    """Share of rows whose correct answer is more likely than every wrong one, a tie being wrong; the correct one is the
    paraphrase where the row has one. `sum` is `acc` of lm-evaluation-harness; its `acc_norm` divides by characters."""

    name: Literal["multiple_choice"] = "multiple_choice"
    set: str
    """The set that is measured."""
    by: Literal["normalised", "sum"] = "normalised"
    """Compare log p per token, or log p of the whole answer, which favours short ones."""

    needs: ClassVar[tuple[str, ...]] = ("answer", "paraphrase", "perturbed")
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        correct, wrong = choices(model, self.set, self.by)
        best_wrong = np.array([logp.max() for logp in wrong])
        return mean_over((correct > best_wrong).astype(float), model[self.set])


@spec
class OptionProbability:
    """mean_i q / (q + Σ q_wrong) with q = exp(−NLL/T) (TOFU, 2401.06121, §2.2, for real authors and world facts): with
    m wrong answers 1/(1 + m) when nothing is known; the correct one is the paraphrase where the row has one."""

    name: Literal["option_probability"] = "option_probability"
    set: str
    """The set that is measured."""

    needs: ClassVar[tuple[str, ...]] = ("answer", "paraphrase", "perturbed")
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        correct, wrong = choices(model, self.set)
        rivals = np.array([np.logaddexp.reduce(logp) for logp in wrong])
        return mean_over(np.exp(-np.logaddexp(0, rivals - correct)), model[self.set])
