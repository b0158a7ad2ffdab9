"""Many evaluations as one comparison: models side by side, their order, one sentence for all. Pure functions on plain data."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_unlearn.report.headline import headline
from llm_unlearn.report.likeness import Run, key_of
from llm_unlearn.report.ranking import FLOOR, ranked, scores_of, standing
from llm_unlearn.report.verdict import Results, judge, listed

FACTS = ("recipe_hash", "seed", "status", "reason", "steps", "kept_step", "seconds")
ALIKE = 5e-4
"""Scores that are less than this apart are the same in a table of three figures, and share a place in the sentence."""
JUDGED = ("after", "model")
"""The column of an `evaluation.json` that is the run's own."""


def comparison_of(runs: Sequence[Run], notes: Sequence[str] = (), left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that `comparison.json` says.

    Args:
        runs: evaluations that `likeness.comparable` let through, each with a name of its own.
        notes: what a reader must be told of them.
        left_out: folders that have no evaluation, each with the reason.
    """
    baselines, of_run = _baselines(runs)
    ordered = _ordered(runs, of_run)
    columns = [*(name for name in baselines if name.startswith("before")), *(str(run["name"]) for run in ordered)]
    columns += [name for name in baselines if name.startswith("retrained")]
    results = runs[0].results
    return {
        "format": 1,
        "suite": results["suite"],
        "suite_hash": " / ".join(dict.fromkeys(str(run.results["suite_hash"]) for run in runs)),
        "floor": FLOOR,
        "overall": overall(ordered),
        "notes": [*notes, *_notes(baselines)],
        "left_out": list(left_out),
        "columns": columns,
        "baselines": baselines,
        "runs": ordered,
        "numbers": _numbers(runs, of_run),
        "curves": _curves(runs, of_run),
        "attacks": _attacks(runs, of_run),
        "roc": roc_of(runs, of_run),
    }


def answered(runs: Sequence[Run], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """`attacks` and `roc` of some runs of a comparison, which are read off answers that not all of them have in memory."""
    every = {str(run["name"]): run for run in comparison["runs"]}
    of_run: dict[str, dict[str, str]] = {}
    for run in runs:
        columns = run.results["models"]
        own = {column: run.name for column in columns if column in JUDGED} or {column: run.name for column in list(columns)[:1]}
        of_run[run.name] = own | {column: name for column in ("before", "retrained") if (name := every[run.name][column])}
    return {"attacks": _attacks(runs, of_run), "roc": roc_of(runs, of_run)}


def _baselines(runs: Sequence[Run]) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """The models that runs are compared with, each once; and run -> its own columns' names -> those of the comparison.

    The same model before counts twice where it stands beside two retrained models, as some of its numbers depend on them.
    """
    found: dict[tuple[str, ...], str] = {}
    baselines: dict[str, dict[str, str]] = {}
    of_run: dict[str, dict[str, str]] = {}
    for run in runs:
        models = run.results["models"]
        of_run[run.name] = {column: run.name for column in models if column in JUDGED}
        for column in ("before", "retrained"):
            if column not in models:
                continue
            model = models[column]
            key = (column, str(model["identity"])) + (
                (str(models.get("retrained", {}).get("identity", "")),) if column == "before" else ()
            )
            if key not in found:
                place = sum(name.startswith(column) for name in baselines) + 1
                found[key] = column if place == 1 else f"{column} {place}"
                baselines[found[key]] = {"name": str(model["name"]), "identity": str(model["identity"])}
            of_run[run.name][column] = found[key]
        if not any(column in models for column in JUDGED):  # an evaluation of a base model alone
            of_run[run.name] = {column: run.name for column in list(models)[:1]} | of_run[run.name]
    return baselines, of_run


def _notes(baselines: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    for column, words in (("before", "models before"), ("retrained", "retrained models")):
        names = [f"{name}: {one['name']}" for name, one in baselines.items() if name.startswith(column)]
        if len(names) > 1:
            yield f"The runs have {len(names)} {words}, and each is scored by its own ({'; '.join(names)})."


def _ordered(runs: Sequence[Run], of_run: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """The runs, best first, by the leaderboard's rule: each is a method with one seed."""
    rows = []
    for run in runs:
        results, scores = run.results, scores_of(run.results)
        facts = {key: value for key, value in (results.get("run") or {}).items() if key in FACTS}
        rows.append(
            {
                "name": run.name,
                "folder": run.folder,
                "title": str(results["title"]),
                "identity": str(next((results["models"][one]["identity"] for one in JUDGED if one in results["models"]), "")),
                "headline": headline(results),
                "before": of_run[run.name].get("before"),
                "retrained": of_run[run.name].get("retrained"),
                "run": facts,
                "judgements": _judgements(results),
                **{key: scores[key] for key in ("forgotten", "kept", "score", "forget_quality")},
                "standing": standing([scores]),
            }
        )
    places = ranked({**row["standing"], "name": row["name"]} for row in rows)
    by_name = {row["name"]: row for row in rows}
    result = []
    for place in places:
        row = {key: value for key, value in by_name[place["name"]].items() if key != "standing"}
        result.append(row | {key: place[key] for key in ("rank", "state", "frontier")})
    return result


def _judgements(results: Results) -> dict[str, int]:
    """How many measures got each word: `as retrained` 5, `still known` 2."""
    words = [word for number in results["numbers"] if number["goal"] == "as retrained" and (word := judge(number))]
    return {word: words.count(word) for word in dict.fromkeys(words)}


def overall(ordered: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for all runs: who is closest to the retrained model, who keeps most, who does best in both, who collapsed."""
    standing_ = [run for run in ordered if run["state"] == "ranked"]
    parts = []
    for key, words in (("forgotten", "closest to retrained"), ("kept", "keeps most"), ("score", "best in both")):
        best = max((float(run[key]) for run in standing_), default=None)
        if best is not None and len(ordered) > 1 and (len(standing_) > 1 or key != "score"):
            names = [str(run["name"]) for run in standing_ if run[key] >= best - ALIKE]
            parts.append(f"{words}: {listed(names)} ({key} {best:.3f})")
    collapsed = [str(run["name"]) for run in ordered if run["state"] == "collapsed"]
    if collapsed:
        parts.append(f"collapsed: {listed(collapsed, 8)}")
    unscored = [str(run["name"]) for run in ordered if run["state"] == "unscored"]
    if unscored:
        parts.append(f"without a score, as there is no model before or no retrained one: {listed(unscored)}")
    if len(ordered) == 1 and standing_:
        only = standing_[0]
        parts.append(f"{only['name']}: forgotten {only['forgotten']:.3f}, kept {only['kept']:.3f}, score {only['score']:.3f}")
        return f"{parts[0]}."  # a name keeps its letters
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "There is nothing to compare."


def _numbers(runs: Sequence[Run], of_run: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Every measure once, with the values of all columns, and the word that each run was given."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
        for number in run.results["numbers"]:
            facts = {key: number[key] for key in ("measure", "title", "set", "goal", "knowing", "definition", "settings")}
            row = found.setdefault(key_of(number), facts | {"values": {}, "judgements": {}})
            row["judgements"][run.name] = judge(number)
            for column, value in number["values"].items():
                if column in of_run[run.name]:
                    row["values"].setdefault(of_run[run.name][column], value)
    return sorted(found.values(), key=lambda row: row["set"] != "forget")


def _curves(runs: Sequence[Run], of_run: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The extraction curves of all columns, by name."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for name, curve in run.results["curves"].items():
            one = found.setdefault(name, {"set": curve["set"], "n": curve["n"], "lines": {}})
            if one["n"] == curve["n"] and one["set"] == curve["set"]:
                for column, line in curve.items():
                    if column in of_run[run.name]:
                        one["lines"].setdefault(of_run[run.name][column], line)
    return found


def _attacks(runs: Sequence[Run], of_run: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """The curves of every attack, by its name; a column that is no model of the run stands under `RUN: COLUMN`."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for attack in run.results.get("attacks") or ():
            one = found.setdefault(str(attack["name"]), {"name": attack["name"], "title": attack["title"], "lines": {}, "of": {}})
            for column, curve in (attack.get("curves") or {}).items():
                name = of_run[run.name].get(column, f"{run.name}: {column}")
                if curve.get("x") and len(curve["x"]) == len(curve.get("y", ())):
                    one["lines"].setdefault(name, {"x": list(curve["x"]), "y": list(curve["y"])})
                    one["of"].setdefault(name, run.name if name in (run.name, f"{run.name}: {column}") else None)
    return [one for one in found.values() if one["lines"]]


# ----------------------------------------------------------------------------------------------------------- membership


def roc_of(runs: Sequence[Run], of_run: Mapping[str, Mapping[str, str]]) -> dict[str, Any] | None:
    """The loss attack at every threshold, for every column; None where no run has both sets.

    The probability per token of a row is exp(−NLL/T), so the rows in the order of their probability are in the order of the
    loss attack (Yeom et al. 2018, 1709.01604): nothing but the answers that are kept in `evaluation.json` is needed.
    """
    pair = next(
        ((number["set"], number["settings"]["against"]) for run in runs for number in run.results["numbers"]
         if number["settings"].get("against")), ("forget", "holdout"),
    )  # fmt: skip
    lines: dict[str, Any] = {}
    for run in runs:
        for column, name in of_run[run.name].items():
            members, others = (_probabilities(run.results, of, column) for of in pair)
            if members and others and name not in lines:
                x, y = roc(members, others)
                lines[name] = {"x": x, "y": y, "auc": area(x, y), "members": len(members), "others": len(others)}
    if not lines:
        return None
    counts = [
        int(found["n"]) for run in runs for number in run.results["numbers"]
        if (number["set"], number["settings"].get("against")) == pair for found in number["values"].values() if "n" in found
    ]  # fmt: skip
    shown = max(line["members"] + line["others"] for line in lines.values())
    return {"set": pair[0], "against": pair[1], "rows": shown, "of": max([shown, *counts]), "lines": lines}


def _probabilities(results: Results, name: str, column: str) -> list[float]:
    found = (row.get("probability", {}).get(column) for row in results["answers"].get(name, ()))
    return [float(p) for p in found if p is not None and math.isfinite(float(p))]


def roc(members: Sequence[float], others: Sequence[float]) -> tuple[list[float], list[float]]:
    """False and true positive rates as the threshold falls: rows with at least so high a probability are called members.

    Returns:
        Shares of `others` (x) and of `members` (y), from (0, 0) to (1, 1); rows of the same probability enter together.
    """
    levels = sorted({*members, *others}, reverse=True)
    below_x, below_y = sorted(others), sorted(members)
    points = [(1 - bisect_left(below_x, level) / len(others), 1 - bisect_left(below_y, level) / len(members)) for level in levels]
    kept = [(0.0, 0.0)]
    for point, following in zip(points, [*points[1:], None], strict=True):
        straight = following is not None and (kept[-1][0] == point[0] == following[0] or kept[-1][1] == point[1] == following[1])
        if not straight:  # corners are enough to draw
            kept.append(point)
    return [one[0] for one in kept], [one[1] for one in kept]


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """The area under a curve of straight lines: the AUC, ties counting half."""
    return sum((x[i] - x[i - 1]) * (y[i] + y[i - 1]) / 2 for i in range(1, len(x)))
