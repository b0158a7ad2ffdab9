"""Where the time goes: functions of the project are timed from outside, and every second belongs to the innermost one that runs."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

REST = "everything else"


class Clock:
    """Seconds of each stage.

    Args:
        now: the time; processor time where other jobs are to count little.
        whole: stages whose calls of others are theirs.
        wait: called before each look at the time, for devices that work on behind the program.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        whole: frozenset[str] = frozenset(),
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.now, self.whole, self.wait = now, whole, wait
        self.seconds: Counter[str] = Counter()  # of floats
        self.running = [REST]
        self.since = now()

    def turn(self) -> None:
        if self.wait:
            self.wait()
        now = self.now()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if self.running[-1] in self.whole:
                return function(*given, **named)
            self.turn()
            self.running.append(stage)
            try:
                return function(*given, **named)
            finally:
                self.turn()
                self.running.pop()

        return call


@contextmanager
def watched(clock: Clock, stages: Mapping[str, Sequence[tuple[Any, str]]]) -> Iterator[None]:
    """Inside, the functions of every stage are timed.

    Args:
        stages: stage -> where its functions are looked up, and their names.

    Raises:
        SystemExit: one is not there (any more): what is measured has changed, and the stages with it.
    """
    for stage, functions in stages.items():
        for place, name in functions:
            if not hasattr(place, name):
                where = getattr(place, "__name__", place)
                raise SystemExit(f"stage {stage!r}: {where} has no {name!r} any more; mend the benchmark's STAGES.")
    with ExitStack() as changes:
        for stage, functions in stages.items():
            for place, name in functions:
                found = inspect.getattr_static(place, name)
                timed = clock.timed(stage, getattr(place, name))
                changes.enter_context(patch.object(place, name, staticmethod(timed) if isinstance(found, staticmethod) else timed))
        yield
