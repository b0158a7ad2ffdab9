"""What an attack is given, and what it finds. Needs nothing heavy, as a suite is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llm_unlearn.evaluation.memorization import Knowing
from llm_unlearn.sections import Model

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llm_unlearn.evaluation.sets import EncodedSet
    from llm_unlearn.models.forms import Bits
    from llm_unlearn.models.load import Loaded


class Load(Protocol):
    """Reads the model afresh, so that an attack may change it."""

    @property
    def identity(self) -> str:
        """Stands for the model."""
        ...

    def __call__(self, *, quantize: Bits | None = None, merged: bool = False, adapter: bool = True) -> Loaded:
        """
        Args:
            quantize: nf4, fp4 or int8 instead of what the model was loaded in.
            merged: its adapter is merged into the weights (before they are quantized).
            adapter: False leaves its adapter off.

        Raises:
            Refused: the model cannot be had in this form, and why.
        """
        ...


class Once(Protocol):
    """Numbers that an attack needs for every column alike."""

    def __call__(self, key: str, make: Callable[[], list[float]]) -> list[float]:
        """
        Args:
            key: stands for all that decides the numbers, beside the seed and the precision.
            make: called on every process where the numbers are not kept from before.
        """
        ...


def _now(key: str, make: Callable[[], list[float]]) -> list[float]:
    """Kept nowhere."""
    return make()


@dataclass(frozen=True)
class Subject:
    """One model under attack: before, after, or the retrained control. Each is attacked in the same way."""

    column: str
    """before | after | model | retrained"""
    model: Model
    adapter: str | None
    load: Load
    sets: Mapping[str, EncodedSet]
    """The suite's sets as this model's tokenizer sees them."""
    original: Load | None
    """The model before unlearning, for attacks that need it beside the one attacked."""
    accelerator: Accelerator
    batch_tokens: int
    seed: int
    tell: Callable[[str], None] = print
    """Progress, in words."""
    control: Load | None = None
    """The model that never saw the forget set, for attacks that start from it."""
    once: Once = _now
    """Makes what does not depend on the model attacked: once for all columns, and kept."""


@dataclass(frozen=True)
class Curve:
    """What an attack gives back over its budget; `y[i]` at `x[i]`. A single number is a curve of one point."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """Bootstrap interval over rows, where there is one."""
    high: tuple[float, ...] = ()
    rows: tuple[float, ...] = ()
    """Per-row values at the last point, in the order of the set's rows."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name, such as the steps needed to reach half of what the model knew before."""


@dataclass(frozen=True)
class Axis:
    """What a curve's x is: the attacker's budget, or the form in which the model is attacked."""

    name: str
    unit: str = ""
    ticks: tuple[str, ...] = ()
    """Names of the points, where x is not a quantity that a reader would interpolate."""
    untouched: bool = False
    """The first point is the model left alone, so that what the attack adds can be told from what was there."""


@dataclass(frozen=True)
class Gain:
    """What a curve's y is, and which way it goes when the attacker gets more."""

    name: str
    knowing: Knowing = "raises"
    against_control: bool = True
    """Whether the retrained model's value stands for what is known without the data. Where it does not, as its states are of their
    own kind, no share of what was forgotten is read off the curves, and no leak."""
    at_last: bool = False
    """The value at the whole budget counts, not the best one: with less of it the same is only estimated worse."""


class Attack(Protocol):
    """A frozen setting that attacks a subject. What is heavy is imported inside `__call__`."""

    @property
    def name(self) -> str: ...
    @property
    def set(self) -> str:
        """The set whose answers the attacker wants."""
        ...

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        ...

    @property
    def x(self) -> Axis: ...
    @property
    def y(self) -> Gain: ...

    def __call__(self, subject: Subject) -> Curve:
        """
        Raises:
            Refused: this model cannot be attacked so, and why; the evaluation says it and goes on.
        """
        ...


@runtime_checkable
class Remarks(Protocol):
    """An attack that has something of its own to say about what it found."""

    def remark(self, curves: Mapping[str, Mapping[str, Any]], gap: Mapping[str, Any]) -> str:
        """Return a sentence for the finding; "" for none.

        Args:
            curves: column -> curve, as plain data.
            gap: what `gap.gap_of` makes of them.
        """
        ...
