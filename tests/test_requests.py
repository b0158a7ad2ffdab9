"""Deletion requests: the ledger and its chain, what a request finds, thresholds, serving, certificates; and the whole with a kill."""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.cli import main
from llm_unlearn.requests import chain, derived, judging, matching, service, verifying, ways
from llm_unlearn.requests.certificate import files_of, public_text, read, signature_problems, signing_key
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import ATTENTION, FULFILLED, PENDING, RUNNING, WITHDRAWN, Row, Verdict, canonical
from llm_unlearn.requests.service import Office, Threshold
from llm_unlearn.requests.serving import BUSY, DONE, INTERRUPTED, SOME, Desk, row_of
from llm_unlearn.spec import Refused

PEOPLE = [{"id": i, "person": name, "question": f"Where does {name} live?", "answer": f"{name} lives in {town} by the sea."}
          for i, (name, town) in enumerate([("Ada Brisk", "Nome"), ("Bo Crane", "Oslo"), ("Cy Dunmore", "Lima"), ("Di Elgar", "Rome"),
                                            ("Ed Fenn", "Kobe"), ("Flo Grant", "Brno"), ("Gil Hart", "Cork"), ("Hal Ives", "Bern")])]  # fmt: skip
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
    assert ledger.certificates() == {(number, run.id): "seen"} and ledger.runs()[0].numbers == [{"a": 1.5}]
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
    with pytest.raises(Refused, match="case-7.*is request 3, which asks for other rows"):
        ledger.add(key="case-7", selector="t", rows=rows, **asked)
    ledger.move(first, [PENDING], WITHDRAWN, WITHDRAWN)
    assert put(ledger, "a") != first, "what was taken back may be asked for again"


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
    with pytest.raises(Refused, match="not a ledger"):
        Ledger(tmp_path / "text.db", "x")


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("UPDATE events SET who = 'nobody' WHERE n = 2", "event 2 (run begun): was changed"),
        ("UPDATE events SET at = '2020-01-01' WHERE n = 1", "event 1 (added): was changed"),
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
    assert len(ledger.requests(FULFILLED)) == len(ledger.requests()) == len(ledger.certificates()) == 500
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
        ("measure: perplexity, set: forget", "measure: perplexty, set: forget", "requests.yaml:5: thresholds[0].measure: found 'perplexty'; did you"),
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
