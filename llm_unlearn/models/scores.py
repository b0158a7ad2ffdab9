"""The one place where a model is called and its numbers come out: hidden states at answer positions, and what its head makes
of them.

Only positions with a target reach the output head, and a large vocabulary goes through it a chunk of rows at a time.

Shapes as in `data/batch.py`: N answer tokens, S sequences of a stream, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_unlearn.data.batch import Batch
from llm_unlearn.models.depth import Layers, Nudge, watched
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import causal
from llm_unlearn.objectives.terms import AnyLoss, layers_read
from llm_unlearn.objectives.views import TOP, beside
from llm_unlearn.spec import Refused

CHUNK = 1 << 25
"""Logits held at once, rows × vocabulary; 128 MiB in float32."""
CACHED = 1 << 18
"""Logits that statistics are made of at once on a CPU, so that the steps in between stay in its cache."""


class Scorer(nn.Module):
    """A causal language model as a function from a batch to hidden states at its answer positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None,
        at: Tensor,
        layers: Layers = (TOP,),
        nudge: Nudge | None = None,
        swap: Mapping[int, Tensor] | None = None,
        embeds: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """(B, L), (N,) -> layer -> (N, D). Without `TOP`, the model runs no deeper than the deepest layer asked for.

        Args:
            swap: layer -> (N, D), what its output is replaced by at the places `at`.
            embeds: (B, L, D) that stand in place of the tokens' embeddings; `input_ids` is None then.
        """
        net = causal(self.model).base_model
        with watched(net, layers, nudge, (swap, at) if swap else None) as outputs:
            last = net(input_ids=input_ids, inputs_embeds=embeds, use_cache=False).last_hidden_state  # (B, L, D)
        outputs[TOP] = torch.as_tensor(last)
        return {layer: outputs[layer].flatten(0, 1)[at] for layer in layers}


def check_depth(model: Any, layers: Layers) -> None:
    """Compare a run that ends at the deepest of these layers with a whole one, once, on a few tokens.

    Raises:
        Refused: a layer is not there, or this architecture cannot be ended early.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    with torch.no_grad():
        short, whole = (Scorer(model)(ids, at, wanted) for wanted in (layers, (*layers, TOP)))
    if not all(torch.allclose(short[layer], whole[layer], rtol=1e-3, atol=1e-3) for layer in layers):
        raise Refused(f"{type(net).__name__}: ends differently when its upper layers are left out; not supported yet.")


def _few_tokens(net: Any) -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 9, device=net.device)[None] % net.config.get_text_config().vocab_size
    return ids, torch.arange(8, device=net.device)


def freeze_unreached(model: Any, layers: Layers) -> None:
    """Leave out of the training what no loss can reach when all of them end at these layers.

    Raises:
        Refused: nothing trainable is left.
    """
    ids, at = _few_tokens(causal(model))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.enable_grad():
        made = torch.stack([one.float().sum() for one in Scorer(model)(ids, at, layers).values()]).sum()
    reached = torch.autograd.grad(made, weights, allow_unused=True) if made.requires_grad else [None] * len(weights)
    for weight, gradient in zip(weights, reached, strict=True):
        weight.requires_grad_(gradient is not None)
    if all(gradient is None for gradient in reached):
        deepest = max(layers)
        raise Refused(
            f"objective: its losses end at layer {deepest}, and nothing trainable stands at or below it; see model.adapter.layers."
        )


def head_of(model: Any) -> Head:
    """The head of a model."""
    net = causal(model)
    return Head.of(net.get_output_embeddings(), net.config.get_text_config())


def check_head(model: Any) -> None:
    """Compare `Scorer` and `head_of` with the model's own forward pass, once, on a few tokens.

    Raises:
        Refused: this architecture computes its logits in a way that is not known here.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    with torch.no_grad():
        own = net(input_ids=ids, use_cache=False).logits[0].float()
        ours = head_of(model)(Scorer(model)(ids, at)[TOP])
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise Refused(
            f"{type(net).__name__}: its logits are not its head on its last hidden state; this architecture is not supported yet."
        )


def embedding_of(model: Any) -> nn.Module:
    """A model's input embedding: ids of any shape -> the same shape with D behind it, as its decoder layers receive them."""
    layer: nn.Module = causal(model).get_input_embeddings()
    return layer


def last_norm(model: Any) -> nn.Module:
    """What stands between the last decoder layer and the head: any layer's output read through it is a logit lens.

    Raises:
        Refused: the last hidden states are not one part's work on the last layer's output.
    """
    net = causal(model)
    ids, at = _few_tokens(net)
    parts: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda part, given, made: parts.append(part)) for part in net.base_model.children()]
    deepest = int(net.config.get_text_config().num_hidden_layers) - 1
    try:
        with torch.no_grad():
            states = Scorer(model)(ids, at, (deepest, TOP))
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        if not parts or not torch.allclose(parts[-1](states[deepest]), states[TOP], rtol=1e-3, atol=1e-3):
            raise Refused(
                f"{type(net).__name__}: the norm under its head was not found; its layers cannot be read by the head yet."
            )
    return parts[-1]


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

    states: Mapping[int, Tensor]  # layer -> (N, D)
    targets: Tensor  # (N,)
    owner: Tensor  # (N,)
    position: Tensor  # (N,)
    sequences: int
    head: Head = field(repr=False)
    chunk: int  # rows whose logits are held at once
    seed: int = 0
    given: Tensor | None = None  # (N,) log-probabilities that were taken before
    centres: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> (D,)

    @cached_property
    def logits(self) -> Tensor:
        """(N, V)"""
        return self.head(self.states[TOP])

    @cached_property
    def logps(self) -> Tensor:
        """(N,) log p of each target."""
        if self.given is not None:
            return self.given
        if len(self.targets) <= self.chunk:
            return self._logps(self.states[TOP], self.targets)
        parts = zip(torch.split(self.states[TOP], self.chunk), torch.split(self.targets, self.chunk), strict=True)
        return torch.cat([_recomputed(self._logps, states, targets) for states, targets in parts])

    def _logps(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(states)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def hidden(self, layer: int) -> Tensor:
        """(N, D) the output of a decoder layer."""
        return self.states[layer].float()

    def centre(self, layer: int) -> Tensor:
        """(D,) the mean of a layer's output over the run's examples."""
        return self.centres[layer]

    def by_sequence(self, values: Tensor) -> Tensor:
        """(N,) -> (S,) sums over the tokens of each sequence."""
        return values.new_zeros(self.sequences).index_add(0, self.owner, values)

    def rows(self, part: slice) -> Scores:
        """Some of the tokens; all of them are the scores themselves, with the logits that were computed already."""
        if part.indices(len(self.targets)) == (0, len(self.targets), 1):
            return self
        states = {layer: one[part] for layer, one in self.states.items()}
        given = None if self.given is None else self.given[part]
        return replace(
            self, states=states, targets=self.targets[part], owner=self.owner[part], position=self.position[part], given=given
        )


def score(
    scorer: nn.Module, head: Head, batch: Batch, layers: Layers = (TOP,), seed: int = 0, nudge: Nudge | None = None
) -> dict[str, Scores]:
    """One forward pass: stream -> scores."""
    return by_stream(scorer(batch.input_ids, batch.at, layers, nudge), head, batch, seed)


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
    """One value per unit of a loss. A loss per token that reads logits is taken a chunk of tokens at a time, and its logits are
    made anew in the backward pass."""
    mine = now[beside(stream, loss.needs.reads[0])]
    if loss.needs.unit != "token" or TOP not in layers_read(loss) or len(mine.targets) <= mine.chunk:
        return loss(now, ref, stream)
    read = [beside(stream, kind) for kind in (*loss.needs.reads, *loss.needs.contrasts)]  # all of them as long as the answer
    now, ref = ({name: one for name, one in scores.items() if name in read} for scores in (now, ref))
    return torch.cat([_recomputed(_part, loss, now, ref, stream, part) for part in parts(mine)])


def _part(loss: AnyLoss, now: Mapping[str, Scores], ref: Mapping[str, Scores], stream: str, part: slice) -> Tensor:
    here, then = ({name: one.rows(part) for name, one in scores.items()} for scores in (now, ref))
    return loss(here, then, stream)


def parts(scores: Scores) -> Iterator[slice]:
    """The tokens whose logits are held at once, part by part."""
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
    for here in map(scores.rows, parts(scores)):
        few = max(1, CACHED // here.head.vocabulary) if here.targets.device.type == "cpu" else here.chunk
        for logits, targets in zip(torch.split(here.logits, few), torch.split(here.targets, few), strict=True):
            logp = logits.log_softmax(-1)  # (n, V)
            target = logp.gather(-1, targets[:, None])[:, 0]
            first = logp.max(-1).indices  # several times faster than argmax on a CPU, and of equals the first as there
            p = logp.exp()
            mean = (p * logp).sum(-1)
            far = logp.sub_(mean[:, None])  # in place, as what these steps cost is memory
            std = p.mul_(far).mul_(far).sum(-1).sqrt()
            for column, value in zip(columns, (target, first == targets, mean, std), strict=True):
                column.append(value.cpu())
    return Statistics(*(torch.cat(column) for column in columns))
