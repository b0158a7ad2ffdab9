"""Trials as child processes: each is the command that a user would type, watched while it runs, and read when it has ended."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder, recipe
from llm_unlearn.children import Child, how_it_ended, last_words
from llm_unlearn.reply import DONE, INTERRUPTED, TERMINATED, UNFIT
from llm_unlearn.report.ranking import scores_of
from llm_unlearn.report.verdict import Results
from llm_unlearn.spec import Refused
from llm_unlearn.sweeping.pruning import Look, behind, looks_in
from llm_unlearn.sweeping.space import Point, Space
from llm_unlearn.sweeping.study import Drawn, Study, name_of
from llm_unlearn.thresholds import reason_of

LOGS = "logs"
ALIKE = 3
"""So many trials that are the first to end, and fail the same way, end the sweep."""
PATIENCE = 2.0
"""Seconds until the study is asked again whether a trial of another process was left, and a run's file is read again."""


@dataclass(frozen=True)
class Job:
    """What every trial has in common."""

    path: Path
    """The recipe."""
    space: Space
    more: tuple[str, ...]
    """Words that every run gets besides those of its point."""
    output: Path
    basis: str
    """Stands for the recipe at the first point, which may not change while trials are compared."""
    watched: str
    """The file of a run folder by which trials are ended early; "" where none is."""

    def settings(self, point: Point, name: str) -> list[str]:
        """The `key=value` words of one trial."""
        return [*self.space.settings(point), *self.more, f"output={json.dumps(str(self.output / name), ensure_ascii=False)}"]

    def command(self, point: Point, name: str) -> list[str]:
        """The child process of one trial."""
        return [sys.executable, "-m", "llm_unlearn", "run", str(self.path), *self.settings(point, name), "--resume"]

    def wanted(self, point: Point, name: str) -> recipe.Recipe:
        """The recipe of one trial."""
        return recipe.load(self.path, self.settings(point, name))


def basis_of(wanted: recipe.Recipe) -> str:
    """Stands for a recipe but for its run folder and its suite, whose content is compared by itself."""
    evaluation = replace(wanted.evaluation, suite="") if wanted.evaluation else None
    return replace(wanted, evaluation=evaluation).hash


@dataclass
class Trials:
    """The orders that a sweep gives to its child processes (`children.Orders`)."""

    study: Study
    job: Job
    given: dict[str, Drawn] = field(default_factory=dict)
    """Name -> a trial that this process carries out."""
    cut: dict[str, str] = field(default_factory=dict)
    """Name -> why it was told to end."""
    again: set[str] = field(default_factory=set)
    """Those that were killed once while this process looked on."""
    waiting: list[Drawn] = field(default_factory=list)
    done: int = 0
    failures: list[str] = field(default_factory=list)
    """How trials of this process failed, without the digits in it."""
    good: int = 0
    """Trials of this process that did not fail."""
    hopeless: str = ""
    """Why no further trial is begun."""
    looks: dict[str, list[Look]] = field(default_factory=dict)
    """Of trials that are done."""
    compared: Results | None = None
    """The evaluation of one of them, for the models before and retrained, which are every trial's."""
    asked: float = 0.0
    looked: dict[str, float] = field(default_factory=dict)

    def next(self) -> Child | None:
        if self.hopeless or (not self.waiting and time.monotonic() < self.asked):
            return None
        drawn = self.waiting.pop() if self.waiting else self.study.next()
        if drawn is None:
            self.asked = time.monotonic() + PATIENCE
            return None
        name = name_of(drawn.number)
        self.given[name] = drawn
        if self.job.basis != basis_of(self.job.wanted(_first(self.job.space), name)):
            raise Refused(
                f"{self.job.path}: was changed while its sweep was under way. Change it back, or choose another --output."
            )
        return Child(name, self.job.command(drawn.point, name), self.job.output / LOGS / f"{name}.txt", (drawn.held.file,))

    def ended(self, child: Child, status: int) -> str:
        drawn, name = self.given.pop(child.name), child.name
        killed = status < 0 or status in (INTERRUPTED, TERMINATED)
        if killed and name not in self.cut and name not in self.again:
            self.again.add(name)
            self.waiting.append(drawn)
            return f"{name}: {how_it_ended(status)}; it goes on from its newest checkpoint"
        said = self._tell(drawn, name, status, child.log)
        drawn.held.release()  # only now: a trial that is under way and not locked is taken up by another process
        self.asked, self.done = 0.0, self.done + 1
        return said

    def _tell(self, drawn: Drawn, name: str, status: int, log: Path) -> str:
        """Tell the study how a trial ended; the same in words."""
        place = self.job.output / name
        results = _results_in(place) if status in (DONE, UNFIT) else None
        if name in self.cut and results is None and (status < 0 or status in (INTERRUPTED, TERMINATED)):
            shutil.rmtree(place / folder.CHECKPOINTS, ignore_errors=True)  # it is never gone on with
            self.study.ended(drawn.number, "PRUNED", {"why": self.cut[name]})
            self.good += 1
            return f"{name} ended: {self.cut[name]}"
        if isinstance(facts := _told(results), str):
            why = f"{how_it_ended(status)}: {last_words(log)}" if results is None and status else facts
            self.study.ended(drawn.number, "FAIL", {"why": why})
            self._count(why)
            return f"{name} failed, {why} ({log})"
        self.study.done(drawn.number, (facts["forgotten"], facts["kept"]), facts)
        self.good += 1
        return f"{name}: forgotten {facts['forgotten']:.3f}, kept {facts['kept']:.3f}{_settings(drawn.point)}"

    def unwanted(self, running: Iterable[Child]) -> Iterable[Child]:
        if not self.job.watched:
            return
        for child in running:
            if child.name not in self.cut and time.monotonic() > self.looked.get(child.name, 0.0):
                self.looked[child.name] = time.monotonic() + PATIENCE
                if why := self._behind(child.name):
                    self.cut[child.name] = why
                    yield child

    def _behind(self, name: str) -> str:
        others = [one.name for one in self.study.trials() if one.state == "complete"]
        if others and self.compared is None and self.job.watched == folder.ALONG:
            self.compared = _results_in(self.job.output / others[0])
        for other in others:
            if other not in self.looks:
                self.looks[other] = looks_in(self.job.output / other, self.job.watched, self.compared)
        mine = looks_in(self.job.output / name, self.job.watched, self.compared)
        return behind(mine, [self.looks[other] for other in others])

    def _count(self, why: str) -> None:
        """End the sweep where nothing but the same failure has come of it."""
        self.failures.append(re.sub(r"\d+", "#", why))
        if not self.good and len(self.failures) >= ALIKE and len(set(self.failures)) == 1:
            self.hopeless = f"the first {len(self.failures)} trials failed the same way: {why}"

    def release(self) -> None:
        """Let go of what is not carried out any more; another process, or this command again, takes it up."""
        for drawn in (*self.given.values(), *self.waiting):
            drawn.held.release()


def _first(space: Space) -> Point:
    return {one.key: one.ends[0] for one in space.dimensions}


def _settings(point: Point) -> str:
    return "".join(f" {key}={value}" for key, value in point.items())


def _results_in(place: Path) -> Results | None:
    try:
        return folder.results_in(place)
    except Refused:
        return None


def _told(results: Results | None) -> dict[str, Any] | str:
    """What a study is told of a run, or how it failed: a run that a loss broke has numbers, but not those of its recipe."""
    if results is None:
        return f"ended without {folder.RESULTS}"
    run: Mapping[str, Any] | None = results.get("run")
    if not run:
        return f"has an {folder.RESULTS} that is not its run's, as `evaluate --overwrite` writes it"
    if run.get("broken"):
        return f"stopped: {run['reason']}"
    scores = scores_of(results)
    if scores["score"] is None:
        return "has no score: no measure tells the model before from the retrained one"
    how = {key: run[key] for key in ("status", "reason", "steps", "kept_step", "seconds")}
    return {**scores, **how, "misses": reason_of(results.get("thresholds", ()))}
