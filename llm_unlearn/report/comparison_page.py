"""A comparison as one HTML page that needs nothing but itself: runs, plots, numbers, answers side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn import folder
from llm_unlearn.report.comparison_plots import DASHES, comparison_plots
from llm_unlearn.report.comparison_terminal import chosen
from llm_unlearn.report.likeness import Run
from llm_unlearn.report.plots import MARKS, RUNS
from llm_unlearn.report.templates import template
from llm_unlearn.report.texts import readable
from llm_unlearn.report.verdict import BAD, by_set, settings_text, shown, value_of

TEMPLATE, SCRIPT = "comparison.html.jinja", "comparison.js"
FIRST = 6
"""So many runs, the best, are shown side by side when the page opens; a click shows the others."""
PLAIN = 25
"""So many examples of each set stand in the page for those who read it without scripts."""


def write_comparison(comparison: Mapping[str, Any], runs: Sequence[Run], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        comparison: what `comparison.json` holds.
        runs: the evaluations that it was made from: their answers and logs stand in the page, and not in the JSON file.
    """
    folder.write(path, comparison_page(comparison, runs).encode("utf-8", "replace").decode())


def comparison_page(comparison: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The page as text. All that comes from data or models is escaped, and the answers are data that no browser runs."""
    from markupsafe import Markup

    script = (Path(__file__).parent / SCRIPT).read_text(encoding="utf-8")
    columns = [_column(name, comparison) for name in comparison["columns"]]
    in_order = [_column(str(run["name"]), comparison) | {"run": run} for run in comparison["runs"]]
    answers = answers_of(comparison, runs)
    return template(TEMPLATE).render(
        title=f"{comparison.get('all', len(runs)):,} run{'' if len(runs) == 1 else 's'} on {comparison['suite']}",
        comparison=comparison,
        columns=columns,
        first=FIRST,
        hidden=list(range(FIRST, len(runs))),
        runs=in_order,
        plots=[(plot, Markup(plot.svg)) for plot in comparison_plots(comparison, runs)],
        table=_table(comparison, in_order),
        sections={
            name: [_row(number, columns) for number in numbers]
            for name, numbers in by_set({"numbers": comparison["numbers"]}).items()
        },
        bad=BAD,
        data=Markup(as_data(answers)) if answers["sets"] else None,
        plain=[_plain_answers(one, answers) for one in answers["sets"]],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _column(name: str, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is shown: its mark and colour; a run also by its place, under which it can be hidden."""
    place = next((i for i, run in enumerate(comparison["runs"]) if run["name"] == name), None)
    if place is None:
        kind = name.split(" ")[0]
        return {"name": name, "place": None, "class": kind, "mark": MARKS[kind], "title": comparison["baselines"][name]["name"]}
    run = comparison["runs"][place]
    dash = DASHES[place // len(RUNS) % len(DASHES)]
    look = {"colour": f"run-{place % len(RUNS)}", "dash": dash, "collapsed": run["state"] == "collapsed"}
    return {"name": name, "place": place, "class": f"r{place}", "title": run["folder"], **look}


def _table(comparison: Mapping[str, Any], in_order: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row per run, best first, between the model before and the retrained one; scores and chosen measures."""
    measures = chosen(comparison)
    heads = ["forgotten", "kept", "score", *(f"{number['set']} {number['title']}" for number in measures)]
    rows = []
    for column in in_order:
        run = column["run"]
        values = [run[key] for key in ("forgotten", "kept", "score")]
        rows.append({"column": column, "run": run, "values": values + [value_of(number, column["name"]) for number in measures]})
    ends = {
        name: [None, None, None, *(value_of(number, name) for number in measures)] for name in comparison["baselines"]
    }  # fmt: skip
    return {
        "heads": heads,
        "rows": [{**row, "cells": [_plain(value) for value in row["values"]]} for row in rows],
        "ends": {name: [_plain(value) for value in values] for name, values in ends.items()},
    }


def _plain(value: float | None) -> dict[str, str]:
    return {"text": "—" if value is None else shown(value), "exact": "" if value is None else repr(value)}


def _row(number: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One measure with the cells of all columns."""
    cells = []
    for column in columns:
        found = number["values"].get(column["name"], {})
        low, high = found.get("low"), found.get("high")
        cells.append(
            {
                "column": column,
                "missing": "" if found.get("value") is not None else str(found.get("missing", "was not measured")),
                **_plain(found.get("value")),
                "interval": "" if low is None or high is None else f"{shown(float(low))}–{shown(float(high))}",
                "word": number["judgements"].get(column["name"], ""),
            }
        )
    facts = {key: number[key] for key in ("title", "definition", "goal")}
    return facts | {"settings": settings_text(number["settings"]), "cells": cells}


# -------------------------------------------------------------------------------------------------------------- answers


def answers_of(comparison: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Every example with what every column says, each text once: `said` are places in `texts`, −1 where nothing was written.

    Rows are those of any run, in the order of the first that has them.
    """
    owner = _owners(comparison, runs)
    names = list(comparison["columns"])
    texts: dict[str, int] = {}
    sets = []
    for name in dict.fromkeys(name for run in runs for name in run.results["answers"]):
        by_column = {column: {str(row["id"]): row for row in owner[column][0].results["answers"].get(name, ())} for column in names}
        first: dict[str, Mapping[str, Any]] = {}
        for run in runs:
            for row in run.results["answers"].get(name, ()):
                first.setdefault(str(row["id"]), row)
        rows = []
        for key, row in first.items():
            said, p = [], []
            for column in names:
                own, found = owner[column][1], by_column[column].get(key, {})
                text = found.get(own)
                said.append(-1 if text is None else texts.setdefault(readable(text), len(texts)))
                p.append(_probability(found.get("probability", {}).get(own)))
            rows.append({"id": readable(key), "q": readable(row["prompt"]), "t": readable(row["truth"]), "a": said, "p": p})
        if rows:
            sets.append({"name": readable(name), "rows": rows, "of": max(len(rows), _size(comparison, name))})
    columns = [_column(name, comparison) for name in names]
    columns = [column | {key: readable(column[key]) for key in ("name", "title")} for column in columns]
    return {"columns": columns, "sets": sets, "texts": list(texts)}


def _plain_answers(one: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
    """The first examples of a set, with what the columns say that are shown at first."""
    chosen = [i for i, column in enumerate(answers["columns"]) if column["place"] is None or column["place"] < FIRST]
    rows = [
        row | {"said": [(answers["texts"][row["a"][i]] if row["a"][i] >= 0 else "", row["p"][i]) for i in chosen]}
        for row in one["rows"][:PLAIN]
    ]
    return {"name": one["name"], "of": one["of"], "columns": [answers["columns"][i] for i in chosen], "rows": rows}


def _owners(comparison: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, tuple[Run, str]]:
    """Column of the comparison -> the evaluation that has it, and its name there."""
    by_name = {run.name: run for run in runs}
    found: dict[str, tuple[Run, str]] = {}
    for row in comparison["runs"]:
        run = by_name[str(row["name"])]
        models = run.results["models"]
        own = next((column for column in ("after", "model") if column in models), next(iter(models), ""))
        found[run.name] = (run, own)
        for column in ("before", "retrained"):
            if row[column]:
                found.setdefault(str(row[column]), (run, column))
    return found


def _size(comparison: Mapping[str, Any], name: str) -> int:
    """How many rows a set has, of which the answers may be the first only."""
    sizes = [
        int(found.get("n", 0))
        for number in comparison["numbers"]
        if number["set"] == name and number["measure"] != "forget_quality" and not number["settings"].get("against")
        for found in number["values"].values()
    ]
    return max(sizes, default=0)


def _probability(value: object) -> float | None:
    """Three figures are enough to read and to sort by; what is not finite is nothing."""
    try:
        found = float(str(value))
    except ValueError:
        return None
    return float(f"{found:.3g}") if math.isfinite(found) else None


def as_data(answers: Mapping[str, Any]) -> str:
    """JSON that may stand inside a page: no letter of it can end the element it stands in."""
    text = json.dumps(answers, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
