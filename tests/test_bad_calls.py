"""Bad calls: verbs on folders and files that are broken. Each ends with a status of its own and one block of words, shows no
traceback, and leaves every byte as it was."""

import contextlib
import gc
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import WRONG, content, places, put, refusal, without

from llm_unlearn import compare, folder
from llm_unlearn.cli import main
from llm_unlearn.evaluation import kept
from llm_unlearn.requests import service
from llm_unlearn.spec import to_yaml
from llm_unlearn.tree import read_tree

ROOT = Path(__file__).parents[1]
RECIPE = (
    "output: runs/x\nmodel: {base: ./model}\ndata:\n  forget: {source: rows.jsonl, prompt: question, answer: answer}\n"
    "objective:\n  forget: {loss: {name: npo}}\n"
)
SUITE = "sets:\n  forget: {source: rows.jsonl, prompt: question, answer: answer}\nmeasures:\n- {name: perplexity, set: forget}\n"


BOMB = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(30))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its rows and its suite; without a network, a terminal, or anybody's configuration."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked something"))
    monkeypatch.delenv("RANK", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(work)
    (work / "r.yaml").write_text(RECIPE)
    (work / "s.yaml").write_text(SUITE)
    (work / "rows.jsonl").write_text('{"question": "Who?", "answer": "Ada.", "id": 1}\n' * 3)
    return work


def ends(capsys: pytest.CaptureFixture[str], *words: str, status: tuple[int, ...] = (2,)) -> str:
    """What a verb says that ends so; that it says it once, as one line or several, and changes nothing."""
    before = content(Path.cwd())
    found = main(list(words))
    out, err = capsys.readouterr()
    assert found in status, f"{words} ended with {found}: {err}"
    assert "Traceback" not in err + out and "bug: " not in err
    if found == 2:
        lines = err.splitlines()
        assert lines and all(line.startswith("error: ") and line.isprintable() and len(line) < 2600 for line in lines), err
        assert len(set(lines)) == len(lines), "nothing is said twice"
    assert content(Path.cwd()) == before, f"{words} changed what was there"
    return err


# ------------------------------------------------------------------------------------------------------ settings and rows

PUSH = ["push", "a", "--repo-id", "u/n", "--dry-run"]
EVALUATE = ["evaluate", "s.yaml", "--model"]
AUDIT = ["audit", "r.yaml", "model.base=embedded:target", "objective.forget.loss={name: nll}"]
TARGET = "model.base=embedded:target"
CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no recipe": ({}, ["run", "none.yaml"]),
    "a folder": ({}, ["run", "."]),
    "a binary recipe": ({"r.yaml": bytes(range(256))}, ["run", "r.yaml"]),
    "a bomb": ({"r.yaml": BOMB}, ["run", "r.yaml"]),
    "a tag": ({"r.yaml": b"output: !!python/object/apply:os.system ['touch pwned']\n"}, ["run", "r.yaml"]),
    "a circle": ({"r.yaml": b"extends: r.yaml\n"}, ["plan", "r.yaml"]),
    "a chain of 10,000": ({"r.yaml": b"- " * 10_000}, ["plan", "r.yaml"]),
    "a wrong word": ({}, ["run", "r.yaml", "train.lr=fast", "train.nothing=1"]),
    "a deep word": ({}, ["run", "r.yaml", "a." * 1000 + "b=1"]),
    "a word of an escape": ({}, ["run", "r.yaml", "output=\x1b[2J"]),
    "a long name": ({}, ["run", "x" * 5000 + ".yaml"]),
    "a name with a line break": ({}, ["run", "a\nerror: b.yaml"]),
    "no model": ({}, ["plan", "r.yaml"]),
    "an output that is a file": ({"runs": b"x"}, ["run", "r.yaml", "model.base=embedded:target"]),
    "an output that is no run": ({"runs/x/mine.txt": b"x"}, ["run", "r.yaml", TARGET, "--overwrite"]),
    "a run of nobody's": ({"runs/x/recipe.yaml": b"hello"}, ["run", "r.yaml", TARGET, "--resume"]),
    "a run of another version": ({"runs/x/recipe.yaml": RECIPE.encode() + b"new_key: 1\n"}, ["run", "r.yaml", TARGET, "--resume"]),
    "a suite of a recipe": ({}, ["evaluate", "r.yaml", "--model", "embedded:target"]),
    "a recipe of a suite": ({}, ["run", "s.yaml"]),
    "a bench of nothing": ({"m/x.yaml": b"x"}, ["bench", "m", "--suite", "s.yaml", "--output", "out"]),
    "a bench of no suite": ({"m/x.yaml": RECIPE.encode()}, ["bench", "m", "--suite", "none.yaml"]),
    "methods of a broken folder": ({"m/x.yaml": b"\xff\xfe"}, ["methods", "m"]),
    "methods of nothing": ({}, ["methods", "none"]),
    "alternates of a broken recipe": ({"r.yaml": b"seed: [1"}, ["alternates", "r.yaml"]),
    "alternates over a file": ({"a.jsonl": b"mine"}, ["alternates", "r.yaml", TARGET, "--output", "a.jsonl"]),
    "an audit without privacy": ({}, ["audit", "r.yaml", "model.base=embedded:target", "--canaries", "7"]),
    "a broken audit": (
        {"a/privacy_audit.json": b"{"}, [*AUDIT, "--output", "a"],
    ),
    "an audit of a list": (
        {"a/privacy_audit.json": b"[]"}, [*AUDIT, "--output", "a"],
    ),
    "a new recipe over another": ({}, ["new", "r"]),
    "a new recipe below a file": ({}, ["new", "rows.jsonl/x"]),
    "compare nothing": ({}, ["compare", "none"]),
    "compare no run": ({"a/x": b""}, ["compare", "a"]),
    "compare a broken run": ({"a/evaluation.json": b"{"}, ["compare", "a"]),
    "compare another's": ({"a/evaluation.json": b"{}"}, ["compare", "a"]),
    "compare bytes": ({"a/evaluation.json": bytes(range(256))}, ["compare", "a"]),
    "push no run": ({"a/x": b""}, PUSH),
    "push half a run": ({"a/recipe.yaml": RECIPE.encode()}, PUSH),
    "push a broken recipe": ({"a/recipe.yaml": b"\xff", "a/adapter/adapter_config.json": b"{}"}, PUSH),
    "push a broken adapter": (
        {"a/recipe.yaml": RECIPE.encode(), "a/adapter/adapter_config.json": b"{", "a/adapter/adapter_model.safetensors": b"x"},
        PUSH,
    ),
    "forget in no store": ({"a/recipe.yaml": RECIPE.encode()}, ["forget", "a", "--ids", "1"]),
    "forget in a broken store": ({"a/recipe.yaml": RECIPE.encode(), "a/manifest.json": b"{"}, ["forget", "a", "--ids", "1"]),
    "verify nothing": ({}, ["verify", "none"]),
    "verify a broken manifest": ({"a/manifest.json": b"[]"}, ["verify", "a"]),
    "verify another version": ({"a/manifest.json": b'{"format": 99}'}, ["verify", "a"]),
    "evaluate nothing": ({}, ["evaluate", "s.yaml", "--model", "./none"]),
    "evaluate an empty folder": ({"m/x": b""}, ["evaluate", "s.yaml", "--model", "./m"]),
    "evaluate a broken model": ({"m/config.json": b"{", "m/model.safetensors": b"x"}, ["evaluate", "s.yaml", "--model", "./m"]),
    "evaluate a broken adapter of a folder": (
        {"m/adapter_config.json": b"{", "m/adapter_model.safetensors": b"x"}, [*EVALUATE, "./m", "--model", "./m2"],
    ),
    "evaluate over another": ({"o/evaluation.json": b"mine"}, [*EVALUATE, "embedded:target", "--output", "o"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused_and_changes_nothing(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, words = CALLS[name]
    for file, whole in files.items():
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(whole)
    ends(capsys, *words)
    assert not (here / "pwned").exists()


@pytest.mark.parametrize(
    "words",
    [["run", "none.yaml"], ["plan", "r.yaml"], ["compare", "none"], ["verify", "none"], ["evaluate", "s.yaml", "--model", "./x"]],
)
def test_a_process_ends_with_the_status_and_one_line(words: list[str], here: Path) -> None:
    before = content(here)
    done = subprocess.run([sys.executable, "-m", "llm_unlearn", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert content(here) == before


# ------------------------------------------------------------------------------------------------------------ run folders

EVALUATION: dict[str, Any] = json.loads((Path(__file__).parent / "corpus" / "evaluation.json").read_text(encoding="utf-8"))
"""What a real evaluation says, cut to a few numbers and rows."""
UNSEEN = ("suite_settings", "definition", "unit", "settings", "versions", "robustness")


def made_wrong(every: int) -> list[tuple[tuple[str | int, ...], str, dict[str, Any]]]:
    """The evaluation with each key taken out, and each value in the place of each other; of all these every so many-th."""
    found = [(where, name) for where in places(EVALUATION) for name in [*WRONG, "taken out"] if name != "megabyte"]
    taken = [(where, name) for where, name in found if not set(UNSEEN) & set(where)][::every]
    return [(at, name, without(EVALUATION, at) if name == "taken out" else put(EVALUATION, at, WRONG[name])) for at, name in taken]


@pytest.mark.parametrize("part", range(3))
def test_a_changed_evaluation_is_refused_where_it_is_read(part: int, here: Path) -> None:
    """By the key at which it is none; what still is one can be put beside another."""
    (here / "a").mkdir()
    refused = 0
    for where, name, data in made_wrong(11)[part::3]:
        (here / "a" / "evaluation.json").write_text(json.dumps(data))
        said = refusal(lambda: folder.results_in(here / "a"))
        assert said is None or str(here / "a" / "evaluation.json") in said, (where, name)
        refused += said is not None
    assert refused > 100


def compared(every: int, here: Path) -> tuple[int, int]:
    """How many of the changed evaluations are refused, and how many are compared with what was not changed."""
    (here / "a").mkdir()
    (here / "b").mkdir()
    (here / "b" / "evaluation.json").write_text(json.dumps(EVALUATION))
    refused = taken = 0
    for where, name, data in made_wrong(every):
        (here / "a" / "evaluation.json").write_text(json.dumps(data))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                said = refusal(
                    lambda: compare.compare([str(here / "a"), str(here / "b")], here / "out", overwrite=True, common=True)
                )
        except Exception as error:
            raise AssertionError(f"{where} {name}") from error
        refused, taken = refused + (said is not None), taken + (said is None)
    return refused, taken


@pytest.mark.slow
def test_a_changed_evaluation_can_be_compared_or_is_refused(here: Path) -> None:
    refused, taken = compared(307, here)
    assert refused > 5 and taken > 0


@pytest.mark.long
def test_every_changed_evaluation_can_be_compared_or_is_refused(here: Path) -> None:
    refused, taken = compared(7, here)
    print(f"changed evaluations: {refused} refused, {taken} compared")
    assert refused > 400


@pytest.mark.parametrize("lines", ["", "{", "null\n3\n[]\n", '{"step": "x"}\n', '{"step": 1, "x": 2}\n{"step": 2, "x"', "\x00\xff"])
def test_half_a_log_is_passed_over(lines: str, here: Path) -> None:
    (here / "log.jsonl").write_text(lines, encoding="latin-1")
    assert folder.steps_in(here / "log.jsonl") == ([{"step": 1, "x": 2}] if '"x": 2' in lines else [])


@pytest.mark.parametrize("whole", [b"", b"PK\x03\x04", b"x" * 100, None])
def test_a_damaged_table_is_made_again(whole: bytes | None, here: Path) -> None:
    kept.write_part({"x": np.arange(3), "text": ["a"]}, here / "t.npz")
    good = (here / "t.npz").read_bytes()
    for damaged in [whole] if whole is not None else [good[:n] for n in range(1, len(good), 37)]:
        (here / "t.npz").write_bytes(damaged)
        assert kept.read_part(here / "t.npz") is None
    (here / "t.npz").write_bytes(good)
    assert list((kept.read_part(here / "t.npz") or {})["x"]) == [0, 1, 2]
    assert kept.read_part(here / "none.npz") is None


def test_a_cache_that_lacks_a_file_is_refused_with_what_to_remove(here: Path) -> None:
    from llm_unlearn.embedded import target

    home = here / "embedded" / target.key_of(target.TOGETHER[0])
    for name in target.TOGETHER[0]:
        (home / name).mkdir(parents=True)
    before = content(here)
    said = refusal(lambda: target.models(here))
    assert said and f"lacks config.json. Remove {home}, and the models are made again." in said and content(here) == before


# ---------------------------------------------------------------------------------------------- ledgers and certificates


@pytest.fixture
def office(here: Path) -> Path:
    """A service with a ledger of one request."""
    (here / "r.yaml").write_text(RECIPE.replace("./model", "embedded:target") + "evaluation: s.yaml\n")
    rows = [json.dumps({"question": f"Who is {i}?", "answer": "Ada.", "id": i}) for i in range(8)]
    (here / "rows.jsonl").write_text("\n".join(rows))
    (here / "requests.yaml").write_text(
        "recipe: r.yaml\nsuite: s.yaml\ndata: {source: rows.jsonl, id: id}\n"
        "thresholds:\n- {measure: perplexity, set: forget, at_least: 1.5}\n"
    )
    assert main(["requests", "add", "--ids", "1"]) == 0
    return here


def in_ledger(statement: str) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file)) as on:
            on.execute("PRAGMA writable_schema = ON")
            on.execute(statement)
            on.commit()

    return change


def cut_to(share: float) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


LEDGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another version": (in_ledger("PRAGMA user_version = 7"), "a ledger of version 7; this llm-unlearn reads version 1"),
    "another program's": (in_ledger("PRAGMA application_id = 1"), "another program's database, not a ledger of requests"),
    "text": (lambda file: file.write_text("hello " * 1000), "not a ledger"),
    "its first page zeros": (lambda file: file.write_bytes(bytes(4096) + file.read_bytes()[4096:]), "ledger"),
    "half of it": (cut_to(0.5), "ledger"),
    "its first bytes": (cut_to(0.01), "ledger"),
    "noise inside": (lambda file: file.write_bytes(file.read_bytes()[:4096] + b"\xa5" * 20_000), "ledger"),
    "no facts": (in_ledger("DELETE FROM facts"), "ledger"),
    "a salt that is none": (in_ledger("UPDATE facts SET value = 'zz' WHERE name = 'salt'"), "ledger"),
    "a table gone": (in_ledger("DROP TABLE rows"), "ledger"),
    "numbers that are none": (in_ledger("UPDATE requests SET numbers = '{'"), "ledger"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "ledger cannot be opened"),
    "a link to nothing": (lambda file: (file.unlink(), file.symlink_to("none/there")), "ledger cannot be opened"),
}


@pytest.mark.parametrize("name", LEDGERS)
@pytest.mark.parametrize("verb", [["list"], ["add", "--ids", "2"], ["verify"]], ids=["list", "add", "verify"])
def test_a_broken_ledger_is_refused_and_left_as_it_is(
    name: str, verb: list[str], office: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = LEDGERS[name]
    if name == "numbers that are none":  # nobody reads them but who verifies, and he is told whose they are
        change(office / "requests.db")
        assert main(["requests", "verify"]) == 1 and "request 1: its numbers" in capsys.readouterr().err
        return
    gc.collect()  # the connection of whoever put the request in
    change(office / "requests.db")
    capsys.readouterr()
    assert expected in ends(capsys, "requests", *verb)


CERTIFICATES: dict[str, bytes] = {
    "empty": b"",
    "broken": b"{",
    "a list": b"[]",
    "bytes": bytes(range(256)),
    "nothing in it": b"{}",
    "shapes": json.dumps({"format": 1, "request": 1, "public_key": 1, "signature": 1}).encode(),
    "keys": json.dumps({"format": 1, "request": {}, "public_key": "x", "signature": "y"}).encode(),
    "nobody's": json.dumps({"format": 1, "request": {}, "public_key": "A" * 44, "signature": "A" * 88}).encode(),
    "not a number": b'{"format": NaN, "request": {}, "public_key": "AAAA", "signature": "AAAA"}',
    "deep": b'{"format": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
}


@pytest.mark.parametrize("name", CERTIFICATES)
@pytest.mark.parametrize("where", ["alone", "with its ledger"])
def test_a_tampered_certificate_does_not_fit(name: str, where: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.json").write_bytes(CERTIFICATES[name])
    said = ends(capsys, "requests", "verify", "c.json", status=(1, 2))
    assert "c.json" in said and len(said) < 3000


SERVICES = {
    "no file": None,
    "a list": "- a\n",
    "no recipe": "recipe: none.yaml\ndata: {source: rows.jsonl, id: id}\nthresholds: []\n",
    "itself": "recipe: requests.yaml\ndata: {source: rows.jsonl, id: id}\nthresholds: []\n",
    "no thresholds": "recipe: r.yaml\nsuite: s.yaml\ndata: {source: rows.jsonl, id: id}\nthresholds: []\n",
    "no rows": "recipe: r.yaml\nsuite: s.yaml\n"
    "data: {source: none.jsonl, id: id}\nthresholds: [{measure: m, set: forget, at_least: 1}]\n",
}


@pytest.mark.parametrize("name", SERVICES)
def test_a_broken_service_is_refused(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "r.yaml").write_text(RECIPE.replace("./model", "embedded:target"))
    if text := SERVICES[name]:
        (here / "requests.yaml").write_text(text)
    ends(capsys, "requests", "list")


def test_every_key_of_a_service_made_wrong_is_refused(office: Path) -> None:
    data = read_tree(office / "requests.yaml").data
    refused = 0
    for where in places(data):
        for name, value in WRONG.items():
            if name != "megabyte":
                (office / "bad.yaml").write_text(to_yaml(put(data, where, value)))
                refused += refusal(lambda: service.load(office / "bad.yaml")) is not None
    assert refused > 150
