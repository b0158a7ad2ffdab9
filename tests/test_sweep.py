"""Sweeps: words become a search space, trials become runs that are gone on with, and what nothing beats becomes a recipe."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_bench import number, results

from llm_unlearn import recipe
from llm_unlearn.cli import main
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.following.standing import standing
from llm_unlearn.spec import Refused, fingerprint
from llm_unlearn.sweeping import choosing, pruning, running, space, study
from llm_unlearn.sweeping.held import Held
from llm_unlearn.sweeping.pruning import Look, behind

ROOT = Path(__file__).parents[1]
ROWS = "prompt: question, answer: answer, limit: 6"
RECIPE = f"""\
# A recipe to be swept.
output: runs/x
model: {{base: embedded:target}}
data:
  forget: {{source: embedded:forget, {ROWS}}}
  retain: {{source: embedded:retain, {ROWS}}}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: nll}}, weight: 2.0}}
train: {{steps: 4, stop: {{until: retrained, every: 2}}}}
evaluation: s.yaml
"""
SUITE = f"""\
sets: {{forget: {{source: embedded:forget, {ROWS}}}, retain: {{source: embedded:retain, {ROWS}}}}}
measures: [{{name: probability, set: forget}}, {{name: probability, set: retain}}]
retrained: embedded:retrained
max_new_tokens: 8
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder with a recipe and a suite; its child processes import this copy."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "s.yaml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------- words


def test_words_become_lists_ranges_and_settings() -> None:
    found = space.space_of(
        [
            "train.lr=1e-5..1e-3@log",
            "model.adapter={rank: 8, alpha: 16}",
            "objective.forget.loss.name=npo, simnpo",
            "train.steps=1..8",
            "objective.retain.weight=0..1@step=0.25",
            "seed=-1..-.5",
            "train.rules=[{name: project}, {name: sharpness}]",
            "model.adapter.targets=[q_proj, v_proj],all-linear,'a,b'",
            "data.forget.source=../rows.jsonl",
        ]
    )
    assert found.dimensions == (
        space.Range("train.lr", 1e-5, 1e-3, log=True),
        space.Listed("objective.forget.loss.name", ("npo", "simnpo")),
        space.Range("train.steps", 1, 8),
        space.Range("objective.retain.weight", 0.0, 1.0, step=0.25),
        space.Range("seed", -1.0, -0.5),
        space.Listed("model.adapter.targets", ("[q_proj, v_proj]", "all-linear", "'a,b'")),
    )
    point = {one.key: one.ends[0] for one in found.dimensions}
    words = found.settings(point)
    assert words[:2] == ["train.lr=1e-05", "model.adapter={rank: 8, alpha: 16}"], "in the order in which they were given"
    assert words[-1] == "data.forget.source=../rows.jsonl" and words[7] == "model.adapter.targets=[q_proj, v_proj]"
    assert not found.listed and found.size is None
    assert [space.space_of([one.word]).dimensions for one in found.dimensions] == [(one,) for one in found.dimensions]


def test_what_can_be_counted_is_counted() -> None:
    found = space.space_of(["a=x,y", "b=0..0.3@step=0.1", "c=1..2", "d=5"])
    assert found.size == 16 and not found.listed
    points = list(found.points())
    assert points[:3] == [{"a": "x", "b": b, "c": c} for b, c in (("0.0", "1"), ("0.0", "2"), ("0.1", "1"))]
    assert points[-1] == {"a": "y", "b": "0.3", "c": "2"} and len(points) == 16
    (one,) = space.space_of(["a=1..10@step=4"]).dimensions
    assert [one.at(place) for place in range(one.count)] == ["1", "5", "9"]
    many = space.space_of(["seed=0..2147483647", "b=0.5..1e9@step=0.5"])
    assert many.size == 2**31 * (2 * 10**9) and next(iter(many.points())) == {"seed": "0", "b": "0.5"}, (
        "none is made that is not asked for"
    )
    assert space.space_of(["a=0..9007199254740993"]).size == 9007199254740994
    assert space.space_of(["a=1..10@log"]).size is None and space.space_of(["a=1,2"]).listed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lr=1e-3"], "command line: nothing to search: no key=… has more than one value; expected a list such as"),
        ([], "command line: nothing to search"),
        (["train.lr=1e-3..1e-5"], "train.lr: found '1e-3..1e-5'; the first end of a range is the lower one, 1e-5..1e-3."),
        (["train.lr=1e-5..1e-3@lg"], "train.lr: found '1e-5..1e-3@lg'; expected a list such as 0.05,0.1,0.5, or a range"),
        (["train.lr=0..1e-3@log"], "a logarithmic range begins above 0"),
        (["train.steps=1..8@step=9"], "expected a step above 0 that fits into the range"),
        (["train.lr=1e-3,,1e-4"], "in which a value is empty"),
        (["train.lr=1e-3,1e-4,1e-3"], "train.lr: 1e-3 stands in the list twice; keep one."),
        (["train.lr=1e-3,1e-4", "train.lr=1e-5"], "train.lr: stands there twice; keep one."),
        (["train.lrr=1e-5,1e-4"], "command line: train.lrr: unknown key; did you mean 'lr'?"),
        (["train.lr=0..1"], "command line: train.lr: found 0; expected greater than 0."),
        (["train.steps=1,8.5"], "command line: train.steps: found 8.5; expected a valid integer"),
        (["objective.forget.loss.name=npo,nppo"], "objective.forget.loss.name: found 'nppo'; did you mean 'npo'?"),
        (["objective.forget.loss.beta=0.1,high"], "objective.forget.loss.beta: found 'high'"),
        (["train.lr=1e-5,1e-4", "output=x"], "output=x: `sweep` sets output itself"),
        (["evaluation.every=1,2"], "evaluation.every=1,2: `sweep` sets output itself, and one suite measures all"),
        (["train.lr=1e-5..1e-4", "--sampler", "grid"], "--sampler: a grid has no end with train.lr=1e-05..0.0001; name its values"),
        (["train.lr=1e-5,1e-4", "--pick", "retain>=0.9"], "--pick: found 'retain>=0.9'; expected kept>=SHARE or forgotten>=SHARE"),
        (["train.lr=1e-5,1e-4", "--pick", "kept>=95"], "--pick: found 'kept>=95'"),
        (["train.lr=1e-5,1e-4", "--suite", "ss.yaml"], "ss.yaml: no such file"),
        (["train.lr=1e-5,1e-4", "--suite", "blind.yaml"], "blind.yaml: retrained: missing; a sweep compares with the model"),
        (["train.lr=1e-5,1e-4", "--suite", "deaf.yaml"], "deaf.yaml: measures: a sweep needs some on the set `forget`"),
        (
            ["train.lr=1e-5,1e-4", "train.stop=null", "evaluation=null"],
            "r.yaml: evaluation: missing; a sweep compares what a suite finds.",
        ),
        (["train.lr=1e-5,1e-4", "--output", "taken"], "--output: taken exists and is not the folder of a sweep."),
        (["train.lr=1e-5,1e-4", "--output", "r.yaml"], "--output: r.yaml is a file; r.yaml must be a folder"),
    ],
)
def test_what_is_refused_before_anything_runs(
    words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_unlearn.sweeping.command.keep_busy", lambda *_: pytest.fail("a run was started"))
    (here / "taken").mkdir()
    (here / "taken" / "notes.txt").touch()
    (here / "blind.yaml").write_text(SUITE.replace("retrained: embedded:retrained\n", ""))
    (here / "deaf.yaml").write_text(SUITE.replace("{name: probability, set: forget}, ", ""))
    assert main(["sweep", "r.yaml", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and len(err.splitlines()) == 1
    assert not (here / "runs").exists()


def test_a_storage_that_is_none_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "r.yaml", "train.lr=1e-5,1e-4", "--storage", "no such thing"]) == 2
    assert "error: --storage: cannot be opened" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- pruning


def looks(*values: tuple[float, float], every: int = 2) -> list[Look]:
    return [Look(every * place, *both) for place, both in enumerate(values, 1)]


DONE = [looks(*((step * k / 8, 1 - step * k / 64) for step in range(1, 7))) for k in range(1, 6)]  # the third is the median:
LOW = ((0.1, 0.9), (0.2, 0.9), (0.8, 0.8))  # at steps 2, 4, 6, 8 (.375, .953), (.75, .906), (1.125, .859), (1.5, .812)


@pytest.mark.parametrize(
    ("mine", "ended"),
    [
        (LOW, True),
        (((0.375, 0.9), *LOW[1:]), False),  # is the median once
        ((*LOW[:2], (0.8, 0.86)), False),  # keeps more
        ((LOW[0], (0.2, 0.92), LOW[2]), False),  # kept more one look ago
        ((*LOW[:2], (1.2, 0.80)), False),  # has forgotten more
        (((9.0, 0.9), *LOW[1:], (1.1, 0.8)), True),  # what was before the last three looks is past
        (LOW[:2], False),  # has hardly begun
    ],
)
def test_who_is_behind_on_both_sides_is_ended(mine: tuple[tuple[float, float], ...], ended: bool) -> None:
    said = behind(looks(*mine), DONE)
    assert bool(said) is ended
    assert behind(looks(*mine), DONE[:-1]) == "", "a median of few says little"
    if ended:
        step = 2 * len(mine)
        assert said == f"until step {step}, 3 looks in a row, it had forgotten less and kept less than the median of 5 trials"


def test_a_trial_that_has_hardly_moved_is_left_alone() -> None:
    longer = [looks(*one_of_each) for one_of_each in ([(0.9, 0.99)] * count for count in (3, 6, 7, 20, 20))]  # half of 14 steps: 7
    assert behind(looks(*[(0.1, 0.9)] * 3), longer) == ""
    assert behind(looks(*[(0.1, 0.9)] * 4), longer).startswith("until step 8")


def test_trials_that_are_done_already_count_with_their_last_look() -> None:
    quick = [looks((0.9, 0.9))] * 5
    assert behind(looks(*[(0.1, 0.8)] * 3), quick)
    assert not behind(looks(*[(0.1, 0.95)] * 3), quick)
    late = [looks((0.9, 0.9), every=5)] * 5
    assert behind(looks(*[(0.1, 0.8)] * 3), late) == "", "nobody had been looked at by step 4"


def test_looks_are_read_from_what_a_run_writes(here: Path) -> None:
    rows = [
        {"step": 1, "forget": 0.1},
        {"step": 2, "forget_perplexity": math.e, "retain_perplexity": math.e**2},
        {"step": 4, "forget_perplexity": math.inf, "retain_perplexity": 2.0},
        {"step": 6, "retain_perplexity": 2.0},
    ]
    (here / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 8, "forget_perp')
    (found,) = pruning.looks_in(here, "log.jsonl", None)
    assert (found.step, found.forgotten, found.kept) == (2, pytest.approx(1), pytest.approx(-2))

    def only(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "values": {"after": one["values"]["after"]}}

    numbers = [number(1.0, 0.4, 0.2), number(0.8, 0.6, 0.1, of="retain")]
    (here / "evaluations.jsonl").write_text(json.dumps({"step": 3, "numbers": [only(one) for one in numbers]}) + "\n")
    (found,) = pruning.looks_in(here, "evaluations.jsonl", results(number(1.0, 0.0, 0.2), number(0.8, 0.8, 0.1, of="retain")))
    assert (found.step, found.forgotten, found.kept) == (3, pytest.approx(0.75), pytest.approx(0.75))
    assert pruning.looks_in(here, "evaluations.jsonl", None) == []
    assert pruning.looks_in(here / "nowhere", "log.jsonl", None) == []


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ([], "log.jsonl"),
        (["evaluation={suite: s.yaml, every: 1}"], "evaluations.jsonl"),
        (["train.stop.until=null"], ""),
        (["train.stop=null"], ""),
        (["method={name: task_vector}", "objective=null"], ""),
    ],
)
def test_which_recipes_say_something_on_the_way(words: list[str], file: str) -> None:
    assert pruning.readable(recipe.load(Path("r.yaml"), words, check=False)) == file


# ------------------------------------------------------------------------------------------------------------ choosing


def trial(number_: int, forgotten: float, kept: float, state: study.State = "complete", collapsed: bool = False) -> study.Trial:
    score = 2 * forgotten * kept / (forgotten + kept or 1)
    facts = {"forgotten": forgotten, "kept": kept, "score": score, "forget_quality": None, "collapsed": collapsed}
    return study.Trial(number_, state, {"train.lr": "1e-05"}, facts if state == "complete" else {"why": "late"})


TRIALS = [
    trial(0, 0.90, 0.90), trial(1, 0.70, 0.99), trial(2, 1.0, 0.5, collapsed=True), trial(3, 0.80, 0.85), trial(4, 0.95, 0.82),
    trial(5, 0, 0, "pruned"), trial(6, 0, 0, "failed"),
]  # fmt: skip


def test_the_frontier_has_what_nothing_beats_and_nothing_collapsed() -> None:
    rows = choosing.rows_of(TRIALS)
    assert [row["number"] for row in rows if row["frontier"]] == [0, 1, 4]
    assert [row["state"] for row in rows] == ["complete", "complete", "collapsed", "complete", "complete", "pruned", "failed"]
    assert rows[0]["settings"] == {"train.lr": 1e-5} and rows[0]["folder"] == "trial-0000" and rows[5]["why"] == "late"
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert {one["name"] for one in choosing.board_of(TRIALS)["methods"]} == {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize(
    ("rule", "number_"), [(None, 0), ("kept>=0.95", 1), ("kept >= 80%", 4), ("forgotten>=.8", 0), ("forgotten>=0.92", 4)]
)
def test_the_choice(rule: str | None, number_: int) -> None:
    chosen = choosing.chosen(choosing.rows_of(TRIALS), choosing.rule_of(rule))
    assert chosen and chosen["number"] == number_


def test_where_nothing_may_be_chosen_it_is_said_why() -> None:
    for trials, word, said in (
        (TRIALS, "kept>=0.995", "no trial has kept at least 0.995; the most is 0.990, of trial-0001"),
        (TRIALS[2:3], None, "every trial with numbers has collapsed"),
        (TRIALS[5:], None, "no trial has numbers"),
    ):
        rows, rule = choosing.rows_of(trials), choosing.rule_of(word)
        assert choosing.chosen(rows, rule) is None and choosing.why_none(rows, rule) == said


# ------------------------------------------------------------------------------------------------------------ sweeping

CHILD = """\
import json, math, os, pathlib, signal, sys, time
path, *settings, how = sys.argv[1:]
given = dict(word.split("=", 1) for word in settings)
place = pathlib.Path(json.loads(given["output"])); name = place.name
lr, weight = float(given.get("train.lr", 1e-4)), float(given.get("objective.retain.weight", 2))
plan = json.loads(pathlib.Path("plan.json").read_text()); mine = plan.get(name, plan.get("all", ""))
with open("calls.txt", "a") as calls: calls.write(f"{name} {how} {lr:g} {weight:g}\\n")
if (place / "evaluation.json").exists(): print("finished"); sys.exit(0)
begun = (place / "checkpoints").exists()
if mine == "refuse": print("error: data.forget: row 7 is empty", file=sys.stderr); print("late words"); sys.exit(2)
if mine == "crash": raise KeyError(name)
forgotten = max(0.0, 1 - abs(math.log10(lr) + 4) / 2); kept = min(1.0, 0.5 + weight / 4)
with open(place / "log.jsonl", "w") as log:
    for step in range(2, 10, 2):
        log.write(json.dumps({"step": step, "forget_perplexity": 1 + step * forgotten, "retain_perplexity": 2 - kept}) + "\\n")
if mine in ("hang", "die", "slow") and not begun or mine == "always":
    (place / "checkpoints").mkdir(exist_ok=True)
    def end(*_): pathlib.Path(f"{name}.ended").touch(); sys.exit(130)
    signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, signal.SIG_IGN)
    pathlib.Path(f"{name}.{os.getpid()}.pid").touch()
    if mine in ("die", "always"): os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 if mine == "hang" else 6)
if mine == "sleep": time.sleep(0.4)
found = json.loads(pathlib.Path("results.json").read_text())
found["numbers"][0]["values"]["after"]["value"] = 1 - forgotten; found["numbers"][1]["values"]["after"]["value"] = kept
found["run"]["broken"] = mine == "broken"; found["run"]["reason"] = "forget not finite at step 3"; found["title"] = str(place)
asked = {"measure": "probability", "set": "forget", "asked": "at most 1", "value": 1.0}
found["thresholds"] = [{**asked, "holds": mine != "unmet", "why": "too much is known"}]
(place / "evaluation.json").write_text(json.dumps(found))
sys.exit(1 if mine in ("broken", "unmet") else 0)
"""
DRIVER = """\
import sys
from llm_unlearn import folder
from llm_unlearn.spec import plain, to_yaml
from llm_unlearn.sweeping import running
true = running.Job.command
def command(job, point, name):
    words = true(job, point, name)
    wanted = job.wanted(point, name)
    folder.write(job.output / name / folder.RECIPE, f"# hash {wanted.hash}\\n{to_yaml(plain(wanted))}")  # as a run does
    assert words[:4] == [sys.executable, "-m", "llm_unlearn", "run"]
    return [sys.executable, "child.py", *words[4:]]
running.Job.command = command
running.PATIENCE = 0.05
if __name__ == "__main__":
    from llm_unlearn.cli import main
    sys.exit(main(sys.argv[1:]))
"""
Play = Callable[..., list[str]]


def prepare(here: Path, plan: Mapping[str, str]) -> None:
    (here / "plan.json").write_text(json.dumps(plan))
    definition = {"definition": "what it is"}
    found = results(number(1.0, 0.5, 0.0, **definition), number(1.0, 1.0, 1.0, of="retain", **definition), seed=0)
    found["suite_hash"] = fingerprint(suites.load(here / "s.yaml"))
    (here / "results.json").write_text(json.dumps(found))
    (here / "child.py").write_text(CHILD)
    (here / "driver.py").write_text(DRIVER)


@pytest.fixture
def play(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Sweep with children that only pretend; gives what was called since, in order."""
    monkeypatch.setattr(running.Job, "command", running.Job.command)  # what the driver puts in its place is taken back
    monkeypatch.setattr(running, "PATIENCE", 0.05)
    (here / "driver.py").write_text(DRIVER)
    exec(compile(DRIVER, "driver.py", "exec"), {"__name__": "driver"})

    def call(*words: str, status: int = 0, plan: Mapping[str, str] | None = None) -> list[str]:
        prepare(here, plan or {})
        (here / "calls.txt").unlink(missing_ok=True)
        assert main(["sweep", "r.yaml", "--output", "out", *words]) == status
        return (here / "calls.txt").read_text().splitlines() if (here / "calls.txt").exists() else []

    yield call


def data(here: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((here / "out" / "sweep.json").read_text())
    return found


GRID = ("train.lr=1e-5,1e-4", "objective.retain.weight=1,2")


def test_of_lists_alone_every_point_then_nothing_more(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert play(*GRID, "train.warmup=0") == [
        f"trial-000{n} --resume {lr} {weight}"
        for n, (lr, weight) in enumerate((lr, w) for lr in ("1e-05", "0.0001") for w in (1, 2))
    ]
    out, err = capsys.readouterr()
    assert "4 trials by grid of 4 points on s.yaml" in out and "trials: 4 with numbers" in out and "out/chosen.yaml" in out
    assert "trial-0003: forgotten 1.000, kept 1.000 train.lr=1e-4 objective.retain.weight=2" in err
    found = data(here)
    assert found["front"] == [3] and found["chosen"] == 3 and found["counts"]["complete"] == 4
    assert [one["state"] for one in found["trials"]] == ["collapsed", "complete", "collapsed", "complete"]
    assert (
        found["trials"][1]["settings"] == {"train.lr": 1e-5, "objective.retain.weight": 2} and found["trials"][1]["seconds"] == 3.0
    )
    assert found["command"].startswith("llm-unlearn sweep r.yaml --output out train.lr=1e-5,1e-4")
    text = (here / "out" / "frontier.svg").read_text()
    words = {element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")}
    assert {"1", "3", "before", "retrained"} <= words and "llm-unlearn sweep" in text
    assert "trial-0003" in (here / "out" / "comparison.html").read_text()
    assert play(*GRID, "train.warmup=0") == [], "nothing is run twice"
    assert data(here)["chosen"] == 3
    capsys.readouterr()
    assert play(*GRID, "train.warmup=0", "--trials", "3", "--json") == []
    facts = json.loads(capsys.readouterr().out)
    assert facts["status"] == 0 and facts["chosen"] == 3 and facts["problems"] == [] and len(facts["trials"]) == 4


def test_the_chosen_recipe_is_whole_and_can_be_launched(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(*GRID, "train.warmup=0", "--pick", "forgotten>=0.4")
    path = here / "out" / "chosen.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == "# Chosen by `llm-unlearn sweep` of r.yaml: most kept of those with forgotten at least 0.4."
    assert lines[1].startswith("# trial-0003 of out, train.lr=1e-4 objective.retain.weight=2: forgotten 1.000, kept 1.000.")
    assert "extends" not in path.read_text() and lines[3] == 'launch: r"""' and lines[-1].startswith('# """; from llm_unlearn')
    wanted = recipe.load(path)
    own = recipe.load(Path("r.yaml"), ["train.lr=1e-4", "objective.retain.weight=2", "train.warmup=0"])
    assert wanted.hash == own.hash and wanted.output == "out/chosen"
    compile(path.read_text(), "chosen.yaml", "exec")  # what accelerate runs
    assert play(*GRID, "train.warmup=0", "--pick", "kept>=0.9", status=0) == []
    assert play(*GRID, "train.warmup=0", "--pick", "forgotten>=1.0", "--trials", "1") == []
    (here / "out" / "trial-0003" / "recipe.yaml").unlink()
    capsys.readouterr()
    assert play(*GRID, "train.warmup=0", status=1) == []
    assert "trial-0003 is chosen, and its recipe cannot be read" in capsys.readouterr().err and not path.exists()


def test_what_is_chosen_is_what_ran(play: Play, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that a sweep reads may be changed as its last trial runs."""
    tell = running.Trials.ended

    def ended(trials: running.Trials, child: Any, status: int) -> str:
        (here / "r.yaml").write_text(RECIPE.replace("steps: 4", "steps: 5"))
        assert standing(here / "out")["state"] == "running" and standing(here / "out")["wanted"] == 1
        return tell(trials, child, status)

    monkeypatch.setattr(running.Trials, "ended", ended)
    play("train.lr=1e-5,1e-4", "--jobs", "2", "--trials", "1")
    assert recipe.load(here / "out" / "chosen.yaml").train.steps == 4
    facts = standing(here / "out")
    assert (facts["state"], facts["trials"], facts["chosen"]) == ("finished", {"complete": 1}, "trial-0000")


def test_no_choice_leaves_no_recipe(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play("train.lr=1e-5,2e-5", "--seed", "1")
    assert (here / "out" / "chosen.yaml").exists()
    assert play("train.lr=1e-5,2e-5", "--pick", "forgotten>=0.9", status=1) == []
    assert not (here / "out" / "chosen.yaml").exists(), "it was chosen by another rule"
    assert "nothing is chosen: no trial has forgotten at least 0.9; the most is 0.651, of trial-0001." in capsys.readouterr().err


def test_draws_follow_from_the_seed_and_not_from_interruptions(play: Play, here: Path) -> None:
    words = ("train.lr=1e-5..1e-3@log", "objective.retain.weight=1,2,3", "--no-prune")
    whole = play(*words, "--trials", "13", "--output", "a")
    assert len(whole) == 13 and len({line.split()[2] for line in whole}) == 13
    assert all(1e-5 <= float(line.split()[2]) <= 1e-3 for line in whole)
    parts = [play(*words, "--trials", str(count), "--output", "b") for count in (1, 4, 12, 13)]
    assert [line for part in parts for line in part] == whole, "tpe's eleventh and later draws look at the trials before"
    other = play(*words, "--trials", "2", "--output", "c", "--seed", "1")
    assert not {line.split()[2] for line in other} & {line.split()[2] for line in whole}
    assert len(play(*words, "--trials", "2", "--output", "d", "--sampler", "nsga2")) == 2
    assert len(play(*words, "--trials", "2", "--output", "e", "--sampler", "random", "--storage", f"sqlite:///{here}/e.db")) == 2
    assert play(*words, "--trials", "2", "--output", "e", "--sampler", "random", "--storage", f"sqlite:///{here}/e.db") == []


def test_a_database_holds_the_studies_of_folders_that_are_called_alike(
    play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing that is written says who logs in there."""
    words = ("train.lr=1e-5,1e-4", "--storage", f"sqlite:///file:{here}/s.db?token=hunter2hunter2&uri=true")
    for project in ("a", "b"):
        assert len(play(*words, "--output", f"{project}/sweep", "--trials", "1")) == 1, "none of them is the other's"
    (here / "a").rename(here / "c")
    assert play(*words, "--output", "c/sweep", "--trials", "1") == []
    said = capsys.readouterr()
    for text in (
        *said,
        *(path.read_text() for path in (here / "c").rglob("*") if path.suffix in (".json", ".yaml", ".html", ".svg")),
    ):
        assert "hunter2" not in text
    assert "…" in json.loads((here / "c" / "sweep" / "sweep.json").read_text())["command"]


def test_a_database_that_is_locked_or_of_another_version_is_no_bug(
    play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train.lr=1e-5,1e-4", "--storage", f"sqlite:///{here}/s.db?timeout=0.01")
    play(*words)
    with sqlite3.connect(here / "s.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        capsys.readouterr()
        play(*words, "--trials", "3", "--sampler", "random", status=2)
        assert "error: --storage: cannot be opened" in (said := capsys.readouterr().err) and "database is locked" in said
        other.rollback()
        other.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    other.close()
    play(*words, status=2)
    assert "error: --storage: cannot be opened (RuntimeError: The runtime optuna version" in capsys.readouterr().err


def test_no_point_of_a_countable_space_is_run_twice(play: Play, here: Path) -> None:
    found = play("objective.retain.weight=1..6", "--trials", "9", "--sampler", "random", "--no-prune")
    assert sorted(line.split()[-1] for line in found) == list("123456"), "and then there is nothing left"
    numbers = [one["number"] for one in data(here)["trials"]]
    assert len(numbers) == 6 and data(here)["counts"]["failed"] == 0


def test_a_changed_recipe_suite_or_space_is_refused(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play("train.lr=1e-5,1e-4")
    before = (here / "out" / "study.journal").read_bytes()
    for words, changed, said in (
        (
            ["train.lr=1e-5,1e-3"],
            "",
            "holds a sweep of another search space (search space: train.lr=1e-5,1e-3, not train.lr=1e-5,1e-4)",
        ),
        (["train.lr=1e-5,1e-4", "seed=3"], "", "holds a sweep of another recipe"),
        (["train.lr=1e-5,1e-4"], "s.yaml", "holds a sweep of another suite"),
    ):
        if changed:
            (here / changed).write_text(SUITE.replace("8", "9"))
        capsys.readouterr()
        assert play(*words, status=2) == []
        assert said in capsys.readouterr().err
    assert (here / "out" / "study.journal").read_bytes() == before


def test_failures_are_told_and_made_up_for_by_the_next_command(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"trial-0001": "refuse", "trial-0002": "broken", "trial-0003": "unmet"}
    assert len(play(*GRID, status=1, plan=plan)) == 4
    err = capsys.readouterr().err
    assert "trial-0001 failed, exit status 2: error: data.forget: row 7 is empty" in err
    assert "trial-0002 failed, stopped: forget not finite at step 3" in err
    assert [one["state"] for one in data(here)["trials"]] == ["collapsed", "failed", "failed", "complete"]
    assert data(here)["trials"][3]["misses"] == "too much is known", "a run that misses a threshold has its numbers"
    assert "# It misses thresholds: too much is known." in (here / "out" / "chosen.yaml").read_text()
    assert play(*GRID) == ["trial-0004 --resume 1e-05 2", "trial-0005 --resume 0.0001 1"], "the points that are missing"
    assert play(*GRID) == [] and data(here)["counts"]["failed"] == 2


def test_where_nothing_but_one_failure_comes_of_it_the_sweep_ends(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(play("train.lr=1e-5..1e-3@log", "--no-prune", status=1, plan={"all": "crash"})) == 3
    assert "stopped: the first 3 trials failed the same way: exit status 1: KeyError: 'trial-0002'" in capsys.readouterr().err
    assert len(play("train.lr=1e-5..1e-3@log", "--trials", "2")) == 2, "the cause is gone: trials are made up for"


def test_a_child_that_is_killed_goes_on_once(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = play("train.lr=1e-5,1e-4", status=1, plan={"trial-0000": "die", "trial-0001": "always"})
    assert [line.split()[0] for line in calls] == ["trial-0000", "trial-0000", "trial-0001", "trial-0001"]
    err = capsys.readouterr().err
    assert "trial-0000: killed by signal 9; it goes on from its newest checkpoint" in err
    assert "trial-0001 failed, killed by signal 9" in err
    assert data(here)["counts"] == {"complete": 1, "pruned": 0, "failed": 1, "running": 0}


def test_a_trial_behind_on_both_sides_is_ended_and_its_checkpoints_go(
    play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # five that do well, then one that forgets less (lr 1e-5) and keeps less (weight 1)
    words = ("train.lr=1e-4,1e-5", "objective.retain.weight=2,3,4,5,6,1", "--trials", "12")
    calls = play(*words, "--sampler", "grid", plan={"trial-0011": "slow"})
    assert len(calls) == 12 and (here / "trial-0011.ended").exists(), "it was asked to end, not killed"
    last = data(here)["trials"][-1]
    said = "until step 8, 3 looks in a row, it had forgotten less and kept less than the median of 11 trials"
    assert (last["state"], last["why"]) == ("pruned", said)
    assert not (here / "out" / "trial-0011" / "checkpoints").exists() and (here / "out" / "trial-0011" / "log.jsonl").exists()
    assert "1 ended early" in capsys.readouterr().out
    assert play(*words, "--sampler", "grid") == [], "it is not begun again"


def test_where_nothing_can_be_ended_early_it_is_said_once(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    play("train.lr=1e-4,1e-5", "train.stop=null")
    assert capsys.readouterr().out.count("no trial can be ended early: that takes train.stop.until") == 1


def test_a_lock_outlives_its_holder_in_a_child(here: Path) -> None:
    held = Held.take(here / "a" / "lock")
    assert held and Held.take(here / "a" / "lock") is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held.file])
    held.release()
    assert Held.take(here / "a" / "lock") is None
    child.communicate(b"\n")
    again = Held.take(here / "a" / "lock")
    assert again
    again.release()


def test_half_a_line_of_a_power_cut_is_taken_out(play: Play, here: Path) -> None:
    play("train.lr=1e-5,1e-4", "--trials", "1", "--sampler", "grid")
    journal = here / "out" / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "work')
    assert len(play("train.lr=1e-5,1e-4", "--sampler", "grid")) == 1
    assert all(json.loads(line) for line in journal.read_text().splitlines())


# ----------------------------------------------------------------------------------------------- several processes


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "driver.py", "sweep", "r.yaml", "--output", "out", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_one_study(here: Path) -> None:
    prepare(here, {"all": "sleep"})
    words = ("train.lr=1e-5..1e-3@log", "--trials", "7", "--no-prune")
    both = [start(*words), start(*words)]
    said = [one.communicate(timeout=60) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    calls = (here / "calls.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in calls) == [f"trial-000{n}" for n in range(7)], "each trial once"
    assert len({line.split()[2] for line in calls}) == 7
    done = [sum(f"{name}: forgotten" in err for name in (f"trial-000{n}" for n in range(7))) for _, err in said]
    assert sum(done) == 7 and min(done) >= 2, "both took part"
    assert data(here)["counts"]["complete"] == 7


@pytest.mark.slow
def test_what_a_killed_sweep_left_is_taken_up_when_its_child_is_gone(
    play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(here, {"trial-0001": "hang"})
    sweep = start("train.lr=1e-5,1e-4,1e-3")
    until(lambda: list(here.glob("trial-0001.*.pid")))
    sweep.kill()
    sweep.communicate()
    (found,) = here.glob("trial-0001.*.pid")
    orphan = int(found.name.split(".")[1])
    # its child goes on alone: the trial is not begun beside it
    assert play("train.lr=1e-5,1e-4,1e-3") == ["trial-0002 --resume 0.001 2"]
    assert "1 under way elsewhere, or left" in capsys.readouterr().out
    os.kill(orphan, signal.SIGTERM)
    until(lambda: (here / "trial-0001.ended").exists())
    until(lambda: (one := Held.take(here / "out" / "locks" / "trial-0001")) and (one.release() or True))
    assert play("train.lr=1e-5,1e-4,1e-3") == ["trial-0001 --resume 0.0001 2"]
    assert data(here)["counts"] == {"complete": 3, "pruned": 0, "failed": 0, "running": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_asks_the_children_and_the_same_command_goes_on(sent: signal.Signals, status: int, play: Play, here: Path) -> None:
    prepare(here, {"trial-0001": "hang"})
    sweep = start("train.lr=1e-5,1e-4")
    until(lambda: list(here.glob("trial-0001.*.pid")))
    sweep.send_signal(sent)
    _, err = sweep.communicate(timeout=30)
    assert sweep.returncode == status and "The same command goes on from there." in err
    assert (here / "trial-0001.ended").exists() and not (here / "out" / "sweep.json").exists()
    assert play("train.lr=1e-5,1e-4", plan={"trial-0001": "hang"}) == ["trial-0001 --resume 0.0001 2"]


# ---------------------------------------------------------------------------------------------------------------- real


@pytest.mark.long
@pytest.mark.slow
def test_a_real_sweep(here: Path, cache: Path, embedded: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The literal command on the embedded model: two learning rates, two steps each."""
    command = [
        sys.executable,
        "-m",
        "llm_unlearn",
        "sweep",
        "r.yaml",
        "train.lr=1e-4,1e-3",
        "train.steps=2",
        "--output",
        "out",
        "--json",
    ]
    env = {**os.environ, "LLM_UNLEARN_CACHE": str(cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert [(one["state"], one["steps"]) for one in facts["trials"]] == [("complete", 2)] * 2
    slow, fast = facts["trials"]
    assert slow["forgotten"] < fast["forgotten"] and facts["chosen"] in facts["front"]
    assert (here / "out" / "comparison.html").is_file() and (here / "out" / "trial-0000" / "report.html").is_file()
    capsys.readouterr()
    assert main(["plan", "out/chosen.yaml"]) == 0
    with pytest.raises(Refused, match="another recipe"):
        study.open_study(here / "out", None, {"recipe": "other"}, space.space_of(["a=1,2"]), "grid", 0, 2)
