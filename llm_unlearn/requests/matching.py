"""Which rows of the training data a request means: by id, by the value of columns, or by a text that they nearly repeat."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import read
from llm_unlearn.data.words import fits, says
from llm_unlearn.options import SCORE
from llm_unlearn.requests.service import Office
from llm_unlearn.spec import Refused
from llm_unlearn.unsaid import NEAR, near_column, near_ids

RowId = str | int


@dataclass(frozen=True)
class Found:
    """A row that a request means. `score` is its likeness, 100 where it was named."""

    id: RowId
    row: Row
    score: float = 100.0


def read_training(office: Office) -> dict[RowId, Row]:
    """All rows of the training data by their id.

    Raises:
        Refused: a column is missing, an id is no text or whole number, or stands on two rows.
    """
    data = office.service.data
    rows = read(data.source, data.config, data.split)
    if not rows:
        raise Refused(f"{data.source}: has no rows; expected at least one.")
    for key, column in [("data.id", data.id), *(("data.forget of the recipe", column) for column in office.columns)]:
        if column not in rows[0]:
            raise Refused(f"{data.source}: {key} names column {column!r}, which is not there; {near_column(column, rows[0])}")
    found: dict[RowId, Row] = {}
    written: set[str] = set()
    for number, row in enumerate(rows):
        name = row[data.id]
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise Refused(f"{data.source}: row {number + 1}: column {data.id!r} holds no text and no whole number.")
        if str(name) in written:
            raise Refused(f"{data.source}: id {name!r} stands on two rows; a request could not say which one it means.")
        written.add(str(name))
        found[name] = row
    return found


def by_ids(names: Sequence[str], rows: Mapping[RowId, Row]) -> list[Found]:
    """The rows that are named.

    Raises:
        Refused: none is named, or some are not there; names the nearest ids.
    """
    if not names:
        raise Refused("--ids: found no id; expected at least one. Nothing was added.")
    known = {str(one): one for one in rows}
    lost = [name for name in names if name not in known]
    if lost:
        said = "; ".join(near_ids(name, known) for name in lost[:NEAR])
        raise Refused(f"--ids: {len(lost)} of {len(names)} are not in the data: {said}. Nothing was added.")
    return [Found(known[name], rows[known[name]]) for name in dict.fromkeys(names)]


def by_columns(wanted: Mapping[str, str], rows: Mapping[RowId, Row]) -> list[Found]:
    """The rows whose columns have these values, all of them; numbers are compared as they are written.

    Raises:
        Refused: no such column, or no such row; names the ids of rows that come near, and no value.
    """
    columns = next(iter(rows.values()))
    for column in wanted:
        if column not in columns:
            raise Refused(f"--where: no column {column!r}; {near_column(column, columns)}")
    found = [Found(name, row) for name, row in rows.items() if fits(row, wanted)]
    if not found:

        def likeness(row: Row) -> float:
            matcher = difflib.SequenceMatcher(autojunk=False)
            total = 0.0
            for key, value in wanted.items():
                matcher.set_seqs(says(row[key])[:200], value)
                total += matcher.ratio()
            return 100 * total / len(wanted)

        raise Refused(f"--where: no row has this in {', '.join(wanted)}{_nearest(likeness, rows)}. Nothing was added.")
    return found


def by_text(text: str, rows: Mapping[RowId, Row], columns: Sequence[str], score: float = SCORE) -> list[Found]:
    """The rows that nearly repeat a text, likest first: rapidfuzz's ratio, 100 · (1 − d / (|a| + |b|)) with d the edits by which
    characters are put in or taken out, of case-folded words; where the row is the longer one, of the best place in it.

    Compared with each learnt column by itself and with all of them one after the other.

    Raises:
        Refused: nothing comes up to `score`, or the library is missing.
    """
    try:
        from rapidfuzz import fuzz, utils
    except ImportError:
        raise Refused("--text: needs rapidfuzz; install it with: pip install 'llm-unlearn[requests]'.") from None
    asked = utils.default_process(text)
    if not asked:
        raise Refused("--text: found no letter or digit; expected the text that is to be forgotten.")

    def likeness(row: Row) -> float:
        said = [says(row[column]) for column in columns]
        best = 0.0
        for one in (*said, " ".join(said)):
            value = utils.default_process(one)
            compare = fuzz.partial_ratio if len(value) > len(asked) else fuzz.ratio
            best = max(best, float(compare(asked, value)))
        return best

    found = [Found(name, row, like) for name, row in rows.items() if (like := likeness(row)) >= score]
    if not found:
        raise Refused(f"--text: no row is like it to {score:g} of 100{_nearest(likeness, rows)}. Nothing was added; see --score.")
    return sorted(found, key=lambda one: -one.score)


def _nearest(likeness: Callable[[Row], float], rows: Mapping[RowId, Row]) -> str:
    scored = sorted(((likeness(row), str(name)) for name, row in rows.items()), key=lambda one: -one[0])[:NEAR]
    return "; nearest ids: " + ", ".join(f"{name} ({like:.0f})" for like, name in scored)
