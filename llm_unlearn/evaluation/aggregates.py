"""One number made of others, as benchmarks publish them, with a floor under what must be kept: a collapsed model must not rank
first. Plain data in, plain data out: measures, tasks and earlier aggregates alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean, harmonic_mean
from typing import Any, Literal

from llm_unlearn.spec import spec

MEANS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "arithmetic": fmean,
    "harmonic": harmonic_mean,
    "geometric": geometric_mean,
}
NAMED = re.compile(r"(?P<less>1 - )?(?P<title>.+) on (?P<set>[^ ]+)")
SET = "aggregates"
"""Where aggregates stand, so that a later one can name an earlier one."""


@spec
class Aggregate:
    """The mean of numbers of the suite."""

    title: str
    """What it is called."""
    of: tuple[str, ...]
    """Its parts as they are titled: `rouge on retain`, `acc on mmlu`, `1 - rouge on forget` for what should be low,
    `TITLE on aggregates` for an earlier one."""
    mean: Literal["arithmetic", "harmonic", "geometric"] = "arithmetic"
    """Harmonic and geometric means are 0 where a part is."""
    at_least: Mapping[str, float] | None = None
    """Parts that must not be lower; where one is, the aggregate is 0."""
    definition: str = ""
    """Where it is from."""

    def __post_init__(self) -> None:
        for part in self.of:
            if not NAMED.fullmatch(part):
                raise ValueError(f"parts such as `rouge on retain` or `1 - rouge on forget`, not {part!r}")
        for part in self.at_least or {}:
            if part not in self.of:
                raise ValueError(f"at_least of its own parts; {part!r} is none")

    @property
    def parts(self) -> list[tuple[str, str, bool]]:
        """(title, set, whether it counts as 1 − value) of each part."""
        found = [NAMED.fullmatch(part) for part in self.of]
        return [(one["title"], one["set"], bool(one["less"])) for one in found if one]


def aggregates(wanted: Sequence[Aggregate], numbers: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Every aggregate of every column, as `evaluation.json` has numbers; without interval, as its parts have rows of their own.

    Args:
        numbers: those of measures and tasks.
        columns: "before", "after", …
    """
    found = list(numbers)
    made: list[dict[str, Any]] = []
    for one in wanted:
        by_name = {(number["title"], number["set"]): number for number in found}
        how = f"{one.mean.capitalize()} mean of {', '.join(one.of)}{_floors(one)}. {one.definition}".strip()
        number = {
            "measure": "aggregate",
            "title": one.title,
            "set": SET,
            "goal": "",
            "knowing": "raises",
            "unit": "share",
            "definition": how,
            "settings": {},
            "values": {column: _value(one, by_name, column) for column in columns},
        }
        made.append(number)
        found.append(number)
    return made


def _floors(one: Aggregate) -> str:
    floors = ", ".join(f"{part} is below {floor:g}" for part, floor in (one.at_least or {}).items())
    return f"; 0 where {floors}" if floors else ""


def _value(one: Aggregate, by_name: Mapping[tuple[str, str], Mapping[str, Any]], column: str) -> dict[str, Any]:
    values: list[float] = []
    for part, (title, of, less) in zip(one.of, one.parts, strict=True):
        number = by_name.get((title, of))
        held = number["values"].get(column, {}) if number else {}
        if held.get("value") is None:
            return {"missing": f"{part} is not there" + (f": {held['missing']}" if "missing" in held else "")}
        value = 1 - held["value"] if less else held["value"]
        if value < (one.at_least or {}).get(part, -float("inf")):
            return {"value": 0.0, "low": None, "high": None, "n": len(one.of)}
        values.append(max(0.0, value))
    mean = 0.0 if one.mean != "arithmetic" and min(values) == 0 else MEANS[one.mean](values)
    return {"value": float(mean), "low": None, "high": None, "n": len(values)}
