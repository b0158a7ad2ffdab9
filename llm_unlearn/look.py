"""One look at a model: what it says of a suite's sets, and how to load it again for the attacks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.attacks.audit import Target, audit
from llm_unlearn.bases import resolve_base
from llm_unlearn.evaluation.encoding import encode_sets, encoding_key, suite_capacity
from llm_unlearn.evaluation.likelihood import Control
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.evaluation.tables import Tables
from llm_unlearn.evaluation.tasks import Answered
from llm_unlearn.models.load import Loaded, load
from llm_unlearn.sections import Model
from llm_unlearn.spec import fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

COLUMNS = ("model", "before", "after", "retrained")


@dataclass(frozen=True)
class Seen:
    """What one model said, and which model that was."""

    tables: Tables
    name: str
    target: Target
    answered: tuple[Answered, ...] = ()
    """What it scored on the suite's tasks."""


Encoded = dict[str, Mapping[str, EncodedSet]]
"""A suite's sets by tokenizer and capacity: models with the same ones share them."""


class Look:
    """One look at a model: the suite's passes over its sets, from the cache where this model was asked before.

    `controls` is what the retrained model left for others to be compared with; its own look fills `leave`. Without a cache,
    nothing is kept.
    """

    def __init__(
        self, suite: Suite, loaded: Loaded, accelerator: Accelerator, cache: Path | None,
        controls: Mapping[str, Control] | None = None, leave: dict[str, Control] | None = None, encoded: Encoded | None = None,
    ) -> None:  # fmt: skip
        self.suite, self.accelerator, self.cache = suite, accelerator, cache / "tables" if cache else None
        self.controls, self.leave = controls, leave
        capacity = suite_capacity(suite.sets, loaded)
        encoded, key = {} if encoded is None else encoded, encoding_key(capacity, loaded)
        if key not in encoded:
            encoded[key] = encode_sets(suite.sets, suite.needs, loaded, capacity, suite.max_thought_tokens)
            for text in capacity.warnings({name: one.examples for name, one in encoded[key].items()}):
                if accelerator.is_main_process:
                    print(f"warning: set {text}", file=sys.stderr)
        self.sets = encoded[key]

    def seen(self, loaded: Loaded, title: str, name: str, model: Model, adapter: str | None = None) -> Seen:
        """What it said, and how to load it again."""
        answered = self._answered(loaded, title)  # first: a task that cannot be had is said before the long passes
        return Seen(self(loaded, title), name, Target(model, adapter, loaded.identity, self.sets), answered)

    def _answered(self, loaded: Loaded, title: str) -> tuple[Answered, ...]:
        if not self.suite.tasks:
            return ()
        from llm_unlearn.evaluation.harness import answers_of  # an extra that only suites with tasks need

        return answers_of(
            self.suite.tasks,
            loaded,
            self.accelerator,
            batch_tokens=self.suite.batch_tokens,
            cache=self.cache,
            title=title,
            chat=self.suite.chat,
        )

    def __call__(self, loaded: Loaded, title: str, keep: bool = True) -> Tables:
        suite = self.suite
        return tables_of(
            loaded, self.sets, self.accelerator, batch_tokens=suite.batch_tokens, max_new_tokens=suite.max_new_tokens,
            cache=self.cache if keep else None, title=title, controls=self.controls, leave=self.leave,
        )  # fmt: skip


@dataclass(frozen=True)
class Looks:
    """One suite on many columns, one after the other; what the retrained model left for the others goes along."""

    suite: Suite
    accelerator: Accelerator
    cache: Path
    controls: dict[str, Control] = field(default_factory=dict)
    encoded: Encoded = field(default_factory=dict)
    shared: dict[tuple[str, str | None], Seen] = field(default_factory=dict)
    """Models that others are seen beside, before and retrained: each is looked at once."""

    def __call__(self, asked: Mapping[str, tuple[Model, str | None] | Loaded], name: str | None = None) -> dict[str, Seen]:
        """Every column; the retrained model first, as the others are compared with it.

        Args:
            asked: column -> model and adapter, or a model that is there.
            name: of the model after, or of the only one; without it, its adapter or base.
        """
        found: dict[str, Seen] = {}
        for column in sorted(asked, key=lambda column: column != "retrained"):
            one = asked[column]
            if isinstance(one, Loaded):
                found[column] = self._given(one, column)
                continue
            model, adapter = one
            if column in ("after", "model"):  # this candidate's own, which nobody asks for again
                found[column] = self._see(model, adapter, name or adapter or model.base)
                continue
            key = (fingerprint(model), adapter)
            if key not in self.shared:
                leave = self.controls if column == "retrained" else None
                self.shared[key] = self._see(model, adapter, adapter or model.base, leave)
            found[column] = self.shared[key]
        return found

    def _see(self, model: Model, adapter: str | None, name: str, leave: dict[str, Control] | None = None) -> Seen:
        """Load a model, look at it, and let it go."""
        model = resolve_base(model, self.cache)
        loaded = load(model, self.accelerator.device, adapter=adapter)
        return self._look(loaded, self.cache, leave).seen(loaded, name, name, model, adapter)

    def _given(self, loaded: Loaded, column: str) -> Seen:
        """Look at a model that is there. What decides its answers cannot be known from outside, so none of them is kept."""
        return self._look(loaded, None).seen(loaded, f"the {column}", column, Model(base=column, adapter=None))

    def _look(self, loaded: Loaded, cache: Path | None, leave: dict[str, Control] | None = None) -> Look:
        controls = None if leave is not None else self.controls
        return Look(self.suite, loaded, self.accelerator, cache, controls, leave, self.encoded)


def attacked(suite: Suite, seen: Mapping[str, Seen], accelerator: Accelerator, cache: Path) -> list[dict[str, Any]]:
    """The suite's attacks on every model that was seen."""
    if not suite.attacks:
        return []
    accelerator.free_memory()
    targets = {column: seen[column].target for column in COLUMNS if column in seen}
    return audit(suite.attacks, targets, accelerator, batch_tokens=suite.batch_tokens, seed=suite.seed, cache=cache / "attacks")
