"""What a model says of given answers, teacher-forced: numbers per answer token, and the norm of each row's gradient.

Work is sorted by length, cut by tokens and dealt to all processes; every process ends with everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from llm_unlearn.bars import Bar
from llm_unlearn.data.batch import cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.evaluation.kept import Part
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.evaluation.tables import Likelihood, Sampler
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.readings import distances, gradient_norm, head_from, renormalised, swaps, top_states
from llm_unlearn.models.scores import Scorer, Scores, head_of, in_parts, score, statistics

Found = TypeVar("Found")

Read = Callable[[Scores, Sequence[int]], Mapping[str, Tensor]]
"""What is read off one micro-batch: scores and the examples that they are of -> columns of numbers per token, (N, …) each."""


@dataclass(frozen=True)
class Control:
    """What must be kept of a model so that others can be compared with its whole distribution: at each answer token of a set what
    its output head reads, and the head. N × D numbers and one matrix, where the distributions themselves would be N × V."""

    identity: str
    asked: str  # `EncodedSet.fingerprint_asked`: only the same tokens can be compared
    vocabulary: int
    states: NDArray[np.float32]  # (N, D) over the set's "answer" kind
    lengths: tuple[int, ...]  # (R,) answer tokens
    head: Part


def teacher_forced(
    loaded: Loaded, examples: Sequence[Example], accelerator: Accelerator, batch_tokens: int, show: Bar, read: Read
) -> list[dict[str, NDArray[Any]]]:
    """Score every example once. Returns the columns of each, cut to its own tokens."""
    scorer, head = Scorer(loaded.model), head_of(loaded.model)
    mine: list[tuple[int, dict[str, NDArray[Any]]]] = []
    for chosen in dealt([len(example.ids) for example in examples], batch_tokens, accelerator):
        streams = list(dict.fromkeys(examples[i].stream for i in chosen))  # `lay_out` puts stream after stream
        batch = lay_out([examples[i] for i in chosen]).to(accelerator.device)
        found = score(scorer, head, batch)
        for stream in streams:
            members = [i for i in chosen if examples[i].stream == stream]
            columns = {name: column.cpu().numpy() for name, column in read(found.pop(stream), members).items()}
            end = 0
            for i in members:
                part = slice(end, end := end + examples[i].targets)
                mine.append((i, {name: column[part].copy() for name, column in columns.items()}))
        show.update(min(len(chosen) * accelerator.num_processes, show.total - show.n))
    return gathered(mine, len(examples))


def likelihood_pass(
    loaded: Loaded, one: EncodedSet, accelerator: Accelerator, batch_tokens: int, show: Bar,
    control: Control | None = None, keep_states: bool = False,
) -> Part:  # fmt: skip
    """Score every answer of a set, teacher-forced, once: the columns of `Likelihood`, and what else the set needs of it.

    Args:
        control: the retrained model, where the set needs distances to it.
        keep_states: this is the retrained model, and others will be compared with it.
    """
    samplers = sorted_samplers(one)
    other = head_from(control.head, accelerator.device) if control else None
    answers = {i: r for r, i in enumerate(i for i, kind in enumerate(one.kind) if kind == "answer")}
    ends = np.cumsum([0, *control.lengths]) if control else None

    def read(scores: Scores, members: Sequence[int]) -> dict[str, Tensor]:
        is_answer = members[0] in answers  # a stream is of one kind
        theirs: Tensor | None = None
        if is_answer and control and ends is not None:
            states = np.concatenate([control.states[ends[answers[i]] : ends[answers[i] + 1]] for i in members])
            theirs = torch.from_numpy(states).to(accelerator.device)
        columns: dict[str, list[Tensor]] = {}
        for part, here in in_parts(scores):  # its logits are computed once for all that is read off them
            found: dict[str, Tensor] = {**vars(statistics(here))}
            if is_answer:
                for k, sampler in enumerate(samplers):
                    found |= {f"sampler{k}": renormalised(here, sampler.temperature, sampler.top_k, sampler.top_p)}
            if theirs is not None and other:
                found |= dict(zip(("kl", "js"), distances(here, theirs[part], other), strict=True))
            if is_answer and keep_states:
                found |= {"states": top_states(here)}
            for name, column in found.items():
                columns.setdefault(name, []).append(column)
        return {name: torch.cat(column) for name, column in columns.items()}

    found = teacher_forced(loaded, one.examples, accelerator, batch_tokens, show, read)
    start = np.concatenate([[0], np.cumsum([len(answer["logp"]) for answer in found])]).astype(np.int64)
    extra = [f"sampler{k}" for k in range(len(samplers))] + ["kl", "js"] * bool(control)
    columns = {
        name: np.concatenate([answer.get(name, np.full(len(answer["logp"]), np.nan)) for answer in found])
        for name in ("logp", "hit", "mean", "std", *extra)
    }
    part = {name: column if name == "hit" else column.astype(np.float64) for name, column in columns.items()}
    states = {"states": np.concatenate([found[i]["states"] for i in answers])} if keep_states else {}
    return {"start": start, "row": np.array(one.row), "kind": np.array(one.kind), **part, **states}


def likelihood_of(part: Part, one: EncodedSet) -> Likelihood:
    """A kept part as the table that measures see."""
    more: dict[Any, Any] = {sampler: part[f"sampler{k}"] for k, sampler in enumerate(sorted_samplers(one))}
    more |= {name: part[name] for name in ("kl", "js") if name in part}
    return Likelihood(part["row"], part["kind"], part["start"], part["logp"], part["hit"], part["mean"], part["std"], more)


def sorted_samplers(one: EncodedSet) -> list[Sampler]:
    """The ways of sampling that a set's measures ask for, in an order that depends on nothing else."""
    found = [need for need in one.needs if isinstance(need, Sampler)]
    return sorted(found, key=lambda one: (one.temperature, one.top_k or 0, one.top_p))


def loss_pass(
    loaded: Loaded, examples: Sequence[Example], accelerator: Accelerator, batch_tokens: int, show: Bar
) -> NDArray[np.float64]:
    """(R,) NLL/T of each example."""
    found = teacher_forced(loaded, examples, accelerator, batch_tokens, show, lambda scores, _: {"logp": scores.logps})
    return np.array([-answer["logp"].astype(np.float64).mean() for answer in found])


def neighbours_pass(
    loaded: Loaded, examples: Sequence[Example], n: int, accelerator: Accelerator, batch_tokens: int, show: Bar
) -> NDArray[np.float64]:
    """(R,) the mean NLL/T of each answer's n neighbours: the answer with one token swapped, where the swap has the largest odds
    (fewer where the answer and the vocabulary have no more)."""

    def read(scores: Scores, members: Sequence[int]) -> Mapping[str, Tensor]:
        return dict(zip(("odds", "token"), swaps(scores, n), strict=True))  # (N, n) each

    neighbours: list[Example] = []
    counts: list[int] = []
    for example, found in zip(examples, teacher_forced(loaded, examples, accelerator, batch_tokens, show, read), strict=True):
        odds, tokens = found["odds"].ravel(), found["token"].ravel()
        best = [i for i in np.argsort(-odds, kind="stable")[:n] if odds[i] > -np.inf]
        for i in best:
            at = example.answer + int(i) // found["odds"].shape[1]
            neighbours.append(replace(example, ids=(*example.ids[:at], int(tokens[i]), *example.ids[at + 1 :])))
        counts.append(len(best))
    losses = np.split(loss_pass(loaded, neighbours, accelerator, batch_tokens, show), np.cumsum(counts)[:-1])
    return np.array([row.mean() for row in losses])


def gradient_pass(loaded: Loaded, one: EncodedSet, accelerator: Accelerator, show: Bar) -> NDArray[np.float64]:
    """(R,) the norm of the gradient of NLL/T of each row, one backward pass each."""
    mine: list[tuple[int, float]] = []
    rows = one.asked
    for i in range(accelerator.process_index, len(rows), accelerator.num_processes):
        mine.append((i, gradient_norm(loaded.model, lay_out([rows[i]]).to(accelerator.device))))
        show.update(min(accelerator.num_processes, show.total - show.n))
    return np.array(gathered(mine, len(rows)))


def dealt(lengths: Sequence[int], batch_tokens: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's micro-batches, as indices into `lengths`."""
    return [chosen for chosen in cut(lengths, batch_tokens, accelerator.num_processes)[accelerator.process_index] if chosen]


def gathered(mine: Sequence[tuple[int, Found]], count: int) -> list[Found]:
    """What all processes found of their items, as one list in the order of the items, the same on every process.

    Args:
        mine: (item, what was found of it) for the items that were dealt to this process.
        count: items, over all processes.
    """
    everything = dict(gather_object(list(mine)))
    return [everything[i] for i in range(count)]
