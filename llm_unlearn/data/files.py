"""Local files of rows, read as they are written: JSON, JSON lines and text (`sheets.py` has CSV). What is wrong in one is said
with its line.

`datasets` reads the same formats, and guesses: text that looks like a date becomes one, a column of mixed types becomes JSON in
text, a row that is too long shifts the columns of all. Here a value is what the file says.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.spec import Refused, shown
from llm_unlearn.unsaid import column_name, unsaid

Row = dict[str, Any]

MARKS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
    b"\xfd7zXZ": "xz",
}
"""How files of other kinds begin."""
HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How a character of two halves is written, or one half of it."""


def read_file(path: Path, name: str) -> list[Row] | None:
    """The rows of a file that is one document; None of a kind that others read.

    Args:
        name: what the recipe calls it, for errors.

    Raises:
        Refused: it is not what its ending says; names the line.
    """
    match path.suffix:
        case ".json":
            return _even(_json(text_of(path, name), name))
        case ".txt":
            text = text_of(path, name)
            return [{"text": text}] if text else []
    return None


def _even(rows: list[Row]) -> list[Row]:
    """The rows with every column of any of them; what a row does not say is none."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [row if len(row) == len(columns) else {**columns, **row} for row in rows]


def text_of(path: Path, name: str) -> str:
    """All of a file.

    Raises:
        Refused: it is not text in UTF-8; names the line.
    """
    whole = path.read_bytes()
    no_other_kind(whole, path, name)
    if (at := whole.find(0)) >= 0:
        line = whole.count(10, 0, at) + 1
        raise Refused(f"{name}:{line}: found a zero byte (byte {at}); expected text in UTF-8. Save it as that, or write it again.")
    try:
        return whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = whole.count(b"\n", 0, error.start) + 1
        raise Refused(f"{name}:{line}: not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def no_other_kind(begin: bytes, path: Path, name: str) -> None:
    """Refuse what begins like a file of another kind."""
    if kind := next((kind for mark, kind in MARKS.items() if begin.startswith(mark)), None):
        raise Refused(f"{name}: found a {kind} file; expected {path.suffix[1:]} as text. Unpack it, or give it its own ending.")
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused(f"{name}: found text in UTF-16; expected UTF-8. Save it as UTF-8.")


def _json(text: str, name: str) -> list[Row]:
    """A list of objects, or an object on each line, as many programs name such a file, too."""
    try:
        whole = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().count("\n") < 1:
            return list(_lines(text, name))
        if not text.strip():
            return []
        raise Refused(f"{name}:{error.lineno}: not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: not JSON that can be read ({shown(_why(error), as_it_is=True)}).") from None
    rows = whole if isinstance(whole, list) else [whole]
    return [_object(row, f"{name}: row {number}") for number, row in enumerate(rows, 1)]


def _lines(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`: U+2028 may stand in a text
        if not line.strip():
            continue
        yield _row(line, number, name)


def _row(line: str, number: int, name: str) -> Row:
    try:
        row = _parsed(line)
    except (ValueError, RecursionError) as error:
        why = shown(_why(error), as_it_is=True)
        raise Refused(f"{name}:{number}: not a line of JSON ({why}); found {unsaid(line)}.") from None
    return _object(row, f"{name}:{number}")


@dataclass(frozen=True)
class InFile:
    """Rows of a file that was checked once, row by row, and is read again as they are asked for."""

    path: Path
    starts: NDArray[np.int64]
    """(n,) the byte at which each row begins."""
    sizes: NDArray[np.int64]
    """(n,) its bytes."""
    row: Callable[[str], Row]
    """How the text of one is read."""

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, places: NDArray[np.int64]) -> list[Row]:
        """The rows at these places."""
        rows = []
        with self.path.open("rb") as file:
            for place in places.tolist():
                if file.tell() != self.starts[place]:
                    file.seek(self.starts[place])
                rows.append(self.row(file.read(self.sizes[place]).decode("utf-8-sig")))
        return rows

    def values(self, column: str, places: NDArray[np.int64]) -> list[Any]:
        """What one column says at these places."""
        return [row[column] for row in self.at(places)]


class Finder:
    """Notes where rows are found."""

    def __init__(self) -> None:
        self.starts, self.sizes = array("q"), array("q")

    def meet(self, start: int, end: int) -> None:
        self.starts.append(start)
        self.sizes.append(end - start)

    def found(self, path: Path, row: Callable[[str], Row]) -> InFile:
        return InFile(path, np.frombuffer(self.starts, np.int64), np.frombuffer(self.sizes, np.int64), row)


def lines_of(path: Path, name: str) -> InFile:
    """The rows of a file of JSON lines. What a row does not say is none.

    Raises:
        Refused: it is not what its ending says; of several wrong lines the first is named.
    """
    finder, columns, at = Finder(), dict[str, None](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _checked(line, at, number, path, name)
            if text.strip():
                columns |= dict.fromkeys(_row(text, number, name))
                finder.meet(at, at + len(line))
            at += len(line)

    def row(text: str) -> Row:
        found: Row = json.loads(text)
        return found if len(found) == len(columns) else {**columns, **found}

    return finder.found(path, row)


def _checked(line: bytes, at: int, number: int, path: Path, name: str) -> str:
    """A line as text; `at` is its place in the file."""
    if at == 0:
        no_other_kind(line, path, name)
    if (zero := line.find(0)) >= 0:
        raise Refused(
            f"{name}:{number}: found a zero byte (byte {at + zero}); expected text in UTF-8. Save it as that, or write it again."
        )
    try:
        return line.decode("utf-8-sig" if at == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{name}:{number}: not text in UTF-8 ({error.reason} at byte {at + error.start}). Save it as UTF-8."
        ) from None


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists and objects too deep inside each other"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _parsed(text: str) -> Any:
    found = json.loads(text, object_pairs_hook=_once)
    if HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds {error.object[error.start : error.end]!r}, half a character") from None
    return found


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{column_name(next(name for name in names if names.count(name) > 1))} is written twice")
    return found


def _object(row: object, place: str) -> Row:
    if not isinstance(row, dict) or not row:
        raise Refused(f'{place}: found {unsaid(row)}; expected a row such as {{"question": …, "answer": …}}.')
    return row
