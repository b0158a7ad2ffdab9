"""The one place where a model is called and its numbers come out: hidden states at answer positions, and what its head makes
of them.

Only positions with a target reach the output head, and a large vocabulary goes through it a chunk of rows at a time.

Shapes as in `data/batch.py`: N answer tokens, S sequences of a stream, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_unlearn.data.batch import Batch
from llm_unlearn.models.load import causal
from llm_unlearn.objectives.terms import AnyLoss
from llm_unlearn.spec import Refused

CHUNK = 1 << 25
"""Logits held at once, rows × vocabulary; 128 MiB in float32."""


class Scorer(nn.Module):
    """A causal language model as a function from a batch to hidden states at its answer positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, at: Tensor) -> Tensor:
        """(B, L), (N,) -> (N, D), the states from which the head gives the logits of the targets."""
        states = causal(self.model).base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, L, D)
        return torch.as_tensor(states).flatten(0, 1)[at]


@dataclass(frozen=True)
class Head:
    """The output head: linear layer, then the scale or soft cap that some architectures put on logits."""

    layer: nn.Module = field(repr=False)
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32"""
        logits: Tensor = self.layer(states).float()
        logits = logits * self.scale if self.scale != 1 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def frozen_copy(self) -> Head:
        """The head as it is now, whatever becomes of the model; the one part of it that full-weight training must keep twice."""
        return Head(copy.deepcopy(self.layer).requires_grad_(False), self.vocabulary, self.scale, self.cap)


def head_of(model: Any) -> Head:
    """The head of a model (scale: Cohere, Granite; cap: Gemma)."""
    net = causal(model)
    config = net.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    layer = net.get_output_embeddings()
    return Head(layer, int(config.vocab_size), scale, getattr(config, "final_logit_softcapping", None))


def check_head(model: Any) -> None:
    """Compare `Scorer` and `head_of` with the model's own forward pass, once, on a few tokens.

    Raises:
        Refused: this architecture computes its logits in a way that is not known here.
    """
    net = causal(model)
    ids = torch.arange(1, 9, device=net.device)[None] % net.config.get_text_config().vocab_size
    with torch.no_grad():
        own = net(input_ids=ids, use_cache=False).logits[0].float()
        ours = head_of(model)(Scorer(model)(ids, torch.arange(8, device=net.device)))
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise Refused(
            f"{type(net).__name__}: its logits are not its head on its last hidden state; this architecture is not supported yet."
        )


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

    states: Tensor  # (N, D)
    targets: Tensor  # (N,)
    owner: Tensor  # (N,)
    sequences: int
    head: Head = field(repr=False)
    chunk: int  # rows whose logits are held at once

    @cached_property
    def logits(self) -> Tensor:
        """(N, V)"""
        return self.head(self.states)

    @cached_property
    def logps(self) -> Tensor:
        """(N,) log p of each target."""
        if len(self.targets) <= self.chunk:
            return self._logps(self.states, self.targets)
        parts = zip(torch.split(self.states, self.chunk), torch.split(self.targets, self.chunk), strict=True)
        return torch.cat([_recomputed(self._logps, states, targets) for states, targets in parts])

    def _logps(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(states)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def by_sequence(self, values: Tensor) -> Tensor:
        """(N,) -> (S,) sums over the tokens of each sequence."""
        return values.new_zeros(self.sequences).index_add(0, self.owner, values)

    def rows(self, part: slice) -> Scores:
        """Some of the tokens."""
        return Scores(self.states[part], self.targets[part], self.owner[part], self.sequences, self.head, self.chunk)


@dataclass(frozen=True)
class GivenScores:
    """Log-probabilities that were taken from the untouched model before training."""

    logps: Tensor  # (N,)

    @property
    def logits(self) -> Tensor:
        raise ValueError("only log-probabilities of the reference were kept for this stream")

    def by_sequence(self, values: Tensor) -> Tensor:
        raise ValueError("sum the difference to the policy instead")

    def rows(self, part: slice) -> GivenScores:
        return GivenScores(self.logps[part])


AnyScores = Scores | GivenScores


def score(scorer: nn.Module, head: Head, batch: Batch) -> dict[str, Scores]:
    """One forward pass: stream -> scores."""
    states = scorer(batch.input_ids, batch.at)
    return by_stream(states, head, batch)


def by_stream(states: Tensor, head: Head, batch: Batch) -> dict[str, Scores]:
    """Hidden states of a batch's answer positions, stream by stream."""
    chunk = max(1, CHUNK // head.vocabulary)
    return {
        stream: Scores(states[part], batch.targets[part], batch.owner[part], batch.sequences[stream], head, chunk)
        for stream, part in batch.tokens.items()
    }


def values(loss: AnyLoss, now: dict[str, Scores], ref: dict[str, AnyScores], stream: str) -> Tensor:
    """One value per unit of a loss. A loss per token is taken a chunk of tokens at a time, and its logits are made anew in the
    backward pass."""
    reads = stream if loss.reads[0] == "answer" else "alternate"
    mine = now[reads]
    if loss.unit != "token" or len(mine.targets) <= mine.chunk:
        return loss(now, ref, stream)  # type: ignore[arg-type]
    return torch.cat([_recomputed(_part, loss, now, ref, stream, reads, part) for part in _parts(mine)])


def _part(loss: AnyLoss, now: dict[str, Scores], ref: dict[str, AnyScores], stream: str, reads: str, part: slice) -> Tensor:
    here = {name: scores.rows(part) for name, scores in now.items() if name == reads}
    then = {name: scores.rows(part) for name, scores in ref.items() if name == reads}
    return loss(here, then, stream)  # type: ignore[arg-type]


def _parts(scores: Scores) -> Iterator[slice]:
    for start in range(0, len(scores.targets), scores.chunk):
        yield slice(start, start + scores.chunk)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call now, forget the intermediate values, and call again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return result


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
    for part in _parts(scores):
        here = scores.rows(part)
        logp = here.logits.log_softmax(-1)  # (n, V)
        p = logp.exp()
        mean = (p * logp).sum(-1)
        std = (p * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
        target = logp.gather(-1, here.targets[:, None])[:, 0]
        for column, value in zip(columns, (target, logp.argmax(-1) == here.targets, mean, std), strict=True):
            column.append(value.cpu())
    return Statistics(*(torch.cat(column) for column in columns))
