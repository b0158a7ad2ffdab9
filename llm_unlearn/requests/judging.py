"""Whether a request is fulfilled: the service's thresholds against the numbers of an evaluation. Pure functions on plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_unlearn.report.verdict import Number
from llm_unlearn.requests.derived import set_of
from llm_unlearn.sections import Threshold
from llm_unlearn.thresholds import Finding, find, finding


def findings(thresholds: Iterable[Threshold], numbers: Sequence[Number], request: int, first: Sequence[Number]) -> list[Finding]:
    """Every threshold on one request.

    Args:
        numbers: of the evaluation, in which the request's own sets are `forget_N`.
        first: numbers whose value before is meant by `before`: of these rows, or of what is to be kept, before the first request.
    """
    return [_finding(one, numbers, request, first) for one in thresholds]


def _finding(one: Threshold, numbers: Sequence[Number], request: int, first: Sequence[Number]) -> Finding:
    # of other data than the training data: as it is
    number = find(numbers, set_of(one.set, request), one.measure) or find(numbers, one.set, one.measure)
    return finding(one, number and _as_first(number, find(first, str(number["set"]), one.measure)))


def _as_first(number: Number, first: Number | None) -> Number:
    """A number with the value before that it had the first time: a later run begins where this had been forgotten already."""
    if first is None or "before" not in first["values"]:
        return number
    return {**number, "values": {**number["values"], "before": first["values"]["before"]}}


def of_request(numbers: Iterable[Number], request: int) -> list[Number]:
    """The numbers of one request's own sets."""
    return [one for one in numbers if one["set"] == set_of("forget", request) or _is_own(one["set"], request)]


def _is_own(name: str, request: int) -> bool:
    kind, _, rest = name.partition("_")
    return kind == "forget" and rest.endswith(f"_{request}")


def plainly(numbers: Iterable[Mapping[str, Any]]) -> list[Number]:
    """Numbers without their definitions, which are the same in all evaluations, and with None for what JSON has no number for."""
    return [{key: _finite(value) for key, value in one.items() if key != "definition"} for one in numbers]


def _finite(value: Any) -> Any:
    """Plain data in which an interval's infinite end, say, is None."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
