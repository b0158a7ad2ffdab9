"""How a run stands, read off its files while another process may be writing them; nothing heavy, no lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.at_work import AtWork
from llm_unlearn.folder import ADAPTER, LOG, MODEL, RESULTS
from llm_unlearn.spec import Refused
from llm_unlearn.written import object_in

UNDER_WAY = ("beginning", "training", "measuring")
MANIFEST, PIECES, WORK = "manifest.json", "pieces", "work"


def state_of(folder: Path, recipe: Mapping[str, Any], work: AtWork | None) -> str:
    """beginning, training, measuring · finished · interrupted, failed, killed · unfinished, where nobody says how it ended."""
    weights = next((one for one in (folder / ADAPTER, folder / MODEL) if one.is_dir()), None)
    if work and work.alive:
        if weights and _since(weights, work):
            return "measuring"
        return "training" if _since(folder / LOG, work) or (folder / WORK).is_dir() else "beginning"
    if work:
        return ended(work)
    if held(folder / MANIFEST).get("state", "complete") != "complete":
        return "unfinished"
    return "finished" if (folder / RESULTS).is_file() or (weights and not recipe.get("evaluation")) else "unfinished"


def ended(work: AtWork) -> str:
    """How a process ended that is at work no more."""
    return "killed" if work.how == "running" else work.how


def _since(path: Path, work: AtWork) -> bool:
    """Whether the process that is at work has written this: what one left that was killed as it measured says nothing of the next,
    which trains again. Clocks of machines differ."""
    try:
        written = path.stat().st_mtime
    except OSError:
        return False
    return not work.here or written >= work.began - 1


def held(path: Path) -> dict[str, Any]:
    """A file's object; nothing where there is none that can be read yet."""
    try:
        return object_in(path, "expected an object")
    except Refused:
        return {}
