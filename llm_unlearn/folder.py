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
    trackers/          files of experiment trackers, where the recipe names some
    process.json       who is at work here, or how it ended before the run's end; not in a finished run
    hashes.json        SHA-256 of all these, as the run left them; `llm-unlearn verify` compares
    checkpoints/       while the run is under way; with the key that a private run draws from
    before/            of an exact method while the run is under way: the model with all rows
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from llm_unlearn import held as shape
from llm_unlearn import recipe
from llm_unlearn.durable import remove, settle, sweep_up, whole
from llm_unlearn.outward import without_known
from llm_unlearn.places import check_place, check_replaced, no_way_out
from llm_unlearn.spec import Refused, fingerprint, shown
from llm_unlearn.tree import read_tree
from llm_unlearn.written import object_in

RECIPE, ADAPTER, MODEL, LOG = "recipe.yaml", "adapter", "model", "log.jsonl"
RESULTS, REPORT, CHECKPOINTS, ALONG = "evaluation.json", "report.html", "checkpoints", "evaluations.jsonl"
ROWS, INFLUENCES, PRIVACY = "evaluation.parquet", "influence.parquet", "privacy.json"
TRACKERS, PROCESS = "trackers", "process.json"
HASHES, BEFORE = "hashes.json", "before"
SEALED = (RECIPE, ADAPTER, MODEL, LOG, ALONG, RESULTS, ROWS, REPORT, INFLUENCES, PRIVACY)
"""Files, and folders with all that is in them, whose content a run vouches for."""
FIRST = "# hash "
"""How a run begins its recipe."""
OF_HUB = "# on the hub "
"""Before the names, a JSON list, that meant models and data of the hub where the run was."""
KEYS = {"title", "suite", "suite_hash", "models", "numbers", "curves", "answers"}
"""What an `evaluation.json` cannot be without."""


def check(wanted: recipe.Recipe, resume: bool, overwrite: bool) -> bool:
    """May this run write its folder? Needs nothing heavy and changes nothing.

    Returns:
        Whether there is nothing left to do: the run is finished and `resume` was asked.

    Raises:
        Refused: the folder holds another run, or something that is no run at all; or both are asked.
    """
    folder = Path(wanted.output)
    if resume and overwrite:
        raise Refused("resume, overwrite: one goes on with an earlier run, the other replaces it; give one of them.")
    check_place(folder, "output")
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(f".{RECIPE}.") for path in folder.iterdir())):
        return False  # nothing is there, or a run that was killed while it wrote its very first file
    if not (folder / RECIPE).is_file():
        raise Refused(
            f"output: {folder} exists and is not a run folder (it has no {RECIPE}). Nothing was changed; choose another output."
        )
    no_way_out(folder)
    if not _written_by_a_run(folder):
        raise Refused(f"output: {folder} {NOBODY}. Nothing was changed; choose another output.")
    weights = (folder / ADAPTER).is_dir() or (folder / MODEL).is_dir()
    # a run without numbers vouches for its files last of all; before 0.2 none did, and none said who was at work
    unmeasured = weights and not wanted.evaluation and ((folder / HASHES).is_file() or not (folder / PROCESS).exists())
    finished = ((folder / RESULTS).is_file() or unmeasured) and not (folder / BEFORE).exists()
    if resume:
        if recipe.load(folder / RECIPE, check=False).hash != wanted.hash:
            raise Refused(
                f"output: {folder} was begun with another recipe ({folder / RECIPE}), and cannot be resumed with this one. "
                "Choose another output, or give --overwrite instead of --resume."
            )
        return finished
    if not overwrite:
        state = "holds a finished run" if finished else "holds a run that did not finish; add --resume to go on with it"
        raise Refused(f"output: {folder} {state}. Nothing was changed; add --overwrite to replace it, or choose another output=….")
    _may_be_cleared(folder)
    return False


NOBODY = f"has a {RECIPE} that no run wrote (theirs begin with `{FIRST}…`)"


def _written_by_a_run(folder: Path) -> bool:
    with (folder / RECIPE).open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(FIRST)


def _may_be_cleared(folder: Path) -> None:
    """What is removed with all that is in it must be one's own, and nothing else's.

    Raises:
        Refused: it may be more than that.
    """
    where = folder.resolve()
    if folder.is_symlink():
        said = f"is a link to {where}"
    elif (folder / RECIPE).is_file() and not _written_by_a_run(folder):
        said = NOBODY
    elif any(place.is_relative_to(where) for place in (Path.cwd(), Path.home())):
        said = "is the folder from which this is run, or one above it"
    elif (folder / RECIPE).is_file() and not _is_as_written(folder / RECIPE):
        said = f"has a {RECIPE} that is not what its run wrote (its first line has the hash of something else)"
    elif foreign := _foreign(folder):
        said = (
            f"holds what no run wrote: {', '.join(foreign[:NAMED])}{f' and {len(foreign) - NAMED} more' * (len(foreign) > NAMED)}"
        )
    else:
        return
    raise Refused(f"output: {folder} {said}, so all that is in it is not removed. Nothing was changed; choose another output.")


NAMED = 5
"""Number of foreign files that an error names."""
OWN = {*SEALED, CHECKPOINTS, TRACKERS, PROCESS, HASHES, BEFORE, "privacy_audit.json", "manifest.json", "pieces", "work"}
"""All that lies in the folder of a run, an audit, or a run in pieces."""


def _is_as_written(path: Path) -> bool:
    """Return whether a run's recipe has the hash that its first line names, by what stands in it: later versions have other
    defaults."""
    try:
        tree = read_tree(path)
    except Refused:
        return False
    told = {key: value for key, value in tree.data.items() if key not in ("output", "track")}
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().split()[2:3] == [fingerprint(told)]


def _foreign(folder: Path) -> list[str]:
    """Return what lies in a run's folder and is of no run: by its name, or, beside a finished run's weights, without a hash."""
    names = sorted(one.name for one in folder.iterdir())
    foreign = [name for name in names if name not in OWN and not name.startswith(tuple(f".{own}." for own in OWN))]
    if (folder / HASHES).is_file():
        listed = object_in(folder / HASHES, "").get("files", {})
        foreign += [name for name in _sealed(folder) if "/" in name and name not in listed]
    return foreign


def tidy(folder: Path) -> None:
    """Remove what is needed only while a run is under way; a finished one that was killed as it did so has it still."""
    remove(folder / CHECKPOINTS)  # with the key of a private run
    (folder / PROCESS).unlink(missing_ok=True)
    sweep_up(folder)


def clear(folder: Path) -> None:
    """Remove what an earlier run or audit left; what looks into it before (`check`) has seen that it is one's folder."""
    if folder.is_dir():
        _may_be_cleared(folder)
        shutil.rmtree(folder)


def check_output(output: Path, overwrite: bool) -> None:
    """An evaluation may be written into this folder.

    Raises:
        Refused: it is a file, holds an evaluation that may not be replaced, or a link leads out of it.
    """
    check_place(output, "output")
    no_way_out(output)
    if (output / RESULTS).is_file() and overwrite:
        check_replaced(output / RESULTS, KEYS)
    if (output / RESULTS).exists() and not overwrite:
        how = "add --overwrite (from Python, overwrite=True), or choose another"
        raise Refused(f"output: {output} has an {RESULTS} already. Nothing was changed; {how}.")


def new_file(path: Path) -> IO[bytes]:
    """A file that was not there before, to be written: what lies in its place, as a link that somebody put there, is removed, and
    never written through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")


def no_link(path: str, flags: int) -> int:
    """Opens a file, for `open(…, opener=no_link)`; a link in its place is an error."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write(path: Path, text: str) -> None:
    """Write a file, for good: whole or not at all, without the secrets of this user."""
    with whole(path) as unfinished, new_file(unfinished) as file:
        file.write(without_known(text).encode())


def seal(folder: Path, to_come: Mapping[str, str] = MappingProxyType({}), broken: bool = False) -> None:
    """Write down what every file of a run holds, so that a later change can be seen.

    Args:
        to_come: texts of files that are written next, by name: what says that a run is finished comes last of all.
        broken: the run came to nothing good, and has no numbers that say so.
    """
    for name in (names := _sealed(folder)):
        settle(folder / name)  # a hash on the disk without what it is of would call the file changed
    found = {name: sha256(folder / name) for name in names}
    found |= {name: hashlib.sha256(without_known(text).encode()).hexdigest() for name, text in to_come.items()}
    write(
        folder / HASHES,
        json.dumps({"format": 1, "files": dict(sorted(found.items())), **({"broken": True} if broken else {})}, indent=1),
    )


def is_broken(folder: Path) -> bool:
    """Whether a finished run without numbers came to nothing good."""
    there = (folder / HASHES).is_file()
    return there and object_in(folder / HASHES, "it was changed since the run wrote it").get("broken") is True


def unlike(folder: Path) -> list[str]:
    """What is not as the run left it, a line for each file; empty where all is.

    Raises:
        Refused: the run wrote no hashes, or they cannot be read.
    """
    if not (folder / HASHES).exists():
        text = "the run is not finished, or of a version before 0.2"
        raise Refused(f"{folder}: has no {HASHES}; {text}. Nothing can be compared.")
    files = object_in(folder / HASHES, "it was changed since the run wrote it").get("files")
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
        raise Refused(f"{folder / HASHES}: files: found {shown(files)}; it was changed since the run wrote it.")
    here, found = set(_sealed(folder)), []
    for name in sorted(here | set(files)):
        if name not in here:
            found.append(f"{name}: is gone")
        elif name not in files:
            found.append(f"{name}: was added after the run")
        elif sha256(folder / name) != files[name]:
            found.append(f"{name}: was changed after the run")
    return found


def _sealed(folder: Path) -> list[str]:
    """Names, from the folder, of the files that are there and that a run vouches for."""
    places = (folder / name for name in SEALED)
    files = (path for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def names_on_hub(folder: Path) -> list[str]:
    """What a run says of the names in its recipe: those that were ids of the hub; none of an earlier version's run."""
    with (folder / RECIPE).open(encoding="utf-8", errors="replace") as file:
        said = next((line.removeprefix(OF_HUB) for line in itertools.islice(file, 5) if line.startswith(OF_HUB)), "[]")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(names := json.loads(said), list):
            return [name for name in names if isinstance(name, str)]
    return []


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def results_in(path: Path) -> dict[str, Any]:
    """The `evaluation.json` of a folder.

    Raises:
        Refused: it is not what `run` and `evaluate` write.
    """
    file = path / RESULTS
    held = object_in(file, f"expected what `run` and `evaluate` write there. {shape.AGAIN}")
    if lacking := sorted(KEYS - held.keys()):
        text = f"not an evaluation of this project; expected {', '.join(lacking)}"
        raise Refused(f"{file}: {text}. Name a folder that `run` or `evaluate` wrote.")
    shape.check(held, str(file))
    return held


def steps_in(file: Path) -> list[dict[str, Any]]:
    """The rows of a log of steps, which somebody may be writing, or was when he was killed: half a line is passed over."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint below a run's `checkpoints`; None where there is none."""
    return max((path for path in checkpoints.glob("step-*") if not path.suffix), default=None)


def wordless(results: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without questions and answers, for `--json`: what is printed may be kept in a log."""
    return {name: value for name, value in results.items() if name != "answers"}


def adapter_in(name: str) -> str:
    """An adapter's folder; a run folder stands for the adapter in it."""
    inner = Path(os.path.expanduser(name)) / ADAPTER
    return str(inner) if inner.is_dir() else name


def model_in(name: str) -> str:
    """A model's folder; a run folder stands for the model in it."""
    inner = Path(os.path.expanduser(name)) / MODEL
    return str(inner) if inner.is_dir() else name
