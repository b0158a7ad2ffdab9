"""What a loss is given: numbers about answer tokens, never a model. (`models/scores.py` makes them.)

Shapes: N answer tokens of one stream in a micro-batch, S its sequences, V the vocabulary, D the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "sequence"]
"""What one value of a loss belongs to, and so what the loop divides by."""

Need = Literal["none", "logps", "logits", "hidden", "routing"]
"""What a loss reads of a model."""

Kind = Literal["answer", "thought", "alternate", "expert", "novice"]
"""Sequence of a row: its own answer, the thought before it, another answer to the same prompt, or its own answer under a
prompt that makes the model speak as one who knows, or as one who does not."""

TOP = -1
"""In place of a layer: the last hidden states, from which the output head gives logits."""

ROUTERS = -3
"""In place of a layer: the logits of all routers of a mixture of experts."""

WHOLE = frozenset({TOP, ROUTERS})
"""Names that stand for no single layer and need the whole model."""


class Needs(NamedTuple):
    """What a loss asks for, so that nothing else is computed."""

    unit: Unit
    """One value per answer token, or per sequence."""
    reads: tuple[Kind, ...] = ("answer",)
    """What the policy is asked about; the loss's units are those of the first."""
    policy: Need = "logps"
    """Output of the policy that is read: log-probabilities of the answers, whole distributions, hidden states, or router logits."""
    reference: Need = "none"
    """What is read of the model as it was, about the same."""
    contrasts: tuple[Kind, ...] = ()
    """What the model as it was is asked about besides."""
    window: bool = False
    """The hidden states of the whole optimizer window, of all ranks, without gradient; `ref[window_of(stream)]` has them."""


class View(Protocol):
    """One stream's answer tokens as one model scores them."""

    @property
    def logps(self) -> Tensor:
        """(N,) log p of each target token, nats, float32."""
        ...

    @property
    def logits(self) -> Tensor:
        """(N, V) float32."""
        ...

    @property
    def targets(self) -> Tensor:
        """(N,) the tokens that are to come."""
        ...

    @property
    def position(self) -> Tensor:
        """(N,) the place of each token within its answer, from 0."""
        ...

    @property
    def seed(self) -> int:
        """The run's; what a loss draws at random follows from it."""
        ...

    def hidden(self, layer: int) -> Tensor:
        """(N, D) the output of decoder layer `layer` (from 0, as in the names of its weights), float32."""
        ...

    @property
    def routing(self) -> Tensor:
        """(N, R, E) float32, the logits of the R routers of the model over their E experts, at the position of each token."""
        ...

    def by_sequence(self, values: Tensor) -> Tensor:
        """(N,) -> (S,) sums over the tokens of each sequence."""
        ...

    def centre(self, layer: int) -> Tensor:
        """(D,) the mean of `hidden(layer)` over the stream's examples that the run sees; of the model as it was only."""
        ...


Views = Mapping[str, View]
"""Stream name -> view."""


def beside(stream: str, kind: Kind) -> str:
    """The stream that holds, for the rows of `stream`, their answers of a kind: `forget.alternate`."""
    return stream if kind == "answer" else f"{stream}.{kind}"


def window_of(stream: str) -> str:
    """Where a loss finds the whole window's hidden states of a stream."""
    return f"{stream}.window"
