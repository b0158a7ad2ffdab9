"""Whether a ledger's past is as it was written: the chain of its events, and what they say against what the tables say."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import GENESIS, detail_of, digest_of, digest_of_rows, link
from llm_unlearn.spec import Refused


def problems(ledger: Ledger) -> list[str]:
    """Everything in a ledger that does not fit, a line each; none where it is as it was written.

    A chain cannot tell that its newest events were cut off; the certificates can, as each names the event before it. Tables and
    events are read side by side, request by request: of a hundred thousand requests, one at a time is in memory.
    """
    with ledger.reading() as on:
        return [*_chain(on), *_requests(on, ledger), *_runs(on, ledger), *_keys(on), *_certificates(on)]


def check(ledger: Ledger) -> None:
    """Check that a ledger is as it was written, before anything is decided or signed by it.

    Raises:
        Refused: something does not fit.
    """
    if wrong := problems(ledger):
        said = f"{ledger.path}: the ledger was changed: {wrong[0]}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}"
        raise Refused(f"{said}. Nothing was served; put a copy of it back (llm-unlearn requests verify lists all).")


def unchecked(ledger: Ledger) -> list[str]:
    """Return the requests and runs whose newest event, written by an earlier version, does not cover every column."""
    with ledger.reading() as on:
        return [
            f"{what} {one[0]}"
            for what, chosen in (("request", "request IS NOT NULL"), ("run", "request IS NULL AND run IS NOT NULL"))
            for one in on.execute(f"SELECT {what}, detail, max(n) FROM events WHERE {chosen} GROUP BY {what} ORDER BY {what}")
            if "record" not in detail_of(one["detail"])
        ]


def hash_of_event(ledger: Ledger, number: int) -> str | None:
    """The hash of one event; None where there is none of this number."""
    with ledger.reading() as on:
        found = on.execute("SELECT hash FROM events WHERE n = ?", (number,)).fetchone()
    return found["hash"] if found else None


def _chain(on: sqlite3.Connection) -> Iterable[str]:
    before = GENESIS
    for number, event in enumerate(on.execute("SELECT * FROM events ORDER BY n"), 1):
        said = {key: event[key] for key in ("at", "who", "what", "request", "run", "detail")}
        if event["n"] != number:
            yield f"event {number}: is missing"
            return
        if link(before, number, said) != event["hash"]:
            yield f"event {number} ({event['what']}): was changed after it was written, or one before it was"
            return
        before = event["hash"]


class _Beside:
    """What a query finds, in the order of the number in its first column: taken number by number as another table goes up."""

    def __init__(self, found: Iterator[sqlite3.Row]) -> None:
        self.found = found
        self.ahead = next(found, None)

    def of(self, number: float) -> list[sqlite3.Row]:
        """All that stands under this number; call `below` first."""
        taken = []
        while self.ahead is not None and self.ahead[0] == number:
            taken.append(self.ahead)
            self.ahead = next(self.found, None)
        return taken

    def below(self, number: float) -> list[int]:
        """The numbers up to this one that nobody took."""
        passed = dict[int, None]()
        while self.ahead is not None and self.ahead[0] < number:
            passed[self.ahead[0]] = None
            self.ahead = next(self.found, None)
        return list(passed)


def _told(events: Sequence[sqlite3.Row]) -> dict[str, Any]:
    """Merge all events about a request or run, the later over the earlier; of its columns, those of the last one."""
    found: dict[str, Any] = {}
    for event in events:
        found = {**found, "record": None, **detail_of(event["detail"])}
    return found


def _requests(on: sqlite3.Connection, ledger: Ledger) -> Iterable[str]:
    events = _Beside(on.execute("SELECT request, detail FROM events WHERE request IS NOT NULL ORDER BY request, n"))
    rows = _Beside(on.execute("SELECT * FROM rows ORDER BY request, id"))
    for one in on.execute("SELECT * FROM requests ORDER BY id"):
        number = one["id"]
        yield from _lost(events.below(number))
        rows.below(number)
        told = _told(events.of(number))
        for key in ("state", "reason", "kind", "selector", "model", "due"):
            if one[key] != told.get(key, "" if key == "reason" else None):
                yield f"request {number}: {key} is not what its events say"
        if digest_of(one["numbers"]) != told.get("numbers"):
            yield f"request {number}: its numbers are not those that were measured"
        mine = rows.of(number)
        if digest_of_rows((row["id"], row["content"]) for row in mine) != told.get("rows"):
            yield f"request {number}: its rows are not those that were added"
        if told.get("record") not in (None, ledger.record("requests", one, mine)):
            yield f"request {number}: a column is not what its events say (of {', '.join(one.keys())}, or of its rows)"
    yield from _lost(events.below(float("inf")))


def _lost(numbers: Iterable[int], what: str = "request") -> Iterable[str]:
    return (f"{what} {number}: its events are there, and it is not" for number in numbers)


def _runs(on: sqlite3.Connection, ledger: Ledger) -> Iterable[str]:
    asked = "SELECT run, detail FROM events WHERE request IS NULL AND run IS NOT NULL ORDER BY run, n"
    events = _Beside(on.execute(asked))
    for one in on.execute("SELECT * FROM runs ORDER BY id"):
        yield from _lost(events.below(one["id"]), "run")
        told = _told(events.of(one["id"]))
        for key, column in (("run state", "state"), ("folder", "folder"), ("settings", "settings")):
            if one[column] != told.get(key):
                yield f"run {one['id']}: {column} is not what its events say"
        if digest_of(one["numbers"]) != told.get("numbers"):
            yield f"run {one['id']}: its numbers are not those that were measured"
        if told.get("record") not in (None, ledger.record("runs", one)):
            yield f"run {one['id']}: a column is not what its events say (of {', '.join(one.keys())})"
    yield from _lost(events.below(float("inf")), "run")


def _keys(on: sqlite3.Connection) -> Iterable[str]:
    """Return the keys that stand for several requests: where the table's rule was taken away, one request was added twice."""
    for one in on.execute("SELECT key, group_concat(id, ', ') AS every FROM requests GROUP BY key HAVING count(*) > 1"):
        yield f"requests {one['every']}: have one key"


def _certificates(on: sqlite3.Connection) -> Iterable[str]:
    sealed: dict[tuple[int, int], str] = {}
    for event in on.execute('SELECT request, run, detail FROM events WHERE detail LIKE \'%"certificate":"%\' ORDER BY n'):
        if seal := detail_of(event["detail"]).get("certificate"):
            sealed[event["request"], event["run"]] = seal
    for one in on.execute("SELECT * FROM certificates ORDER BY request, run"):
        if digest_of(one["text"]) != sealed.pop((one["request"], one["run"]), None):
            yield _other(one["request"], one["run"])
    yield from (_other(request, run) for request, run in sorted(sealed, key=str))


def _other(request: int, run: int) -> str:
    return f"request {request}: its certificate of run {run} is not the one that was issued"
