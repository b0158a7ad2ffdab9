"""Faults at every stage: whatever ends a command, nothing is half-written, the message says what goes on, and that leads to the
bits of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_jobs import JOBS, RECIPE, SUITE, Bank, Ended, difference, facts_of_run, half_written
from faults import ROOT, forks

from llm_unlearn.folder import RESULTS, sha256

pytestmark = pytest.mark.slow
ASKED = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143}
WRITERS = ("open", "append", "sync")


@dataclass(frozen=True)
class Case:
    """A job with one fault in it."""

    kind: str
    """In the table of figures."""
    job: str
    fault: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.job} {self.fault}"


PLACES = {
    "data": "llm_unlearn.run:read_examples",
    "model": "llm_unlearn.run:load",
    "look": "llm_unlearn.look:Look.seen",
    "reference": "llm_unlearn.training.loop:reference_of",
    "gradient": "llm_unlearn.training.window:Window.backward",
    "move": "llm_unlearn.training.loop:Training._move",
    "probe": "llm_unlearn.training.guard:Probe.look",
    "checkpoint": "llm_unlearn.training.checkpoint:Checkpoints.save",
    "resume": "llm_unlearn.training.checkpoint:Checkpoints.close",
    "save": "llm_unlearn.run:save",
    "numbers": "llm_unlearn.run:results_of",
    "page": "llm_unlearn.report.page:write_page",
    "seal": "llm_unlearn.folder:seal",
    "end": "llm_unlearn.run:_end",
}
"""Stages of a run, and the function whose begin and end they are."""


def operations(bank: Bank, job: str, do: str, every: int, kind: str, only: Sequence[str] = (), first: int = 0) -> list[Case]:
    """A fault at every so many-th operation on files."""
    bank.known(job)
    found = [i for i, (what, _) in enumerate(bank.operations[job], 1) if not only or what in only]
    return [Case(kind, job, {"operation": at, "do": do}) for at in found[first::every]]


def at_times(bank: Bank, job: str, do: str, count: int, kind: str) -> list[Case]:
    """A signal at random times."""
    bank.known(job)
    draw = random.Random(f"{job} {do}")
    return [Case(kind, job, {"after": round(draw.uniform(0.0, bank.seconds[job]), 3), "do": do}) for _ in range(count)]


def at_places(job: str, do: str, kind: str, places: Sequence[str], counts: Sequence[int] = (1,)) -> list[Case]:
    """A fault before and after a stage."""
    return [
        Case(kind, job, {"where": PLACES[place], "count": count, "when": when, "do": do})
        for place in places for count in counts for when in ("before", "after")
    ]  # fmt: skip


def campaign(bank: Bank, thin: int = 1) -> list[Case]:
    """Every kind of fault; `thin` takes each so many-th."""
    found = [
        *operations(bank, "run", "kill", 2, "killed between two operations on files"),
        *operations(bank, "plain", "kill", 3, "killed between two operations on files"),
        *operations(bank, "exact", "kill", 13, "killed between two operations on files"),
        *operations(bank, "forget", "kill", 4, "killed between two operations on files"),
        *operations(bank, "requests", "kill", 8, "killed between two operations on files"),
        *operations(bank, "many", "kill", 6, "killed between two operations on files"),
        *operations(bank, "private", "kill", 5, "killed between two operations on files"),
        *operations(bank, "audit", "kill", 6, "killed between two operations on files"),
        *operations(bank, "run", "torn", 3, "killed in the middle of a file", WRITERS),
        *operations(bank, "forget", "torn", 6, "killed in the middle of a file", WRITERS),
        *operations(bank, "run", "strict", 6, "power cut, nothing kept that was not synced"),
        *operations(bank, "forget", "strict", 8, "power cut, nothing kept that was not synced", first=3),
        *operations(bank, "requests", "strict", 16, "power cut, nothing kept that was not synced", first=5),
        *operations(bank, "private", "strict", 9, "power cut, nothing kept that was not synced", first=2),
        *operations(bank, "audit", "strict", 9, "power cut, nothing kept that was not synced", first=2),
        *operations(bank, "run", "names", 6, "power cut, names kept, contents lost", first=2),
        *operations(bank, "forget", "names", 8, "power cut, names kept, contents lost", first=5),
        *operations(bank, "requests", "names", 16, "power cut, names kept, contents lost", first=11),
        *operations(bank, "run", "mixed", 8, "power cut, some names lost", first=3),
        *operations(bank, "run", "full", 7, "disk full"),
        *operations(bank, "forget", "full", 13, "disk full", first=2),
        *operations(bank, "requests", "full", 20, "disk full", first=3),
        *operations(bank, "private", "full", 20, "disk full", first=3),
        *operations(bank, "run", "closed", 16, "disk turns read-only"),
        *operations(bank, "run", "SIGTERM", 9, "SIGTERM", first=4),
        *operations(bank, "exact", "SIGTERM", 60, "SIGTERM", first=4),
        *operations(bank, "forget", "SIGTERM", 30, "SIGTERM", first=4),
        *operations(bank, "requests", "SIGTERM", 40, "SIGTERM", first=4),
        *operations(bank, "private", "SIGTERM", 20, "SIGTERM", first=4),
        *operations(bank, "audit", "SIGTERM", 20, "SIGTERM", first=4),
        *operations(bank, "run", "SIGHUP", 40, "SIGHUP", first=6),
        *operations(bank, "run", "SIGINT", 20, "SIGINT", first=7),
        *at_times(bank, "run", "SIGKILL", 16, "SIGKILL at a random time"),
        *at_times(bank, "requests", "SIGKILL", 10, "SIGKILL at a random time"),
        *at_times(bank, "exact", "SIGKILL", 6, "SIGKILL at a random time"),
        *at_times(bank, "many", "SIGKILL", 4, "SIGKILL at a random time"),
        *at_times(bank, "run", "SIGTERM", 14, "SIGTERM"),
        *at_times(bank, "many", "SIGTERM", 4, "SIGTERM"),
        *at_times(bank, "run", "SIGINT", 6, "SIGINT"),
        *at_places("run", "kill", "killed before and after a stage", [*PLACES]),
        *at_places("run", "kill", "killed before and after a stage", ["gradient", "move"], (3,)),
        *at_places("run", "kill", "killed before and after a stage", ["look"], (2,)),
        *at_places("run", "memory", "out of memory", ["gradient", "look"]),
        *at_places("run", "cuda memory", "out of memory", ["gradient"], (5,)),
        *at_places("run", "allocator", "out of memory", ["gradient"], (4,)),
    ]  # fmt: skip
    return found[::thin]


def wrong_with(bank: Bank, case: Case) -> list[str]:
    """Put the fault in, do what the message says, and list what is not as promised."""
    home, job = bank.begin(case.job), JOBS[case.job]
    ended = bank.server(bank.words(job.words), home, case.fault)
    wrong = [f"the fault was answered: {line}" for line in _answer(case, ended)]
    wrong += [f"half-written: {line}" for line in half_written(home)] if not power(case) else []
    if ended.status != 0 or case.job != "requests":
        again = bank.server(bank.words(job.again), home)
        if again.status != 0:
            wrong.append(f"--resume ended with {again.status}: {again.text[-1500:]}")
    wrong += [f"half-written at the end: {line}" for line in half_written(home)]  # after a power cut, too
    if not wrong:
        try:
            wrong += [f"--resume: {line}" for line in difference(bank.facts[case.job], job.facts(home))]
        except Exception as error:
            wrong.append(f"--resume: what it left cannot be read: {error!r}")
    if not wrong:
        shutil.rmtree(home)
    return wrong


def power(case: Case) -> bool:
    return case.fault["do"] in ("strict", "names", "mixed")


def _answer(case: Case, ended: Ended) -> Iterator[str]:
    """What is wrong with how the command ended."""
    do, said = case.fault["do"], ended.text
    if "Traceback" in said:
        yield f"a traceback: {said[-1500:]}"
    if do in ("kill", "torn", "strict", "names", "mixed", "SIGKILL"):
        if ended.status not in (-9, *((0,) if "after" in case.fault else ())):
            yield f"status {ended.status}: {said[-500:]}"
    elif do in ASKED:
        if ended.status == 0:
            return  # it came after the last moment at which something could be left
        if ended.status != ASKED[do]:
            yield f"status {ended.status} instead of {ASKED[do]}: {said[-1500:]}"
        elif "goes on" not in said or (ASKED[do] == 143 and f"{do} asked for it" not in said):
            yield f"does not say how to go on: {said[-500:]}"
    elif do in ("full", "closed"):
        text = "No space left on device" if do == "full" else "Read-only file system"
        if ended.status == 0:
            return  # nothing was written any more
        lines = [line for line in said.splitlines() if line.startswith("error: ") and text in line and "goes on" in line]
        if ended.status != 74 or len(lines) != 1:
            yield f"status {ended.status}: {said[-1500:]}"
    elif ended.status != 74 or "out of memory" not in said or "goes on" not in said:
        yield f"status {ended.status}: {said[-1500:]}"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, make_model: Any, tokenizer: Any) -> Iterator[Bank]:
    folder = tmp_path_factory.mktemp("faults")
    make_model(hidden_size=32).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with forks(folder) as server:
        yield Bank(folder, folder / "base", server)


def carry_out(bank: Bank, cases: Sequence[Case]) -> dict[str, list[str]]:
    """All cases, with a table per kind; what is wrong by case."""
    began, wrong = time.monotonic(), {case.name: found for case in cases if (found := wrong_with(bank, case))}
    injected = Counter(case.kind for case in cases)
    failed = Counter(case.kind for case in cases if case.name in wrong)
    print(f"\n{'fault':50} injected  recovered")
    for kind, count in injected.items():
        print(f"{kind:50} {count:8}  {count - failed[kind]:9}")
    print(f"{'all':50} {len(cases):8}  {len(cases) - len(wrong):9}   {time.monotonic() - began:.0f} s")
    for name, found in wrong.items():
        print(f"\n{name}\n  " + "\n  ".join(found))
    return wrong


SAMPLE = (  # one of each kind, on the two quickest jobs and that with most to lose
    ("plain", "kill", (), (1, 5, 23, 40, 61, 80, 96)),
    ("plain", "torn", WRITERS, (2, 12, 27)),
    ("plain", "strict", (), (33, 66, 90)),
    ("plain", "names", (), (49, 95)),
    ("plain", "full", (), (20, 75)),
    ("plain", "closed", (), (57,)),
    ("plain", "SIGTERM", (), (3, 50)),
    ("plain", "SIGINT", (), (44,)),
    ("plain", "SIGHUP", (), (30,)),
    ("requests", "kill", (), (11, 60)),
)


@pytest.mark.long
def test_a_sample_of_faults_is_recovered_from(bank: Bank) -> None:
    cases = []
    for job, do, only, places in SAMPLE:
        every = operations(bank, job, do, 1, do, only)
        cases += [every[min(place, len(every)) - 1] for place in places]
    cases += at_places("plain", "memory", "memory", ["gradient"])[:1] + at_places("plain", "kill", "kill", ["move"], (3,))
    cases += at_times(bank, "plain", "SIGTERM", 2, "SIGTERM") + at_times(bank, "plain", "SIGKILL", 2, "SIGKILL")
    assert len(cases) >= 30
    assert not carry_out(bank, cases)


@pytest.mark.long
def test_every_fault_is_recovered_from(bank: Bank) -> None:
    cases = campaign(bank)
    assert len(cases) >= 200
    assert not carry_out(bank, cases)


# ----------------------------------------------------------------------------------------------- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, to be made full and read-only; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("job", ["run", "forget", "requests"])
def test_a_disk_that_is_really_full(bank: Bank, small_disk: Path, job: str) -> None:
    """From no room at all to nearly enough: one line with the path, and what was finished goes on once there is room."""
    bank.known(job)
    used = sum(path.stat().st_size for path in (bank.folder / f"{job}-after").rglob("*") if path.is_file())
    start = sum(path.stat().st_size for path in (bank.folder / f"{job}-before").rglob("*") if path.is_file())
    full = 0
    for share in (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95):
        home = Path(shutil.copytree(bank.folder / f"{job}-before", small_disk / "case", symlinks=True))
        filler = small_disk / "filler"
        remount(small_disk, "size=64m")
        free = shutil.disk_usage(small_disk).free
        with contextlib.suppress(OSError), filler.open("wb") as file:  # a page more or less
            file.write(b"0" * max(0, free - int(share * (used - start))))
        ended = bank.server(bank.words(JOBS[job].words), home)
        if ended.status:
            full += 1
            lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
            assert ended.status == 74 and len(lines) == 1 and "No space left on device" in lines[0], ended.text[-2000:]
            assert re.match(r"error: \S+: No space", lines[0]), "it names the path"
        filler.unlink()
        assert half_written(home) == []
        if ended.status or job != "requests":
            again = bank.server(bank.words(JOBS[job].again), home)
            assert again.status == 0, again.text[-2000:]
        assert difference(bank.facts[job], JOBS[job].facts(home)) == []
        shutil.rmtree(home)
    assert full >= 4


@pytest.mark.long
def test_a_disk_that_turns_read_only(bank: Bank, small_disk: Path) -> None:
    bank.known("run")
    home = Path(shutil.copytree(bank.folder / "run-before", small_disk / "case"))
    assert bank.server(JOBS["run"].words, home, {"operation": 90, "do": "kill"}).status == -9
    remount(small_disk, "ro")
    ended = bank.server(JOBS["run"].again, home)
    assert ended.status == 74 and "Read-only file system" in ended.text and "Traceback" not in ended.text, ended.text[-2000:]
    remount(small_disk, "rw")
    assert bank.server(JOBS["run"].again, home).status == 0
    assert difference(bank.facts["run"], JOBS["run"].facts(home)) == []


@pytest.mark.long
@pytest.mark.parametrize("limit", [1000, 4000, 12000])
def test_a_limit_of_the_size_of_files(bank: Bank, limit: int) -> None:
    home = bank.begin("run")
    ended = bank.server(JOBS["run"].words, home, {"limit": limit})
    assert ended.status == 74 and "ulimit -f" in ended.text, ended.text[-2000:]
    assert half_written(home) == []
    assert bank.server(JOBS["run"].again, home).status == 0
    assert difference(bank.facts["run"], JOBS["run"].facts(home)) == []


# ------------------------------------------------------------------------------------------------------- several processes


def launched(home: Path, *words: str) -> psutil.Popen:
    launch = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "cpu.yaml"), "-m", "llm_unlearn"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"LLM_UNLEARN_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    with (home / "said.txt").open("wb") as said:
        return psutil.Popen([*launch, *words], cwd=home, env=env, stdout=said, stderr=said)


@pytest.mark.long
@pytest.mark.parametrize(("rank", "sent"), [(0, "SIGKILL"), (1, "SIGKILL"), (1, "SIGTERM")])
def test_a_process_of_two_that_dies_takes_no_work_along(bank: Bank, made_once: Any, rank: int, sent: str) -> None:
    """The other ends, too, within a bounded time, and resumed they come to the bits of two that nobody disturbed."""
    words = ["run", "plain.yaml", "train.steps=60", "train.checkpoint_every=3"]
    bank.known("plain")
    straight = bank.folder / "two"
    if not straight.exists():
        shutil.copytree(bank.folder / "plain-before", straight)
        assert launched(straight, *words).wait(300) == 0, (straight / "said.txt").read_text()
    home, begun = bank.begin("plain"), time.monotonic()
    running = launched(home, *words)
    log = home / "run" / "log.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") > 7) and running.poll() is None and time.monotonic() - begun < 200:
        time.sleep(0.01)
    (victim,) = (one for one in running.children(recursive=True) if one.environ().get("RANK") == str(rank) and not one.children())
    victim.send_signal(getattr(signal, sent))
    sent_at = time.monotonic()
    assert running.wait(100) != 0 and time.monotonic() - sent_at < 60
    said = (home / "said.txt").read_text(errors="replace")
    assert (
        ("another process of this run has ended" in said)
        or "--resume goes on" in said
        or f"rank: {rank}" in said.replace("      ", " ")
    ), said
    assert not (home / "run" / "hashes.json").exists(), "it was disturbed in the middle"
    again = launched(home, *words, "--resume")
    assert again.wait(300) == 0, (home / "said.txt").read_text()
    assert facts_of_run(home)["weights"] == facts_of_run(straight)["weights"]


# ------------------------------------------------------------------------------------------------------------ many runs at once


MANY = {
    "bench": ["bench", "recipes", "--suite", "suite.yaml", "--seeds", "2", "--output", "out", "--write", "board.md"],
    "sweep": ["sweep", "recipes/plain.yaml", "train.lr=1e-3,1e-2", "train.steps=3,5", "evaluation=suite.yaml", "--output", "out"],
}


def facts_of_series(home: Path) -> dict[str, Any]:
    """Every run's weights and numbers, and what was said of them together."""
    runs = {path.parent.parent.relative_to(home).as_posix(): path for path in (home / "out").rglob("adapter_model.safetensors")}
    numbers = {name: json.loads((home / name / RESULTS).read_text())["numbers"] for name in runs}
    together = home / "out" / ("sweep.json" if (home / "out" / "sweep.json").is_file() else "leaderboard.json")
    said = json.loads(together.read_text())
    best = [(one["folder"], one["state"], one.get("score"), one.get("why")) for one in said.get("trials", ())]
    best += [(one["name"], one["state"], one["score"]["mean"]) for one in said.get("methods", ())]
    return {"weights": {name: sha256(path) for name, path in runs.items()}, "numbers": numbers, "best": best}


@pytest.mark.long
@pytest.mark.parametrize("verb", MANY)
def test_many_runs_that_are_killed_again_and_again(verb: str, bank: Bank, tmp_path: Path, make_model: Any, tokenizer: Any) -> None:
    """With all that they started, at random times; in the end all is as if nobody had disturbed them."""
    draw, env = random.Random(verb), {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def started(home: Path) -> psutil.Popen:
        with (home / "said.txt").open("ab") as said:
            words = [sys.executable, "-m", "llm_unlearn", *MANY[verb]]
            one = env | {"LLM_UNLEARN_CACHE": str(home / "cache")}
            return psutil.Popen(words, cwd=home, env=one, stdout=said, stderr=said, start_new_session=True)

    make_model(hidden_size=32, seed=1, initializer_range=0.02).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for name in ("straight", "cut"):
        (tmp_path / name / "recipes").mkdir(parents=True)
        for loss in ("npo", "ascent") if verb == "bench" else ("npo",):
            text = RECIPE.replace("BASE", str(bank.base)).replace("{name: npo}", f"{{name: {loss}}}")
            file = "plain" if verb == "sweep" else loss
            (tmp_path / name / "recipes" / f"{file}.yaml").write_text(f"# {loss}\n{text}")
        (tmp_path / name / "suite.yaml").write_text(f"{SUITE}retrained: {tmp_path / 'other'}\n")
    straight = started(tmp_path / "straight")
    begun = time.monotonic()
    assert straight.wait(600) in (0, 1), (tmp_path / "straight" / "said.txt").read_text()[-2000:]
    took = time.monotonic() - begun
    kills = 0
    for _ in range(8):
        running = started(tmp_path / "cut")
        try:
            running.wait(draw.uniform(0.1, 0.5) * took)
            break
        except psutil.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            kills += 1
            assert half_written(tmp_path / "cut") == []
    last = started(tmp_path / "cut")
    assert last.wait(600) == straight.returncode, (tmp_path / "cut" / "said.txt").read_text()[-2000:]
    assert kills >= 2 and facts_of_series(tmp_path / "cut") == facts_of_series(tmp_path / "straight")
    print(f"{verb}: killed {kills} times, {took:.0f} s undisturbed")
