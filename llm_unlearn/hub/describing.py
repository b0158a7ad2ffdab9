"""What a run says of itself where strangers read it: numbers without texts of rows, and where it falls short. On plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.report.headline import has_collapsed, headline
from llm_unlearn.withheld import described, is_local, local_name

OF_THE_RUN = (
    "recipe_hash", "seed", "status", "reason", "broken", "steps", "kept_step", "seconds", "trainable", "device", "processes",
    "precision", "versions", "privacy",
)  # fmt: skip
OF_RESULTS = (
    "format", "title", "suite", "suite_hash", "suite_settings", "run", "models", "numbers", "attacks", "robustness", "curves",
    "thresholds",
)  # fmt: skip
"""All that is told of an evaluation, so that what a later version adds is not told unasked."""


def told_of(
    results: Mapping[str, Any], title: str, places: Iterable[Path] = (), hub: Collection[str] | None = None
) -> dict[str, Any]:
    """An `evaluation.json` that can be shown to anybody: every number, no text, no value of a single row.

    Args:
        title: what stands in the place of the run folder's path.
        hub: the names that were ids of a hub where they were used.
    """
    kept: dict[str, Any] = {name: results[name] for name in OF_RESULTS if name in results}
    if kept.get("run"):
        kept["run"] = {name: kept["run"][name] for name in OF_THE_RUN if name in kept["run"]}
    found: dict[str, Any] = described(kept, list(places), hub=hub)
    for attack in found.get("attacks", ()):
        for curve in attack["curves"].values():
            curve.pop("rows", None)
    found["title"] = title
    for column, model in found["models"].items():
        name = str(results["models"][column]["name"])
        model["name"] = title if column in ("after", "model") else local_name(name) if is_local(name, hub) else name
    return found | {"answers": {}}


def texts_of(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Set -> the prompts and true answers that the evaluation kept of it."""
    return {
        str(name): [str(row[part]) for row in rows for part in ("prompt", "truth") if row.get(part)]
        for name, rows in results.get("answers", {}).items()
    }


def shortcomings(results: Mapping[str, Any] | None, recipe_hash: str) -> list[str]:
    """Why a run should not be published as it is, each in a sentence."""
    if results is None:
        return ["It was not evaluated: nobody knows what it forgot, or what that cost."]
    run, found = results.get("run"), []
    if not run or run.get("recipe_hash") != recipe_hash:
        found.append("The evaluation is not of this run: the hash of its recipe is another.")
    if run and run.get("broken"):
        found.append("The run broke: a loss was not finite.")
    if has_collapsed(results):
        found.append(headline(results).split(". ")[0].rstrip(".") + ".")
    for one in results.get("thresholds", ()):
        if not one["holds"]:
            why = one.get("why") or f"{one['measure']} on {one['set']}, {one['asked']}"
            found.append(f"A threshold does not hold: {why}.")
    return found
