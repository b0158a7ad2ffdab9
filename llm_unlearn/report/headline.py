"""Say what an evaluation found, in a few sentences. Pure functions on plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_unlearn.attacks.gap import LEAK
from llm_unlearn.report.verdict import (
    KNOWN,
    OVER,
    RECOGNISED,
    Number,
    Results,
    current,
    listed,
    reach_verdict,
    shown,
    value_of,
)

COLLAPSED = 0.5
"""A model that keeps less than this share of a score on what it was to keep is broken, whatever it forgot."""
RUINED = 10.0
"""Factor by which perplexity may grow before a set counts as lost."""
FEW = 0.05
"""A share that should be small (of broken answers) ruins nothing below this multiple."""
FEW_MISSES = 3
"""Number of failed thresholds that the headline names."""


def headline(results: Results) -> str:
    """The whole evaluation in plain words."""
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """The headline, sentence by sentence: what is broken first, then what was asked for and did not come, what was forgotten, what
    leaks, what was kept."""
    numbers: list[Number] = list(results["numbers"])
    broken = list(_broken(numbers))
    found = [f"The model collapsed: {listed(broken)}."] if broken else []
    found += _asked(results.get("thresholds") or ())
    found += _how_the_run_ended(results.get("run"))
    found += _forgotten(numbers, bool(broken))
    found += _leaks(results.get("attacks", ()))
    if not broken:
        found += _kept(numbers)
    return found or ["There is nothing to compare the model with."]


def has_collapsed(results: Results) -> bool:
    """Return whether the retain set is lost."""
    return any(_broken(results["numbers"]))


def _broken(numbers: Iterable[Number]) -> Iterable[str]:
    """Each number on which what was to be kept is lost, with both values."""
    for number in numbers:
        before = value_of(number, "before")
        if number["goal"] != "as before" or before is None or current(number) == "before":
            continue
        name, now = f"{number['title']} on {number['set']}", value_of(number, current(number))
        if now is None:
            reason = str(number["values"].get(current(number), {}).get("missing", ""))
            if reason.startswith("the value is"):
                yield f"{name} went from {shown(before)} to {reason.removeprefix('the value is').strip()}"
        elif (number["knowing"] == "raises" and now < COLLAPSED * before) or (
            number["knowing"] == "lowers" and now > RUINED * max(before, FEW if number.get("unit") == "share" else 0.0)
        ):
            yield f"{name} went from {shown(before)} to {shown(now)}"


def missed(results: Results) -> list[str]:
    """Every threshold that does not hold, in words."""
    return [_miss(one) for one in results.get("thresholds") or () if not one["holds"]]


def _miss(one: Mapping[str, Any]) -> str:
    if one.get("why"):
        return str(one["why"]).rstrip(".")
    value = one.get("value")
    came = "has no value" if value is None else f"is {shown(float(value))}"
    return f"{one['measure']} on {one['set']} {came}, asked: {one['asked']}"


def _asked(thresholds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the recipe's thresholds: those that failed, or that all hold."""
    if not thresholds:
        return []
    misses, count = missed({"thresholds": thresholds}), len(thresholds)
    if not misses:
        return ["The threshold holds." if count == 1 else f"All {count} thresholds hold."]
    more = [f"{len(misses) - FEW_MISSES} more"] if len(misses) > FEW_MISSES else []
    which = "The threshold does" if count == 1 else f"{len(misses)} of {count} thresholds {'does' if len(misses) == 1 else 'do'}"
    return [f"{which} not hold: {'; '.join([*misses[:FEW_MISSES], *more])}."]


def _how_the_run_ended(run: Mapping[str, Any] | None) -> list[str]:
    if not run or run["status"] == "finished":
        return []
    ended = "stopped by its guard" if run["status"] == "stopped" else str(run["status"])
    why = f": {str(run['reason']).rstrip('.')}" if run.get("reason") else f" at step {run['steps']}"
    kept = f"; the weights of step {run['kept_step']} were kept" if run["kept_step"] != run["steps"] else ""
    return [f"The run was {ended}{why}{kept}."]


def _forgotten(numbers: Iterable[Number], collapsed: bool) -> list[str]:
    """Return the verdict in a sentence: failed tests first, then how many kinds of measures are as retrained, then the others."""
    wanted = [number for number in numbers if number["goal"] == "as retrained"]
    verdict = reach_verdict(wanted)
    if not verdict.word:
        return ["Whether it forgot cannot be said without a retrained model (--retrained PATH)."] if wanted else []
    same, kinds = verdict.as_retrained, verdict.kinds
    where = listed(dict.fromkeys(str(number["set"]) for number, _ in verdict.judged))
    count = f"{f'all {same}' if same == kinds else f'{same} of {kinds}'} kinds of measures on {where} are"
    if kinds == 1:
        count = f"the only kind of measures on {where} that could be compared is{'' if same else ' not'}"
    parts = [f"{count} as in the retrained model"]
    if verdict.failed:
        parts.insert(0, f"told from the retrained model by {listed(map(_test, verdict.failed))}")
    for judgement, words in ((KNOWN, KNOWN), (RECOGNISED, RECOGNISED), (OVER, f"{OVER}, a leak too")):
        if names := verdict.names(judgement):
            parts.append(f"{words}: {listed(names)}")
    if collapsed:  # it forgot everything: no praise for that
        return [f"{parts[0][0].upper()}{'; '.join(parts)[1:]}."]
    return [f"{verdict.word}: {'; '.join(parts)}."]


def _test(number: Number) -> str:
    """Return a failed test with its value, and the retrained model's where it has one."""
    now, retrained = value_of(number, current(number)), value_of(number, "retrained")
    value = "" if now is None else shown(now)
    beside = "" if retrained is None else f" against {shown(retrained)}"
    return f"{number['title']} ({'p = ' if number['measure'] == 'forget_quality' else ''}{value}{beside})"


def _leaks(attacks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what attacks recover of the forget set, strongest first; if none recovers anything, how many were tried."""
    tried = [one for one in attacks if one.get("gap", {}).get("came_back") is not None]
    leaks = sorted((one for one in tried if one["gap"]["leaks"]), key=lambda one: -float(one["gap"]["came_back"]))
    if not leaks:
        return [_no_leak(tried)] if len(tried) > 1 else []
    found: list[str] = []
    for one in leaks:
        comes_back = "" if found else " comes back"
        at = one["gap"]["best"]["after"]["at"]
        found.append(f"{100 * one['gap']['came_back']:.0f} %{comes_back} under {one['title']} ({at})")
    only = " Only merged weights may be released, or none." if any(one["name"] == "adapter_removal" for one in leaks) else ""
    return [f"Leaks: of what was forgotten, {listed(found)}.{only}"]


def _no_leak(tried: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence for attacks of which none recovers more than its interval allows for."""
    recovered = [attack for attack in tried if attack["gap"].get("by_attack", True)]  # earlier results do not say
    most = max(recovered, key=lambda attack: float(attack["gap"]["came_back"]), default=None)
    if not most or most["gap"]["came_back"] < LEAK:
        return f"No leak under the {len(tried)} attacks that were tried."
    share, best = 100 * float(most["gap"]["came_back"]), most["gap"]["best"]["after"]["at"]
    most_recovered = f"{most['title']} ({best}) recovers the most, {share:.0f} %"
    return f"No certain leak under the {len(tried)} attacks that were tried: {most_recovered}."


def _kept(numbers: Iterable[Number]) -> list[str]:
    """The range of what is left of the scores that were to stay."""
    shares: dict[str, list[float]] = {}
    for number in numbers:
        before, now = value_of(number, "before"), value_of(number, current(number))
        if number["goal"] == "as before" and number["knowing"] == "raises" and before and now is not None:
            shares.setdefault(str(number["set"]), []).append(100 * now / before)
    if not shares:
        return []
    every = [share for of_set in shares.values() for share in of_set]
    low, high = f"{min(every):.0f}", f"{max(every):.0f}"
    return [f"Kept: {low if low == high else f'{low}–{high}'} % of the scores on {listed(shares)}."]
