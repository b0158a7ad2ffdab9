"""One look at a model: what it says of a suite's sets, and how to load it again for the attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.attacks.audit import Target, audit
from llm_unlearn.evaluation.likelihood import Control
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import encode_set
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.evaluation.tables import Tables
from llm_unlearn.models.load import Loaded, load
from llm_unlearn.recipe import Model

if TYPE_CHECKING:
    from accelerate import Accelerator

COLUMNS = ("model", "before", "after", "retrained")


@dataclass(frozen=True)
class Seen:
    """What one model said, and which model that was."""

    tables: Tables
    name: str
    target: Target


class Look:
    """One look at a model: the suite's passes over its sets, from the cache where this model was asked before.

    `controls` is what the retrained model left for others to be compared with; its own look fills `leave`.
    """

    def __init__(
        self, suite: Suite, loaded: Loaded, accelerator: Accelerator, cache: Path,
        controls: Mapping[str, Control] | None = None, leave: dict[str, Control] | None = None,
    ) -> None:  # fmt: skip
        self.suite, self.accelerator, self.cache = suite, accelerator, cache / "tables"
        self.controls, self.leave = controls, leave
        self.sets = {name: encode_set(name, source, suite.needs(name), loaded.tokenizer) for name, source in suite.sets.items()}

    def seen(self, loaded: Loaded, title: str, name: str, model: Model, adapter: str | None = None) -> Seen:
        """What it said, and how to load it again."""
        return Seen(self(loaded, title), name, Target(model, adapter, loaded.identity, self.sets))

    def __call__(self, loaded: Loaded, title: str, keep: bool = True) -> Tables:
        suite = self.suite
        return tables_of(
            loaded, self.sets, self.accelerator, batch_tokens=suite.batch_tokens, max_new_tokens=suite.max_new_tokens,
            cache=self.cache if keep else None, title=title, controls=self.controls, leave=self.leave,
        )  # fmt: skip


def see(
    suite: Suite, model: Model, adapter: str | None, name: str, accelerator: Accelerator, cache: Path,
    controls: Mapping[str, Control] | None = None, leave: dict[str, Control] | None = None,
) -> Seen:  # fmt: skip
    """Load a model, look at it, and let it go."""
    loaded = load(model, accelerator.device, adapter=adapter)
    look = Look(suite, loaded, accelerator, cache, None if leave is not None else controls, leave)
    return look.seen(loaded, name, name, model, adapter)


def attacked(suite: Suite, seen: Mapping[str, Seen], accelerator: Accelerator, cache: Path) -> list[dict[str, Any]]:
    """The suite's attacks on every model that was seen."""
    if not suite.attacks:
        return []
    accelerator.free_memory()
    targets = {column: seen[column].target for column in COLUMNS if column in seen}
    return audit(suite.attacks, targets, accelerator, batch_tokens=suite.batch_tokens, seed=suite.seed, cache=cache / "attacks")
