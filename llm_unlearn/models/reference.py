"""What the model said before it was changed: the adapter switched off, or numbers taken beforehand. Never a second model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_unlearn.data.batch import Batch, cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.depth import Layers
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import as_it_was, has_adapter
from llm_unlearn.models.scores import Scorer, Scores, by_stream, score
from llm_unlearn.models.sharded import is_sharded, take_part
from llm_unlearn.objectives.views import TOP

Reference = Callable[[Batch | None], dict[str, Scores]]
"""A micro-batch -> the scores of the model as it was, for the streams whose losses read them; None, to take part in what others ask
of a sharded model."""


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

    def __or__(self, other: Asked) -> Asked:
        join = [tuple(sorted({*mine, *theirs})) for mine, theirs in ((self.layers, other.layers), (self.centres, other.centres))]
        return Asked(join[0], self.logps or other.logps, join[1])


def reference_of(
    scorer: Scorer,
    head: Head,
    needs: Mapping[str, Asked],
    examples: Iterable[Example],
    batch_tokens: int,
    device: torch.device,
    seed: int = 0,
) -> Reference:
    """Choose the cheapest exact way to ask the untouched model.

    With an adapter, the model itself with the adapter off. With full weights, one pass over `examples` now: log-probabilities (4
    bytes a token) where losses read those, hidden states (D numbers a token and layer, kept in CPU memory) where they read
    states, and with a copy of the head where they read logits. Means over all examples are taken now in either case.

    Args:
        needs: stream -> what its losses read of the reference; streams without any are left out.
    """
    if not needs:
        return lambda batch: {}
    examples = [example for example in examples if example.stream in needs]
    centres = _centres(scorer, head, needs, examples, batch_tokens, device)
    needs = {stream: asked for stream, asked in needs.items() if asked.run}
    ask = (
        _switched_off(scorer, head, needs, seed)
        if has_adapter(scorer.model)
        else _kept(scorer, head, needs, [example for example in examples if example.stream in needs], batch_tokens, device, seed)
    )

    def answer(batch: Batch | None) -> dict[str, Scores]:
        found = {stream: replace(scores, centres=centres.get(stream, {})) for stream, scores in ask(batch).items()}
        return {**alone, **found}

    alone = {stream: _only_centres(head, means) for stream, means in centres.items() if stream not in needs}
    return answer


def _switched_off(scorer: Scorer, head: Head, needs: Mapping[str, Asked], seed: int) -> Reference:
    @torch.no_grad()
    def ask(batch: Batch | None) -> dict[str, Scores]:
        found: dict[str, Scores] = {}
        for layers in sorted({asked.run for asked in needs.values()}):
            part = batch and batch.only({stream for stream, asked in needs.items() if asked.run == layers})
            if part or is_sharded(scorer):
                with as_it_was(scorer.model):
                    if part:
                        found |= score(scorer, head, part, layers, seed)
                    else:
                        take_part(scorer, layers, next(scorer.parameters()).device)
        return found

    return ask


@torch.no_grad()
def _kept(
    scorer: Scorer,
    head: Head,
    needs: Mapping[str, Asked],
    examples: list[Example],
    batch_tokens: int,
    device: torch.device,
    seed: int,
) -> Reference:
    kept: dict[tuple[str, Example], dict[int | None, Tensor]] = {}  # under None, the log-probabilities
    for chosen in cut([len(example.ids) for example in examples], batch_tokens)[0] if examples else []:
        batch = lay_out([examples[i] for i in chosen]).to(device)
        every = tuple(sorted({layer for stream in batch.tokens for layer in needs[stream].run}))
        for stream, scores in score(scorer, head, batch, every, seed).items():
            asked = needs[stream]
            mine = [example for example in batch.examples if example.stream == stream]
            columns: dict[int | None, Tensor] = {layer: scores.states[layer] for layer in asked.layers}
            if asked.logps and TOP not in asked.layers:
                columns[None] = scores.logps
            for name, column in columns.items():
                for example, part in zip(mine, torch.split(column, [example.targets for example in mine]), strict=True):
                    kept.setdefault((stream, example), {})[name] = part.cpu()
    then = head.frozen_copy() if any(TOP in asked.layers for asked in needs.values()) else head

    def ask(batch: Batch | None) -> dict[str, Scores]:
        found: dict[str, Scores] = {}
        part = batch and batch.only(needs)
        for stream, scores in by_stream({}, then, part, seed).items() if part else ():
            assert part
            mine = [kept[stream, example] for example in part.examples if example.stream == stream]
            columns = {name: torch.cat([one[name] for one in mine]).to(device) for name in mine[0]}
            states = {name: column for name, column in columns.items() if name is not None}
            found[stream] = replace(scores, states=states, given=columns.get(None))
        return found

    return ask


@torch.no_grad()
def _centres(
    scorer: Scorer, head: Head, needs: Mapping[str, Asked], examples: list[Example], batch_tokens: int, device: torch.device
) -> dict[str, dict[int, Tensor]]:
    """Stream -> layer -> the mean state over all answer tokens of its examples, by the model as it was."""
    sums: dict[str, dict[int, Tensor]] = {}
    tokens: dict[str, int] = {}
    examples = [example for example in examples if needs[example.stream].centres]
    for chosen in cut([len(example.ids) for example in examples], batch_tokens)[0] if examples else []:
        batch = lay_out([examples[i] for i in chosen]).to(device)
        every = tuple(sorted({layer for stream in batch.tokens for layer in needs[stream].centres}))
        with as_it_was(scorer.model) if has_adapter(scorer.model) else nullcontext():
            found = score(scorer, head, batch, every)
        for stream, scores in found.items():
            tokens[stream] = tokens.get(stream, 0) + len(scores.targets)
            for layer in needs[stream].centres:
                so_far = sums.setdefault(stream, {}).get(layer, 0)
                sums[stream][layer] = so_far + scores.hidden(layer).double().sum(0)
    return {stream: {layer: (one / tokens[stream]).float() for layer, one in mine.items()} for stream, mine in sums.items()}


def _only_centres(head: Head, centres: Mapping[int, Tensor]) -> Scores:
    """For a stream of which nothing but its mean is read."""
    none = torch.zeros(0, dtype=torch.long, device=next(iter(centres.values())).device)
    return Scores({}, none, none, none, 0, head, 1, centres=centres)
