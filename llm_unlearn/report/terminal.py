"""The numbers of an evaluation as a table in the terminal, with what they mean under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_unlearn.outward import canvas
from llm_unlearn.report.headline import has_collapsed, headline
from llm_unlearn.report.summary import thresholds_of
from llm_unlearn.report.verdict import BAD, Number, by_set, columns_of, gained, judge, printable, shown

NARROW = 100
"""The table is no wider than this, however wide the terminal is."""


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the numbers grouped by set, forget first, one column per model, and the headline under them.

    Args:
        results: what `evaluation.json` holds.
        console: where to print; standard output when None.
    """
    console = console or Console(file=canvas("stdout"))

    def text(content: str, style: str = "") -> Text:
        return Text(writable(printable(content), console), style=style)

    columns = columns_of(results)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("measure", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(text(column), justify="right", overflow="fold")
    table.add_column("judgement", overflow="fold")
    for name, numbers in by_set(results).items():
        table.add_row(text(name, "bold"))
        for number in numbers:
            word = judge(number)
            cells = [text(_value(number, column)) for column in columns]
            table.add_row(text(f"  {number['title']}"), *cells, text(word, "yellow" if word in BAD else ""))
    width = min(console.width, NARROW)
    console.print(text(str(results["title"]), "bold"), width=width)
    console.print(table, width=width)
    if attacks := results.get("attacks"):
        console.print(_attacks(attacks, columns, text), width=width)
    for words, holds in _thresholds(results):
        console.print(text(words, "" if holds else "yellow"), width=width)
    for reason, places in _reasons(results).items():
        console.print(text(f"— {reason} ({places})", "dim"), width=width)
    console.print()
    console.print(text(headline(results), "bold red" if has_collapsed(results) else ""), width=width)


def _attacks(attacks: Sequence[Mapping[str, Any]], columns: Sequence[str], text: Callable[..., Text]) -> Table:
    """One line for each attack: what it gets from each model at its best, and what the gap to the control is."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold", min_width=12)
    for name in (*columns, "gap", "came back"):
        table.add_column(text(name), justify="right", overflow="fold")
    for one in attacks:
        values = [text(shown(float(found["value"])) if (found := gained(one, column)) else "—") for column in columns]
        gap, share = one["gap"]["gap"], one["gap"]["came_back"]
        back = text("" if share is None else f"{100 * share:.0f} %", "yellow" if one["gap"]["leaks"] else "")
        table.add_row(
            text(f"{one['title']}: {one['y']['name'].replace('_', ' ')}"), *values, text("" if gap is None else f"{gap:+.3f}"), back
        )
    return table


def _thresholds(results: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """A line for each threshold: what was asked, what came, and whether it holds."""
    lines = []
    for one in thresholds_of(results):
        said = f"{one['measure']} on {one['set']}: asked {one['asked']}, came {one['value']}"
        lines.append((f"{'holds' if one['holds'] else 'DOES NOT HOLD'}  {said}", bool(one["holds"])))
    return lines


def _value(number: Number, column: str) -> str:
    value = number["values"].get(column, {}).get("value")
    return "—" if value is None else shown(float(value))


def _reasons(results: Mapping[str, Any]) -> dict[str, str]:
    """Why values are missing -> where, each reason once."""
    places: dict[str, list[str]] = {}
    for number in results["numbers"]:
        for column, found in number["values"].items():
            if found.get("value") is None:
                places.setdefault(str(found.get("missing", "")), []).append(f"{number['title']}, {column}")
    for attack in results.get("attacks", ()):
        for column, curve in attack["curves"].items():
            if "missing" in curve:
                places.setdefault(str(curve["missing"]), []).append(f"{attack['title']}, {column}")
    most = 3
    return {
        reason: "; ".join(found[:most]) + (f"; {len(found) - most} more" if len(found) > most else "")
        for reason, found in places.items()
    }


def writable(text: str, console: Console) -> str:
    """What the console's encoding cannot write becomes its plainest likeness, else a question mark."""
    if console.encoding.lower().replace("-", "").startswith("utf"):
        return text
    plain = text.translate({ord("–"): "-", ord("—"): "-", ord("−"): "-", ord("½"): "1/2", ord("…"): "..."})
    return plain.encode(console.encoding, "replace").decode(console.encoding)
