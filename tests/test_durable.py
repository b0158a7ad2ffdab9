"""Files whole or not at all, errors of a disk with their path, and signals that come twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_unlearn import durable
from llm_unlearn.training import signals as room
from llm_unlearn.training.signals import Left, leaving, signals


def test_a_file_is_whole_or_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    with durable.whole(path) as unfinished:
        unfinished.write_text("1")
    with pytest.raises(ZeroDivisionError), durable.whole(path) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "1" and [one.name for one in path.parent.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {kind: f".a.{durable._here()}.{number}" for kind, number in (("gone", gone.pid), ("living", os.getppid()))}
    for name in (*names.values(), f".a.elsewhere.{gone.pid}", f".ab.{durable._here()}.{gone.pid}"):
        (tmp_path / name).write_text("half")
    with durable.whole(tmp_path / "a") as unfinished:
        unfinished.mkdir()
        (unfinished / "b").write_text("1")
    left = {one.name for one in tmp_path.iterdir()}
    assert left == {"a", names["living"], f".a.elsewhere.{gone.pid}", f".ab.{durable._here()}.{gone.pid}"}


def test_a_finished_folder_is_swept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = (f".a.{durable._here()}.{os.getppid()}", f".a.elsewhere.{gone.pid}", f".{gone.pid}", "a", f".a.{durable._here()}.former")
    for name in (*kept, f".b.json.{durable._here()}.{gone.pid}"):
        (tmp_path / name).write_text("half")
    durable.sweep_up(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == set(kept)


def test_a_folder_that_a_killed_process_had_put_aside_has_its_name_again(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    aside = tmp_path / f".a.{durable._here()}.{gone.pid}{durable.FORMER}"
    for there in (False, True):
        aside.mkdir()
        (aside / "b").write_text("former")
        with pytest.raises(ZeroDivisionError), durable.whole(tmp_path / "a"):
            raise ZeroDivisionError
        assert (tmp_path / "a" / "b").read_text() == "former" and not aside.exists(), there


def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one", "two"):
        with durable.whole(tmp_path / "a") as unfinished:
            unfinished.mkdir()
            (unfinished / "b").write_text(text)
    with pytest.raises(FileNotFoundError), durable.whole(tmp_path / "a") as unfinished:
        pass  # nothing was written: what was there stays
    assert (tmp_path / "a" / "b").read_text() == "two" and [one.name for one in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), errno.ENOSPC),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
    ],
)
def test_an_error_of_the_disk_names_the_path(error: Exception, number: int) -> None:
    with pytest.raises(OSError) as found, durable.about(Path("runs/x")):
        raise error
    assert (found.value.errno, found.value.filename) == (number, "runs/x")


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("a bug"), OSError(errno.ENOSPC, "No space left on device", "own/path"), FileNotFoundError(2, "none")):
        with pytest.raises(type(error)) as found, durable.about(Path("runs/x")):
            raise error
        assert found.value is error


@pytest.fixture
def heard() -> Iterator[None]:
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_is_not_lost_where_python_drops_what_is_raised() -> None:
    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with leaving() as came:
        one = Dropped()
        del one
        assert came == [], "it is asked again in a moment"
        with pytest.raises(Left):
            time.sleep(30)
        assert came == [signal.SIGTERM]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_at_once_after_a_while(sent: int, monkeypatch: pytest.MonkeyPatch, heard: None) -> None:
    monkeypatch.setattr(room, "ONCE", 0.05)
    with leaving() as came, signals() as asked:
        signal.raise_signal(sent)
        signal.raise_signal(sent)  # a launcher passes on what the scheduler has told everybody
        assert asked.is_set() and came == [sent, sent]
        time.sleep(0.1)
        with pytest.raises(Left):
            signal.raise_signal(sent)


def test_ctrl_c_twice_ends_at_once_and_a_launchers_sigterm_does_not() -> None:
    with signals() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()
    with signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_outside_steps_a_signal_unwinds_and_says_which_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leaving() as came:
        with pytest.raises(Left):
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leaving() as came, signals() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.is_set() and not came
    finally:
        signal.signal(signal.SIGHUP, before)
