"""From the numbers of many runs to an order: how well each forgot, how much it kept, and which of them nothing beats.

Pure functions on plain data. A run is compared with two models: on what it was to forget with the retrained one, on what it
was to keep with the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from llm_unlearn.report.headline import has_collapsed
from llm_unlearn.report.verdict import Number, Results, current, value_of

FLOOR = 0.8
"""A run that keeps less than this has collapsed for the ranking: what it forgot, it forgot with everything else."""
APART = 0.05
"""Before and retrained must differ by so much (perplexities: in nats), or the measure cannot tell forgetting from noise."""


def closeness(number: Number) -> float | None:
    """Where the model stands between the one before (0) and the retrained one (1): 1 − |after − retrained| / |before − retrained|.

    Too much forgetting is a distance like too little. Perplexities are compared by their logarithms, and no distance counts
    more than that of the model before. None where the measure does not say: it is not about forgetting, a p-value, a value is
    missing, or before and retrained are the same.
    """
    if number["goal"] != "as retrained" or number["measure"] == "forget_quality":
        return None
    before, retrained = value_of(number, "before"), value_of(number, "retrained")
    if before is None or retrained is None:
        return None
    if number["measure"] == "perplexity":
        before, retrained = math.log(before), math.log(retrained)
    if abs(before - retrained) < APART:
        return None
    now = _now(number)
    if now is None:
        return None
    if not math.isfinite(now):
        return 0.0
    if number["measure"] == "perplexity":
        now = math.log(now)
    return max(0.0, 1 - abs(now - retrained) / abs(before - retrained))


def kept_share(number: Number) -> float | None:
    """The share of a score (or, of a perplexity, the inverse factor) that is left of the one before, at most 1; None as above."""
    before = value_of(number, "before")
    now = _now(number)
    if number["goal"] != "as before" or not before or now is None:
        return None
    if number["knowing"] == "raises":
        return min(1.0, max(0.0, now / before)) if math.isfinite(now) else 0.0
    if number["knowing"] == "lowers":
        return min(1.0, before / now) if math.isfinite(now) and now > 0 else 0.0
    return None


def _now(number: Number) -> float | None:
    """The value of the model that is judged; NaN where it was measured and is not finite, None where it was not measured."""
    column = current(number)
    if column == "before":
        return None
    reason = str(number["values"].get(column, {}).get("missing", ""))
    return math.nan if reason.startswith("the value is") else value_of(number, column)


def harmonic(forgotten: float, kept: float) -> float:
    """High only where both are: 2fk / (f + k)."""
    return 2 * forgotten * kept / (forgotten + kept) if forgotten + kept else 0.0


def key_of(number: Number) -> str:
    """A number's name in a table of values."""
    return f"{number['set']} {number['title']}"


def values_of(results: Results, column: str) -> dict[str, float | None]:
    """Every number of one model, by name; of two with one name, the first."""
    return {key_of(number): value_of(number, column) for number in reversed(results["numbers"])}


def against(results: Results, common: Mapping[str, Mapping[str, float | None]]) -> Results:
    """A run's results with the values of others' models in the place of its own `before` and `retrained`.

    Args:
        common: column -> values by name.
    """
    numbers = [
        number | {"values": number["values"] | {column: {"value": values.get(key_of(number))} for column, values in common.items()}}
        for number in results["numbers"]
    ]
    return {**results, "numbers": numbers}


def scores_of(results: Results) -> dict[str, Any]:
    """One run: forgotten, kept, their harmonic mean, the p-value of forget quality, and whether it collapsed."""
    numbers: Sequence[Number] = results["numbers"]
    close = [value for number in numbers if (value := closeness(number)) is not None]
    shares = [value for number in numbers if (value := kept_share(number)) is not None]
    forgotten, kept = (fmean(close) if close else None), (fmean(shares) if shares else None)
    quality = next((value_of(number, current(number)) for number in numbers if number["measure"] == "forget_quality"), None)
    return {
        "forgotten": forgotten,
        "kept": kept,
        "score": None if forgotten is None or kept is None else harmonic(forgotten, kept),
        "forget_quality": quality,
        "collapsed": has_collapsed(results) or (kept is not None and kept < FLOOR),
    }


def estimate(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean over seeds, and half the width of the 95 % interval of Student's t; no width for one seed."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "half": None}
    if len(found) == 1:
        return {"mean": found[0], "half": None}
    from scipy.special import stdtrit  # t quantiles; scipy.stats takes a second to import

    return {"mean": fmean(found), "half": float(stdtrit(len(found) - 1, 0.975)) * stdev(found) / math.sqrt(len(found))}


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is there: for p-values and seconds, of which a mean says little."""
    found = [value for value in values if value is not None]
    return median(found) if found else None


def standing(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds.

    Args:
        runs: one per seed: what `scores_of` gives, or {"error": …} for a run that failed.

    Returns:
        The estimates, and the state: "failed" if any run failed, else "collapsed" if any collapsed, else "unscored" if the suite
        said nothing that counts, else "ranked".
    """
    done = [run for run in runs if "error" not in run]
    collapsed = sum(bool(run["collapsed"]) for run in done)
    failed = len(runs) - len(done)
    numbers = {key: estimate(run[key] for run in done) for key in ("forgotten", "kept", "score")}
    state = "failed" if failed else "collapsed" if collapsed else "unscored" if numbers["score"]["mean"] is None else "ranked"
    quality = middle(run["forget_quality"] for run in done)
    return {"state": state, "collapsed": collapsed, "failed": failed, **numbers, "forget_quality": quality}


STATES = ("ranked", "collapsed", "unscored", "failed")
"""In the order of the table: a model that collapsed never stands above one that did not."""


def ranked(methods: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Methods in order, each with its `rank` (None unless its state is "ranked") and whether it is on the `frontier`.

    Args:
        methods: what `standing` gives, each with a name.
    """

    def order(method: Mapping[str, Any]) -> tuple[int, float, str]:
        score = method["score"]["mean"]
        return STATES.index(method["state"]), math.inf if score is None else -score, str(method["name"])

    ordered = sorted(methods, key=order)
    compared = [method for method in ordered if method["state"] == "ranked"]
    best = frontier([(method["forgotten"]["mean"], method["kept"]["mean"]) for method in compared])
    places = {method["name"]: (rank, on) for rank, (method, on) in enumerate(zip(compared, best, strict=True), 1)}
    none = (None, False)
    return [
        {**method, "rank": places.get(method["name"], none)[0], "frontier": places.get(method["name"], none)[1]}
        for method in ordered
    ]


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: none is at least as high in both and higher in one."""
    top: dict[float, float] = {}  # x -> the highest y beside it
    for x, y in points:
        top[x] = max(y, top.get(x, y))
    best, on = -math.inf, dict[float, bool]()
    for x in sorted(top, reverse=True):
        on[x], best = top[x] > best, max(best, top[x])
    return [on[x] and y == top[x] for x, y in points]
