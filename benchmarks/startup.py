"""How long a user waits before anything happens: help, a refused recipe, and the first training step."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sides import Failed

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "llm_unlearn"]
PATIENCE = 600  # seconds


def measure(recipe: str, rounds: int, warm: bool, folder: Path, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of each, as often as asked.

    Args:
        warm: the cache is first filled by a run that does not count.
    """
    found: dict[str, list[float]] = {"help": [], "refused": [], "first step": []}
    for number in range(rounds):
        say(f"start: help and a refused recipe, round {number + 1} of {rounds}")
        found["help"].append(ended([*COMMAND, "--help"], 0))
        found["refused"].append(ended([*COMMAND, "run", recipe, "train.lrr=1"], 2))
    for number in range(0 if warm else 1, rounds + 1):
        say("start: first training step, " + (f"round {number} of {rounds}" if number else "filling the cache"))
        seconds = first_step(recipe, folder / f"run {number}")
        if number:
            found["first step"].append(seconds)
    return found


def ended(command: list[str], expected: int) -> float:
    """Seconds until a command has ended.

    Raises:
        Failed: it ended otherwise than expected.
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode != expected:
        raise Failed(f"{' '.join(command[2:])} ended with {done.returncode} instead of {expected}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def first_step(recipe: str, folder: Path) -> float:
    """Seconds from the command to the first line of `log.jsonl`; the run is then ended.

    Raises:
        Failed: it ended before.
    """
    log, errors = folder / "log.jsonl", folder.with_name(f"{folder.name}.txt")
    began = time.perf_counter()
    with errors.open("wb") as file:
        command = [*COMMAND, "run", recipe, f"output={folder}", "--overwrite"]
        process: Any = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        while not (log.is_file() and log.stat().st_size):
            if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                raise Failed(f"{' '.join(command[2:])} made no training step:\n{errors.read_text()[-2000:]}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
