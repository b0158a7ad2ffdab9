"""The run folder: what is in it, when it may be written, and files that appear whole or not at all.

runs/forget_lora/
    recipe.yaml        the recipe, flattened, with its hash and the versions it ran under
    adapter/           (or model/) what was trained
    log.jsonl          one line per optimizer step, or per strength of an edit
    influence.parquet  how much each row matters to the forget set, where the method was asked for it
    evaluation.json    every number, before, after and retrained
    evaluation.parquet the values of every row that these numbers are made of
    report.html        the same for people
    privacy.json       of a private run: what was spent, and what the guarantee rests on
    checkpoints/       while the run is under way; with the key that a private run draws from
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llm_unlearn import held as shape
from llm_unlearn import recipe
from llm_unlearn.spec import Refused

RECIPE, ADAPTER, MODEL, LOG = "recipe.yaml", "adapter", "model", "log.jsonl"
RESULTS, REPORT, CHECKPOINTS, ALONG = "evaluation.json", "report.html", "checkpoints", "evaluations.jsonl"
ROWS, INFLUENCES, PRIVACY = "evaluation.parquet", "influence.parquet", "privacy.json"
KEYS = {"title", "suite", "suite_hash", "models", "numbers", "curves", "answers"}
"""What an `evaluation.json` cannot be without."""


def check(wanted: recipe.Recipe, resume: bool, overwrite: bool) -> bool:
    """May this run write its folder? Needs nothing heavy and changes nothing.

    Returns:
        Whether there is nothing left to do: the run is finished and `resume` was asked.

    Raises:
        Refused: the folder holds another run, or something that is no run at all.
    """
    folder = Path(wanted.output)
    if blocked := in_the_way(folder.parent):
        raise Refused(f"output: {blocked} is a file, and {folder} is to be a folder. Nothing was changed; choose another output.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / RECIPE).is_file():
        raise Refused(
            f"output: {folder} exists and is not a run folder (it has no {RECIPE}). Nothing was changed; choose another output."
        )
    weights = (folder / ADAPTER).is_dir() or (folder / MODEL).is_dir()
    finished = (folder / RESULTS).is_file() or (weights and not wanted.evaluation)
    if resume:
        if recipe.load(folder / RECIPE, check=False).hash != wanted.hash:
            raise Refused(
                f"output: {folder} was begun with another recipe ({folder / RECIPE}), and cannot be resumed with this one. "
                "Choose another output, or add --overwrite."
            )
        return finished
    if not overwrite:
        state = "holds a finished run" if finished else "holds a run that did not finish; add --resume to go on with it"
        raise Refused(f"output: {folder} {state}. Nothing was changed; add --overwrite to replace it, or choose another output=….")
    return False


def in_the_way(folder: Path) -> Path | None:
    """The file that stands where a folder, or one above it, would have to be."""
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), None)
    return there if there and not there.is_dir() else None


def clear(folder: Path) -> None:
    """Remove what an earlier run left; `check` has seen that it is a run folder."""
    if folder.is_dir():
        shutil.rmtree(folder)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def results_in(path: Path) -> dict[str, Any]:
    """The `evaluation.json` of a folder.

    Raises:
        Refused: it is not what `run` and `evaluate` write.
    """
    file = path / RESULTS
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{file}: cannot be read ({error}). Make it again with llm-unlearn evaluate … --overwrite.") from None
    if not isinstance(held, dict) or not held.keys() >= KEYS:
        lacking = ", ".join(sorted(KEYS - set(held))) if isinstance(held, dict) else "an object"
        raise Refused(
            f"{file}: not an evaluation of this project; expected {lacking}. Name a folder that `run` or `evaluate` wrote."
        )
    shape.check(held, str(file))
    return held


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of a file with a line for each step; half a line, of a run that was killed, is passed over."""
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def adapter_in(name: str) -> str:
    """An adapter's folder; a run folder stands for the adapter in it."""
    inner = Path(os.path.expanduser(name)) / ADAPTER
    return str(inner) if inner.is_dir() else name


def model_in(name: str) -> str:
    """A model's folder; a run folder stands for the model in it."""
    inner = Path(os.path.expanduser(name)) / MODEL
    return str(inner) if inner.is_dir() else name
