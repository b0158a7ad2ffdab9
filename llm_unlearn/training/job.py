"""What is to be trained on what: terms, examples, schedule and settings, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import Schedule
from llm_unlearn.data.tokens import lengths_of
from llm_unlearn.models.depth import Layers
from llm_unlearn.models.reference import Asked
from llm_unlearn.objectives.representation import Lunar
from llm_unlearn.objectives.terms import Term, layers_read, stream_of, streams_read
from llm_unlearn.objectives.views import TOP
from llm_unlearn.sections import Train
from llm_unlearn.training.certified import Certified
from llm_unlearn.training.privacy import Mechanism


@dataclass(frozen=True)
class Job:
    """What is to be trained on what. `examples` are those of every stream, in the order that the schedule's indices mean."""

    terms: Mapping[str, Term]
    examples: Mapping[str, Sequence[Example]]
    schedule: Schedule
    settings: Train
    seed: int = 0
    aim: float | None = None
    """The perplexity of the forget set at which the run is to end, where that is known beforehand."""
    private: Mechanism | None = None
    """What is drawn and added where the settings ask for privacy."""
    certified: Certified | None = None
    """The noisy steps that come first, where the method is certified."""

    @property
    def noisy(self) -> Mechanism | Certified | None:
        """What the run's guarantee comes from, where it has one."""
        return self.private or self.certified

    def example(self, stream: str, index: int) -> Example:
        return self.examples[stream][index]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example that the run sees."""
        streams = {name for name in self.read if name in self.schedule.streams}
        seen = {name: self.schedule.seen(name) for name in streams}
        return max((int(lengths_of(self.examples[name])[one].max()) for name, one in seen.items() if len(one)), default=1)

    @cached_property
    def every_term(self) -> dict[str, Term]:
        """The objective's terms, and those that rules bring along."""
        return {**self.terms, **{name: term for rule in self.settings.rules for name, term in rule.extra.items()}}

    @cached_property
    def needs(self) -> dict[str, Asked]:
        """Stream -> what its losses read of the reference."""
        found: dict[str, Asked] = {}
        for name, term in self.every_term.items():
            for stream, asked in asked_by(term, name).items():
                found[stream] = found.get(stream, Asked()) | asked
        return found

    @cached_property
    def layers(self) -> dict[str, Layers]:
        """Stream -> the layers that its losses read of the policy."""
        found: dict[str, set[int]] = {}
        for name, term in self.every_term.items():
            for stream in streams_read(term, name):
                found.setdefault(stream, set()).update(layers_read(term.loss))
        return {stream: tuple(sorted(layers)) for stream, layers in found.items()}

    @property
    def read(self) -> set[str]:
        """The streams that go through the model, as it is or as it was."""
        return {*self.layers, *(stream for stream, asked in self.needs.items() if asked.run)}


def asked_by(term: Term, name: str) -> dict[str, Asked]:
    """Stream -> what one term's loss reads of the reference."""
    loss, own = term.loss, stream_of(term, name)
    if isinstance(loss, Lunar):
        (other,) = streams_read(term, name, loss.needs.contrasts)
        return {own: Asked((loss.layer,), centres=(loss.layer,)), other: Asked(centres=(loss.layer,))}
    asked = {
        "none": Asked(),
        "logps": Asked(logps=True),
        "logits": Asked((TOP,)),
        "hidden": Asked(layers_read(loss)),
        "routing": Asked(layers_read(loss)),
    }[loss.needs.reference]
    streams = streams_read(term, name, (*loss.needs.reads, *loss.needs.contrasts))
    return {stream: asked for stream in streams if asked.run}
