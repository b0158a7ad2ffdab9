"""The registry of losses, and how losses stand on streams: Term = loss × stream × weight.

The one rule of the house: a loss returns one value per unit (an answer token or a sequence), never a mean. The training loop
divides, once, by the number of those units in the whole optimizer window on all ranks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Annotated

from llm_unlearn.objectives.distribution import CEU, ELM, IHL, KL, Entropy, Margin, Undial
from llm_unlearn.objectives.likelihood import IDK, NLL, TNPO, WGA, WTNPO, Ascent, SatImp
from llm_unlearn.objectives.preference import AP, DPO, FLAT, NPO, SimNPO
from llm_unlearn.objectives.representation import RMU, AdaptiveRMU, CircuitBreak, EmbedMatch, Lunar, RepNoise
from llm_unlearn.objectives.routing import RouterKL
from llm_unlearn.objectives.views import ROUTERS, TOP, Kind, beside
from llm_unlearn.spec import FiniteFloat, PositiveFloat, by_name, spec

OnLikelihood = NLL | Ascent | IDK | WGA | TNPO | WTNPO | SatImp
OnPreference = NPO | SimNPO | DPO | AP | FLAT
OnDistribution = KL | Undial | CEU | Entropy | IHL | Margin | ELM
OnRepresentation = RMU | AdaptiveRMU | EmbedMatch | CircuitBreak | Lunar | RepNoise

AnyLoss = Annotated[OnLikelihood | OnPreference | OnDistribution | OnRepresentation | RouterKL, by_name]


@spec
class Ramp:
    """A weight that moves along a straight line as the run goes on."""

    start: FiniteFloat
    """At the first step."""
    end: FiniteFloat
    """At the last step."""


@spec
class Budget:
    """Hold a term's mean at or below a bound (primal–dual, Entesari et al. 2025, 2506.05314): after each optimizer step the weight
    becomes max(0, weight + rate · (mean − at_most)), the mean that of the whole window on all ranks."""

    at_most: FiniteFloat
    """The bound ε, in the loss's own unit: 0.05 for `kl` is 0.05 nats per token."""
    rate: PositiveFloat = 1.0
    """η: how fast the weight answers. Where the term keeps swinging around its bound, take less."""


@spec
class Term:
    """One loss on one stream, with its weight in the total."""

    loss: AnyLoss
    weight: FiniteFloat | Ramp = 1.0
    """Factor in the total: total = Σ weight × mean of the loss over the window's units. {start, end} moves with the run; with a
    budget, it is the first value."""
    stream: str | None = None
    """The stream that the loss reads; without it, the stream that the term is named after."""
    budget: Budget | None = None
    """A bound that the term is to keep, by a weight that finds itself."""

    def weight_at(self, progress: float) -> float:
        """The weight by the recipe, at a share of the run from 0 to 1."""
        if isinstance(self.weight, Ramp):
            return self.weight.start + (self.weight.end - self.weight.start) * progress
        return self.weight


def stream_of(term: Term, name: str) -> str:
    """The stream that a term of this name stands on."""
    return term.stream or name


def set_of(term: Term, name: str) -> str:
    """Return the set whose rows a term of this name reads: `forget` of a term on `forget.thought`."""
    return stream_of(term, name).partition(".")[0]


def streams_read(term: Term, name: str, kinds: Iterable[Kind] | None = None) -> tuple[str, ...]:
    """The streams whose scores the term's loss reads of the policy; the first is the one whose units are counted.

    Args:
        kinds: others than those of the policy.
    """
    return tuple(beside(stream_of(term, name), kind) for kind in (term.loss.needs.reads if kinds is None else kinds))


def layers_read(loss: AnyLoss) -> tuple[int, ...]:
    """The layers whose output the loss reads; `TOP` for one that reads logits or log-probabilities, `ROUTERS` for router logits."""
    match loss:
        case RMU() | AdaptiveRMU() | Lunar():
            return (loss.layer,)
        case EmbedMatch() | CircuitBreak() | RepNoise():
            return loss.layers
        case RouterKL():
            return (ROUTERS,)
    return (TOP,)


def count(loss: AnyLoss, lengths: Iterable[int]) -> int:
    """How many values the loss gives for answers of these numbers of tokens: what the loop divides by."""
    if loss.needs.unit == "sequence":
        return sum(1 for _ in lengths)
    return sum(max(0, length - skipped(loss)) for length in lengths)


def skipped(loss: AnyLoss) -> int:
    """How many first tokens of each answer the loss leaves out."""
    return loss.skip if isinstance(loss, CEU) else 0


def thought_problems(objective: Mapping[str, Term], sets: Iterable[str], separate: Container[str]) -> Iterable[tuple[str, ...]]:
    """Check that every stream of thoughts has its loss, and every term on one its stream. Yields (text, keys of the recipe).

    Args:
        separate: the sets whose thoughts are a stream of their own.
    """
    read = {stream_of(term, name) for name, term in objective.items()}
    for name in sets:
        stream = beside(name, "thought")
        if name in separate and stream not in read:
            yield f"no loss reads {stream}. Add a term with stream: {stream}, or set targets: both.", "data", name, "targets"
        if name not in separate and stream in read:
            yield f"missing; a term reads {stream}. Set targets: separate.", "data", name, "targets"
    for name, term in objective.items():
        needs = term.loss.needs
        if stream_of(term, name).endswith(".thought") and (needs.reads != ("answer",) or needs.contrasts):
            text = f"{term.loss.name} compares with other answers, and a thought has none. Set a loss such as npo or rmu."
            yield text, "objective", name, "loss"
