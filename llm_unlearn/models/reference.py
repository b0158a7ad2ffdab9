"""What the model said before it was changed: the adapter switched off, or numbers taken beforehand. Never a second model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from llm_unlearn.data.batch import Batch, cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.load import as_it_was, has_adapter
from llm_unlearn.models.scores import AnyScores, GivenScores, Head, Scorer, by_stream, score
from llm_unlearn.objectives.views import Need

Reference = Callable[[Batch], dict[str, AnyScores]]
"""A micro-batch -> the scores of the model as it was, for the streams whose losses read them."""


def reference_of(
    scorer: Scorer,
    head: Head,
    needs: Mapping[str, Need],
    examples: Iterable[Example],
    batch_tokens: int,
    device: torch.device,
) -> Reference:
    """Choose the cheapest exact way to ask the untouched model.

    With an adapter, the model itself with the adapter off. With full weights, one pass over `examples` now: log-probabilities
    (4 bytes a
    token) where losses read those, hidden states (D numbers a token, kept in CPU memory) and a copy of the head where they
    read logits.

    Args:
        needs: stream -> what its losses read of the reference; streams without any are left out.
    """
    if not needs:
        return lambda batch: {}
    if has_adapter(scorer.model):
        return _switched_off(scorer, head, needs, device)
    return _kept(scorer, head, needs, [example for example in examples if example.stream in needs], batch_tokens, device)


def _switched_off(scorer: Scorer, head: Head, needs: Mapping[str, Need], device: torch.device) -> Reference:
    @torch.no_grad()
    def ask(batch: Batch) -> dict[str, AnyScores]:
        wanted = [example for example in batch.examples if example.stream in needs]
        if not wanted:
            return {}
        part = batch if len(wanted) == len(batch.examples) else lay_out(wanted).to(device)
        with as_it_was(scorer.model):
            return dict(score(scorer, head, part))

    return ask


@torch.no_grad()
def _kept(
    scorer: Scorer,
    head: Head,
    needs: Mapping[str, Need],
    examples: list[Example],
    batch_tokens: int,
    device: torch.device,
) -> Reference:
    kept: dict[tuple[str, Example], Tensor] = {}
    for chosen in cut([len(example.ids) for example in examples], batch_tokens)[0]:
        batch = lay_out([examples[i] for i in chosen]).to(device)
        for stream, scores in score(scorer, head, batch).items():
            numbers = scores.logps if needs[stream] == "logps" else scores.states
            mine = [example for example in batch.examples if example.stream == stream]
            for example, part in zip(mine, torch.split(numbers, [example.targets for example in mine]), strict=True):
                kept[stream, example] = part.cpu()
    then = head.frozen_copy() if "logits" in needs.values() else head

    def ask(batch: Batch) -> dict[str, AnyScores]:
        found: dict[str, AnyScores] = {}
        for stream, need in needs.items():
            parts = [kept[stream, example] for example in batch.examples if example.stream == stream]
            if parts and need == "logps":
                found[stream] = GivenScores(torch.cat(parts).to(device))
            elif parts:
                here = slice(batch.tokens[stream].start, batch.tokens[stream].stop)
                states = torch.zeros(len(batch.at), parts[0].shape[-1], dtype=parts[0].dtype, device=device)
                states[here] = torch.cat(parts).to(device)
                found[stream] = by_stream(states, then, batch)[stream]
        return found

    return ask
