"""Finished evaluations beside each other: folders are found, read, refused where they cannot be compared, and written as one page.

Needs no torch and no model: everything is in the `evaluation.json` of run folders and of evaluations.

OUTPUT/
    comparison.json    the numbers of all models, scores, curves and the sentence for all
    comparison.html    the same for people
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import folder
from llm_unlearn.bars import Bar
from llm_unlearn.places import check_place, check_replaced, no_way_out
from llm_unlearn.spec import Refused

if TYPE_CHECKING:
    from llm_unlearn.report.likeness import Run

RESULTS, PAGE = "comparison.json", "comparison.html"
WILD = re.compile(r"[*?\[]")
ANY_RUN = re.compile(r"(seed|step|checkpoint)-\d+|adapter|model|checkpoints")
"""Folders that are called the same in every run."""
RESERVED = ("before", "retrained")


def compare(words: Sequence[str], output: Path | None, *, overwrite: bool = False, common: bool = False) -> dict[str, Any]:
    """Compare what was evaluated, print it, and write it into a folder.

    Args:
        words: run folders, folders of evaluations, folders above them, and globs.
        output: folder for `comparison.json` and `comparison.html`; None prints the table only.
        common: where the suites differ, compare what is the same.

    Raises:
        Refused: a folder has no evaluation, or the evaluations cannot be compared; nothing was written.
    """
    check_output(output, overwrite)
    folders, left_out = found(words)
    return publish(read(folders), output, common=common, left_out=left_out)


def check_output(output: Path | None, overwrite: bool) -> None:
    """May the comparison be written there? An earlier one is replaced only where it is told to be.

    Raises:
        Refused: there is one, or the name is not that of a folder.
    """
    if output:
        check_place(output, "--output")
        no_way_out(output)
    if output and overwrite and (output / RESULTS).is_file():
        check_replaced(output / RESULTS, ("runs",))
    if output and not overwrite:
        for name in (RESULTS, PAGE):
            if (output / name).exists():
                raise Refused(
                    f"--output: {output} has a {name} already. Nothing was changed; add --overwrite, or choose another folder."
                )


def publish(runs: Sequence[Run], output: Path | None, *, common: bool = False, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The table in the terminal; in a folder, the JSON file and the page."""
    from llm_unlearn.report.comparison import answered, comparison_of
    from llm_unlearn.report.comparison_terminal import print_comparison
    from llm_unlearn.report.crowd import narrowed, shown
    from llm_unlearn.report.likeness import comparable

    alike, notes = comparable(runs, common)
    comparison = comparison_of(alike, notes, left_out)
    view, names = comparison, shown(comparison)
    if len(names) < len(alike):  # very many: a page has some of them, with all that they said
        by_name = {run.name: run for run in alike}
        alike = [again(by_name[name]) for name in names]
        view = narrowed(comparison, names) | answered(alike, comparison)
    if output:
        write(comparison, alike, output, view)
    print_comparison(view)
    if output:
        print(f"\n{output / PAGE}")
    return comparison


def write(comparison: Mapping[str, Any], alike: Sequence[Run], output: Path, view: Mapping[str, Any] | None = None) -> None:
    """The JSON file and the page.

    Args:
        alike: the runs that stand on the page.
        view: what of the comparison stands there; None means all.
    """
    from llm_unlearn.report.comparison_page import write_comparison

    folder.write(output / RESULTS, json.dumps(comparison, indent=1, ensure_ascii=False).encode("utf-8", "replace").decode())
    write_comparison(view or comparison, alike, output / PAGE)


def found(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders that have an evaluation, each once, and what was passed over on the way, with the reason.

    A folder that is named must have one, or must have such folders in it; of those that a glob or a folder above finds, the
    unfinished ones are left out and said.

    Raises:
        Refused: with every word that finds nothing, and what to run.
    """
    folders: dict[Path, Path] = {}
    left_out: dict[Path, str] = {}
    problems: list[str] = []
    for word in words:
        paths, passed, problem = _found_by(word)
        folders |= {path.resolve(): path for path in paths if path.resolve() not in folders}
        left_out |= {path: why_not(path) for path in passed}
        problems += [problem] if problem else []
    if problems:
        raise Refused("\n".join(problems))
    return list(folders.values()), list(left_out.values())


def _found_by(word: str) -> tuple[list[Path], list[Path], str]:
    """One word: the folders with an evaluation, those that were passed over, and what is wrong."""
    path = Path(os.path.expanduser(word))
    if path.name == folder.RESULTS and path.is_file():
        path = path.parent
    if path.is_dir():
        if (path / folder.RESULTS).is_file():
            return [path], [], ""
        within, passed = _within(path)
        return within, passed, "" if within else why_not(path)
    if not WILD.search(word):
        return [], [], f"{word}: no such folder (looked from {Path.cwd()})."
    matches = sorted(Path(one) for one in glob.glob(str(path), recursive=True))
    matches = list(dict.fromkeys(one.parent if one.name == folder.RESULTS else one for one in matches))
    ready, passed = [], []
    for one in (one for one in matches if one.is_dir()):
        inner, unfinished = ([one], []) if (one / folder.RESULTS).is_file() else _within(one)
        ready += inner
        passed += unfinished or ([] if inner or not (one / folder.RECIPE).is_file() else [one])
    if ready:
        return ready, passed, ""
    what = f"it matches {len(matches)} paths, and none has an {folder.RESULTS}" if matches else "it matches nothing"
    return [], [], f"{word}: {what} (looked from {Path.cwd()})."


def _within(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders with an evaluation below a folder, and the run folders without one."""
    ready, passed = [], []
    for place, inner, files in os.walk(path):
        own = (folder.ADAPTER, folder.MODEL, folder.CHECKPOINTS) if folder.RECIPE in files else ()
        inner[:] = sorted(name for name in inner if name not in own)
        if folder.RESULTS in files:
            ready.append(Path(place))
        elif folder.RECIPE in files and Path(place) != path:
            passed.append(Path(place))
    return ready, passed


def why_not(path: Path) -> str:
    """Why a folder cannot be compared, and the command after which it can."""
    start = f"{path}: no {folder.RESULTS} there"
    if not (path / folder.RECIPE).is_file():
        return f"{start}, nor in a folder below. Evaluate a model first: llm-unlearn evaluate SUITE --model MODEL --output {path}"
    if (path / folder.ADAPTER).is_dir() or (path / folder.MODEL).is_dir():
        return f"{start}: the run was not measured. Run: llm-unlearn evaluate SUITE --model {path} --output FOLDER"
    return f"{start}: the run is not finished. Run: llm-unlearn run {path / folder.RECIPE} --resume"


def read(folders: Sequence[Path]) -> list[Run]:
    """The evaluations in these folders, by names that tell them apart.

    Raises:
        Refused: a file cannot be read, or is not what an evaluation writes; all of them at once.
    """
    from llm_unlearn.report.crowd import MANY, Lean
    from llm_unlearn.report.likeness import Run

    runs, problems, lean = [], [], Lean() if len(folders) > MANY else None
    with Bar("reading", len(folders), "evaluation", quiet=lean is None) as bar:
        for path, name in zip(folders, names_of([str(path) for path in folders]), strict=True):
            try:
                results = folder.results_in(path)
                runs.append(
                    Run(name, str(path), lean(results) if lean else results, () if lean else folder.steps_in(path / folder.LOG))
                )
            except Refused as error:
                problems.append(str(error))
            bar.update()
    if problems:
        raise Refused("\n".join(problems))
    return runs


def again(run: Run) -> Run:
    """A run with all that its files say, where it was read without; measures that were left out stay so."""
    if all("probability" in row for rows in run.results["answers"].values() for row in rows[:1]):
        return run
    whole = folder.results_in(Path(run.folder))
    kept = {name: rows for name, rows in whole["answers"].items() if name in run.results["answers"]}
    return replace(run, results={**whole, **run.results, "answers": kept}, log=folder.steps_in(Path(run.folder) / folder.LOG))


def names_of(places: Sequence[str]) -> list[str]:
    """Short names that tell paths and hub ids apart: of a path as many of its last parts as it takes.

    `runs/bench/npo/seed-0`, `runs/bench/dpo/seed-0` -> `npo/seed-0`, `dpo/seed-0`: a seed says nothing without its method. No
    name is one of the columns before and retrained, and none is there twice.
    """
    local = {
        place: Path(os.path.expanduser(place)).absolute().parts for place in places if Path(os.path.expanduser(place)).exists()
    }
    least = {
        place: next((depth for depth, part in enumerate(reversed(parts), 1) if not ANY_RUN.fullmatch(part)), len(parts))
        for place, parts in local.items()
    }
    more, deepest = 0, max(map(len, local.values()), default=0)
    while True:
        names = ["/".join(local[one][-(least[one] + more) :]) if one in local else one for one in places]
        if len(set(names)) == len(names) or more == deepest:
            break
        more += 1
    taken: dict[str, None] = {}
    for name in names:
        start = unique = f"run {name}" if name.split(" ")[0] in RESERVED else name
        count = 1
        while unique in taken:
            count += 1
            unique = f"{start} {count}"
        taken[unique] = None
    return list(taken)
