"""Folders of recipes: what is listed, what is run and what is not run again, and in which order the methods end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from llm_unlearn import bench, catalogue, recipe
from llm_unlearn.children import Child, InOrder, carry_out, environment_of_a_child, keep_busy, last_words
from llm_unlearn.cli import main
from llm_unlearn.report import ranking
from llm_unlearn.report.frontier import frontier_svg
from llm_unlearn.report.leaderboard import board_of, markdown
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parents[1]
FORGET = "{source: embedded:forget, prompt: question, answer: answer}"
RETAIN = "{source: embedded:retain, prompt: question, answer: answer}"
NPO = f"""\
# Negative preference optimization alone.
#   accelerate launch few/npo.yaml [key=value ...]          (Zhang et al. 2024, 2404.05868)
output: runs/x
model: {{base: embedded:target}}
data:
  forget: {FORGET}
  retain: {RETAIN}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: nll}}, weight: 2.0}}
"""
ASCENT = "# Ascent | with\n# a long header.\nextends: npo.yaml\nobjective: {forget: {loss: {name: ascent}}}\n"
SUITE = f"""\
sets: {{forget: {FORGET}, retain: {RETAIN}}}
measures: [{{name: probability, set: forget}}, {{name: probability, set: retain}}]
retrained: embedded:retrained
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder with two recipes and a suite; its child processes import this copy."""
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "npo.yaml").write_text(NPO)
    (tmp_path / "few" / "ascent.yaml").write_text(ASCENT)
    (tmp_path / "s.yaml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    return err


# ------------------------------------------------------------------------------------------------------------- scoring


def number(
    before: float | None,
    after: float | None,
    retrained: float | None,
    measure: str = "probability",
    of: str = "forget",
    **more: Any,
) -> dict[str, Any]:
    """One number of an evaluation; infinite values are written as `run.results_of` writes them."""

    def entry(value: float | None) -> dict[str, Any]:
        if value is None:
            return {"missing": "needs generations"}
        return {"value": value} if math.isfinite(value) else {"missing": f"the value is {value}"}

    facts = {
        "measure": measure, "title": measure.replace("_", " "), "set": of, "settings": {}, "definition": "", "knowing": "raises",
        "goal": {"forget": "as retrained", "holdout": ""}.get(of, "as before"),
    }  # fmt: skip
    values = {"before": entry(before), "after": entry(after), "retrained": entry(retrained)}
    return {**facts, "values": values, **more}


def results(*numbers: dict[str, Any], **run: Any) -> dict[str, Any]:
    facts = {
        "recipe_hash": "h", "status": "finished", "reason": "", "broken": False, "steps": 2, "kept_step": 2, "seconds": 3.0,
        "device": "cpu", "processes": 1, "precision": "fp32", "versions": {"torch": "2.13.0"},
    } | run  # fmt: skip
    models = {name: {"name": f"some/{name}", "identity": name} for name in ("before", "after", "retrained")}
    whole = {"title": "", "suite": "s.yaml", "curves": {}, "answers": {}}
    return {"run": facts, "numbers": list(numbers), "models": models, "suite_hash": "s", **whole}


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (number(1.0, 0.2, 0.2), 1.0),
        (number(1.0, 0.6, 0.2), 0.5),
        (number(1.0, 1.0, 0.2), 0.0),
        (number(0.9, 0.0, 0.5), 0.0),  # as far beyond the retrained model as before on this side
        (number(1.0, 0.3, 0.5), 0.6),  # over-forgotten by .2 of .5
        (number(0.5, 0.9, 0.1), 0.0),  # knows more than before: no less than nothing
        (number(0.52, 0.51, 0.5), None),  # before and retrained are the same
        (number(1.0, None, 0.5), None),
        (number(None, 0.5, 0.5), None),
        (number(1.0, 0.5, None), None),
        (number(1.0, NAN, 0.5), 0.0),
        (number(math.e, math.e**2, math.e**3, "perplexity", knowing="lowers"), 0.5),
        (number(math.e, INF, math.e**3, "perplexity", knowing="lowers"), 0.0),
        (number(1.00, 1.01, 1.04, "perplexity", knowing="lowers"), None),  # .04 nats apart
        (number(1e-9, 0.5, None, "forget_quality"), None),
        (number(1.0, 0.5, 0.5, of="retain"), None),
        (number(1.0, 0.5, 0.5, of="holdout"), None),
    ],
)
def test_closeness_in_closed_form(one: dict[str, Any], expected: float | None) -> None:
    assert ranking.closeness(one) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (number(0.8, 0.6, 0.1, of="retain"), 0.75),
        (number(0.8, 0.9, 0.1, of="general"), 1.0),  # a gain makes up for no loss elsewhere
        (number(2.0, 4.0, 2.0, "perplexity", "retain", knowing="lowers"), 0.5),
        (number(2.0, 1.5, 2.0, "perplexity", "retain", knowing="lowers"), 1.0),
        (number(2.0, INF, 2.0, "perplexity", "retain", knowing="lowers"), 0.0),
        (number(0.8, NAN, 0.8, of="retain"), 0.0),
        (number(0.8, None, 0.8, of="retain"), None),
        (number(0.0, 0.5, 0.8, of="retain"), None),
        (number(0.8, 0.5, 0.8, "membership", "retain", knowing="moves"), None),
        (number(0.8, 0.5, 0.8), None),
    ],
)
def test_what_is_kept_in_closed_form(one: dict[str, Any], expected: float | None) -> None:
    assert ranking.kept_share(one) == (expected if expected is None else pytest.approx(expected))


def test_a_run_is_scored_by_both_and_by_nothing_else() -> None:
    found = ranking.scores_of(
        results(
            number(1.0, 0.6, 0.2),
            number(1.0, 0.2, 0.2, "rouge"),
            number(1e-9, 0.031, None, "forget_quality"),
            number(1.0, 0.9, 1.0, of="retain"),
            number(0.5, 0.5, 0.5, of="general"),
        )
    )
    assert found["forgotten"] == pytest.approx(0.75) and found["kept"] == pytest.approx(0.95)
    assert found["score"] == pytest.approx(2 * 0.75 * 0.95 / 1.7)
    assert found["forget_quality"] == 0.031 and found["collapsed"] is False


def test_a_run_without_anything_to_compare_has_no_score() -> None:
    found = ranking.scores_of(results(number(1.0, 0.5, None)))
    assert (found["forgotten"], found["kept"], found["score"], found["collapsed"]) == (None, None, None, False)
    assert ranking.standing([found])["state"] == "unscored"
    assert ranking.harmonic(0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("kept", "collapsed"),
    [([0.81, 0.81], False), ([0.79, 0.79], True), ([1.0, 1.0, 1.0, 1.0, 0.49], True)],  # the last: one score is lost altogether
)
def test_the_floor(kept: list[float], collapsed: bool) -> None:
    numbers = [number(1.0, value, 1.0, f"m{i}", of="retain") for i, value in enumerate(kept)]
    assert ranking.scores_of(results(number(1.0, 0.2, 0.2), *numbers))["collapsed"] is collapsed


def test_the_interval_is_students() -> None:
    assert ranking.estimate([0.5]) == {"mean": 0.5, "half": None}
    assert ranking.estimate([None, None]) == {"mean": None, "half": None}
    found = ranking.estimate([0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["half"] == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))
    assert ranking.middle([3.0, None, 1.0, 2.0]) == 2.0 and ranking.middle([]) is None


def scored(forgotten: float, kept: float) -> dict[str, Any]:
    """A run of two measures, with exactly these scores."""
    return results(number(1.0, 1 - forgotten, 0.0), number(1.0, kept, 1.0, of="retain"))


def board(
    methods: Mapping[str, list[Any]], folder: Path = Path("few"), paper: str = "Zhang et al. 2024, 2404.05868"
) -> dict[str, Any]:
    outcomes = {
        catalogue.Method(folder / f"{name}.yaml", f"What {name} does.", paper): [
            (seed, f"out/{name}/seed-{seed}", found) for seed, found in enumerate(runs)
        ]
        for name, runs in methods.items()
    }
    return board_of(outcomes, suite="eval/quick.yaml", suite_hash="5u1te", command="llm-unlearn bench few --suite eval/quick.yaml")


def test_a_collapsed_model_is_never_first() -> None:
    found = board(
        {
            "all gone": [scored(1.0, 0.79)] * 2,  # by far the best score
            "once gone": [scored(1.0, 1.0), scored(1.0, 0.1)],
            "timid": [scored(0.01, 1.0)] * 2,
            "lost": ["exit status 2: error: no", scored(0.9, 1.0)],
            "good": [scored(0.8, 0.9), scored(0.9, 0.9)],
        }
    )["methods"]
    assert [(one["name"], one["rank"], one["state"]) for one in found] == [
        ("good", 1, "ranked"),
        ("timid", 2, "ranked"),
        ("all gone", None, "collapsed"),
        ("once gone", None, "collapsed"),
        ("lost", None, "failed"),
    ]
    assert [one["frontier"] for one in found] == [True, True, False, False, False]
    alone = board({"all gone": [scored(1.0, 0.79)]})["methods"]
    assert alone[0]["rank"] is None


def test_the_frontier_is_what_nothing_beats() -> None:
    assert ranking.frontier([]) == []
    assert ranking.frontier([(0.5, 1.0), (0.9, 0.9), (0.5, 0.9), (0.8, 0.9), (0.9, 0.9)]) == [True, True, False, False, True]


# --------------------------------------------------------------------------------------------------------- leaderboard


def test_the_page_has_every_method_and_both_models_to_compare_with(here: Path) -> None:
    found = board({"npo": [scored(0.5, 1.0), scored(0.7, 1.0)], "bad": ["exit status 1: KeyError: 'a|b'"] * 2})
    page = markdown(found, Path("docs/board.md"), Path("docs/board.svg"))
    lines = page.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    head, before, retrained, npo, bad = ([cell.strip() for cell in row.strip("|").split(" | ")] for row in rows)
    assert head[3:] == [
        "forgotten",
        "kept",
        "score",
        "frontier",
        "forget quality p",
        "forget probability",
        "retain probability",
        "seconds",
    ]
    assert before[1] == "*before*" and before[-3:-1] == ["1.000", "1.000"] and retrained[-3:-1] == ["0.000", "1.000"]
    assert npo[:3] == ["1", "[npo](../few/npo.yaml)", "Zhang et al. 2024, [2404.05868](https://arxiv.org/abs/2404.05868)"]
    assert npo[3:7] == ["0.600 ± 1.271", "1.000 ± 0.000", "0.745 ± 0.997", "●"] and npo[-3] == "0.400"
    assert bad[0] == "failed" and "—" in bad
    assert "- bad, seed 1: exit status 1: KeyError: 'a\\|b'" in lines
    assert "llm-unlearn bench few --suite eval/quick.yaml" in lines and "](board.svg)" in page
    assert "mean over 2 seeds" in page and "under torch 2.13.0" in page
    assert not re.search(r"20\d\d-\d\d", page), "a page without a date changes only when its numbers do"
    assert "one seed, hence no interval" in markdown(board({"npo": [scored(0.5, 1.0)]}), Path("a.md"), Path("a.svg"))


def test_methods_that_begin_elsewhere_are_judged_by_where_they_end() -> None:
    other = scored(0.5, 0.6)
    other["models"] = {name: {"name": name, "identity": f"sisa-{name}"} for name in ("before", "retrained")}
    other["numbers"][1]["values"]["before"]["value"] = 0.6  # it kept all of what little it had
    found = board({"a": [scored(0.5, 1.0)], "b": [scored(0.6, 1.0)], "sisa": [other]})
    assert found["models"]["others"] == ["sisa"] and found["models"]["before"]["name"] == "some/before"
    (one,) = next(method for method in found["methods"] if method["name"] == "sisa")["runs"]
    assert (one["forgotten"], one["kept"]) == pytest.approx((0.5, 0.6))
    assert "or have another control: sisa" in markdown(found, Path("a.md"), Path("a.svg"))


def test_the_plot_is_svg_that_says_the_names(here: Path) -> None:
    methods = {
        f"method {i}": [scored(0.7 + 0.01 * i, 0.97 - 0.002 * i), scored(0.72 + 0.01 * i, 0.98 - 0.002 * i)] for i in range(12)
    }
    found = board({**methods, "gone & <lost>": [scored(0.9, 0.3)], "failed": ["exit status 2: no"]})
    text = frontier_svg(found)
    words = [element.text or "" for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")]
    assert {*methods, "before", "retrained", "gone & <lost> (kept 0.30)"} <= set(words) and "failed" not in words
    assert frontier_svg(found) == text and not re.search(r"20\d\d-\d\d-\d\d", text)
    assert frontier_svg(board({"failed": ["exit status 2: no"]})).count("<svg") == 1


def test_the_board_is_plain_data_with_every_number() -> None:
    found = board({"npo": [scored(0.5, 1.0)]})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (run,) = found["methods"][0]["runs"]
    assert [(one["set"], one["values"]["after"]) for one in run["numbers"]] == [("forget", 0.5), ("retain", 1.0)]


# ------------------------------------------------------------------------------------------------------------- methods


def test_methods_lists_sentence_paper_losses_and_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "few" / "idk.yaml").write_text(
        "extends: npo.yaml\nmodel: {adapter: null}\n"
        "data: {retain: null, forget: {alternate: {source: embedded:refusals, answer: text}}}\n"
        "objective: {forget: {loss: {name: idk}}, retain: null}\n"
    )
    (here / "few" / ".hidden.yaml").write_text("nonsense")
    (here / "few" / "notes.txt").write_text("nonsense")
    assert main(["methods", "few"]) == 0
    _, head, _, *rows = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert head.split() == ["method", "what", "it", "does", "objective", "needs"]
    ascent, idk, npo, _ = ([cell.strip() for cell in re.split(r"\s{3,}", row.strip())] for row in rows)
    assert ascent == ["ascent", "Ascent | with a long header.", "ascent(forget) + 2 × nll(retain)", "retain set, LoRA"]
    assert idk == ["idk", "idk(forget)", "alternate answers, forget set only, full weights"]
    sentence = "Negative preference optimization alone. (Zhang et al. 2024, 2404.05868)"
    assert npo == ["npo", sentence, "npo(forget) + 2 × nll(retain)", "reference log-probs, retain set, LoRA"]


def test_methods_lists_what_it_can_and_refuses_the_rest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "few" / "bad.yaml").write_text(NPO.replace("npo}", "nppo}"))
    assert main(["methods", "few"]) == 2
    out, err = capsys.readouterr()
    assert "ascent(forget)" in out and "bad.yaml:9: objective.forget.loss.name: found 'nppo'; did you mean 'npo'?" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fwe", "fwe: no such folder (looked from"),
        ("empty", "empty: holds no recipe; expected *.yaml files."),
        ("few/npoo.yaml", "few/npoo.yaml: no such file (looked from"),
        ("two", "two/a.yml: has the name of a.yaml but for its ending; rename one"),
    ],
)
def test_a_folder_that_cannot_be_meant(name: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    (here / "two").mkdir()
    for ending in ("yaml", "yml"):
        (here / "two" / f"a.{ending}").write_text(NPO)
    assert said in refused(capsys, "methods", name)
    assert said in refused(capsys, "bench", name, "--suite", "s.yaml")


def test_methods_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from llm_unlearn.cli import main; main(['methods', 'few']); print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_header(path: Path) -> None:
    sentence, paper = catalogue.header_of(path.read_text(encoding="utf-8"))
    assert sentence.endswith(".") and "accelerate" not in sentence
    assert paper == "" or re.search(r"\d{4}", paper)
    assert catalogue.needs_of(recipe.load(path, check=False))


# --------------------------------------------------------------------------------------------------------------- bench

CHILD = """\
import json, pathlib, signal, sys, time
from llm_unlearn import folder, recipe, spec
path, *settings, how = [word for word in sys.argv[1:] if word != "--debug"]
wanted = recipe.load(pathlib.Path(path), settings)
name = f"{pathlib.Path(path).stem}/{wanted.seed}"
with open("calls.txt", "a") as calls: calls.write(f"{name} {how}\\n")
plan = json.loads(pathlib.Path("plan.json").read_text())
assert not folder.check(wanted, how == "--resume", how == "--overwrite")
if how == "--overwrite": folder.clear(pathlib.Path(wanted.output))
if plan.get(name) == "refuse":
    print("many words"); print("error: data.forget: row 7 is empty", file=sys.stderr); print("late words"); sys.exit(2)
folder.write(pathlib.Path(wanted.output) / "recipe.yaml", f"# hash {wanted.hash}\\n" + spec.to_yaml(spec.plain(wanted)))
if plan.get(name) == "crash": raise KeyError("lost")
if plan.get(name) == "hang":
    def end(*_): pathlib.Path("ended.txt").write_text(name); sys.exit(130)
    signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, signal.SIG_IGN)
    pathlib.Path("hanging.txt").touch(); time.sleep(60)
if "slow" in plan: time.sleep(0.3)
with open("calls.txt", "a") as calls: calls.write(f"{name} done\\n")
found = json.loads(pathlib.Path("results.json").read_text())
found["run"]["broken"] = plan.get(name) == "broken"; found["run"]["reason"] = "forget not finite at step 3"
folder.write(pathlib.Path(wanted.output) / "evaluation.json", json.dumps(found))
if plan.get(name) == "broken": print("stopped: forget not finite at step 3"); sys.exit(1)
"""


@pytest.fixture
def play(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run the bench with children that only pretend; gives what was called since, in order."""
    (here / "child.py").write_text(CHILD)
    true_command = bench.command_of

    def command(run: bench.Run) -> list[str]:
        words = true_command(run)
        assert words[:4] == [sys.executable, "-m", "llm_unlearn", "run"]
        return [sys.executable, str(here / "child.py"), *words[4:]]

    monkeypatch.setattr(bench, "command_of", command)

    def call(*words: str, status: int = 0, **plan: str) -> list[str]:
        (here / "plan.json").write_text(json.dumps({name.replace("__", "/"): how for name, how in plan.items()}))
        found = scored(0.5, 1.0)
        found["suite_hash"] = bench.fingerprint(bench_suite("s.yaml"))
        (here / "results.json").write_text(json.dumps(found))
        (here / "calls.txt").unlink(missing_ok=True)
        assert main(["bench", "few", "--suite", "s.yaml", "--output", "out", *words]) == status
        calls = here / "calls.txt"
        return [line for line in (calls.read_text().splitlines() if calls.exists() else []) if "slow" in plan or "done" not in line]

    return call


def bench_suite(name: str) -> Any:
    from llm_unlearn.evaluation import suite

    return suite.load(Path(name))


Play = Callable[..., list[str]]


def test_every_recipe_with_every_seed_then_nothing_more(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert play("--seeds", "2", "train.steps=2") == [f"{name} --resume" for name in ("ascent/0", "ascent/1", "npo/0", "npo/1")]
    out = capsys.readouterr().out
    assert "2 recipes × 2 seeds on s.yaml: 4 to begin; logs in out/logs" in out and "out/leaderboard.md" in out
    wanted = recipe.load(here / "out" / "npo" / "seed-1" / "recipe.yaml")
    assert (wanted.seed, wanted.train.steps, wanted.evaluation and wanted.evaluation.suite) == (1, 2, "s.yaml")
    assert {path.name for path in (here / "out").iterdir()} == {
        "ascent",
        "npo",
        "logs",
        *(f"leaderboard.{x}" for x in ("json", "md", "svg")),
    }
    assert {path.name for path in (here / "out" / "logs").iterdir()} == {f"{a}-{b}.txt" for a in ("npo", "ascent") for b in (0, 1)}
    found = json.loads((here / "out" / "leaderboard.json").read_text())
    assert found["command"] == "llm-unlearn bench few --suite s.yaml --output out --seeds 2 train.steps=2"
    assert [len(one["runs"]) for one in found["methods"]] == [2, 2]

    assert play("--seeds", "2", "train.steps=2", "--suite", str(here / "s.yaml")) == [], "the suite's path is no part of a run"
    assert "4 finished already" in capsys.readouterr().out
    assert play("--seeds", "3", "train.steps=2") == ["ascent/2 --resume", "npo/2 --resume"]


def test_half_a_run_goes_on_and_another_recipes_run_is_redone(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play("--seeds", "2")
    (here / "out" / "npo" / "seed-1" / "evaluation.json").unlink()
    (here / "few" / "ascent.yaml").write_text(ASCENT + "train: {lr: 1.0e-5}\n")
    capsys.readouterr()
    assert play("--seeds", "2") == ["ascent/0 --overwrite", "ascent/1 --overwrite", "npo/1 --resume"]
    out = capsys.readouterr().out
    assert "1 finished already, 1 to go on with, 2 to redo" in out
    assert "to redo, as the recipe or the suite has changed since (the old run is replaced): ascent/0, ascent/1" in out
    (here / "s.yaml").write_text(SUITE + "max_new_tokens: 9\n")
    assert play("--seeds", "1") == ["ascent/0 --overwrite", "npo/0 --overwrite"]
    (here / "out" / "npo" / "seed-0" / "evaluation.json").write_text('{"half": ')
    assert play("--seeds", "1") == ["npo/0 --overwrite"]
    assert play("--seeds", "1") == []


def test_a_recipe_that_forgets_other_rows_is_left_out_and_named(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "few" / "ascent.yaml").write_text(ASCENT + "data: {forget: {where: {person: Dorami Caldorn}}}\n")
    play("--seeds", "1")
    assert "forgets other rows than s.yaml asks about: ascent" in capsys.readouterr().out
    assert "forgets other rows than the suite asks about: ascent." in (here / "out" / "leaderboard.md").read_text()
    assert not (here / "out" / "ascent").exists()


def test_where_every_recipe_forgets_other_rows_nothing_is_replaced(
    play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "out").mkdir()
    (here / "out" / "leaderboard.json").write_text("{}")
    (here / "few" / "npo.yaml").write_text(
        NPO.replace(f"forget: {FORGET}", f"forget: {FORGET[:-1]}, where: {{person: Dorami Caldorn}}}}")
    )
    assert play("--seeds", "1", status=2) == []
    assert "s.yaml: every recipe forgets other rows than it asks about (ascent, npo)." in capsys.readouterr().err
    assert (here / "out" / "leaderboard.json").read_text() == "{}" and len(list((here / "out").iterdir())) == 1


def test_a_run_that_was_evaluated_again_is_made_again(play: Play, here: Path) -> None:
    """`evaluate --output RUN --overwrite` leaves numbers that say nothing of the run."""
    play("--seeds", "1")
    file = here / "out" / "npo" / "seed-0" / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run": None}))
    assert play("--seeds", "1") == ["npo/0 --overwrite"]
    run = bench.Run(catalogue.Method(Path("npo.yaml"), "", ""), 0, (), file.parent, here / "log", "finished")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run": None}))
    assert bench.outcome_of(run, {}) == "ended with an evaluation.json that is not a run's"


def test_a_run_that_fails_does_not_end_the_others(play: Play, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"ascent__0": "refuse", "ascent__1": "crash", "npo__0": "broken"}
    assert len(play("--seeds", "2", status=1, **plan)) == 4
    out, err = capsys.readouterr()
    last = err.splitlines()[-3:]
    assert last == [
        "ascent/0 failed, exit status 2: error: data.forget: row 7 is empty (out/logs/ascent-0.txt)",
        "ascent/1 failed, exit status 1: KeyError: 'lost' (out/logs/ascent-1.txt)",
        "npo/0 failed, exit status 1: stopped: forget not finite at step 3 (out/logs/npo-0.txt)",
    ]
    assert "failed" in out
    found = {one["name"]: one for one in json.loads((here / "out" / "leaderboard.json").read_text())["methods"]}
    assert (found["npo"]["state"], found["npo"]["failed"], found["npo"]["rank"]) == ("failed", 1, None)
    assert found["npo"]["score"]["mean"] == pytest.approx(2 / 3) and found["ascent"]["score"]["mean"] is None
    assert "failed (1 of 2)" in (here / "out" / "leaderboard.md").read_text()
    # once more: what was refused or fell over is tried again; a run that a loss broke would break again, and stays failed
    assert play("--seeds", "2", status=1) == ["ascent/0 --resume", "ascent/1 --resume"]
    assert "npo/0 failed, stopped: forget not finite at step 3" in capsys.readouterr().err


def test_the_first_run_is_alone_and_the_others_are_not(play: Play, here: Path) -> None:
    calls = play("--seeds", "2", "--jobs", "2", slow="yes")
    assert calls[:2] == ["ascent/0 --resume", "ascent/0 done"]
    assert sorted(calls[2:4]) == ["ascent/1 --resume", "npo/0 --resume"], "two at a time, once the first has made the tables"
    assert len(calls) == 8


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_children_and_says_how_to_go_on(
    sent: signal.Signals, play: Play, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (here / "hanging.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), sent)

    before = signal.getsignal(sent)
    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    assert play("--seeds", "2", status=130 if sent == signal.SIGINT else 143, ascent__1="hang") == [
        "ascent/0 --resume",
        "ascent/1 --resume",
    ]
    thread.join()
    assert time.monotonic() - began < 30 and signal.getsignal(sent) is before
    assert (here / "ended.txt").read_text() == "ascent/1", "the child was asked, not killed"
    assert "interrupted with 1 of 4 runs finished; the same command goes on from there." in capsys.readouterr().err
    assert not (here / "out" / "leaderboard.json").exists()
    assert play("--seeds", "2") == ["ascent/1 --resume", "npo/0 --resume", "npo/1 --resume"]


def test_a_second_ctrl_c_ends_children_that_do_not_listen(here: Path) -> None:
    deaf = "import signal, time, pathlib; [signal.signal(one, signal.SIG_IGN) for one in (2, 15)]"
    stubborn = f"{deaf}; pathlib.Path('on').touch(); time.sleep(60)"

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (here / "on").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        carry_out([Child("a/0", [sys.executable, "-c", stubborn], here / "log.txt")], 1, os.environ)
    thread.join()
    assert time.monotonic() - began < 30


def test_the_bar_names_who_runs_now(here: Path) -> None:
    waiting, seen = [Child(name, [sys.executable, "-S", "-c", ""], here / name) for name in ("a", "b")], list[str]()
    bar: Any = SimpleNamespace(n=0, update=lambda n, facts: seen.append(facts["running"]))
    assert keep_busy(InOrder(waiting), 1, os.environ, bar, made=True)
    assert seen == ["a", "", "b", ""]


def test_threads_are_shared_out() -> None:
    assert environment_of_a_child({"OMP_NUM_THREADS": "8", "A": "b"}, 3) == {
        "OMP_NUM_THREADS": "2",
        "A": "b",
        "PYTHONUNBUFFERED": "1",
    }
    assert environment_of_a_child({"OMP_NUM_THREADS": "1"}, 4)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment_of_a_child({}, 1)
    assert int(environment_of_a_child({}, 2)["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


def test_the_last_words_of_a_log(here: Path) -> None:
    for text, said in (
        ("Traceback\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("step 1\rstep 2\r\nerror: a\nerror: b\nbye\n", "error: b"),
        ("Traceback\n  File\ntorch.OutOfMemoryError: no\n", "torch.OutOfMemoryError: no"),
        ("step 1\rstep 2", "step 2"),
        ("", "it said nothing"),
    ):
        (here / "log").write_text(text)
        assert last_words(here / "log") == said


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "carry_out", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))


def test_all_problems_of_all_recipes_are_said_before_anything_runs(
    nothing_runs: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "few" / "one.yaml").write_text(NPO.replace("npo}", "nppo}"))
    (here / "few" / "two.yaml").write_text(NPO.replace("embedded:retain", "no/such/file.jsonl") + "trian: {}\n")
    (here / "few" / "three.yaml").write_text("extends: npo.yaml\ndata: {retain: null}\n")
    said = refused(capsys, "bench", "few", "--suite", "s.yaml", "--output", "out")
    assert "few/one.yaml:9: objective.forget.loss.name: found 'nppo'" in said and "few/two.yaml:11: trian: unknown key" in said
    assert "objective.retain: reads stream 'retain', which data does not have" in said
    assert len(said.splitlines()) == len(set(said.splitlines())) == 3, "once, not once per seed"
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lrr=1"], "command line: train.lrr: unknown key; did you mean 'lr'?"),
        (["seed=4"], "command line: seed=4: `bench` sets seed, output, evaluation itself; use --seeds, --output and --suite."),
        (["evaluation.every=2"], "command line: evaluation.every=2: `bench` sets"),
        (["--suite", "ss.yaml"], "ss.yaml: no such file (looked from"),
        (["--suite", "blind.yaml"], "blind.yaml: retrained: missing"),
        (["--suite", "deaf.yaml"], "deaf.yaml: measures: a leaderboard needs some on the set `forget`"),
        (["--write", "board"], "--write: board: expected the name of a markdown page, such as board.md."),
        (["--write", "mine.md"], "--write: mine.md exists and was not written by `llm-unlearn bench`."),
        (["--output", "taken"], "output: taken/npo/seed-0 exists and is not a run folder"),
    ],
)
def test_what_else_is_refused(
    words: list[str], said: str, nothing_runs: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.md").write_text("# My page\n")
    (here / "taken" / "npo" / "seed-0").mkdir(parents=True)
    (here / "taken" / "npo" / "seed-0" / "notes.txt").touch()
    (here / "blind.yaml").write_text(SUITE.replace("retrained: embedded:retrained\n", ""))
    (here / "deaf.yaml").write_text(SUITE.replace("{name: probability, set: forget}, ", ""))
    err = refused(capsys, "bench", "few", "--suite", "s.yaml", *words)
    assert said in err and len(err.splitlines()) == 1
    assert (here / "mine.md").read_text() == "# My page\n" and not (here / "runs").exists()


@pytest.mark.parametrize("word", ["0", "-1", "two", "1.5"])
def test_counts_are_whole_numbers(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "few", "--suite", "s.yaml", f"--seeds={word}"])
    assert caught.value.code == 2 and "expected a whole number from 1 on" in capsys.readouterr().err


def test_a_page_of_its_own_is_replaced(play: Play, here: Path) -> None:
    play("--seeds", "1", "--write", "docs/b.md")
    first = (here / "docs" / "b.md").read_text()
    play("--seeds", "1", "--write", "docs/b.md")
    assert (here / "docs" / "b.md").read_text() == first and (here / "docs" / "b.svg").is_file()
    assert "[npo](../few/npo.yaml)" in first and "Ascent" not in first
    (here / "docs" / "b.svg").write_text("<svg>mine</svg>")
    with pytest.raises(Refused, match=r"b\.svg exists and was not written"):
        bench.runs_of(
            bench.Asked(
                catalogue.methods_in("few"),
                "s.yaml",
                Path("s.yaml"),
                bench_suite("s.yaml"),
                1,
                here / "out",
                here / "docs" / "b.md",
                1,
                here,
                (),
                "",
            )
        )


# ---------------------------------------------------------------------------------------------------------------- real


@pytest.mark.long
@pytest.mark.slow
def test_two_recipes_two_seeds_two_jobs(here: Path, cache: Path, embedded: Mapping[str, Path]) -> None:
    """The literal command on real models, killed at once and gone on with."""
    rows = "limit: 6}"
    small = (
        SUITE.replace("answer: answer}", f"answer: answer, {rows}")
        .replace("measures: [", "measures: [{name: rouge, set: forget}, ")
        .replace("retrained:", "max_new_tokens: 8\nretrained:")
    )
    (here / "s.yaml").write_text(small)
    env = {**os.environ, "LLM_UNLEARN_CACHE": str(cache)}
    words = [
        sys.executable,
        "-m",
        "llm_unlearn",
        "bench",
        "few",
        "--suite",
        "s.yaml",
        "--seeds",
        "2",
        "--jobs",
        "2",
        "--output",
        "o",
    ]
    command = [*words, "--write", "docs/b.md", "train.steps=2"]
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (here / "o" / "ascent" / "seed-0" / "recipe.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=100)
    assert running.returncode == 130 and "the same command goes on from there" in err
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((here / "o" / "leaderboard.json").read_text())
    assert sorted(one["name"] for one in found["methods"]) == ["ascent", "npo"]
    for one in found["methods"]:
        assert [run["seed"] for run in one["runs"]] == [0, 1] and one["score"]["half"] is not None
        assert {run["status"] for run in one["runs"]} == {"finished"} and {run["steps"] for run in one["runs"]} == {2}
    assert "ascent" in done.stdout and (here / "docs" / "b.svg").is_file()
    page = (here / "docs" / "b.md").read_text()
    assert "*before*" in page and "*retrained*" in page
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "4 finished already" in again.stdout
    assert (here / "docs" / "b.md").read_text() == page
