"""Which passes over a model the measures of its sets are made from: each made once, and kept by fingerprint as soon as it is done.

One likelihood pass per model holds all that is read token by token, the distances to the retrained model included; one generation
pass writes greedy answers. What only some measures need (gradients, answers behind other rows, samples) has a pass of its own,
which is made only where it is asked for. An evaluation that was killed goes on with the first pass that is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from llm_unlearn.bars import Bar
from llm_unlearn.evaluation.answering import generation_pass, samples_pass
from llm_unlearn.evaluation.kept import Part, read_part, write_part
from llm_unlearn.evaluation.likelihood import (
    Control,
    gradient_pass,
    likelihood_of,
    likelihood_pass,
    loss_pass,
    neighbours_pass,
    sorted_samplers,
)
from llm_unlearn.evaluation.sets import EncodedSet, behind
from llm_unlearn.evaluation.tables import Draws, Need, Neighbours, SetTable, Shots, Tables
from llm_unlearn.models.given import answering
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.readings import head_arrays
from llm_unlearn.models.scores import head_of
from llm_unlearn.spec import fingerprint

At = TypeVar("At")
FORMAT = 4  # of the kept parts; raise it when their content changes


@dataclass(frozen=True)
class Job:
    """One pass over one set: the fingerprint that its part is kept under, the answers it takes, and how it is made."""

    key: str
    answers: int
    make: Callable[[Bar], Part]


@dataclass(frozen=True)
class Asking:
    """A model, and how it is asked."""

    loaded: Loaded
    sets: Mapping[str, EncodedSet]
    accelerator: Accelerator
    batch_tokens: int
    max_new_tokens: int
    controls: Mapping[str, Control]  # set -> the retrained model's side of a distance
    is_control: bool

    def jobs(self, name: str) -> dict[Need, Job]:
        """The passes that a set needs, in their order."""
        one = self.sets[name]
        found: dict[Need, Job] = {"answer": self._likelihood(name)}
        if one.generate:
            found["generation"] = self._job(
                ("generation", one.fingerprint_asked, self.max_new_tokens, self._end(one)),
                len(one.ids),
                lambda show: {"texts": self._written(one, show)},
            )
        for need in sorted(one.needs, key=repr):
            if need == "gradient":
                found[need] = self._job(
                    ("gradient", one.fingerprint_asked),
                    len(one.ids),
                    lambda show: {"row": gradient_pass(self.loaded, one, self.accelerator, show)},
                )
            elif isinstance(need, Shots):
                found[need] = self._shots(one, need)
            elif isinstance(need, Neighbours):
                found[need] = self._neighbours(one, need)
            elif isinstance(need, Draws):
                found[need] = self._draws(one, need)
        return found

    def _job(self, key: tuple[object, ...], answers: int, make: Callable[[Bar], Part]) -> Job:
        return Job(fingerprint(FORMAT, self.loaded.identity, self.accelerator.mixed_precision, *key), answers, make)

    def _likelihood(self, name: str) -> Job:
        one, control = self.sets[name], self.controls.get(name)
        keep = self.is_control and "distance" in one.needs
        samplers = [[sampler.temperature, sampler.top_k, sampler.top_p] for sampler in sorted_samplers(one)]
        key = ("likelihood", one.fingerprint, samplers, control.identity if control else None, keep)
        return self._job(key, len(one.examples), lambda show: likelihood_pass(
            self.loaded, one, self.accelerator, self.batch_tokens, show, control, keep
        ))  # fmt: skip

    def _end(self, one: EncodedSet) -> list[object]:
        """Return what ends an answer, and how it is thought before it, as plain data for a key."""
        end = one.end(self.loaded.tokenizer)
        return [*sorted(end.tokens), *end.texts, *([one.thinking.fingerprint] if one.thinking else [])]

    def _written(self, one: EncodedSet, show: Bar) -> list[str]:
        return generation_pass(self.loaded, one, self.accelerator, self.batch_tokens, self.max_new_tokens, show)

    def _shots(self, one: EncodedSet, shots: Shots) -> Job:
        examples = behind(shots, one, self.sets[shots.set])
        key = ("shots", [[example.answer, *example.ids] for example in examples])
        return self._job(key, len(examples), lambda show: {
            "row": loss_pass(self.loaded, examples, self.accelerator, self.batch_tokens, show)
        })  # fmt: skip

    def _neighbours(self, one: EncodedSet, wanted: Neighbours) -> Job:
        key = ("neighbours", one.fingerprint_asked, wanted.n)
        return self._job(key, len(one.ids) * (wanted.n + 1), lambda show: {
            "row": neighbours_pass(self.loaded, one.asked, wanted.n, self.accelerator, self.batch_tokens, show)
        })  # fmt: skip

    def _draws(self, one: EncodedSet, draws: Draws) -> Job:
        key = ("draws", one.fingerprint_asked, draws.n, draws.seed, self.max_new_tokens, self._end(one))
        return self._job(key, len(one.ids) * draws.n, lambda show: {
            "texts": samples_pass(self.loaded, one, draws, self.accelerator, self.batch_tokens, self.max_new_tokens, show)
        })  # fmt: skip


def tables_of(
    loaded: Loaded, sets: Mapping[str, EncodedSet], accelerator: Accelerator, *, batch_tokens: int, max_new_tokens: int,
    cache: Path | None, title: str = "", controls: Mapping[str, Control] | None = None, leave: dict[str, Control] | None = None,
) -> Tables:  # fmt: skip
    """What a model says of the sets: from the cache where it was asked before, else by the passes that are lacking.

    Args:
        cache: folder of kept parts; None asks again and keeps nothing.
        title: name of the model, for the progress bar.
        controls: set -> what the retrained model left; without it nothing is compared with the retrained model.
        leave: this is the retrained model: filled with what others need to be compared with it.
    """
    vocabulary = head_of(loaded.model).vocabulary if controls else 0
    fitting = {  # another tokenizer makes other tokens of the same text; the measure then says that it has no distance
        name: control
        for name, control in (controls or {}).items()
        if control.asked == sets[name].fingerprint_asked and control.vocabulary == vocabulary
    }
    asking = Asking(loaded, sets, accelerator, batch_tokens, max_new_tokens, fitting, leave is not None)
    jobs = {(name, need): job for name in sets for need, job in asking.jobs(name).items()}
    parts = made(jobs, loaded, accelerator, cache, title)
    if leave is not None:
        leave.update(_controls(asking, parts))
    return {name: _table(one, {need: parts[of, need] for of, need in jobs if of == name}) for name, one in sets.items()}


def made(
    jobs: Mapping[At, Job], loaded: Loaded, accelerator: Accelerator, cache: Path | None, title: str
) -> dict[At, Part]:  # fmt: skip
    """The part of every job: from the cache where it was made before, else made now and kept as soon as it is there."""
    paths = {at: cache / f"{job.key}.npz" if cache else None for at, job in jobs.items()}
    parts = {at: part for at, path in paths.items() if path and (part := read_part(path)) is not None}
    if accelerator.num_processes > 1:  # all or nobody: a pass is work for every process
        parts = {at: part for at, part in parts.items() if all(gather_object([at in parts]))}
    lacking = {at: job for at, job in jobs.items() if at not in parts}
    if lacking:
        count = sum(job.answers for job in lacking.values())
        show = Bar(f"asking {title}".strip(), count, "answer", quiet=not accelerator.is_main_process)
        with answering(loaded.model), show, torch.no_grad(), accelerator.autocast():
            for at, job in lacking.items():
                parts[at] = job.make(show)
                path = paths[at]
                if path and accelerator.is_main_process:
                    write_part(parts[at], path)
    return parts


def _table(one: EncodedSet, parts: Mapping[Need, Part]) -> SetTable:
    return SetTable(
        one.ids,
        one.prompts,
        one.answers,
        likelihood_of(parts["answer"], one),
        list(parts["generation"]["texts"]) if "generation" in parts else None,
        one.keywords,
        one.cut,
        {need: part["row"] for need, part in parts.items() if need == "gradient" or isinstance(need, (Shots, Neighbours))},
        {need: part["texts"] for need, part in parts.items() if isinstance(need, Draws)},
    )


def _controls(asking: Asking, parts: Mapping[tuple[str, Need], Part]) -> dict[str, Control]:
    wanted = {name: one for name, one in asking.sets.items() if "distance" in one.needs}
    if not wanted:
        return {}
    head = head_arrays(head_of(asking.loaded.model))
    return {
        name: Control(
            fingerprint(asking.loaded.identity, one.fingerprint_asked),
            one.fingerprint_asked,
            head_of(asking.loaded.model).vocabulary,
            parts[name, "answer"]["states"],
            tuple(example.targets for example in one.asked),
            head,
        )
        for name, one in wanted.items()
    }
