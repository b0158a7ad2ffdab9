"""What the model said before it was changed: the adapter switched off, numbers taken beforehand, or on request a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_unlearn.data.batch import Batch, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.depth import Layers
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import as_it_was, has_adapter
from llm_unlearn.models.scores import Scorer, Scores, by_stream, head_of, score
from llm_unlearn.models.sharded import is_sharded, take_part
from llm_unlearn.objectives.views import TOP

Reference = Callable[[Batch | None], dict[str, Scores]]
"""A micro-batch -> the scores of the model as it was, for the streams whose losses read them; None, to take part in what others ask
of a sharded model."""

Columns = Mapping[int, Tensor]
"""What is kept of one answer: layer -> (T, D) states; under `LOGPS`, (T,) log-probabilities."""

LOGPS = -2
"""In place of a layer."""


@dataclass(frozen=True)
class Asked:
    """What is read of the model as it was about one stream."""

    layers: Layers = ()
    """Layers whose states are read; `TOP` where it is logits."""
    logps: bool = False
    """Only log-probabilities of the answers are read, or they are besides."""
    centres: Layers = ()
    """Layers whose mean state over all examples is read."""

    @property
    def run(self) -> Layers:
        """The layers that one pass must give."""
        return tuple(sorted({*self.layers, TOP})) if self.logps else self.layers

    @property
    def columns(self) -> tuple[int, ...]:
        """What must be kept to answer later: states, and log-probabilities where they do not follow from the last states."""
        return (LOGPS, *self.layers) if self.logps and TOP not in self.layers else self.layers

    def __or__(self, other: Asked) -> Asked:
        join = [tuple(sorted({*mine, *theirs})) for mine, theirs in ((self.layers, other.layers), (self.centres, other.centres))]
        return Asked(join[0], self.logps or other.logps, join[1])


def adapter_off(scorer: Scorer, head: Head, needs: Mapping[str, Asked], seed: int) -> Reference:
    """Ask the model itself, with its adapter switched off: one more forward pass, without gradient, and not a byte more."""
    return _asking(scorer, head.without_adapter(), needs, seed, lambda: as_it_was(scorer.model))


def frozen_copy(scorer: Scorer, needs: Mapping[str, Asked], seed: int) -> Reference:
    """Ask a second model, made now."""
    other = Scorer(copy.deepcopy(scorer.model).requires_grad_(False).eval())
    head = head_of(other.model).without_adapter()
    return _asking(other, head, needs, seed, lambda: _before(other))


def _before(scorer: Scorer) -> AbstractContextManager[None]:
    return as_it_was(scorer.model) if has_adapter(scorer.model) else nullcontext()


def _asking(
    scorer: Scorer, head: Head, needs: Mapping[str, Asked], seed: int, inside: Callable[[], AbstractContextManager[None]]
) -> Reference:
    @torch.no_grad()
    def ask(batch: Batch | None) -> dict[str, Scores]:
        found: dict[str, Scores] = {}
        for layers in sorted({asked.run for asked in needs.values()}):
            part = batch and batch.only({stream for stream, asked in needs.items() if asked.run == layers})
            if part or is_sharded(scorer):
                with inside():
                    if part:
                        found |= score(scorer, head, part, layers, seed)
                    else:
                        take_part(scorer, layers, next(scorer.parameters()).device)
        return found

    return ask


@torch.no_grad()
def taken(
    scorer: Scorer, head: Head, needs: Mapping[str, Asked], batches: Iterable[list[Example]], device: torch.device
) -> Iterator[tuple[Example, Columns]]:
    """What is to be kept of each example, on the CPU, by the model as it is with its adapter switched off."""
    head = head.without_adapter()
    for examples in batches:
        batch = lay_out(examples).to(device)
        every = tuple(sorted({layer for stream in batch.tokens for layer in needs[stream].run}))
        with _before(scorer):
            found = score(scorer, head, batch, every)
        for stream, scores in found.items():
            mine = [example for example in batch.examples if example.stream == stream]
            lengths = [example.targets for example in mine]
            columns = {
                name: torch.split((scores.logps if name == LOGPS else scores.states[name]).cpu(), lengths)
                for name in needs[stream].columns
            }
            yield from ((example, {name: column[i] for name, column in columns.items()}) for i, example in enumerate(mine))


def looked_up(
    kept: Mapping[tuple[str, Example], Columns], head: Head, needs: Mapping[str, Asked], device: torch.device, seed: int
) -> Reference:
    """Join what was taken to the batches. States of the last layer go through the head as it is now, or a copy where it is
    trained: from the same states it makes the same logits."""
    head = head.without_adapter()
    learns = any(weight.requires_grad for weight in head.layer.parameters())
    then = head.frozen_copy() if learns and any(TOP in asked.layers for asked in needs.values()) else head

    def ask(batch: Batch | None) -> dict[str, Scores]:
        found: dict[str, Scores] = {}
        part = batch and batch.only(needs)
        for stream, scores in by_stream({}, then, part, seed).items() if part else ():
            assert part
            mine = [kept[stream, example] for example in part.examples if example.stream == stream]
            columns = {name: torch.cat([one[name] for one in mine]).to(device) for name in needs[stream].columns}
            states = {name: column for name, column in columns.items() if name != LOGPS}
            found[stream] = replace(scores, states=states, given=columns.get(LOGPS))
        return found

    return ask


@torch.no_grad()
def centres(
    scorer: Scorer, head: Head, needs: Mapping[str, Asked], batches: Iterable[list[Example]], device: torch.device
) -> dict[str, dict[int, Tensor]]:
    """Stream -> layer -> the mean state over all answer tokens of its examples, by the model as it was."""
    sums: dict[str, dict[int, Tensor]] = {}
    tokens: dict[str, int] = {}
    for examples in batches:
        batch = lay_out(examples).to(device)
        every = tuple(sorted({layer for stream in batch.tokens for layer in needs[stream].centres}))
        with _before(scorer):
            found = score(scorer, head, batch, every)
        for stream, scores in found.items():
            tokens[stream] = tokens.get(stream, 0) + len(scores.targets)
            for layer in needs[stream].centres:
                so_far = sums.setdefault(stream, {}).get(layer, 0)
                sums[stream][layer] = so_far + scores.hidden(layer).double().sum(0)
    return {stream: {layer: (one / tokens[stream]).float() for layer, one in mine.items()} for stream, mine in sums.items()}


def together(asks: Iterable[Reference], means: Mapping[str, Mapping[int, Tensor]], head: Head) -> Reference:
    """Each of several ways for streams of its own, and means besides."""
    asks = list(asks)

    def answer(batch: Batch | None) -> dict[str, Scores]:
        found = {stream: scores for ask in asks for stream, scores in ask(batch).items()}
        found = {stream: replace(scores, centres=means.get(stream, {})) for stream, scores in found.items()}
        return {**alone, **found}

    alone = {stream: _only_centres(head, mine) for stream, mine in means.items()}
    return answer


def _only_centres(head: Head, means: Mapping[int, Tensor]) -> Scores:
    """For a stream of which nothing but its mean is read."""
    none = torch.zeros(0, dtype=torch.long, device=next(iter(means.values())).device)
    return Scores({}, none, none, none, 0, head, 1, centres=means)
