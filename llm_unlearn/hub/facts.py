"""What is known of a run that is published: plain data, `described`, of which its card is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["adapter", "combination", "model", "merged"]


@dataclass(frozen=True)
class Paper:
    """One part of the method, with where it is from."""

    part: str
    """What it does in the run: `forget`, `retain`, a rule."""
    name: str
    text: str
    """The first sentence of its definition, with the paper."""
    weight: str = ""


@dataclass(frozen=True)
class Facts:
    """All that a card is made of."""

    repo_id: str
    kind: Kind
    recipe: Mapping[str, Any]
    """The recipe as plain data, described."""
    recipe_hash: str
    results: Mapping[str, Any] | None
    """The evaluation as it is published; None where there was none."""
    papers: Sequence[Paper]
    suite: str
    """How the suite is named on a command line, where anybody has it; else \"\"."""
    base_on_hub: bool
    """Whether anybody can have the base by its name. (A local folder has been reduced to its last part.)"""
    base_revision: str | None = None
    """The commit of the base that was read, or what the recipe says of it."""
    data_on_hub: frozenset[str] = frozenset()
    """The sources that are data sets on the hub."""
    failed: Sequence[str] = ()
    """Why it should not have been published, each in a sentence."""
    files: Sequence[tuple[str, int, str]] = ()
    """Path, bytes and SHA-256 of every file of weights."""

    @property
    def base(self) -> str:
        return str(self.recipe["model"]["base"])

    @property
    def adapts(self) -> bool:
        return self.kind in ("adapter", "combination")
