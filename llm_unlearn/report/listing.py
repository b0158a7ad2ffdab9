"""Methods, or deletion requests, as a table in the terminal; where it is piped, one line each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_unlearn.catalogue import Method, needs_of, terms_of
from llm_unlearn.outward import canvas
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.terminal import writable
from llm_unlearn.report.verdict import printable

WIDE, LINE = 160, 1000
"""Widest table in a terminal, and in a pipe, where `grep` wants each method on a line of its own."""
MANY = 1000
"""More lines than these are written without a frame."""


def print_methods(found: Sequence[tuple[Method, Recipe]], console: Console | None = None) -> None:
    """Print what each method does, its paper, its losses and what it needs.

    Args:
        console: where to print; standard output when None.
    """
    console, terminal = _sized(console)

    def text(content: str, style: str = "") -> Text:
        return Text(writable(printable(content), console), style=style)

    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=terminal)
    table.add_column("method", no_wrap=True)
    for name, share in (("what it does", 5), ("objective", 2), ("needs", 2)):
        table.add_column(name, overflow="fold", ratio=share if terminal else None)
    for method, recipe in found:
        about = text(method.sentence)
        if method.paper:
            about.append_text(text(f" ({method.paper})", "dim"))
        table.add_row(text(method.name, "bold"), about, text(terms_of(recipe)), text(", ".join(needs_of(recipe))))
    console.print(table)


def print_requests(found: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Print requests, a line each: number, state, kind, rows, due, model, added, reason."""
    console, _ = _sized(console)
    if len(found) > MANY:  # a table is laid out as a whole, which takes minutes for a hundred thousand
        widths = [max(map(len, column)) for column in zip(*found, strict=True)]
        for cells in found:
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            console.file.write(writable(printable(line, LINE), console) + "\n")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("request", "state", "found by", "rows", "due", "model", "added", "reason"):
        table.add_column(name, overflow="fold", justify="right" if name in ("request", "rows") else "left")
    for cells in found:
        urgent = "needs attention" in cells[1] or "overdue" in cells[4]
        table.add_row(*(Text(writable(printable(cell), console), style="yellow" if urgent else "") for cell in cells))
    console.print(table)


def print_findings(found: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """Print what was looked at, a line each: what, its state, what is said of it."""
    console, _ = _sized(console)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for what, state, said in found:
        cells = (writable(printable(cell), console) for cell in (what, state, said))
        table.add_row(*(Text(cell, style=style) for cell, style in zip(cells, ("", styles[state], ""), strict=True)))
    console.print(table)


def _sized(console: Console | None) -> tuple[Console, bool]:
    """A console of the right width, and whether it is a terminal."""
    console = console or Console(file=canvas("stdout"))
    console.width = min(console.width, WIDE) if console.is_terminal else LINE
    return console, console.is_terminal
