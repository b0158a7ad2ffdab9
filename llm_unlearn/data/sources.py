"""Where rows come from: the embedded population, local files, or the hub; all through one function."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

from llm_unlearn.data.files import Row, read_file
from llm_unlearn.embedded import population
from llm_unlearn.source import EMBEDDED, FILES, Source
from llm_unlearn.spec import Refused, nearest, shown
from llm_unlearn.unsaid import near_column, unsaid, without_quotes


def rows(source: Source) -> list[Row]:
    """The rows of a source after `where`, `without` and `limit`.

    Raises:
        Refused: nothing is there under that name, a column is missing, or no row is left.
    """
    found = _columns(read(source.source, source.config, source.split), source)
    for kept, chosen in ((True, source.where or {}), (False, source.without or {})):
        for column, wanted in chosen.items():
            values = frozenset(wanted if isinstance(wanted, tuple) else (wanted,))  # thousands of ids, perhaps
            found = [row for row in found if (isinstance(row[column], Hashable) and row[column] in values) is kept]
    for column, pattern in (source.like or {}).items():
        found = [row for row in found if _like(row[column], pattern)]
    if not found:
        said = {"where": source.where, "without": source.without, "like": source.like}
        named = " and ".join(f"{key} on {', '.join(chosen)}" for key, chosen in said.items() if chosen)
        raise Refused(f"{source.source}: no rows are left after {named}; expected at least one.")
    found = found[: source.limit]
    return [_chosen(row, i, source) for i, row in enumerate(found)] if source.choices else found


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


def read(name: str, config: str | None = None, split: str | None = None) -> list[Row]:
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
        if (found := read_file(path, name)) is not None:
            return found
    elif os.path.exists(path) and not path.is_dir():
        raise Refused(f"{name}: is no ordinary file; expected one of {', '.join(FILES)}, or a folder.")
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
        return [dict(row) for row in loaded]
    except Exception as error:  # `datasets` raises a dozen types; each becomes one line that names the source
        reason = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0]
        if path.is_file() and (not path.stat().st_size or "no data" in reason or "BatchSize must be" in reason):
            return []  # the last is what pyarrow makes of a file without rows
        why = shown(f"{type(error.__cause__ or error).__name__}: {without_quotes(reason)}", 400, as_it_is=True)
        raise Refused(f"{name}: cannot be read as a data set ({why}); write it again, or name another.") from error


def _embedded(split: str) -> list[Row]:
    if split == "refusals":
        return [{"text": text} for text in population.refusals()]
    if split == "german":
        return population.german()
    if split not in EMBEDDED:
        raise Refused(f"embedded:{split}: no such data; {nearest(split, EMBEDDED)}")
    return population.rows(split)


def _columns(found: list[Row], source: Source) -> list[Row]:
    """The rows, if every column that the source names is in them."""
    if not found:
        raise Refused(f"{source.source}: has no rows; expected at least one.")
    alternate = source.alternate.answer if source.alternate and not source.alternate.source else None
    named = {"prompt": source.prompt, "answer": source.answer, "messages": source.messages, "text": source.text,
             "alternate.answer": alternate, "paraphrase": source.paraphrase, "perturbed": source.perturbed,
             "keyword": source.keyword, "choices": source.choices}  # fmt: skip
    for key, column in [*named.items(), *_of_filters(source)]:
        if column is not None and column not in found[0]:
            raise Refused(f"{source.source}: {key} names column {column!r}, which is not there; {near_column(column, found[0])}")
    return found


def _of_filters(source: Source) -> list[tuple[str, str]]:
    """The columns that choose rows, each with the key that names it."""
    chosen: dict[str, Iterable[str]] = {"where": source.where or (), "without": source.without or (), "like": source.like or ()}
    return [(key, column) for key, columns in chosen.items() for column in columns]
