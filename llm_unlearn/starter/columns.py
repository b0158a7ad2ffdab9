"""Recognise what the columns of a file or data set mean: questions and answers, chats, instructions, running text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import read
from llm_unlearn.source import FILES, Source
from llm_unlearn.spec import Refused, shown
from llm_unlearn.unsaid import column_name

Format = Literal["auto", "qa", "messages", "sharegpt", "alpaca", "text"]

LOOKED_AT = 200
"""Rows whose values are looked at."""
PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("instruction", "output"),
    ("instruction", "response"), ("query", "response"), ("query", "answer"), ("input", "output"), ("problem", "solution"),
)  # fmt: skip
"""Columns of a question and its answer, as public data sets name them."""
CHATS, TEXTS = ("messages", "conversations", "conversation", "turns", "chat"), ("text", "content", "document", "story")
REWORDED = ("paraphrased_answer", "paraphrase", "paraphrased")
WRONG = ("perturbed_answer", "perturbed_answers", "wrong_answers", "incorrect_answers")


def source_of(name: str, rows_format: Format, option: str) -> Source:
    """Return the source of a file, a folder or a hub data set, with the keys that name its columns.

    Args:
        name: a path, or ID[:CONFIG[:SPLIT]] of a hub.
        option: that named it, for errors.

    Raises:
        Refused: it cannot be read, has no columns of this format, or of several; names the columns.
    """
    source, config, split = _parts(name)
    rows = read(source, config, split)[:LOOKED_AT]
    if not rows:
        raise Refused(f"{option}: {source} has no rows. Name a file with at least one.")
    matches = {kind: found for kind, of in FORMATS.items() if (found := of(rows)) and rows_format in ("auto", kind)}
    columns = ", ".join(map(column_name, rows[0]))
    known = "question and answer, prompt and completion, instruction, input and output, messages, conversations, or text"
    if not matches:
        what = "no columns that are recognised" if rows_format == "auto" else f"no columns of --format {rows_format}"
        raise Refused(f"{option}: {source} has {what}; its columns are {columns}. Rename them to {known}.")
    choices = [(kind, keys) for kind, found in matches.items() for keys in found]
    if len(choices) > 1:
        several = " or ".join(", ".join(f"{key}: {value}" for key, value in keys.items()) for _, keys in choices)
        fix = f"Pass --format {choices[0][0]}" if len(matches) > 1 else "Leave one pair of them in the file"
        raise Refused(f"{option}: {source} can be read as {several}; its columns are {columns}. {fix}.")
    return Source(source=source, config=config, split=split, **choices[0][1])


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """A path as it is; of `ID:CONFIG:SPLIT` its three parts."""
    if Path(name).expanduser().exists() or name.startswith("embedded:") or Path(name).suffix in FILES:
        return name, None, None
    parts = name.split(":")
    if len(parts) > 3:
        raise Refused(f"{shown(name)}: expected a path, or ID:CONFIG:SPLIT of a hub.")
    source, config, split = (*(part or None for part in parts), None, None)[:3]
    return str(source), config, split


Keys = dict[str, Any]
"""Keys of a source, such as {"prompt": "question", "answer": "answer"}."""


def _texts(rows: Sequence[Row], *columns: str) -> bool:
    return all(isinstance(row.get(column), (str, int, float)) for row in rows for column in columns)


def _extras(rows: Sequence[Row]) -> Keys:
    """Columns that a suite can measure by: the answer in other words, and wrong answers."""
    reworded = next((column for column in REWORDED if _texts(rows, column)), None)
    wrong = next((column for column in WRONG if all(isinstance(row.get(column), list) and row[column] for row in rows)), None)
    return {key: column for key, column in (("paraphrase", reworded), ("perturbed", wrong)) if column}


def _is_alpaca(rows: Sequence[Row]) -> bool:
    return _texts(rows, "instruction", "output") and all(row.get("input") is None or isinstance(row["input"], str) for row in rows)


def _qa(rows: Sequence[Row]) -> list[Keys]:
    pairs = [(prompt, answer) for prompt, answer in PAIRS if _texts(rows, prompt, answer)]
    if "input" in rows[0] and _is_alpaca(rows):
        pairs = [pair for pair in pairs if not set(pair) & {"instruction", "input", "output"}]
    return [{"prompt": prompt, "answer": answer} | _extras(rows) for prompt, answer in pairs]


def _alpaca(rows: Sequence[Row]) -> list[Keys]:
    if "input" not in rows[0] or not _is_alpaca(rows):
        return []
    keys: Keys = {"prompt": "instruction", "answer": "output"}
    if any((row.get("input") or "").strip() for row in rows):
        keys["prompt_input"] = "input"
    return [keys | _extras(rows)]


def _chats(role: str, content: str) -> Callable[[Sequence[Row]], list[Keys]]:
    def is_chat(value: object) -> bool:
        return (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(one, Mapping) and {role, content} <= one.keys() for one in value)
        )

    def find(rows: Sequence[Row]) -> list[Keys]:
        return [{"messages": column} for column in CHATS if all(is_chat(row.get(column)) for row in rows)]

    return find


def _text(rows: Sequence[Row]) -> list[Keys]:
    return [{"text": column} for column in TEXTS if _texts(rows, column)]


FORMATS: dict[str, Callable[[Sequence[Row]], list[Keys]]] = {
    "qa": _qa, "messages": _chats("role", "content"), "sharegpt": _chats("from", "value"), "alpaca": _alpaca, "text": _text,
}  # fmt: skip
"""Format -> all ways in which rows can be read by it."""
