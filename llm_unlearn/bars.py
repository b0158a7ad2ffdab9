"""How far long work has come: a bar in a terminal; where standard error is none, a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from llm_unlearn.outward import canvas

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

T = TypeVar("T")

LINES = 40
"""Without a terminal, work says about so many lines at most."""
SECONDS = 3.0
"""And between two of them passes at least this long."""
SILENT = 1.0
"""Work that leaves nothing in a terminal says nothing without one, if it is done within this time."""
REFRESH = 2
"""Times a second that a terminal is drawn anew."""


@cache
def console() -> Console:
    """Standard error, one for all bars: those inside others are drawn below them."""
    from rich.console import Console

    return Console(file=canvas("stderr"), highlight=False)


def in_terminal() -> bool:
    """Whether what is written to standard error can be drawn over."""
    return console().file.isatty() and not console().is_dumb_terminal


class Bar:
    """A count that people can follow, and beside it what there is to say, in a `with`.

    What is printed meanwhile stands above the bar. Nothing but the count may be asked of it, so that a silent one serves as well.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, quiet: bool = False, stays: bool = False) -> None:
        """
        Args:
            done: of an earlier session.
            quiet: show nothing; of several processes, one speaks.
            stays: the bar is left in the terminal at its end; without one, the first and the last count are always said.
        """
        self.title, self.total, self.unit, self.n, self.done = title, total, unit, done, done
        self.facts: Mapping[str, str] = {}
        self.stays = stays
        self._shown: _Drawn | _Lines | None = None
        if not quiet:
            self._shown = _Drawn(self) if in_terminal() else _Lines(self)

    def __enter__(self) -> Bar:
        if self._shown:
            self._shown.begin()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._shown.end()

    def update(self, n: int = 1, facts: Mapping[str, str] | None = None) -> None:
        """So much more is done; `facts`, name -> value, stand beside it until others do."""
        self.n += n
        self.facts = self.facts if facts is None else facts
        if self._shown:
            self._shown.moved()

    def more(self, n: int) -> None:
        """So much more is to do than was known."""
        self.total += n


def walk(items: Sequence[T], title: str, unit: str, quiet: bool = False) -> Iterator[T]:
    """The items, each counted when it is done."""
    with Bar(title, len(items), unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()


class _Drawn:
    """A bar in a terminal, drawn by a thread a few times a second."""

    def __init__(self, bar: Bar) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        count = TextColumn("{task.fields[unit]} {task.completed:,.0f} / {task.total:,.0f}", table_column=Column(no_wrap=True))
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True))
        self.bar, self.progress = bar, Progress(title, BarColumn(24), count, left, console=console(), expand=True)
        self.task = self.progress.add_task(bar.title, total=bar.total, completed=bar.done, unit=bar.unit)
        self.live = Live(
            get_renderable=self._all, console=console(), refresh_per_second=REFRESH, transient=not bar.stays,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a file goes there
        )  # fmt: skip

    def begin(self) -> None:
        self.live.start()

    def end(self) -> None:
        self.live.stop()

    def moved(self) -> None:
        self.progress.update(self.task, completed=self.bar.n, total=self.bar.total)

    def _all(self) -> RenderableType:
        """The bar, and what there is to say in columns below it, no wider than people read."""
        from rich.columns import Columns
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.text import Text

        facts = [Text.assemble(f"{name} ", (value, "bold"), no_wrap=True) for name, value in self.bar.facts.items()]
        drawn = self.progress.make_tasks_table(self.progress.tasks)
        return Constrain(Group(drawn, Columns(facts, padding=(0, 3))) if facts else drawn, WIDE)


WIDE = 100
"""Columns of a bar and what stands below it, however wide the terminal is."""


class _Lines:
    """The same without a terminal: a line now and then, without control characters."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.said, self.began = bar, bar.done, time.monotonic()
        self.at = -math.inf if bar.stays else self.began

    def begin(self) -> None:
        """Nothing is done yet."""

    def end(self) -> None:
        """The last count, if it was not said."""
        waited = time.monotonic() - self.began >= SILENT or self.bar.stays
        if self.said != self.bar.n and waited:
            self._say()

    def moved(self) -> None:
        """Say it, if enough was done since the last line, and enough time has passed."""
        bar = self.bar
        enough = bar.n - self.said >= math.ceil(bar.total / LINES) or self.at == -math.inf
        if enough and time.monotonic() - self.at >= SECONDS:
            self._say()

    def _say(self) -> None:
        bar, now = self.bar, time.monotonic()
        done, left = bar.n - bar.done, bar.total - bar.n
        parts = [f"{bar.title}: {bar.unit} {bar.n:,} of {bar.total:,}", *(f"{name} {value}" for name, value in bar.facts.items())]
        if left > 0 and done > 0:
            parts.append(f"{span((now - self.began) * left / done)} left")
        self.said, self.at = bar.n, now
        print(", ".join(parts), file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
