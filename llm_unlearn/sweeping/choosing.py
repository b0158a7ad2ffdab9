"""What the trials of a study came to: their order, their frontier, and the one that is chosen. Pure functions on plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.report.ranking import ranked, standing
from llm_unlearn.spec import Refused
from llm_unlearn.sweeping.study import Trial

SIDES = ("forgotten", "kept")
RULE = re.compile(r"\s*(\w+)\s*>=\s*(\d*\.?\d+)\s*(%?)\s*")
BY_SCORE = "the best harmonic mean of forgotten and kept"


@dataclass(frozen=True)
class Rule:
    """Of the trials that have at least so much of one side, the one with most of the other."""

    side: str
    least: float

    def __str__(self) -> str:
        other = next(side for side in SIDES if side != self.side)
        return f"most {other} of those with {self.side} at least {self.least:g}"


def rule_of(word: str | None) -> Rule | None:
    """The rule of `--pick`; None for the harmonic mean.

    Raises:
        Refused: it is none.
    """
    if word is None:
        return None
    found = RULE.fullmatch(word)
    if not found or found[1] not in SIDES or not 0 <= (least := float(found[2]) / (100 if found[3] else 1)) <= 1:
        raise Refused(f"--pick: found {word!r}; expected kept>=SHARE or forgotten>=SHARE, such as 'kept>=0.95'.")
    return Rule(found[1], least)


def rows_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every trial in the order of its number, as plain data: settings, numbers, state, and whether nothing beats it.

    A trial that keeps less than the leaderboard's floor has collapsed, and is neither on the frontier nor chosen.
    """
    places = {one["name"]: one for one in ranked(_standings(trials))}
    rows = []
    for trial in trials:
        place = places.get(trial.name, {"state": "", "rank": None, "frontier": False})
        facts = {key: value for key, value in trial.facts.items() if key != "twin"}
        state = "collapsed" if place["state"] == "collapsed" else trial.state
        rows.append(
            {"number": trial.number, "folder": trial.name, "state": state, "rank": place["rank"], "frontier": place["frontier"]}
            | {"settings": {key: _value(text) for key, text in trial.point.items()}}
            | facts
        )
    return rows


def _standings(trials: Iterable[Trial]) -> Iterable[dict[str, Any]]:
    """Each trial with numbers as a method with one seed, as the leaderboard has them."""
    return ({**standing([trial.facts]), "name": trial.name} for trial in trials if trial.state == "complete")


def board_of(trials: Sequence[Trial]) -> dict[str, Any]:
    """What the plot of the frontier draws: trials by their numbers."""
    return {"methods": [{**one, "name": str(int(one["name"].rpartition("-")[2]))} for one in ranked(_standings(trials))]}


def chosen(rows: Sequence[Mapping[str, Any]], rule: Rule | None) -> Mapping[str, Any] | None:
    """The trial that is taken; None where none may be: it has collapsed, or no trial keeps to the rule."""
    standing_ = [row for row in rows if row["rank"] is not None]
    if rule is None:
        return min(standing_, key=lambda row: int(row["rank"]), default=None)
    other = next(side for side in SIDES if side != rule.side)
    return max(
        (row for row in standing_ if row[rule.side] >= rule.least), key=lambda row: (row[other], row[rule.side]), default=None
    )


def why_none(rows: Sequence[Mapping[str, Any]], rule: Rule | None) -> str:
    """Why no trial is chosen."""
    if not any(row["state"] in ("complete", "collapsed") for row in rows):
        return "no trial has numbers"
    standing_ = [row for row in rows if row["rank"] is not None]
    if not standing_:
        return "every trial with numbers has collapsed"
    assert rule, "else one of them is the best"
    most = max(standing_, key=lambda row: float(row[rule.side]))
    return f"no trial has {rule.side} at least {rule.least:g}; the most is {most[rule.side]:.3f}, of {most['folder']}"


def _value(text: str) -> Any:
    """A setting as data, where its text is a number or such; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
