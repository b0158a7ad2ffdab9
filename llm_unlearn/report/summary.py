"""What a reader sees first: a word for the whole, and the few numbers that say most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_unlearn.report.headline import has_collapsed, missed
from llm_unlearn.report.plots import MARKS
from llm_unlearn.report.verdict import (
    AS_RETRAINED,
    BAD,
    FORGOTTEN,
    LARGELY,
    OVER,
    Number,
    Results,
    band_of,
    current,
    interval_of,
    judge,
    reach_verdict,
    shown,
    value_of,
)

FIRST: dict[str, tuple[str, ...]] = {
    "as retrained": ("probability", "extraction_strength", "membership", "rouge", "truth_ratio", "perplexity"),
    "as before": ("multiple_choice", "rouge", "probability", "perplexity"),
    "": (),
}
"""Goal -> the measures that say most of it, first; the others come in the order of the suite."""

MOST = 3
"""Numbers of each goal."""


def standing(results: Results) -> dict[str, str]:
    """How the model stands, in a word or two, and whether that is good, bad or mixed."""
    if has_collapsed(results):
        return {"word": "Collapsed", "kind": "bad"}
    if missed(results):
        return {"word": "Thresholds not met", "kind": "bad"}
    verdict = reach_verdict(results["numbers"])
    word = verdict.word
    if not word:
        return {"word": "Not compared", "kind": "plain"}
    if verdict.names(OVER) or any(one["gap"]["leaks"] for one in results.get("attacks", ())):
        return {"word": f"{word}, and leaks" if word not in (FORGOTTEN, LARGELY) else f"{word}, but leaks", "kind": "bad"}
    return {"word": word, "kind": {FORGOTTEN: "good", LARGELY: "mixed"}.get(word, "bad")}


def kind_of(judgement: str) -> str:
    """Whether a judgement is good, bad, or only says how much."""
    return "good" if judgement == AS_RETRAINED else "bad" if judgement in BAD else ""


def key_numbers(results: Results, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The few numbers that say most: of what was to be forgotten, failed tests first; of what was to stay; and of aggregates."""
    found: list[Number] = []
    failed = [id(one) for one in reach_verdict(results["numbers"]).failed]
    for goal, wanted in FIRST.items():
        there = [one for one in results["numbers"] if one["goal"] == goal and value_of(one, current(one)) is not None]
        order = {measure: place for place, measure in enumerate(wanted)}
        there.sort(key=lambda one: (id(one) not in failed, order.get(one["measure"], len(wanted))))
        first: dict[tuple[str, str], Number] = {}
        for one in there:
            first.setdefault((str(one["measure"]), str(one["set"])), one)
        found += list(first.values())[:MOST]
    return [_card(one, columns) for one in found]


def _card(number: Number, columns: Sequence[str]) -> dict[str, Any]:
    """One number with the value of each model, and where on a line from 0 to 1 they lie."""
    judgement = judge(number)
    values = [_value(number, column) for column in columns if column in MARKS or value_of(number, column) is not None]
    places = [value["place"] for value in values if value["place"] is not None]
    return {
        "title": number["title"],
        "set": number["set"],
        "judgement": judgement,
        "kind": kind_of(judgement),
        "models": values,
        "track": bool(places) and all(0 <= place <= 100 for place in places) and number["measure"] != "perplexity",
    }


def _value(number: Number, column: str) -> dict[str, Any]:
    value, interval = value_of(number, column), interval_of(number, column)
    if value is None:
        return {"column": column, "text": "—", "exact": "", "now": False, "place": None}
    low, high = (min(1.0, max(0.0, end)) for end in interval or (value, value))
    return {
        "column": column,
        "text": shown(value),
        "exact": repr(value),
        "now": column == current(number),
        "place": round(100 * value, 2),
        "low": round(100 * low, 2),
        "width": round(100 * (high - low), 2),
    }


def resolution_of(results: Results) -> str:
    """Return which differences from the retrained model this evaluation is too small to see; "" where no test was made.

    The two-sample Kolmogorov–Smirnov test rejects at 5 % from a distance of 1.358 √(2/n) on, for n rows of each model.
    """
    found = []
    for number, _ in reach_verdict(results["numbers"]).judged:
        rows = number["values"][current(number)].get("n", 0)
        if number["measure"] == "forget_quality" and rows:
            found.append(f"{number['title']} sees distributions that lie {1.358 * (4 / rows) ** 0.5:.2f} or more apart")
    bands = [band for one in results["numbers"] if one["knowing"] == "moves" and judge(one) and (band := band_of(one))]
    if bands:
        found.append(f"membership sees AUCs that differ by more than about {max(high - low for low, high in bands) / 2:.2f}")
    return f"With these rows {' and '.join(found)}." if found else ""


def thresholds_of(results: Results) -> list[Mapping[str, Any]]:
    """What the recipe asked for and what came, as lines of a table."""
    return [
        {
            **{key: str(one[key]) for key in ("measure", "set", "asked")},
            **{key: "—" if (value := one.get(key)) is None else shown(float(value)) for key in ("value", "bound")},
            "holds": bool(one["holds"]),
            "why": str(one.get("why") or ""),
        }
        for one in results.get("thresholds") or ()
    ]
