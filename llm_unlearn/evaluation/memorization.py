"""How well a model still knows a set: perplexity, probability, memorization, extraction strength, truth ratio.

Every measure here and in its neighbours is a frozen setting that is called with tables and gives a `Sample`. `needs`
names the passes that the suite makes for its sets; `knowing` says which way the value goes when a model knows more.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.tables import Floats, Ints, Need, Sample, SetTable, Tables, Unavailable, mean_of
from llm_unlearn.spec import spec

Knowing = Literal["raises", "lowers", "moves"]
"""Knowing more of the set raises the value, lowers it, or moves it away from ½, where either direction is a leak."""

MeasureKind = Literal["likelihood", "distribution", "extraction", "choice", "text", "membership", "forget quality", "utility"]
"""Kind of evidence. Measures of one kind count once in the verdict (`report/verdict.py`)."""

Variant = Literal["peer"]
"""A published variant of a measure: `peer` is OpenUnlearning's (2506.12618), to compare with its numbers (docs/metrics.md)."""

LARGEST_LOG = 709.0  # its exp is still a float64: a collapsed model has a very large perplexity, not an infinite one


@spec
class Perplexity:
    """exp(Σ NLL / Σ T) over the set's answers: every token weighs the same. Stops at e^709."""

    name: Literal["perplexity"] = "perplexity"
    set: str
    """The set that is measured."""

    kind: ClassVar[MeasureKind] = "likelihood"
    needs: ClassVar[tuple[Need, ...]] = ("answer",)
    unit: ClassVar[str] = "tokens to choose from"
    knowing: ClassVar[Knowing] = "lowers"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of("answer")
        rows = np.stack([answers.nll, answers.length.astype(float)], axis=1)  # (R, 2)

        def over_tokens(groups: tuple[Floats, ...]) -> float:
            nll, tokens = groups[0].sum(axis=0)
            return float(np.exp(min(nll / tokens, LARGEST_LOG)))

        return Sample((rows,), over_tokens, np.exp(np.minimum(rows[:, 0] / rows[:, 1], LARGEST_LOG)))


@spec
class Probability:
    """mean_i exp(−NLL_i / T_i), the geometric mean of an answer's token probabilities (TOFU, 2401.06121, §2.2)."""

    name: Literal["probability"] = "probability"
    set: str
    """The set that is measured."""

    kind: ClassVar[MeasureKind] = "likelihood"
    needs: ClassVar[tuple[Need, ...]] = ("answer",)
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of("answer")
        return mean_of(np.exp(-answers.nll / answers.length))


@spec
class ExactMemorization:
    """Mean share of an answer's tokens that are the model's first choice after the true tokens before them
    (Tirumala et al. 2022, 2205.10770)."""

    name: Literal["exact_memorization"] = "exact_memorization"
    set: str
    """The set that is measured."""
    variant: Variant | None = None
    """`peer`: count the tokens that OpenUnlearning counts. It leaves out the last one, usually the end of the turn."""

    kind: ClassVar[MeasureKind] = "extraction"
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return the answers, and again as the variant encodes them."""
        return needs_of(self.variant)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of(self.variant or "answer")
        if not len(answers.row):
            raise Unavailable(f"exact_memorization of {self.set!r}: no answer has a token that OpenUnlearning counts.")
        return mean_over(answers.sum(answers.hit) / answers.length, model[self.set], answers.row)


@spec
class ExtractionStrength:
    """mean_i 1 − k_i / T_i, k the shortest prefix after which every token is the model's first choice
    (Carlini et al. 2021, 2012.07805; in this form OpenUnlearning, 2506.12618)."""

    name: Literal["extraction_strength"] = "extraction_strength"
    set: str
    """The set that is measured."""
    variant: Variant | None = None
    """`peer`: read the tokens that OpenUnlearning reads, which leaves out the last one, usually the end of the turn; and give an
    answer whose last token is not the first choice 1/T in place of 0."""

    kind: ClassVar[MeasureKind] = "extraction"
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return the answers, and again as the variant encodes them."""
        return needs_of(self.variant)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of(self.variant or "answer")
        misses = [np.flatnonzero(~hit.astype(bool)) for hit in answers.split(answers.hit)]
        prefix = np.array([miss[-1] + 1 if len(miss) else 0 for miss in misses])  # (A,)
        strength = np.zeros(len(model[self.set].ids))  # the peer gives 0 to an answer without tokens
        strength[answers.row] = np.maximum(1 - prefix / answers.length, 1 / answers.length if self.variant == "peer" else 0)
        return mean_of(strength)


def needs_of(variant: Variant | None) -> tuple[Need, ...]:
    """Return what a measure on the answers' own tokens needs in this variant."""
    return ("answer", variant) if variant else ("answer",)


# ------------------------------------------------------------------------------------------------ against wrong answers


def choices(tables: Tables, set: str, by: Literal["normalised", "sum"] = "normalised") -> tuple[Ints, Floats, list[Floats]]:
    """The U rows that have wrong answers, (U,), log p of their correct answer, (U,), and of the wrong ones, U arrays; nats.

    The correct answer is the row's paraphrase where it has one, else its answer. "normalised" divides by T tokens.

    Raises:
        Unavailable: no row of the set has a wrong answer.
    """
    scored = tables[set].likelihood
    logp = -scored.nll / (scored.length if by == "normalised" else 1)  # (A,)
    correct: dict[int, float] = {}
    wrong: dict[int, list[float]] = {}
    for kind in ("answer", "paraphrase", "perturbed"):  # in this order a paraphrase takes the answer's place
        for a in np.flatnonzero(scored.kind == kind):
            if kind == "perturbed":
                wrong.setdefault(int(scored.row[a]), []).append(float(logp[a]))
            else:
                correct[int(scored.row[a])] = float(logp[a])
    if not wrong:
        raise Unavailable(
            f"set {set!r}: none of its {len(tables[set].ids)} rows has wrong answers to compare with. "
            "Give the set a column of perturbed answers, or take this measure off it."
        )
    rows = sorted(wrong)
    return np.array(rows), np.array([correct[row] for row in rows]), [np.array(wrong[row]) for row in rows]


def mean_over(values: Floats, table: SetTable, at: Ints) -> Sample:
    """The mean over the rows that have a value, which are `at`."""
    sample = mean_of(values)
    if len(values) == len(table.ids):
        return sample
    sparse = np.full(len(table.ids), np.nan)
    sparse[at] = values
    return Sample(sample.groups, sample.statistic, sparse=sparse)


def log_truth_ratio(tables: Tables, set: str, wrong_mean: Literal["arithmetic", "geometric"]) -> tuple[Ints, Floats]:
    """(U,) rows and (U,) log R, R = mean p^(1/T) of the wrong answers ÷ p^(1/T) of the correct one, however small both are."""
    at, correct, wrong = choices(tables, set)
    if wrong_mean == "arithmetic":
        return at, np.array([np.logaddexp.reduce(logp) - np.log(len(logp)) for logp in wrong]) - correct
    return at, np.array([logp.mean() for logp in wrong]) - correct


@spec
class TruthRatio:
    """R = wrong/correct, the mean p^(1/T) of the perturbed answers over the paraphrase's (TOFU, 2401.06121, eq. 1).

    Computed from log R, so that a model to which right and wrong are equally impossible gets R = 1 and not 0/0.
    """

    name: Literal["truth_ratio"] = "truth_ratio"
    set: str
    """The set that is measured."""
    aggregate: Literal["closer_to_one_better", "true_better", "prob_mean"]
    """`closer_to_one_better`: mean min(R, 1/R), for forget sets. `true_better`: mean max(0, 1 − R), for sets to keep.
    `prob_mean`: mean 1/(1 + R), which is correct/(correct + wrong), ½ when the model cannot tell them apart."""
    wrong_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """Mean of the wrong answers' p^(1/T): as in TOFU's equation 1, or through their losses (OpenUnlearning)."""

    kind: ClassVar[MeasureKind] = "choice"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "paraphrase", "perturbed")
    unit: ClassVar[str] = "share"

    @property
    def knowing(self) -> Knowing:
        """Depends on the aggregate."""
        return "lowers" if self.aggregate == "closer_to_one_better" else "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        at, ratio = log_truth_ratio(model, self.set, self.wrong_mean)
        match self.aggregate:
            case "closer_to_one_better":
                rows = np.exp(-np.abs(ratio))
            case "true_better":
                rows = -np.expm1(np.minimum(ratio, 0))
            case "prob_mean":
                rows = np.exp(-np.logaddexp(0, ratio))
        return mean_over(rows, model[self.set], at)


@spec
class ForgetQuality:
    """p-value of the two-sample Kolmogorov–Smirnov test between the truth ratios of unlearned and retrained model
    (TOFU, 2401.06121, §2.2). The test sees ranks only, so log R serves as well as R or 1/R."""

    name: Literal["forget_quality"] = "forget_quality"
    set: str
    """The forget set."""
    wrong_mean: Literal["arithmetic", "geometric"] = "geometric"
    """Mean of the wrong answers' p^(1/T): `geometric` as in TOFU's code, which made the published p-values;
    `arithmetic` as in TOFU's equation 1."""

    kind: ClassVar[MeasureKind] = "forget quality"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "paraphrase", "perturbed")
    unit: ClassVar[str] = "p-value"
    knowing: ClassVar[Knowing] = "lowers"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        if retrained is None:
            raise Unavailable(
                f"forget_quality of {self.set!r} needs a retrained model, one that never saw this set: "
                "`--retrained PATH` or `retrained:` in the suite."
            )
        groups = tuple(log_truth_ratio(tables, self.set, self.wrong_mean)[1] for tables in (model, retrained))

        def p_value(groups: tuple[Floats, ...]) -> float:
            from scipy.stats import ks_2samp

            return float(ks_2samp(*groups).pvalue)

        return Sample(groups, p_value, interval=False)
