"""The ledger of deletion requests: an SQLite file with their states, and a chain of events in which a changed past is seen.

No text of a row is ever in it: rows stand by their id and by an HMAC-SHA256 of what they say, under a salt of 32 random bytes that
only this file holds. Without the salt nobody can try short texts against such a hash. The file is readable by its owner only.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llm_unlearn.requests.file import LedgerFile
from llm_unlearn.requests.records import (
    GENESIS,
    PENDING,
    RUNNING,
    WITHDRAWN,
    Request,
    Row,
    Run,
    Verdict,
    canonical,
    detail_of,
    digest_of,
    digest_of_rows,
    link,
    narrowed,
    now,
    request_of,
    row_id,
    run_of,
)
from llm_unlearn.spec import Refused


class Ledger:
    """The requests of one service. Every change is one transaction with its event; any number of processes may share the file."""

    def __init__(self, path: Path, who: str, begin: bool = True) -> None:
        """Open a ledger, or begin one.

        Args:
            begin: False begins none where none is.

        Raises:
            Refused: there is none, the file is something else, or a ledger of another version.
        """
        self.path, self.who, self._file = path, who, LedgerFile(path, begin)
        self.salt, self.name = bytes.fromhex(self._file.facts["salt"]), self._file.facts["ledger"]

    def digest(self, *parts: object) -> str:
        """HMAC-SHA256 of plain data under this ledger's salt, as 64 hexadecimal digits."""
        return hmac.new(self.salt, canonical(parts).encode(), hashlib.sha256).hexdigest()

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """A connection that sees one state of the ledger."""
        return self._file.reading()

    def change(self) -> AbstractContextManager[sqlite3.Connection]:
        """One transaction that writes: all of it, or nothing."""
        return self._file.change()

    def note(
        self, on: sqlite3.Connection, what: str, request: int | None = None, run: int | None = None, detail: Any = None
    ) -> dict[str, Any]:
        """Add an event, after the change that it is of. Its hash covers the hash of the event before, and every column of the
        request (or the run) and of its rows as they are now. Returns its place in the chain."""
        table, number = ("runs", run) if request is None else ("requests", request)
        record = self.record(
            table,
            on.execute(f"SELECT * FROM {table} WHERE id = ?", (number,)).fetchone(),
            on.execute("SELECT * FROM rows WHERE request = ? ORDER BY id", (request,)),
        )
        text = canonical({**(detail or {}), "record": record})
        event = {"at": now(), "who": self.who, "what": what, "request": request, "run": run, "detail": text}
        head = self.head(on)
        found = link(head["hash"], head["event"] + 1, event)
        on.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (head["event"] + 1, *event.values(), found))
        return {"event": head["event"] + 1, "hash": found}

    def record(self, table: str, row: sqlite3.Row, rows: Iterable[sqlite3.Row] = ()) -> str:
        """Return one hash of all columns of a request or run, and of the rows of a request in the order of their ids."""
        return self.digest("record", self.name, table, dict(row), [dict(one) for one in rows])

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
            key: the caller's own name for it; without it, the same selector that finds the same rows for the same model is the same
                request. Rows that came later make another one: nobody has forgotten them.
            selector: salted hash of what was asked for.

        Returns:
            The request, and whether it is new.

        Raises:
            Refused: the key is another request's.
        """
        seal = digest_of_rows(sorted((canonical(row.id), row.content) for row in rows))
        own = f"own:{key}" if key else f"same:{self.digest(selector, model, seal)}"
        old = own if key else f"same:{self.digest(selector, model)}"  # the rows were no part of a key once
        with self.change() as on:
            for there in on.execute("SELECT * FROM requests WHERE key IN (?, ?)", (own, old)).fetchall():
                if (there["selector"], there["model"], self.rows_digest(on, there["id"])) == (selector, model, seal):
                    return request_of(there), False
                if key:
                    raise Refused(f"--key: {key!r} is request {there['id']}, which asks for other rows. Choose another key.")
            values = (own, selector, kind, model, due, PENDING, now())
            number = on.execute(
                "INSERT INTO requests (key, selector, kind, model, due, state, added) VALUES (?, ?, ?, ?, ?, ?, ?)", values
            ).lastrowid
            assert number
            on.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?)", [(number, canonical(row.id), row.content, row.score) for row in rows]
            )
            detail = {"state": PENDING, "kind": kind, "selector": selector, "model": model, "due": due,
                      "rows": seal, "count": len(rows)}  # fmt: skip
            self.note(on, "added", number, detail=detail)
            return request_of(on.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone()), True

    def requests(self, *states: str, model: str | None = None) -> list[Request]:
        """The requests in these states, or all: those that are due first, first; then in the order of their adding."""
        with self.reading() as on:
            asked = narrowed("SELECT * FROM requests", states, model, "due IS NULL, due, id")
            return [request_of(one) for one in on.execute(*asked)]

    def row_counts(self) -> dict[int, int]:
        """Request -> how many rows it means."""
        with self.reading() as on:
            return {one[0]: one[1] for one in on.execute("SELECT request, count(*) FROM rows GROUP BY request")}

    def request(self, number: int) -> Request:
        """One request.

        Raises:
            Refused: there is none of this number.
        """
        with self.reading() as on:
            found = on.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone()
            last = on.execute("SELECT coalesce(max(id), 0) FROM requests").fetchone()[0]
        if found is None:
            there = f"1 to {last}" if last > 1 else "1" if last else "none"
            raise Refused(f"request {number}: not in the ledger {self.path}; there are: {there}.")
        return request_of(found)

    def rows_of(self, request: int) -> list[Row]:
        """The rows of a request, in the order in which they were found."""
        with self.reading() as on:
            found = on.execute("SELECT * FROM rows WHERE request = ? ORDER BY rowid", (request,)).fetchall()
        return [Row(row_id(one["id"]), one["content"], one["score"]) for one in found]

    @staticmethod
    def rows_digest(on: sqlite3.Connection, request: int) -> str:
        """One hash of all rows of a request."""
        return digest_of_rows(on.execute("SELECT id, content FROM rows WHERE request = ? ORDER BY id", (request,)))

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

    def claim(self, model: str, settings: str, most: int | None = None, left: Sequence[int] = ()) -> Run | None:
        """Take pending requests of a model into a new run, which is then under way; None where there are none.

        Only one run of a model can be under way, as the next begins from what it leaves (a unique index sees to it).

        Args:
            settings: fingerprint of how they are served.
            most: at most so many; those that are due first.
            left: requests whose rows have left the data.
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
            detail = {"run state": "running", "folder": folder, "settings": settings, "left": list(left)}
            self.note(on, "run begun", None, next_one, detail)
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
            return [run_of(one) for one in on.execute(*narrowed("SELECT * FROM runs", states, model, "id"))]

    def served_by(self, run: int) -> list[Request]:
        """The requests that a run under way has claimed."""
        with self.reading() as on:
            asked = "SELECT * FROM requests WHERE run = ? AND state = ? ORDER BY due IS NULL, due, id"
            return [request_of(one) for one in on.execute(asked, (run, RUNNING))]

    def spared(self, run: int) -> list[int]:
        """The requests whose rows a run must not learn: those that stood on its model when it was begun, but for those whose rows
        had left the data. What came or was taken back since changes nothing, so that a run that was killed goes on as it began."""
        with self.reading() as on:
            begun = on.execute("SELECT n, detail FROM events WHERE what = 'run begun' AND run = ?", (run,)).fetchone()
            if begun is None:
                raise Refused(
                    f"run {run}: the ledger {self.path} has no event of its begin: it was changed. Put a copy of it back."
                )
            asked = (
                "SELECT id FROM requests WHERE model = (SELECT model FROM runs WHERE id = ?)"
                " AND id IN (SELECT request FROM events WHERE what = 'added' AND n < ?)"
                " AND id NOT IN (SELECT request FROM events WHERE what = 'withdrawn' AND n < ?) ORDER BY due IS NULL, due, id"
            )
            found = [one["id"] for one in on.execute(asked, (run, begun["n"], begun["n"]))]
        left = set(detail_of(begun["detail"]).get("left") or ())
        return [one for one in found if one not in left]

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

    def count_certificates(self) -> int:
        """How many there are."""
        with self.reading() as on:
            return int(on.execute("SELECT count(*) FROM certificates").fetchone()[0])

    def each_certificate(self) -> Iterator[tuple[int, int, str]]:
        """Request, run and certificate, in the order of requests and their runs; only a few are in memory at a time."""
        request = run = 0
        while True:
            with self.reading() as on:
                asked = "SELECT * FROM certificates WHERE (request, run) > (?, ?) ORDER BY request, run LIMIT 500"
                block = on.execute(asked, (request, run)).fetchall()
            if not block:
                return
            for one in block:
                request, run = one["request"], one["run"]
                yield request, run, one["text"]
