"""Judge the numbers of an evaluation, one by one and as a whole. Pure functions on plain data.

`reach_verdict` holds the rule, and its docstring is what readers of a report see of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_unlearn.outward import without_secrets

Number = Mapping[str, Any]
Results = Mapping[str, Any]

CLOSE = 0.2
"""A value within this share of the retrained model's counts as the same."""
PART_OF_THE_WAY = 0.25
"""But never one that is further from it than this part of the way back to the original model."""
SIGNIFICANT = 0.05
"""A test with a p-value below this tells the model from the retrained one."""
MOST = 2 / 3
"""From this share of the kinds of measures on, a model that fails no test is largely forgotten."""
TESTS = ("forget quality", "membership")
"""Kinds of measures that test whether the model can be told from one that never saw the rows."""

AS_RETRAINED, KNOWN, OVER, RECOGNISED, DIFFERS = (
    "as retrained",
    "still known",
    "over-forgotten",
    "recognised",
    "differs",
)
FORGOTTEN, LARGELY, OTHERWISE = "Forgotten", "Largely forgotten", "Not as retrained"
BAD = (KNOWN, RECOGNISED, OVER, DIFFERS)


@dataclass(frozen=True)
class Verdict:
    """Verdict on a model, with its reasons."""

    word: str
    """FORGOTTEN, LARGELY or OTHERWISE; "" where there is nothing to compare with."""
    judged: tuple[tuple[Number, str], ...]
    """Every number on a forget set that could be compared, with its judgement."""
    failed: tuple[Number, ...]
    """The tests that tell the model from the retrained one."""
    kinds: int
    """Kinds of measures, counted on each forget set."""
    as_retrained: int
    """Kinds whose measures are all as in the retrained model."""

    def names(self, judgement: str) -> list[str]:
        """Return the titles of the measures with this judgement."""
        return list(dict.fromkeys(str(number["title"]) for number, word in self.judged if word == judgement))


def reach_verdict(numbers: Iterable[Number]) -> Verdict:
    """Decide how far a model forgot, from its numbers on the forget sets.

    **Measures.** Each value is compared with the retrained model's. The band of values that count as the same is the 95 %
    bootstrap interval of the retrained model's value over rows, or 20 % of that value where this is wider, though never more
    than a quarter of the way back to the original model. Inside the band a measure is *as retrained*. Outside it is *still
    known* (of membership: *recognised*) on the side of more knowledge, and *over-forgotten* on the other side.

    **Tests lead.** Forget quality fails with p < 0.05; a membership attack fails when its AUC lies outside the band and
    further from ½ than the retrained model's; PrivLeak fails when its interval leaves out 0. A model that fails one test can
    be told from the retrained model. It is called neither forgotten nor largely forgotten.

    **Kinds.** Measures of one kind (likelihood, distribution, extraction, choice, text, membership, forget quality) count
    once, and the worst of them counts, because an attacker picks the measure. *Forgotten*: every kind is as retrained.
    *Largely forgotten*: at least two thirds of the kinds are, and no test fails. Otherwise: *Not as retrained*.

    **Over-forgetting is a leak.** Rows that are less likely or less extractable than for the retrained model, or that a
    membership attack finds with an AUC below the band, stand out, and point to what was removed.

    **One control.** The interval says how much a value depends on the rows, not how much it depends on the seed of
    retraining: another retrained model may lie outside the band. Differences inside the band are not resolved, and a test
    that passes proves nothing. Each test is made at 5 %, so that one of many may fail by chance.
    """
    judged = tuple((number, word) for number in numbers if number["goal"] == "as retrained" and (word := judge(number)))
    kinds: dict[tuple[str, str], bool] = {}
    for number, word in judged:
        key = str(number["set"]), measure_kind(number)
        kinds[key] = kinds.get(key, True) and word == AS_RETRAINED
    failed = tuple(number for number, word in judged if word != AS_RETRAINED and measure_kind(number) in TESTS)
    same = sum(kinds.values())
    if not kinds:
        word = ""
    elif same == len(kinds):
        word = FORGOTTEN
    else:
        word = LARGELY if not failed and same >= MOST * len(kinds) else OTHERWISE
    return Verdict(word, judged, failed, len(kinds), same)


def rule() -> list[tuple[str, str]]:
    """Return the rule of `reach_verdict` in words: (heading, text) of each paragraph."""
    found = []
    for paragraph in (inspect.getdoc(reach_verdict) or "").split("\n\n")[1:]:
        heading, _, text = " ".join(paragraph.split()).removeprefix("**").partition("**")
        found.append((heading, text.strip().replace("*", "")))
    return found


def measure_kind(number: Number) -> str:
    """Return what kind of evidence a number is; earlier versions wrote none, and there each measure is a kind of its own."""
    return str(number.get("kind") or number["measure"]).replace("_", " ")


def judge(number: Number) -> str:
    """How the model after (or the only model) stands on one number; "" where there is nothing to compare with."""
    now = value_of(number, current(number))
    if now is None:
        return ""
    if number["measure"] == "forget_quality":
        return AS_RETRAINED if now >= SIGNIFICANT else DIFFERS
    if number["measure"] == "privleak":  # in it the retrained model is 0
        low, high = interval_of(number, current(number)) or (now, now)
        return AS_RETRAINED if low <= 0 <= high else RECOGNISED if now < 0 else OVER
    if number["goal"] == "as retrained":
        return _against_retrained(number, now)
    if number["goal"] == "as before":
        return _against_before(number, now)
    return ""


def band_of(number: Number) -> tuple[float, float] | None:
    """Return the lowest and the highest value that count as the retrained model's, or None where it has no value.

    Everything that the rule knows of the control it reads here: a band of several retrained models takes its place here.
    """
    retrained, before = value_of(number, "retrained"), value_of(number, "before")
    if retrained is None:
        return None
    low, high = interval_of(number, "retrained") or (retrained, retrained)
    # 20 % of a value that is high after retraining too would let an untouched model pass
    slack = CLOSE * abs(retrained)
    slack = slack if before is None else min(slack, PART_OF_THE_WAY * abs(before - retrained))
    return min(low, retrained - slack), max(high, retrained + slack)


def _against_retrained(number: Number, now: float) -> str:
    band, retrained = band_of(number), value_of(number, "retrained")
    if band is None or retrained is None:
        return ""
    low, high = band
    if low <= now <= high:
        return AS_RETRAINED
    if number["knowing"] == "moves":  # ½ is an attacker who guesses; he wins on either side of it
        if abs(now - 0.5) <= abs(retrained - 0.5):
            return AS_RETRAINED
        return RECOGNISED if now > 0.5 else OVER
    knows_more = now > high if number["knowing"] == "raises" else now < low
    if measure_kind(number) == "membership":  # rates and secrecy have one side: to recognise fewer rows is no loss
        return RECOGNISED if knows_more else AS_RETRAINED
    return KNOWN if knows_more else OVER


def _against_before(number: Number, now: float) -> str:
    before = value_of(number, "before")
    if before is None or before == 0 or current(number) == "before":
        return ""
    if number["knowing"] == "raises":
        return f"{100 * now / before:.0f} % kept"
    change = round(100 * (now / before - 1))
    return f"{'−' if change < 0 else '+'}{abs(change):,} %"


def listed(names: Iterable[str], most: int = 4) -> str:
    """`a, b and c`; beyond `most`, how many more."""
    found = list(names)
    if len(found) > most:
        found = [*found[: most - 1], f"{len(found) - most + 1} more"]
    return " and ".join(part for part in (", ".join(found[:-1]), found[-1]) if part) if found else ""


def current(number: Number) -> str:
    """The column that is judged: the model after unlearning, or the only one."""
    return next((name for name in ("after", "model") if name in number["values"]), next(iter(number["values"]), ""))


def value_of(number: Number, column: str) -> float | None:
    """A model's value; None where it is missing."""
    value = number["values"].get(column, {}).get("value")
    return None if value is None else float(value)


def interval_of(number: Number, column: str) -> tuple[float, float] | None:
    """A model's bootstrap interval, where there is one."""
    found = number["values"].get(column, {})
    low, high = found.get("low"), found.get("high")
    return None if low is None or high is None else (float(low), float(high))


def columns_of(results: Results) -> list[str]:
    """The models in the order of the table; each number may lack some of them."""
    named = [*results["models"], *(column for number in results["numbers"] for column in number["values"])]
    return list(dict.fromkeys(named))


def gained(attack: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """What an attack gets from one model at its best: x, at, value, low, high; None where it could not be carried out."""
    found: Mapping[str, Any] | None = attack["gap"]["best"].get(column)
    return found


def by_set(results: Results) -> dict[str, list[Number]]:
    """The numbers grouped by set, what is to be forgotten first, the others in the order of the suite."""
    groups: dict[str, list[Number]] = {}
    for number in sorted(results["numbers"], key=lambda number: number["goal"] != "as retrained"):
        groups.setdefault(str(number["set"]), []).append(number)
    return groups


def shown(value: float) -> str:
    """A number as people read it: about three figures, and no long tails."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 5e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in words, those that are not set left out: `attack min_k (k 0.4), against holdout`."""
    return ", ".join(f"{key} {_setting(value)}" for key, value in settings.items() if value is not None)


def _setting(value: object) -> str:
    if not isinstance(value, Mapping) or "name" not in value:
        return str(value)
    more = settings_text({key: inner for key, inner in value.items() if key != "name"})
    return f"{value['name']} ({more})" if more else str(value["name"])


def printable(text: str, most: int | None = None) -> str:
    """Text on one line without secrets and control characters, cut to `most` characters: for plots and terminals."""
    line = "".join(letter if letter.isprintable() else " " for letter in without_secrets(text))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"
