"""A lock on a file that the kernel holds for a process, and lets go of when the process is gone, however it went.

It is handed on to a child process, and then is held until the child is gone too: a run that goes on after its sweep was killed is
not begun a second time beside itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from llm_unlearn.spec import Refused


class Held:
    """One lock, from `take` until `release`."""

    def __init__(self, file: int) -> None:
        self.file = file
        """The open file, for a child process to have as well."""

    @staticmethod
    def take(path: Path, wait: bool = False) -> Held | None:
        """Lock a file, which is made where there is none; None if somebody else holds it.

        Args:
            wait: until nobody does.

        Raises:
            Refused: the file system has no locks.
        """
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            os.close(file)
            raise Refused(
                f"--output: {path} cannot be locked ({error}). Choose a folder on a file system that has locks; all nodes see it."
            ) from None
        return Held(file)

    def release(self) -> None:
        """Close the file. Not unlocked: a child that has it keeps the lock."""
        os.close(self.file)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
