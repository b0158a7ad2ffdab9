"""Where a run stands, in the terminal: state, course, curves, verdict, files, and what can be done next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_unlearn.bars import span
from llm_unlearn.outward import canvas
from llm_unlearn.report.terminal import NARROW, print_table, writable
from llm_unlearn.report.verdict import printable, shown

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
"""What a curve is drawn with; the second where the terminal writes no other."""
COLORS = {"finished": "green", "failed": "bold red", "killed": "red", "interrupted": "yellow", "unfinished": "yellow"}
SAID = {
    "beginning": "under way: the model before is looked at",
    "training": "under way: training",
    "measuring": "under way: measuring",
    "killed": "killed: its process is gone, and said nothing",
    "unfinished": "not finished",
}


def print_standing(facts: Mapping[str, Any], results: Mapping[str, Any] | None, console: Console | None = None) -> None:
    """Print all there is to say.

    Args:
        facts: what `following.standing` found.
        results: what `evaluation.json` holds, for its table.
        console: where to print; standard output when None.
    """
    console = console or Console(file=canvas("stdout"))
    width = min(console.width, NARROW)
    console.print(drawn(facts, console), width=width)
    if results:
        print_table(results, console)
    table = Table.grid(padding=(0, 2))
    for one in facts["files"]:
        table.add_row(Text(size(one["bytes"]), justify="right", style="dim"), _text(one["name"], console))
    console.print()
    console.print(table, width=width)
    for i, command in enumerate(facts["next"]):
        console.print(_text(f"{'next' if i == 0 else '  or'}  {command}", console, "bold" if i == 0 else ""), soft_wrap=True)


def drawn(facts: Mapping[str, Any], console: Console) -> RenderableType:
    """State and course, as they are drawn again and again where somebody follows."""
    table = Table.grid(padding=(0, 2))
    for name, words, style in _lines(facts):
        table.add_row(Text(name, style="dim"), _text(words, console, style))
    parts: list[RenderableType] = [_text(f"{facts['folder']}  {facts['kind']}", console, "bold"), table]
    if curves := facts.get("curves"):
        parts.append(_curves(facts, curves, console))
    if facts.get("headline") and facts["kind"] != "run":
        parts.append(_text(facts["headline"], console))
    return Group(*parts)


def _lines(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, words, style) of what is known."""
    state, lines = facts["state"], list[tuple[str, str, str]]()
    reason = f" ({facts['reason']}; its words stand where it ran)" if facts.get("reason") else ""
    run = facts.get("run") or {}
    ended = f", {run['status']}: {run['reason']}" if run.get("reason") else ""
    where = f", on {facts['host']}, as far as its files say" if facts.get("host") else ""
    lines.append(("state", SAID.get(state, state) + reason + ended + where, COLORS.get(state, "cyan")))
    losses = ", ".join(f"{name} {loss}" for name, loss in (facts.get("objective") or {}).items())
    for name, words in (
        ("recipe", facts.get("hash")), ("model", facts.get("base")), ("method", facts.get("method")), ("objective", losses),
        ("suite", facts.get("suite")), ("verdict", facts.get("verdict")), ("steps", _course(facts)), ("pieces", _pieces(facts)),
        ("runs", _counted(facts, "runs")), ("trials", _counted(facts, "trials")), ("best so far", _best(facts)),
        ("chosen", facts.get("chosen")),
    ):  # fmt: skip
        if words:
            lines.append((name, str(words), ""))
    return lines


TRIALS = {"complete": "with numbers", "pruned": "ended early", "running": "under way"}
"""States of trials as people say them."""


def _counted(facts: Mapping[str, Any], name: str) -> str:
    """How many runs or trials are in which state, and how many there are to be."""
    count = facts.get(name, {})
    total = f"; {facts['wanted']:,} are wanted" if facts.get("wanted") else ""
    return ", ".join(f"{number:,} {TRIALS.get(state, state)}" for state, number in count.items()) + total if count else ""


def _best(facts: Mapping[str, Any]) -> str:
    if not (best := facts.get("best")):
        return ""
    return f"{best['folder']}: forgotten {best['forgotten']:.3f}, kept {best['kept']:.3f}, score {best['score']:.3f}"


def _course(facts: Mapping[str, Any]) -> str:
    """How far, how fast, how much longer."""
    if not facts.get("step"):
        return ""
    total = f" of {facts['steps']:,}" if facts.get("steps") else ""
    parts = [f"{facts['step']:,}{total}"]
    if seconds := facts.get("seconds_per_step"):
        parts.append(f"{shown(seconds)} s each")
    if tokens := facts.get("tokens_per_second"):
        parts.append(f"{tokens:,.0f} tokens/s")
    if facts.get("seconds_left"):
        parts.append(f"{span(facts['seconds_left'])} left")
    if facts["state"] in ("beginning", "training", "measuring") and facts.get("age") is not None:
        parts.append(f"last line {span(facts['age'])} ago")
    return ", ".join(parts)


def _pieces(facts: Mapping[str, Any]) -> str:
    if "pieces" not in facts:
        return ""
    words = f"{facts['pieces']} there" + (f", of {facts['lines']} lines" if facts["lines"] else "")
    if facts["steps_under_way"]:
        words += f", {len(facts['steps_under_way'])} under way at step {', '.join(map(str, facts['steps_under_way']))}"
    if facts["serving"]:
        words += f", {facts['serving']} serve"
    return words + f"; {facts['deleted_rows']} of {facts['rows']} rows are deleted"


def _curves(facts: Mapping[str, Any], curves: Mapping[str, Sequence[float]], console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=24)
    for name in ("first", "last"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("course", no_wrap=True)
    for name, values in curves.items():
        label = _text(name.replace("_", " "), console)
        table.add_row(label, shown(facts["first"][name]), shown(facts["last"][name]), Text(spark(values, console)))
    return table


def spark(values: Sequence[float], console: Console) -> str:
    """A curve, one sign for each value, between the smallest and the largest of them."""
    signs = BLOCKS if writable(BLOCKS, console) == BLOCKS else PLAIN
    low, high = min(values), max(values)
    if high <= low:
        return signs[0] * len(values)
    return "".join(signs[min(len(signs) - 1, int((value - low) / (high - low) * len(signs)))] for value in values)


def size(count: int) -> str:
    """Bytes as people say them."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"


def _text(words: str, console: Console, style: str = "") -> Text:
    return Text(writable(printable(words), console), style=style)
