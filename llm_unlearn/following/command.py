"""The verb `show`: what a run is and where it stands, once or until it ends."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.folder import RESULTS, results_in
from llm_unlearn.following.standing import age, standing
from llm_unlearn.following.state import UNDER_WAY
from llm_unlearn.outward import canvas
from llm_unlearn.reply import Reply

EVERY = 1.0
"""Seconds between two looks of `--follow` in a terminal."""
SELDOM = 10.0
"""And between two lines where there is none."""


def show(options: argparse.Namespace) -> Reply:
    """Print where a folder stands, and with `--follow` go on until nobody is at work there."""
    facts = _look(options.folder)
    if options.follow:
        try:
            facts = _follow(options.folder, facts)
        except KeyboardInterrupt:
            return Reply(facts=facts)  # whoever looks may leave
    from llm_unlearn.report.standing import print_standing

    measured = facts["kind"] in ("run", "store", "evaluation") and (options.folder / RESULTS).is_file()
    print_standing(facts, results_in(options.folder) if measured else None)
    return Reply(facts=facts)


def _look(folder: Path) -> dict[str, Any]:
    return standing(folder) | {"age": age(folder)}


def _follow(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Draw the course again and again where that can be done, else say a line now and then; what stands at the end."""
    from rich.console import Console
    from rich.live import Live

    from llm_unlearn.report.standing import drawn

    console = Console(file=canvas("stdout"))
    if not console.file.isatty() or console.is_dumb_terminal:
        while facts["state"] in UNDER_WAY or facts["state"] == "running":
            print(_line(facts), file=sys.stdout, flush=True)
            facts = _wait(folder, facts, SELDOM)
        return facts
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while facts["state"] in UNDER_WAY or facts["state"] == "running":
            live.update(drawn(facts, console), refresh=True)
            facts = _wait(folder, facts, EVERY)
    return facts


def _wait(folder: Path, facts: Mapping[str, Any], longest: float) -> dict[str, Any]:
    """The next look: after so long, or as soon as the state is another."""
    until, found = time.monotonic() + longest, dict(facts)
    while time.monotonic() < until and found["state"] == facts["state"]:
        time.sleep(min(EVERY, longest))
        found = _look(folder)
    return found


def _line(facts: Mapping[str, Any]) -> str:
    counted = facts.get("runs") or facts.get("trials") or {}
    if facts["kind"] in ("bench", "sweep"):
        return ", ".join([f"{facts['folder']}: {facts['state']}", *(f"{count} {state}" for state, count in counted.items())])
    last = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in (facts.get("last") or {}).items()]
    step = f"step {facts.get('step', 0)}" + (f" of {facts['steps']}" if facts.get("steps") else "")
    return ", ".join([f"{facts['folder']}: {facts['state']}", step, *last])
