"""Faults at every stage: whatever ends a command, nothing is half-written, the message says what goes on, and that leads to the
bits of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fault_jobs import JOBS, Bank, Ended, difference, half_written
from faults import forks

pytestmark = pytest.mark.slow
KILLED = (-9,)
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
        *operations(bank, "run", "torn", 3, "killed in the middle of a file", WRITERS),
        *operations(bank, "forget", "torn", 6, "killed in the middle of a file", WRITERS),
        *operations(bank, "run", "strict", 6, "power cut, nothing kept that was not synced"),
        *operations(bank, "forget", "strict", 8, "power cut, nothing kept that was not synced", first=3),
        *operations(bank, "requests", "strict", 16, "power cut, nothing kept that was not synced", first=5),
        *operations(bank, "run", "names", 6, "power cut, names kept, contents lost", first=2),
        *operations(bank, "forget", "names", 8, "power cut, names kept, contents lost", first=5),
        *operations(bank, "requests", "names", 16, "power cut, names kept, contents lost", first=11),
        *operations(bank, "run", "mixed", 8, "power cut, some names lost", first=3),
        *operations(bank, "run", "full", 7, "disk full"),
        *operations(bank, "forget", "full", 13, "disk full", first=2),
        *operations(bank, "requests", "full", 20, "disk full", first=3),
        *operations(bank, "run", "closed", 16, "disk turns read-only"),
        *operations(bank, "run", "SIGTERM", 9, "SIGTERM", first=4),
        *operations(bank, "exact", "SIGTERM", 60, "SIGTERM", first=4),
        *operations(bank, "forget", "SIGTERM", 30, "SIGTERM", first=4),
        *operations(bank, "requests", "SIGTERM", 40, "SIGTERM", first=4),
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
        *at_places("run", "kill", "killed before and after a stage", ["gradient", "move", "look"], (3,)),
        *at_places("run", "memory", "out of memory", ["gradient", "look"]),
        *at_places("run", "cuda memory", "out of memory", ["gradient"], (5,)),
        *at_places("run", "allocator", "out of memory", ["gradient"], (7,)),
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
    if not wrong:
        wrong += [f"--resume: {line}" for line in difference(bank.facts[case.job], job.facts(home))]
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
        lines = [line for line in said.splitlines() if line.startswith("error: ") and text in line and "To go on" in line]
        if ended.status != 2 or len(lines) != 1:
            yield f"status {ended.status}: {said[-1500:]}"
    elif ended.status != 2 or "out of memory" not in said or "goes on" not in said:
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


@pytest.mark.long
def test_every_fault_is_recovered_from(bank: Bank) -> None:
    cases = campaign(bank)
    assert len(cases) >= 200
    assert not carry_out(bank, cases)
