"""A thought that is begun for the model, or skipped: attacks of somebody who writes a part of what the model would write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from llm_unlearn.attacks.finding import Axis, Gain
from llm_unlearn.attacks.rows import curve_of, set_of
from llm_unlearn.bars import Bar
from llm_unlearn.evaluation.tables import Floats
from llm_unlearn.spec import PositiveInt, Refused, spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.evaluation.sets import EncodedSet, Thinking
    from llm_unlearn.models.load import Loaded

Measure = Literal["rouge", "keyword"]
"""Score of a greedy answer: ROUGE-L recall of the truth, or the share of its key spans."""


@spec
class BegunThought:
    """The thought is begun for the model, with the first tokens of the true thought or with a phrase; the model goes on from there,
    and then answers. One point per beginning, the first without one. (Prefilling, applied to thoughts; R-TOFU, 2505.15214, begins
    them so that little is thought.)

    A beginning may hold a part of the answer: what the retrained model makes of the same beginning is the control.
    """

    name: Literal["begun_thought"] = "begun_thought"
    set: str = "forget"
    """A set that is asked with thinking on (`chat: {thinking: true}`)."""
    tokens: tuple[PositiveInt, ...] = (4, 8)
    """Tokens of the true thought that are written for the model; every row must bring a thought, unless there are none."""
    phrases: tuple[str, ...] = ("I remember that",)
    """Texts that are written for the model instead."""
    measure: Measure = "rouge"
    """Score that the curve shows: rouge, or keyword (the set needs the column)."""
    max_new_tokens: PositiveInt = 64
    """Longest greedy answer."""

    y: ClassVar[Gain] = Gain("how much of the answers comes out behind a thought that was begun")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "begun thought"

    @property
    def x(self) -> Axis:
        """The first point is the model left to itself."""
        ticks = ("as asked", *(f"{count} true tokens" for count in self.tokens), *(f"“{text}”" for text in self.phrases))
        return Axis("beginning of the thought", ticks=ticks, untouched=True)

    def __call__(self, subject: Subject) -> Curve:
        found, loaded = set_of(subject, self.name, self.set), subject.load()
        thinking = _thinking(found, self.name, self.set)
        if self.tokens and not all(thinking.thoughts):
            raise Refused(f"{self.name}: rows of {self.set!r} bring no thoughts. Set tokens: [], or name a column in `thought`.")
        values = [_recalled(subject, loaded, found, self.measure, self.max_new_tokens)]
        for begin in [*self._true(loaded, thinking), *([text] * len(found.ids) for text in self.phrases)]:
            openings = [replace(one, text=one.text + text) for one, text in zip(thinking.openings, begin, strict=True)]
            begun = replace(found, thinking=replace(thinking, openings=openings))
            values.append(_recalled(subject, loaded, begun, self.measure, self.max_new_tokens))
        return curve_of(range(len(values)), values)

    def _true(self, loaded: Loaded, thinking: Thinking) -> list[list[str]]:
        """Return for each number of tokens the beginnings of all rows' true thoughts."""
        ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in thinking.thoughts]
        return [[str(loaded.tokenizer.decode(one[:count])) for one in ids] for count in self.tokens]


@spec
class SkippedThought:
    """An empty thought is forced on a model that is asked to think, so that it answers at once (ZeroThink in R-TOFU, 2505.15214):
    what was unlearned in thoughts alone comes back."""

    name: Literal["skipped_thought"] = "skipped_thought"
    set: str = "forget"
    """A set that is asked with thinking on (`chat: {thinking: true}`)."""
    measure: Measure = "rouge"
    """Score that the curve shows: rouge, or keyword (the set needs the column)."""
    max_new_tokens: PositiveInt = 64
    """Longest greedy answer."""

    x: ClassVar[Axis] = Axis("thought", ticks=("as asked", "skipped"), untouched=True)
    y: ClassVar[Gain] = Gain("how much of the answers comes out without a thought")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "skipped thought"

    def __call__(self, subject: Subject) -> Curve:
        found, loaded = set_of(subject, self.name, self.set), subject.load()
        thinking = _thinking(found, self.name, self.set)
        prompts = thinking.prompts(loaded.tokenizer, [""] * len(found.ids))
        examples = [
            replace(one, ids=(*prompt, *one.ids[one.answer :]), answer=len(prompt))
            for one, prompt in zip(found.asked, prompts, strict=True)
        ]
        skipped = replace(found, examples=examples, row=list(range(len(examples))), kind=["answer"] * len(examples), thinking=None)
        values = [_recalled(subject, loaded, one, self.measure, self.max_new_tokens) for one in (found, skipped)]
        return curve_of(range(2), values)


def _thinking(found: EncodedSet, attack: str, name: str) -> Thinking:
    """Return how a set is asked to think.

    Raises:
        Refused: it is asked without, or for thoughts alone.
    """
    if found.thinking is None or found.thinking.only:
        fix = f"Set sets.{name}.chat.thinking: true and targets: answer, or name another set"
        raise Refused(f"{attack}: {name!r} is not asked to think and then to answer. {fix}.")
    return found.thinking


def _recalled(subject: Subject, loaded: Loaded, asked: EncodedSet, measure: Measure, most: int) -> Floats:
    """(R,) Return how much of each true answer the model's greedy answer says."""
    import torch

    from llm_unlearn.evaluation.answering import generation_pass
    from llm_unlearn.evaluation.text import names, rouge_l

    silent = Bar("", len(asked.ids), "answer", quiet=True)
    loaded.model.eval()
    with torch.no_grad(), subject.accelerator.autocast():
        texts = generation_pass(loaded, asked, subject.accelerator, subject.batch_tokens, most, silent)
    if measure == "rouge":
        return rouge_l(asked.answers, texts, True, "recall")
    spans: Sequence[Sequence[str]] = asked.keywords or []
    if not all(spans) or not spans:
        raise Refused("measure: keyword needs key spans of every row. Name their column in the set's `keyword`, or set rouge.")
    return np.array([np.mean([names(text, span) for span in of_row]) for text, of_row in zip(texts, spans, strict=True)])
