"""The benchmarks: what they time is there, both ways compute the same, and the tables have every row."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
COMMAND = [sys.executable, "-m", "benchmarks", "--size", "tiny"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_what_a_benchmark_times_is_there() -> None:
    from benchmarks import ours, suite

    stages: list[Mapping[str, Any]] = [ours.STAGES, suite.STAGES]
    for stage, functions in (item for one in stages for item in one.items()):
        for place, name in functions:
            assert callable(getattr(place, name)), stage


def test_a_stage_that_is_gone_is_named() -> None:
    from benchmarks.clock import Clock, watched

    with (
        pytest.raises(SystemExit, match="stage 'layout': json has no 'laid_out' any more"),
        watched(Clock(), {"layout": [(json, "laid_out")]}),
    ):
        pass


def test_every_second_belongs_to_the_innermost_stage() -> None:
    from benchmarks.clock import REST, Clock

    ticks = iter(range(100))
    clock = Clock(lambda: float(next(ticks)), whole=frozenset({"whole"}))
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", inner)()
    clock.timed("whole", inner)()  # what it calls is its own
    clock.turn()
    assert dict(clock.seconds) == {REST: 3.0, "outer": 2.0, "inner": 1.0, "whole": 1.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # one sequence of 4 tokens, 2 of which answer; hidden 2, intermediate 3, 4 layers, 1 head, vocabulary 5
        ("GradDiff, full", 3 * (4 * 272 + 40) + 2 * 4 * 64),
        ("GradDiff, LoRA", 2 * (4 * (272 + 64) + 40) + 6 * 16 * 31 * 4 * 4),
        ("KL, full", 3 * (4 * 272 + 40) + 2 * 4 * 64 + (4 * (272 + 64) + 40) / 5),
        ("RMU, few layers", 2 * (272 + 64) + 2 * 6 * 4 + (272 + 64) / 5),
    ],
)
def test_the_work_is_counted_as_written(name: str, expected: float) -> None:
    """A layer's matrices have 4·4 + 3·6 = 34 parameters: 2 · 34 · 4 = 272 operations; its attention 2 · 2 · 4² = 64; the head
    2 · 5 · 2 · 2 = 40; LoRA's pairs have 16 · (4·4 + 3·5) = 16 · 31."""
    from benchmarks.rows import ROWS
    from benchmarks.shapes import Shape
    from benchmarks.work import flops

    window = {"forget": [], "retain": [((1, 2, 3, 4), 2)]}
    assert flops(ROWS[name], Shape(2, 3, 4, 1, 1, vocabulary=5), window) == pytest.approx(expected)


def test_the_tables_are_put_between_their_markers(tmp_path: Path) -> None:
    from benchmarks import table

    page = tmp_path / "page.md"
    page.write_text("# Before\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="put these two lines"):
        table.around(page, "cpu")
    page.write_text(f"# Before\n{table.BEGIN.format(size='cpu')}\nold\n{table.END.format(size='cpu')}\nAfter\n", encoding="utf-8")
    table.write(page, "cpu", "new")
    table.write(page, "cpu", "newer")
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.count("new") == text.count("newer") == 1 and text.endswith("-->\nAfter\n")


def test_rows_are_as_long_as_they_were_measured(tmp_path: Path) -> None:
    import numpy as np

    from benchmarks import shapes

    shapes.write_tokenizer(512, tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [json.loads(line) for line in shapes.write_set("forget", 400, 512, tmp_path).read_text().splitlines()]
    for column in ("question", "paraphrase"):
        lengths = [len(tokenizer(row[column])["input_ids"]) for row in rows]
        found = np.quantile(lengths, shapes.QUANTILES)
        assert np.all(np.abs(found - shapes.LENGTHS["forget"][column])[1:6] <= 5)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": rows[0]["question"]}], tokenize=True)["input_ids"]
    assert len(asked) == shapes.TEMPLATE_TOKENS + len(tokenizer(rows[0]["question"])["input_ids"])


@pytest.mark.long
@pytest.mark.slow
def test_all_of_it_at_the_smallest_size(tmp_path: Path) -> None:
    """Both ways compute the same gradients and numbers, or the command would fail; every row is in the table and in the file."""
    from benchmarks.plain_suite import MEASURES
    from benchmarks.shapes import SIZES

    file = tmp_path / "all.json"
    done = subprocess.run([*COMMAND, "--rounds", "1", "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [row["name"] for row in found["training"]] == list(SIZES["tiny"].rows)
    for row in found["training"]:
        assert 0 < row["difference"] < 1e-5 and f"| {row['name']} |" in done.stdout
        assert row["stages"].keys() >= {"forward", "backward", "optimizer", "layout"}
        assert all(used["whole"] > used["imports"] > 0 for used in row["memory"].values())
    assert found["evaluation"]["difference"] < 1e-5 and len(MEASURES) == 18 and "| TOFU's suite |" in done.stdout
    assert all(found["start"][what][0] > 0 for what in ("help", "refused", "first step"))
    assert str(tmp_path) not in done.stdout


WORKING = """
import signal
import time
from benchmarks import sides

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been told to ignore it

def work(turns):
    turns.next()
    time.sleep(600)

if __name__ == "__main__":
    sides.PRELOADED.clear()
    with sides.side(work) as one:
        print("begun", flush=True)
        one.ask("go")
"""


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGKILL])
def test_children_end_with_their_parent(tmp_path: Path, asked: signal.Signals) -> None:
    """In the midst of their work where it is told to stop, and at their next turn where it was killed."""
    script = tmp_path / "working.py"
    waits = asked == signal.SIGKILL
    script.write_text(
        WORKING.replace("    time.sleep(600)", "    turns.next()").replace('one.ask("go")', "one.answer()") if waits else WORKING
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    if asked == signal.SIGINT:
        os.killpg(process.pid, asked)  # as a terminal does: to all of them
    else:
        process.kill()
    process.communicate(timeout=60)
    until = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_runs_of_the_obstacles_are_such_as_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of theirs is read as `llm-unlearn` reads it, recipes and suites with it; nothing is carried out."""
    from llm_unlearn import recipe
    from llm_unlearn.evaluation import suite
    from llm_unlearn.options import parser

    monkeypatch.chdir(FOLDER.parent)
    room = runpy.run_path(str(FOLDER / "obstacles.py"))
    commands: dict[str, list[str]] = {}
    place = room["Place"](tmp_path, 1, room["METHODS"])
    monkeypatch.setattr(room["Place"], "carry_out", lambda self, asked: commands.update(asked))
    lines = [*room["sequence"](place), *room["share"](place)]
    forgotten = {}
    for name, words in commands.items():
        options, more = parser().parse_known_args(words)
        assert not [word for word in more if word.startswith("-")], name
        if options.verb == "verbs:run":
            wanted = recipe.load(options.recipe, [*options.overrides, *more], check=False)
            assert wanted.evaluation and suite.load(Path(wanted.evaluation.suite)).sets["forget"].where
            forgotten[name] = set(wanted.data.forget.where["id"])  # type: ignore[index, arg-type]
    assert len(forgotten["share/npo-50"]) == 100 and forgotten["share/npo-1"] < forgotten["share/sisa-5"]
    assert forgotten["together/npo-8"] == set().union(*(forgotten[f"sequence/npo-{k}"] for k in range(1, 9)))
    assert sum(line.startswith("| npo |") for line in lines) == len(room["REQUESTS"]) + len(room["SHARES"])
