"""Which trials are not worth their end: the rule, and what it reads of a run that is under way.

Optuna's own pruners take one number per trial and refuse a study of two. The rule here is that of its median, asked on both sides:

    a trial is ended when at each of its last three looks it had forgotten less *and* kept less than the median of the trials that
    are done had at that step.

Forgetting and keeping are bought with each other, so a trial that is behind on one side alone may be another point of the
frontier, and is left to run: a small learning rate forgets late but harms nothing until then. One that is behind on both pays more
for less than half of the others did, and such a trial rarely becomes one that nothing beats. Trials that ended before a step, as
they had reached their aim, count with their last look: a slow trial is compared with what fast ones made of the time. Only trials
with numbers of their own are counted, not those that were ended early, which would lower the bar with every one more.

A run that has hardly moved differs from others in the fourth figure only, and its place among them says nothing yet (seen in the
first real sweep, docs/sweeps.md). So none is judged before it has gone half as many steps as the median of those that are done, nor
before five are done; and one look may be chance, three in a row are not.

What is read: with `evaluation.every`, forgotten and kept themselves, from `evaluations.jsonl`. Else the looks of `train.stop` in
`log.jsonl`: the forget set's perplexity, which only rises to its aim, as the run ends there, and the retain set's, the lower the
better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llm_unlearn import folder
from llm_unlearn.methods.registry import Edit
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.ranking import against, scores_of, values_of
from llm_unlearn.report.verdict import Results

TRIALS, LOOKS, SHARE = 5, 3, 0.5
"""Trials that must be done; looks in a row at which a trial must be behind; the share of the median's steps it must have gone."""


@dataclass(frozen=True)
class Look:
    """How far a run was at a step; of both, more is better, and neither has a unit."""

    step: int
    forgotten: float
    kept: float


def readable(wanted: Recipe) -> str:
    """What a run of this recipe says of itself on the way: the name of a file of its folder; "" where it says too little."""
    if wanted.evaluation and wanted.evaluation.every:
        return folder.ALONG
    if isinstance(wanted.method, Edit):  # one step, at several strengths
        return ""
    stop = wanted.train.stop
    return folder.LOG if stop and stop.until is not None and wanted.data.retain else ""


def looks_in(path: Path, file: str, done: Results | None) -> list[Look]:
    """The looks of one run, in order.

    Args:
        path: the run folder.
        file: what `readable` gives.
        done: the evaluation of a run that is done, for the models that `evaluations.jsonl` is compared with.
    """
    rows = folder.steps_in(path / file)
    return list(_by_suite(rows, done) if file == folder.ALONG else _by_probe(rows))


def _by_probe(rows: Iterable[Mapping[str, Any]]) -> Iterable[Look]:
    for row in rows:
        forget, retain = (float(row.get(f"{name}_perplexity", math.nan)) for name in ("forget", "retain"))
        if 0 < forget < math.inf and 0 < retain < math.inf:  # a step that was not looked at has neither
            yield Look(int(row["step"]), math.log(forget), -math.log(retain))


def _by_suite(rows: Iterable[Mapping[str, Any]], done: Results | None) -> Iterable[Look]:
    """Rows have the numbers of the model under training only; the models before and retrained are every run's."""
    if done is None:
        return
    common = {column: values_of(done, column) for column in ("before", "retrained")}
    for row in rows:
        scores = scores_of(against({"numbers": row["numbers"]}, common))
        if scores["score"] is not None:
            yield Look(int(row["step"]), scores["forgotten"], scores["kept"])


def behind(mine: Sequence[Look], done: Iterable[Sequence[Look]]) -> str:
    """Why a trial is to be ended, in words; "" if it is not.

    Args:
        mine: the looks at it so far.
        done: of each trial that has its numbers, the looks at it.
    """
    found = [looks for looks in done if looks]
    if len(mine) < LOOKS or len(found) < TRIALS:
        return ""
    now = mine[-1].step
    if now < SHARE * median(looks[-1].step for looks in found) or not all(_worse(look, found) for look in mine[-LOOKS:]):
        return ""
    return f"until step {now}, {LOOKS} looks in a row, it had forgotten less and kept less than the median of {len(found)} trials"


def _worse(mine: Look, done: Sequence[Sequence[Look]]) -> bool:
    """Whether a look is behind the median on both sides; not where fewer than enough trials had been looked at by then."""
    then = [last for looks in done if (last := _at(looks, mine.step))]
    if len(then) < TRIALS:
        return False
    return mine.forgotten < median(look.forgotten for look in then) and mine.kept < median(look.kept for look in then)


def _at(looks: Sequence[Look], step: int) -> Look | None:
    """The last look until a step."""
    return next((look for look in reversed(looks) if look.step <= step), None)
