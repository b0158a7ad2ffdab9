"""Whether a request is fulfilled: the service's thresholds against the numbers of an evaluation. Pure functions on plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_unlearn.report.verdict import Number, current, judge, shown, value_of
from llm_unlearn.requests.derived import set_of
from llm_unlearn.requests.service import Threshold

Finding = dict[str, Any]
"""measure, set, asked, value, bound, holds, and why not."""


def findings(thresholds: Iterable[Threshold], numbers: Sequence[Number], request: int, first: Sequence[Number]) -> list[Finding]:
    """Every threshold on one request.

    Args:
        numbers: of the evaluation, in which the request's own sets are `forget_N`.
        first: numbers whose value before is meant by `before`: of these rows, or of what is to be kept, before the first request.
    """
    return [_finding(one, numbers, request, first) for one in thresholds]


def _finding(one: Threshold, numbers: Sequence[Number], request: int, first: Sequence[Number]) -> Finding:
    name = set_of(one.set, request)
    found: Finding = {"measure": one.measure, "set": one.set, "asked": one.asked, "value": None, "holds": False, "why": ""}
    number = find(numbers, name, one.measure) or find(
        numbers, one.set, one.measure
    )  # of other data than the training data: as it is
    if number is None:
        return found | {"why": f"{one.measure} on {one.set} was not measured"}
    column = current(number)
    value = value_of(number, column)
    if value is None:
        reason = number["values"].get(column, {}).get("missing", "it has no value")
        return found | {"why": f"{one.measure} on {one.set}: {reason}"}
    found["value"] = value
    number = _as_first(number, find(first, str(number["set"]), one.measure))
    if one.judged:
        word = judge(number)
        said = {} if word == one.judged else {"why": f"{one.measure} on {one.set} is {shown(value)}: {word or 'no judgement'}"}
        return found | {"holds": word == one.judged} | said
    factor = 1.0 if one.of is None else value_of(number, one.of)
    if factor is None:
        return found | {"why": f"{one.measure} on {one.set}: the model {one.of} has no value to compare with"}
    bound = factor * float(one.at_most if one.at_most is not None else one.at_least or 0.0)
    holds = value <= bound if one.at_most is not None else value >= bound
    why = "" if holds else f"{one.measure} on {one.set} is {shown(value)}, {one.asked}" + (f" = {shown(bound)}" if one.of else "")
    return found | {"holds": holds, "bound": bound, "why": why}


def find(numbers: Iterable[Number], name: str, title: str) -> Number | None:
    """The number of one measure on one set."""
    return next((one for one in numbers if (one["set"], one["title"]) == (name, title)), None)


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


def reason_of(found: Iterable[Finding]) -> str:
    """Why a request is not fulfilled, in words; empty where it is."""
    return "; ".join(one["why"] for one in found if not one["holds"])


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
