"""Every recipe of a folder × a few seeds on one suite: one child process per run, and a leaderboard of what came out.

runs/bench/
    NAME/seed-0/       a run folder like any other, see folder.py
    logs/NAME-0.txt    what that run printed
    leaderboard.json   every number of every run;  leaderboard.md, leaderboard.svg: the same for people
    process.json       who is at work here, or how it ended before the bench's end
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llm_unlearn import folder, recipe
from llm_unlearn.at_work import at_work
from llm_unlearn.catalogue import Method
from llm_unlearn.children import Child, carry_out
from llm_unlearn.durable import make_folder
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.places import check_place
from llm_unlearn.reply import DONE, INTERRUPTED, UNFIT, Reply
from llm_unlearn.source import same_data
from llm_unlearn.spec import Refused, fingerprint

OWN = ("seed", "output", "evaluation")
"""Settings that differ from run to run, or that make runs comparable; the bench sets them."""
BOARD, LOGS = "leaderboard.json", "logs"

State = Literal["finished", "begun", "changed", "new"]


@dataclass(frozen=True)
class Asked:
    """What is to be compared, and where it goes."""

    methods: Sequence[Method]
    suite_name: str
    """As it was asked for, without the place where it was found."""
    suite_path: Path
    suite: Suite
    seeds: int
    output: Path
    page: Path
    """The markdown page; the plot stands beside it."""
    jobs: int
    cache: Path
    overrides: Sequence[str]
    command: str
    """The line that asked, to be shown on the page."""

    @property
    def plot(self) -> Path:
        """The SVG file beside the page."""
        return self.page.with_suffix(".svg")


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    method: Method
    seed: int
    settings: Sequence[str]
    """The `key=value` words of the child process."""
    output: Path
    log: Path
    state: State
    """Of its folder before this bench began: nothing there, half a run, a whole one, or one of another recipe or suite."""

    @property
    def name(self) -> str:
        """Method and seed, as they are shown."""
        return f"{self.method.name}/{self.seed}"


def bench(asked: Asked, environment: Mapping[str, str]) -> Reply:
    """Carry out what is not finished, then write and print the leaderboard.

    Args:
        environment: of this process; the children get it with the threads shared out.

    Returns:
        DONE, all runs are there · UNFIT, some failed; with the leaderboard · INTERRUPTED, and none was written.

    Raises:
        Refused: anything that can be known beforehand is wrong; nothing was started.
    """
    asked, left_out = fitting(asked)
    if not asked.methods:
        names = ", ".join(left_out)
        raise Refused(f"{asked.suite_path}: every recipe forgets other rows than it asks about ({names}). Nothing was changed.")
    if left_out:
        print(f"left out, as the recipe forgets other rows than {asked.suite_name} asks about: {', '.join(left_out)}")
    runs = runs_of(asked)
    _check_retrained(asked)
    print(_summary(asked, runs), flush=True)
    waiting = [Child(run.name, command_of(run), run.log) for run in runs if run.state != "finished"]
    check_place(asked.output, "--output")
    make_folder(asked.output)
    with at_work(asked.output, len(runs), active=True) as ended:
        failures = carry_out(waiting, asked.jobs, environment, done=len(runs) - len(waiting))
        if failures is None:
            ended.append("interrupted")
            there = sum(run.state == "finished" for run in runs_of(asked))
            print(f"interrupted with {there} of {len(runs)} runs finished; the same command goes on from there.", file=sys.stderr)
            return Reply(INTERRUPTED, {"finished": there, "runs": len(runs)})
        return _write_board(asked, runs, failures, left_out)


def fitting(asked: Asked) -> tuple[Asked, list[str]]:
    """Without the methods whose recipe forgets other rows of the data than the suite asks about, and their names."""
    from llm_unlearn.compatibility.rows import fit_of

    left_out = []
    for method in asked.methods:
        try:
            wanted = recipe.load(method.path, asked.overrides)
        except Refused:  # runs_of says it
            continue
        mine = wanted.data.forget
        theirs = asked.suite.sets.get("forget", mine)
        narrowed = (mine.where, mine.without, mine.like) != (theirs.where, theirs.without, theirs.like)
        if (same_data(mine, theirs) and narrowed) or fit_of(wanted, asked.suite, asked.suite_name).problems:
            left_out.append(method.name)
    return replace(asked, methods=[method for method in asked.methods if method.name not in left_out]), left_out


def runs_of(asked: Asked) -> list[Run]:
    """Every run that is asked for: the recipes in order, the seeds of each one after the other.

    Raises:
        Refused: with all problems of all recipes, the suite and the output files at once.
    """
    problems = [*_setting_problems(asked), *_page_problems(asked)]
    suite_hash = fingerprint(asked.suite)
    runs = []
    for method in asked.methods:
        for seed in range(asked.seeds):
            output = asked.output / method.name / f"seed-{seed}"
            own = {"seed": seed, "output": str(output), "evaluation": str(asked.suite_path)}
            settings = [*asked.overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items())]
            try:
                state = state_of(recipe.load(method.path, settings), suite_hash)
            except Refused as error:
                problems += str(error).splitlines()
                continue
            log = asked.output / LOGS / f"{method.name}-{seed}.txt"
            runs.append(Run(method, seed, settings, output, log, state))
    if problems:
        raise Refused("\n".join(dict.fromkeys(problems)))  # a wrong override is wrong in every recipe: said once
    return runs


def _check_retrained(asked: Asked) -> None:
    """Check that the retrained model can be compared with the model of every recipe.

    Raises:
        Refused: it cannot; names the first recipe.
    """
    from llm_unlearn.compatibility import models as compatibility

    retrained = str(asked.suite.retrained)
    for method in asked.methods:
        model = recipe.load(method.path, asked.overrides).model
        models = {"model": model, "retrained": compatibility.control_of(model, retrained)}
        compatibility.check_models(models, asked.suite, f"{asked.suite_path}: retrained: {method.path}", asked.cache)


def _setting_problems(asked: Asked) -> Iterable[str]:
    """Words that the bench must set itself, and a suite that cannot tell who forgot."""
    for word in asked.overrides:
        if re.split(r"[.=]", word)[0] in OWN:
            yield f"command line: {word}: `bench` sets {', '.join(OWN)} itself; use --seeds, --output and --suite."
    yield from unjudged(asked.suite, asked.suite_path, asked.suite.retrained, "a leaderboard")


def unjudged(suite: Suite, path: Path, retrained: str | None, who: str) -> Iterable[str]:
    """Why a suite cannot tell who forgot and who kept.

    Args:
        retrained: the model that never saw the forget set, named by the suite or by what reads it.
        who: needs to know.
    """
    if not retrained:
        yield f"{path}: retrained: missing; {who} compares with the model that never saw the forget set."
    judged = {measure.set for measure in suite.measures if measure.name != "forget_quality"}
    if "forget" not in judged or not judged - {"forget", "holdout"}:
        yield f"{path}: measures: {who} needs some on the set `forget`, and some on a set that is to be kept."


def _page_problems(asked: Asked) -> Iterable[str]:
    """A page may replace an earlier leaderboard, and nothing else."""
    if asked.page.suffix not in (".md", ".markdown"):
        yield f"--write: {asked.page}: expected the name of a markdown page, such as {asked.page.with_suffix('.md')}."
        return
    for path in (asked.page, asked.plot):
        if path.is_dir() or (
            path.is_file() and "llm-unlearn bench" not in path.read_text(encoding="utf-8", errors="replace")[:2000]
        ):
            yield f"--write: {path} exists and was not written by `llm-unlearn bench`. Nothing was changed; choose another name."


def state_of(wanted: recipe.Recipe, suite_hash: str) -> State:
    """What is in the folder of a run.

    Args:
        suite_hash: of the suite as it is now; a recipe names only the file.

    Raises:
        Refused: the folder is no run folder.
    """
    path = Path(wanted.output)
    if not (path / folder.RECIPE).is_file():
        folder.check(wanted, resume=True, overwrite=False)
        return "new"
    try:
        earlier = recipe.load(path / folder.RECIPE, check=False)
    except Refused:  # another version of the project wrote it
        return "changed"
    if not (path / folder.RESULTS).is_file():
        return "begun" if earlier.hash == wanted.hash else "changed"
    try:
        results = folder.results_in(path)
    except Refused:
        return "changed"
    same = results["suite_hash"] == suite_hash and _unplaced(earlier) == _unplaced(wanted)
    return "finished" if same and results.get("run") else "changed"  # `evaluate --overwrite` says nothing of the run


def _unplaced(one: recipe.Recipe) -> str:
    """The hash without the path of the suite, whose content is compared by itself: it may be written in more than one way."""
    return replace(one, evaluation=None).hash


def _summary(asked: Asked, runs: Sequence[Run]) -> str:
    """What will be done, before it is."""
    count = Counter(run.state for run in runs)
    words: dict[State, str] = {"finished": "finished already", "begun": "to go on with", "changed": "to redo", "new": "to begin"}
    states = ", ".join(f"{count[state]} {text}" for state, text in words.items() if count[state])
    recipes = "1 recipe" if len(asked.methods) == 1 else f"{len(asked.methods)} recipes"
    seeds = "1 seed" if asked.seeds == 1 else f"{asked.seeds} seeds"
    lines = [f"{recipes} × {seeds} on {asked.suite_name}: {states}; logs in {asked.output / LOGS}"]
    redo = [run.name for run in runs if run.state == "changed"]
    if redo:
        lines.append(f"to redo, as the recipe or the suite has changed since (the old run is replaced): {', '.join(redo)}")
    return "\n".join(lines)


def command_of(run: Run) -> list[str]:
    """The child process of one run. An earlier run is replaced only where it was another recipe's."""
    how = "--overwrite" if run.state == "changed" else "--resume"
    return [sys.executable, "-m", "llm_unlearn", "run", str(run.method.path), *run.settings, how]


def _write_board(asked: Asked, runs: Sequence[Run], failures: Mapping[str, str], left_out: Sequence[str]) -> Reply:
    from llm_unlearn.report.frontier import frontier_svg
    from llm_unlearn.report.leaderboard import Outcome, board_of, markdown, print_board

    outcomes: dict[Method, list[Outcome]] = {method: [] for method in asked.methods}
    failed: list[str] = []
    for run in runs:
        found = outcome_of(run, failures)
        outcomes[run.method].append((run.seed, str(run.output), found))
        if isinstance(found, str):
            failed.append(f"{run.name} failed, {found} ({run.log})")
    board = board_of(
        outcomes, suite=asked.suite_name, suite_hash=fingerprint(asked.suite), command=asked.command, left_out=left_out
    )
    folder.write(asked.output / BOARD, json.dumps(board, indent=1, ensure_ascii=False))
    folder.write(asked.plot, frontier_svg(board))
    folder.write(asked.page, markdown(board, asked.page, asked.plot))
    print_board(board)
    print(f"{asked.page}\n{asked.output / BOARD}")
    if failed:
        print("\n".join(failed), file=sys.stderr)
    return Reply(UNFIT if failed else DONE, {"leaderboard": board, "failed": failed})


def outcome_of(run: Run, failures: Mapping[str, str]) -> dict[str, Any] | str:
    """What a run's folder says, or how it failed. A run that a loss broke has numbers, but not those of its recipe."""
    if run.name in failures:
        return failures[run.name]
    try:
        results = folder.results_in(run.output)
    except Refused:
        return f"ended without {folder.RESULTS}"
    if not (facts := results.get("run")):
        return f"ended with an {folder.RESULTS} that is not a run's"
    return f"stopped: {facts['reason']}" if facts.get("broken") else results
