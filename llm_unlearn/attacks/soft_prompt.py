"""A prompt of free vectors, trained to bring the answers back; and the control without which it proves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from llm_unlearn.attacks.control import Wrong, beyond, other_answers
from llm_unlearn.attacks.finding import Axis, Gain
from llm_unlearn.attacks.rows import (
    Reading,
    answers_of,
    batches,
    embedding_table,
    insert,
    joined,
    reading_of,
    split,
    words_of,
)
from llm_unlearn.evaluation.tables import Floats
from llm_unlearn.spec import NaturalInt, Part, PositiveFloat, PositiveInt, spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.data.batch import Batch
    from llm_unlearn.data.examples import Example
    from llm_unlearn.models.load import Loaded


@spec
class SoftPrompt:
    """k free vectors before the prompt, moved by the sign of the gradient to raise log p of the answers (Schwinn et al.,
    2402.09063), and the same attack on answers that do not belong to the questions: such a prompt draws random strings out of any
    model (2502.15836), so that the difference of the two is the finding.

    One prompt is learnt on some rows and measured on the others; with `per_row`, each row has its own and is measured itself: that
    brings out the control in the end as well, and only what comes sooner (`steps to ½` in the notes) is a finding.
    """

    name: Literal["soft_prompt"] = "soft_prompt"
    set: str = "forget"
    """The set whose answers are asked for."""
    tokens: NaturalInt = 20
    """k. They stand behind the beginning-of-text token, where the tokenizer sets one."""
    step: PositiveFloat = 1e-3
    """How far every coordinate moves in one step; the spread of the model's own embeddings stands in the notes."""
    steps: PositiveInt = 100
    """Steps of the attack, each on all rows that it learns from."""
    every: PositiveInt = 10
    """Measure after every so many steps."""
    per_row: bool = False
    """A prompt for each row, learnt from that row; otherwise one for all, measured on rows that it did not learn from."""
    share: Part = 0.5
    """Rows that the one prompt learns from."""
    control: Wrong = "shuffled"
    """What the control asks for: the answers of other rows, or random tokens in place of all but the last."""

    x: ClassVar[Axis] = Axis("sign-gradient steps", "steps")
    y: ClassVar[Gain] = Gain("mean probability of the answers, less that of the control's")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "soft prompt per row" if self.per_row else "soft prompt"

    def __call__(self, subject: Subject) -> Curve:
        loaded, examples = subject.load(), answers_of(subject, self.name, self.set)
        loaded.model.requires_grad_(False)
        rows = list(range(len(examples)))
        learn, test = (rows, rows) if self.per_row else split(len(rows), self.share, subject.seed, self.name)
        parts = [rows] if self.per_row else [learn, test]
        wrong = other_answers(subject, f"{self.name} of {self.set!r}", loaded, examples, parts, self.control)
        (true, loss), (control, control_loss) = (
            self._attack(subject, loaded, [asked[i] for i in learn], [asked[i] for i in test]) for asked in (examples, wrong)
        )
        notes = {
            "loss, before": loss[0],
            "loss, after": loss[-1],
            "control loss, after": control_loss[-1],
            "embedding spread": float(embedding_table(loaded).std()),
        }
        return beyond(self._measured, true, control, notes)

    @property
    def _measured(self) -> list[int]:
        return sorted({*range(0, self.steps + 1, self.every), self.steps})

    def _attack(
        self, subject: Subject, loaded: Loaded, learn: Sequence[Example], asked: Sequence[Example]
    ) -> tuple[list[Floats], list[float]]:
        """Probabilities of the asked answers at each point of the curve, and the loss there."""
        import torch

        table, place = embedding_table(loaded), _behind_bos(loaded, learn)
        words = words_of(loaded.tokenizer, len(table))
        drawn = np.random.default_rng([subject.seed, 13]).choice(words, self.tokens)
        begin = table[torch.as_tensor(drawn, device=table.device)].float()  # (k, D) where real tokens are
        prompts = begin[None].repeat(len(learn) if self.per_row else 1, 1, 1)  # (P, k, D)
        with_places, to_ask = ([insert(one, place, (0,) * self.tokens) for one in part] for part in (learn, asked))
        values, losses = [], []
        for step in range(self.steps + 1):
            gradient, loss = _gradient(subject, loaded, with_places, prompts, place)
            if step in self._measured:
                values.append(_read(subject, loaded, to_ask, prompts, place).probability)
                losses.append(loss)
                subject.tell(f"{self.name}: step {step} of {self.steps}, loss {loss:.4f}")
            prompts = prompts - self.step * gradient.sign()
        return values, losses


def _behind_bos(loaded: Loaded, examples: Sequence[Example]) -> int:
    bos = loaded.tokenizer.bos_token_id
    return int(bos is not None and all(example.ids[0] == bos for example in examples))


def _embeds(loaded: Loaded, batch: Batch, chosen: Sequence[int], prompts: Tensor, place: int) -> Tensor:
    """(B, L, D) a batch's embeddings, with its rows' prompts from `place` on."""
    import torch

    from llm_unlearn.models.scores import embedding_of

    own = embedding_of(loaded.model)(batch.input_ids)
    theirs = prompts[torch.as_tensor(chosen, device=prompts.device)] if len(prompts) > 1 else prompts.expand(len(chosen), -1, -1)
    return torch.cat([own[:, :place], theirs.to(own), own[:, place + prompts.shape[1] :]], dim=1)


def _gradient(subject: Subject, loaded: Loaded, examples: Sequence[Example], prompts: Tensor, place: int) -> tuple[Tensor, float]:
    """(P, k, D), float: the gradient of the mean over rows of NLL / T, and that mean, over the rows of all processes. Of prompts of
    single rows, a process has the gradients of its own rows, and zeros: it moves those that it reads, and no other."""
    import torch

    from llm_unlearn.models.scores import Scorer, by_stream, head_of

    scorer, head = Scorer(loaded.model), head_of(loaded.model)
    total, gradient = 0.0, torch.zeros_like(prompts)
    for chosen, batch in batches(examples, subject):
        free = prompts.clone().requires_grad_()
        with torch.enable_grad(), subject.accelerator.autocast():
            states = scorer(None, batch.at, embeds=_embeds(loaded, batch, chosen, free, place))
            (scores,) = by_stream(states, head, batch).values()
            loss = -(scores.by_sequence(scores.logps) / batch.owner.bincount()).sum() / len(examples)
        if free.numel():
            gradient += torch.autograd.grad(loss, free)[0]
        total += float(loss.detach())
    reduce = subject.accelerator.reduce
    return reduce(gradient, "sum") if len(prompts) == 1 else gradient, float(
        reduce(torch.tensor(total, device=prompts.device), "sum")
    )


def _read(subject: Subject, loaded: Loaded, examples: Sequence[Example], prompts: Tensor, place: int) -> Reading:
    import torch

    from llm_unlearn.models.scores import Scorer, head_of
    from llm_unlearn.objectives.views import TOP

    scorer, head, parts = Scorer(loaded.model), head_of(loaded.model), []
    with torch.no_grad(), subject.accelerator.autocast():
        for chosen, batch in batches(examples, subject):
            states = scorer(None, batch.at, embeds=_embeds(loaded, batch, chosen, prompts, place))[TOP]
            parts.append((chosen, reading_of(states, head, batch)))
    return joined(parts, len(examples))
