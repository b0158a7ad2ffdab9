"""Ctrl-C, SIGTERM and SIGHUP as a question that is answered at a good moment, not in the middle of something; and elsewhere as an
end that unwinds, so that what is under way is cleared away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""A node is to be free, or a terminal was closed."""
ONCE = 3.0
"""Seconds within which a second signal says the same again: schedulers and launchers both pass on what one of them was told."""
SOON = 0.05
"""Seconds after which a signal is asked again that came at a moment at which nothing can be ended."""


class Left(KeyboardInterrupt):
    """SIGTERM or SIGHUP came where there was no good moment to wait for."""


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP set the event instead of ending the process; a second one ends it at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        again = _again(number, first=not asked.is_set())
        asked.set()
        if again:
            raise KeyboardInterrupt if number == signal.SIGINT else Left

    with _instead((signal.SIGINT, *LEAVE), ask):
        yield asked


@contextmanager
def leaving() -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGHUP end what is under way as Ctrl-C does; a second one does not wait for that.

    Yields:
        The signals that came, here or inside `signals`, in their order.
    """
    _came.clear()
    if threading.current_thread() is not threading.main_thread():
        yield _came
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if _finalizes(frame):
            later = threading.Timer(SOON, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        first = not _came
        if _again(number, first):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif first:
            raise Left

    with _instead(LEAVE, leave):
        yield _came


def _finalizes(frame: FrameType | None) -> bool:
    """Whether this is a moment at which an object is done away with: Python drops what is raised there, and goes on."""
    while frame:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


_came: list[int] = []
_since: list[float] = [0.0]


def _again(number: int, first: bool) -> bool:
    """Note a signal; whether somebody means it a second time: Ctrl-C twice, or any after a while."""
    _came.append(number)
    if first:
        _since[0] = time.monotonic()
        return False
    return _came[-2:] == [signal.SIGINT] * 2 or time.monotonic() - _since[0] > ONCE


@contextmanager
def _instead(numbers: tuple[int, ...], action: object) -> Iterator[None]:
    """Signals with another action, but for a SIGHUP that somebody said is to be ignored, as nohup does."""
    before = {}
    for number in numbers:
        if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, action)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
