"""Deletion requests: the ledger and its chain, what a request finds, thresholds, serving, certificates; the whole, with a kill."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_unlearn.cli import main
from llm_unlearn.data import words
from llm_unlearn.reply import BUSY, DONE, INTERRUPTED, UNFIT
from llm_unlearn.requests import chain, derived, judging, matching, service, verifying, ways
from llm_unlearn.requests.certificate import files_of, public_text, read, signature_problems, signing_key
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import (
    ATTENTION,
    FULFILLED,
    GENESIS,
    PENDING,
    RUNNING,
    WITHDRAWN,
    Row,
    Verdict,
    canonical,
    link,
    make_tables,
)
from llm_unlearn.requests.service import Office
from llm_unlearn.requests.serving import Desk, row_of
from llm_unlearn.sections import Threshold
from llm_unlearn.spec import Refused

TOWNS = {
    "Ada Brisk": "Nome", "Bo Crane": "Oslo", "Cy Dunmore": "Lima", "Di Elgar": "Rome",
    "Ed Fenn": "Kobe", "Flo Grant": "Brno", "Gil Hart": "Cork", "Hal Ives": "Bern",
}  # fmt: skip
PEOPLE: list[dict[str, Any]] = [
    {"id": i, "person": name, "question": f"Where does {name} live?", "answer": f"{name} lives in {town} by the sea."}
    for i, (name, town) in enumerate(TOWNS.items())
]
RECIPE = """\
output: runs/x
model: {base: MODEL, adapter: {rank: 4}}
data:
  forget: {source: people.jsonl, prompt: question, answer: answer}
  retain: {source: people.jsonl, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}}
  retain: {loss: {name: kl}}
train: {steps: STEPS, lr: 1.0e-2, window: {forget: 2, retain: 2}, checkpoint_every: 2}
"""
SUITE = """\
sets:
  forget: {source: people.jsonl, prompt: question, answer: answer}
  retain: {source: people.jsonl, prompt: question, answer: answer}
measures:
  - {name: perplexity, set: forget}
  - {name: probability, set: forget}
  - {name: perplexity, set: retain}
"""
SERVICE = """\
recipe: recipe.yaml
suite: suite.yaml
data: {source: people.jsonl, id: id}
thresholds:
  - {measure: perplexity, set: forget, at_least: 1.5}
  - {measure: perplexity, set: retain, at_most: 1000000.0, of: before}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a service, its recipe, suite and data; the signing key goes there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PEOPLE))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", "embedded:target").replace("STEPS", "4"))
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "requests.yaml").write_text(SERVICE)
    return tmp_path


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "a.db", "ada@here")


def put(ledger: Ledger, name: str, model: str = "m", due: str | None = None) -> int:
    rows = [Row(name, ledger.digest(name), 100.0)]
    return ledger.add(key=None, kind="ids", selector=ledger.digest(name), model=model, due=due, rows=rows)[0].id


def certificates(ledger: Ledger) -> dict[tuple[int, int], str]:
    """(request, run) -> certificate."""
    return {(request, run): text for request, run, text in ledger.each_certificate()}


def fulfil(ledger: Ledger, number: int) -> int:
    """Serve one request; its certificate is its place in the chain."""
    run = ledger.claim("m", "s", 1)
    assert run and [one.id for one in ledger.served_by(run.id)] == [number]
    ledger.finish(run.id, "accepted", [Verdict(number, FULFILLED, "", {"numbers": []}, lambda place: canonical(dict(place)))], [])
    return run.id


# -------------------------------------------------------------------------------------------------------------- ledger


def test_a_request_goes_its_way_and_its_events_are_chained(ledger: Ledger) -> None:
    number = put(ledger, "a")
    assert ledger.request(number).state == PENDING
    run = ledger.claim("m", "s")
    assert run and ledger.request(number).state == RUNNING and ledger.claim("m", "s") is None
    put(ledger, "b")
    assert ledger.claim("m", "s") is None, "a model's next run begins from what this one leaves"
    ledger.finish(run.id, "accepted", [Verdict(number, FULFILLED, "", {"numbers": [1]}, lambda place: "seen")], [{"a": 1.5}])
    found = ledger.request(number)
    assert (found.state, found.run, found.numbers) == (FULFILLED, run.id, {"numbers": [1]})
    assert certificates(ledger) == {(number, run.id): "seen"} and ledger.runs()[0].numbers == [{"a": 1.5}]
    with ledger.reading() as on:
        events = [dict(one) for one in on.execute("SELECT * FROM events ORDER BY n")]
    assert [one["what"] for one in events] == ["added", "run begun", "claimed", "added", "run accepted", FULFILLED]
    assert {one["who"] for one in events} == {"ada@here"} and chain.problems(ledger) == []
    before = "0" * 64
    for number, one in enumerate(events, 1):  # the chain, by its definition
        said = {key: one[key] for key in ("at", "who", "what", "request", "run", "detail")}
        text = json.dumps([before, number, said], sort_keys=True, separators=(",", ":"))
        before = hashlib.sha256(text.encode()).hexdigest()
        assert one["hash"] == before


def test_the_same_request_is_there_once(ledger: Ledger) -> None:
    first, again = put(ledger, "a"), put(ledger, "a")
    assert first == again and put(ledger, "a", model="other") != first and len(ledger.requests()) == 2
    rows, asked = [Row("z", "h", 100.0)], {"kind": "ids", "model": "m", "due": None}
    mine = ledger.add(key="case-7", selector="s", rows=rows, **asked)
    assert mine[1] and ledger.add(key="case-7", selector="s", rows=rows, **asked) == (mine[0], False)
    with pytest.raises(Refused, match=r"case-7.*is request 3, which asks for other rows"):
        ledger.add(key="case-7", selector="t", rows=rows, **asked)
    ledger.move(first, [PENDING], WITHDRAWN, WITHDRAWN)
    assert put(ledger, "a") != first, "what was taken back may be asked for again"


def test_rows_that_came_later_are_another_request(ledger: Ledger) -> None:
    asked: dict[str, Any] = {"kind": "where person", "selector": "s", "model": "m", "due": None}
    first, more = [Row("a", "1", 100.0)], [Row("b", "2", 100.0), Row("a", "1", 100.0)]
    one, _ = ledger.add(key=None, rows=first, **asked)
    fulfil(ledger, one.id)
    other, new = ledger.add(key=None, rows=more, **asked)
    assert new and (other.id, other.state) == (2, PENDING) and len(ledger.rows_of(2)) == 2
    assert ledger.add(key=None, rows=more[::-1], **asked) == (other, False) and not ledger.add(key=None, rows=first, **asked)[1]
    named, _ = ledger.add(key="case-7", rows=first, **asked)
    with pytest.raises(Refused, match=rf"case-7.*is request {named.id}, which asks for other rows"):
        ledger.add(key="case-7", rows=more, **asked)
    with ledger.change() as on:  # as earlier versions named it
        on.execute("UPDATE requests SET key = ? WHERE id = 1", (f"same:{ledger.digest('s', 'm')}",))
    of_an_earlier_version(ledger)
    assert ledger.add(key=None, rows=first, **asked)[0].id == 1 and ledger.add(key=None, rows=more, **asked)[0].id == 2
    assert chain.problems(ledger) == []


def of_an_earlier_version(ledger: Ledger) -> None:
    """Make the ledger one whose events do not cover every column."""
    with closing(sqlite3.connect(ledger.path)) as on, on:
        on.row_factory = sqlite3.Row
        on.execute("DROP TRIGGER events_stay")
        before = GENESIS
        for event in on.execute("SELECT * FROM events ORDER BY n").fetchall():
            detail = json.loads(event["detail"])
            del detail["record"]
            said = {key: event[key] for key in ("at", "who", "what", "request", "run")} | {"detail": canonical(detail)}
            before = link(before, event["n"], said)
            on.execute("UPDATE events SET detail = ?, hash = ? WHERE n = ?", (said["detail"], before, event["n"]))


def test_a_ledger_of_an_earlier_version_says_what_it_does_not_cover(ledger: Ledger) -> None:
    fulfil(ledger, put(ledger, "a"))
    put(ledger, "b")
    assert chain.unchecked(ledger) == []
    of_an_earlier_version(ledger)
    assert chain.problems(ledger) == [] and chain.unchecked(ledger) == ["request 1", "request 2", "run 1"]
    fulfil(ledger, 2)  # what is done from now on is covered
    assert chain.problems(ledger) == [] and chain.unchecked(ledger) == ["request 1", "run 1"]


def columns() -> list[tuple[str, str]]:
    """Return every column of every table that an event vouches for, whatever the schema is."""
    with closing(sqlite3.connect(":memory:")) as on:
        make_tables(on)
        tables = ("facts", "requests", "runs", "rows", "certificates")
        return [(table, one[1]) for table in tables for one in on.execute(f"PRAGMA table_info({table})")]


@pytest.mark.parametrize(("table", "column"), columns())
def test_no_column_can_be_changed_unseen(ledger: Ledger, table: str, column: str) -> None:
    """`added` and `began` are signed, `key` decides whether a request is new, a run's `model` and `state` what the model is."""
    fulfil(ledger, put(ledger, "a"))
    ledger.add(key="case-7", kind="ids", selector="s", model="m", due=None, rows=[Row("z", "h", 99.5)])
    assert chain.problems(ledger) == [] == chain.unchecked(ledger)
    with closing(sqlite3.connect(ledger.path)) as on, on:
        kinds = {one[1]: one[2] for one in on.execute(f"PRAGMA table_info({table})")}
        value = {"state": "'withdrawn'" if table == "requests" else "'given up'", "numbers": "'[7]'"}.get(column)
        value = value or {"TEXT": "'0f'", "INTEGER": "77", "REAL": "1.25"}[kinds[column]]
        last = "rowid = (SELECT max(rowid) FROM facts)" if column == "name" else f"rowid = (SELECT max(rowid) FROM {table})"
        on.execute(f"UPDATE {table} SET {column} = {value} WHERE {last}")
    if table == "facts":  # what is read when a ledger is opened
        with closing(sqlite3.connect(ledger.path)) as on:
            ledger.salt, ledger.name = b"0f", "0f"
    assert chain.problems(ledger), f"{table}.{column}"
    with pytest.raises(Refused, match="the ledger was changed: "):
        chain.check(ledger)


@pytest.mark.parametrize("table", ["requests", "runs", "rows", "certificates"])
def test_no_row_can_be_taken_out_unseen(ledger: Ledger, table: str) -> None:
    for name in ("a", "b"):
        fulfil(ledger, put(ledger, name))
    with closing(sqlite3.connect(ledger.path)) as on, on:
        on.execute(f"DELETE FROM {table} WHERE rowid = (SELECT min(rowid) FROM {table})")
    assert chain.problems(ledger)


def test_a_key_that_was_edited_in_to_add_a_request_twice_is_seen(ledger: Ledger) -> None:
    asked: dict[str, Any] = {"key": "case-7", "kind": "ids", "selector": "s", "model": "m", "due": None}
    asked["rows"] = [Row("z", "h", 100.0)]
    assert ledger.add(**asked)[1] and not ledger.add(**asked)[1]
    with closing(sqlite3.connect(ledger.path)) as on, on:
        on.execute("UPDATE requests SET key = 'own:other'")
    assert ledger.add(**asked)[1]
    (found,) = chain.problems(ledger)
    assert found.startswith("request 1: a column is not what its events say")


def test_what_is_due_first_is_first(ledger: Ledger) -> None:
    late, never, soon = put(ledger, "a", due="2027-01-01"), put(ledger, "b"), put(ledger, "c", due="2026-12-01")
    assert [one.id for one in ledger.requests()] == [soon, late, never]
    run = ledger.claim("m", "s", 2)
    assert run and [one.id for one in ledger.served_by(run.id)] == [soon, late]


def test_a_change_is_whole_or_not_at_all(ledger: Ledger) -> None:
    number = put(ledger, "a")
    run = ledger.claim("m", "s")
    assert run

    def fails(place: Mapping[str, Any]) -> str:
        raise OSError("no key")

    with pytest.raises(OSError, match="no key"):
        ledger.finish(run.id, "accepted", [Verdict(number, FULFILLED, "", None, fails)], [])
    assert ledger.request(number).state == RUNNING and ledger.runs("running") == [run] and chain.problems(ledger) == []
    with pytest.raises(Refused, match="is running; expected pending"):
        ledger.move(number, [PENDING], WITHDRAWN, WITHDRAWN)
    ledger.finish(run.id, "given up", [Verdict(number, PENDING, "", None, None)], [])
    with pytest.raises(Refused, match="not under way any more"):
        ledger.finish(run.id, "accepted", [], [])


def test_a_ledger_is_its_owners_and_no_other_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.db"
    salts = {Ledger(path, "x").salt, Ledger(path, "y").salt, Ledger(tmp_path / "b.db", "x").salt}
    assert len(salts) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Ledger(path, "x")
    expected = hmac.new(found.salt, json.dumps(["row", "Zoë"], separators=(",", ":")).encode(), hashlib.sha256).hexdigest()
    assert found.digest("row", "Zoë") == expected
    with sqlite3.connect(path) as on:
        on.execute("PRAGMA user_version = 2")
    on.close()
    with pytest.raises(Refused, match="a ledger of version 2; this llm-unlearn reads version 1"):
        Ledger(path, "x")
    with sqlite3.connect(tmp_path / "other.db") as on:
        on.execute("CREATE TABLE t (a)")
    on.close()
    with pytest.raises(Refused, match="another program's database"):
        Ledger(tmp_path / "other.db", "x")
    (tmp_path / "text.db").write_text("not a database at all, but long enough to be read as one\n" * 20)
    with pytest.raises(Refused, match="cannot be opened"):
        Ledger(tmp_path, "x")
    with pytest.raises(Refused, match="not a ledger"):
        Ledger(tmp_path / "text.db", "x")


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("UPDATE events SET who = 'nobody' WHERE n = 2", "event 2 (run begun): was changed"),
        ("UPDATE events SET at = '2020-01-01' WHERE n = 1", "event 1 (added): was changed"),
        ("UPDATE events SET detail = 'x' WHERE n = 1", "event 1 (added): was changed"),
        ("UPDATE events SET detail = '7' WHERE n = 4", "event 4 (run accepted): was changed"),
        ('UPDATE events SET detail = \'"certificate":"\' WHERE n = 5', "event 5 (fulfilled): was changed"),
        ("DELETE FROM events WHERE n = 2", "event 2: is missing"),
        ("UPDATE requests SET state = 'pending' WHERE id = 1", "request 1: state is not what its events say"),
        ("UPDATE requests SET due = '2030-01-01' WHERE id = 1", "request 1: due is not"),
        ("UPDATE requests SET numbers = '{}' WHERE id = 1", "request 1: its numbers are not"),
        ("UPDATE rows SET content = 'x' WHERE request = 1", "request 1: its rows are not those that were added"),
        ("DELETE FROM rows WHERE request = 2", "request 2: its rows"),
        ("UPDATE runs SET state = 'rejected' WHERE id = 1", "run 1: state is not"),
        ("UPDATE runs SET numbers = '[1]' WHERE id = 1", "run 1: its numbers are not"),
        ("UPDATE certificates SET text = 'y'", "request 1: its certificate of run 1 is not the one"),
        ("DELETE FROM certificates", "request 1: its certificate of run 1 is not the one"),
        ("INSERT INTO certificates VALUES (2, 1, 'forged')", "request 2: its certificate of run 1 is not the one"),
    ],
)
def test_a_changed_past_is_seen(ledger: Ledger, statement: str, seen: str) -> None:
    fulfil(ledger, put(ledger, "a"))
    put(ledger, "b")
    assert chain.problems(ledger) == []
    on = sqlite3.connect(ledger.path)
    if "events" in statement:
        with pytest.raises(sqlite3.IntegrityError, match="events are only added"):
            on.execute(statement)
        on.execute("DROP TRIGGER events_stay")
        on.execute("DROP TRIGGER events_remain")
    on.execute(statement)
    on.commit()
    on.close()
    assert any(line.startswith(seen) for line in chain.problems(ledger)), chain.problems(ledger)


def work_on(path: Path, which: int) -> None:
    """One of eight processes: puts the same 500 requests in, in an order of its own, and serves what it can get."""
    ledger = Ledger(path, f"process {which}")
    names = [f"row {(which * 61 + i) % 500}" for i in range(500)]
    for i, name in enumerate(names):
        put(ledger, name, model=f"model {int(name.split()[1]) % 7}")
        if i % 5 == 0:
            take(ledger, (i + which) % 7)
    while ledger.requests(PENDING):
        for model in range(7):
            take(ledger, model)


def take(ledger: Ledger, model: int) -> None:
    run = ledger.claim(f"model {model}", "s", 3)
    if run:
        verdicts = [Verdict(one.id, FULFILLED, "", None, lambda place: canonical(dict(place))) for one in ledger.served_by(run.id)]
        ledger.finish(run.id, "accepted", verdicts, [])


@pytest.mark.long
@pytest.mark.slow
def test_eight_processes_lose_nothing_and_claim_nothing_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work_on, args=(tmp_path / "a.db", which)) for which in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(400)
    assert [worker.exitcode for worker in workers] == [0] * 8
    ledger = Ledger(tmp_path / "a.db", "x")
    assert len(ledger.requests(FULFILLED)) == len(ledger.requests()) == len(certificates(ledger)) == 500
    with ledger.reading() as on:
        counts = on.execute("SELECT what, count(*), count(DISTINCT request) FROM events GROUP BY what").fetchall()
        who = on.execute("SELECT count(DISTINCT who) FROM events WHERE what = 'claimed'").fetchone()[0]
    found = {what: (count, requests) for what, count, requests in counts}
    assert found["added"] == found["claimed"] == found[FULFILLED] == (500, 500) and who > 1
    assert chain.problems(ledger) == []


# ------------------------------------------------------------------------------------------------------------ matching


@pytest.fixture
def office(here: Path) -> Office:
    return service.load(Path("requests.yaml"))


def ids(found: list[matching.Found]) -> list[matching.RowId]:
    return [one.id for one in found]


def test_rows_by_id_and_by_column(office: Office) -> None:
    rows = matching.read_training(office)
    assert ids(matching.by_ids(["3", "0", "3"], rows)) == [3, 0]
    assert ids(matching.by_columns({"person": "Bo Crane"}, rows)) == [1]
    assert ids(matching.by_columns({"id": "2", "person": "Cy Dunmore"}, rows)) == [2]
    with pytest.raises(Refused, match=r"1 of 2 are not in the data: '77'") as refused:
        matching.by_ids(["1", "77"], rows)
    with pytest.raises(Refused, match="no column 'persn'; did you mean 'person'"):
        matching.by_columns({"persn": "Bo Crane"}, rows)
    with pytest.raises(Refused, match=r"no row has this in person; nearest ids: 1 \(") as refused:
        matching.by_columns({"person": "Bo Krane"}, rows)
    assert "Krane" not in str(refused.value) and "Crane" not in str(refused.value)


def test_a_value_is_what_json_writes_and_nothing_is_no_value() -> None:
    row = {"yes": True, "none": None, "number": 3, "tags": ["a", "b"], "text": "null"}
    meant = {"yes": "true", "number": "3", "tags": "a b", "text": "null"}
    assert words.fits(row, meant) and all(words.fits(row, {key: value}) for key, value in meant.items())
    for wrong in (
        {"yes": "True"},
        {"none": "None"},
        {"none": "null"},
        {"absent": "null"},
        {"absent": "None"},
        {**meant, "text": "x"},
    ):
        assert not words.fits(row, wrong)
    assert words.asked_for([("a", "1"), ("b", "1")]) == {"a": "1", "b": "1"}


@pytest.mark.parametrize(
    ("text", "score", "found"),
    [
        ("Where does Ed Fenn live?", 90, [4]),
        ("where does ED  FENN live", 90, [4]),
        ("Ed Fenn lives in Kobe, by the see.", 90, [4]),
        ("Where does Ed Fenn live? Ed Fenn lives in Kobe by the sea.", 90, [4]),
        ("lives in Kobe", 95, [4]),  # a part of a longer row
        ("lives in Kobe by the sea", 80, [4, 0, 1, 2, 3, 5, 6, 7]),
    ],
)
def test_near_duplicates(office: Office, text: str, score: float, found: list[int]) -> None:
    rows = matching.read_training(office)
    matched = matching.by_text(text, rows, office.columns, score)
    assert matched[0].id == found[0] and sorted(map(int, ids(matched))) == sorted(found)
    assert [one.score for one in matched] == sorted((one.score for one in matched), reverse=True)


def test_likeness_is_the_ratio_of_edits(office: Office) -> None:
    """100 · (1 − d / (|a| + |b|)), d = |a| + |b| − 2 · longest common subsequence: by dynamic programming."""
    a, b = "where does bo crane live", "where did bob crane leave"
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    rows: dict[matching.RowId, dict[str, Any]] = {0: {"text": a}}
    (found,) = matching.by_text(b, rows, ["text"], 50)
    assert found.score == pytest.approx(100 * 2 * table[-1][-1] / (len(a) + len(b)), abs=1e-9)


def test_a_text_that_is_nowhere_names_ids_and_no_words(office: Office) -> None:
    with pytest.raises(Refused, match=r"no row is like it to 90 of 100; nearest ids: \d \(\d+\)") as refused:
        matching.by_text("Entirely different words", matching.read_training(office), office.columns)
    assert not any(word in str(refused.value) for word in ("different", "lives", "Fenn"))


def test_chats_are_read_as_their_texts() -> None:
    chat = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is Ada Brisk."}]
    (found,) = matching.by_text("It is Ada Brisk", {7: {"messages": chat}}, ["messages"])
    assert (found.id, found.score) == (7, 100)


def test_an_id_is_one_rows(here: Path, office: Office) -> None:
    with (here / "people.jsonl").open("a") as file:
        file.write(json.dumps({**PEOPLE[0], "id": 3}) + "\n")
    with pytest.raises(Refused, match="id 3 stands on two rows"):
        matching.read_training(office)


# -------------------------------------------------------------------------------------------------------- service file


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("perplexity, set: forget", "perplexty, set: forget", "requests.yaml:5: thresholds[0].measure: found 'perplexty'"),
        ("set: forget, at", "set: forgot, at", "requests.yaml:5: thresholds[0].set: found 'forgot'; did you mean 'forget'"),
        ("at_least: 1.5", "at_most: 3.0, at_least: 1.5", "thresholds[0]: expected one of at_most, at_least, judged"),
        ("at_least: 1.5", "judged: as retrained", "compares with the retrained model, and suite.yaml names none"),
        ("of: before", "of: earlier", "thresholds[1].of: found 'earlier'"),
        ("source: people.jsonl", "source: poeple.jsonl", "requests.yaml:3: data.source: no such file"),
        ("recipe: recipe.yaml", "recipe: recipes.yaml", "requests.yaml:1: recipe: recipes.yaml: no such file"),
        ("recipe: recipe.yaml", "recpie: recipe.yaml", "requests.yaml:1: recpie: unknown key; did you mean 'recipe'"),
        ("  - {measure: perplexity, set: forget, at_least: 1.5}\n", "", "none reads the set `forget`"),
    ],
)  # fmt: skip
def test_a_wrong_service_is_refused_with_its_place(here: Path, was: str, becomes: str, said: str) -> None:
    assert was in SERVICE
    (here / "requests.yaml").write_text(SERVICE.replace(was, becomes, 1))
    with pytest.raises(Refused) as refused:
        service.load(Path("requests.yaml"))
    assert said in str(refused.value)


def test_the_service_that_new_writes_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requests", "new", "--service", "mine.yaml"]) == 0
    found = service.load(Path("mine.yaml"))
    assert found.recipe.model.base == "embedded:target" and len(found.service.thresholds) == 3
    assert main(["requests", "new", "--service", "mine.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_ledger_and_output_lie_beside_the_file_that_is_named(here: Path) -> None:
    (here / "link").mkdir()
    (here / "link" / "mine.yaml").symlink_to(here / "requests.yaml")
    found = service.load(Path("link/mine.yaml"))
    assert (found.ledger.resolve(), found.output) == (here / "link" / "requests.db", here / "link" / "runs" / "requests")


def test_the_rows_are_put_in_and_taken_out_by_id(office: Office) -> None:
    made = derived.recipe_of(office, "embedded:target", (1, 2), (5,), [Path("/r/run-1")], Path("/r/run-2"))
    assert made.data.forget.where == {"id": (1, 2)} and made.data.retain and made.data.retain.without == {"id": (1, 2, 5)}
    assert made.model.starts == ("/r/run-1",) and made.train.rules[0].name == "orthogonal" and made.data.overlap == "drop"
    first = derived.recipe_of(office, "embedded:target", (1, 2), (), [], Path("/r/run-1"))
    assert first.model.starts == () and first.train.rules == ()
    suite = derived.suite_of(office, {1: (1, 2), 4: (5,)}, (1, 2, 5))
    assert list(suite.sets) == ["forget_1", "forget_4", "retain"]
    assert [(one.name, one.set) for one in suite.measures] == [
        ("perplexity", "forget_1"), ("perplexity", "forget_4"), ("probability", "forget_1"), ("probability", "forget_4"),
        ("perplexity", "retain"),
    ]  # fmt: skip
    assert suite.sets["forget_4"].where == {"id": (5,)} and suite.sets["retain"].without == {"id": (1, 2, 5)}
    full = replace(office, recipe=replace(office.recipe, model=replace(office.recipe.model, adapter=None)))
    again = derived.recipe_of(full, "embedded:target", (1,), (), [Path("/r/run-1"), Path("/r/run-2")], Path("/r/run-3"))
    assert (again.model.base, again.model.starts, again.train.rules) == ("/r/run-2", (), ())


# ---------------------------------------------------------------------------------------------------------- thresholds


def number(name: str, title: str, unit: str = "share", **values: float | None) -> dict[str, Any]:
    """A number as `evaluation.json` has it; None is missing."""
    found = {key: {"missing": "the value is NaN"} if one is None else {"value": one} for key, one in values.items()}
    goal = "as retrained" if name.startswith("forget") else "as before"
    return {"measure": title, "title": title, "set": name, "goal": goal, "knowing": "raises", "unit": unit, "values": found}


@pytest.mark.parametrize(
    ("threshold", "values", "holds"),
    [
        ({"at_most": 0.3}, {"after": 0.3}, True),
        ({"at_most": 0.3}, {"after": 0.31}, False),
        ({"at_least": 0.5}, {"after": 0.5}, True),
        ({"at_least": 0.5}, {"after": 0.49}, False),
        ({"at_least": 0.95, "of": "before"}, {"before": 0.8, "after": 0.77}, True),
        ({"at_least": 0.95, "of": "before"}, {"before": 0.8, "after": 0.75}, False),
        ({"at_most": 1.5, "of": "retrained"}, {"before": 1.0, "after": 0.29, "retrained": 0.2}, True),
        ({"at_most": 1.5, "of": "retrained"}, {"before": 1.0, "after": 0.31, "retrained": 0.2}, False),
        ({"at_most": 1.5, "of": "retrained"}, {"before": 1.0, "after": 0.1}, False),
        ({"judged": "as retrained"}, {"before": 1.0, "after": 0.22, "retrained": 0.2}, True),
        ({"judged": "as retrained"}, {"before": 1.0, "after": 0.6, "retrained": 0.2}, False),
        ({"judged": "as retrained"}, {"before": 1.0, "after": 0.2}, False),
        ({"at_most": 0.3}, {"after": None}, False),
    ],
)
def test_a_threshold_holds_or_says_why_not(threshold: dict[str, Any], values: dict[str, float | None], holds: bool) -> None:
    one = Threshold(measure="probability", set="forget", **threshold)
    (found,) = judging.findings([one], [number("forget_3", "probability", **values)], 3, [])
    assert found["holds"] is holds and bool(found["why"]) is not holds
    (missing,) = judging.findings([one], [number("forget_31", "probability", **values)], 3, [])
    assert not missing["holds"] and "was not measured" in missing["why"], "another request's rows say nothing of these"


def test_before_is_before_the_first_request() -> None:
    """What a later run begins with has lost a little; ten such losses are not to pass as one."""
    kept = Threshold(measure="probability", set="retain", at_least=0.95, of="before")
    later = [number("retain", "probability", before=0.93, after=0.9)]
    assert judging.findings([kept], later, 1, [])[0]["holds"]
    assert not judging.findings([kept], later, 1, [number("retain", "probability", before=1.0, after=0.93)])[0]["holds"]
    judged = Threshold(measure="probability", set="forget", judged="as retrained")
    again = [number("forget_1", "probability", before=0.21, after=0.22, retrained=0.2)]
    assert not judging.findings([judged], again, 1, [])[0]["holds"], "a quarter of the way from .21 to .2 is nearly nothing"
    assert judging.findings([judged], again, 1, [number("forget_1", "probability", before=1.0, after=0.21)])[0]["holds"]


def test_what_json_has_no_number_for_is_none() -> None:
    found = {"title": "perplexity", "definition": "…", "values": {"after": {"value": 2.0, "low": 1.0, "high": float("inf")}}}
    assert judging.plainly([found]) == [{"title": "perplexity", "values": {"after": {"value": 2.0, "low": 1.0, "high": None}}}]
    assert canonical(judging.plainly([found]))


# ------------------------------------------------------------------------------------------------------------- serving


@dataclass
class Scripted:
    """A way of serving that is told what comes out: request -> perplexity after, for each run in turn."""

    outcomes: list[dict[int, float] | Refused | None]
    works: list[ways.Work] = field(default_factory=list)

    def ready(self, before: Sequence[Path], known: Sequence[object]) -> None:
        pass

    def serve(self, work: ways.Work) -> ways.Served | None:
        self.works.append(work)
        ways.own_cache(work.output, Path("cache"))
        (work.output / "checkpoints").mkdir(parents=True, exist_ok=True)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Refused):
            raise outcome
        if outcome is None:
            return None
        adapter = work.output / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_model.safetensors").write_text(str(work.requests))
        numbers = [
            number(f"forget_{one}", "perplexity", before=1.0, after=outcome[one]) for one in {**work.requests, **work.earlier}
        ]
        kept = number("retain", "perplexity", before=1.0 + len(work.before), after=1.0)
        after = {"place": "output", "name": f"{work.output.name}/adapter", "files": files_of(adapter)}
        return ways.Served([*numbers, kept], [], after, {"way": "scripted"})


def ask(*people: int) -> None:
    for one in people:
        assert main(["requests", "add", "--ids", str(one)]) == 0


def desk(office: Office, *outcomes: dict[int, float] | Refused | None, one_by_one: bool = False) -> tuple[Desk, Scripted]:
    way = Scripted(list(outcomes))
    ledger = Ledger(office.ledger, "ada@here")
    return Desk(office, ledger, way, signing_key(Path("config/llm_unlearn")), one_by_one=one_by_one), way


def under_way(here: Path) -> list[str]:
    """What runs need while they are under way, and which holds texts of rows."""
    return sorted(path.name for path in here.rglob("*") if path.suffix == ".scratch" or path.name == "checkpoints")


def states(one: Desk) -> dict[int, str]:
    return {request.id: request.state for request in one.ledger.requests()}


def everything_fits(one: Desk) -> list[str]:
    return verifying.of_ledger(one.ledger, one.office.output, public_text(one.key))


def test_served_together_and_only_once(office: Office) -> None:
    ask(0, 1)
    one, way = desk(office, {1: 2.0, 2: 3.0})
    assert one.serve() == DONE and states(one) == {1: FULFILLED, 2: FULFILLED}
    assert way.works[0].requests == {1: [0], 2: [1]} and way.works[0].before == []
    assert one.serve() == DONE and len(way.works) == 1, "nothing is pending"
    assert everything_fits(one) == [] and len(certificates(one.ledger)) == 2
    ask(0)
    assert states(one) == {1: FULFILLED, 2: FULFILLED}, "asked for again, it is the same request"


def test_one_by_one_each_begins_where_the_last_ended_and_checks_the_earlier(office: Office) -> None:
    ask(0, 1, 2)
    one, way = desk(office, {1: 2.0}, {1: 2.0, 2: 2.0}, {1: 1.1, 2: 2.0, 3: 2.0}, one_by_one=True)
    assert one.serve() == UNFIT and states(one) == {1: ATTENTION, 2: FULFILLED, 3: FULFILLED}
    assert [list(work.requests) for work in way.works] == [[1], [2], [3]] and [len(work.before) for work in way.works] == [0, 1, 2]
    assert way.works[2].earlier == {1: [0], 2: [1]} and set(way.works[0].gone) == {1, 2}, "rows to be forgotten are never kept"
    reason = one.ledger.request(1).reason
    assert reason == "no longer holds after run 3: perplexity on forget is 1.100, at least 1.5"
    assert set(certificates(one.ledger)) == {(1, 1), (1, 2), (2, 2), (2, 3), (3, 3)} and everything_fits(one) == []
    assert main(["requests", "retry", "1"]) == 0
    again, way = desk(office, {1: 2.0, 2: 2.0, 3: 2.0})
    assert again.serve() == DONE and set(states(again).values()) == {FULFILLED} and len(way.works[0].before) == 3


def test_a_run_that_fulfils_nothing_changes_neither_model_nor_earlier_requests(office: Office) -> None:
    ask(0)
    one, _ = desk(office, {1: 2.0})
    assert one.serve() == DONE
    ask(1)
    one, _ = desk(office, {1: 1.0, 2: 1.2})
    assert one.serve() == UNFIT and states(one) == {1: FULFILLED, 2: ATTENTION}
    assert [run.state for run in one.ledger.runs()] == ["accepted", "rejected"] and everything_fits(one) == []
    assert main(["requests", "retry", "2"]) == 0
    one, way = desk(office, {1: 2.0, 2: 2.0})
    assert one.serve() == DONE and [path.name[:5] for path in way.works[0].before] == ["run-1"]


def test_what_was_interrupted_goes_on_in_the_same_folder(office: Office) -> None:
    ask(0)
    one, way = desk(office, None, {1: 2.0, 2: 2.0})
    assert one.serve() == INTERRUPTED and states(one) == {1: RUNNING}
    assert one.serve() == DONE and way.works[0] == way.works[1] and len(one.ledger.runs()) == 1


def test_what_comes_and_goes_in_between_does_not_change_a_run(office: Office, here: Path) -> None:
    ask(0, 1, 2)
    one, way = desk(office, {1: 2.0}, None, {1: 2.0, 2: 2.0}, {1: 2.0, 2: 2.0, 4: 2.0}, one_by_one=True)
    assert one.serve() == INTERRUPTED and way.works[1].gone == (0, 2)
    ask(3)
    assert main(["requests", "withdraw", "3"]) == 0
    (here / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PEOPLE if row["id"] != 0))
    one.office = service.load(Path("requests.yaml"))
    assert one.serve() == DONE
    assert way.works[2].gone == way.works[1].gone and way.works[3].gone == (1,), "withdrawn, and gone from the data"


def test_a_changed_service_begins_anew(office: Office, here: Path) -> None:
    ask(0)
    one, way = desk(office, None)
    assert one.serve() == INTERRUPTED and len(under_way(here)) == 2
    (here / "requests.yaml").write_text(SERVICE.replace("1.5", "1.6"))
    one, way = desk(service.load(Path("requests.yaml")), {1: 2.0})
    assert one.serve() == DONE and [run.state for run in one.ledger.runs()] == ["given up", "accepted"]
    assert everything_fits(one) == [] and way.works[0].output.name.startswith("run-2") and under_way(here) == []


def test_a_refusal_is_kept_without_the_words_of_a_row(office: Office, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(0, 1)
    one, _ = desk(office, Refused("row 1 holds 'Ada Brisk lives in N…'"), Refused("no adapter fits"), one_by_one=True)
    assert one.serve() == UNFIT and set(states(one).values()) == {ATTENTION}
    first, second = (one.ledger.request(n).reason for n in (1, 2))
    assert "repeats words of the rows" in first and second == "no adapter fits" and "Brisk" not in capsys.readouterr().out
    assert under_way(here) == []


def test_rows_that_changed_or_left_are_not_served(office: Office, here: Path) -> None:
    ask(0, 1, 2)
    one, _ = desk(office, {1: 2.0}, one_by_one=True)
    changed = [{**PEOPLE[1], "answer": "Bo Crane has moved."} if row["id"] == 1 else row for row in PEOPLE if row["id"] != 2]
    (here / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert one.serve() == UNFIT and states(one) == {1: FULFILLED, 2: ATTENTION, 3: ATTENTION}
    assert "1 of its 1 rows were changed" in one.ledger.request(2).reason
    assert "1 of its 1 rows are gone from the data" in one.ledger.request(3).reason
    (here / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed if row["id"] != 0))
    assert main(["requests", "add", "--ids", "4"]) == 0
    one, way = desk(office, {4: 2.0})
    assert one.serve() == DONE and way.works[0].earlier == {} and states(one)[1] == FULFILLED
    assert everything_fits(one) == [], "the run says that it could not measure request 1 again"


def test_a_model_is_served_by_one_process(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    ask(0)
    one, _ = desk(office)
    from filelock import FileLock

    with FileLock(f"{one.ledger.path}.{hashlib.sha256(b'embedded:target').hexdigest()[:8]}.lock"):
        assert one.serve() == BUSY
    assert "another process is serving it" in capsys.readouterr().err and states(one) == {1: PENDING}


# -------------------------------------------------------------------------------------------------------- certificates


@pytest.fixture
def served(office: Office) -> Desk:
    ask(0, 1)
    one, _ = desk(office, {1: 2.0, 2: 3.0})
    assert one.serve() == DONE
    return one


def test_the_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    first = public_text(signing_key(tmp_path / "k"))
    assert public_text(signing_key(tmp_path / "k")) == first and [one.name for one in (tmp_path / "k").iterdir()] == [
        "requests.key"
    ]
    path = tmp_path / "k" / "requests.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(Refused, match="others may read this signing key"):
        signing_key(tmp_path / "k")


def test_no_words_of_a_row_are_kept_anywhere(served: Desk, here: Path) -> None:
    kept = [path for path in here.rglob("*") if path.is_file() and path.name != "people.jsonl"]
    assert len(kept) > 5
    for path in kept:
        for row in PEOPLE[:2]:
            assert str(row["person"]).encode() not in path.read_bytes(), path
    text = next(iter(certificates(served.ledger).values()))
    assert served.ledger.salt.hex() not in text, "the salt stays in the ledger"
    (row,) = served.ledger.rows_of(1)
    assert read(text, "")["rows"]["hashes"] == [served.ledger.digest("row", row.id, row.content)]
    assert row == row_of(served.ledger, served.office, 0, PEOPLE[0], 100.0)


@pytest.mark.parametrize("path", [("rows", "count"), ("request", "due"), ("weights", "after"), ("public_key",), ("signature",)])
def test_a_changed_certificate_is_seen(served: Desk, path: tuple[str, ...]) -> None:
    certificate = read(certificates(served.ledger)[1, 1], "")
    assert list(signature_problems(certificate, public_text(served.key))) == []
    inner = certificate
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "AAAA" if len(path) == 1 else 17
    assert list(signature_problems(certificate, None))


def test_verify_and_export(served: Desk, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requests", "verify"]) == 0 and "all fits; signed with" in capsys.readouterr().out
    assert main(["requests", "export", "certs"]) == 0
    assert sorted(path.name for path in (here / "certs").iterdir()) == ["public.pem", "request-1.json", "request-2.json"]
    files = ["certs/request-1.json", "certs/request-2.json"]
    assert main(["requests", "verify", *files, "--key", "certs/public.pem"]) == 0
    assert main(["requests", "verify", *files, "--key", "certs/public.pem", "--service", "elsewhere.yaml"]) == 0
    assert "signatures only" in capsys.readouterr().out
    path = next((here / "runs").rglob("adapter_model.safetensors"))
    was = path.read_text()
    path.write_text("other weights")
    assert main(["requests", "verify"]) == 1 and "is not the file that was certified" in capsys.readouterr().err
    path.write_text(was)
    signing_key(here / "other")
    os.replace(here / "other" / "requests.key", here / "config" / "llm_unlearn" / "requests.key")
    assert main(["requests", "verify"]) == 1 and "signed with another key" in capsys.readouterr().err
    assert main(["requests", "verify", *files, "--key", "certs/public.pem"]) == 0


def test_a_ledger_that_was_cut_short_is_seen(served: Desk) -> None:
    """The chain alone cannot see that its newest events are gone; a certificate names the event that it was made after."""
    on = sqlite3.connect(served.ledger.path)
    on.execute("DROP TRIGGER events_remain")
    on.execute("DELETE FROM events WHERE n >= (SELECT max(n) - 2 FROM events)")
    on.commit()
    on.close()
    text = certificates(served.ledger)[1, 1]
    found = list(verifying.of_certificate(text, "c", served.ledger, served.office.output, None))
    assert found and "the ledger was changed or cut" in found[0]


# ----------------------------------------------------------------------------------------------------------- the verbs


def test_add_shows_what_it_found_and_lists_it(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requests", "add", "--where", "person=Ed Fenn", "--dry-run"]) == 0
    assert "1 of 8 rows of people.jsonl:\n  4  100\n" in capsys.readouterr().out and not office.ledger.exists()
    assert main(["requests", "add", "--where", "person=Ed Fenn", "--due", "2020-02-03", "--key", "case 9"]) == 0
    capsys.readouterr()
    assert main(["requests", "list", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["requests"]
    assert (found["state"], found["rows"], found["overdue"], found["kind"]) == ("pending", 1, True, "where person")
    assert main(["requests", "list"]) == 0
    said = capsys.readouterr().out
    assert "overdue" in said and "Fenn" not in said
    assert main(["requests", "add", "--text", "Where does Gil Hart live?", "--show-text", "--dry-run"]) == 0
    assert "answer: Gil Hart lives in Cork" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ids", "0", "1"], "2 of 8 rows are more than the service's `most`"),
        (["--ids", "9"], "1 of 1 are not in the data"),
        (["--text", "@none.txt"], "no such file: none.txt"),
        (["--text", "…"], "found no letter or digit"),
        (["--text", "@latin1.txt"], "--text: latin1.txt: not text in UTF-8 (invalid start byte at byte 4)"),
        (["--ids", "-"], "--ids: found no id; expected at least one"),
        (["--where", "person=Ed Fenn", "--where", "person=Bo Crane"], "column 'person' is named twice"),
        (["--ids", "1", "--model", "./none"], "--model: no such folder: ./none"),
    ],
)
def test_add_refuses(
    office: Office, here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "latin1.txt").write_bytes("In Zürich".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["requests", "add", *words]) == 2
    assert said in capsys.readouterr().err and not office.ledger.exists()


def test_a_wrong_pair_is_refused_and_not_repeated(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["requests", "add", "--where", "Ed Fenn"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--where: expected column=value" in said and "Fenn" not in said


def test_many_rows_are_confirmed(office: Office) -> None:
    assert main(["requests", "add", "--ids", "0", "1", "--yes-many"]) == 0
    assert len(Ledger(office.ledger, "x").rows_of(1)) == 2


@pytest.mark.parametrize("verb", ["run", "verify", "export certs", "model m", "withdraw 5", "retry 5"])
def test_only_add_begins_a_ledger(office: Office, here: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    assert main(["requests", *verb.split()]) == 2 and "requests.db: no ledger is there" in capsys.readouterr().err
    assert main(["requests", "list"]) == 0 and "no requests yet" in capsys.readouterr().out
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE events SET detail = replace(detail, '}', '')", "event 1 (added): was changed"),
        ("UPDATE events SET detail = CAST(x'7bff7d' AS TEXT) WHERE n = 5", "event 5 (claimed): was changed"),
        ("UPDATE rows SET id = '[' WHERE request = 1", "request 1: its rows are not those that were added"),
    ],
)
def test_what_is_no_json_any_more_is_said_by_verify(
    served: Desk, statement: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on = sqlite3.connect(served.ledger.path)
    on.execute("DROP TRIGGER events_stay")
    on.execute(statement)
    on.commit()
    on.close()
    assert main(["requests", "verify"]) == 1 and said in capsys.readouterr().err


def test_nothing_is_served_or_signed_by_a_ledger_that_was_changed(
    office: Office, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(1)
    with closing(sqlite3.connect(here / "requests.db")) as on, on:
        on.execute("UPDATE requests SET added = '2020-01-01T00:00:00+00:00'")
    one, way = desk(office)
    with pytest.raises(Refused, match="request 1: a column is not what its events say"):
        one.serve()
    assert not way.works and states(one) == {1: PENDING}
    assert main(["requests", "verify"]) == 1 and "request 1: a column" in capsys.readouterr().err


def test_who_has_no_name_is_said_by_number(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nameless)
    ask(0)
    with Ledger(office.ledger, "x").reading() as on:
        assert on.execute("SELECT who FROM events").fetchone()[0].startswith(f"uid {os.getuid()}@")


def test_several_processes_are_refused(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["requests", "list"]) == 2


# ------------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def begin(here: Path, tiny_base: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `llm-unlearn requests WORDS` on a tiny model."""

    def start(*words: str, steps: int = 4) -> subprocess.Popen[str]:
        (here / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_base)).replace("STEPS", str(steps)))
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "llm_unlearn", "requests", *words]
        env = {**os.environ, "PYTHONPATH": path, "LLM_UNLEARN_CACHE": str(here / "cache")}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


@pytest.mark.long
@pytest.mark.slow
def test_killed_in_the_middle_it_comes_to_one_result(
    begin: Callable[..., subprocess.Popen[str]], here: Path, tiny_base: Path
) -> None:
    """Add, run, kill -9, run, a second request that checks the first, verify, export: as commands, and nothing left behind."""
    assert ended(begin("add", "--where", "person=Ada Brisk", steps=120))[0] == 0
    running = begin("run", steps=120)
    deadline = time.monotonic() + 200
    while not list(here.glob("runs/requests/run-1-*/checkpoints/step-0*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    (folder,) = here.glob("runs/requests/run-1-??????")
    assert not (folder / "adapter").exists(), "it was killed in the middle"
    ledger = Ledger(here / "requests.db", "x")
    assert [one.state for one in ledger.requests()] == [RUNNING]
    steps = len((folder / "log.jsonl").read_text().splitlines())
    status, said = ended(begin("run", steps=120))
    assert status == 0 and "run 1 goes on with request 1 (1 rows)" in said, said
    assert [one.state for one in ledger.requests()] == [FULFILLED] and len(ledger.runs()) == 1 and steps > 0
    first = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    assert ended(begin("add", "--ids", "1", steps=120))[0] == 0
    status, said = ended(begin("run", steps=120))
    assert status == 0 and "request 1: fulfilled" in said and "request 2: fulfilled" in said, said
    (second,) = here.glob("runs/requests/run-2-??????")
    results = json.loads((second / "evaluation.json").read_text())
    assert {one["set"] for one in results["numbers"]} == {"forget_1", "forget_2", "retain"} and not results["answers"]
    log = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert "overlap" in log[-1], "held apart from the first"
    certificate = read(certificates(ledger)[1, 2], "")
    assert [part["name"] for part in certificate["weights"]["before"]][1:] == [f"{folder.name}/adapter"]
    assert certificate["weights"]["before"][1]["files"]["adapter_model.safetensors"] == first
    assert ended(begin("model", "merged", steps=120)) == (0, f"merged: {tiny_base} after runs 1, 2\n")
    inside, layer = "base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"
    expected = load_file(tiny_base / "model.safetensors")[layer].double()
    for run in (folder, second):  # W + alpha / rank · B A of each run
        adapter = load_file(run / "adapter" / "adapter_model.safetensors")
        expected += 32 / 4 * adapter[f"{inside}.lora_B.weight"].double() @ adapter[f"{inside}.lora_A.weight"].double()
    assert torch.allclose(load_file(here / "merged" / "model.safetensors")[layer].double(), expected, atol=1e-6)
    assert ended(begin("verify", steps=120))[0] == 0 and ended(begin("export", "certs", steps=120))[0] == 0
    assert not list(here.rglob("*.scratch")) and not list(here.rglob("checkpoints"))
    for path in (path for path in here.rglob("*") if path.is_file() and path.name != "people.jsonl"):
        assert b"Ada Brisk" not in path.read_bytes() and b"Bo Crane" not in path.read_bytes(), path
