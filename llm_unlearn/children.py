"""Child processes, a few at a time: started, watched under one progress bar, and ended together when the user asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llm_unlearn.bars import Bar
from llm_unlearn.folder import new_file
from llm_unlearn.training.signals import signals


@dataclass(frozen=True)
class Child:
    """One process: its name in the bar, its command, and the file that gets all it prints."""

    name: str
    command: Sequence[str]
    log: Path
    files: Sequence[int] = ()
    """Open files that it gets besides, such as a lock that is to be held as long as it lives."""


class Orders(Protocol):
    """Says which child comes next, and hears how each ended."""

    @property
    def done(self) -> int:
        """How many are behind us, those that were finished before included."""

    def next(self) -> Child | None:
        """The next child; None where there is none now. Asked again as long as others run."""

    def ended(self, child: Child, status: int) -> str:
        """What is to be said of a child that ended with this exit status; "" for nothing."""

    def unwanted(self, running: Iterable[Child]) -> Iterable[Child]:
        """Those under way that are to end at their next step; each is named once."""


@dataclass
class InOrder:
    """Orders of a list: one after the other, each to its end."""

    waiting: list[Child]
    done: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def next(self) -> Child | None:
        return self.waiting.pop(0) if self.waiting else None

    def ended(self, child: Child, status: int) -> str:
        self.done += 1
        if not status:
            return ""
        self.failures[child.name] = f"{how_it_ended(status)}: {last_words(child.log)}"
        return f"{child.name} failed, {self.failures[child.name]}"

    def unwanted(self, running: Iterable[Child]) -> Iterable[Child]:
        return ()


def carry_out(children: Sequence[Child], jobs: int, environment: Mapping[str, str], done: int = 0) -> dict[str, str] | None:
    """Run them in order, at most `jobs` at a time; a first one alone, as it makes models and tables that all others use.

    Args:
        environment: of this process; the children share its threads.
        done: how many more there are, which are finished already.

    Returns:
        The names of those that failed -> how; None if Ctrl-C or SIGTERM ended those under way.
    """
    orders = InOrder(list(children), done)
    with Bar("bench", done + len(children), "run", done=done, stays=True) as bar:
        finished = keep_busy(orders, jobs, environment, bar, made=done > 0)
    return orders.failures if finished else None


def keep_busy(orders: Orders, jobs: int, environment: Mapping[str, str], bar: Bar, made: bool) -> bool:
    """Run what the orders say, at most `jobs` at a time, until they say nothing more and nothing runs.

    Args:
        bar: counts those that ended.
        made: whether models and tables that all use are there; else a first one runs alone, and makes them.

    Returns:
        False if Ctrl-C or SIGTERM ended those under way.
    """
    env = environment_of_a_child(environment, jobs)
    running: dict[subprocess.Popen[bytes], Child] = {}
    with signals() as asked:
        try:
            while not asked.is_set():
                while len(running) < (jobs if made else 1) and (child := orders.next()):
                    running[_start(child, env)] = child
                    bar.update(0, {"running": ", ".join(one.name for one in running.values())})
                if not running:
                    break
                asked.wait(0.1)
                ended = [process for process in running if process.poll() is not None]
                for process in ended if not asked.is_set() else []:  # Ctrl-C in a terminal reaches the children too
                    child = running.pop(process)
                    if said := orders.ended(child, process.returncode):
                        print(said, file=sys.stderr)
                    bar.update(orders.done - bar.n, {"running": ", ".join(one.name for one in running.values())})
                    made = made or not process.returncode
                for child in list(orders.unwanted(running.values())):
                    next(process for process, one in running.items() if one is child).terminate()
        finally:
            _end(running)
    return not asked.is_set()


def environment_of_a_child(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """The environment with the threads of this process shared out to the jobs; lines are written when they are printed."""
    env = {**environment, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        given = environment.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() else os.cpu_count() or 1
        env["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return env


def _start(child: Child, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with new_file(child.log) as log:
        return subprocess.Popen(
            child.command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            pass_fds=child.files,
        )  # fmt: skip


def _end(running: Mapping[subprocess.Popen[bytes], Child]) -> None:
    """Ask the children to end and wait for them, as each writes a checkpoint; a second Ctrl-C ends them at once."""
    if not running:
        return
    names = ", ".join(child.name for child in running.values())
    print(f"\nending {names}, each at its next step; Ctrl-C again ends at once", file=sys.stderr)
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def how_it_ended(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def last_words(log: Path) -> str:
    """The last line of a log that says what went wrong, else the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
    telling = [line for line in lines if re.match(r"(error: |bug: |stopped: |[\w.]+(Error|Exception)\b)", line)]
    return (telling or lines or ["it said nothing"])[-1][:300]
