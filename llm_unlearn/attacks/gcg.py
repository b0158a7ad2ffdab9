"""Tokens that no person would write, searched so that the answer comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.attacks.control import Wrong, beyond, other_answers
from llm_unlearn.attacks.finding import Axis, Gain
from llm_unlearn.attacks.rows import answers_of, batches, embedding_table, insert, read, set_of, words_of
from llm_unlearn.chat import Chat
from llm_unlearn.evaluation.tables import Floats
from llm_unlearn.spec import PositiveInt, Refused, spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.attacks.rows import Reading
    from llm_unlearn.data.examples import Example
    from llm_unlearn.models.load import Loaded

Suffix = tuple[int, ...]


@spec
class GCG:
    """Greedy coordinate gradient (Zou et al. 2023, 2307.15043, alg. 1 and 2): k tokens at the end of the prompt. Each step takes
    the `candidates` tokens of steepest descent at every place, by the gradient with respect to one-hot tokens, tries `swaps` draws
    of one place and one of its candidates, and keeps the best, if it is better than what was there. Then the same search again for
    answers that do not belong to the questions: a prompt can be found for random strings, too, in any model (2502.15836), so that
    the difference of the two is the finding.

    The loss is the mean over rows of NLL / T. Tokens are given to the model as ids; as text, a tokenizer may cut them otherwise.
    """

    name: Literal["gcg"] = "gcg"
    set: str = "forget"
    """The set whose answers are asked for."""
    tokens: PositiveInt = 20
    """k, the length of the suffix."""
    candidates: PositiveInt = 256
    """Tokens of steepest descent that a place may change to."""
    swaps: PositiveInt = 512
    """Changes of one token that each step tries."""
    steps: PositiveInt = 250
    """Steps of the search. On a CPU: 20 steps of 64 swaps on 4 rows of the embedded model take about 40 seconds."""
    every: PositiveInt = 10
    """Measure after every so many steps."""
    rows: PositiveInt = 8
    """Rows that are attacked, drawn from the seed."""
    per_row: bool = False
    """A suffix for each of these rows, measured on that row; otherwise one for all of them, measured on the set's other rows."""
    measure: Literal["probability", "exact"] = "probability"
    """Mean of exp(−NLL/T), or share of rows whose whole answer greedy decoding writes."""
    control: Wrong = "shuffled"
    """What the control asks for: the answers of other rows, or random tokens in place of all but the last."""
    init: str = "!"
    """The suffix begins as the first token of this text, k times."""

    x: ClassVar[Axis] = Axis("steps of the search", "steps")
    y: ClassVar[Gain] = Gain("how well the answers come out behind the adversarial suffix, less the control's")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "gcg per row" if self.per_row else "gcg"

    def __call__(self, subject: Subject) -> Curve:
        loaded, examples = subject.load(), answers_of(subject, self.name, self.set)
        loaded.model.requires_grad_(False)
        asked_set = set_of(subject, self.name, self.set)
        places = ends_of_prompts(loaded, examples, asked_set.prompts, asked_set.chat)
        count = min(self.rows, len(examples))
        if not self.per_row and count == len(examples):
            raise Refused(
                f"{self.name}: {count} rows to attack and {len(examples)} in {self.set!r} leave none to measure one suffix on; "
                "lower `rows`, or say per_row: true."
            )
        chosen = sorted(np.random.default_rng([subject.seed, 21]).permutation(len(examples))[:count].tolist())
        test = chosen if self.per_row else [i for i in range(len(examples)) if i not in set(chosen)]
        parts = [list(range(len(examples)))] if self.per_row else [chosen, test]
        wrong = other_answers(subject, f"{self.name} of {self.set!r}", loaded, examples, parts, self.control)
        (true, losses), (control, control_losses) = (
            self._attack(subject, loaded, asked, places, chosen, test) for asked in (examples, wrong)
        )
        alone = self._value(read(loaded, subject, [examples[i] for i in test]))
        notes = {"without a suffix": float(alone.mean()), "control loss, after": control_losses[-1]}
        notes |= {f"loss at step {step}": loss for step, loss in zip(self._measured, losses, strict=True)}
        return beyond(self._measured, true, control, notes)

    @property
    def _measured(self) -> list[int]:
        return sorted({*range(0, self.steps + 1, self.every), self.steps})

    def _value(self, reading: Reading) -> Floats:
        return reading.probability if self.measure == "probability" else reading.exact

    def _attack(
        self,
        subject: Subject,
        loaded: Loaded,
        examples: Sequence[Example],
        places: Sequence[int],
        chosen: list[int],
        test: list[int],
    ) -> tuple[list[Floats], list[float]]:
        """What the measured rows give at each point of the curve, and the mean loss of the attacked ones there."""
        groups = [([i], [i]) for i in chosen] if self.per_row else [(chosen, test)]
        found = [self._search(subject, loaded, examples, places, *group) for group in groups]
        values, losses = zip(*found, strict=True)
        rows = [np.concatenate(one) for one in zip(*values, strict=True)]
        return rows, [float(np.mean(one)) for one in zip(*losses, strict=True)]

    def _search(
        self,
        subject: Subject,
        loaded: Loaded,
        examples: Sequence[Example],
        places: Sequence[int],
        group: list[int],
        asked: list[int],
    ) -> tuple[list[Floats], list[float]]:
        """Probabilities of the asked rows at each point of the curve, and the loss of the attacked ones there."""
        words = words_of(loaded.tokenizer, len(embedding_table(loaded)))
        suffix: Suffix = (_first_token(loaded, self.init),) * self.tokens
        rows = [(examples[i], places[i]) for i in group]
        (loss,) = losses_of(subject, loaded, rows, [suffix])
        values, losses = [], []
        for step in range(self.steps + 1):
            if step in self._measured:
                reading = read(loaded, subject, [insert(examples[i], places[i], suffix) for i in asked])
                values.append(self._value(reading))
                losses.append(float(loss))
                subject.tell(f"gcg: step {step} of {self.steps}, loss {loss:.4f}")
            if step < self.steps:
                slope = token_gradient(subject, loaded, rows, suffix)
                rng = np.random.default_rng([subject.seed, 22, group[0], step])
                tried = self._swaps(slope, words, suffix, rng)
                found = losses_of(subject, loaded, rows, tried)
                if found.min() < loss:
                    suffix, loss = tried[int(found.argmin())], found.min()
        return values, losses

    def _swaps(self, slope: Floats, words: NDArray[np.int64], suffix: Suffix, rng: np.random.Generator) -> list[Suffix]:
        """Changes of one token each, drawn without regard to how good they look among the candidates."""
        steep = slope[:, words].copy()  # (k, words)
        for place, token in enumerate(suffix):
            steep[place, words == token] = np.inf  # no change is none
        best = words[np.argsort(steep, axis=1, kind="stable")[:, : min(self.candidates, len(words) - 1)]]
        where, which = rng.integers(0, len(suffix), self.swaps), rng.integers(0, best.shape[1], self.swaps)
        changed = [(*suffix[:i], int(best[i, j]), *suffix[i + 1 :]) for i, j in zip(where, which, strict=True)]
        return list(dict.fromkeys(changed))


def _first_token(loaded: Loaded, text: str) -> int:
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise Refused(f"gcg: init: {text!r} has no token in this model's vocabulary; give a text that has one.")
    return int(ids[0])


def ends_of_prompts(loaded: Loaded, examples: Sequence[Example], prompts: Sequence[str], chat: Chat | None) -> list[int]:
    """Return, for each row, the index in its ids behind the last token of what the user says, where the template's own words go on.
    Running text has no prompt: there it is the index of the first target.

    Raises:
        Refused: the template writes something else behind the row's prompt than behind the prompt alone.
    """
    from llm_unlearn.data.rendering import MARKER, Renderer

    tokenizer, places = loaded.tokenizer, list[int]()
    render = Renderer(tokenizer, chat or Chat(), "gcg")
    for example, prompt in zip(examples, prompts, strict=True):
        if not prompt:
            places.append(example.answer)
            continue
        whole = render([{"role": "user", "content": prompt}, {"role": "assistant", "content": MARKER}], example.id)
        encoded = tokenizer(whole.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        tail = [ids[t] for t, (b, e) in enumerate(offsets) if b >= whole.question_end and e <= whole.answer_begin]
        place = example.answer - len(tail)
        if list(example.ids[place : example.answer]) != tail:
            raise Refused(f"gcg: the chat template goes on in another way behind {prompt[:60]!r} than in the row; use soft_prompt.")
        places.append(place)
    return places


def losses_of(subject: Subject, loaded: Loaded, rows: Sequence[tuple[Example, int]], suffixes: Sequence[Suffix]) -> Floats:
    """(C,) the mean over rows of NLL / T, for each suffix."""
    asked = [insert(example, place, suffix) for suffix in suffixes for example, place in rows]
    found: Floats = -read(loaded, subject, asked).logp.reshape(len(suffixes), len(rows)).mean(1)
    return found


def token_gradient(subject: Subject, loaded: Loaded, rows: Sequence[tuple[Example, int]], suffix: Suffix) -> Floats:
    """(k, V) the slope of the loss as each place of the suffix turns into each token: the gradient by one-hot tokens."""
    import torch

    from llm_unlearn.models.scores import Scorer, by_stream, embedding_of, head_of

    scorer, head, table = Scorer(loaded.model), head_of(loaded.model), embedding_table(loaded)
    examples = [insert(example, place, suffix) for example, place in rows]
    gradient = torch.zeros((len(suffix), table.shape[1]), device=table.device)
    for chosen, batch in batches(examples, subject):
        free = table[torch.tensor(suffix, device=table.device)].float().requires_grad_()  # (k, D)
        own = embedding_of(loaded.model)(batch.input_ids)
        at = torch.tensor([[rows[i][1] + t for t in range(len(suffix))] for i in chosen], device=table.device)  # (B, k)
        line = torch.arange(len(chosen), device=table.device)[:, None].expand_as(at)
        with torch.enable_grad(), subject.accelerator.autocast():
            embeds = own.index_put((line, at), free.to(own).expand(len(chosen), -1, -1))
            (scores,) = by_stream(scorer(None, batch.at, embeds=embeds), head, batch).values()
            loss = -(scores.by_sequence(scores.logps) / batch.owner.bincount()).sum() / len(rows)
        gradient += torch.autograd.grad(loss, free)[0]
    gradient = subject.accelerator.reduce(gradient, "sum")
    found: Floats = (gradient @ table.float().T).double().cpu().numpy()
    return found
