"""Child processes, a few at a time: started, watched under one progress bar, and ended together when the user asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.bars import Bar
from llm_unlearn.training.signals import signals


@dataclass(frozen=True)
class Child:
    """One process: its name in the bar, its command, and the file that gets all it prints."""

    name: str
    command: Sequence[str]
    log: Path


def carry_out(children: Sequence[Child], jobs: int, environment: Mapping[str, str], done: int = 0) -> dict[str, str] | None:
    """Run them in order, at most `jobs` at a time; a first one alone, as it makes models and tables that all others use.

    Args:
        environment: of this process; the children share its threads.
        done: how many more there are, which are finished already.

    Returns:
        The names of those that failed -> how; None if Ctrl-C or SIGTERM ended those under way.
    """
    env, waiting, made = environment_of_a_child(environment, jobs), list(children), done > 0
    running: dict[subprocess.Popen[bytes], Child] = {}
    failures: dict[str, str] = {}
    with Bar("bench", done + len(waiting), "run", done=done, stays=True) as bar, signals() as asked:
        try:
            while (waiting or running) and not asked.is_set():
                while waiting and len(running) < (jobs if made else 1):
                    child = waiting.pop(0)
                    running[_start(child, env)] = child
                    bar.update(0, {"running": ", ".join(one.name for one in running.values())})
                asked.wait(0.1)
                ended = [process for process in running if process.poll() is not None]
                for process in ended if not asked.is_set() else []:  # Ctrl-C in a terminal reaches the children too
                    child = running.pop(process)
                    bar.update()
                    if process.returncode:
                        failures[child.name] = f"{_ended(process.returncode)}: {last_words(child.log)}"
                        print(f"{child.name} failed, {failures[child.name]}", file=sys.stderr)
                    made = made or not process.returncode
        finally:
            _end(running)
    return None if asked.is_set() else failures


def environment_of_a_child(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """The environment with the threads of this process shared out to the jobs; lines are written when they are printed."""
    env = {**environment, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        given = environment.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() else os.cpu_count() or 1
        env["OMP_NUM_THREADS"] = str(max(1, threads // jobs))
    return env


def _start(child: Child, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("wb") as log:
        return subprocess.Popen(
            child.command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


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


def _ended(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def last_words(log: Path) -> str:
    """The last line of a log that says what went wrong, else the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
    telling = [line for line in lines if re.match(r"(error: |stopped: |[\w.]+(Error|Exception)\b)", line)]
    return (telling or lines or ["it said nothing"])[-1][:300]
