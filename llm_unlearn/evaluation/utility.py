"""Does the model still prefer the right answer to wrong ones? Task scores for the sets that must be kept."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Knowing, MeasureKind, Probability, TruthRatio, choices, mean_over
from llm_unlearn.evaluation.tables import Floats, Need, Sample, Tables, Unavailable
from llm_unlearn.evaluation.text import Rouge
from llm_unlearn.spec import Share, spec


@spec
class MultipleChoice:
    """Share of rows whose correct answer is more likely than every wrong one, a tie being wrong; the correct one is the
    paraphrase where the row has one. `sum` is `acc` of lm-evaluation-harness; its `acc_norm` divides by characters."""

    name: Literal["multiple_choice"] = "multiple_choice"
    set: str
    """The set that is measured."""
    by: Literal["normalised", "sum"] = "normalised"
    """Compare log p per token, or log p of the whole answer, which favours short ones."""

    kind: ClassVar[MeasureKind] = "choice"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "paraphrase", "perturbed")
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        at, correct, wrong = choices(model, self.set, self.by)
        best_wrong = np.array([logp.max() for logp in wrong])
        return mean_over((correct > best_wrong).astype(float), model[self.set], at)


@spec
class OptionProbability:
    """mean_i q / (q + Σ q_wrong) with q = exp(−NLL/T) (TOFU, 2401.06121, §2.2, for real authors and world facts): with
    m wrong answers 1/(1 + m) when nothing is known; the correct one is the paraphrase where the row has one."""

    name: Literal["option_probability"] = "option_probability"
    set: str
    """The set that is measured."""

    kind: ClassVar[MeasureKind] = "choice"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "paraphrase", "perturbed")
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        at, correct, wrong = choices(model, self.set)
        rivals = np.array([np.logaddexp.reduce(logp) for logp in wrong])
        return mean_over(np.exp(-np.logaddexp(0, rivals - correct)), model[self.set], at)


@spec
class ModelUtility:
    """Harmonic mean of nine: {retain, real authors, world facts} × {probability, ROUGE-L recall, truth ratio} (TOFU, 2401.06121,
    §2.2). Probability on `set` is `probability`, on the `others` `option_probability`; truth ratio is `true_better`. A
    harmonic mean is 0 when one part is 0."""

    name: Literal["model_utility"] = "model_utility"
    set: str
    """The set that is to be kept word for word: TOFU's retain."""
    others: tuple[str, ...] = ()
    """Sets whose answers are chosen among wrong ones: TOFU's real authors and world facts."""
    wrong_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """Average of the wrong answers in the truth ratio: `arithmetic` as in TOFU's equation 1, `geometric` as in OpenUnlearning."""
    floor: Share = 0.0
    """Count a part below this as 0, so that a collapsed model has no utility, whatever its other parts are. TOFU has no floor."""

    kind: ClassVar[MeasureKind] = "utility"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "paraphrase", "perturbed", "generation")
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __post_init__(self) -> None:
        if len({self.set, *self.others}) != 1 + len(self.others):
            raise ValueError(f"each set once, not {[self.set, *self.others]}")

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        groups = tuple(self._parts(name, model) for name in (self.set, *self.others))

        def harmonic(groups: tuple[Floats, ...]) -> float:
            parts = np.concatenate([group.mean(axis=0) for group in groups])
            return float(len(parts) / (1 / parts).sum()) if (parts > 0).all() and (parts >= self.floor).all() else 0.0

        return Sample(groups, harmonic)

    def _parts(self, name: str, model: Tables) -> Floats:
        """(R, 3) the three parts of each row that has all of them.

        Raises:
            Unavailable: no row of the set has.
        """
        probability = Probability(set=name) if name == self.set else OptionProbability(set=name)
        truth_ratio = TruthRatio(set=name, aggregate="true_better", wrong_mean=self.wrong_mean)
        columns = [sample.rows if sample.rows is not None else sample.sparse
                   for sample in (one(model, None) for one in (probability, Rouge(set=name), truth_ratio))]  # fmt: skip
        rows = np.stack([column for column in columns if column is not None], axis=1)
        whole = rows[~np.isnan(rows).any(axis=1)]
        if not len(whole):
            raise Unavailable(f"model_utility: no row of set {name!r} has all that it is made of.")
        return whole
