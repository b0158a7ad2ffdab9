"""What a row holds, in words, and which rows `--where column=value` means: one way for every verb, as what is meant is deleted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llm_unlearn.spec import Refused


def texts_of(value: Any) -> list[str]:
    """Every text in a value, those in lists and chats too; numbers as they are written."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in texts_of(one)]
    if isinstance(value, dict):
        return [text for one in value.values() for text in texts_of(one)]
    return [value if isinstance(value, str) else json.dumps(value, default=str)]


def says(value: Any) -> str:
    """What a column holds, as one text."""
    return " ".join(texts_of(value))


def asked_for(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Column -> value, of what was given as column=value.

    Raises:
        Refused: a column is named twice, of which one value would be passed over.
    """
    wanted: dict[str, str] = {}
    for column, value in pairs:
        if column in wanted:
            said = f"--where: column {column!r} is named twice, and a row must say all that is asked. Nothing was changed"
            raise Refused(f"{said}; name it once, and ask for the rows of each value by themselves.")
        wanted[column] = value
    return wanted


def fits(row: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether a row says all of this. A column that it lacks, or that holds nothing, says nothing: not `null` either."""
    return all(row.get(column) is not None and says(row[column]) == value for column, value in wanted.items())
