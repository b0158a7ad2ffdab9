"""Very many evaluations beside each other: what of each is kept in memory, and which of them a page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_unlearn.report.verdict import Results

MANY = 200
"""More runs than these do not all stand on one page."""
SHOWN = 60
"""So many of them do: the frontier, and the best."""
ROW = ("id", "prompt", "truth")


class Lean:
    """Evaluations without what only a page shows; what is the same in many of them is there once."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def __call__(self, results: Results) -> Results:
        """One evaluation: its numbers, models, curves and facts; of its answers, which rows were asked."""
        asked = {name: self._same([{key: row[key] for key in ROW} for row in rows]) for name, rows in results["answers"].items()}
        numbers = [{key: self._part(key, value) for key, value in number.items()} for number in results["numbers"]]
        kept = {key: value for key, value in results.items() if key not in ("attacks", "suite_settings")}
        return {**kept, "suite_settings": self._same(results.get("suite_settings")), "numbers": numbers, "answers": asked}

    def _part(self, key: str, value: Any) -> Any:
        if key != "values":
            return self._same(value)
        return {column: self._same(found) if column in ("before", "retrained") else found for column, found in value.items()}

    def _same(self, value: Any) -> Any:
        """An equal value that is there already; else this one."""
        return self._known.setdefault(json.dumps(value, sort_keys=True), value)


def shown(comparison: Mapping[str, Any]) -> list[str]:
    """The runs that stand on the page, in their order: all of them, or of very many the frontier and the best."""
    runs = comparison["runs"]
    if len(runs) <= MANY:
        return [str(run["name"]) for run in runs]
    first = [*(run for run in runs if run["frontier"]), *(run for run in runs if not run["frontier"])][:SHOWN]
    names = {str(run["name"]) for run in first}
    return [str(run["name"]) for run in runs if str(run["name"]) in names]


def narrowed(comparison: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A comparison with these of its runs only, and a note that says so."""
    every = {str(run["name"]) for run in comparison["runs"]}
    out = every - set(names)

    def kept(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in of.items() if name.partition(": ")[0] not in out and name not in out}

    runs = [run for run in comparison["runs"] if str(run["name"]) not in out]
    used = {run[column] for run in runs for column in ("before", "retrained")}
    baselines = {name: one for name, one in comparison["baselines"].items() if name in used}
    on = sum(bool(run["frontier"]) for run in runs)
    of = sum(bool(run["frontier"]) for run in comparison["runs"])
    front = f"all {on} of the frontier" if on == of else f"{on} of the {of} of the frontier"
    note = f"{len(runs)} of {len(every):,} runs are shown: {front}, and the best of the others. comparison.json has every run."
    return {
        **comparison,
        "notes": [note, *comparison["notes"]],
        "columns": [name for name in comparison["columns"] if name not in out and (name in every or name in baselines)],
        "baselines": baselines,
        "runs": runs,
        "all": len(every),
        "numbers": [one | {"values": kept(one["values"]), "judgements": kept(one["judgements"])} for one in comparison["numbers"]],
        "curves": {name: curve | {"lines": kept(curve["lines"])} for name, curve in comparison["curves"].items()},
    }
