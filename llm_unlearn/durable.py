"""Files that outlast a kill and a power cut: what they hold is on the disk before the name that vouches for it, and an error of the
disk names the path, whichever library met it."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
PHRASES = {
    "No space left": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "disk is full": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "file write failed": errno.ENOSPC,  # PyTorch's writer keeps no reason
    "unexpected pos": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "readonly database": errno.EROFS,
    "disk I/O error": errno.EIO,
}
"""What libraries say that hand on no error number."""
UNREASONED = ("file write failed", "unexpected pos")
FORMER = ".former"
"""Ending of a folder that is about to be replaced."""
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""Systems that cannot sync a folder say so by one of these."""


def settle(path: Path) -> None:
    """Have the disk hold a file, or a folder and all that is in it."""
    for one in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        if one.is_dir():
            settle_names(one)
        else:
            descriptor = os.open(one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def settle_names(folder: Path) -> None:
    """Have the disk hold which names a folder has, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """A folder, for good, with those above it."""
    if path.is_dir():
        return
    absent = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in absent:
        settle_names(one.parent)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, for good: no power cut brings back what was to be gone."""
    if path.is_dir():
        shutil.rmtree(path)
        settle_names(path.parent)


def put(unfinished: Path, final: Path) -> None:
    """Give a file or folder its name once the disk holds all of it; what had the name before is gone."""
    settle(unfinished)
    former, aside = Path(f"{_unfinished(final)}{FORMER}"), final.is_dir() and not final.is_symlink()
    if aside:  # a folder cannot be renamed onto another
        os.replace(final, former)
    try:
        os.replace(unfinished, final)
    except BaseException:
        if aside:
            os.replace(former, final)
        raise
    settle_names(final.parent)
    _remove(former)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Inside, a place to write a file or a folder to; afterwards it has its name, whole and for good, or nothing was changed."""
    with about(path):
        make_folder(path.parent)
        _remove_leftovers(path)
        place = _unfinished(path)
        _remove(place)
        try:
            yield place
            put(place, path)
        except BaseException:
            _remove(place)
            raise


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """An error of the disk that is raised inside names this path, whichever library met it."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        unknown = any(phrase in str(error) for phrase in UNREASONED)
        reason = f"{os.strerror(number)}{', or a quota or limit (ulimit -f) is reached' if unknown else ''}"
        raise OSError(number, reason, str(path)) from error


def _number(error: Exception) -> int | None:
    """The error number of what a disk refused; None of anything else."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return error.errno
    return next((number for phrase, number in PHRASES.items() if phrase in str(error)), None)


def _unfinished(path: Path) -> Path:
    """Where this process writes a file before it has its name."""
    return path.with_name(f".{path.name}.{_here()}.{os.getpid()}")


@cache
def _here() -> str:
    """Where numbers of processes mean something: this machine, and the container if it is in one."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}.{space.stat().st_ino if space.exists() else 0}"


def _remove_leftovers(path: Path) -> None:
    """Remove what a process of this machine left of the same file when it was killed; a folder that it had only put aside gets its
    name back."""
    start = f".{path.name}.{_here()}."
    for one in path.parent.glob(f"{glob_of(start)}*"):
        if _is_left(one.name.removeprefix(start).removesuffix(FORMER)):
            if one.suffix == FORMER and not path.exists():
                os.replace(one, path)
            else:
                _remove(one)


def sweep_up(folder: Path) -> None:
    """Remove every unfinished file of a folder whose process is gone, whatever it was to be called."""
    for one in folder.glob(f".*.{glob_of(_here())}.*"):
        if _is_left(one.name.rpartition(f".{_here()}.")[2]):
            _remove(one)


def _is_left(number: str) -> bool:
    """Whether a process with this number is another's and gone."""
    return number.isdigit() and int(number) != os.getpid() and not _alive(int(number))


def glob_of(text: str) -> str:
    """A pattern that matches this text alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] != "Z"  # it has ended, and nobody asked how
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
