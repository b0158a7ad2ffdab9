"""Small real jobs for faults to be put into, and what must be so afterwards: nothing half-written, and the result of an undisturbed
run bit by bit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faults import Ended, Forks
from safetensors.torch import load_file

from llm_unlearn import folder as run_folder
from llm_unlearn.data.sources import rows
from llm_unlearn.exact import verify
from llm_unlearn.exact.manifest import read as read_manifest
from llm_unlearn.requests import chain
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.source import Source

BEGIN = """\
output: run
model: {base: BASE, adapter: {rank: 2, alpha: 4}}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 4}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 6}
objective:
  forget: {loss: {name: npo}}
  retain: {loss: {name: kl}}
train:
  steps: 5
  lr: 1.0e-2
  window: {forget: 2, retain: 2}
  checkpoint_every: 2
"""
RECIPE = BEGIN + "  stop: {budget: {retain_perplexity: 100.0}, every: 2, rows: 2}\n"
PRIVATE = re.sub("npo|kl", "nll", BEGIN) + "  privacy: {noise: 1.0, delta: 1.0e-2, clip: 1.0, reproducible: true}\n"
EVALUATION = "evaluation: {suite: suite.yaml, every: 3}\n"
EXACT = """\
output: run
model: {base: BASE, adapter: {rank: 2, alpha: 4}}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 2}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 6}
method: {name: sisa, shards: 2, slices: 2, id: id}
train: {epochs: 1, lr: 1.0e-2, window: {retain: 2}, checkpoint_every: 1}
evaluation: suite.yaml
"""
SUITE = """\
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 2}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 2}
measures:
  - {name: perplexity, set: forget}
  - {name: rouge, set: forget}
  - {name: perplexity, set: retain}
max_new_tokens: 3
"""
SERVICE = """\
recipe: recipe.yaml
suite: suite.yaml
data: {source: embedded:forget, id: id}
thresholds:
  - {measure: perplexity, set: forget, at_least: 1.0}
  - {measure: perplexity, set: retain, at_most: 1000000.0, of: before}
"""
Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A command on a folder that is as it was before it, and what the folder says afterwards."""

    words: Sequence[str]
    again: Sequence[str]
    """What the message says that goes on."""
    facts: Callable[[Path], Facts]


def _log(path: Path) -> list[Any]:
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]


def _numbers(path: Path) -> Any:
    return json.loads((path / run_folder.RESULTS).read_text())["numbers"] if (path / run_folder.RESULTS).is_file() else None


TIMES = re.compile(rb'"seconds": [0-9.e-]+|<dt>time</dt><dd>[^<]*</dd>')
"""Keys of durations, which are all that may differ between two runs of one recipe."""


def contents(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, without times; `hashes.json` counts those, too, and is checked by itself."""
    found = {}
    for one in sorted(path.rglob("*")):
        if one.is_file() and one.name != run_folder.HASHES and one.suffix != ".lock":
            found[one.relative_to(path).as_posix()] = hashlib.sha256(TIMES.sub(b"", one.read_bytes())).hexdigest()
    return found


def files(home: Path, *below: str) -> list[str]:
    found = (path for name in below for path in (home / name).rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.relative_to(home).as_posix() for path in found)


def facts_of_run(home: Path) -> Facts:
    run = home / "run"
    along = run / run_folder.ALONG
    return {
        "files": files(home, "run", "cache"),
        "contents": contents(run),
        "numbers": _numbers(run),
        "log": _log(run / run_folder.LOG),
        "along": along.read_text() if along.is_file() else None,
        "unlike": run_folder.unlike(run),
    }


def facts_of_pieces(home: Path) -> Facts:
    run = home / "run"
    manifest = read_manifest(run)
    names = sorted({path.split("/")[1] for path in files(home, "run")})  # pieces are named by a salt of each run's own
    return {
        "files": names,
        "cache": files(home, "cache"),
        "contents": contents(run / run_folder.ADAPTER),
        "numbers": _numbers(run),
        "unlike": run_folder.unlike(run),
        "problems": verify.problems(run),
        "state": (manifest.state, len(manifest.pieces), len(manifest.deleted), len(manifest.deletions)),
        "pieces": sorted(run_folder.sha256(path) for path in (run / "pieces").rglob("*.safetensors")),
    }


def facts_of_requests(home: Path) -> Facts:
    """Every request with its state and how often it was added, claimed and fulfilled; every run; the chain."""
    ledger = Ledger(home / "requests.db", "x")
    with ledger.reading() as on:
        counts = on.execute("SELECT what, request, run, count(*) FROM events GROUP BY what, request, run").fetchall()
    runs = home / "runs" / "requests"
    return {
        "events": sorted(map(str, (tuple(one) for one in counts))),
        "states": {one.id: (one.state, one.run, one.reason) for one in ledger.requests()},
        "runs": [(one.id, one.state) for one in ledger.runs()],
        "certificates": sorted((request, run) for request, run, _ in ledger.each_certificate()),
        "chain": chain.problems(ledger),
        "files": files(home, "runs", "cache"),
        "contents": {path.name: contents(path / run_folder.ADAPTER) for path in sorted(runs.iterdir())},
        "numbers": {path.name: _numbers(path) for path in sorted(runs.iterdir())},
        "unlike": {path.name: run_folder.unlike(path) for path in sorted(runs.iterdir())},
        "rows": {one.id: [row.id for row in ledger.rows_of(one.id)] for one in ledger.requests()},
    }


def facts_of_private(home: Path) -> Facts:
    """A run's, what was spent, and that the key is gone."""
    keys = [str(path) for path in home.rglob("secret.key")]
    return facts_of_run(home) | {"spent": json.loads((home / "run" / run_folder.PRIVACY).read_text()), "keys": keys}


def facts_of_audit(home: Path) -> Facts:
    found = json.loads((home / "run_audit" / "privacy_audit.json").read_text())
    return {"files": files(home, "run_audit", "cache"), "found": found}


def facts_of_many(home: Path) -> Facts:
    made = sorted(path.parent for path in (home / "out").rglob(run_folder.RESULTS))
    return {"files": files(home, "out", "cache"), "numbers": {path.name: _numbers(path) for path in made}}


AUDIT = ("audit", "private.yaml", "train.privacy=null", "--canaries", "6")
JOBS = {
    "run": Job(["run", "recipe.yaml"], ["run", "recipe.yaml", "--resume"], facts_of_run),
    "plain": Job(["run", "plain.yaml"], ["run", "plain.yaml", "--resume"], facts_of_run),
    "private": Job(["run", "private.yaml"], ["run", "private.yaml", "--resume"], facts_of_private),
    "audit": Job([*AUDIT], [*AUDIT], facts_of_audit),
    "exact": Job(["run", "exact.yaml"], ["run", "exact.yaml", "--resume"], facts_of_pieces),
    "forget": Job(["forget", "run", "--ids", "DELETED"], ["forget", "run", "--ids", "DELETED"], facts_of_pieces),
    "requests": Job(["requests", "run"], ["requests", "run"], facts_of_requests),
    "many": Job(
        ["evaluate", "suite.yaml", "--model", "BASE", "--adapter", "run", "--adapter", "other", "--output", "out"],
        ["evaluate", "suite.yaml", "--model", "BASE", "--adapter", "run", "--adapter", "other", "--output", "out"],
        facts_of_many,
    ),
}  # fmt: skip


class Bank:
    """The jobs, each with a folder to begin from and what an undisturbed run makes of it, and a server that carries them out."""

    def __init__(self, folder: Path, base: Path, server: Forks) -> None:
        self.folder, self.base, self.server, self.count = folder, base, server, 0
        self.facts: dict[str, Facts] = {}
        self.operations: dict[str, list[tuple[str, str]]] = {}
        self.seconds: dict[str, float] = {}
        self.deleted = ""

    def words(self, words: Sequence[str]) -> list[str]:
        return [{"BASE": str(self.base), "DELETED": self.deleted}.get(word, word) for word in words]

    def known(self, name: str) -> None:
        """See to it that an undisturbed run of the job was made."""
        if name not in self.facts:
            self._make(name)

    def begin(self, name: str) -> Path:
        """A folder as it is before the job."""
        self.known(name)
        self.count += 1
        return Path(shutil.copytree(self.folder / f"{name}-before", self.folder / f"case-{self.count}", symlinks=True))

    def _make(self, name: str) -> None:
        before, after = self.folder / f"{name}-before", self.folder / f"{name}-after"
        before.mkdir()
        for file, text in (
            ("recipe.yaml", RECIPE if name == "requests" else RECIPE + EVALUATION), ("plain.yaml", RECIPE), ("exact.yaml", EXACT),
            ("suite.yaml", SUITE), ("private.yaml", PRIVATE), ("requests.yaml", SERVICE),
        ):  # fmt: skip
            (before / file).write_text(text.replace("BASE", str(self.base)))
        for words in self._first(name):
            ended = self.server(self.words(words), before)
            assert ended.status == 0, ended.text
            if words[0] == "run" and words[-1] == "exact.yaml":
                self.deleted = _rows("retain")[2]
        shutil.copytree(before, after, symlinks=True)
        ended = self.server(self.words(JOBS[name].words), after)
        assert ended.status == 0, ended.text
        self.facts[name] = JOBS[name].facts(after)
        self.operations[name], self.seconds[name] = ended.operations, ended.seconds
        self.folder.joinpath(f"{name}.txt").write_text("\n".join(f"{i} {a} {b}" for i, (a, b) in enumerate(ended.operations, 1)))

    @staticmethod
    def _first(name: str) -> list[list[str]]:
        """What is done before the job."""
        if name == "forget":
            return [["run", "exact.yaml"]]
        if name == "requests":
            return [["requests", "add", "--ids", row, "--yes-many"] for row in _rows("forget")[:3]]
        if name == "many":
            return [["run", "plain.yaml"], ["run", "plain.yaml", "output=other", "train.steps=2"]]
        return []


def _rows(name: str) -> list[str]:
    """Ids of the first rows of a set."""
    return [str(one["id"]) for one in rows(Source(source=f"embedded:{name}", prompt="question", answer="answer", limit=6))]


def half_written(home: Path) -> list[str]:
    """Files under the name that they keep which cannot be read as what they are."""
    found = []
    for path in (one for one in home.rglob("*") if one.is_file()):
        inside = path.relative_to(home).parts
        if any(part.startswith(".") or part.endswith(".unfinished") for part in inside):
            continue
        try:
            _read(path)
        except Exception as error:
            found.append(f"{'/'.join(inside)}: {type(error).__name__}: {error}")
    return found


def _read(path: Path) -> None:
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a line that is being added may be half a line
            json.loads(line)
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".npz":
        with np.load(path) as file:
            json.loads(file["json"].tobytes())
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.read_table(path)
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>"), "no end"
    elif path.suffix == ".db":
        with sqlite3.connect(path) as on:
            assert on.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        on.close()


def difference(expected: Facts, found: Facts) -> list[str]:
    """Where what was found is not what an undisturbed run leaves."""
    lines = []
    for key, value in expected.items():
        if found[key] != value:
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                lines.append(f"{key}: lost {sorted(set(value) - set(found[key]))}, more {sorted(set(found[key]) - set(value))}")
            else:
                if isinstance(value, dict):
                    value = {one: it for one, it in value.items() if found[key].get(one) != it}
                lines.append(f"{key}: {str(found[key])[:300]} instead of {str(value)[:300]}")
    return lines


__all__ = ["JOBS", "Bank", "Ended", "Job", "difference", "half_written"]
