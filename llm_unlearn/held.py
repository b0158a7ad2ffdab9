"""What an `evaluation.json` must hold for the rooms that read it: types alone, so that a damaged or foreign file is refused where
it is read, and not wherever its first wrong value is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from llm_unlearn.spec import Refused, dotted, record, shown, typed

AGAIN = "Make it again with llm-unlearn evaluate … --overwrite"
Columns = Mapping[str, Any]


@record
class Value:
    """One number of one model."""

    value: float | None = None
    missing: str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@record
class Number:
    """One measure on one set."""

    measure: str
    title: str
    set: str
    values: Mapping[str, Value]
    settings: Columns | None = None
    goal: str | None = None
    unit: str | None = None
    knowing: str | None = None
    definition: str | None = None


@record
class Named:
    """A model."""

    name: str
    identity: str


@record
class Answer:
    """One row, and what the models said of it."""

    id: str
    prompt: str | None = None
    truth: str | None = None
    probability: Mapping[str, float | None] = field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    model: str | None = None
    retrained: str | None = None


@record
class Attack:
    """What an adversary found."""

    title: str
    set: str | None = None


@record
class Ran:
    """How the run went."""

    status: str | None = None
    reason: str | None = None
    versions: Columns = field(default_factory=dict)


@record
class Held:
    """An evaluation."""

    title: str
    suite: str
    suite_hash: str
    models: Mapping[str, Named]
    numbers: tuple[Number, ...]
    curves: Mapping[str, Columns]
    answers: Mapping[str, tuple[Answer, ...]]
    suite_settings: Columns = field(default_factory=dict)
    run: Ran | None = None
    attacks: tuple[Attack, ...] = ()
    thresholds: tuple[Columns, ...] = ()


def check(data: Mapping[str, Any], place: str) -> None:
    """Refuse what is no evaluation, by the key at which it is none."""
    typed(
        Held, data, place, "expected what `run` and `evaluate` write there. Make it again with llm-unlearn evaluate … --overwrite"
    )
    for path, found in _uneven(data["curves"]):
        expected = "a curve: its set, its points `n`, and as many numbers for each model"
        raise Refused(f"{place}: {dotted(path)}: found {shown(found)}; expected {expected}.")


def _uneven(curves: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[tuple[str, ...], object]]:
    """The columns of a curve that do not belong to its points."""
    for name, curve in curves.items():
        points = curve.get("n")
        if not isinstance(curve.get("set"), str) or not isinstance(points, list):
            yield ("curves", name), curve
            return
        for key, values in curve.items():
            if key != "set" and not _numbers(values, len(points)):
                yield ("curves", name, key), values


def _numbers(values: object, count: int) -> bool:
    plain = isinstance(values, list) and len(values) == count
    return plain and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)  # type: ignore[attr-defined]
