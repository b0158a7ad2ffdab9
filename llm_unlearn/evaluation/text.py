"""What a model writes, compared with the truth as text."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Knowing
from llm_unlearn.evaluation.tables import Floats, Sample, SetTable, Tables, Unavailable, mean_of
from llm_unlearn.spec import spec


def rouge_l(truth: list[str], text: list[str], stem: bool, part: Literal["recall", "fmeasure"]) -> Floats:
    """(R,) ROUGE-L (Lin 2004) of each text against its truth, 0 to 1: their longest common subsequence of words.

    Words are those of the `rouge_score` package, runs of a–z and 0–9 in lower case, so another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(one, other)["rougeL"] for one, other in zip(truth, text, strict=True)]
    return np.array([score.recall if part == "recall" else score.fmeasure for score in scores], dtype=float)


def _written(table: SetTable, measure: str, set: str) -> list[str]:
    if table.generated is None:
        raise Unavailable(
            f"{measure} of {set!r} needs the model's greedy answers, and this table was made without them. "
            "Make it with the pass `generation`."
        )
    return table.generated


@spec
class Rouge:
    """Mean ROUGE-L of the greedy answer against the truth, 0 to 1: recall with stemmer in TOFU (2401.06121),
    f-measure without in MUSE (2407.06460)."""

    name: Literal["rouge"] = "rouge"
    set: str
    """The set that is measured."""
    stem: bool = True
    """Cut words to their stems first (Porter, English)."""
    part: Literal["recall", "fmeasure"] = "recall"
    """`recall`: the share of the truth's words that appear in order; `fmeasure`: its harmonic mean with precision."""

    needs: ClassVar[tuple[str, ...]] = ("generation",)
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        return mean_of(rouge_l(table.answers, _written(table, "rouge", self.set), self.stem, self.part))


@spec
class ExactMatch:
    """Share of greedy answers that equal the truth once outer blanks are cut and inner ones made single (SQuAD,
    1606.05250, without its other clean-up: case and punctuation count)."""

    name: Literal["exact_match"] = "exact_match"
    set: str
    """The set that is measured."""

    needs: ClassVar[tuple[str, ...]] = ("generation",)
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        written = _written(table, "exact_match", self.set)
        same = [one.split() == other.split() for one, other in zip(table.answers, written, strict=True)]
        return mean_of(np.array(same, dtype=float))
