"""Programs that come with somebody's model, such as chat templates, get so much of the processor's time and no more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Endless(Exception):
    """It took longer than anything of its kind."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Inside, Python that takes more of this process's time is ended. Only the main thread can be, and not on Windows.

    Raises:
        Endless: it was.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Endless(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
