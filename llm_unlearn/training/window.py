"""What one optimizer step sees, and its gradient: micro-batches, and one division by the window's units on all ranks.

Every loss gives one value per unit; here, and only here, their sum is divided, once, by the number of those units in the whole
window on all ranks, so that neither the cut into micro-batches nor the number of processes changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from llm_unlearn.data.batch import Batch, Layout, answer_lengths, micro_batches
from llm_unlearn.models.depth import Layers, Nudge
from llm_unlearn.models.head import Head
from llm_unlearn.models.reference import Reference
from llm_unlearn.models.scores import Scorer, Scores, score, values
from llm_unlearn.models.sharded import is_sharded, take_part
from llm_unlearn.objectives.terms import Term, count, layers_read, skipped, stream_of, streams_read
from llm_unlearn.objectives.views import TOP, WHOLE, window_of
from llm_unlearn.training.gradients import Latent
from llm_unlearn.training.job import Job, asked_by


@dataclass(frozen=True)
class Model:
    """The model under training: as data parallelism wraps it, as itself, its head, and as it was."""

    wrapped: nn.Module
    scorer: Scorer
    head: Head
    reference: Reference
    during: Callable[[], AbstractContextManager[object]] = nullcontext  # what holds while a loss and its gradient are made

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for weight in self.scorer.parameters() if weight.requires_grad]


@dataclass(frozen=True)
class Part:
    """One forward pass of this rank, and the layers that are read of it."""

    layers: Layers
    batch: Batch | None


class Window:
    """This rank's part of one optimizer step."""

    def __init__(self, job: Job, step: int, accelerator: Accelerator, layout: Layout | None = None) -> None:
        """
        Args:
            layout: of its micro-batches; without it, padded, of at most the settings' tokens.
        """
        self.job, self.accelerator, self.layout = job, accelerator, layout or Layout(job.settings.batch_tokens)
        self.slots = job.schedule.window(step)
        everything = [job.example(*place) for slot in self.slots for place in slot if place[0] in job.read]
        self.lengths = answer_lengths(everything)  # of all ranks: the schedule knows them without asking
        self.tokens = sum(len(example.ids) for example in everything)

    def denominator(self, name: str, term: Term) -> int:
        """Units of a term's loss in the window on all ranks; 0 where the window has none of its stream."""
        return count(term.loss, self.lengths.get(streams_read(term, name)[0], ()))

    def parts(self, terms: Mapping[str, Term], tokens: int | None = None) -> list[Part]:
        """This rank's forward passes for some terms, those that end early first. All ranks have as many.

        Args:
            tokens: at most so many in one, instead of the layout's; 1 is one slot at a time.
        """
        policy = {stream for name, term in terms.items() for stream in streams_read(term, name)}
        read = policy | {stream for name, term in terms.items() for stream, asked in asked_by(term, name).items() if asked.run}
        by_depth: dict[float, tuple[set[int], list[tuple[tuple[str, int], ...]]]] = {}
        for slot in self.slots:
            kept = tuple(place for place in slot if place[0] in read)
            layers = {layer for stream, _ in kept if stream in policy for layer in self.job.layers[stream]}
            if layers:
                union, slots = by_depth.setdefault(_depth(layers), (set(), []))
                union.update(layers)
                slots.append(kept)
        rank, ranks, layout = self.accelerator.process_index, self.accelerator.num_processes, self.layout
        layout = replace(layout, tokens=tokens) if tokens else layout
        return [
            Part(tuple(sorted(layers)), batch)
            for _, (layers, slots) in sorted(by_depth.items())
            for batch in micro_batches(slots, self.job.example, layout, rank, ranks)
        ]

    def largest(self) -> int:
        """Tokens of its largest micro-batch on this rank, padding included."""
        batches = [part.batch for part in self.parts(self.job.terms) if part.batch]
        return max((batch.input_ids.numel() for batch in batches), default=0)

    def backward(
        self, terms: Mapping[str, Term], weights: Mapping[str, float], model: Model, latent: Latent | None = None
    ) -> dict[str, float]:
        """Accumulate the gradient of Σ weight · Σ values / units.

        Args:
            latent: an adversary that disturbs the forward passes first.

        Returns:
            Term -> mean of its loss over the window's units, on all ranks.
        """
        sums = torch.zeros(len(terms), device=self.accelerator.device)
        parts = self.parts(terms)
        whole = self._whole(terms, parts, model)
        spread = is_sharded(model.scorer)  # then all take part in every pass, and gradients are added up where they are kept
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            if part.batch is None and not last and not spread:
                continue
            exchange = nullcontext() if last or spread else self.accelerator.no_sync(model.wrapped)
            with exchange, self.accelerator.autocast(), model.during():
                loss = torch.zeros((), device=self.accelerator.device)
                if part.batch is None or (last and TOP not in part.layers and not spread):  # copies wait for every weight
                    loss = _nothing(model, part.layers, self.accelerator.device)
                if part.batch is not None:
                    found = self._values(terms, part, model, whole, latent)
                    for k, (name, term) in enumerate(terms.items()):
                        if name in found:
                            sums[k] += found[name].detach()
                            loss = loss + weights[name] * found[name] / max(1, self.denominator(name, term))
                self.accelerator.backward(loss * self.accelerator.num_processes)  # data parallelism averages over ranks
        return self.totals(terms, sums)

    @torch.no_grad()
    def means(self, terms: Mapping[str, Term], model: Model) -> dict[str, float]:
        """Term -> mean of its loss over the window's units on all ranks, as the model is now."""
        sums = torch.zeros(len(terms), device=self.accelerator.device)
        parts = self.parts(terms)
        whole = self._whole(terms, parts, model)
        for part in parts:
            if part.batch is not None:
                with self.accelerator.autocast():
                    found = self._values(terms, part, model, whole, None)
                sums += torch.stack([found.get(name, sums.new_zeros(())) for name in terms])
        return self.totals(terms, sums)

    def totals(self, terms: Mapping[str, Term], sums: Tensor) -> dict[str, float]:
        """Term -> mean over the window's units, of this rank's sums and those of the others."""
        reduced = self.accelerator.reduce(sums, "sum").cpu()
        return {name: float(reduced[k]) / max(1, self.denominator(name, term)) for k, (name, term) in enumerate(terms.items())}

    def units(self, terms: Mapping[str, Term], part: Part, model: Model) -> dict[str, tuple[Tensor, Tensor]]:
        """Term -> its values (U,) in one micro-batch, and which of the batch's examples each belongs to (U,). The model is called
        as itself, not as data parallelism wraps it; of losses that read one answer, and no other example."""
        assert part.batch is not None
        batch = part.batch.to(self.accelerator.device)
        now, ref = score(model.scorer, model.head, batch, part.layers, self.job.seed), model.reference(batch)
        first = dict(zip(batch.sequences, accumulate(batch.sequences.values(), initial=0), strict=False))
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, term in terms.items():
            stream = stream_of(term, name)
            if stream in now:
                value, scores = values(term.loss, now, ref, stream), now[stream]
                by_token = scores.owner[scores.position >= skipped(term.loss)]
                row = by_token if term.loss.needs.unit == "token" else torch.arange(scores.sequences, device=value.device)
                found[name] = value, row + first[stream]
        return found

    def _values(
        self, terms: Mapping[str, Term], part: Part, model: Model, whole: Mapping[str, Scores], latent: Latent | None
    ) -> dict[str, Tensor]:
        """Term -> sum of its values in one micro-batch."""
        assert part.batch is not None
        batch = part.batch.to(self.accelerator.device)
        policy = batch.only({stream for name, term in terms.items() for stream in streams_read(term, name)})
        assert policy is not None
        nudge = disturbance(model, policy, latent) if latent else None
        scorer = model.wrapped if torch.is_grad_enabled() else model.scorer
        now = score(scorer, model.head, policy, part.layers, self.job.seed, nudge)
        ref = {**model.reference(batch), **whole}
        mine = {name: term for name, term in terms.items() if streams_read(term, name)[0] in now}
        return {name: values(term.loss, now, ref, stream_of(term, name)).sum() for name, term in mine.items()}

    @torch.no_grad()
    def _whole(self, terms: Mapping[str, Term], parts: list[Part], model: Model) -> dict[str, Scores]:
        """The states of the whole window on all ranks, where a loss compares all with all."""
        layers: dict[str, set[int]] = {}
        for name, term in terms.items():
            if term.loss.needs.window:
                layers.setdefault(stream_of(term, name), set()).update(layers_read(term.loss))
        found: dict[str, Scores] = {}
        for stream, wanted in ((stream, tuple(sorted(read))) for stream, read in layers.items()):
            mine: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
            last: Scores | None = None
            for part in parts:
                if batch := part.batch and part.batch.only({stream}):
                    with self.accelerator.autocast():
                        last = score(model.scorer, model.head, batch.to(self.accelerator.device), wanted)[stream]
                    for layer in wanted:
                        mine[layer].append(last.hidden(layer))
            own = {layer: torch.cat(states).cpu() for layer, states in mine.items() if states}
            ranks: list[dict[int, Tensor]] = gather_object([own])
            whole = {layer: torch.cat([one[layer] for one in ranks if one]).to(self.accelerator.device) for layer in wanted}
            none = torch.zeros(0, dtype=torch.long, device=self.accelerator.device)
            found[window_of(stream)] = Scores(whole, none, none, none, 0, model.head, 1)
        return found


def _depth(layers: set[int]) -> float:
    return max(layers) if WHOLE.isdisjoint(layers) else float("inf")


def _nothing(model: Model, layers: Layers, device: torch.device) -> Tensor:
    """A loss of 0, so that this rank takes part in the exchange of gradients: one that touches every weight, or, where they are
    sharded, all passes that others make."""
    states = take_part(model.wrapped, layers, device)
    spread = is_sharded(model.scorer)
    if spread:
        model.reference(None)
    return torch.stack([(values * 0).sum() for values in (*states.values(), *(() if spread else model.weights))]).sum()


def disturbance(model: Model, batch: Batch, latent: Latent) -> Nudge:
    """What an adversary adds to a layer's output so that the forget answers come back, and their alternates do not: projected
    gradient descent on −log p of the former and + log p of the latter, ‖δ‖₂ ≤ ε at each token, from δ = 0. Rows do not see each
    other, so it does not depend on how they are batched."""
    with torch.no_grad():
        hidden = model.scorer(batch.input_ids, batch.at[:1], (latent.layer,), packing=batch.packing)[latent.layer].shape[-1]
    delta = torch.zeros((*batch.input_ids.shape, hidden), device=batch.input_ids.device)
    rate = 2 * latent.epsilon / latent.iterations
    with torch.enable_grad():
        for _ in range(latent.iterations):
            delta.requires_grad_()
            scores = score(model.scorer, model.head, batch, nudge=(latent.layer, delta))
            loss = torch.stack(
                [one.logps.sum() * (1 if stream.endswith(".alternate") else -1) for stream, one in scores.items()]
            ).sum()
            (slope,) = torch.autograd.grad(loss, delta)
            delta = (delta - rate * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12)).detach()
            delta = delta * (latent.epsilon / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return latent.layer, delta
