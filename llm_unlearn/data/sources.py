"""Where rows come from: the embedded population, local files, or the hub; all through one function."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.files import Row, lines_of, read_file
from llm_unlearn.data.sheets import sheet_of
from llm_unlearn.embedded import population, prose
from llm_unlearn.folder import sha256
from llm_unlearn.source import EMBEDDED, FILES, Source
from llm_unlearn.spec import Refused, fingerprint, nearest, shown
from llm_unlearn.unsaid import column_name, near_column, unsaid, without_quotes

MANY = 20_000
"""More rows than these stay in the file that they are in, and are read from it when they are asked for."""
LARGE = 8 << 20
"""Bytes of a file of lines or of CSV, beyond which the same is done."""
BLOCK = 1000
"""So many are read at a time."""


class Held(Protocol):
    """Rows that something else holds, such as a file."""

    def __len__(self) -> int: ...
    def at(self, places: NDArray[np.int64]) -> list[Row]:
        """The rows at these places."""
        ...

    def values(self, column: str, places: NDArray[np.int64]) -> list[Any]:
        """What one column says at these places."""
        ...


@dataclass(frozen=True)
class Table:
    """A data set of `datasets`, which maps its file into memory."""

    loaded: Any

    def __len__(self) -> int:
        return len(self.loaded)

    def at(self, places: NDArray[np.int64]) -> list[Row]:
        if not len(places):
            return []
        dense = len(places) == places[-1] - places[0] + 1
        columns = self.loaded[int(places[0]) : int(places[-1]) + 1] if dense else self.loaded[places.tolist()]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def values(self, column: str, places: NDArray[np.int64]) -> list[Any]:
        return [row[column] for row in Table(self.loaded.select_columns([column])).at(places)]


class Rows(Sequence[Row]):
    """Rows that stay where they are until they are asked for; some of what is held, or all."""

    def __init__(self, held: Held, at: NDArray[np.int64] | None = None) -> None:
        """
        Args:
            at: the places of the rows that are meant, ascending; None means all.
        """
        self.held = held
        self.at = np.arange(len(held)) if at is None else at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return self.held.at(self.at[place])
        return self.held.at(np.array([self.at[place]]))[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def column(self, name: str) -> Iterator[Any]:
        """The values of one column."""
        for start in range(0, len(self), BLOCK):
            yield from self.held.values(name, self.at[start : start + BLOCK])


def chosen(found: Sequence[Row], keep: NDArray[np.bool_]) -> Sequence[Row]:
    """Those of the rows for which `keep` is true."""
    if isinstance(found, Rows):
        return Rows(found.held, found.at[keep])
    return [row for row, kept in zip(found, keep.tolist(), strict=True) if kept]


def rows(source: Source) -> Sequence[Row]:
    """The rows of a source after `where`, `without` and `limit`: a list, or if they are many, what reads them from their file.

    Raises:
        Refused: nothing is there under that name, a column is missing, or no row is left.
    """
    found = _columns(read(source.source, source.config, source.split), source)
    for column, wanted in (source.where or {}).items():
        if isinstance(wanted, tuple):
            _all_there(found, column, wanted, source)
    for kept, wanted_of in ((True, source.where or {}), (False, source.without or {})):
        for column, wanted in wanted_of.items():
            values = frozenset(wanted if isinstance(wanted, tuple) else (wanted,))  # thousands of ids, perhaps
            found = _filtered(found, column, partial(_among, values=values, kept=kept))
    for column, pattern in (source.like or {}).items():
        found = _filtered(found, column, partial(_like, pattern=pattern))
    if not found:
        said = {"where": source.where, "without": source.without, "like": source.like}
        named = " and ".join(f"{key} on {', '.join(values)}" for key, values in said.items() if values)
        raise Refused(f"{source.source}: no rows are left after {named}; expected at least one.")
    if isinstance(found, Rows):
        found = Rows(found.held, found.at[: source.limit])
        found = found if len(found) > MANY else list(found)
    else:
        found = found[: source.limit]
    return [_chosen(row, i, source) for i, row in enumerate(found)] if source.choices else found


def _among(value: object, values: frozenset[object], kept: bool) -> bool:
    return (isinstance(value, Hashable) and value in values) is kept


def _all_there(found: Sequence[Row], column: str, wanted: Sequence[object], source: Source) -> None:
    """Of a list of values, each is that of some row: one mistyped id of a hundred would be a row that is not forgotten."""
    met = {value for value in _values(found, column) if isinstance(value, Hashable)}
    if absent := [value for value in wanted if value not in met]:
        first = f"{column_name(column)} = {shown(absent[0])}"
        raise Refused(
            f"{source.source}: where: {len(absent)} of {len(wanted)} values stand in no row, the first of them {first}. "
            "Correct them, or take them out."
        )


def _filtered(found: Sequence[Row], column: str, holds: Callable[[Any], bool]) -> Sequence[Row]:
    """The rows whose column has a value that is wanted."""
    return chosen(found, np.fromiter(map(holds, _values(found, column)), bool, len(found)))


def _values(found: Sequence[Row], column: str) -> Iterable[Any]:
    return found.column(column) if isinstance(found, Rows) else (row[column] for row in found)


def row_at(number: int, source: Source) -> str:
    """A row for errors, counted from 1 among those that the source leaves."""
    chosen = [key for key in ("where", "without", "like") if getattr(source, key)]
    return f"{source.source}: row {number + 1}{f' of those that {chr(44).join(chosen)} leave' if chosen else ''}"


def _like(value: object, pattern: str) -> bool:
    """Whether a value is like a text in which * stands for any text."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), str(value), re.DOTALL) is not None


def _chosen(row: Row, number: int, source: Source) -> Row:
    """A row of choices as an answer, and in the column of choices the wrong ones."""
    options, right = row[str(source.choices)], row[str(source.answer)]
    if not isinstance(options, list) or type(right) is not int or not 0 <= right < len(options):
        raise Refused(
            f"{row_at(number, source)}: expected a list in column {source.choices!r} and the number of one of them, "
            f"from 0, in {source.answer!r}; found {unsaid(options)} and {unsaid(right)}."
        )
    wrong = [option for i, option in enumerate(options) if i != right]
    return {**row, str(source.answer): options[right], str(source.choices): wrong}


def read(name: str, config: str | None = None, split: str | None = None) -> Sequence[Row]:
    """All rows under a name: `embedded:…`, a local file or folder, or a hub id (the only case in which anything is downloaded).

    Raises:
        Refused: there is no such data, or it cannot be read.
    """
    if name.startswith("embedded:"):
        return _embedded(name.removeprefix("embedded:"))
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        if path.suffix not in FILES:
            raise Refused(f"{name}: cannot read a {path.suffix or 'nameless'} file; expected one of {', '.join(FILES)}.")
        if path.suffix in (".jsonl", ".csv"):
            held = Rows(lines_of(path, name) if path.suffix == ".jsonl" else sheet_of(path, name))
            return held if path.stat().st_size > LARGE else list(held)
        if (found := read_file(path, name)) is not None:
            return found
    elif os.path.exists(path) and not path.is_dir():
        raise Refused(f"{name}: is no ordinary file; expected one of {', '.join(FILES)}, or a folder.")
    elif not path.is_dir() and path.suffix in FILES:
        raise Refused(f"{name}: the file does not exist (looked from {Path.cwd()}).")
    import datasets

    datasets.disable_progress_bars()  # reading is short; the bars here are those of our own long work
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says of a file is said by us, once

    try:
        if path.is_file():
            kind = FILES[path.suffix]
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[split or "train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(name, config, split=split or "train")
        return Rows(Table(loaded)) if len(loaded) > MANY else [dict(row) for row in loaded]
    except Exception as error:  # `datasets` raises a dozen types; each becomes one line that names the source
        reason = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0]
        if path.is_file() and (not path.stat().st_size or "no data" in reason or "BatchSize must be" in reason):
            return []  # the last is what pyarrow makes of a file without rows
        raise Refused(_unreadable(name, path, error.__cause__ or error, reason)) from error


def _unreadable(name: str, path: Path, error: BaseException, reason: str) -> str:
    """Return what is wrong with a name that `datasets` cannot read, and what to do."""
    why = shown(f"{type(error).__name__}: {without_quotes(reason)}", 400, as_it_is=True)
    if path.exists():
        return f"{name}: cannot be read as a data set ({why}); write it again, or name another."
    absent = f"no such file or folder (looked from {Path.cwd()}), and no data set of this name can be read from the hub"
    return f"{name}: {absent} ({why}). Check the spelling."


def identity_of(name: str, config: str | None, split: str | None, found: Sequence[Row]) -> str:
    """Stands for the data under a name as it is now: the content of local files, or what `datasets` calls it."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
    if files:
        return fingerprint(split, [[one.name, sha256(one)] for one in files])
    made = getattr(found.held.loaded, "_fingerprint", None) if isinstance(found, Rows) and isinstance(found.held, Table) else None
    return fingerprint(name, config, split, made or [json.dumps(row, default=str, sort_keys=True) for row in found])


def _embedded(split: str) -> list[Row]:
    if split == "refusals":
        return list[Row](population.refusals())
    if split == "german":
        return population.german()
    if split == "prose":
        return [dict(row) for row in prose.rows()]
    if split not in EMBEDDED:
        raise Refused(f"embedded:{split}: no such data; {nearest(split, EMBEDDED)}")
    return population.rows(split)


def _columns(found: Sequence[Row], source: Source) -> Sequence[Row]:
    """The rows, if every column that the source names is in them."""
    if not found:
        raise Refused(f"{source.source}: has no rows; expected at least one.")
    alternate = source.alternate.answer if source.alternate and not source.alternate.source else None
    named = {"prompt": source.prompt, "answer": source.answer, "messages": source.messages, "text": source.text,
             "alternate.answer": alternate, "paraphrase": source.paraphrase, "perturbed": source.perturbed,
             "keyword": source.keyword, "choices": source.choices, "thought": source.thought,
             "alternate.thought": source.alternate.thought if alternate and source.alternate else None}  # fmt: skip
    for key, column in [*named.items(), *_of_filters(source)]:
        if column is not None and column not in found[0]:
            raise Refused(f"{source.source}: {key} names column {column!r}, which is not there; {near_column(column, found[0])}")
    return found


def _of_filters(source: Source) -> list[tuple[str, str]]:
    """The columns that choose rows, each with the key that names it."""
    chosen: dict[str, Iterable[str]] = {"where": source.where or (), "without": source.without or (), "like": source.like or ()}
    return [(key, column) for key, columns in chosen.items() for column in columns]
