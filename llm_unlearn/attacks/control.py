"""The control of a prompt that is searched for: the same search for answers that do not belong to the questions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from llm_unlearn.attacks.rows import curve_of, embedding_table, words_of
from llm_unlearn.evaluation.tables import Floats
from llm_unlearn.spec import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.data.examples import Example
    from llm_unlearn.models.load import Loaded

Wrong = Literal["shuffled", "random"]
"""What a control asks for: the answers of other rows, or random tokens in place of all but the last."""


def other_answers(
    subject: Subject, attack: str, loaded: Loaded, examples: Sequence[Example], parts: Sequence[Sequence[int]], kind: Wrong
) -> list[Example]:
    """(R,) the same prompts, each with an answer that is not its own.

    Args:
        parts: which rows may get answers of each other. What is searched on some rows and measured on the others has two parts: an
            answer that was learnt with one question must not be asked for behind another. Rows of no part stay as they are.

    Raises:
        Refused: all rows of a part have the same answer.
    """
    found = list(examples)
    words = words_of(loaded.tokenizer, len(embedding_table(loaded)))
    for part in parts:
        rng = np.random.default_rng([subject.seed, 12])
        answers = [examples[i].ids[examples[i].answer :] for i in part]
        if kind == "random":
            wrong = [(*rng.choice(words, len(answer) - 1).tolist(), answer[-1]) for answer in answers]
        elif len(set(answers)) < 2:
            raise Refused(
                f"{attack}: the control needs rows with different answers, and {len(answers)} have one; say control: random."
            )
        else:  # the next in a drawn order whose answer differs
            order = rng.permutation(len(answers)).tolist()
            turns = {place: [*order[turn + 1 :], *order] for turn, place in enumerate(order)}
            wrong = [next(answers[i] for i in turns[place] if answers[i] != own) for place, own in enumerate(answers)]
        for row, answer in zip(part, wrong, strict=True):
            found[row] = replace(examples[row], ids=(*examples[row].ids[: examples[row].answer], *answer))
    return found


def beyond(x: Sequence[float], true: Sequence[Floats], control: Sequence[Floats], notes: Mapping[str, float]) -> Curve:
    """What the true answers gave at each x, less what the control's did, row by row; both parts stand in the notes."""
    parts = {"true": true, "control": control}
    more = {
        f"{name}, {when}": float(values[at].mean()) for name, values in parts.items() for when, at in (("before", 0), ("after", -1))
    }
    more["gained beyond the control"] = float((true[-1] - true[0]).mean() - (control[-1] - control[0]).mean())
    for name, values in parts.items():
        reached = [step for step, rows in zip(x, values, strict=True) if rows.mean() >= 0.5]
        more |= {f"{name}, steps to ½": float(reached[0])} if reached else {}
    return curve_of(x, [one - other for one, other in zip(true, control, strict=True)], {**more, **notes})
