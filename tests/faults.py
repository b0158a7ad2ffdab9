"""Faults put into real commands: a server forks a process for each command, as starting an interpreter takes longer than the work,
and in that process a disk, a function or the clock fails at a chosen moment.

python tests/faults.py        # reads a JSON order per line, answers with a JSON line; `Forks` is its client
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import importlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEXT = {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system"}
OWN = (".db", ".db-wal", ".db-shm", ".lock")
"""Files whose owner syncs them by itself (SQLite, with synchronous = FULL), or that hold nothing."""


# ------------------------------------------------------------------------------------------------------------- the disk


class Disk:
    """Counts what a process does to files below a folder, and at the n-th operation does something to the process.

    `do`: kill · torn (half of what is being written, then kill) · strict, names, mixed (a power cut that loses what was not synced:
    all of it, contents only, or some names too) · full, closed (from then on the disk takes nothing) · SIGTERM and other signals.
    """

    def __init__(self, root: Path, at: int, do: str) -> None:
        self.root, self.at, self.do = os.path.realpath(root), at, do
        self.operations: list[tuple[str, str]] = []
        self.quiet = False
        self.written: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.held: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.links: dict[int, str] = {}
        if do in ("strict", "names", "mixed"):
            self._begin()

    # what is on the disk for good: content of files and names in folders, by inode

    def _begin(self) -> None:
        for place, folders, files in os.walk(self.root):
            self.names[os.stat(place).st_ino] = self._listing(place)
            for name in (*folders, *files):
                path = os.path.join(place, name)
                if os.path.islink(path):
                    self.links[os.lstat(path).st_ino] = os.readlink(path)
                elif name in files:
                    self.held[os.stat(path).st_ino] = Path(path).read_bytes()

    @staticmethod
    def _listing(place: str | int) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(place)}

    def synced(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = self._listing(path)
        else:
            self.held[found.st_ino] = Path(path).read_bytes()

    def made(self, path: str) -> None:
        """A file or folder has begun anew: its inode may be that of one that is gone."""
        if self.within(path):
            with contextlib.suppress(OSError):
                number = os.lstat(path).st_ino
                self.held.pop(number, None)
                self.names.pop(number, None)
                self.links.pop(number, None)
                if os.path.islink(path):
                    self.links[number] = os.readlink(path)
                elif os.path.isdir(path):
                    self.names[number] = {}

    def _after_the_cut(self) -> None:
        """Make the folder what a power cut leaves of it."""
        draw = random.Random(self.at)

        def image(number: int, path: str | None) -> dict[str, Any]:
            now = self._listing(path) if path and os.path.isdir(path) else None
            old = self.names.get(number, {})
            kept = {"strict": False, "names": True, "mixed": draw.random() < 0.5}[self.do]
            listing = now if now is not None and kept else old
            listing = dict(listing) | {name: one for name, one in (now or {}).items() if name.endswith(OWN)}
            found: dict[str, Any] = {}
            for name, one in listing.items():
                here = os.path.join(path, name) if path and (now or {}).get(name) == one else None
                if here and name.endswith(OWN):
                    found[name] = Path(here).read_bytes()
                elif one in self.names or (here and os.path.isdir(here) and not os.path.islink(here)):
                    found[name] = image(one, here)
                elif one in self.links or (here and os.path.islink(here)):
                    found[name] = self.links.get(one) or os.readlink(str(here))
                else:
                    found[name] = self.held.get(one, b"")
            return found

        def write(what: Mapping[str, Any], path: str) -> None:
            for name, one in what.items():
                inner = os.path.join(path, name)
                if isinstance(one, dict):
                    os.mkdir(inner)
                    write(one, inner)
                elif isinstance(one, str):
                    os.symlink(one, inner)
                else:
                    Path(inner).write_bytes(one)
                    os.chmod(inner, 0o600)  # of a signing key more is refused

        whole = image(os.stat(self.root).st_ino, self.root)
        for entry in list(os.scandir(self.root)):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        write(whole, self.root)

    # what happens

    def within(self, path: str) -> bool:
        return path.startswith(f"{self.root}/")

    def meet(self, kind: str, path: str, torn: Callable[[], object] | None = None) -> None:
        """Before an operation."""
        if self.quiet or not self.within(path):
            return
        self.operations.append((kind, path.removeprefix(f"{self.root}/")))
        count = len(self.operations)
        if self.do in ("full", "closed") and count >= self.at and (kind not in ("unlink", "rmdir") or self.do == "closed"):
            number = errno.ENOSPC if self.do == "full" else errno.EROFS
            raise OSError(number, TEXT[number], path)
        if count != self.at:
            return
        self.quiet = True
        if self.do == "torn" and torn:
            torn()
        if self.do in ("strict", "names", "mixed"):
            self._after_the_cut()
        if self.do in ("kill", "torn", "strict", "names", "mixed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.do.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.do))
        self.quiet = False

    def install(self) -> None:
        """Stand between this process and its files."""
        self._replace_python()
        self._replace_natives()

    def _path(self, path: Any, dir_fd: int | None = None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        name = os.fsdecode(os.fspath(path))
        start = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        whole = os.path.join(start, name)
        return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))

    def _replace_python(self) -> None:
        for name in ("unlink", "remove", "rmdir", "mkdir", "symlink"):
            setattr(os, name, self._one(name, getattr(os, name)))
        for name in ("replace", "rename", "link"):
            setattr(os, name, self._two(name, getattr(os, name)))
        self._replace_open()
        self._replace_sync()

    def _replace_open(self) -> None:
        opened, opened_low = io.open, os.open

        def file(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return opened(path, mode, *more, **named)
            name = self._path(path)

            def torn() -> None:
                with opened(name, "ab" if "a" in mode else "wb") as half:
                    half.write(b'{"step": 3, "lo')

            self.meet("append" if "a" in mode else "open", name, torn)
            self.written.add(name)
            if "a" not in mode:
                self.sizes.pop(name, None)
            new = not os.path.exists(name)
            found = opened(path, mode, *more, **named)
            if new:
                self.made(name)
            return found

        def low(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            name = self._path(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ""
            new = bool(name) and not os.path.exists(name)
            if name:
                self.meet("open", name)
            found = opened_low(path, flags, mode, dir_fd=dir_fd)
            if new:
                self.made(name)
            return found

        builtins.open = io.open = file  # type: ignore[assignment]
        os.open = low

    def _replace_sync(self) -> None:
        synced = os.fsync

        def sync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")

            def torn() -> None:
                if os.path.isfile(path) and path in self.written:
                    kept = self.sizes.get(path, 0)
                    os.truncate(path, kept + (os.path.getsize(path) - kept) // 2)

            self.meet("sync", path, torn)
            synced(descriptor)
            if not self.quiet and (self.within(path) or path == self.root):  # the names of the folder that all is in, too
                self.synced(number)
                self.written.discard(path)
                self.sizes[path] = os.path.getsize(path)

        os.fsync = sync

    def _one(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(path: Any, *more: Any, **named: Any) -> Any:
            at = self._path(more[0] if name == "symlink" else path, named.get("dir_fd"))
            self.meet("unlink" if name == "remove" else name, at)
            found = call(path, *more, **named)
            if name in ("mkdir", "symlink"):
                self.made(at)
            return found

        return replaced

    def _two(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(source: Any, target: Any, *more: Any, **named: Any) -> Any:
            self.meet(name, self._path(target))
            return call(source, target, *more, **named)

        return replaced

    def _replace_natives(self) -> None:
        """Writers that are no Python: their file is whole, half or not there."""
        import safetensors.torch
        import torch
        from pyarrow import parquet

        def writer(call: Callable[..., Any], place: int) -> Callable[..., Any]:
            def replaced(*given: Any, **named: Any) -> Any:
                if not isinstance(given[place], (str, os.PathLike)):
                    return call(*given, **named)
                path = self._path(given[place])

                def torn() -> None:
                    call(*given, **named)
                    os.truncate(path, os.path.getsize(path) // 2)

                self.meet("open", path, torn)
                was, self.quiet = self.quiet, True  # the Python that is in it is part of it
                try:
                    found = call(*given, **named)
                finally:
                    self.quiet = was
                self.made(path)
                self.written.add(path)
                return found

            return replaced

        torch.save = writer(torch.save, 1)  # type: ignore[assignment]
        parquet.write_table = writer(parquet.write_table, 1)
        safetensors.torch.serialize_file = writer(safetensors.torch.serialize_file, 1)
        disk, connect = self, sqlite3.connect

        class Counted(sqlite3.Connection):
            def execute(self, statement: str, *more: Any) -> sqlite3.Cursor:
                if statement.split()[0] in ("BEGIN", "COMMIT", "INSERT", "UPDATE", "CREATE"):
                    disk.meet(statement.split()[0].lower(), os.path.join(disk.root, "requests.db"))
                return super().execute(statement, *more)

        def counted(path: Any, *more: Any, **named: Any) -> sqlite3.Connection:
            return connect(path, *more, **({"factory": Counted} | named))

        sqlite3.connect = counted  # type: ignore[assignment]


# ----------------------------------------------------------------------------------------------------------- functions


def fail_at(where: str, count: int, when: str, do: str) -> None:
    """Let something happen before or after the `count`-th call of a function, named module:path."""
    module, _, path = where.partition(":")
    *inside, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for one in inside:
        holder = getattr(holder, one)
    call, calls = getattr(holder, name), [0]

    def happen() -> None:
        import torch

        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if do.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, do))
        errors = {
            "memory": MemoryError(),
            "cuda memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        }
        if do in errors:
            raise errors[do]

    def failing(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and when == "before":
            happen()
        found = call(*given, **named)
        if calls[0] == count and when == "after":
            happen()
        return found

    setattr(holder, name, failing)


# ---------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    status: int
    text: str
    seconds: float
    operations: list[tuple[str, str]]


class Forks:
    """The client of one server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=folder
        )

    def __call__(
        self, words: Sequence[str], at: Path, fault: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> Ended:
        assert self.server.stdin and self.server.stdout
        order = {"words": list(words), "at": str(at), "fault": fault, "out": str(self.folder / "said.txt"), "env": environment}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        found = json.loads(self.server.stdout.readline())
        text = (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace")
        return Ended(found["status"], text, found["seconds"], [(kind, path) for kind, path in found["operations"]])

    def close(self) -> None:
        if self.server.stdin:
            self.server.stdin.close()
        self.server.wait(30)
        if self.server.stdout:
            self.server.stdout.close()


def _serve() -> None:
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        began, counts = time.monotonic(), Path(order["out"]).with_suffix(".json")
        counts.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            _child(order, counts)
        status = _wait(child, order["fault"] or {})
        found = json.loads(counts.read_text()) if counts.is_file() else []
        answers.write(json.dumps({"status": status, "seconds": time.monotonic() - began, "operations": found}) + "\n")
        answers.flush()


def _wait(child: int, fault: Mapping[str, Any]) -> int:
    """The child's end; at the time that the fault names, it gets a signal."""
    begin, sent, deadline = time.monotonic(), False, 120.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - begin
        if "after" in fault and not sent and passed >= fault["after"]:
            os.kill(child, getattr(signal, fault["do"]))
            sent = True
        if passed > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _child(order: Mapping[str, Any], counts: Path) -> None:
    """Carry out a command as a process of its own; never returns."""
    status = 70
    try:
        said = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["at"])
        os.environ.update({"LLM_UNLEARN_CACHE": "cache", "XDG_CONFIG_HOME": f"{order['at']}/config", **(order["env"] or {})})
        fault = order["fault"] or {}
        random.seed()
        disk = Disk(Path(order["at"]), fault.get("operation", 0), fault.get("do", "") if "operation" in fault else "")
        disk.install()
        if "where" in fault:
            fail_at(fault["where"], fault.get("count", 1), fault.get("when", "before"), fault["do"])
        if "limit" in fault:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
        from llm_unlearn.cli import main

        status = main(order["words"])
        disk.quiet = True
        if "limit" not in fault:
            counts.write_text(json.dumps(disk.operations))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def preload() -> None:
    """All that the commands import, once. Plots take longer than all else and write no file: they are left blank."""
    for name in PRELOADED:
        importlib.import_module(name)
    from transformers import conversion_mapping

    from llm_unlearn.report import plots

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    plots.drawing = lambda *given, **named: "<svg></svg>"


PRELOADED = (
    "torch", "transformers", "peft", "datasets", "matplotlib.pyplot", "torch.distributed.checkpoint", "pyarrow.parquet",
    "transformers.models.llama.modeling_llama", "llm_unlearn.run", "llm_unlearn.results", "llm_unlearn.report.page",
    "llm_unlearn.report.terminal", "llm_unlearn.exact.measuring", "llm_unlearn.requests.serving", "llm_unlearn.requests.stores",
    "llm_unlearn.requests.verifying", "llm_unlearn.verbs", "llm_unlearn.many", "rouge_score.rouge_scorer", "cryptography",
)  # fmt: skip


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """A server, for as long as this lasts."""
    client = Forks(folder)
    try:
        yield client
    finally:
        client.close()


if __name__ == "__main__":
    _serve()
