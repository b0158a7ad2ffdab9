"""Who is at work in a run folder, so that others can tell a run under way from one that was killed; and how a run ended early."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from llm_unlearn.durable import make_folder
from llm_unlearn.folder import PROCESS, write
from llm_unlearn.spec import Refused, typed
from llm_unlearn.written import object_in

How = Literal["running", "interrupted", "failed"]


@dataclass(frozen=True)
class AtWork:
    """What `process.json` says."""

    pid: int
    began: float
    """When that process began, in seconds since 1970: the number of a process is given again."""
    host: str
    steps: int
    """Optimizer steps that the run will have, if nothing ends it before; 0 where that is not one number."""
    how: How = "running"
    reason: str = ""
    """Of a failure, the kind of error. Its words were printed, and stay out of the folder: they may repeat a row's."""

    @property
    def here(self) -> bool:
        """Whether it is one of this machine's processes, of which can be said whether it lives."""
        return self.host == platform.node()

    @property
    def alive(self) -> bool:
        """Whether it is at work, as far as can be known from here: the process of another machine is believed."""
        if self.how != "running" or not self.here:
            return self.how == "running"
        try:
            process = psutil.Process(self.pid)
            gone = process.status() == psutil.STATUS_ZOMBIE  # killed, and nobody asks how it ended, as in a container without init
            return not gone and abs(process.create_time() - self.began) < 1
        except (psutil.Error, ValueError, OverflowError):  # the latter of a number that no process can have
            return False


@contextmanager
def at_work(folder: Path, steps: int, active: bool) -> Iterator[list[How]]:
    """Inside, the run folder says that this process is at work, and afterwards, if the run was not finished, how it ended.

    Args:
        steps: as in `AtWork`.
        active: of several processes, one says so.

    Yields:
        A list for what to say of an end that is no error.

    Raises:
        Refused: another process is at work there.
    """
    ended: list[How] = []
    if not active:
        yield ended
        return
    mine = _me(steps)
    with turn(folder):
        _write(mine, folder)
    try:
        yield ended
    except KeyboardInterrupt:
        with suppress(OSError):
            _write(replace(mine, how="interrupted"), folder)
        raise
    except BaseException as error:
        with suppress(OSError):  # of a full disk, which is what is to be said
            _write(replace(mine, how="failed", reason=type(error).__name__), folder)
        raise
    if ended:
        _write(replace(mine, how=ended[-1]), folder)
    else:
        (folder / PROCESS).unlink(missing_ok=True)


def read(folder: Path) -> AtWork | None:
    """Who is, or was, at work in a run folder; None where the run is finished, or of an earlier version of the project."""
    try:
        return typed(AtWork, object_in(folder / PROCESS, ""), "", "")
    except Refused:
        return None


def alone(folder: Path) -> None:
    """Nobody else is at work in a run folder, as far as can be seen from here.

    Raises:
        Refused: another process of this machine is, such as one whose bench or sweep was killed.
    """
    other = read(folder)
    if other and other.here and other.alive and other.pid != os.getpid():
        raise Refused(f"output: process {other.pid} is at work in {folder}. Nothing was changed; wait for it, or end it first.")


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Inside, nobody is at work in a run folder, and no other process of this machine begins there: what was seen before data and
    models were read, minutes ago, may hold no longer.

    The folder above is locked, as the folder may not be there yet, and nothing is left beside it. Where the file system has no such
    locks, two that begin in the same instant do not see each other.

    Raises:
        Refused: another process is at work there.
    """
    make_folder(folder.parent)
    above = os.open(folder.parent, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(above, fcntl.LOCK_EX)
        alone(folder)
        yield
    finally:
        os.close(above)


def claim(folder: Path) -> None:
    """Say that this process is at work in a folder that it has begun in its turn; `at_work` goes on from there."""
    _write(_me(0), folder)


def _me(steps: int) -> AtWork:
    return AtWork(os.getpid(), psutil.Process().create_time(), platform.node(), steps)


def _write(one: AtWork, folder: Path) -> None:
    if folder.is_dir():  # nobody removed it meanwhile
        write(folder / PROCESS, json.dumps(asdict(one)))
