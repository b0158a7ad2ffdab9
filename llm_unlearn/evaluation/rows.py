"""Row by row what the measures are made of: one record per set, row and model, for `evaluation.parquet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_unlearn.evaluation.numbers import compares, sample_of, titles
from llm_unlearn.evaluation.suite import Suite, sets_of
from llm_unlearn.evaluation.tables import Floats, SetTable, Tables, Unavailable
from llm_unlearn.evaluation.tasks import Answered, task_records


def records(
    suite: Suite, models: Mapping[str, Tables], answered: Mapping[str, Sequence[Answered]] | None = None
) -> list[dict[str, Any]]:
    """One record per set × row × model, then per task × document × model: what was asked, what is true, what was written, the
    sums over the answer's tokens, and the row's own value of every measure that has one, under the measure's title; None where
    it has none.

    Args:
        models: "before", "after", "retrained", … -> tables.
        answered: the same -> what it scored on the suite's tasks.
    """
    columns = titles(suite)
    found: list[dict[str, Any]] = []
    for model, tables in models.items():
        values = _values(suite, model, models)
        for name, table in tables.items():
            mine = {title: column for (of, title), column in values.items() if of == name}
            for row, facts in enumerate(_facts(table)):
                own = {title: _plain(mine[title][row]) if title in mine else None for title in columns}
                found.append({"set": name, "id": table.ids[row], "model": model, **facts, **own})
    found.extend(task_records(suite.tasks, answered or {}))
    keys = dict.fromkeys(key for record in found for key in record)
    return [{key: record.get(key) for key in keys} for record in found]


def _facts(table: SetTable) -> Iterator[dict[str, Any]]:
    """Of each row: texts, and sums over its answer's tokens."""
    answers = table.likelihood.of("answer")
    hits, entropy = answers.sum(answers.hit), answers.sum(answers.entropy)
    for row in range(len(table.ids)):
        yield {
            "prompt": table.prompts[row],
            "truth": table.answers[row],
            "written": None if table.generated is None else table.generated[row],
            "samples": next((texts[row] for texts in table.samples.values()), None),
            "tokens": int(answers.length[row]),
            "nll": _plain(answers.nll[row]),
            "first_choices": int(hits[row]),
            "mean_entropy": _plain(entropy[row] / answers.length[row]),
        }


def _values(suite: Suite, model: str, models: Mapping[str, Tables]) -> dict[tuple[str, str], Floats]:
    """(set, title) -> (R,) each measure's values of one model, where it has one per row; NaN for rows without."""
    result: dict[tuple[str, str], Floats] = {}
    for measure, title in zip(suite.measures, titles(suite), strict=True):
        if model == "retrained" and compares(measure):
            continue
        try:
            sample = sample_of(measure, models[model], models.get("retrained"))
        except Unavailable:
            continue
        own = sample.rows if sample.rows is not None else sample.sparse
        if own is not None:
            result[measure.set, title] = own
        if sample.others is not None:
            result[sets_of(measure)[1], title] = sample.others
    return result


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
