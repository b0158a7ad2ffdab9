"""What a sweep leaves: a table in the terminal, every trial as data, the plot, the page of the frontier, and the chosen recipe.

OUTPUT/
    trial-0007/        a run folder like any other, see folder.py; what it printed is in logs/
    sweep.json         every trial: settings, numbers, state, seconds
    frontier.svg       what each forgot against what it kept
    comparison.html    the runs on the frontier beside each other, with comparison.json
    chosen.yaml        the recipe of the chosen trial, to be launched as it is
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn import compare, folder
from llm_unlearn.outward import canvas
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.verdict import printable
from llm_unlearn.spec import Refused, plain, to_yaml
from llm_unlearn.sweeping.study import Trial
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST

DATA, PLOT, CHOSEN = "sweep.json", "frontier.svg", "chosen.yaml"
MAKER = "llm-unlearn sweep"
LEGEND = "●  frontier: nothing beats it     ○  other trials     ✖ ▼  collapsed, ▼ below this plot     numbers: trials"
PIPED = 120
"""Columns of the terminal's table where there is no terminal."""


def print_front(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> None:
    """The trials that nothing beats, most forgotten first, with their settings."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llm_unlearn.report.terminal import writable

    front = sorted((row for row in rows if row["frontier"]), key=lambda row: -float(row["forgotten"]))
    if not front:
        return
    console = Console(file=canvas("stdout"))
    if not console.is_terminal:
        console.width = PIPED
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    keys = list(front[0]["settings"])
    for name in ("trial", "forgotten", "kept", "score", *keys):
        table.add_column(
            Text(writable(printable(name), console)),
            overflow="fold",
            justify="right" if name in ("trial", "forgotten", "kept", "score") else "left",
        )
    for row in front:
        mine = chosen is not None and row["number"] == chosen["number"]
        numbers = (f"{row[key]:.3f}" for key in ("forgotten", "kept", "score"))
        cells = [f"{'→ ' if mine else ''}{row['number']}", *numbers, *(_shown(row["settings"][key]) for key in keys)]
        table.add_row(*(Text(writable(printable(cell), console), style="bold" if mine else "") for cell in cells))
    console.print(table)


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_plot(board: Mapping[str, Any], output: Path) -> None:
    """All trials that have numbers, the frontier marked."""
    from llm_unlearn.report.frontier import frontier_svg

    folder.write(output / PLOT, frontier_svg(board, legend=LEGEND, maker=MAKER))


def write_page(front: Sequence[str], output: Path) -> Path | None:
    """The runs on the frontier beside each other; None where their folders are not all here, or differ in what was asked."""
    from llm_unlearn.report.comparison import comparison_of
    from llm_unlearn.report.likeness import comparable

    try:
        runs, notes = comparable(compare.read([output / name for name in front])) if front else ([], [])
    except Refused:
        runs = []
    if not runs:
        for name in (compare.PAGE, compare.RESULTS):  # of an earlier frontier
            (output / name).unlink(missing_ok=True)
        return None
    compare.write(comparison_of(runs, notes), runs, output)
    return output / compare.PAGE


def write_chosen(wanted: Recipe, why: Sequence[str], output: Path) -> Path:
    """The whole recipe of a trial, flattened, as a file that is launched.

    Args:
        wanted: with the folder of a run of its own.
        why: comment lines: which trial of which sweep it is.
    """
    path = output / CHOSEN
    body = to_yaml(plain(wanted))
    head = "".join(f"# {printable(line)}\n" for line in why)
    if '"""' in body:  # text of the recipe's own would end the string that Python reads
        folder.write(path, f"{head}#   llm-unlearn run {path} [key=value ...]\n{body}")
    else:
        start = f"#   accelerate launch {path} [key=value ...]\n{LAUNCH_FIRST}\n"
        folder.write(path, f"{head}{start}{body}{LAUNCH_LAST}\n")
    return path


def count_of(trials: Sequence[Trial]) -> dict[str, int]:
    """State -> how many trials are in it."""
    return {state: sum(one.state == state for one in trials) for state in ("complete", "pruned", "failed", "running")}


def counted(count: Mapping[str, int]) -> str:
    """The states in words, those of none left out."""
    words = {"complete": "with numbers", "pruned": "ended early", "failed": "failed", "running": "under way elsewhere, or left"}
    return ", ".join(f"{count[state]} {text}" for state, text in words.items() if count[state]) or "none yet"


def write_data(data: Mapping[str, Any], output: Path) -> None:
    """Everything, for scripts."""
    folder.write(output / DATA, json.dumps(data, indent=1, ensure_ascii=False))
