"""An evaluation as one HTML page that needs nothing but itself: verdict, plots, numbers, and answers to read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn import folder
from llm_unlearn.report.headline import sentences
from llm_unlearn.report.plots import MARKS, plots_of
from llm_unlearn.report.summary import key_numbers, kind_of, resolution_of, standing, thresholds_of
from llm_unlearn.report.templates import template
from llm_unlearn.report.texts import readable
from llm_unlearn.report.verdict import Number, by_set, columns_of, gained, judge, reach_verdict, rule, settings_text, shown

TEMPLATE = "page.html.jinja"
MOST_ROWS = 500
"""So many examples of each set can be read in the page."""

SCRIPT = """
const box = document.querySelector("#search"), sets = [...document.querySelectorAll("details.answers")];
if (box) box.addEventListener("input", () => {
  const wanted = box.value.trim().toLowerCase();
  let all = 0;
  for (const set of sets) {
    let found = 0;
    for (const row of set.querySelectorAll("tbody tr")) {
      row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
      found += !row.hidden;
    }
    set.querySelector(".found").textContent = wanted ? `${found} found` : "";
    if (wanted && found) set.open = true;
    all += found;
  }
  document.querySelector("#said").textContent = wanted ? `${all} examples found` : "";
});
addEventListener("beforeprint", () => document.querySelectorAll("details.why, details.more").forEach(one => one.open = true));
"""
"""Searching the examples. The page's policy allows this script by its fingerprint, and no other."""


def write_page(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        results: what `evaluation.json` holds.
        log: the rows of `log.jsonl`; empty for a stand-alone evaluation.
        path: where the page goes.
    """
    folder.write(path, page(results, log).encode("utf-8", "replace").decode())  # halves of a pair cannot be written


def page(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. All that comes from data or models is escaped."""
    from markupsafe import Markup

    columns = columns_of(results)
    return template(TEMPLATE).render(
        title=str(results["title"]),
        suite=str(results["suite"]),
        sentences=sentences(results),
        standing=standing(results),
        key_numbers=key_numbers(results, columns),
        thresholds=thresholds_of(results),
        columns=columns,
        models=results["models"],
        sections={name: [_row(number, columns) for number in found] for name, found in by_set(results).items()},
        rule=rule() if reach_verdict(results["numbers"]).word else [],
        resolution=resolution_of(results),
        attacks=[_attack(attack, columns) for attack in results.get("attacks", ())],
        robustness=_robustness(results.get("robustness")),
        plots=[(plot, Markup(plot.svg)) for plot in plots_of(results, log)],
        marks=MARKS,
        answers=[_answers(name, rows, results) for name, rows in results["answers"].items() if rows],
        facts=_facts(results),
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _row(number: Number, columns: Sequence[str]) -> dict[str, Any]:
    """One line of the table of numbers."""
    return {
        "title": number["title"],
        "definition": number["definition"],
        "settings": settings_text(number["settings"]),
        "goal": number["goal"],
        "judgement": judge(number),
        "kind": kind_of(judge(number)),
        "n": " / ".join(dict.fromkeys(str(found["n"]) for found in number["values"].values() if "n" in found)),
        "cells": [_cell(number["values"].get(column)) for column in columns],
    }


def _attack(attack: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """One line of the table of attacks."""
    gap, share = attack["gap"]["gap"], attack["gap"]["came_back"]
    return {
        "title": attack["title"],
        "gain": attack["y"]["name"].replace("_", " "),
        "set": attack["set"],
        "definition": attack["definition"],
        "settings": settings_text(attack["settings"]),
        "finding": attack["finding"],
        "cells": [_cell(gained(attack, column) or attack["curves"].get(column)) for column in columns],
        "gap": "" if gap is None else f"{gap:+.3f}".replace("-", "−"),
        "share": "" if share is None else f"{100 * share:.0f} %",
        "leaks": attack["gap"]["leaks"],
    }


def _robustness(found: Mapping[str, Any] | None) -> str:
    """Robustness as a sentence; "" where it was not measured."""
    if not found:
        return ""
    parts = [f"{name} {shown(float(found[key]))}" for key, name in ROBUSTNESS.items() if found[key] is not None]
    value = found["value"]
    if value is None:
        return f"{'; '.join(parts)}."
    broken = f": below {found['floor']:g} of what was to stay, nothing counts" if value != found["harmonic_mean"] else ""
    return f"Robustness {shown(float(value))}{broken} ({'; '.join(parts)})."


ROBUSTNESS = {"relearning": "R under relearning", "quantization": "Q under quantization", "utility": "utility kept"}


def _cell(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None or found.get("value") is None:
        return {"missing": (found or {}).get("missing", "was not measured")}
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None or high is None else f"{shown(float(low))}–{shown(float(high))}"
    return {"value": shown(float(found["value"])), "exact": repr(found["value"]), "interval": interval}


def _answers(name: str, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """The examples of one set: what was asked, what is true, and what each model says."""
    sizes = [
        found.get("n", 0) for number in results["numbers"] if _one_per_row(number, name) for found in number["values"].values()
    ]
    columns = [column for column in results["models"] if any(column in row or column in row["probability"] for row in rows)]
    total = max([len(rows), *sizes])
    return {
        "set": name,
        "columns": columns,
        "total": total,
        "left_out": total - min(len(rows), MOST_ROWS),
        "rows": [_example(row, columns) for row in rows[:MOST_ROWS]],
    }


def _one_per_row(number: Number, name: str) -> bool:
    """Whether a measure's n counts the rows of this set, and not those of a second set or model too."""
    several = number["measure"] in ("forget_quality", "model_utility") or "against" in number["settings"]
    return number["set"] == name and not several


def _example(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    truth = " ".join(str(row["truth"]).split())
    said = []
    for column in columns:
        text, p = row.get(column), row["probability"].get(column)
        same = text is not None and " ".join(str(text).split()) == truth
        said.append({"text": None if text is None else readable(text), "same": same, "p": None if p is None else shown(float(p))})
    return {key: readable(row[key]) for key in ("id", "prompt", "truth")} | {"said": said}


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """How the run went and what it ran on, as lines to read."""
    facts = {"suite": f"{results['suite']} ({results['suite_hash']})"}
    run = results.get("run")
    if not run:
        return facts
    ended = f"{run['status']} after {run['steps']} steps" + (f": {run['reason']}" if run.get("reason") else "")
    processes = f"{run['processes']} process{'' if run['processes'] == 1 else 'es'}"
    kept = "" if run["kept_step"] == run["steps"] else f"; the weights of step {run['kept_step']} were kept"
    return {
        "run": ended + kept,
        "time": f"{run['seconds']:,.0f} s",
        **({"base": f"{base['file']}, quantized to {base['precision']}"} if (base := run.get("base")) else {}),
        "trained": f"{run['trainable']:,} weights",
        "seed": str(run["seed"]),
        "machine": f"{run['device']}, {processes}, {run['precision']}",
        "recipe": str(run["recipe_hash"]),
        **facts,
        "versions": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
    }
