"""A model whose logits are made of several models' logits, all of them one base with different adapters: which, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from llm_unlearn.spec import FiniteFloat, spec

Rule = Literal["sum", "excess", "average"]


@spec
class Combination:
    """z of some members' logits z_s, their weights w_s.

    sum: z = Σ_s w_s z_s. excess: z = w_1 z_1 + Σ_{s>1} w_s relu(z_s − z_1). average: z = log Σ_s w_s softmax(z_s).
    """

    rule: Rule
    """sum | excess | average"""
    members: tuple[str | None, ...]
    """An adapter each, by the name of its folder beside this file; null is the base itself."""
    weights: tuple[FiniteFloat, ...]
    """w, one for each member."""

    def __post_init__(self) -> None:
        if len(self.members) != len(self.weights) or len(set(self.members)) != len(self.members) or not any(self.members):
            raise ValueError("members, each once and not the base alone, and a weight for each")
        names = [name for name in self.members if name is not None]
        if any(not name.strip(".") or len(name) > 100 or "/" in name or "\\" in name for name in names):
            raise ValueError("members that are names of folders beside this file")
        if self.rule == "average" and min(self.weights) <= 0:
            raise ValueError("weights above 0, which is what probabilities are averaged with")

    @property
    def adapters(self) -> list[str]:
        """The members that are adapters."""
        return [name for name in self.members if name is not None]

    def scaled(self, factor: float) -> Combination:
        """What stands beside the first member counts `factor` times; 0 is the first member alone."""
        return replace(self, weights=(self.weights[0], *(factor * weight for weight in self.weights[1:])))
