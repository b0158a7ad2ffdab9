"""A method that edits weights once, carried out: what it may ask (`methods/edits.py`), and the strength that the dose allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_unlearn.bars import walk
from llm_unlearn.data.batch import cut, lay_out
from llm_unlearn.data.examples import Example, draw
from llm_unlearn.methods.combination import Combination
from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.edits import strengths_of
from llm_unlearn.methods.registry import Edit
from llm_unlearn.models.combined import combine
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import causal, trainable
from llm_unlearn.models.scores import Scorer, head_of, score
from llm_unlearn.spec import Refused
from llm_unlearn.training.checkpoint import Progress, restore
from llm_unlearn.training.fisher import fisher, slopes, some
from llm_unlearn.training.guard import Outcome, Probe, ending, first, judge
from llm_unlearn.training.job import Job
from llm_unlearn.training.log import Log
from llm_unlearn.training.loop import train
from llm_unlearn.training.tracking import tell_step
from llm_unlearn.training.vectors import Gradient, norm, plus, put

Influences = list[dict[str, Any]]
"""One record per row: {stream, row, influence}."""


def edit(
    method: Edit, job: Job, model: Any, accelerator: Accelerator, folder: Path, *, resume: bool = False
) -> tuple[Outcome, Influences, Combination | None]:
    """Edit the trainable weights of `model`, in place: at the strength that comes nearest to the dose within the budget, or at the
    only one that is given. An edit that was killed is made anew; a training inside it goes on from its checkpoint.

    Args:
        folder: gets `log.jsonl`: after the steps of a training, one line per strength, the first (0) of the model as it was.

    Returns:
        How it ended; the influence of every row where the method finds it; and what is to be made of the base's logits and the
        edited model's, where the method combines them.
    """
    situation = Editing(method, job, model, accelerator, folder, resume)
    start, progress, stop = situation.weights, Progress(), job.settings.stop
    probe = Probe.of(stop, job.examples, job.seed, job.settings.batch_tokens, job.aim) if stop else None
    before = probe.look(situation.scorer, situation.head, accelerator) if probe else {}
    if probe and (done := first(probe, before, progress, model)):
        return done, [], None
    try:
        at = method.prepare(situation)
    except Ended as end:
        put(situation.theta, start)
        return end.outcome, [], None
    log = Log(folder / "log.jsonl", accelerator.is_main_process, situation.trained)
    log.write({"step": situation.trained, **situation.noted(), **before})
    outcome = Outcome("finished", situation.trained + 1, situation.trained + 1)
    for strength in situation.bar(strengths_of(method), f"{method.name}: {method.knob}", "strength"):
        progress.step += 1
        weights = at(strength)
        distance = norm(plus(weights, start, -1))
        seen: dict[str, float] = {}
        if math.isfinite(distance):
            put(situation.theta, weights)
            seen = probe.look(*situation.asked(_combination(method, strength)), accelerator) if probe else {}
            if probe:
                judge(probe, seen, progress, model, quiet=not accelerator.is_main_process)
        elif not probe:
            outcome = Outcome("stopped", situation.trained + 1, 0, f"{method.knob} {strength:g}: weights are not finite", True)
        row = {"step": situation.trained + progress.step, method.knob: strength, "distance": distance}
        row |= {**situation.noted(), **seen}
        log.write(row)
        tell_step(accelerator, row)
    if probe:
        restore(model, progress.good)
        outcome = _chosen(method, probe, progress, situation.trained)
    model.eval()
    taken = strengths_of(method)[outcome.kept - situation.trained - 1] if outcome.kept else None
    if taken is None and isinstance(method, Contrast):
        put(situation.theta, start)  # nothing is to be taken from the base
    return outcome, situation.told, None if taken is None else _combination(method, taken)


def _combination(method: Edit, strength: float) -> Combination | None:
    return method.combination(strength) if isinstance(method, Contrast) else None


def _chosen(method: Edit, probe: Probe, progress: Progress, trained: int) -> Outcome:
    """What is said of the strength that was taken; steps count on from those of a training inside."""
    outcome, gap = ending(probe, progress, "greater strengths"), probe.gap(progress.good_look)
    said = outcome.reason if gap is not None and gap > 0 else probe.compared(progress.good_look) if gap is not None else ""
    if not outcome.kept:
        reason = f"no {method.knob} was within the budget and nearer to the aim" + (f"; {said}" if said else "")
        return replace(outcome, step=trained + outcome.step, reason=reason)
    reason = f"{method.knob} {strengths_of(method)[outcome.kept - 1]:g} was taken" + (f"; {said}" if said else "")
    return replace(outcome, step=trained + outcome.step, kept=trained + outcome.kept, reason=reason)


class Ended(Exception):
    """The training inside an edit did not come to its end."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Editing:
    """A model under edit; what a method may ask of it is `methods.edits.Situation`."""

    def __init__(self, method: Edit, job: Job, model: Any, accelerator: Accelerator, folder: Path, resume: bool) -> None:
        self.method, self.job, self.net, self.accelerator = method, job, model, accelerator
        self.folder, self.resume, self.trained = folder, resume, 0
        self.scorer, self.head = Scorer(model), head_of(model)
        self.theta = list(trainable(model).values())
        self.told: Influences = []
        self._row: dict[str, float] = {}

    @property
    def weights(self) -> Gradient:
        return [weight.detach().clone() for weight in self.theta]

    @property
    def directions(self) -> Sequence[bool]:
        return [".lora_A." in name for name in trainable(self.net)]

    def asked(self, combination: Combination | None) -> tuple[Scorer, Head]:
        """What a look reads: the model, or what its logits and the base's are to be made into."""
        if not combination:
            return self.scorer, self.head
        model = combine(causal(self.net), combination)
        return Scorer(model), head_of(model)

    def rows(self, stream: str) -> int:
        return len(self.job.examples[stream])

    def gradient(self, stream: str) -> Gradient:
        examples = self.job.examples[stream]
        return self._summed(examples, f"gradient of {stream}", self._slopes)

    def fisher(self, stream: str, rows: int) -> Gradient:
        title = f"importance to {stream}"
        return fisher(self.scorer, self.head, self.theta, self._some(stream, rows), self.accelerator, title)

    def curved(self, stream: str, rows: int, vector: Gradient) -> Gradient:
        def product(examples: list[Example]) -> list[Tensor]:
            """The Hessian of Σ KL(p ‖ p_θ) at p = p_θ is the Gauss–Newton matrix: where the two are one, p_θ − p = 0 takes away
            what the curvature of the logits would add."""
            batch = lay_out(examples).to(self.accelerator.device)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), self.accelerator.autocast():  # others have no second derivative
                every = [scores.logits.log_softmax(-1) for scores in score(self.scorer, self.head, batch).values()]
                loss = torch.stack([-(logp.detach().exp() * logp).sum() for logp in every]).sum()
                slope = torch.autograd.grad(loss, self.theta, create_graph=True, allow_unused=True)
                along = [(one * v).sum() for one, v in zip(slope, vector, strict=True) if one is not None and one.requires_grad]
                found = torch.autograd.grad(torch.stack(along).sum(), self.theta, allow_unused=True)
            return [torch.zeros_like(v) if one is None else one.float() for one, v in zip(found, vector, strict=True)]

        return self._summed(self._some(stream, rows), "curvature", product)

    def solved(self, stream: str, rows: int, damping: float, vector: Gradient) -> Gradient:
        try:
            from llm_unlearn.training.ekfac import ekfac  # needs an extra
        except ImportError:
            raise Refused(
                "method.curvature: ekfac needs kronfluence; install it with: pip install 'llm-unlearn[influence]'."
            ) from None
        factors = ekfac(self.net, self._some(stream, rows), self.job.seed, self.accelerator)
        return factors.solve(trainable(self.net), vector, damping)

    def products(self, stream: str, vector: Gradient) -> list[float]:
        examples, rank, ranks = self.job.examples[stream], self.accelerator.process_index, self.accelerator.num_processes
        mine = {}
        for i in self.bar(range(rank, len(examples), ranks), f"influence of {stream}", "row"):
            found = zip(self._slopes([examples[i]]), vector, strict=True)
            mine[i] = float(torch.stack([(one * v).sum() for one, v in found]).double().sum())
        gathered: list[dict[int, float]] = gather_object([mine])
        every = {i: value for one in gathered for i, value in one.items()}
        return [every[i] for i in range(len(examples))]

    def noise(self) -> Gradient:
        generator = torch.Generator().manual_seed(draw(self.job.seed, self.method.name))  # drawn on the CPU: alike on every device
        return [torch.randn(one.shape, generator=generator).to(one) for one in self.theta]

    def train(self) -> None:
        job = replace(self.job, terms=self.method.terms, settings=replace(self.job.settings, stop=None))
        outcome = train(job, self.net, self.accelerator, self.folder, resume=self.resume, title=f"{self.method.name}: fine-tuning")
        if outcome.status != "finished":
            raise Ended(outcome)
        self.trained = outcome.step

    def note(self, name: str, value: float) -> None:
        self._row[name] = value

    def tell(self, stream: str, values: Sequence[float]) -> None:
        examples = self.job.examples[stream]
        self.told += [{"stream": stream, "row": one.id, "influence": value} for one, value in zip(examples, values, strict=True)]

    # ------------------------------------------------------------------------------------------------ what this file needs

    def noted(self) -> Mapping[str, float]:
        """What was noted since the last line of the log."""
        found, self._row = self._row, {}
        return found

    def bar(self, items: Sequence[Any], title: str, unit: str) -> Iterator[Any]:
        """The items, with a progress bar on the first process."""
        yield from walk(items, title, unit, quiet=not self.accelerator.is_main_process)

    def _some(self, stream: str, rows: int) -> list[Example]:
        return some(self.job.examples[stream], rows, self.job.seed, "importance")

    def _slopes(self, examples: Sequence[Example]) -> list[Tensor]:
        return slopes(self.scorer, self.head, self.theta, examples, self.accelerator)

    def _summed(self, examples: Sequence[Example], title: str, part: Callable[[list[Example]], list[Tensor]]) -> Gradient:
        """(1/n) Σ of a part for each micro-batch, over all processes."""
        total = [torch.zeros_like(one, dtype=torch.float32) for one in self.theta]
        ranks = self.accelerator.num_processes
        mine = cut([len(one.ids) for one in examples], self.job.settings.batch_tokens, ranks)[self.accelerator.process_index]
        for chosen in self.bar(mine, title, "batch"):
            if chosen:
                total = plus(total, part([examples[i] for i in chosen]))
        return [self.accelerator.reduce(one, "sum") / len(examples) for one in total]
