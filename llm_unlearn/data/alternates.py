"""Alternate answers to the same prompts: of the row itself, or drawn from another source, each with a thought or none."""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.data.examples import content_of, draw
from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import read
from llm_unlearn.source import Alternate, Source
from llm_unlearn.spec import Refused
from llm_unlearn.unsaid import near_column, unsaid


def read_alternates(alternate: Alternate) -> Sequence[Row]:
    """Return the rows of the source that alternate answers are drawn from.

    Raises:
        Refused: it has no rows, or lacks a column.
    """
    pool = read(str(alternate.source))
    if not pool:
        raise Refused(f"{alternate.source}: has no rows; expected at least one, with an answer in {alternate.answer!r}.")
    for key, column in (("answer", alternate.answer), ("thought", alternate.thought)):
        if column and column not in pool[0]:
            what = f"alternate.{key} names column {column!r}, which is not there"
            raise Refused(f"{alternate.source}: {what}; {near_column(column, pool[0])}")
    return pool


def draw_alternates(
    pool: Sequence[Row], row: Row, source: Source, alternate: Alternate, seed: int
) -> list[tuple[object, str | None]]:
    """Return the answers of `count` rows of the pool, other than the row's own, each with its thought. Which rows follows from the
    seed and the row's content."""
    own = " ".join(str(row.get(source.answer or "")).split())
    answers: list[tuple[object, str | None]] = []
    for k in range(10 * alternate.count):
        found = answers_in(pool[draw(seed, content_of(row, source), *([k] if k else [])) % len(pool)], alternate)
        if own not in (" ".join(str(one).split()) for one, _ in found) and (alternate.count == 1 or found[0] not in answers):
            answers += found
        if len(answers) >= alternate.count:
            break
    return answers


def answers_in(row: Row, alternate: Alternate) -> list[tuple[object, str | None]]:
    """Return the alternate answers of a row, each with the thought before it.

    Raises:
        Refused: it has not as many thoughts as answers.
    """
    columns = [row[column] for column in (alternate.answer, alternate.thought) if column]
    answers, *thoughts = [value if isinstance(value, list) else [value] for value in columns]
    if not thoughts:
        return [(answer, None) for answer in answers]
    if len(thoughts[0]) != len(answers) or not all(isinstance(one, str) and one.strip() for one in thoughts[0]):
        found = f"column {alternate.thought!r} holds {unsaid(thoughts[0])}"
        raise Refused(f"{found}; expected a text for each alternate answer, {len(answers)} here.")
    return list(zip(answers, thoughts[0], strict=True))
