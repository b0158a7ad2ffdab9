"""CSV files, read as they are written; see `files.py`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_unlearn.data.files import Finder, InFile, Row, no_other_kind, text_of
from llm_unlearn.spec import Refused
from llm_unlearn.unsaid import column_name

Kind = Callable[[str], Any]
WHOLE = r"-?(0|[1-9]\d{0,17})"
"""Others are text: 0042 is a postal code or an id, and so are more digits than a number keeps."""
KINDS: dict[re.Pattern[str], Kind] = {
    re.compile(WHOLE): int,
    re.compile(rf"{WHOLE}|[-+]?((0|[1-9]\d*)\.\d*|\.\d+|(0|[1-9]\d*)(?=[eE]))([eE][-+]?\d{{1,3}})?"): float,
    re.compile("[Tt]rue|[Ff]alse|TRUE|FALSE"): lambda value: value.lower() == "true",
}
"""What all values of a column of CSV look like -> how they are read, narrower ones first."""


def sheet_of(path: Path, name: str) -> InFile:
    """The rows of a CSV file under its header. A column of which every value is a number, or true or false, is read so; an empty
    value is none.

    Raises:
        Refused: it is not what its ending says; of several wrong rows the first is named.
    """
    lines, finder = _Counted(path, name), Finder()
    csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))  # one for the process
    reader = csv.reader(lines, strict=True)
    columns: dict[str, _Column] = {}
    at = 0
    try:
        for values in reader:
            begin, at = at, lines.at
            if not values:
                continue
            if not columns:
                columns = _header(values, f"{name}:{reader.line_num}")
                continue
            if len(values) != len(columns):
                row = f"row {len(finder.starts) + 1} has {len(values)} values, and the header {len(columns)}"
                raise Refused(f"{name}:{reader.line_num}: {row}; put text with commas or line breaks in double quotes.")
            for column, value in zip(columns.values(), values, strict=True):
                column.meet(value)
            finder.meet(begin, at)
    except csv.Error as error:
        raise Refused(f"{name}:{reader.line_num}: not CSV ({error}); double quotes inside quoted text are doubled.") from None
    kinds = {title: column.kind for title, column in columns.items()}

    def row_in(text: str) -> Row:
        values = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        return {title: kind(value) for (title, kind), value in zip(kinds.items(), values, strict=True)}

    return finder.found(path, row_in)


class _Counted:
    """The lines of a file, and how many bytes were read so far."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.at = path, name, 0

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", newline="") as file:
            try:
                for line in file:
                    start, self.at = self.at, self.at + len(line.encode())
                    if not start:
                        no_other_kind(line.encode(), self.path, self.name)
                    if "\0" in line:
                        text_of(self.path, self.name)  # which refuses it, and says where
                    yield line if start else line.removeprefix("\ufeff")
            except UnicodeDecodeError:
                text_of(self.path, self.name)
                raise


def _header(names: list[str], place: str) -> dict[str, _Column]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(f"{place}: the header names column {column_name(twice)} twice; give each a name of its own.")
    return {name: _Column() for name in names}


class _Column:
    """What the values of a column can all be read as."""

    def __init__(self) -> None:
        self.possible, self.given = dict(KINDS), False

    def meet(self, value: str) -> None:
        if value:
            self.given = True
            self.possible = {pattern: kind for pattern, kind in self.possible.items() if pattern.fullmatch(value)}

    @property
    def kind(self) -> Kind:
        """The narrowest of them; what is empty is none."""
        read = next(iter(self.possible.values()), str) if self.given else str
        return lambda value: read(value) if value else None
