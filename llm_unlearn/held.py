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
    n: int = 0


@record
class Number:
    """One measure on one set."""

    measure: str
    title: str
    set: str
    values: Mapping[str, Value]
    settings: Columns
    goal: str
    knowing: str
    definition: str
    unit: str | None = None


@record
class Named:
    """A model."""

    name: str
    identity: str


@record
class Answer:
    """One row, and what the models said of it."""

    id: str
    prompt: str
    truth: str
    probability: Mapping[str, float | None] = field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    model: str | None = None
    retrained: str | None = None


@record
class Axis:
    """What a curve of an attack is drawn over."""

    name: str
    unit: str
    ticks: tuple[str, ...]


@record
class Gain:
    """What an adversary wants more of."""

    name: str


@record
class Curve:
    """What an adversary got from one model, or why there is nothing."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    missing: str | None = None


@record
class Best:
    """What an adversary got from one model at most."""

    at: str
    value: float
    low: float | None = None
    high: float | None = None


@record
class Gap:
    """What comes back beyond what the control knows."""

    best: Mapping[str, Best]
    gap: float | None
    came_back: float | None
    leaks: bool
    by_attack: bool = True


@record
class Attack:
    """What an adversary found."""

    name: str
    title: str
    definition: str
    settings: Columns
    set: str
    x: Axis
    y: Gain
    curves: Mapping[str, Curve]
    gap: Gap
    finding: str


@record
class Threshold:
    """What was asked of one number, and what came."""

    measure: str
    set: str
    asked: str
    value: float | None
    holds: bool
    why: str | None = None


@record
class Ran:
    """How the run went."""

    steps: int
    seconds: float = 0.0
    status: str = ""
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
    hub: tuple[str, ...] = ()
    run: Ran | None = None
    attacks: tuple[Attack, ...] = ()
    thresholds: tuple[Threshold, ...] = ()


def check(data: Mapping[str, Any], place: str) -> None:
    """Refuse what is no evaluation, by the key at which it is none."""
    typed(Held, data, place, f"expected what `run` and `evaluate` write there. {AGAIN}")
    for i, attack in enumerate(data.get("attacks") or ()):
        if attack["gap"]["leaks"] and not (attack["gap"].get("came_back") is not None and "after" in attack["gap"]["best"]):
            raise Refused(f"{place}: attacks[{i}].gap: leaks, and not what came back of the model after. {AGAIN}.")
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
