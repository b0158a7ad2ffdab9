"""The ledger of deletion requests: an SQLite file with their states, and a chain of events in which a changed past is seen.

No text of a row is ever in it: rows stand by their id and by an HMAC-SHA256 of what they say, under a salt of 32 random bytes that
only this file holds. Without the salt nobody can try short texts against such a hash. The file is readable by its owner only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llm_unlearn.requests.records import (
    APPLICATION,
    GENESIS,
    PENDING,
    RUNNING,
    VERSION,
    WITHDRAWN,
    Request,
    Row,
    Run,
    Verdict,
    canonical,
    check_file,
    digest_of,
    link,
    make_tables,
    now,
    request_of,
    run_of,
)
from llm_unlearn.spec import Refused


class Ledger:
    """The requests of one service. Every change is one transaction with its event; any number of processes may share the file."""

    def __init__(self, path: Path, who: str) -> None:
        """Open a ledger, or begin one.

        Raises:
            Refused: the file is something else, or a ledger of another version.
        """
        self.path, self.who = path, who
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise Refused(f"{path}: the ledger cannot be opened ({error.strerror}).") from None
        check_file(path)
        try:
            with closing(self._open()) as connection:
                self._begin(connection)
                self.salt = bytes.fromhex(self._fact(connection, "salt"))
                self.name = self._fact(connection, "ledger")
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise Refused(f"{path}: the ledger cannot be opened ({error}).") from None
            raise Refused(f"{path}: not a ledger ({error}). Name another file in `ledger`.") from None

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # what was said to be done stays done when the power goes
        return connection

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        whose = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            make_tables(connection)
        connection.execute("COMMIT")
        if tables and whose != APPLICATION:
            raise Refused(f"{self.path}: another program's database, not a ledger of requests. Name another file in `ledger`.")
        if tables and version != VERSION:
            raise Refused(
                f"{self.path}: a ledger of version {version}; this llm-unlearn reads version {VERSION}. Nothing was changed."
            )
        for attempt in range(200):  # the busy timeout does not hold for this switch
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if attempt == 199:
                    raise
                time.sleep(0.05)

    @staticmethod
    def _fact(connection: sqlite3.Connection, name: str) -> str:
        return str(connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])

    def digest(self, *parts: object) -> str:
        """HMAC-SHA256 of plain data under this ledger's salt, as 64 hexadecimal digits."""
        return hmac.new(self.salt, canonical(parts).encode(), hashlib.sha256).hexdigest()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the ledger."""
        with closing(self._open()) as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that writes: all of it, or nothing."""
        with closing(self._open()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def note(
        self, on: sqlite3.Connection, what: str, request: int | None = None, run: int | None = None, detail: object = None
    ) -> dict[str, Any]:
        """Add an event; its hash covers that of the event before. Returns its place in the chain."""
        event = {"at": now(), "who": self.who, "what": what, "request": request, "run": run, "detail": canonical(detail)}
        head = self.head(on)
        found = link(head["hash"], head["event"] + 1, event)
        on.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (head["event"] + 1, *event.values(), found))
        return {"event": head["event"] + 1, "hash": found}

    @staticmethod
    def head(on: sqlite3.Connection) -> dict[str, Any]:
        """The newest event's number and hash."""
        last = on.execute("SELECT n, hash FROM events ORDER BY n DESC LIMIT 1").fetchone()
        return {"event": last["n"], "hash": last["hash"]} if last else {"event": 0, "hash": GENESIS}

    # ------------------------------------------------------------------------------------------------ what is asked

    def add(
        self, *, key: str | None, kind: str, selector: str, model: str, due: str | None, rows: Sequence[Row]
    ) -> tuple[Request, bool]:
        """Put a request in, unless it is there.

        Args:
            key: the caller's own name for it; without it, the same selector for the same model is the same request.
            selector: salted hash of what was asked for.

        Returns:
            The request, and whether it is new.

        Raises:
            Refused: the key is another request's.
        """
        own = f"own:{key}" if key else f"same:{self.digest(selector, model)}"
        with self.change() as on:
            there = on.execute("SELECT * FROM requests WHERE key = ?", (own,)).fetchone()
            if there:
                if (there["selector"], there["model"]) != (selector, model):
                    raise Refused(f"--key: {key!r} is request {there['id']}, which asks for other rows. Choose another key.")
                return request_of(there), False
            values = (own, selector, kind, model, due, PENDING, now())
            number = on.execute(
                "INSERT INTO requests (key, selector, kind, model, due, state, added) VALUES (?, ?, ?, ?, ?, ?, ?)", values
            ).lastrowid
            assert number
            on.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)", [(number, canonical(row.id), row.content, row.score) for row in rows]
            )
            detail = {"state": PENDING, "kind": kind, "selector": selector, "model": model, "due": due,
                      "rows": self.rows_digest(on, number), "count": len(rows)}  # fmt: skip
            self.note(on, "added", number, detail=detail)
            return request_of(on.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone()), True

    def requests(self, *states: str, model: str | None = None) -> list[Request]:
        """The requests in these states, or all: those that are due first, first; then in the order of their adding."""
        with self.reading() as on:
            found = [request_of(one) for one in on.execute("SELECT * FROM requests ORDER BY due IS NULL, due, id")]
        return [one for one in found if (not states or one.state in states) and model in (None, one.model)]

    def request(self, number: int) -> Request:
        """One request.

        Raises:
            Refused: there is none of this number.
        """
        found = {one.id: one for one in self.requests()}
        if number not in found:
            there = ", ".join(map(str, sorted(found))) or "none"
            raise Refused(f"request {number}: not in the ledger {self.path}; there are: {there}.")
        return found[number]

    def rows_of(self, request: int) -> list[Row]:
        """The rows of a request, in the order in which they were found."""
        with self.reading() as on:
            found = on.execute("SELECT * FROM rows WHERE request = ? ORDER BY rowid", (request,)).fetchall()
        return [Row(json.loads(one["id"]), one["content"], one["score"]) for one in found]

    @staticmethod
    def rows_digest(on: sqlite3.Connection, request: int) -> str:
        """One hash of all rows of a request."""
        found = on.execute("SELECT id, content FROM rows WHERE request = ? ORDER BY id", (request,)).fetchall()
        return str(digest_of(canonical([list(one) for one in found])))

    def move(self, request: int, expected: Sequence[str], state: str, what: str, reason: str = "") -> Request:
        """Put a request by hand into another state.

        Raises:
            Refused: it is in none of the `expected` ones.
        """
        found = self.request(request)
        with self.change() as on:
            marks = ", ".join("?" * len(expected))
            changed = on.execute(
                f"UPDATE requests SET state = ?, reason = ? WHERE id = ? AND state IN ({marks})",
                (state, reason, request, *expected),
            ).rowcount
            if not changed:
                state_now = on.execute("SELECT state FROM requests WHERE id = ?", (request,)).fetchone()[0]
                raise Refused(f"request {request}: is {state_now}; expected {' or '.join(expected)}. Nothing was changed.")
            if state == WITHDRAWN:  # the same may be asked for again
                on.execute("UPDATE requests SET key = ? WHERE id = ?", (f"withdrawn:{request}", request))
            self.note(on, what, request, found.run, {"state": state, "reason": reason})
        return self.request(request)

    # ------------------------------------------------------------------------------------------------- what is done

    def claim(self, model: str, settings: str, most: int | None = None) -> Run | None:
        """Take pending requests of a model into a new run, which is then under way; None where there are none.

        Only one run of a model can be under way, as the next begins from what it leaves (a unique index sees to it).

        Args:
            settings: fingerprint of how they are served.
            most: at most so many; those that are due first.
        """
        with self.change() as on:
            if on.execute("SELECT 1 FROM runs WHERE model = ? AND state = 'running'", (model,)).fetchone():
                return None
            asked = on.execute(
                "SELECT id FROM requests WHERE state = 'pending' AND model = ? ORDER BY due IS NULL, due, id LIMIT ?",
                (model, -1 if most is None else most),
            ).fetchall()
            if not asked:
                return None
            next_one = on.execute("SELECT coalesce(max(id), 0) + 1 FROM runs").fetchone()[0]
            folder = f"run-{next_one}-{self.name[:6]}"  # another ledger's runs may lie in the same place
            on.execute(
                "INSERT INTO runs (id, model, folder, settings, process, state, began) VALUES (?, ?, ?, ?, ?, 'running', ?)",
                (next_one, model, folder, settings, os.getpid(), now()),
            )
            self.note(on, "run begun", None, next_one, {"run state": "running", "folder": folder, "settings": settings})
            for one in asked:
                on.execute(
                    "UPDATE requests SET state = 'running', reason = '', run = ? WHERE id = ? AND state = 'pending'",
                    (next_one, one["id"]),
                )
                self.note(on, "claimed", one["id"], next_one, {"state": RUNNING, "reason": ""})
            return run_of(on.execute("SELECT * FROM runs WHERE id = ?", (next_one,)).fetchone())

    def runs(self, *states: str, model: str | None = None) -> list[Run]:
        """The runs in these states, or all, in their order."""
        with self.reading() as on:
            found = [run_of(one) for one in on.execute("SELECT * FROM runs ORDER BY id")]
        return [one for one in found if (not states or one.state in states) and model in (None, one.model)]

    def served_by(self, run: int) -> list[Request]:
        """The requests that a run under way has claimed."""
        return [one for one in self.requests(RUNNING) if one.run == run]

    def finish(
        self, run: int, state: str, verdicts: Sequence[Verdict], numbers: Sequence[object], notes: Sequence[str] = ()
    ) -> None:
        """A run is over: every state, certificate and event in one transaction.

        Args:
            state: accepted, its weights are the model from now on; rejected, they are not; given up, its requests wait again.
            notes: what else is to be remembered of it.
        """
        with self.change() as on:
            ended = on.execute(
                "UPDATE runs SET state = ?, ended = ?, numbers = ? WHERE id = ? AND state = 'running'",
                (state, now(), canonical(list(numbers)), run),
            ).rowcount
            if not ended:
                raise Refused(f"run {run}: is not under way any more; another process has ended it. Nothing was changed.")
            place = self.note(
                on,
                f"run {state}",
                None,
                run,
                {"run state": state, "notes": list(notes), "numbers": digest_of(canonical(list(numbers)))},
            )
            for one in verdicts:
                text = one.certificate(place) if one.certificate else None
                kept = canonical(one.numbers) if one.numbers is not None else None
                on.execute(
                    "UPDATE requests SET state = ?, reason = ?, numbers = coalesce(?, numbers) WHERE id = ?",
                    (one.state, one.reason, kept, one.request),
                )
                if text is not None:
                    on.execute("INSERT INTO certificates VALUES (?, ?, ?)", (one.request, run, text))
                detail = {"state": one.state, "reason": one.reason, "certificate": digest_of(text)}
                detail |= {"numbers": digest_of(kept)} if kept is not None else {}
                self.note(on, one.state, one.request, run, detail)

    def certificates(self) -> dict[tuple[int, int], str]:
        """(request, run) -> certificate, in the order of runs: the last of a request is the one that stands."""
        with self.reading() as on:
            found = on.execute("SELECT * FROM certificates ORDER BY run, request").fetchall()
        return {(one["request"], one["run"]): one["text"] for one in found}
