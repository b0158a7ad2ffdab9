"""The training loop: window by window a gradient, what rules make of it, one optimizer step, and a look at the dose."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from llm_unlearn.bars import Bar
from llm_unlearn.data.batch import Layout
from llm_unlearn.models.experts import recorded_routers
from llm_unlearn.models.load import causal, earlier_directions, trainable
from llm_unlearn.models.optimizer import make_optimizer
from llm_unlearn.models.scores import Scorer, checkpoint_activations, head_of
from llm_unlearn.models.training_mode import check_training_mode, enable_training
from llm_unlearn.models.trials import can_pack, check_depth, check_head, freeze_unreached
from llm_unlearn.objectives.terms import Ramp, Term, set_of
from llm_unlearn.objectives.views import ROUTERS, TOP, WHOLE
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused
from llm_unlearn.training.before import Shelf, reference_of
from llm_unlearn.training.checkpoint import Checkpoints, Progress, restore
from llm_unlearn.training.clipped import Clipped
from llm_unlearn.training.divergence import Watch
from llm_unlearn.training.during import during
from llm_unlearn.training.fisher import fisher, some
from llm_unlearn.training.gradients import Latent, Orthogonal, Saliency, TrustRegion, total
from llm_unlearn.training.guard import Outcome, Probe, ending, first, judge
from llm_unlearn.training.job import Job
from llm_unlearn.training.log import Log
from llm_unlearn.training.progress import Said
from llm_unlearn.training.room import fitting, out_of_memory
from llm_unlearn.training.sharded import prepare
from llm_unlearn.training.signals import signals
from llm_unlearn.training.tracking import tell_step
from llm_unlearn.training.vectors import Gradient
from llm_unlearn.training.window import Model, Window
from llm_unlearn.troubles import is_out_of_memory


def train(
    job: Job, model: Any, accelerator: Accelerator, folder: Path, *, resume: bool = False,
    look: Callable[[int], None] | None = None, title: str = "forgetting", shelf: Shelf | None = None,
) -> Outcome:  # fmt: skip
    """Train the trainable weights of `model`, in place.

    Args:
        folder: gets `log.jsonl` and `checkpoints/`.
        resume: go on from the newest checkpoint in `folder`, if there is one.
        look: called after every step on every process, for evaluation along the way.
        title: of the progress bar.
        shelf: where numbers of the model as it was are kept between runs.

    Raises:
        Refused: no trainable weight receives a gradient, or the architecture is not supported.
        OutOfMemory: a step does not fit; the last checkpoint is there.
    """
    training = Training(job, model, accelerator, shelf)
    progress, steps, every = training.progress, job.schedule.steps, job.settings.checkpoint_every
    parts = (model, progress, training.scheduler, training.optimizer, training.model.wrapped)
    checkpoints = Checkpoints(folder / "checkpoints", accelerator, *parts)
    resumed = resume and checkpoints.load()
    training.settle()
    main, outcome = accelerator.is_main_process, None
    log, said = Log(folder / "log.jsonl", main, progress.step), Said(job.terms, accelerator.device)
    with Bar(title, steps, "step", done=progress.step, quiet=not main, stays=True) as bar, signals() as asked:
        if not resumed:
            outcome = training.begin()
        elif look:
            look(progress.step)  # it may have been ended between this step's checkpoint and this step's look
        while progress.step < steps and outcome is None:
            began = time.perf_counter()
            try:
                row, outcome = training.step(asked.is_set())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise out_of_memory(training.layout, progress.step + 1) from None
            row["seconds"] = round(time.perf_counter() - began, 4)
            log.write(row)
            tell_step(accelerator, row)
            bar.update(progress.step - bar.n, said(row))
            if (progress.step % every == 0 and outcome is None) or (outcome and outcome.status == "interrupted"):
                log.settle()
                checkpoints.save()
            if look and outcome is None:
                look(progress.step)
    outcome = outcome or ending(training.probe, progress)
    if outcome.status != "interrupted" and outcome.kept != progress.step and (kept := progress.good or progress.safe):
        restore(model, kept)
    checkpoints.close()
    model.eval()
    return outcome


def check(job: Job, model: Any) -> None:
    """Whether this model can be read as the job's losses and rules read it; a few tokens go through it.

    Raises:
        Refused: its architecture is not supported, or a layer that is named is not there.
    """
    check_head(model)
    check_training_mode(model)
    read = {layer for layers in job.layers.values() for layer in layers}
    if ROUTERS in read:
        recorded_routers(causal(model))
    layers = read - WHOLE
    for chosen in (layers, *({rule.layer} for rule in job.settings.rules if isinstance(rule, Latent))):
        if chosen:
            check_depth(model, tuple(sorted(chosen)))


class Training:
    """A model under training, and the optimizer step; what a rule may ask of it is `gradients.Step`."""

    def __init__(self, job: Job, model: Any, accelerator: Accelerator, shelf: Shelf | None = None) -> None:
        settings, schedule = job.settings, job.schedule
        check(job, model)
        if all(TOP not in read for read in job.layers.values()):
            freeze_unreached(model, tuple(sorted({layer for read in job.layers.values() for layer in read})))
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        enable_training(model)
        self.job, self.net, self.accelerator, self.progress = job, model, accelerator, Progress()
        scorer, head = Scorer(model), head_of(model)
        self.probe = Probe.of(settings.stop, job.examples, job.seed, settings.batch_tokens, job.aim) if settings.stop else None
        optimizer = make_optimizer(settings, trainable(model).values(), accelerator.device)
        self.noisy_steps = job.certified.settings.noisy_steps if job.certified else 0
        self.scheduler = _make_scheduler(settings, optimizer, schedule.steps - self.noisy_steps)
        # gradients of single rows want a row to each; a reference that is a copy must read packed sequences as the model does
        packed = not job.private and can_pack(model, job.longest)
        reference = reference_of(job, scorer, head, accelerator, settings.batch_tokens, shelf)
        inside = during(settings, model, accelerator, packed)
        wrapped, self.optimizer = prepare(scorer, optimizer, accelerator)
        self.model = Model(wrapped, scorer, head, reference, inside)
        self.weights = list(trainable(model).values())
        self.directions = _directions(settings, trainable(model))
        self.forget = {name: term for name, term in job.terms.items() if set_of(term, name) == "forget"}
        self.others = {name: term for name, term in job.terms.items() if name not in self.forget}
        self.layout = Layout(settings.batch_tokens, packed)
        self.window = Window(job, 0, accelerator, self.layout)
        self.clipped = Clipped.of(job, self.model, accelerator)
        self.watch = Watch(job, model, self.progress, accelerator)
        self.row: dict[str, float] = {}

    def settle(self) -> None:
        """Find how many tokens fit into memory, where that is asked; a resumed run keeps what it found."""
        if self.job.settings.micro_batch == "auto":
            found = self.progress.batch_tokens or fitting(self.job, self.model, self.accelerator, self.layout.packed)
            self.progress.batch_tokens, self.layout = found, replace(self.layout, tokens=found)
            if self.accelerator.is_main_process:
                print(f"micro-batches of at most {found:,} tokens")

    def begin(self) -> Outcome | None:
        """What is measured once, before the first step: the probe's values, and what rules remember of the start.

        Returns:
            How the run ends, where its aim is reached before it begins.
        """
        progress = self.progress
        progress.multipliers = {name: term.weight_at(0.0) for name, term in self.job.terms.items() if term.budget}
        if self.job.certified:
            progress.memory["reference"] = self.job.certified.begin(self.net, self.accelerator)
        for rule in self.job.settings.rules:
            if isinstance(rule, (Saliency, TrustRegion)):
                rule.begin(self)
        if self.probe:
            return first(self.probe, self.probe.look(self.model.scorer, self.model.head, self.accelerator), progress, self.net)
        return None

    def step(self, asked: bool) -> tuple[dict[str, float], Outcome | None]:
        """One window, one optimizer step.

        Args:
            asked: this process was asked to stop.

        Returns:
            The line of the log, and how the run ended where this step ended it.
        """
        progress, settings, probe = self.progress, self.job.settings, self.probe
        self.window = Window(self.job, progress.step, self.accelerator, self.layout)
        self.row = {"step": progress.step + 1, "lr": self.scheduler.get_last_lr()[0]}
        if self.clipped:
            self.row |= self.clipped.backward(self.window, self.job.terms, self.multipliers(self.job.terms), progress.step)
        elif settings.rules:
            for weight, slope in zip(self.weights, total(settings.rules, self), strict=True):
                weight.grad = slope
        else:
            self.row |= self.window.backward(self.job.terms, self.multipliers(self.job.terms), self.model)
        moving = {name: term for name, term in self.job.terms.items() if term.budget or isinstance(term.weight, Ramp)}
        self.row |= {f"{name}_weight": weight for name, weight in self.multipliers(moving).items()}
        self.row["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.weights, settings.clip or float("inf")))
        self.row["tokens"] = self.window.tokens
        if unfit := self.watch.before(self.row, weights := self.multipliers(self.job.terms)):
            return self.row, unfit
        self._move()
        progress.step += 1
        self.row |= self.job.private.spent(progress.step) if self.job.private else {}
        outcome = None
        if self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum") > 0:
            outcome = Outcome("interrupted", progress.step, progress.step, "asked to stop")
        if probe and (progress.step % probe.stop.every == 0 or progress.step == self.job.schedule.steps):
            seen = probe.look(self.model.scorer, self.model.head, self.accelerator)
            self.row |= seen
            outcome = judge(probe, seen, progress, self.net, quiet=not self.accelerator.is_main_process) or outcome
        return self.row, self.watch.after(self.row, weights) or outcome

    def _move(self) -> None:
        """The optimizer's step, what a trust region leaves of it, and budgets; or a noisy step, not to be remembered."""
        if self.job.certified and self.progress.step < self.noisy_steps:
            self.job.certified.move(self.weights, self.memory["reference"], self.progress.step)
            self.optimizer.zero_grad()
            return
        region = next((rule for rule in self.job.settings.rules if isinstance(rule, TrustRegion)), None)
        before = [weight.detach().clone() for weight in self.weights] if region else []
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if region:
            region.after(self, before)
        for name, term in self.job.terms.items():
            if term.budget and self.window.denominator(name, term):
                found = self.progress.multipliers[name] + term.budget.rate * (self.row[name] - term.budget.at_most)
                self.progress.multipliers[name] = max(0.0, found)

    # ------------------------------------------------------------------------------------------------ what rules ask

    @property
    def memory(self) -> dict[str, Gradient]:
        return self.progress.memory

    def multipliers(self, terms: Mapping[str, Term]) -> dict[str, float]:
        """Term -> its weight in this step."""
        share = self.progress.step / max(1, self.job.schedule.steps - 1)
        return {name: self.progress.multipliers.get(name, term.weight_at(share)) for name, term in terms.items()}

    def gradient(self, terms: Mapping[str, Term], latent: Latent | None = None) -> Gradient:
        self.optimizer.zero_grad()
        means = self.window.backward(terms, self.multipliers(terms), self.model, latent) if terms else {}
        self.row |= {name: value for name, value in means.items() if name not in self.row}  # the first of a step is logged
        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone() for weight in self.weights]
        self.optimizer.zero_grad()
        return found

    def measured(self, terms: Mapping[str, Term]) -> dict[str, float]:
        return self.window.means(terms, self.model)

    def importance(self, stream: str, rows: int) -> Gradient:
        examples = some(self.job.examples[stream], rows, self.job.seed, "importance")
        return fisher(self.model.scorer, self.model.head, self.weights, examples, self.accelerator)

    def earlier(self) -> Sequence[Sequence[torch.Tensor]]:
        return [self.directions.get(name, []) for name in trainable(self.net)]

    def note(self, name: str, value: float) -> None:
        self.row[name] = value


def _make_scheduler(settings: Train, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The course of the learning rate, without the warm-up's first rate, which is 0: a step for nothing."""
    warmup = round(settings.warmup * steps)
    scheduler = get_scheduler(settings.schedule, optimizer, warmup, steps + 1)
    if warmup:
        optimizer.step()  # nothing has a gradient yet: only tells torch that the order of the two is meant
        scheduler.step()
    return scheduler


def _directions(settings: Train, weights: Mapping[str, nn.Parameter]) -> dict[str, list[torch.Tensor]]:
    """Name of a trained A matrix -> the same matrix in the adapters of earlier requests.

    Raises:
        Refused: an adapter has none for any trained layer.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for adapter in (one for rule in settings.rules if isinstance(rule, Orthogonal) for one in rule.adapters):
        mine = {name: a for name, a in earlier_directions(adapter).items() if name in weights}
        if not mine or any(a.shape[1] != weights[name].shape[1] for name, a in mine.items()):
            raise Refused(f"train.rules: orthogonal: {adapter} adapts no layer that is trained here, or one of another model.")
        for name, a in mine.items():
            found.setdefault(name, []).append(a.to(weights[name]))
    return found
