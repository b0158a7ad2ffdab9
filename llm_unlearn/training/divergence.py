"""Runs that come to nothing good: what is not finite, explodes, stands still or forgets nothing, noticed within a few steps.

    a loss or gradient that is not finite: in that step, before it is taken
    a loss that holds the model (any that is not of the forget set), or the gradient, far beyond what it was: after BEYOND such
        steps in a row, from the HISTORY-th on
    not one trained weight moved: after STILL steps at the full learning rate, or at the end
    a forget loss that is the same, or 0, since the first step: after UNCHANGED steps at the full learning rate

The bounds are far from all that sound runs do (`tests/test_divergence.py` carries out every shipped recipe), so nobody sets them. A
forget loss is never judged by its size: ascent's falls without bound. At the full learning rate means at least half of `train.lr`,
as a warm-up may begin with steps that round to nothing. The model's side effects have bounds of their own (`train.stop`, guard.py).

A run with a guarantee ends by nothing that the guarantee does not cover (docs/privacy.md). Under `train.privacy` only the noisy
gradient and the weights are checked, no loss. A certified run is checked from its last noisy step on; nothing earlier is restored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_unlearn.models.load import trainable
from llm_unlearn.models.sharded import is_sharded
from llm_unlearn.objectives.terms import set_of
from llm_unlearn.spec import Refused
from llm_unlearn.training.checkpoint import Progress, snapshot
from llm_unlearn.training.guard import Outcome
from llm_unlearn.training.job import Job

STILL, UNCHANGED, BEYOND, HISTORY = 10, 20, 5, 10
RECENT = 50
"""The median is that of so many steps."""
LOSS_TIMES, LOSS_LEAST = 1000.0, 0.05
"""So many times its median, which counts as this at least: for a loss in nats, a probability of e⁻⁵⁰ for every token."""
GRADIENT_TIMES, GRADIENT_LEAST = 1e4, 0.01
SAME = 1e-6
"""Relative to its size, a loss that changes less than this is the same."""
PART = 1 << 20
"""So many weights at a time."""
LARGEST = 1 << 28
"""Up to so many trained weights a copy of good ones is kept in memory, where no probe keeps one."""


class Watch:
    """What is remembered of a run's steps, all of it in `progress`, so that a resumed run ends where an undisturbed one does."""

    def __init__(self, job: Job, model: nn.Module, progress: Progress, accelerator: Accelerator) -> None:
        self.job, self.model, self.progress, self.accelerator = job, model, progress, accelerator
        self.weights = list(trainable(model).values())
        small = sum(weight.numel() for weight in self.weights) <= LARGEST and not is_sharded(model)
        self.copies, self.sharded = small and not job.settings.stop, is_sharded(model)
        self.forget = [] if job.private else [name for name, term in job.terms.items() if set_of(term, name) == "forget"]
        self.first = job.certified.settings.noisy_steps if job.certified else 0
        """Steps that end no run: they read weights that the certificate does not cover."""
        self.history = 1 if job.certified else HISTORY  # after the noise a loss that is learnt begins as what it was before
        self.warned = False

    def _begin(self) -> None:
        """Remember the start, or where a checkpoint of an earlier version was gone on with."""
        since = self.progress.step
        self.progress.watch = {"since": since, "start": self._digest(), "full": 0, "seen": {}, "beyond": {}, "range": {}}
        self.progress.safe, self.progress.safe_step = {}, 0
        self._copy()

    def _read(self, row: Mapping[str, float]) -> dict[str, float]:
        """Return the values that may end the run: of a private run, no loss, as losses are computed from the rows without noise."""
        return {name: value for name, value in row.items() if not (self.job.private and name in self.job.terms)}

    def _warn(self, row: Mapping[str, float]) -> None:
        """Say once that a value is not finite and does not end the run."""
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if broken and not self.warned and self.accelerator.is_main_process:
            print(NOT_ENDED.format(", ".join(broken), self.progress.step + 1), file=sys.stderr)
        self.warned = self.warned or bool(broken)

    def before(self, row: Mapping[str, float], weights: Mapping[str, float]) -> Outcome | None:
        """How a step that must not be taken ends the run; the weights are still those before it.

        Args:
            row: what the step says: terms, learning rate, norm of the gradient.
            weights: term -> its weight.

        Raises:
            Refused: nothing would be learnt or forgotten.
        """
        progress = self.progress
        if progress.step < self.first:
            self._warn(row)
            return None
        if not progress.watch or progress.watch.get("since", 0) < self.first:  # the latter of an earlier version's checkpoint
            self._begin()
        read = self._read(row)
        self._warn({name: value for name, value in row.items() if name not in read})
        broken = [name for name, value in read.items() if not math.isfinite(value)]
        if broken:
            reason = f"{', '.join(broken)} not finite at step {progress.step + 1}"
            if progress.good or all(bool(torch.isfinite(_local(weight)).all()) for weight in self.weights):
                return Outcome("stopped", progress.step, progress.good_step if progress.good else progress.step, reason, True)
            return self._ended(reason)
        fading_in = any(weight == 0 for weight in weights.values()) and any(weights.values())
        if progress.step == 0 and row["grad_norm"] == 0 and not fading_in:
            raise Refused(
                "objective: not one trainable weight received a gradient in the first step, so nothing would be learnt or "
                "forgotten."
            )
        return self._exploded(read)

    def after(self, row: Mapping[str, float], weights: Mapping[str, float]) -> Outcome | None:
        """How a step that was taken ends the run. `progress` counts it already."""
        progress, watch = self.progress, self.progress.watch
        if progress.step <= self.first:
            return None
        if row["lr"] >= 0.5 * self.job.settings.lr:
            watch["full"] += 1
            self._note(row, weights)
        last = progress.step == self.job.schedule.steps
        if (watch["full"] == STILL or (last and watch["full"] < STILL)) and not self._moved(watch["start"]):
            return Outcome("stopped", progress.step, progress.step, STOOD_STILL.format(progress.step - self.first, row["lr"]), True)
        if watch["full"] == UNCHANGED:
            for name, (low, high, count) in watch["range"].items():
                if count == UNCHANGED and high - low <= SAME * max(abs(low), abs(high)):
                    said = "is exactly 0" if not low and not high else f"is {high:.6g}, the same"
                    return self._ended(FORGETS_NOTHING.format(name, said, progress.step))
        if self.copies and progress.step % HISTORY == 0 and not any(watch["beyond"].values()):
            self._copy()
        return None

    def _note(self, row: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """The range of every forget loss, as far as it is meant to count."""
        for name in self.forget:
            term = self.job.terms[name]
            if name in row and weights[name] >= 0.5 * max(term.weight_at(0.0), term.weight_at(1.0)) > 0:
                low, high, count = self.progress.watch["range"].get(name, (row[name], row[name], 0))
                self.progress.watch["range"][name] = (min(low, row[name]), max(high, row[name]), count + 1)

    def _exploded(self, row: Mapping[str, float]) -> Outcome | None:
        watch = self.progress.watch
        bounds = {name: (LOSS_TIMES, LOSS_LEAST) for name in self.job.terms if name in row and name not in self.forget}
        bounds["grad_norm"] = (GRADIENT_TIMES, GRADIENT_LEAST)
        for name, (times, least) in bounds.items():
            value, seen = abs(row[name]), watch["seen"].setdefault(name, [])
            usual = max(median(seen), least) if len(seen) >= self.history else math.inf
            if value <= times * usual:
                watch["beyond"][name] = 0
                watch["seen"][name] = [*seen, value][-RECENT:]
                continue
            watch["beyond"][name] = watch["beyond"].get(name, 0) + 1
            if watch["beyond"][name] >= BEYOND:
                return self._ended(EXPLODED.format(name, value, value / usual, BEYOND, self.progress.step + 1))
        return None

    def _ended(self, reason: str) -> Outcome:
        """With the last good weights: the probe's, or the last copy; where there is none, those that are there."""
        progress = self.progress
        kept = progress.good_step if progress.good else progress.safe_step if progress.safe else progress.step
        return Outcome("stopped", progress.step, kept, reason, True)

    def _copy(self) -> None:
        if self.copies:
            self.progress.safe, self.progress.safe_step = snapshot(self.model), self.progress.step

    def _digest(self) -> list[float]:
        """Two sums over every weight, of a sharded one over every process's part; other weights have others. All processes have
        the same, as one of them saves what is remembered of the start."""
        sums = torch.stack([_sums(_local(weight.detach())) for weight in self.weights])
        found: Any = self.accelerator.gather(sums) if self.sharded else sums
        return [float(one) for one in found.flatten().cpu()]

    def _moved(self, start: list[float]) -> bool:
        """Whether any process has a weight that is not what it was."""
        moved = torch.tensor(float(self._digest() != start), device=self.accelerator.device)
        found: Any = self.accelerator.reduce(moved, "sum")
        return float(found) > 0


STOOD_STILL = (
    "not one trained weight has moved in {} steps: train.lr ({:.3g} now) may be too small for the precision of the weights, or no "
    "loss reaches what is trained (model.adapter.targets, model.trainable)"
)
FORGETS_NOTHING = (
    "objective.{} {} since the first of {} steps, so nothing is forgotten: its loss is saturated by its settings, or reaches "
    "nothing that is trained, or train.lr is far too small"
)
NOT_ENDED = (
    "warning: {} not finite at step {}; gradients that are not finite count as 0 here, and the run goes on: where it ended would "
    "depend on what its guarantee hides"
)
EXPLODED = "{} is {:.3g}, {:.2g} times what it was, {} steps in a row, at step {}; a smaller train.lr may help"


def _local(weight: Tensor) -> Tensor:
    """This process's part of a weight."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


def _sums(weight: Tensor) -> Tensor:
    """Of the values and of their squares, in double precision; part by part, as a copy of a large vocabulary's weights would take
    gigabytes."""
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for part in torch.split(weight.reshape(-1), PART):
        values = part.double()
        total[0] += values.sum()
        total[1] += values.square_().sum()
    return total
