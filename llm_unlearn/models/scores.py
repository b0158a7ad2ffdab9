"""The one place where a model is called and its numbers come out: hidden states at answer positions, and what its head makes
of them.

Only positions with a target reach the output head, and a large vocabulary goes through it a chunk of rows at a time.

Shapes as in `data/batch.py`: N answer tokens, S sequences of a stream, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.data.batch import Batch, Packing
from llm_unlearn.models.depth import Layers, Nudge, watched
from llm_unlearn.models.experts import Router, recorded_routers, recording
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import causal
from llm_unlearn.models.outline import capacity_of
from llm_unlearn.models.packing import arguments
from llm_unlearn.models.structure import body_of
from llm_unlearn.models.tokenwise import CACHED, OfDistribution, OfLikelihood, parts, tokenwise
from llm_unlearn.objectives.terms import AnyLoss, skipped
from llm_unlearn.objectives.views import ROUTERS, TOP, beside
from llm_unlearn.spec import Refused

CHUNK = 1 << 25
"""Logits held at once, rows × vocabulary; 128 MiB in float32."""


class Scorer(nn.Module):
    """A causal language model as a function from a batch to hidden states at its answer positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @cached_property
    def routers(self) -> tuple[Router, ...]:
        """The routers whose logits can be read."""
        return recorded_routers(causal(self.model))

    def forward(
        self,
        input_ids: Tensor | None,
        at: Tensor,
        layers: Layers = (TOP,),
        nudge: Nudge | None = None,
        swap: Mapping[int, Tensor] | None = None,
        embeds: Tensor | None = None,
        packing: Packing | None = None,
    ) -> dict[int, Tensor]:
        """(B, L), (N,) -> layer -> (N, D); router logits are (N, R, E). Without these and `TOP`, the model runs no deeper than the
        deepest layer asked for.

        Args:
            swap: layer -> (N, D), what its output is replaced by at the places `at`.
            embeds: (B, L, D) that stand in place of the tokens' embeddings; `input_ids` is None then.
            packing: how sequences lie end to end, for a model that `can_pack`.
        """
        _, net = body_of(causal(self.model))
        self._check_length(packing.longest if packing else (torch.as_tensor(input_ids) if embeds is None else embeds).shape[1])
        read = self.routers if ROUTERS in layers else ()
        with watched(net, layers, nudge, (swap, at) if swap else None) as outputs, recording(read) as routing:
            last = net(input_ids=input_ids, inputs_embeds=embeds, use_cache=False, **arguments(packing)).last_hidden_state
        outputs[TOP] = torch.as_tensor(last)  # (B, L, D)
        if read:
            outputs[ROUTERS] = torch.stack([routing[one.name] for one in read], 1)[None]  # (1, B·L, R, E)
        return {layer: outputs[layer].flatten(0, 1)[at] for layer in layers}

    def _check_length(self, tokens: int) -> None:
        if self.positions is not None and tokens > self.positions:
            text = f"a sequence of {tokens} tokens, with all that stands before the answer, is longer than the {self.positions}"
            raise Refused(f"{text} positions of this model. Set a smaller max_tokens, or fewer demonstrations.")

    @cached_property
    def positions(self) -> int | None:
        """Most tokens of a sequence; None where positions are computed."""
        return capacity_of(self.model).positions


def head_of(model: Any) -> Head:
    """The head of a model."""
    net = causal(model)
    return Head.of(net.get_output_embeddings(), net.config.get_text_config())


def embedding_of(model: Any) -> nn.Module:
    """A model's input embedding: ids of any shape -> the same shape with D behind it, as its decoder layers receive them."""
    layer: nn.Module = causal(model).get_input_embeddings()
    return layer


def checkpoint_activations(model: Any) -> None:
    """Let every decoder layer forget its activations and recompute them in the backward pass; adapters get their gradients all
    the same."""
    net = causal(model)
    if hasattr(net, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        net.activation_checkpointing_enable({"use_reentrant": False})
    else:
        net.gradient_checkpointing_enable({"use_reentrant": False})


@dataclass(frozen=True)
class Scores:
    """One stream's answer tokens as one model scores them: what a loss sees (`objectives.views.View`)."""

    states: Mapping[int, Tensor]  # layer -> (N, D); ROUTERS -> (N, R, E)
    targets: Tensor  # (N,)
    owner: Tensor  # (N,)
    position: Tensor  # (N,)
    sequences: int
    head: Head = field(repr=False)
    chunk: int  # rows whose logits are held at once
    seed: int = 0
    given: Tensor | None = None  # (N,) log-probabilities that were taken before
    made: Tensor | None = None  # (N, V) logits that were made before
    centres: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> (D,)

    @cached_property
    def logits(self) -> Tensor:
        """(N, V)"""
        return self.head(self.states[TOP]) if self.made is None else self.made

    @cached_property
    def logps(self) -> Tensor:
        """(N,) log p of each target."""
        if self.given is not None:
            return self.given
        return tokenwise(self.head, self.states[TOP], OfLikelihood(self.targets, self.chunk))

    def hidden(self, layer: int) -> Tensor:
        """(N, D) the output of a decoder layer."""
        return self.states[layer].float()

    @property
    def routing(self) -> Tensor:
        """(N, R, E) logits of the model's routers."""
        return self.states[ROUTERS].float()

    def centre(self, layer: int) -> Tensor:
        """(D,) the mean of a layer's output over the run's examples."""
        return self.centres[layer]

    def by_sequence(self, values: Tensor) -> Tensor:
        """(N,) -> (S,) sums over the tokens of each sequence."""
        return values.new_zeros(self.sequences).index_add(0, self.owner, values)

    def parts(self) -> Iterator[slice]:
        """The tokens whose logits are held at once, part by part."""
        return parts(len(self.targets), self.chunk)

    def rows(self, part: slice | Tensor) -> Scores:
        """Some of the tokens; all of them are the scores themselves, with the logits that were computed already."""
        if isinstance(part, slice) and part.indices(len(self.targets)) == (0, len(self.targets), 1):
            return self
        states = {layer: one[part] for layer, one in self.states.items()}
        given, made = (None if one is None else one[part] for one in (self.given, self.made))
        return replace(
            self, states=states, targets=self.targets[part], owner=self.owner[part], position=self.position[part],
            given=given, made=made,
        )  # fmt: skip


def score(
    scorer: nn.Module, head: Head, batch: Batch, layers: Layers = (TOP,), seed: int = 0, nudge: Nudge | None = None
) -> dict[str, Scores]:
    """One forward pass: stream -> scores."""
    more = {"packing": batch.packing} if batch.packing else {}
    return by_stream(scorer(batch.input_ids, batch.at, layers, nudge, **more), head, batch, seed)


def by_stream(states: Mapping[int, Tensor], head: Head, batch: Batch, seed: int = 0) -> dict[str, Scores]:
    """Hidden states of a batch's answer positions, stream by stream."""
    chunk = max(1, CHUNK // head.vocabulary)
    return {
        stream: Scores(
            {layer: one[part] for layer, one in states.items()}, batch.targets[part], batch.owner[part], batch.position[part],
            batch.sequences[stream], head, chunk, seed,
        )
        for stream, part in batch.tokens.items()
    }  # fmt: skip


def values(loss: AnyLoss, now: Mapping[str, Scores], ref: Mapping[str, Scores], stream: str) -> Tensor:
    """One value per unit of a loss. A loss per token that reads log-probabilities or logits is taken a part of its tokens at a
    time, with its gradient, and their logits are forgotten."""
    reads = loss.needs.policy
    if loss.needs.unit != "token" or reads not in ("logps", "logits"):
        return loss(now, ref, stream)
    name = beside(stream, loss.needs.reads[0])
    others = [beside(stream, kind) for kind in (*loss.needs.reads, *loss.needs.contrasts)]
    mine, then = now[name], {other: scores for other, scores in ref.items() if other in others}  # all as long as the answer
    if skip := skipped(loss):
        kept = (mine.position >= skip).nonzero()[:, 0]
        mine, then = mine.rows(kept), {other: scores.rows(kept) for other, scores in then.items()}

    def of(numbers: Tensor, part: slice) -> Tensor:
        here = mine.rows(part)
        here = replace(here, given=numbers) if reads == "logps" else replace(here, made=numbers)
        return loss({name: here}, {other: scores.rows(part) for other, scores in then.items()}, stream)

    if reads == "logps":
        if mine.given is not None:
            return of(mine.given, slice(None))
        return tokenwise(mine.head, mine.states[TOP], OfLikelihood(mine.targets, mine.chunk, of), one_factor=True)
    return tokenwise(mine.head, mine.states[TOP], OfDistribution(of, max(1, mine.chunk // 2)), one_factor=True)


@torch.no_grad()
def in_parts(scores: Scores) -> Iterator[tuple[slice, Scores]]:
    """The tokens whose logits are held at once, part by part, and their scores; those of the next are written over these logits."""
    room = None
    for part in scores.parts():
        here = scores.rows(part)
        if here.made is None and here is not scores:
            room = scores.head.room(scores.chunk) if room is None else room
            here = replace(here, made=scores.head(here.states[TOP], room))
        yield part, here


@dataclass(frozen=True)
class Statistics:
    """What measures are made of, per answer token, on the CPU in float32."""

    logp: Tensor  # (N,)
    hit: Tensor  # (N,) bool
    mean: Tensor  # (N,) mean of log p under the model's own distribution
    std: Tensor  # (N,)


@torch.no_grad()
def statistics(scores: Scores) -> Statistics:
    """Log p of the targets, whether each is the first choice, and the first two moments of log p under the model's distribution."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for _, here in in_parts(scores):
        few = max(1, CACHED // here.head.vocabulary) if here.targets.device.type == "cpu" else here.chunk
        for logits, targets in zip(torch.split(here.logits, few), torch.split(here.targets, few), strict=True):
            most, first = logits.max(-1, keepdim=True)  # several times faster than argmax on a CPU; of equals the first, as there
            z = logits - most  # (n, V) sums of small numbers: log_softmax loses two digits over 128,000 of them
            target = z.gather(-1, targets[:, None])[:, 0]
            p = z.exp()
            total = p.sum(-1)
            mean = (p * z).sum(-1) / total
            far = z.sub_(mean[:, None])  # in place, as what these steps cost is memory
            std = (p.mul_(far).mul_(far).sum(-1) / total).sqrt()
            target, mean, first = target - total.log(), mean - total.log(), first[:, 0]
            for column, value in zip(columns, (target, first == targets, mean, std), strict=True):
                column.append(value.cpu())
    return Statistics(*(torch.cat(column) for column in columns))
