"""What lm-evaluation-harness found, document by document, as scores: its own values, with an interval over documents.

Resampling is that of `tables.Sample`: the documents of each task on their own, so that a group is resampled task by task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import aggregate_subtask_metrics
from numpy.typing import NDArray

from llm_unlearn.evaluation.tables import Sample
from llm_unlearn.evaluation.tasks import Score, Task

PARTS = 8
"""A group of no more parts than this lists each of them; of others only the whole is a number."""
OF_ONE = ("perplexity", "weighted_perplexity", "bits_per_byte")
"""Ways to make one value of many that a single document has too."""
UNITS = {
    "word_perplexity": "words to choose from",
    "byte_perplexity": "bytes to choose from",
    "perplexity": "words to choose from",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True)
class _Column:
    """One metric's values of one task's documents, and how they become one."""

    items: NDArray[Any]  # (n,) or (n, 2) numbers, or (n,) of anything
    one: Callable[[Any], Any]

    def value(self, items: NDArray[Any]) -> float:
        try:
            name = getattr(self.one, "__name__", "")
            return float(items.mean() if name == "mean" and items.dtype.kind == "f" else self.one(items))
        except OverflowError:
            return math.inf

    @property
    def sample(self) -> Sample:
        """For the interval."""
        return Sample((self.items,), lambda groups: self.value(groups[0]))

    @property
    def rows(self) -> list[float | None]:
        """(n,) each document's own value, where it has one."""
        if getattr(self.one, "__name__", "") in OF_ONE:
            found = [self.value(self.items[i : i + 1]) for i in range(len(self.items))]
        elif self.items.dtype.kind == "f" and self.items.ndim == 1:
            found = self.items.tolist()
        else:
            return []
        return [_finite(value) for value in found]

    @property
    def how(self) -> str:
        return f"{getattr(self.one, '__name__', 'its own aggregation').replace('_', ' ')} over documents"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scores_of(task: Task, found: Any, results: Any) -> tuple[list[Score], dict[str, list[dict[str, Any]]]]:
    """Every score of every task and group below a task of a suite, its own first; and task -> its documents.

    Args:
        found: what the library's manager loaded.
        results: what its `evaluate` returned, with the samples.
    """
    columns = {name: _columns(one, results["samples"][name]) for name, one in found["tasks"].items()}
    groups = found.get("groups") or {}
    whole = groups.get(task.task)
    parts = () if whole is None else tuple(whole.child_names)
    single = whole is not None and whole.has_aggregation
    scores = [
        score for name, group in groups.items() if group.has_aggregation
        for score in _of_group(group, columns, results, name == task.task or (name in parts and len(parts) <= PARTS))
    ]  # fmt: skip
    for name, own in columns.items():
        listed = not single or (name in parts and len(parts) <= PARTS)
        scores += [
            _score(name, key, own, results, column.sample, column.how, listed, column.rows) for key, column in own.items()
        ]  # fmt: skip
    return sorted(scores, key=lambda one: one.of != task.task), {
        name: _documents(one, results["samples"][name]) for name, one in found["tasks"].items()
    }


def _of_group(group: Any, columns: Mapping[str, Mapping[tuple[str, str], _Column]], results: Any, listed: bool) -> list[Score]:
    leaves = [one.task_name for one in group.get_all_tasks()]
    made = []
    for setting in group.aggregate_metric_list:
        for key in dict.fromkeys(key for name in leaves for key in columns[name] if key[0] == setting.metric):
            if ",".join(key) in results["results"][group.name]:
                mine = [columns[name][key] for name in leaves if key in columns[name]]

                def statistic(arrays: tuple[Any, ...], mine: Any = mine, weighted: bool = setting.weight_by_size) -> float:
                    values = [one.value(array) for one, array in zip(mine, arrays, strict=True)]
                    return float(aggregate_subtask_metrics(values, [len(array) for array in arrays], weighted))

                weight = "weighted by their number" if setting.weight_by_size else "each task weighing the same"
                sample = Sample(tuple(one.items for one in mine), statistic)
                keys = dict.fromkeys(key for name in leaves for key in columns[name])
                made.append(_score(group.name, key, keys, results, sample, f"mean over {len(mine)} tasks, {weight}", listed))
    return made


def _score(
    of: str, key: tuple[str, str], keys: Mapping[tuple[str, str], Any], results: Any, sample: Sample, how: str, listed: bool,
    rows: Sequence[float | None] = (),
) -> Score:  # fmt: skip
    metric, filtered = key
    several = sum(one[0] == metric for one in keys) > 1
    value = results["results"][of][f"{metric},{filtered}"]
    value = _finite(float(value)) if isinstance(value, (int, float, np.number)) else None
    low, high = (None, None) if value is None else sample.bootstrap() or (None, None)
    higher = results["higher_is_better"].get(of, {}).get(metric)
    shares = all(one.dtype.kind == "f" and one.ndim == 1 and ((one >= 0) & (one <= 1)).all() for one in sample.groups)
    return Score(
        of, f"{metric} ({filtered})" if several else metric, value, None if low is None else _finite(low),
        None if high is None else _finite(high), sample.n, None if higher is None else bool(higher),
        UNITS.get(metric, "share" if shares else "points"), how, str(results["versions"].get(of, "")), listed, list(rows),
    )  # fmt: skip


def _columns(one: Any, samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], _Column]:
    """(metric, filter) -> the values of a task's documents."""
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    known = one.aggregation()
    return {key: _Column(_array(items), known.get(key[0], _mean)) for key, items in values.items()}


def _mean(items: Any) -> float:
    """Of a metric for which a task names none; the library's choice too."""
    return float(sum(items) / len(items))


def _array(items: Sequence[Any]) -> NDArray[Any]:
    """Numbers, or pairs of them, as such; anything else as it is."""
    flat = [number for item in items for number in (item if isinstance(item, tuple) else (item,))]
    if (
        all(isinstance(number, (int, float, np.number, np.bool_)) for number in flat)
        and len({np.shape(item) for item in items}) == 1
    ):
        return np.array(items, dtype=np.float64)
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):  # numpy would take a list of tuples for a table
        array[i] = item
    return array


def _documents(one: Any, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked, what is right and what was written: one entry a document, whichever filters read it."""
    first = samples[0]["filter"]
    return [
        {
            "id": sample["doc_id"],
            "prompt": _text(one.doc_to_text(sample["doc"])),
            "truth": _truth(one, sample),
            "written": _text(sample["resps"][0][0]) if one.OUTPUT_TYPE == "generate_until" else None,
        }
        for sample in samples
        if sample["filter"] == first
    ]


def _truth(one: Any, sample: Mapping[str, Any]) -> str:
    target = sample["target"]
    if isinstance(target, int) and one.get_config("doc_to_choice") is not None:
        choices = one.doc_to_choice(sample["doc"])
        return str(choices[target]) if 0 <= target < len(choices) else str(target)
    return _text(target)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
