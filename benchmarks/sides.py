"""Child processes that take turns: each way of doing the work has one of its own, does what it is asked for, and says what it took.

On a CPU they are forked from a server that has imported all that both ways need, so that a start costs nothing and what stands
in memory before the work is the same. Where there is a GPU each begins afresh: what is imported may look at the device, and after
that nobody can be forked to use it. A child ends when its parent is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch", "peft", "accelerate", "transformers", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "torch.utils.checkpoint", "rouge_score.rouge_scorer", "llm_unlearn.run", "benchmarks.ours", "benchmarks.plain",
    "benchmarks.plain_suite",
]  # fmt: skip


class Turns:
    """The child's end: what it is asked for, one request after the other."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def next(self, answer: Any = None) -> Any:
        """Give the answer to the last request (at first, that all is ready), and wait for the next; None: there is none."""
        self.pipe.send(("done", answer))
        return self.pipe.recv()


class Failed(Exception):
    """A child could not go on; its last words."""


class Side:
    """The parent's end of a child."""

    def __init__(self, pipe: Connection, process: Any) -> None:
        self.pipe, self.process = pipe, process
        self.made = self.answer()  # what it said once it was ready

    def ask(self, request: Any) -> Any:
        """What the child answers.

        Raises:
            Failed: it met an error, or was killed.
        """
        self.pipe.send(request)
        return self.answer()

    def answer(self) -> Any:
        try:
            kind, found = self.pipe.recv()
        except EOFError:
            self.process.join()
            how = "out of memory?" if self.process.exitcode == -signal.SIGKILL else "see above"
            raise Failed(f"the child process ended with {self.process.exitcode} ({how})") from None
        if kind == "failed":
            raise Failed(found)
        return found


def begin() -> Any:
    """Start the server that children are forked from, which imports by itself while the caller goes on; gives how to start them."""
    if Path("/proc/driver/nvidia").exists():  # asked without torch, which is not imported yet
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return context


@contextlib.contextmanager
def side(work: Callable[..., None], *given: Any) -> Iterator[Side]:
    """A child that carries out `work(turns, *given)`, ready for its first request; it is gone afterwards, whatever happens."""
    context = begin()
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, work, given), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Side(mine, process)
    finally:
        with contextlib.suppress(OSError):
            mine.send(None)
        mine.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()


def _child(pipe: Connection, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    try:
        work(Turns(pipe), *given)
        pipe.send(("done", None))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone, or wants no more
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("failed", traceback.format_exc()))
