"""What a run says of itself where strangers read it: settings and numbers without texts of rows, values of filters, and paths of
this machine. Pure functions on plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from llm_unlearn.report.verdict import has_collapsed, headline
from llm_unlearn.source import missing

FILTERS = ("where", "without", "like")
WITHHELD = "withheld"
NAMES = ("source", "base", "start", "adapters", "output", "suite", "retrained", "include", "recipe")
"""Keys under which a file or folder may stand."""
OF_THE_RUN = (
    "recipe_hash", "seed", "status", "reason", "broken", "steps", "kept_step", "seconds", "trainable", "device", "processes",
    "precision", "versions", "privacy",
)  # fmt: skip
OF_RESULTS = (
    "format", "title", "suite", "suite_hash", "suite_settings", "run", "models", "numbers", "attacks", "robustness", "curves",
    "thresholds",
)  # fmt: skip
"""All that is told of an evaluation, so that what a later version adds is not told unasked."""
PATH = re.compile(r"(?<![\w:/.<>)\]])~?/(?:[^\s'\"`,;:()<>|/]+/)+[^\s'\"`,;:()<>|/]*")


def described(value: Any, places: Iterable[Path] = (), key: str = "") -> Any:
    """Plain data with local paths reduced to their last part, and with no value that a filter or a prompt gives.

    Args:
        places: folders of this machine that are taken out of sentences, too.
        key: under which it stands.
    """
    if isinstance(value, Mapping):
        if key in FILTERS:
            return dict.fromkeys(map(str, value), WITHHELD)
        if key == "contrast" and "expert" in value:  # prompts that say what is to be forgotten
            return {name: WITHHELD for name in value}
        return {name: described(one, places, str(name)) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(one, places, key) for one in value]
    if not isinstance(value, str):
        return value
    if key == "chat_template":
        return WITHHELD
    return local_name(value) if key in NAMES and is_local(value) else without_paths(value, places)


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder, here or on the machine of the run."""
    if name.startswith("embedded:"):
        return False
    try:
        return missing(name) or PurePath(name).is_absolute() or Path(os.path.expanduser(name)).exists()
    except (OSError, ValueError):  # too long, or no name at all
        return False


def local_name(name: str) -> str:
    """The last part of a path."""
    return PurePath(name).name or WITHHELD


def without_paths(text: str, places: Iterable[Path] = ()) -> str:
    """A sentence in which every absolute path is its last part only."""
    for place in sorted(map(str, places), key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(f"{place}/", "")
    return PATH.sub(lambda found: local_name(found.group()), text)


def told_of(results: Mapping[str, Any], title: str, places: Iterable[Path] = ()) -> dict[str, Any]:
    """An `evaluation.json` that can be shown to anybody: every number, no text, no value of a single row.

    Args:
        title: what stands in the place of the run folder's path.
    """
    kept: dict[str, Any] = {name: results[name] for name in OF_RESULTS if name in results}
    if kept.get("run"):
        kept["run"] = {name: kept["run"][name] for name in OF_THE_RUN if name in kept["run"]}
    found: dict[str, Any] = described(kept, list(places))
    for attack in found.get("attacks", ()):
        for curve in attack["curves"].values():
            curve.pop("rows", None)
    found["title"] = title
    for column, model in found["models"].items():
        name = str(results["models"][column]["name"])
        model["name"] = title if column in ("after", "model") else local_name(name) if is_local(name) else name
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
