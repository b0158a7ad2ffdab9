"""A comparison as a table in the terminal: few runs are columns beside each other, many are rows under each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_unlearn.outward import canvas
from llm_unlearn.report.leaderboard import COLUMNS, PIPED
from llm_unlearn.report.terminal import writable
from llm_unlearn.report.verdict import BAD, by_set, printable, shown, value_of

FEW = 4
"""So many runs stand beside each other; more stand under each other."""
CELL = 13
"""Columns that a value takes, with the space beside it."""
NAME = 24
"""Columns that must be left for the names of measures or runs."""


def print_comparison(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table that suits the number of runs, what each means if they are few, and the sentence for all.

    Args:
        comparison: what `comparison.json` holds.
        console: where to print; standard output when None.
    """
    console = console or Console(file=canvas("stdout"))
    if not console.is_terminal and console.width < PIPED:
        console.width = PIPED
    _say(console, f"{_count(comparison.get('all', len(comparison['runs'])))} on {comparison['suite']}", "bold")
    beside = len(comparison["runs"]) <= FEW and NAME + CELL * len(comparison["columns"]) <= console.width
    console.print(_measures(comparison, console) if beside else _runs(comparison, console))
    for note in comparison["notes"]:
        _say(console, note, "yellow")
    for reason in comparison["left_out"]:
        _say(console, f"left out: {reason}", "yellow")
    if beside:
        for run in comparison["runs"]:
            _say(console, f"{run['name']}: {run['headline']}", "red" if run["state"] == "collapsed" else "")
        console.print()
    _say(console, comparison["overall"], "bold")


def _count(runs: int) -> str:
    return f"{runs:,} run{'' if runs == 1 else 's'}"


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(_text(text, console, style))


def _text(content: str, console: Console, style: str = "") -> Text:
    return Text(writable(printable(content), console), style=style)


def _measures(comparison: Mapping[str, Any], console: Console) -> Table:
    """Rows are measures; columns the model before, each run, the retrained model."""
    columns = comparison["columns"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("measure", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(_text(column, console), justify="right", overflow="fold")
    for name, numbers in by_set({"numbers": comparison["numbers"]}).items():
        table.add_row(_text(name, console, "bold"))
        for number in numbers:
            cells = []
            for column in columns:
                value, word = value_of(number, column), number["judgements"].get(column, "")
                cells.append(_text("—" if value is None else shown(value), console, "yellow" if word in BAD else ""))
            table.add_row(_text(f"  {number['title']}", console), *cells)
    for key in ("forgotten", "kept", "score"):
        values = {str(run["name"]): run[key] for run in comparison["runs"]}
        cells = [_text(_score(values.get(column)) if column in values else "", console, "bold") for column in columns]
        table.add_row(_text(key, console, "bold"), *cells)
    return table


def _runs(comparison: Mapping[str, Any], console: Console) -> Table:
    """Rows are the model before, the runs, best first, and the retrained model; columns the scores, and measures as far as there
    is room."""
    longest = max(len(printable(str(name))) for name in comparison["columns"])
    room = max(0, console.width - min(longest, console.width // 3) - 42)
    measures = chosen(comparison)[: room // CELL]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("run", overflow="fold", min_width=min(longest, NAME))
    for head in ("forgotten", "kept", "score"):
        table.add_column(head, justify="right", no_wrap=True)
    for number in measures:
        table.add_column(
            _text(str(number["set"]), console) + "\n" + _text(number["title"], console),
            justify="right",
            overflow="fold",
            max_width=CELL - 2,
        )
    runs = {str(run["name"]): run for run in comparison["runs"]}
    for column in comparison["columns"]:
        run = runs.get(column)
        place = str(run["rank"] or run["state"]) + (" ●" if run["frontier"] else "") if run else ""
        scores = [_score(run[key]) if run else "" for key in ("forgotten", "kept", "score")]
        values = [value_of(number, column) for number in measures]
        cells = [place, column, *scores, *("—" if value is None else shown(value) for value in values)]
        style = "dim" if not run else "" if run["state"] == "ranked" else "yellow"
        table.add_row(*(_text(cell, console, style) for cell in cells))
    return table


def chosen(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measures that stand in a table of many runs: the leaderboard's as far as the suite has them, else its first ones."""
    known = {(number["set"], number["title"]): number for number in reversed(comparison["numbers"])}
    found = [known[key] for key in COLUMNS if key in known]
    return found or list(comparison["numbers"][: len(COLUMNS)])


def _score(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
