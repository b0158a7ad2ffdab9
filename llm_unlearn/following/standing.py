"""What a folder is and where it stands, read off its files while another process may be writing them; nothing heavy, no lock."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llm_unlearn import at_work
from llm_unlearn.folder import ADAPTER, FIRST, LOG, RECIPE, REPORT, RESULTS, steps_in
from llm_unlearn.following.series import BOARD, bench, is_sweep, runs_in, sweep
from llm_unlearn.following.state import MANIFEST, PIECES, UNDER_WAY, WORK, held, state_of
from llm_unlearn.spec import Refused
from llm_unlearn.tree import read_tree

RECENT = 20
"""The pace is that of so many last steps."""
POINTS = 40
"""A curve has at most so many values: means of as many parts of the run."""
NO_TERM = ("step", "lr", "tokens", "seconds")
"""Columns of the log that are no curve."""
AUDIT, COMPARISON = "privacy_audit.json", "comparison.json"


def standing(folder: Path) -> dict[str, Any]:
    """What a folder is (`kind`), how it stands (`state`), and what can be done next.

    Raises:
        Refused: nothing of this project can be seen in it.
    """
    if not folder.is_dir():
        raise Refused(f"{folder}: no such folder (looked from {Path.cwd()}); expected a run folder, such as runs/forget_lora.")
    there = (folder / RECIPE).is_file() and _hash(folder / RECIPE) is not None
    for found, kind in (
        ((folder / AUDIT).is_file(), _audit), ((folder / BOARD).is_file(), bench), (is_sweep(folder), sweep), (there, _run),
        ((folder / COMPARISON).is_file(), _comparison), ((folder / RESULTS).is_file(), _evaluation),
        (bool(runs_in(folder)), bench),
    ):  # fmt: skip
        if found:
            return {"folder": str(folder), **kind(folder), "files": _files(folder)}
    recipe = f"no {RECIPE},"
    if (folder / RECIPE).is_file():
        recipe = f"a {RECIPE} that no run wrote (theirs begin with `{FIRST}…`), and no"
    raise Refused(
        f"{folder}: found {recipe} {AUDIT}, {BOARD}, {COMPARISON} or {RESULTS}; expected the folder of a run, a store, an audit, "
        "a bench, a sweep, a comparison or an evaluation."
    )


# -------------------------------------------------------------------------------------------------------------- a run


def _run(folder: Path) -> dict[str, Any]:
    recipe, rows, work = read_tree(folder / RECIPE).data, steps_in(folder / LOG), at_work.read(folder)
    results = held(folder / RESULTS)
    method = recipe.get("method") or {}
    facts: dict[str, Any] = {
        "kind": "store" if (folder / MANIFEST).is_file() else "run",
        "state": state_of(folder, recipe, work),
        "reason": work.reason if work else "",
        "hash": _hash(folder / RECIPE),
        "base": recipe["model"]["base"],
        "method": method.get("name"),
        "objective": {name: term["loss"]["name"] for name, term in (recipe.get("objective") or {}).items() if term},
        "run": results.get("run"),
    }
    if facts["kind"] == "store":
        facts |= _pieces(folder, method)
    if facts["state"] in UNDER_WAY and work and not work.here:
        facts["host"] = work.host
    facts |= _course(rows, _steps(recipe, work, results), facts["state"])
    return facts | {"headline": _headline(results), "next": _next(folder, facts, recipe, bool(results))}


def _steps(recipe: Mapping[str, Any], work: at_work.AtWork | None, results: Mapping[str, Any]) -> int | None:
    """Steps that the run has in all, where that is known; of a finished one, those that it took."""
    known = (work.steps if work else 0) or (results.get("run") or {}).get("steps") or recipe.get("train", {}).get("steps")
    return int(known) if known else None


def _course(rows: Sequence[Mapping[str, Any]], steps: int | None, state: str) -> dict[str, Any]:
    """How far it has come, how fast, and the curve of every column."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NO_TERM]
    columns = {name: [value for row in rows if (value := _number(row.get(name))) is not None] for name in names}
    step = int(rows[-1]["step"]) if rows else 0
    pace = [row for row in rows[-RECENT:] if "seconds" in row]
    seconds = sum(row["seconds"] for row in pace) / len(pace) if pace else None
    tokens = sum(row.get("tokens", 0) for row in pace) / (seconds * len(pace)) if seconds else None
    running = state in UNDER_WAY and steps and seconds
    return {
        "step": step,
        "steps": steps,
        "first": {name: values[0] for name, values in columns.items() if values},
        "last": {name: values[-1] for name, values in columns.items() if values},
        "curves": {name: _fewer(values) for name, values in columns.items() if len(values) > 1},
        "seconds_per_step": seconds,
        "tokens_per_second": tokens,
        "seconds_left": (steps - step) * seconds if running and steps and seconds else None,
    }


def _next(folder: Path, facts: Mapping[str, Any], recipe: Mapping[str, Any], measured: bool) -> list[str]:
    """The commands that lead on."""
    run, state = shlex.quote(str(folder)), facts["state"]
    if state in UNDER_WAY:
        return [f"llm-unlearn show {run} --follow"]
    if state != "finished":
        if held(folder / MANIFEST).get("state") == "deleting" and facts["state"] == "unfinished":
            return [f"llm-unlearn forget {run}"]
        moved = "" if Path(str(recipe.get("output", ""))).absolute() == folder.absolute() else f" output={run}"
        return [f"llm-unlearn run {shlex.quote(str(folder / RECIPE))}{moved} --resume"]
    exact = [f"llm-unlearn verify {run}", f"llm-unlearn forget {run} --ids …"] if facts["kind"] == "store" else []
    if measured:
        seen = [f"open {shlex.quote(str(folder / REPORT))}", f"llm-unlearn compare {run} OTHER_RUN"]
        return [*seen, f"llm-unlearn push {run} --repo-id USER/NAME", *exact]
    base = shlex.quote(str(facts["base"]))
    models = f"--model {base} --adapter {run}" if (folder / ADAPTER).is_dir() else f"--model {run} --before {base}"
    return [f"llm-unlearn evaluate eval/quick.yaml {models}", *exact]


def _pieces(folder: Path, method: Mapping[str, Any]) -> dict[str, Any]:
    """How many weights of an exact run are there, and which training is under way."""
    there = [path for path in (folder / PIECES).glob("*/weights.safetensors") if not path.parent.name.startswith(".")]
    manifest = held(folder / MANIFEST)
    lines = {piece["line"] for piece in manifest.get("pieces", ())}
    asked = method.get("shards", method.get("slices")) if method.get("name") in ("sisa", "s3t") else None
    under_way = [rows[-1]["step"] for path in sorted((folder / WORK).glob(f"*/{LOG}")) if (rows := steps_in(path))]
    return {
        "pieces": len(there),
        "lines": len(lines) or asked,
        "serving": len(manifest.get("serving", ())),
        "deleted_rows": len(manifest.get("deleted", ())),
        "rows": len(manifest.get("rows", ())),
        "steps_under_way": under_way,
    }


# ------------------------------------------------------------------------------------------------------ other folders


def _audit(folder: Path) -> dict[str, Any]:
    found = held(folder / AUDIT)
    rows, done = steps_in(folder / LOG), "verdict" in found
    state = "finished" if done else "unfinished"
    facts = {"kind": "audit", "state": state, "hash": found.get("recipe")}
    words = "llm-unlearn audit RECIPE with the options that it was begun with goes on from there"
    facts |= {"verdict": found.get("verdict"), "canaries": found.get("canaries"), "guesses": found.get("guesses")}
    return facts | _course(rows, None, state) | {"next": [] if done else [words]}


def _comparison(folder: Path) -> dict[str, Any]:
    found = held(folder / COMPARISON)
    page = folder / "comparison.html"
    return {"kind": "comparison", "state": "finished", "models": len(found.get("runs", ())), "next": [f"open {page}"]}


def _evaluation(folder: Path) -> dict[str, Any]:
    results = held(folder / RESULTS)
    state = "finished" if (folder / REPORT).is_file() else "unfinished"
    run = shlex.quote(str(folder))
    following = [f"open {folder / REPORT}", f"llm-unlearn compare {run} OTHER"]
    return {"kind": "evaluation", "state": state, "suite": results.get("suite"), "headline": _headline(results), "next": following}


# ------------------------------------------------------------------------------------------------------------- reading


def _hash(path: Path) -> str | None:
    """The recipe's hash, which stands in the first line of a flattened recipe."""
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix(FIRST) if first.startswith(FIRST) else None


def _headline(results: Mapping[str, Any]) -> str | None:
    from llm_unlearn.report.headline import headline

    return headline(results) if results.get("numbers") else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _fewer(values: Sequence[float]) -> list[float]:
    """At most so many values: means of parts of equal length, in their order."""
    parts = min(POINTS, len(values))
    edges = [i * len(values) // parts for i in range(parts + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _files(folder: Path) -> list[dict[str, Any]]:
    """What lies in a folder, with its size in bytes; a folder in it counts as one."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            inner = path.is_dir()  # of which a part may go as it is walked: a run keeps its newest checkpoint only
            parts = (Path(place, name) for place, _, names in os.walk(path) for name in names) if inner else [path]
            found.append({"name": path.name + "/" * inner, "bytes": sum(_size(one) for one in parts)})
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it was there a moment ago
        return 0


def age(folder: Path) -> float | None:
    """Seconds since the log was last written."""
    try:
        return max(0.0, time.time() - (folder / LOG).stat().st_mtime)
    except OSError:
        return None
