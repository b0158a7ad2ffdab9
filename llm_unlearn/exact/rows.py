"""The rows that pieces are trained on: each with an id that no other row's deletion changes, and its examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_unlearn.data.capacity import Capacity
from llm_unlearn.data.examples import Example, content_of, conversation, encode, encode_text, text_in
from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import row_at, rows
from llm_unlearn.data.words import fits
from llm_unlearn.methods.exact import Exact, Modules, Placed
from llm_unlearn.recipe import Recipe
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.unsaid import near_column, near_ids, unsaid

STREAM = "retain"
"""The one stream of a stage."""


@dataclass(frozen=True)
class Known:
    """What is deleted together: one row, or all rows of one id."""

    placed: Placed
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    asked: bool
    """Whether it stands in the recipe's forget set."""


def read_known(recipe: Recipe, method: Exact, tokenizer: Any, capacity: Capacity) -> dict[str, Known]:
    """Return what stands under each id in the forget and retain sets together.

    Args:
        capacity: of the model that reads the rows; they are cut to its positions.

    Raises:
        Refused: a set cannot be read or lacks a column, an id stands under two owners, or the model cannot read a row.
    """
    found: dict[str, Known] = {}
    for name, source in recipe.sources.items():
        ids, kept = identified(source, method)
        encoded = _encoded(kept, capacity.fit(source), tokenizer)
        capacity.check({name: [one for examples in encoded for one in examples]}, tokenizer)
        for id, row, examples in zip(ids, kept, encoded, strict=True):
            owner = str(row[method.owner]) if isinstance(method, Modules) else None
            before = found.get(id)
            if before and before.placed.owner != owner:
                raise Refused(f"{source.source}: id {id!r} stands under two owners; give each row one owner.")
            if before and not method.id:  # the same text twice is one row; what is to be forgotten is not kept elsewhere
                continue
            more = before or Known(Placed(id, owner), (), (), False)
            found[id] = Known(more.placed, (*more.rows, row), (*more.examples, *examples), more.asked or name == "forget")
    kept_ids = {id: one for id, one in found.items() if one.examples}
    if not any(not one.asked for one in kept_ids.values()):
        raise Refused("data.retain: no row is left that is kept; an exact method needs some.")
    return kept_ids


def identified(source: Source, method: Exact) -> tuple[list[str], list[Row]]:
    """The rows of a source, and the id under which each is deleted: what the method's column says, or its content.

    Raises:
        Refused: the source cannot be read, or lacks a column.
    """
    kept = list(rows(source))
    for column in (method.id, method.owner if isinstance(method, Modules) else None):
        if column and column not in kept[0]:
            raise Refused(f"method: {source.source} has no column {column!r}; {near_column(column, kept[0])}")
        for number, row in enumerate(kept):
            if column and (row[column] is None or isinstance(row[column], (list, dict, float))):
                found = f"holds {unsaid(row[column])}; expected text or a whole number, by which it can be named"
                raise Refused(f"{row_at(number, source)}: column {column!r} {found}.")
    return [str(row[method.id]) if method.id else digest(content_of(row, source)) for row in kept], kept


def _encoded(kept: list[Row], source: Source, tokenizer: Any) -> list[list[Example]]:
    """The examples of each row: one, the blocks of a running text, or none where no answer fits."""
    if source.text:
        texts = [text_in(row[source.text], i, source, source.text) for i, row in enumerate(kept)]
        return [encode_text([text], tokenizer, STREAM, source.max_tokens) for text in texts]
    turns = [conversation(row, i, source) for i, row in enumerate(kept)]
    return [
        [one] if one else [] for one in encode(turns, tokenizer, source.chat, STREAM, source.max_tokens, targets=source.targets)
    ]


def digest(*parts: str) -> str:
    """32 hexadecimal digits of the SHA-256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def find(known: Mapping[str, Known], ids: list[str], where: Mapping[str, str]) -> list[str]:
    """The ids that are meant: those named, and those with a row whose columns say what is asked, all of it.

    Raises:
        Refused: an id is not there, a column is not there, or nothing is found.
    """
    if unknown := [id for id in ids if id not in known]:
        said = f"--ids: {len(unknown)} of {len(ids)} are no rows of this run: {near_ids(unknown[0], known)}"
        raise Refused(f"{said}. Nothing was changed.")
    columns = {column for one in known.values() for row in one.rows for column in row}
    if absent := [column for column in where if column not in columns]:
        raise Refused(f"--where: no column {absent[0]!r}; {near_column(absent[0], sorted(columns))}")
    met = [id for id, one in known.items() if where and any(fits(row, where) for row in one.rows)]
    found = sorted({*ids, *met})
    if not found:
        said = f"has this in {', '.join(where)}" if where else "was named"
        raise Refused(f"no row of this run {said}. Nothing was changed.")
    return found
