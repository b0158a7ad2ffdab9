"""The registry of losses, and how losses stand on streams: Term = loss × stream × weight.

The one rule of the house: a loss returns one value per unit (an answer token or a sequence), never a mean. The training loop
divides, once, by the number of those units in the whole optimizer window on all ranks.
"""

from __future__ import annotations

from typing import Annotated

from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import IDK, NLL, Ascent
from llm_unlearn.objectives.preference import DPO, NPO
from llm_unlearn.spec import FiniteFloat, by_name, spec

AnyLoss = Annotated[NLL | Ascent | IDK | NPO | DPO | KL, by_name]


@spec
class Term:
    """One loss on one stream, with its weight in the total."""

    loss: AnyLoss
    weight: FiniteFloat = 1.0
    """Factor in the total: total = Σ weight × mean of the loss over the window's units."""
    stream: str | None = None
    """The stream that the loss reads; without it, the stream that the term is named after."""


def streams_read(term: Term, name: str) -> tuple[str, ...]:
    """The streams whose scores the term's loss reads; the first is the one whose units are counted."""
    own = term.stream or name
    return tuple(own if answers == "answer" else "alternate" for answers in term.loss.reads)
