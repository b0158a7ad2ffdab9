"""What an error says of rows without their words, which may be what is to be forgotten: errors stay in logs, and are shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from llm_unlearn.spec import nearest


def unsaid(found: object) -> str:
    """What was found in a row, without its words; numbers are said."""
    if found is None or isinstance(found, (bool, int, float)) or (isinstance(found, (str, list, dict)) and not found):
        return repr(found)
    if isinstance(found, str):
        return f"text of {len(found):,} characters" if found.strip() else repr(found[:20])
    if isinstance(found, Mapping):
        return f"an object of {len(found)} keys"
    if isinstance(found, (list, tuple)):
        return f"a list of {len(found)}"
    return f"a value of type {type(found).__name__}"


COLUMN = re.compile(r"[\w.:/;,|\-]{1,40}")
"""What looks like the name of a column. In a file without a header, words of the first row stand in its place."""


def column_name(name: str) -> str:
    """The name of a column, if it looks like one."""
    return repr(name) if COLUMN.fullmatch(name) else unsaid(name)


def near_column(found: object, columns: Iterable[str]) -> str:
    """As `nearest`, of the columns of a file: those that look like names."""
    names = list(columns)
    plain_names = [name for name in names if COLUMN.fullmatch(str(name))]
    more = len(names) - len(plain_names)
    if not more:
        return nearest(found, names)
    what = f"{more} more, whose names look like text: has the file a header?"
    return f"{nearest(found, plain_names).removesuffix('.')}, and {what}" if plain_names else f"there are {what[:1]}{what[1:]}"


QUOTED = re.compile(r"""'(\\.|[^'\\])*('|\\?$)|"(\\.|[^"\\])*("|\\?$)|`[^`]*`?|\u201c[^\u201d]*\u201d?""", re.DOTALL)
"""A quotation, up to its end, or to that of all; a quotation mark behind a backslash is part of it."""


NEAR = 3
"""So many ids are named that come near one that is not there."""


def near_ids(found: str, ids: Iterable[str]) -> str:
    """An id that is not there, and those that come near it. Others are not listed: an id may be somebody's name."""
    near = difflib.get_close_matches(found[:200], list(ids), NEAR, cutoff=0.5)
    return f"{found!r}" + (f" (nearest: {', '.join(near)})" if near else "")


def without_quotes(text: str) -> str:
    """What a library says, without what it quotes: that may be words of a row."""
    return QUOTED.sub("'…'", text)
