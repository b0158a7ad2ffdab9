"""What long work shows of itself: drawn in a terminal, plain lines elsewhere, and what an optimizer step says."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import PowerCut, adapted, job
from rich.console import Console

from llm_unlearn import bars
from llm_unlearn.bars import Bar, span, walk
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.loop import train
from llm_unlearn.training.progress import Said

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for bars."""
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


class Screen(io.StringIO):
    """What a terminal is to those who write."""

    def isatty(self) -> bool:
        return True


def screen(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> Screen:
    """A terminal of 80 columns as standard output and standard error."""
    made = Screen()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(sys, "stdout", made)
    there = Console(stderr=True, force_terminal=True, width=80, highlight=False, _environ={"TERM": term})
    monkeypatch.setattr(bars, "console", lambda: there)
    return made


def count(title: str, steps: int, seconds: float, wait: Callable[[float], None], **settings: Any) -> None:
    with Bar(title, steps, "step", **settings) as bar:
        for i in range(steps - settings.get("done", 0)):
            wait(seconds)
            bar.update(1, {"forget": f"{i}.5"})


@pytest.mark.parametrize(
    ("steps", "seconds", "least", "most"), [(1000, 1.0, 20, 42), (1000, 0.01, 3, 5), (5, 600.0, 5, 5), (1, 0.1, 1, 1)]
)
def test_without_a_terminal_there_are_few_lines_and_the_first_and_the_last(
    steps: int, seconds: float, least: int, most: int, clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    count("forgetting", steps, seconds, clock, stays=True)
    out, text = capsys.readouterr()
    lines = text.splitlines()
    assert least <= len(lines) <= most and out == ""
    assert lines[0].startswith(f"forgetting: step 1 of {steps:,}, forget 0.5")
    assert lines[-1] == f"forgetting: step {steps:,} of {steps:,}, forget {steps - 1}.5"
    assert all(letter.isprintable() for line in lines for letter in line) and "\r" not in text


def test_the_time_that_is_left_is_that_of_this_session(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    count("forgetting", 100, 10.0, clock, stays=True, done=98)
    assert capsys.readouterr().err.splitlines() == [
        "forgetting: step 99 of 100, forget 0.5, 10 s left",
        "forgetting: step 100 of 100, forget 1.5",
    ]


def test_what_is_done_at_once_says_nothing_without_a_terminal(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    count("asking", 50, 0.001, clock)
    assert capsys.readouterr().err == ""
    count("asking", 50, 0.04, clock)
    assert capsys.readouterr().err.splitlines() == ["asking: step 50 of 50, forget 49.5"]


def test_a_quiet_bar_counts_and_says_nothing(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("asking", 3, "answer", quiet=True, stays=True) as bar:
        bar.more(2)
        clock(60)
        bar.update(4)
        assert (bar.n, bar.total) == (4, 5)
    assert list(walk("abc", "letters", "letter", quiet=True)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_in_a_terminal_what_is_printed_stands_above_and_bars_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    there = screen(monkeypatch)
    before = sys.stdout, sys.stderr
    names = ("forget", "retain", "forget perplexity", "retain perplexity", "grad norm", "tokens/s", "memory")
    facts = dict.fromkeys(names, "0.123")
    with Bar("forgetting " * 9, 40, "step", done=7, stays=True) as bar:
        bar.update(1, facts)
        print("a rule says something")
        with Bar("asking step 8", 10, "answer") as inner:
            inner.update(10)
            time.sleep(1.5 / bars.REFRESH)
            print("and another", file=sys.stderr)
        bar.update(32, facts)
    assert (sys.stdout, sys.stderr) == before
    lines = [line.rstrip() for line in CONTROL.sub("", there.getvalue()).splitlines()]
    assert max(len(line) for line in lines) <= 80
    assert "a rule says something" in lines and "and another" in lines
    assert any("step 7 / 40" in line for line in lines) and any("answer 10 / 10" in line for line in lines)
    last = "\n".join(lines[-4:])
    assert "step 40 / 40" in last and "memory 0.123" in last and "answer" not in last
    assert "\x1b[?25h" in there.getvalue(), "the cursor is back"


def test_what_goes_into_a_file_does_not_go_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    there, file = screen(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Bar("forgetting", 2, "step"):
        print("a result")
    assert file.getvalue() == "a result\n" and "a result" not in there.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> None:
    there = screen(monkeypatch, "dumb")
    count("forgetting", 2, 5.0, clock, stays=True)
    assert there.getvalue().splitlines() == [
        "forgetting: step 1 of 2, forget 0.5, 5 s left",
        "forgetting: step 2 of 2, forget 1.5",
    ]


def test_times_as_people_say_them() -> None:
    assert [span(x) for x in (0.4, 59, 100, 3000, 7200, 40000, 200000)] == [
        "0 s", "59 s", "1.7 min", "50 min", "2.0 h", "11 h", "2.3 d",
    ]  # fmt: skip


def test_a_step_says_its_terms_its_pace_and_what_was_last_seen() -> None:
    said = Said(["forget", "retain"], torch.device("cpu"))
    row = {"step": 1, "lr": 1e-3, "forget": 1.23456, "retain": float("nan"), "grad_norm": 0.5, "tokens": 100, "seconds": 0.1}
    assert said(row | {"retain_perplexity": 1.5, "retain_accuracy": 0.98, "forget_perplexity": 3.0})["forget perplexity"] == "3"
    found = said(row | {"seconds": 0.3, "epsilon": 2.5})
    assert found == {
        "forget": "1.23", "retain": "nan", "retain perplexity": "1.5", "retain accuracy": "0.98", "forget perplexity": "3",
        "epsilon": "2.5", "grad norm": "0.5", "tokens/s": "500", "memory": found["memory"],
    }  # fmt: skip
    assert 0.05 < float(found["memory"].removesuffix(" GB")) < 100


def test_a_resumed_run_is_shown_from_its_step_on(
    make_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = job(steps=6, checkpoint_every=3, stop=Stop(budget=Harm(retain_perplexity=100.0), every=2, rows=4))

    def cut(step: int) -> None:
        if step == 4:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(wanted, adapted(make_model), Accelerator(cpu=True), tmp_path, look=cut)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("forgetting: step 1 of 6, forget ") and lines[-1].startswith("forgetting: step 4 of 6, ")
    train(wanted, adapted(make_model), Accelerator(cpu=True), tmp_path, resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("forgetting")]  # a slow pass has its own
    assert lines[0].startswith("forgetting: step 4 of 6, forget ") and lines[-1].startswith("forgetting: step 6 of 6, ")
    assert all(word in lines[-1] for word in ("retain ", "retain perplexity ", "grad norm ", "tokens/s ", "memory "))
    AcceleratorState._reset_state(reset_partial_state=True)
