"""What no verb foresaw, in one line: what the machine could not do, or a bug of the project, which is called one."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.reply import BUG, UNABLE, Reply
from llm_unlearn.spec import readable

TODO: Mapping[int, str] = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EFBIG: "Let a process write larger files (ulimit -f)",
    errno.EACCES: "Ask for the right to it, or name another place",
    errno.EPERM: "Ask for the right to it, or name another place",
    errno.EROFS: "Name a place that can be written",
    errno.EMFILE: "Let a process open more files (ulimit -n)",
    errno.EIO: "Look after the disk",
}
"""What to do about an error of the system, where something can be said."""
MEMORY = "give the process more, or less to do: smaller batch_tokens, a smaller or quantized model"
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
PACKAGE = Path(__file__).parent


class OutOfMemory(MemoryError):
    """Memory ran out in the middle of work, and it is known what to change: its text says all that is to be said."""


LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Timed out waiting")
"""What the network between processes says where one of them is gone."""


def reply_to(error: Exception, again: str = "the same command") -> tuple[str, Reply]:
    """What is said of an error that no verb refused, and the answer to it.

    Args:
        again: what goes on with the work, of which all that was finished is kept.
    """
    if said := _of_the_machine(error, again):
        line = f"error: {said}"
        return line, Reply(UNABLE, {"errors": [said]})
    kind, message, at = type(error).__name__, _one_line(error), place_of(error)
    told: dict[str, Any] = {"type": kind, "message": message, "at": at}
    said = (
        f"{kind}: {message} ({at}). This is a bug of llm-unlearn. The same command with --debug shows how it came to it; please "
        "report what that prints, with your recipe and what `llm-unlearn doctor` says."
    )
    return f"bug: {said}", Reply(BUG, {"errors": [said], "bug": told})


def _of_the_machine(error: Exception, again: str) -> str | None:
    """What the machine could not do; None where it is not to blame."""
    text = _one_line(error)
    if isinstance(error, OutOfMemory):
        return text
    if is_out_of_memory(error):
        return f"out of memory ({text}); {MEMORY}; then {again} goes on."
    if isinstance(error, RuntimeError) and any(phrase in text for phrase in LOST):
        return f"another process of this run has ended ({text[:200]}). Start all of them anew: {again} goes on."
    if told := re.search(r"\(os error (\d+)\)", text):  # of safetensors, which is written in Rust
        return f"{text}. {_then(int(told[1]), again)}".strip()
    if isinstance(error, OSError):
        if error.errno is None:
            return text
        named = " -> ".join(str(one) for one in (error.filename, error.filename2) if one is not None)
        return readable(f"{named}: {error.strerror}. {_then(error.errno, again)}".removeprefix(": ").strip())
    if type(error).__name__ in ("OperationalError", "StorageInternalError"):  # of SQLite, SQLAlchemy and Optuna, one from the other
        return f"a database cannot be read or written: {_one_line(_origin(error))}."
    return None


def _then(number: int, again: str) -> str:
    return f"{TODO[number]}; then {again} goes on." if number in TODO else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch's allocator on CPUs, and some of CUDA's libraries, say so in words only."""
    known = isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "ArrowMemoryError")
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in NO_MEMORY))


def _origin(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    return _origin(error.__cause__) if error.__cause__ else error


def _one_line(error: BaseException) -> str:
    return readable(" ".join(str(error).split()) or "no reason given")


def place_of(error: Exception) -> str:
    """The last line of ours through which an error came, as file:line in the package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if not ours:
        return "outside llm_unlearn"
    return f"llm_unlearn/{os.path.relpath(ours[-1].filename, PACKAGE)}:{ours[-1].lineno}"
