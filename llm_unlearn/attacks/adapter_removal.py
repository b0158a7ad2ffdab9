"""Adapter removal: whoever holds an adapter-based result can take the adapter off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llm_unlearn.attacks.asking import Asked, answers_of, curve_of, known
from llm_unlearn.attacks.finding import Axis, Curve, Gain, Subject
from llm_unlearn.spec import FiniteFloat, spec


@spec
class AdapterRemoval:
    """Let the adapter count by another factor (½ halves it, 0 takes it off, −1 takes away what it adds) and measure again. A model
    without an adapter is measured as it is. What comes back here comes back for everybody who is given base and adapter: then only
    merged weights may be released, or none. (The idea is as old as adapters; the factors are this project's choice.)"""

    name: Literal["adapter_removal"] = "adapter_removal"
    set: str
    """The set whose answers the attacker wants."""
    factors: tuple[FiniteFloat, ...] = (0.5, 0.0, -1.0)
    """How often the adapter counts, besides once."""
    measure: Asked = "probability"
    """What is measured; the notes have the other one, at the last point."""

    def __post_init__(self) -> None:
        if not self.factors or 1.0 in self.factors:
            raise ValueError("factors other than 1, which is measured in any case")

    @property
    def title(self) -> str:
        return "adapter removal"

    @property
    def x(self) -> Axis:
        return Axis("adapter", "times", untouched=True)

    @property
    def y(self) -> Gain:
        return Gain(self.measure)

    def remark(self, curves: Mapping[str, Mapping[str, Any]], gap: Mapping[str, Any]) -> str:
        """Release to assume: an adapter that can be taken off."""
        return "Only merged weights may be released, or none." if gap["leaks"] else ""

    def __call__(self, subject: Subject) -> Curve:
        from llm_unlearn.models.forms import adapter_scaled

        asked = answers_of(subject.sets[self.set])
        loaded = subject.load()
        points = [(1.0, known(loaded, asked, self.measure, subject))]
        for factor in self.factors if subject.adapter else ():
            with adapter_scaled(loaded.model, factor):
                points.append((factor, known(loaded, asked, self.measure, subject)))
        return curve_of(points)
