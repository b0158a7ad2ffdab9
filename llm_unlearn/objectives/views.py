"""What a loss is given: numbers about answer tokens, never a model. (`models/scores.py` makes them.)

Shapes: N answer tokens of one stream in a micro-batch, S its sequences, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "sequence"]
"""What one value of a loss belongs to, and so what the loop divides by."""

Need = Literal["none", "logps", "logits"]
"""What a loss reads of the model as it was."""

Reads = tuple[Literal["answer", "alternate"], ...]
"""Which answers to the stream's prompts a loss reads: the row's own, the alternate one, or both. Its units are those of the
first."""


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

    def by_sequence(self, values: Tensor) -> Tensor:
        """(N,) -> (S,) sums over the tokens of each sequence."""
        ...


Views = Mapping[str, View]
"""Stream name -> view."""
