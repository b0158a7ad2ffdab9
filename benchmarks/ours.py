"""This project's own way: a recipe's job trained by `training.loop.Training`, a suite carried out by `run.evaluate`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer

from benchmarks import device
from benchmarks.clock import Clock, watched
from llm_unlearn import recipe as recipes
from llm_unlearn import run
from llm_unlearn.data.reading import read_examples
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import load, read_tokenizer, trainable
from llm_unlearn.models.scores import Scorer
from llm_unlearn.sections import Model
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import Training
from llm_unlearn.training.window import Window

if TYPE_CHECKING:
    from benchmarks.rows import Row
    from benchmarks.sides import Turns

STAGES: dict[str, list[tuple[Any, str]]] = {
    "layout": [(Window, "parts")],
    "forward": [(Scorer, "forward")],
    "head and loss": [(Head, "__call__"), (Window, "_values")],
    "backward": [(accelerate.Accelerator, "backward")],
    "optimizer": [(accelerate.Accelerator, "clip_grad_norm_"), (AcceleratedOptimizer, "step")],
}
"""Stage -> the functions whose time it is. Head and loss: both passes of the head where its logits are made anew."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Task:
    """What both ways are given: the same model, examples and number of steps."""

    row: Row
    recipe: Path
    model: Path
    windows: list[dict[str, list[tuple[tuple[int, ...], int]]]]
    """Of each step, the examples of each stream, as tokens and where the answer begins."""
    layers: int
    recomputed: bool
    """Activations are, in the backward pass."""
    check: bool
    """Weights are moved away from the reference first, so that no gradient is 0; in float32, without a bound on the gradient."""


def job_of(recipe: recipes.Recipe) -> Job:
    return run.make_job(recipe, read_examples(recipe.data, read_tokenizer(recipe.model), recipe.seed))


def windows_of(job: Job) -> list[dict[str, list[tuple[tuple[int, ...], int]]]]:
    """What each step of a job sees."""
    found: list[dict[str, list[tuple[tuple[int, ...], int]]]] = []
    for step in range(job.schedule.steps):
        window: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        for slot in job.schedule.window(step):
            for stream, i in slot:
                example = job.example(stream, i)
                window.setdefault(stream, []).append((example.ids, example.answer))
        found.append(window)
    return found


def train(turns: Turns, task: Task) -> None:
    """Take steps when asked: ("steps", k) -> their seconds, and the peak of memory so far; ("stages", k) -> seconds by stage;
    ("change", path) -> one step, and by how much it changed each weight is written there."""
    device.frugal(True)
    base = device.held()
    recipe = recipes.load(task.recipe)
    accelerator = run.start(recipe.model)
    job = job_of(recipe)
    model = run.prepare(load(recipe.model, accelerator.device, train=True).model, recipe.model, job, accelerator)
    device.synchronize()
    began = time.perf_counter()
    training = Training(job, model, accelerator)
    device.synchronize()
    begin = time.perf_counter() - began
    training.begin()
    if task.check:
        move(trainable(model))

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = sum(len(ids) for stream in task.windows[training.progress.step].values() for ids, _ in stream)
            row, outcome = training.step(False)
            if outcome or row["tokens"] != tokens:
                raise RuntimeError(outcome.reason if outcome else f"a step saw {row['tokens']} tokens, and the other way {tokens}")
        device.synchronize()

    request = turns.next({"base": base, "begin": begin})
    while request:
        what, given = request
        answer: Any = None
        if what == "change":
            before = copies(trainable(model))
            steps(1)
            write_change(before, trainable(model), given)
        elif what == "stages":
            answer = _stages(training, steps, given)
        else:
            began = time.perf_counter()
            steps(given)
            answer = {"seconds": time.perf_counter() - began, "peak": device.peak()}
            device.frugal(False)
        request = turns.next(answer)


def _stages(training: Training, steps: Any, count: int) -> dict[str, float]:
    """Seconds of each stage of so many steps; what the reference asks of the model is the reference's."""
    clock = Clock(whole=frozenset({REFERENCE}), wait=device.synchronize)
    asked = training.model
    training.model = replace(asked, reference=clock.timed(REFERENCE, asked.reference))
    try:
        with watched(clock, STAGES):
            steps(count)
    finally:
        training.model = asked
    clock.turn()
    return dict(clock.seconds)


def move(weights: dict[str, torch.nn.Parameter]) -> None:
    """Move each weight by a tenth of its spread, in a direction that depends on its name alone."""
    with torch.no_grad():
        for name, weight in weights.items():
            draw = torch.Generator().manual_seed(sum(name.encode()) * 1009 + len(name))
            by = 0.1 * float(weight.float().std()) or 0.02
            weight += by * torch.randn(weight.shape, generator=draw).to(weight)


def copies(weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def write_change(before: dict[str, torch.Tensor], after: dict[str, torch.nn.Parameter], path: Path) -> None:
    torch.save({name: (after[name].detach() - one).cpu() for name, one in before.items()}, path)


def difference(one: Path, other: Path) -> float:
    """‖a − b‖ / ‖b‖ over all weights; one that only one side trains counts whole."""
    a, b = torch.load(one), torch.load(other)
    square = total = 0.0
    for name in a.keys() | b.keys():
        mine, theirs = (side.get(name, torch.zeros(())).double() for side in (a, b))
        square += float(((mine - theirs) ** 2).sum())
        total += float((theirs**2).sum())
    return (square / total) ** 0.5 if 0 < total < float("inf") else float("inf")


def evaluate(turns: Turns, suite: Path, model: Path, folder: Path) -> None:
    """Carry out a suite when asked, from an empty cache: seconds, the peak of memory, and the numbers by their titles."""
    base, number = device.held(), 0
    request = turns.next({"base": base})
    while request:
        device.free()
        number += 1
        began = time.perf_counter()
        wanted = suites.load(suite)
        run.evaluate(wanted, suite.name, {"model": (Model(base=str(model)), None)},
                     cache=folder / f"cache {number}", output=folder / f"out {number}")  # fmt: skip
        device.synchronize()
        answer = {"seconds": time.perf_counter() - began, "peak": device.peak(), "out": folder / f"out {number}"}
        request = turns.next(answer)
