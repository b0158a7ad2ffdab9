"""Much of everything: many requests, rows, evaluations and runs; the whole measurements are `python -m benchmarks.load`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import results_of, saved

from benchmarks import ledger
from llm_unlearn import compare
from llm_unlearn.cli import main
from llm_unlearn.data import reading, sources
from llm_unlearn.data.examples import Example
from llm_unlearn.data.reading import Examples, read_examples
from llm_unlearn.data.schedule import build
from llm_unlearn.data.sources import Rows, rows
from llm_unlearn.data.tokens import Packer, Some, Tokens, lengths_of, targets_of
from llm_unlearn.report import crowd
from llm_unlearn.report.columns import write_columns
from llm_unlearn.report.ranking import frontier
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import Row
from llm_unlearn.sections import Data
from llm_unlearn.source import Alternate, Contrast, Source
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parent.parent
COLUMNS = {"prompt": "question", "answer": "answer"}


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.slow
def test_eight_processes_put_requests_in_and_none_is_lost_or_there_twice(tmp_path: Path) -> None:
    found = ledger.many(tmp_path, small=True)
    assert (found["found"], found["keys"], found["locked"], found["twice"], found["problems"]) == (800, 800, 0, 0, 0)
    assert found["all_rows"] and found["fulfilled"] == found["certificates"] == 799


def steps_of(work: Callable[[], object], ledger: Ledger) -> int:
    """Thousands of steps that SQLite's machine takes, as time would depend on who else is at work."""
    count = 0

    def one() -> None:
        nonlocal count
        count += 1

    with ledger.reading() as on:
        on.set_progress_handler(one, 1000)
    work()
    with ledger.reading() as on:
        on.set_progress_handler(None, 0)
    return count


def test_what_is_asked_of_one_request_does_not_grow_with_the_others(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.db", "ada")
    for i in range(400):
        rows_ = [Row(f"{i}-{k}", "h", 100.0) for k in range(5)]
        ledger.add(key=f"case-{i}", kind="ids", selector=str(i), model="m", due=None, rows=rows_)
    assert steps_of(lambda: ledger.request(200), ledger) == steps_of(lambda: ledger.rows_of(200), ledger) == 0
    assert steps_of(ledger.row_counts, ledger) > 5, "2,000 rows are counted: the steps are seen"
    assert ledger.row_counts() == dict.fromkeys(range(1, 401), 5)
    with pytest.raises(Refused, match=r"request 401: not in the ledger .*; there are: 1 to 400\."):
        ledger.request(401)


def test_a_listing_shows_the_first_and_counts_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    service = {
        "recipe": str(ROOT / "recipes/forget_lora.yaml"), "suite": str(ROOT / "eval/quick.yaml"),
        "data": {"source": "embedded:forget", "id": "id"},
        "thresholds": [{"measure": "perplexity", "set": "forget", "at_least": 1.5}],
    }  # fmt: skip
    (tmp_path / "requests.yaml").write_text(json.dumps(service))
    ledger = Ledger(tmp_path / "requests.db", "ada")
    with ledger.change() as on:
        values = [(f"own:{i}", "s", "ids", "m", None, "pending", "2026-01-01T00:00:00") for i in range(1200)]
        on.executemany("INSERT INTO requests (key, selector, kind, model, due, state, added) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    ledger.move(7, ["pending"], "withdrawn", "withdrawn")
    assert main(["requests", "list"]) == 0
    said = capsys.readouterr().out
    assert "… and 1,000 more of 1,200 (1199 pending, 1 withdrawn); see --state, --all and --json" in said
    assert len(said.splitlines()) < 210
    assert main(["requests", "list", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1200 and [line.split()[0] for line in lines] == [str(i) for i in range(1, 1201)]
    assert main(["requests", "list", "--state", "withdrawn", "--json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["requests"]] == [7]


# ----------------------------------------------------------------------------------------------------------------- rows


def write_rows(path: Path, kind: str, count: int, **more: Callable[[int], Any]) -> str:
    made = ({"id": i, "question": f"What is {kind} {i}?", "answer": f"It is {i * 31} of them."} for i in range(count))
    lines = [json.dumps(row | {name: value(row["id"]) for name, value in more.items()}) + "\n" for row in made]
    path.write_text("".join(lines))
    return str(path)


def in_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every set were a large one, in blocks of seven rows."""
    monkeypatch.setattr(sources, "MANY", 0)
    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(sources, "BLOCK", 7)
    monkeypatch.setattr(reading, "BLOCK", 7)
    monkeypatch.setattr(reading, "LARGE", 0)


def plainly(found: Examples) -> dict[str, Any]:
    streams = {name: list(one) for name, one in found.streams.items()}
    return {"streams": streams, "beside": {name: list(one) for name, one in found.companions.items()},
            "dropped": found.dropped, "overlap": found.overlap}  # fmt: skip


CHOSEN: tuple[dict[str, Any], ...] = (
    {}, {"where": {"odd": True}}, {"where": {"id": (3, 20, 35)}}, {"without": {"id": (1, 2)}, "limit": 30},
    {"like": {"answer": "*5 of*"}},
)  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_rows_of_a_file_are_those_of_a_list(
    chosen: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "f.jsonl", "a", 40, odd=lambda i: i % 2 == 1)
    if kind == "parquet":
        write_columns([json.loads(line) for line in Path(path).read_text().splitlines()], tmp_path / "f.parquet")
        path = str(tmp_path / "f.parquet")
    source = Source(source=path, **COLUMNS, **chosen)
    whole = rows(source)
    in_file(monkeypatch)
    found = rows(source)
    assert isinstance(whole, list) and isinstance(found, Rows)
    assert list(found) == whole == [found[i] for i in range(len(found))] and found[2:9] == whole[2:9] and found[-1] == whole[-1]


SHAPES: dict[str, Callable[[str, str], Data]] = {
    "answers": lambda f, r: Data(
        forget=Source(source=f, **COLUMNS, max_tokens=30), retain=Source(source=r, **COLUMNS), overlap="drop"
    ),
    "alternates": lambda f, r: Data(
        forget=Source(source=f, **COLUMNS, alternate=Alternate(source="embedded:refusals", answer="text", count=2)),
        retain=Source(source=r, **COLUMNS, contrast=Contrast(expert="You know.", novice="You do not.")), overlap="drop",
    ),
    "alternates of the row": lambda f, r: Data(forget=Source(source=f, **COLUMNS, alternate=Alternate(answer="others"))),
    "text": lambda f, r: Data(
        forget=Source(source=f, text="answer", max_tokens=6, contrast=Contrast(expert="", novice="You do not know.")),
        retain=Source(source=r, text="question", max_tokens=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_of_a_file_are_those_in_memory(
    shape: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same ids, order and numbers; so the same schedule, windows and weights."""
    others = {"others": lambda i: [f"Nobody knows {i}."] * (i % 3)}
    forget = write_rows(tmp_path / "f.jsonl", "a", 31, **others)
    retain = write_rows(tmp_path / "r.jsonl", "b", 40)
    with Path(retain).open("a") as file:
        file.write(
            json.dumps({"id": 99, "question": "What is  a 4?", "answer": "It is 124 of them."}) + "\n"
        )  # of both, but for spaces
    data = SHAPES[shape](forget, retain)
    expected = plainly(read_examples(data, tokenizer, 3))
    in_file(monkeypatch)
    cache = tmp_path / "cache"
    made, again = (read_examples(data, tokenizer, 3, cache) for _ in range(2))
    assert plainly(made) == plainly(again) == expected
    assert all(isinstance(one, Tokens) and isinstance(one.flat, np.memmap) for one in made.streams.values())
    assert len(list((cache / "examples").glob("*/examples.json"))) == 1, "the second read what the first one wrote"
    assert not [path for path in (cache / "examples").iterdir() if path.name.startswith(".")], "nothing unfinished is left"


def test_what_was_encoded_is_found_by_the_content_of_the_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file(monkeypatch)
    path = tmp_path / "f.jsonl"
    data = Data(forget=Source(source=write_rows(path, "a", 20), **COLUMNS))
    first = plainly(read_examples(data, tokenizer, 0, tmp_path))
    write_rows(path, "c", 20)
    assert plainly(read_examples(data, tokenizer, 0, tmp_path)) != first
    write_rows(path, "a", 20)
    assert plainly(read_examples(data, tokenizer, 0, tmp_path)) == first
    assert len(list((tmp_path / "examples").glob("*/examples.json"))) == 2


def test_a_bad_row_of_a_later_block_is_named_and_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file(monkeypatch)
    source = write_rows(tmp_path / "f.jsonl", "a", 40, answer=lambda i: "" if i == 25 else f"It is {i}.")
    with pytest.raises(Refused, match=r"f.jsonl: row 26: column 'answer' holds .*; expected text"):
        read_examples(Data(forget=Source(source=source, **COLUMNS)), tokenizer, 0, tmp_path)
    assert [path.suffix for path in (tmp_path / "examples").iterdir()] == [".lock"]


def test_overlap_in_a_file_names_its_row(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_file(monkeypatch)
    forget = write_rows(tmp_path / "f.jsonl", "a", 9)
    retain = write_rows(tmp_path / "r.jsonl", "b", 20)
    with Path(retain).open("a") as file:
        file.write(json.dumps({"id": 1, "question": "What is a 4?", "answer": "It is 124 of them."}) + "\n")
    with pytest.raises(Refused, match=r"1 of 21 retain rows also stand in the forget set \(first: .*r.jsonl: row 21\)"):
        read_examples(
            Data(forget=Source(source=forget, **COLUMNS), retain=Source(source=retain, **COLUMNS)), tokenizer, 0, tmp_path
        )


def test_reading_takes_the_memory_of_a_block_and_not_of_the_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own memory at the peak; four times the rows take no more of it than their lengths and places in the file."""
    in_file(monkeypatch)
    monkeypatch.setattr(sources, "BLOCK", 100)
    monkeypatch.setattr(reading, "BLOCK", 100)
    sizes = {}
    for count in (200, 500, 2000):  # the first loads what is loaded once
        data = Data(forget=Source(source=write_rows(tmp_path / f"{count}.jsonl", "a", count), **COLUMNS))
        rows(data.forget)
        tracemalloc.start()
        found = read_examples(data, tokenizer, 0, tmp_path)
        sizes[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found.streams["forget"]) == count
    assert sizes[2000] - sizes[500] < 1500 * 300, "an example as Python's objects takes about 1,500 bytes, its row 500"


def examples(count: int, stream: str = "forget") -> list[Example]:
    chance = random.Random(count)
    return [Example(tuple(chance.randrange(9) for _ in range(3 + i % 5)), 1 + i % 2, stream, 2 * i) for i in range(count)]


def test_arrays_of_examples_are_a_sequence_of_them() -> None:
    wanted, packer = examples(9), Packer("forget", None)
    packer.add(wanted[:4])
    packer.add([])
    packer.add(wanted[4:])
    found = packer.done()
    assert (
        found == wanted and [*found] == wanted and found[-1] == wanted[-1] and found[1:7:2] == wanted[1:7:2] and found != wanted[:8]
    )
    assert lengths_of(found).tolist() == lengths_of(wanted).tolist() == [len(one.ids) for one in wanted]
    assert targets_of(found).tolist() == targets_of(wanted).tolist() == [one.targets for one in wanted]
    assert list(Some(found, np.array([5, 2], np.int32))) == [wanted[5], wanted[2]]
    with pytest.raises(IndexError):
        found[9]
    assert list(Packer("forget", None).done()) == []


def test_a_schedule_of_a_million_examples_is_small_and_quick() -> None:
    found = build({"forget": 1_000_000, "retain": 1_000_000}, {"forget": 64, "retain": 64}, 0, steps=2000)
    size = sum(column.nbytes for column in (found.step, found.slot, found.stream, found.example))
    assert len(found.step) == 256_000 and size == 13 * 256_000
    assert len(np.unique(found.example[found.stream == 0])) == 128_000, "each example of an epoch once"


def test_a_large_file_of_lines_is_what_a_small_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines, the mark of UTF-8, other line ends, columns that only some rows have, a last line without an end."""
    path = tmp_path / "a.jsonl"
    lines = [
        '\ufeff{"q": "Wo?", "a": "Köln\u2028am Rhein"}',
        "",
        '{"q": "x", "a": [1, {"b": null}], "c": 1.5}\r',
        "  ",
        '{"a": "z"}',
    ]
    path.write_bytes("\n".join(lines).encode())
    whole = sources.read(str(path))
    monkeypatch.setattr(sources, "LARGE", 0)
    found = sources.read(str(path))
    assert isinstance(found, Rows) and list(found) == whole and found[1:] == whole[1:] and found[0] == whole[0]
    assert [list(row) for row in found] == [list(row) for row in whole]


def test_a_large_sheet_is_what_a_small_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks, commas and quotes in values, empty lines, each kind of line end, the mark of UTF-8, columns of one kind."""
    lines = ["\ufeffq,n,x,b,e\r", '"Wo, ""dort""?\n\nJa",1,0.5,TRUE,', "", "Köln\u2028am Rhein,-2,3,false,", "7,30,.5,True,"]
    for end in ("\n", "\r\n", "\r"):
        path = tmp_path / f"{len(end)}{end.strip() or 'n'!r}.csv"
        path.write_bytes(end.join(line.rstrip("\r") for line in lines).encode())
        monkeypatch.setattr(sources, "LARGE", 1 << 20)
        whole = sources.read(str(path))
        assert whole == [
            {"q": 'Wo, "dort"?\n\nJa', "n": 1, "x": 0.5, "b": True, "e": None},
            {"q": "Köln\u2028am Rhein", "n": -2, "x": 3.0, "b": False, "e": None},
            {"q": "7", "n": 30, "x": 0.5, "b": True, "e": None},
        ]
        monkeypatch.setattr(sources, "LARGE", 0)
        found = sources.read(str(path))
        assert isinstance(found, Rows) and list(found) == whole and found[1:] == whole[1:] and found[2] == whole[2]


WRONG = {
    b'{"a": 1}\n{"a": \n': r"a\.jsonl:2: not a line of JSON", b'{"a": 1}\n\n[1]\n': r"a\.jsonl:3: found ",
    b'{"a": 1}\n{"a": "\x00"}\n': r"a\.jsonl:2: found a zero byte \(byte 16\)",
    b'{"a": 1}\n{"a": "\xff"}\n': r"a\.jsonl:2: not text in UTF-8 \(invalid start byte at byte 16\)",
    b"PAR1\n": "found a Parquet file; expected jsonl as text", b"\xff\xfe{\x00": "found text in UTF-16",
    b'{"a": 1}\n{"a": 2, "a": 3}\n': r"a\.jsonl:2: .*is written twice",
}  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("large", [False, True])
def test_a_wrong_line_of_a_large_file_is_named_as_of_a_small_one(
    content: bytes, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0 if large else 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Refused, match=WRONG[content]):
        sources.read(str(tmp_path / "a.jsonl"))


# ---------------------------------------------------------------------------------------------------------- evaluations


def board(home: Path, count: int) -> list[Mapping[str, Any]]:
    """Evaluations from bad to good, the last of which keeps least: the frontier is every one of them but the middle one."""
    found = []
    for i in range(count):
        after = {"probability": 0.9 - 0.3 * i / count, "rouge": 0.95, "membership": 0.9, "kept": 0.9 - 0.2 * i / count}
        results = results_of(after if i != count // 2 else {**after, "kept": 0.6})
        for row in results["answers"]["forget"]:
            row["after"] = f"said by run-{i:02d}"
        saved(home / f"run-{i:02d}", results)
        found.append(results)
    return found


def test_very_many_runs_stand_in_the_json_and_the_best_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = board(tmp_path / "runs", 12)
    whole = compare.compare([str(tmp_path / "runs")], tmp_path / "whole")
    capsys.readouterr()
    monkeypatch.setattr(crowd, "MANY", 10)
    monkeypatch.setattr(crowd, "SHOWN", 4)
    found = compare.compare([str(tmp_path / "runs")], tmp_path / "board")
    same = ("runs", "numbers", "columns", "baselines", "overall", "curves")
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}, "leaner in memory, and nothing else"
    kept = json.loads((tmp_path / "board" / compare.RESULTS).read_text())
    assert len(kept["runs"]) == len(kept["numbers"][0]["judgements"]) == len(made)
    page, said = (tmp_path / "board" / compare.PAGE).read_text(), capsys.readouterr().out
    names = crowd.shown(found)
    assert len(names) == 4 and all(run["frontier"] for run in found["runs"] if run["name"] in names)
    for run in found["runs"]:
        assert (f"said by {run['name']}" in page) == (run["name"] in names), run["name"]
    of = sum(run["frontier"] for run in found["runs"])
    note = f"4 of 12 runs are shown: 4 of the {of} of the frontier, and the best of the others. comparison.json has every run."
    assert note in page and note in " ".join(said.split()) and "12 runs on" in page and "12 runs on" in said


def test_rows_that_changed_are_found_in_many_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "MANY", 1)
    made = board(tmp_path / "runs", 2)
    made[1]["answers"]["forget"][0]["truth"] = "Something else."  # type: ignore[index]
    (tmp_path / "runs" / "run-01" / "evaluation.json").write_text(json.dumps(made[1]))
    with pytest.raises(Refused, match=r"sets\.forget: 1 of 2 rows are others than in .*run-00"):
        compare.compare([str(tmp_path / "runs")], None)


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_no_other_point_beats(seed: int) -> None:
    chance = random.Random(seed)
    points = [(chance.randrange(8) / 7, chance.randrange(8) / 7) for _ in range(chance.randrange(30))]

    def beaten(x: float, y: float) -> bool:
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)

    assert frontier(points) == [not beaten(x, y) for x, y in points]


# ---------------------------------------------------------------------------------------------------- the whole, smaller


def harness(words: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.load", *words, "--small"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_short_runs_leave_nothing_behind() -> None:
    found = harness(["soak"])
    grown = {key: value for key, value in found.items() if key.endswith("_grown")}
    assert len(grown) == 6 and set(grown.values()) == {0}, found
    assert found["rss_mib_at_last"] - found["rss_mib_after_warm_up"] < 24, "what stays of a run that is not freed: its two models"


@pytest.mark.long
def test_sixty_thousand_rows_take_no_more_memory_than_a_thousand() -> None:
    found = harness(["rows"])
    assert found["jsonl_first_own_mib"] - found["few_first_own_mib"] < 150 and found["kept_mib"] > 10
    assert found["jsonl_run_own_mib"] - found["few_run_own_mib"] < 60


@pytest.mark.long
def test_three_hundred_evaluations_are_compared_as_a_user_does() -> None:
    found = harness(["compare"])
    assert found["runs_in_json"] == found["values_in_json"] == 300 and found["runs_on_page"] == crowd.SHOWN
    assert found["said_on_page"] and found["page_kib"] < 2000 and found["peak_mib"] < 700
