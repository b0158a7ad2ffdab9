"""How much of a set's answers a model still gives away, asked as the suite asks: the likelihood pass and a measure on its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from llm_unlearn.attacks.finding import Curve, Subject
from llm_unlearn.evaluation.memorization import ExtractionStrength, Probability
from llm_unlearn.evaluation.tables import Floats

if TYPE_CHECKING:
    from llm_unlearn.evaluation.sets import EncodedSet
    from llm_unlearn.models.load import Loaded

Asked = Literal["probability", "extraction_strength"]
"""What an attack's gain is measured by; the other of the two stands in the curve's notes."""


@dataclass(frozen=True)
class Known:
    """What one model gives away of some rows."""

    value: float
    low: float
    high: float
    """95 % bootstrap interval over rows."""
    rows: Floats  # (R,)
    beside: dict[str, float]
    """The other measure, and the share of answers of which every token is the first choice."""


def answers_of(asked: EncodedSet, rows: Sequence[int] | None = None) -> EncodedSet:
    """A set's true answers only, of all its rows or of some of them, with nothing to generate."""
    chosen = list(range(len(asked.ids))) if rows is None else list(rows)
    number = {row: new for new, row in enumerate(chosen)}
    at = [a for a, (row, kind) in enumerate(zip(asked.row, asked.kind, strict=True)) if kind == "answer" and row in number]
    at.sort(key=lambda a: number[asked.row[a]])
    return replace(
        asked,
        ids=[asked.ids[row] for row in chosen],
        prompts=[asked.prompts[row] for row in chosen],
        answers=[asked.answers[row] for row in chosen],
        row=[number[asked.row[a]] for a in at],
        kind=["answer"] * len(at),
        examples=[asked.examples[a] for a in at],
        needs=frozenset({"answer"}),
        keywords=None,
        cut={},
        thinking=None,
    )


def known(loaded: Loaded, asked: EncodedSet, measure: Asked, subject: Subject) -> Known:
    """Ask a model for a set's answers, teacher-forced, and keep nothing."""
    from llm_unlearn.evaluation.passes import tables_of

    tables = tables_of(
        loaded, {"asked": asked}, subject.accelerator, batch_tokens=subject.batch_tokens, max_new_tokens=1, cache=None,
        title=subject.column,
    )  # fmt: skip
    samples = {one.name: one(tables, None) for one in (ExtractionStrength(set="asked"), Probability(set="asked"))}
    sample = samples[measure]
    assert sample.rows is not None  # both are means over rows
    low, high = sample.bootstrap() or (sample.value, sample.value)
    answers = tables["asked"].likelihood.of("answer")
    whole = float(np.mean([hit.all() for hit in answers.split(answers.hit)]))
    beside = {name: one.value for name, one in samples.items() if name != measure} | {"whole_answers": whole}
    return Known(sample.value, low, high, sample.rows, beside)


def curve_of(points: list[tuple[float, Known]], notes: dict[str, float] | None = None) -> Curve:
    """What was found at each x, with the other numbers of the last point as notes."""
    x, seen = zip(*points, strict=True)
    last = seen[-1]
    return Curve(
        x,
        tuple(one.value for one in seen),
        tuple(one.low for one in seen),
        tuple(one.high for one in seen),
        tuple(last.rows.tolist()),
        {**last.beside, **(notes or {})},
    )
