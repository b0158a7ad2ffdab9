"""Folders of many runs, a bench or a sweep, begun or finished: how the runs stand, and what came out so far."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_unlearn import at_work
from llm_unlearn.folder import PROCESS, RECIPE, RESULTS, results_in
from llm_unlearn.following.state import UNDER_WAY, ended, held, state_of
from llm_unlearn.report.ranking import ranked, scores_of
from llm_unlearn.report.ranking import standing as among
from llm_unlearn.spec import Refused
from llm_unlearn.tree import read_tree

BOARD = "leaderboard.json"
SWEEP, CHOSEN, PAGE, LOCKS = "sweep.json", "chosen.yaml", "comparison.html", "locks"


def runs_in(folder: Path) -> list[Path]:
    """The recipes of a bench's runs."""
    return sorted(folder.glob(f"*/seed-*/{RECIPE}"))


def bench(folder: Path) -> dict[str, Any]:
    """A bench: its runs by their states. One without a leaderboard is not finished, whatever its runs are: more are to begin."""
    board, work = held(folder / BOARD), at_work.read(folder)
    states = [_state(path.parent) for path in runs_in(folder)]
    if (work and work.alive) or set(states) & set(UNDER_WAY):
        now = "running"
    elif work:
        now = ended(work)
    else:
        now = "finished" if board and set(states) == {"finished"} else "unfinished"
    page = next((path for path in sorted(folder.glob("*.md"))), folder / BOARD)
    words = [f"open {shlex.quote(str(page))}", str(board.get("command", ""))] if board else [_again("bench")]
    return {
        "kind": "bench",
        "state": now,
        "suite": board.get("suite"),
        "runs": dict(Counter(states)),
        "wanted": work.steps if work else None,
        "next": [_follow(folder)] if now == "running" else words,
    }


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has begun there."""
    return (folder / SWEEP).is_file() or (folder / LOCKS / "study").is_file()


def sweep(folder: Path) -> dict[str, Any]:
    """A sweep: its trials by their states, and the best so far. What `sweep.json` says of a trial that ended is taken from there;
    the study itself is read by nobody but Optuna."""
    data = held(folder / SWEEP)
    known = {row["folder"]: row for row in data.get("trials", ())}
    trials = [_trial(path.parent, known) for path in sorted(folder.glob(f"trial-*/{RECIPE}"))]
    work = [one for path in sorted(folder.glob(f"{LOCKS}/*/{PROCESS}")) if (one := at_work.read(path.parent))]
    states = Counter(one["state"] for one in trials)
    all_told = bool(data) and {one["folder"] for one in trials} <= set(known) and not states["running"]
    if any(one.alive for one in work) or states["running"]:
        now = "running"
    else:
        now = ended(work[-1]) if work else "finished" if all_told else "unfinished"
    best = next((one for one in ranked(_ranked_as(trials)) if one["rank"] == 1), None)
    row = next((one for one in trials if best and one["folder"] == best["name"]), {})
    return {
        "kind": "sweep",
        "state": now,
        "suite": data.get("suite"),
        "trials": dict(states),
        "wanted": max((one.steps for one in work), default=data.get("wanted")),
        "best": {key: row[key] for key in ("folder", "forgotten", "kept", "score")} if row else None,
        "chosen": next((one["folder"] for one in known.values() if one["number"] == data.get("chosen")), None),
        "next": _leads_on(folder, data, now),
    }


def _leads_on(folder: Path, data: Mapping[str, Any], now: str) -> list[str]:
    """The commands that lead on from a sweep."""
    if now == "running":
        return [_follow(folder)]
    found = [] if now == "finished" else [str(data.get("command") or _again("sweep"))]
    found += [f"llm-unlearn plan {shlex.quote(str(folder / CHOSEN))}"] if (folder / CHOSEN).is_file() else []
    return found + ([f"open {shlex.quote(str(folder / PAGE))}"] if (folder / PAGE).is_file() else []) or [_again("sweep")]


def _trial(folder: Path, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One trial: what the sweep told of it, else what its folder says."""
    state, told = _state(folder), known.get(folder.name, {})
    if told.get("state", "running") != "running":
        return dict(told)
    row: dict[str, Any] = {"folder": folder.name, "state": "running" if state in UNDER_WAY else state}
    if state != "finished":
        return row
    row |= _scores(folder, (folder / RESULTS).stat().st_mtime) if (folder / RESULTS).is_file() else {}
    return row | {"state": "failed" if row.get("score") is None else "collapsed" if row["collapsed"] else "complete"}


def _ranked_as(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trials that have numbers as methods with one seed, as the leaderboard has them."""
    return [{**among([one]), "name": one["folder"]} for one in trials if one["state"] == "complete"]


@lru_cache(maxsize=4096)
def _scores(folder: Path, written: float) -> dict[str, Any]:
    """Of an evaluation, which is read once as long as nobody writes it again."""
    try:
        results = results_in(folder)
    except Refused:
        return {}
    return {} if (results.get("run") or {}).get("broken") else scores_of(results)


def _state(folder: Path) -> str:
    try:
        return state_of(folder, read_tree(folder / RECIPE).data, at_work.read(folder))
    except Refused:  # it is gone, or half there
        return "unfinished"


def _follow(folder: Path) -> str:
    return f"llm-unlearn show {shlex.quote(str(folder))} --follow"


def _again(verb: str) -> str:
    return f"the llm-unlearn {verb} command that began it goes on"
