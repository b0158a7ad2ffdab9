"""Relearning: how few steps of fine-tuning bring back rows that were not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from llm_unlearn.attacks.asking import Asked, answers_of, curve_of, known
from llm_unlearn.attacks.finding import Axis, Curve, Gain, Subject
from llm_unlearn.sections import Adapter, Train
from llm_unlearn.spec import PositiveFloat, PositiveInt, Refused, Share, spec

if TYPE_CHECKING:
    from llm_unlearn.evaluation.sets import EncodedSet
    from llm_unlearn.models.load import Loaded
    from llm_unlearn.training.job import Job

GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Steps after which the attacker looks; the last step is added."""


@spec
class Relearning:
    """Fine-tune the released weights, the adapter merged, for N optimizer steps on part of the forget set, on related or on
    unrelated rows, and measure rows of the forget set that were not trained on, along the way (Hu et al. 2024, 2406.13356; Lynch
    et al. 2024, 2402.16835). The retrained control, attacked in the same way, tells what is learnt anew from what comes back."""

    name: Literal["relearning"] = "relearning"
    set: str
    """The set whose answers the attacker wants."""
    train_on: str | None = None
    """The set that the attacker trains on. Without it, `share` of `set` itself; the rest of it is measured."""
    share: Share = 0.5
    """Share of the rows of `set` that the attacker has, drawn from the suite's seed."""
    rows: PositiveInt | None = None
    """At most so many rows to train on, drawn from the suite's seed."""
    steps: PositiveInt = 20
    """Optimizer steps, the attacker's budget."""
    window: PositiveInt = 16
    """Rows in one optimizer step, over all processes."""
    lr: PositiveFloat = 1e-4
    """Learning rate of AdamW, held constant."""
    adapter: Adapter | None = Adapter()
    """The adapter that the attacker trains; null trains the full weights."""
    measure: Asked = "probability"
    """What is measured; the notes have the other one, at the last point."""

    def __post_init__(self) -> None:
        if self.share == 0:
            raise ValueError("a share above 0")

    @property
    def title(self) -> str:
        return f"relearning on {self.train_on or f'part of {self.set}'}"

    @property
    def x(self) -> Axis:
        return Axis("training", "optimizer steps", untouched=True)

    @property
    def y(self) -> Gain:
        return Gain(self.measure)

    def __call__(self, subject: Subject) -> Curve:
        mine, asked = self.parts(subject)
        loaded = subject.load(merged=True)
        seen = {0: known(loaded, asked, self.measure, subject)}
        model = self._trainable(loaded, subject)

        def look(step: int) -> None:
            if step in GRID or step == self.steps:
                seen[step] = known(replace(loaded, model=model), asked, self.measure, subject)

        fine_tune(self.job(mine, subject), model, subject, look, f"{self.title}: {subject.column}")
        return curve_of([(float(step), one) for step, one in seen.items()], {"trained_rows": float(len(mine.ids))})

    def parts(self, subject: Subject) -> tuple[EncodedSet, EncodedSet]:
        """The rows that are trained on, and those that are measured; which ones follows from the seed and the rows' ids.

        Raises:
            Refused: nothing is left on one of the two sides.
        """
        from llm_unlearn.data.examples import draw

        def shuffled(name: str) -> list[int]:
            ids = subject.sets[name].ids
            return sorted(range(len(ids)), key=lambda row: draw(subject.seed, "relearning", name, ids[row], row))

        order = shuffled(self.train_on or self.set)
        if self.train_on and self.train_on != self.set:
            mine, rest = order[: self.rows], list(range(len(subject.sets[self.set].ids)))
        else:
            size = round(self.share * len(order))
            mine, rest = order[: min(size, self.rows or size)], sorted(order[size:])
        if not mine or not rest:
            raise Refused(f"{self.title}: {len(mine)} rows to train on and {len(rest)} to measure; both sides need some.")
        return answers_of(subject.sets[self.train_on or self.set], sorted(mine)), answers_of(subject.sets[self.set], rest)

    def job(self, mine: EncodedSet, subject: Subject) -> Job:
        """−log p of the attacker's rows, and nothing else."""
        from llm_unlearn.data.schedule import build
        from llm_unlearn.objectives.likelihood import NLL
        from llm_unlearn.objectives.terms import Term
        from llm_unlearn.training.job import Job

        stream = mine.examples[0].stream
        schedule = build({stream: len(mine.examples)}, {stream: self.window}, subject.seed, steps=self.steps)
        settings = Train(
            steps=self.steps, lr=self.lr, schedule="constant", warmup=0.0, batch_tokens=subject.batch_tokens,
            checkpoint_every=self.steps + 1,
        )  # fmt: skip
        return Job({stream: Term(loss=NLL())}, {stream: mine.examples}, schedule, settings, subject.seed)

    def _trainable(self, loaded: Loaded, subject: Subject) -> Any:
        from llm_unlearn.models.load import add_adapter
        from llm_unlearn.models.quantized import is_quantized

        if self.adapter:
            return add_adapter(loaded.model, self.adapter, subject.seed)
        if is_quantized(loaded.causal):
            raise Refused(f"{self.title}: quantized weights cannot be trained; give it an adapter.")
        return loaded.model.float().requires_grad_()


def fine_tune(job: Job, model: Any, subject: Subject, look: Callable[[int], None], title: str) -> None:
    """Train as the project trains, in a folder that nobody keeps.

    Raises:
        KeyboardInterrupt: the user asked to stop; what was found so far is kept, and this attack is carried out again.
        Refused: a loss was not finite.
    """
    from llm_unlearn.training.loop import train

    with TemporaryDirectory(prefix="llm-unlearn-") as folder:
        outcome = train(job, model, subject.accelerator, Path(folder), look=look, title=title)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.broken:
        raise Refused(f"{title}: {outcome.reason}; give it a lower lr.")
