"""The verb `sweep`: settings of one recipe are tried out, two numbers are kept of each trial, and what nothing beats is shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn import at_work, recipe, thresholds
from llm_unlearn.bars import Bar
from llm_unlearn.bench import unjudged
from llm_unlearn.children import keep_busy
from llm_unlearn.durable import make_folder
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.folder import PROCESS, RECIPE
from llm_unlearn.outward import without_secrets
from llm_unlearn.reply import DONE, INTERRUPTED, UNFIT, Reply
from llm_unlearn.report.ranking import FLOOR
from llm_unlearn.spec import Refused, dotted, fingerprint, reason
from llm_unlearn.sweeping import choosing, saying
from llm_unlearn.sweeping.pruning import readable
from llm_unlearn.sweeping.running import LOGS, Job, Trials, basis_of
from llm_unlearn.sweeping.space import Space, checked, space_of
from llm_unlearn.sweeping.study import LOCKS, Sampler, Study, check_folder, name_of, open_study
from llm_unlearn.tree import locate

TRIALS = 20
"""Trials of a sweep that does not say how many, and has a range."""


@dataclass(frozen=True)
class Asked:
    """What is to be tried, and where it goes."""

    job: Job
    suite_name: str
    suite_hash: str
    sampler: Sampler
    seed: int
    trials: int
    jobs: int
    rule: choosing.Rule | None
    command: str
    storage: str | None


def sweep(options: argparse.Namespace) -> Reply:
    """Carry out trials until there are as many as asked, then write and print what they came to.

    Raises:
        Refused: anything that can be known beforehand is wrong; nothing was started.
    """
    asked = _asked(options)
    job = asked.job
    facts = {"recipe": job.basis, "suite": asked.suite_hash, "search space": " ".join(one.word for one in job.space.dimensions)}
    study = open_study(job.output, asked.storage, facts, job.space, asked.sampler, asked.seed, asked.trials)
    print(_summary(asked, study), flush=True)
    if not job.watched and not options.no_prune:
        print("no trial can be ended early: that takes train.stop.until and a retain set, or evaluation.every")
    trials = Trials(study, job)
    with _said(job.output, asked.trials):
        try:
            finished = _carry_out(trials, asked, options.environment)
        finally:
            trials.release()
        if not finished:
            there = saying.count_of(study.trials())
            print(f"interrupted; trials: {saying.counted(there)}. The same command goes on from there.", file=sys.stderr)
            return Reply(INTERRUPTED, {"output": str(job.output), "trials": there})
        return _publish(asked, study, trials.hopeless)


@contextmanager
def _said(output: Path, trials: int) -> Iterator[None]:
    """Inside, the folder says that this process is at work, for `show`: one of several, each with a place of its own."""
    for path in output.glob(f"{LOCKS}/*/{PROCESS}"):
        earlier = at_work.read(path.parent)
        if earlier and earlier.here and not earlier.alive:  # it was killed
            shutil.rmtree(path.parent, ignore_errors=True)
    home = output / LOCKS / f"{platform.node()}-{os.getpid()}"
    make_folder(home)
    try:
        with at_work.at_work(home, trials, active=True):
            yield
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _asked(options: argparse.Namespace) -> Asked:
    """Everything that is checked before anything is begun."""
    space, path, rule = space_of(options.overrides), locate(str(options.recipe)), choosing.rule_of(options.pick)
    check_folder(options.output)
    own = [word for word in options.overrides if word.partition("=")[0].split(".")[0] == "output"]
    own += [one.word for one in space.dimensions if one.key.split(".")[0] == "evaluation"]
    if own:
        raise Refused(f"command line: {own[0]}: `sweep` sets output itself, and one suite measures all; use --output and --suite.")
    more = [f"evaluation.suite={json.dumps(str(locate(options.suite)), ensure_ascii=False)}"] if options.suite else []
    wanted = checked(path, space, [*more, f"output={json.dumps(str(options.output / name_of(0)), ensure_ascii=False)}"])
    if not wanted.evaluation:
        raise Refused(f"{path}: evaluation: missing; a sweep compares what a suite finds. Give --suite, such as eval/quick.yaml.")
    suite_path = locate(wanted.evaluation.suite, path)
    suite = suites.load(suite_path)
    retrained = wanted.evaluation.retrained or suite.retrained
    wrong = thresholds.problems(wanted.evaluation.thresholds or (), suite, wanted.evaluation.suite, retrained)
    problems = list(unjudged(suite, suite_path, retrained, "a sweep"))
    problems += [f"{path}: {dotted(('evaluation', 'thresholds', *keys))}: {text}" for keys, text in wrong]
    if problems:
        raise Refused("\n".join(problems))
    from llm_unlearn.compatibility import checks

    checks.check(wanted, suite, wanted.evaluation.suite, retrained, str(path), options.cache)
    sampler, trials = _how_many(space, options.sampler, options.trials)
    watched = "" if options.no_prune else readable(wanted)
    job = Job(path, space, (*more,), options.output, basis_of(wanted), watched)
    return Asked(
        job, wanted.evaluation.suite, fingerprint(suite), sampler, options.seed, trials, options.jobs, rule,
        without_secrets(shlex.join(["llm-unlearn", *options.words])), options.storage,
    )  # fmt: skip


def _how_many(space: Space, sampler: Sampler | None, trials: int | None) -> tuple[Sampler, int]:
    """How points are drawn, and how many: of lists alone, without a number, all."""
    if sampler is None:
        sampler = "grid" if space.listed and trials is None else "tpe"
    if sampler != "grid":
        return sampler, trials or TRIALS
    if space.size is None:
        endless = [one.word for one in space.dimensions if not one.count]
        raise Refused(f"--sampler: a grid has no end with {endless[0]}; name its values, or give the range a @step=.")
    return sampler, min(trials or space.size, space.size)


def _summary(asked: Asked, study: Study) -> str:
    """What will be done, before it is."""
    space = asked.job.space
    what = " × ".join(one.word for one in space.dimensions)
    size = f" of {space.size} points" if space.size else ""
    there = saying.counted(saying.count_of(study.trials()))
    return (
        f"{what}: {asked.trials} trials by {asked.sampler}{size} on {asked.suite_name}\n"
        f"trials so far: {there}; logs in {asked.job.output / LOGS}"
    )


def _carry_out(trials: Trials, asked: Asked, environment: Mapping[str, str]) -> bool:

    there = saying.count_of(trials.study.trials())
    trials.done = there["complete"] + there["pruned"]
    with Bar("sweep", max(asked.trials, trials.done), "trial", done=trials.done, stays=True) as bar:
        return keep_busy(trials, asked.jobs, environment, bar, made=there["complete"] > 0)


def _publish(asked: Asked, study: Study, hopeless: str) -> Reply:
    """The table, the files, and the choice."""
    found, output = study.trials(), asked.job.output
    rows, count = choosing.rows_of(found), saying.count_of(found)
    chosen = choosing.chosen(rows, asked.rule)
    front = [row["folder"] for row in rows if row["frontier"]]
    why = str(asked.rule or choosing.BY_SCORE)
    data: dict[str, Any] = {
        "format": 1,
        "command": asked.command,
        "recipe": str(asked.job.path),
        "suite": asked.suite_name,
        "suite_hash": asked.suite_hash,
        "space": [one.word for one in asked.job.space.dimensions],
        "fixed": [word for word in asked.job.space.words if isinstance(word, str)],
        "sampler": asked.sampler,
        "seed": asked.seed,
        "wanted": asked.trials,
        "floor": FLOOR,
        "rule": why,
        "counts": count,
        "front": [row["number"] for row in rows if row["frontier"]],
        "chosen": chosen["number"] if chosen else None,
        "trials": rows,
    }
    saying.write_data(data, output)
    saying.write_plot(choosing.board_of(found), output)
    page = saying.write_page(front, output)
    lacking = _write_chosen(asked, study, chosen, why) if chosen else f"nothing is chosen: {choosing.why_none(rows, asked.rule)}."
    if lacking:
        (output / saying.CHOSEN).unlink(missing_ok=True)  # of an earlier choice, by another rule
    saying.print_front(rows, chosen)
    print(f"trials: {saying.counted(count)}")
    for path in (None if lacking else output / saying.CHOSEN, page, output / saying.PLOT, output / saying.DATA):
        if path:
            print(path)
    failed = [row for row in rows if row["state"] == "failed" and row["number"] >= study.known]  # earlier ones were made up for
    problems = [f"{row['folder']} failed, {row['why']}" for row in failed]
    problems += [f"stopped: {hopeless}. The same command tries again."] if hopeless else []
    problems += [lacking] if lacking else []
    if problems:
        print("\n".join(problems), file=sys.stderr)
    return Reply(UNFIT if problems else DONE, {"output": str(output), **data, "problems": problems})


def _write_chosen(asked: Asked, study: Study, chosen: Mapping[str, Any], why: str) -> str:
    """The recipe that the chosen trial ran by: its folder's, as the file that the sweep reads may have been changed since.

    Returns:
        Why it could not be written; "" where it was.
    """
    job = asked.job
    point = next(one.point for one in study.trials() if one.number == chosen["number"])
    try:
        ran_by = recipe.load(job.output / chosen["folder"] / RECIPE, check=False)
    except Refused as error:
        return f"{chosen['folder']} is chosen, and its recipe cannot be read ({reason(error)}); no {saying.CHOSEN} was written."
    wanted = replace(ran_by, output=str(job.output / "chosen"))
    settings = " ".join(f"{key}={text}" for key, text in point.items())
    lines = [
        f"Chosen by `llm-unlearn sweep` of {job.path}: {why}.",
        f"{chosen['folder']} of {job.output}, {settings}: forgotten {chosen['forgotten']:.3f}, kept {chosen['kept']:.3f}.",
    ]
    lines += [f"It misses thresholds: {chosen['misses']}."] if chosen["misses"] else []
    saying.write_chosen(wanted, lines, job.output)
    return ""
