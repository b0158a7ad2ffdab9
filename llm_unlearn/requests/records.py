"""What a ledger holds: its tables, a request, a row, a run, a verdict, and how events are chained."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_unlearn.spec import Refused

VERSION, APPLICATION = 1, 0x4C4C4D55
PENDING, RUNNING, FULFILLED, ATTENTION, WITHDRAWN = "pending", "running", "fulfilled", "needs attention", "withdrawn"
GENESIS = "0" * 64
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, folder TEXT NOT NULL, settings TEXT NOT NULL, process INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'accepted', 'rejected', 'given up')), began TEXT NOT NULL, ended TEXT,
    numbers TEXT) STRICT;
CREATE UNIQUE INDEX one_run_of_a_model ON runs (model) WHERE state = 'running';
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, selector TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, due TEXT,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'fulfilled', 'needs attention', 'withdrawn')),
    reason TEXT NOT NULL DEFAULT '', run INTEGER REFERENCES runs (id), added TEXT NOT NULL, numbers TEXT) STRICT;
CREATE TABLE rows (
    request INTEGER NOT NULL REFERENCES requests (id), id TEXT NOT NULL, content TEXT NOT NULL, score REAL NOT NULL,
    PRIMARY KEY (request, id)) STRICT;
CREATE TABLE certificates (
    request INTEGER NOT NULL REFERENCES requests (id), run INTEGER NOT NULL REFERENCES runs (id), text TEXT NOT NULL,
    PRIMARY KEY (request, run)) STRICT;
CREATE TABLE events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL,
    request INTEGER REFERENCES requests (id), run INTEGER REFERENCES runs (id), detail TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
CREATE TRIGGER events_remain BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
"""


@dataclass(frozen=True)
class Request:
    """One deletion request as it stands."""

    id: int
    key: str
    selector: str
    kind: str
    model: str
    due: str | None
    state: str
    reason: str
    run: int | None
    added: str
    numbers: dict[str, Any] | None
    """What was measured on its rows by the run that served it: `set` and `numbers`."""


@dataclass(frozen=True)
class Row:
    """One row of a request: its id, and the salted hash of what it says."""

    id: str | int
    content: str
    score: float


@dataclass(frozen=True)
class Run:
    """One serving of requests."""

    id: int
    model: str
    folder: str
    settings: str
    process: int
    state: str
    began: str
    ended: str | None
    numbers: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Verdict:
    """What a run came to for one request. `numbers` are kept where the request was served by this run."""

    request: int
    state: str
    reason: str
    numbers: dict[str, Any] | None
    certificate: Callable[[Mapping[str, Any]], str] | None
    """Makes the certificate, given the place in the chain at which it is made."""


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def canonical(data: object) -> str:
    """Plain data in the one way in which it is hashed and signed: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def detail_of(text: str) -> dict[str, Any]:
    """What an event says in detail; nothing where it was changed into something else, which the chain shows."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def digest_of(text: str | None) -> str | None:
    """SHA-256 of a text, as 64 hexadecimal digits; None of none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def digest_of_rows(found: Iterable[Sequence[str]]) -> str:
    """One hash of the rows of a request: id and content of each, in the order of their ids."""
    return hashlib.sha256(canonical([list(one) for one in found]).encode()).hexdigest()


def link(previous: str, number: int, event: Mapping[str, Any]) -> str:
    """The hash of an event: SHA-256 of the hash before it, its number, and all that it says."""
    return hashlib.sha256(canonical([previous, number, dict(event)]).encode()).hexdigest()


def make_tables(on: sqlite3.Connection) -> None:
    """Make a new ledger of an empty file: tables, version, name, and the salt. Inside a transaction of the caller's."""
    for statement in _statements(SCHEMA):
        on.execute(statement)
    on.execute(f"PRAGMA user_version = {VERSION}")
    on.execute(f"PRAGMA application_id = {APPLICATION}")
    facts = {"salt": secrets.token_hex(32), "ledger": secrets.token_hex(8)}
    on.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one, as `executescript` would commit in between."""
    text = ""
    for line in script.splitlines():
        text += line + "\n"
        if sqlite3.complete_statement(text):
            yield text
            text = ""


LARGE = 64 << 20
"""Bytes of a ledger that is not looked through at every opening."""


def check_file(path: Path) -> None:
    """Look at a ledger without touching it, not even its journal: what is damaged or somebody else's stays as it is.

    Raises:
        Refused: it is no ledger, of another version, or damaged.
    """
    journal = path.with_name(f"{path.name}-wal")
    if not path.stat().st_size or journal.exists():  # new; or others are writing, and SQLite itself keeps them apart
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as on:
            whose, version = (on.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
            tables = {name for (name,) in on.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            small = path.stat().st_size < LARGE  # page by page; of a large one `requests verify` reads every row
            said = on.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
            facts = dict(on.execute("SELECT name, value FROM facts")) if "facts" in tables else {}
    except sqlite3.DatabaseError as error:
        if journal.exists():
            return
        raise Refused(f"{path}: not a ledger, or a damaged one ({error}). Put a copy back, or name another in `ledger`.") from None
    if tables and whose != APPLICATION:
        raise Refused(f"{path}: another program's database, not a ledger of requests. Name another file in `ledger`.")
    if tables and version != VERSION:
        raise Refused(f"{path}: a ledger of version {version}; this llm-unlearn reads version {VERSION}. Nothing was changed.")
    if tables and (lacking := TABLES - tables):
        said = f"table {min(lacking)} is gone"
    elif tables and not (re.fullmatch("[0-9a-f]{64}", str(facts.get("salt"))) and facts.get("ledger")):
        said = "its salt or its name is gone"
    if said != "ok" and not journal.exists():
        raise Refused(f"{path}: a damaged ledger ({said}). Put a copy back; nothing was changed.")


TABLES = {"facts", "runs", "requests", "rows", "certificates", "events"}


def request_of(found: sqlite3.Row) -> Request:
    return Request(**{**dict(found), "numbers": _numbers(found, "request")})


def run_of(found: sqlite3.Row) -> Run:
    """A run as a ledger has it; where it lies is the name of a folder beside others, and no way to elsewhere."""
    if Path(str(found["folder"])).name != found["folder"]:
        said = f"run {found['id']} of the ledger: folder: found {found['folder']!r}; expected a name"
        raise Refused(f"{said}. The ledger was changed.")
    return Run(**{**dict(found), "numbers": _numbers(found, "run")})


def _numbers(found: sqlite3.Row, what: str) -> Any:
    try:
        return json.loads(found["numbers"]) if found["numbers"] else None
    except (ValueError, RecursionError):
        raise Refused(
            f"the ledger's {what} {found['id']}: its numbers are not what was written; put a copy of the ledger back."
        ) from None


def row_id(text: str) -> str | int:
    """Return a row's id; the text as it is where it was changed into something else, which is no row of the data."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, str | int) else text


def narrowed(asked: str, states: Sequence[str], model: str | None, order: str) -> tuple[str, tuple[str, ...]]:
    """Return a query for what is in these states and of this model, where they are given, and its values."""
    parts = [f"state IN ({', '.join('?' * len(states))})"] if states else []
    parts += ["model = ?"] if model is not None else []
    where = f" WHERE {' AND '.join(parts)}" if parts else ""
    return f"{asked}{where} ORDER BY {order}", (*states, *([] if model is None else [model]))
