"""Bad calls: verbs on folders and files that are broken. Each ends with a status of its own and one block of words, shows no
traceback, and leaves every byte as it was."""

import copy
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import WRONG, content, places, put, without

from llm_unlearn.cli import main
from llm_unlearn.requests import service

ROOT = Path(__file__).parents[1]
RECIPE = (
    "output: runs/x\nmodel: {base: ./model}\ndata:\n  forget: {source: rows.jsonl, prompt: question, answer: answer}\n"
    "objective:\n  forget: {loss: {name: npo}}\n"
)
SUITE = "sets:\n  forget: {source: rows.jsonl, prompt: question, answer: answer}\nmeasures:\n- {name: perplexity, set: forget}\n"


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

CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no recipe": ({}, ["run", "none.yaml"]),
    "a folder": ({}, ["run", "."]),
    "a binary recipe": ({"r.yaml": bytes(range(256))}, ["run", "r.yaml"]),
    "a bomb": ({"r.yaml": b"a: &a [x,x]\n" + b"".join(b"a%d: &a%d [*a%s,*a%s]\n" % (i, i, b"%d" % (i - 1) if i else b"", b"%d" % (i - 1) if i else b"") for i in range(30))}, ["run", "r.yaml"]),
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
    "an output that is no run": ({"runs/x/mine.txt": b"x"}, ["run", "r.yaml", "model.base=embedded:target", "--overwrite"]),
    "a run of nobody's": ({"runs/x/recipe.yaml": b"hello"}, ["run", "r.yaml", "model.base=embedded:target", "--resume"]),
    "a run of another version": ({"runs/x/recipe.yaml": RECIPE.encode() + b"new_key: 1\n"}, ["run", "r.yaml", "model.base=embedded:target", "--resume"]),
    "a suite of a recipe": ({}, ["evaluate", "r.yaml", "--model", "embedded:target"]),
    "a recipe of a suite": ({}, ["run", "s.yaml"]),
    "a bench of nothing": ({"m/x.yaml": b"x"}, ["bench", "m", "--suite", "s.yaml", "--output", "out"]),
    "a bench of no suite": ({"m/x.yaml": RECIPE.encode()}, ["bench", "m", "--suite", "none.yaml"]),
    "methods of a broken folder": ({"m/x.yaml": b"\xff\xfe"}, ["methods", "m"]),
    "methods of nothing": ({}, ["methods", "none"]),
    "alternates of a broken recipe": ({"r.yaml": b"seed: [1"}, ["alternates", "r.yaml"]),
    "alternates over a file": ({"a.jsonl": b"mine"}, ["alternates", "r.yaml", "model.base=embedded:target", "--output", "a.jsonl"]),
    "an audit without privacy": ({}, ["audit", "r.yaml", "model.base=embedded:target", "--canaries", "7"]),
    "a broken audit": (
        {"a/privacy_audit.json": b"{"}, ["audit", "r.yaml", "model.base=embedded:target", "objective.forget.loss={name: nll}", "--output", "a"],
    ),
    "an audit of a list": (
        {"a/privacy_audit.json": b"[]"}, ["audit", "r.yaml", "model.base=embedded:target", "objective.forget.loss={name: nll}", "--output", "a"],
    ),
    "a new recipe over another": ({}, ["new", "r"]),
    "a new recipe below a file": ({}, ["new", "rows.jsonl/x"]),
    "compare nothing": ({}, ["compare", "none"]),
    "compare no run": ({"a/x": b""}, ["compare", "a"]),
    "compare a broken run": ({"a/evaluation.json": b"{"}, ["compare", "a"]),
    "compare another's": ({"a/evaluation.json": b"{}"}, ["compare", "a"]),
    "compare bytes": ({"a/evaluation.json": bytes(range(256))}, ["compare", "a"]),
    "push no run": ({"a/x": b""}, ["push", "a", "--repo-id", "u/n", "--dry-run"]),
    "push half a run": ({"a/recipe.yaml": RECIPE.encode()}, ["push", "a", "--repo-id", "u/n", "--dry-run"]),
    "push a broken recipe": ({"a/recipe.yaml": b"\xff", "a/adapter/adapter_config.json": b"{}"}, ["push", "a", "--repo-id", "u/n", "--dry-run"]),
    "push a broken adapter": (
        {"a/recipe.yaml": RECIPE.encode(), "a/adapter/adapter_config.json": b"{", "a/adapter/adapter_model.safetensors": b"x"},
        ["push", "a", "--repo-id", "u/n", "--dry-run"],
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
        {"m/adapter_config.json": b"{", "m/adapter_model.safetensors": b"x"}, ["evaluate", "s.yaml", "--model", "./m", "--model", "./m2"],
    ),
    "evaluate over another": ({"o/evaluation.json": b"mine"}, ["evaluate", "s.yaml", "--model", "embedded:target", "--output", "o"]),
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

MADE: dict[str, Any] = {
    "format": 1, "title": "t", "suite": "s.yaml", "suite_hash": "0" * 16, "suite_settings": {"sets": {}}, "thresholds": [], "attacks": [],
    "robustness": [], "curves": [], "run": {"recipe_hash": "0" * 16, "seed": 0, "status": "finished", "reason": "", "broken": False,
    "steps": 3, "kept_step": 3, "seconds": 1.0, "trainable": 10, "device": "cpu", "processes": 1, "precision": "fp32", "versions": {}},
    "models": {"before": {"name": "m", "identity": "a"}, "after": {"name": "m", "identity": "b"}},
    "numbers": [
        {"measure": "perplexity", "set": "forget", "column": "before", "value": 1.0, "low": 0.9, "high": 1.1, "good": "up"},
    ],
    "answers": {"forget": [{"id": "0", "prompt": "p", "answer": "a", "before": "x", "after": "y"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    """What a real evaluation says, cut to two numbers of each kind: kept beside the tests, as making one takes a minute."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "corpus" / "evaluation.json").read_text(encoding="utf-8"))
    return found
