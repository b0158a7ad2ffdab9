"""The SQLite file under a ledger: opened, begun, and used one transaction at a time by any number of processes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from llm_unlearn.durable import about, make_folder
from llm_unlearn.requests.records import APPLICATION, VERSION, check_file, make_tables
from llm_unlearn.spec import Refused

WAIT = 60
"""Seconds that a process waits for another's transaction."""


def is_absent(path: Path) -> bool:
    """Whether no ledger is there: no file, or an empty one, as of a process that was killed when it began it."""
    return not os.path.lexists(path) or (path.is_file() and not path.stat().st_size)


class LedgerFile:
    """The file, and the connection of each thread to it."""

    def __init__(self, path: Path, begin: bool) -> None:
        """Open the file of a ledger, or begin one.

        Args:
            begin: False begins none: nothing is written where no ledger is.

        Raises:
            Refused: there is none, the file is something else, or a ledger of another version.
        """
        self.path = path
        if not begin and is_absent(path):
            said = f"{path}: no ledger is there. Put it back, or correct `ledger` of the service"
            raise Refused(f"{said}; the first request begins one (llm-unlearn requests add).")
        self._kept = threading.local()
        try:
            if begin:
                make_folder(path.parent)
            os.close(os.open(path, os.O_RDWR | (os.O_CREAT if begin else 0), 0o600))
        except OSError as error:
            raise Refused(f"{path}: the ledger cannot be opened ({error.strerror}).") from None
        check_file(path)
        try:
            with self._connected() as connection:
                self._begin(connection)
                self.facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise Refused(f"{path}: the ledger cannot be opened ({error}).") from None
            raise Refused(f"{path}: not a ledger ({error}). Name another file in `ledger`.") from None

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.text_factory = partial(
            str, encoding="utf-8", errors="backslashreplace"
        )  # what was damaged is for the chain to say
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # what was said to be done stays done when the power goes
        return connection

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection. It stays open: when the last one closes, SQLite copies its journal into the file and takes the
        journal away, which costs more than a change does."""
        own: tuple[int, sqlite3.Connection] | None = getattr(self._kept, "own", None)
        if own is None or own[0] != os.getpid():  # that of a parent process is not to be used behind a fork, nor closed
            self._kept.inherited, own = own, (os.getpid(), self._open())
            self._kept.own = own
        if own[1].in_transaction:
            with closing(self._open()) as another:
                yield another
        else:
            yield own[1]

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        whose = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            make_tables(connection)
        connection.execute("COMMIT")
        if tables and whose != APPLICATION:
            raise Refused(f"{self.path}: another program's database, not a ledger of requests. Name another file in `ledger`.")
        if tables and version != VERSION:
            raise Refused(
                f"{self.path}: a ledger of version {version}; this llm-unlearn reads version {VERSION}. Nothing was changed."
            )
        for attempt in range(200):  # the busy timeout does not hold for this switch
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if attempt == 199:
                    raise
                time.sleep(0.05)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the ledger."""
        with self._connected() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("COMMIT")

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that writes: all of it, or nothing."""
        with about(self.path), self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
