"""What numbers must be for a run to count: thresholds against a suite, and against the numbers that came out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llm_unlearn.evaluation.numbers import titles
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.report.verdict import Number, current, judge, shown, value_of
from llm_unlearn.sections import Threshold
from llm_unlearn.source import is_forgotten
from llm_unlearn.spec import nearest

Finding = dict[str, Any]
"""measure, set, asked, value, bound, holds, and why not."""


def problems(
    thresholds: Sequence[Threshold], suite: Suite, name: str, control: str | None
) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """What is wrong with thresholds: each must read a number that the suite has, and say what it must be.

    Args:
        name: of the suite, for the error.
        control: the retrained model, where there is one.

    Yields:
        (keys below `thresholds`, text).
    """
    known = {(measure.set, title) for measure, title in zip(suite.measures, titles(suite), strict=True)}
    for i, one in enumerate(thresholds):
        if one.set not in {name for name, _ in known}:
            yield (i, "set"), f"found {one.set!r}; {nearest(one.set, sorted({name for name, _ in known}))}"
        elif (one.set, one.measure) not in known:
            valid = [title for name, title in known if name == one.set]
            yield (i, "measure"), f"found {one.measure!r}; {nearest(one.measure, sorted(valid))}"
        if sum(bound is not None for bound in (one.at_most, one.at_least, one.judged)) != 1:
            yield (i,), "expected one of at_most, at_least, judged."
        if one.of and one.judged:
            yield (i, "of"), "goes with at_most or at_least."
        if (one.judged or one.of == "retrained") and not control:
            yield (i,), f"compares with the retrained model, and {name} names none."
        if one.judged and not is_forgotten(one.set):
            yield (i, "judged"), "is said of sets that are to be forgotten only; give at_least and of: before."


def findings(thresholds: Iterable[Threshold], numbers: Sequence[Number]) -> list[Finding]:
    """Every threshold on the numbers of an evaluation."""
    return [finding(one, find(numbers, one.set, one.measure)) for one in thresholds]


def finding(one: Threshold, number: Number | None) -> Finding:
    """Whether one threshold holds; a number that is not there holds nothing."""
    found: Finding = {"measure": one.measure, "set": one.set, "asked": one.asked, "value": None, "holds": False, "why": ""}
    name = f"{one.measure} on {one.set}"
    if number is None:
        return found | {"why": f"{name} was not measured"}
    column = current(number)
    value = value_of(number, column)
    if value is None:
        return found | {"why": f"{name}: {number['values'].get(column, {}).get('missing', 'it has no value')}"}
    found["value"] = value
    if one.judged:
        word = judge(number)
        said = {} if word == one.judged else {"why": f"{name} is {shown(value)}: {word or 'no judgement'}"}
        return found | {"holds": word == one.judged} | said
    factor = 1.0 if one.of is None else value_of(number, one.of)
    if factor is None:
        return found | {"why": f"{name}: the model {one.of} has no value to compare with"}
    bound = factor * float(one.at_most if one.at_most is not None else one.at_least or 0.0)
    holds = value <= bound if one.at_most is not None else value >= bound
    why = "" if holds else f"{name} is {shown(value)}, {one.asked}" + (f" = {shown(bound)}" if one.of else "")
    return found | {"holds": holds, "bound": bound, "why": why}


def find(numbers: Iterable[Number], name: str, title: str) -> Number | None:
    """The number of one measure on one set."""
    return next((one for one in numbers if (one["set"], one["title"]) == (name, title)), None)


def reason_of(found: Iterable[Finding]) -> str:
    """Why it does not count, in words; empty where every threshold holds."""
    return "; ".join(one["why"] for one in found if not one["holds"])
