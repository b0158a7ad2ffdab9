"""Whether a ledger's past is as it was written: the chain of its events, and what they say against what the tables say."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import GENESIS, digest_of, link


def problems(ledger: Ledger) -> list[str]:
    """Everything in a ledger that does not fit, a line each; none where it is as it was written.

    A chain cannot tell that its newest events were cut off; the certificates can, as each names the event before it.
    """
    with ledger.reading() as on:
        events = on.execute("SELECT * FROM events ORDER BY n").fetchall()
        return [*_chain(events), *_requests(ledger, on, events), *_runs(on, events), *_certificates(on, events)]


def hash_of_event(ledger: Ledger, number: int) -> str | None:
    """The hash of one event; None where there is none of this number."""
    with ledger.reading() as on:
        found = on.execute("SELECT hash FROM events WHERE n = ?", (number,)).fetchone()
    return found["hash"] if found else None


def _chain(events: Sequence[sqlite3.Row]) -> Iterable[str]:
    before = GENESIS
    for number, event in enumerate(events, 1):
        said = {key: event[key] for key in ("at", "who", "what", "request", "run", "detail")}
        if event["n"] != number:
            yield f"event {number}: is missing"
            return
        if link(before, number, said) != event["hash"]:
            yield f"event {number} ({event['what']}): was changed after it was written, or one before it was"
            return
        before = event["hash"]


def _told(events: Sequence[sqlite3.Row], about: str, number: int) -> dict[str, Any]:
    """What all events about a request or run say together, the later over the earlier."""
    found: dict[str, Any] = {}
    for event in events:
        detail = json.loads(event["detail"])
        if event[about] == number and isinstance(detail, dict):
            found.update(detail)
    return found


def _requests(ledger: Ledger, on: sqlite3.Connection, events: Sequence[sqlite3.Row]) -> Iterable[str]:
    found = {one["id"]: one for one in on.execute("SELECT * FROM requests ORDER BY id")}
    for number in sorted({event["request"] for event in events if event["request"]} - set(found)):
        yield f"request {number}: its events are there, and it is not"
    for number, one in found.items():
        told = _told([event for event in events if event["request"] == number], "request", number)
        for key in ("state", "reason", "kind", "selector", "model", "due"):
            if one[key] != told.get(key, "" if key == "reason" else None):
                yield f"request {number}: {key} is not what its events say"
        if digest_of(one["numbers"]) != told.get("numbers"):
            yield f"request {number}: its numbers are not those that were measured"
        if ledger.rows_digest(on, number) != told.get("rows"):
            yield f"request {number}: its rows are not those that were added"


def _runs(on: sqlite3.Connection, events: Sequence[sqlite3.Row]) -> Iterable[str]:
    for one in on.execute("SELECT * FROM runs ORDER BY id"):
        told = _told([event for event in events if event["request"] is None], "run", one["id"])
        for key, column in (("run state", "state"), ("folder", "folder"), ("settings", "settings")):
            if one[column] != told.get(key):
                yield f"run {one['id']}: {column} is not what its events say"
        if digest_of(one["numbers"]) != told.get("numbers"):
            yield f"run {one['id']}: its numbers are not those that were measured"


def _certificates(on: sqlite3.Connection, events: Sequence[sqlite3.Row]) -> Iterable[str]:
    sealed = {}
    for event in events:
        detail = json.loads(event["detail"])
        if isinstance(detail, dict) and detail.get("certificate"):
            sealed[event["request"], event["run"]] = detail["certificate"]
    found = {(one["request"], one["run"]): one["text"] for one in on.execute("SELECT * FROM certificates")}
    for request, run in sorted({*sealed, *found}):
        text = found.get((request, run))
        if text is None or digest_of(text) != sealed.get((request, run)):
            yield f"request {request}: its certificate of run {run} is not the one that was issued"
