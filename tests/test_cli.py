"""The command line: what each verb writes and refuses, its exit codes, and when a run folder may be written."""

import argparse
import ast
import errno
import io
import json
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import llm_unlearn
from llm_unlearn import folder, recipe, tree
from llm_unlearn.cli import cache_folder, launch, main
from llm_unlearn.options import parser
from llm_unlearn.spec import Refused, plain, to_yaml
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST
from llm_unlearn.troubles import OutOfMemory

ROOT = Path(__file__).parents[1]
RECIPE = """\
output: runs/x
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}}
evaluation: eval/quick.yaml
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, as the only process, without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the command line went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Asked:
    """Stands in for `llm_unlearn.run`: keeps what it is asked and answers as it is told."""

    def __init__(self) -> None:
        self.runs: list[tuple[recipe.Recipe, Any, dict[str, Any]]] = []
        self.evaluations: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = []
        self.outcome: Any = SimpleNamespace(status="finished", step=3, kept=3, reason="", broken=False)

    def run(self, wanted: recipe.Recipe, suite: Any, **how: Any) -> Any:
        self.runs.append((wanted, suite, how))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def evaluate(self, suite: Any, name: str, asked: dict[str, Any], **how: Any) -> dict[str, Any]:
        self.evaluations.append((suite, name, asked, how))
        return {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    heard, module = Asked(), ModuleType("llm_unlearn.run")
    module.run, module.evaluate = heard.run, heard.evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llm_unlearn.run", module)
    return heard


@pytest.fixture
def path(here: Path) -> Path:
    (here / "r.yaml").write_text(RECIPE)
    return here / "r.yaml"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a verb says on standard error when it refuses."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


# --------------------------------------------------------------------------------------------------------- new, schema


def test_new_writes_a_recipe_that_loads_and_is_launchable(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "mine"]) == 0
    assert capsys.readouterr().out.splitlines() == ["mine.yaml", "next: llm-unlearn plan mine.yaml"]
    text = (here / "mine.yaml").read_text()
    assert "accelerate launch mine.yaml" in text
    wanted = recipe.load(Path("mine.yaml"))
    assert wanted.output == "runs/mine"
    shipped = recipe.load(ROOT / "recipes" / "forget_lora.yaml")
    assert wanted.hash == shipped.hash
    settings, imported, call = ast.parse(text).body
    assert isinstance(settings, ast.AnnAssign)
    assert [ast.unparse(imported), ast.unparse(call)] == ["from llm_unlearn import launch", "launch(__file__)"]
    launched: list[str] = []
    monkeypatch.setattr(llm_unlearn, "launch", launched.append)
    exec(compile(text, "mine.yaml", "exec"), {"__file__": "mine.yaml"})  # what `python mine.yaml` does
    assert launched == ["mine.yaml"]


@pytest.mark.parametrize(
    ("name", "file", "output"),
    [("a/b", "a/b.yaml", "runs/b"), ("c.yaml", "c.yaml", "runs/c"), ("d.yml", "d.yml", "runs/d")],
)
def test_new_takes_a_path_with_or_without_its_ending(name: str, file: str, output: str, here: Path) -> None:
    assert main(["new", name]) == 0
    assert [str(found.relative_to(here)) for found in here.rglob("*.y*ml")] == [file]
    assert recipe.load(Path(file)).output == output


def test_new_refuses_to_overwrite(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "new", "r")
    assert "r.yaml: exists already" in said and "another name" in said
    assert path.read_text() == RECIPE


@pytest.mark.parametrize(
    ("words", "inside"), [(["schema"], "objective"), (["schema", "recipe"], "train"), (["schema", "suite"], "measures")]
)
def test_schema_prints_json(words: list[str], inside: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert inside in json.loads(capsys.readouterr().out)["properties"]


# ----------------------------------------------------------------------------------------------------------- run, plan


def test_run_hands_the_recipe_and_its_suite_on(path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_UNLEARN_CACHE", "kept/here")
    assert main(["run", "r.yaml", "train.lr=1e-5", "seed=4"]) == 0
    ((wanted, suite, how),) = asked.runs
    assert (wanted.train.lr, wanted.seed) == (1e-5, 4)
    assert suite.retrained == "embedded:retrained"
    assert how == {"cache": Path("kept/here"), "resume": False, "overwrite": False, "retrained": "embedded:retrained"}


def test_settings_may_stand_before_and_after_options(path: Path, asked: Asked) -> None:
    assert main(["run", "r.yaml", "seed=4", "--overwrite"]) == 0
    assert main(["run", "r.yaml", "--resume", "evaluation=null"]) == 0
    assert main(["evaluate", "eval/quick.yaml", "--model", "embedded:target", "max_new_tokens=7"]) == 0
    assert asked.evaluations[0][0].max_new_tokens == 7
    assert [(wanted.seed, suite is None, how["resume"], how["overwrite"]) for wanted, suite, how in asked.runs] == [
        (4, False, False, True),
        (0, True, True, False),
    ]


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_missing_suite_is_refused_with_the_key_that_names_it(
    verb: str, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(RECIPE.replace("quick", "quik"))
    said = refused(capsys, verb, "r.yaml")
    assert "r.yaml:7: evaluation.suite:" in said and "eval/quik.yaml" in said and "no such file" in said
    assert not asked.runs


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_wrong_suite_is_refused_before_anything_heavy(
    verb: str, here: Path, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "eval").mkdir()
    (here / "eval" / "quick.yaml").write_text(
        "sets:\n  forget: {source: embedded:forget, prompt: question, answer: answer}\n"
        "measures:\n- {name: perplexty, set: forget}\n- {name: rouge, set: froget}\n"
    )
    said = refused(capsys, verb, "r.yaml")
    assert "quick.yaml:4: measures[0].name: found 'perplexty'; did you mean 'perplexity'?" in said
    assert not asked.runs


SUITE = """\
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer}
  text: {source: embedded:forget, text: answer}
measures:
- {name: rouge, set: forget}
"""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("- {name: rouge, set: froget}\n", ":6: measures[1].set: found 'froget'; did you mean 'forget'?"),
        (
            "- {name: membership, attack: {name: loss}, set: forget, against: hold}\n",
            ":6: measures[1].against: found 'hold'; Valid: forget, text.",
        ),
        (
            "- {name: multiple_choice, set: forget}\n",
            ":6: measures[1]: multiple_choice compares with wrong answers; name their column in sets.forget.perturbed",
        ),
        (
            "- {name: rouge, set: text}\n",
            ":6: measures[1]: rouge needs questions and answers, and set 'text' is running text",
        ),
        ("- {name: rouge, set: forget, sett: 3}\n", ":6: measures[1].sett: unknown key; did you mean 'set'?"),
        ("retrained: ./none\n", ":6: retrained: no such folder: ./none"),
        ("max_new_tokens: 0\n", ":6: max_new_tokens: found 0; expected greater than 0"),
    ],
)
def test_a_wrong_suite_is_refused_with_place_and_key(
    more: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "s.yaml").write_text(SUITE + more)
    assert f"s.yaml{expected}" in refused(capsys, "evaluate", "s.yaml", "--model", "embedded:target")


def test_a_finished_run_is_not_resumed_but_said_to_be_finished(
    path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(path, finished=True)
    assert main(["run", "r.yaml", "--resume"]) == 0
    assert "this run is finished; see runs/x/report.html" in capsys.readouterr().out
    assert not asked.runs


def test_a_run_without_numbers_that_broke_says_so_too(path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(RECIPE.replace("evaluation: eval/quick.yaml", "evaluation: null"))
    home = Path(begun(path, finished=True).output)
    for broken in (True, False):
        folder.seal(home, broken=broken)
        assert main(["run", "r.yaml", "--resume"]) == broken and "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"run": {"steps": 7, "broken": True}}, ""),
        (
            {
                "thresholds": [
                    {
                        "measure": "rouge",
                        "set": "forget",
                        "asked": "at most 0.5",
                        "value": 0.9,
                        "bound": 0.5,
                        "holds": False,
                        "why": "rouge on forget is 0.9",
                    }
                ]
            },
            "thresholds do not hold: rouge on forget is 0.9.",
        ),
    ],
)
def test_a_run_that_does_not_hold_says_so_whenever_it_is_asked(
    found: dict[str, Any], said: str, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = "{suite: eval/quick.yaml, thresholds: [{measure: rouge, set: forget, at_most: 0.5}]}"
    path.write_text(RECIPE.replace("evaluation: eval/quick.yaml", f"evaluation: {asks}"))
    home = Path(begun(path, finished=True).output)
    (home / folder.RESULTS).write_text(json.dumps(json.loads((home / folder.RESULTS).read_text()) | found))
    for _ in range(2):
        assert main(["run", "r.yaml", "--resume"]) == 1
        assert capsys.readouterr().err.strip() == said


def test_of_many_processes_the_first_speaks_and_tidies(
    path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Path(begun(path, finished=True).output)
    (home / folder.CHECKPOINTS).mkdir()
    monkeypatch.setenv("RANK", "1")
    assert main(["run", "r.yaml", "--resume"]) == 0
    asked.outcome = SimpleNamespace(status="stopped", step=7, kept=4, reason="forget not finite", broken=True)
    assert main(["run", "r.yaml", "--overwrite"]) == 1
    asked.outcome = SimpleNamespace(status="interrupted", step=7)
    assert main(["run", "r.yaml", "--overwrite"]) == 130
    assert capsys.readouterr() == ("", "") and (home / folder.CHECKPOINTS).is_dir()
    monkeypatch.setenv("RANK", "0")
    assert main(["run", "r.yaml", "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out and not (home / folder.CHECKPOINTS).exists()


def test_a_shipped_recipe_is_found_from_anywhere(asked: Asked) -> None:
    assert main(["run", "recipes/forget_lora.yaml", "output=here"]) == 0
    assert asked.runs[0][0].output == "here"


# ---------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (SimpleNamespace(status="finished", step=7, kept=7, reason="", broken=False), 0, ""),
        (
            SimpleNamespace(status="stopped", step=7, kept=4, reason="forget not finite", broken=True),
            1,
            "stopped: forget not finite; the weights after step 4 were kept.",
        ),
        (
            SimpleNamespace(status="stopped", step=7, kept=4, reason="retain perplexity 9 is above 8", broken=False),
            0,
            "stopped: retain perplexity 9 is above 8; the weights after step 4 were kept.",
        ),
        (
            SimpleNamespace(status="interrupted", step=7),
            130,
            "interrupted after step 7; the same command with --resume goes on from there.",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command with --resume goes on from what is finished."),
        (Refused("a: one\nb: two"), 2, "error: a: one\nerror: b: two"),
    ],
    ids=["finished", "not finite", "its own bound", "interrupted", "Ctrl-C", "refused"],
)
def test_each_way_to_end_has_its_exit_code(
    outcome: Any, status: int, said: str, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.outcome = outcome
    assert main(["run", "r.yaml"]) == status
    assert capsys.readouterr().err.strip() == said


def test_a_bug_is_not_dressed_up_as_a_refusal(path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    asked.outcome = ValueError("a bug\nin two lines")
    assert main(["run", "r.yaml"]) == 70
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("bug: ValueError: a bug in two lines (llm_unlearn/verbs.py:")
    assert all(word in said for word in ("This is a bug of llm-unlearn", "--debug", "report", "llm-unlearn doctor"))
    assert main(["run", "r.yaml", "--json"]) == 70
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == 70 and found["bug"]["type"] == "ValueError" and found["bug"]["at"].startswith("llm_unlearn/verbs.py:")


@pytest.mark.parametrize("error", [ValueError("a bug"), Refused("a: one"), OSError(errno.ENOSPC, "No space left on device", "x")])
def test_debug_shows_where_an_error_comes_from(
    error: Exception, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.outcome = error
    plain = main(["run", "r.yaml"]), capsys.readouterr().err
    error.__traceback__ = None
    status, said = main(["run", "r.yaml", "--debug"]), capsys.readouterr().err
    assert status == plain[0] and "Traceback" not in plain[1]
    assert (
        said.startswith("Traceback")
        and "in run" in said
        and said.splitlines()[-1].split(" (")[0] == plain[1].split(" (")[0].strip()
    )


def handed_on(text: str) -> Exception:
    """An error of a database, as Optuna hands it on."""
    error = type("StorageInternalError", (Exception,), {})("An exception is raised during the commit.")
    error.__cause__ = sqlite3.OperationalError(text)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/log"), "error: runs/x/log: No space left on device. Make room;"),
        (PermissionError(errno.EACCES, "Permission denied", "k"), "error: k: Permission denied. Ask for the right to it, or name"),
        (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), "error: a -> b: Read-only file system. Name a place that"),
        (OSError("no such weights"), "error: no such weights"),
        (MemoryError("Unable to allocate 7 EiB"), "error: out of memory (Unable to allocate 7 EiB); give the process more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory (DefaultCPUAllocator: can't"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "error: out of memory (cuBLAS: CUBLAS_"),
        (OutOfMemory("out of memory in step 3. Give less."), "error: out of memory in step 3. Give less."),
        (sqlite3.OperationalError("disk I/O error"), "error: a database cannot be read or written: disk I/O error."),
        (handed_on("database is locked"), "error: a database cannot be read or written: database is locked."),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "error: I/O error: No space left on device (os error 28)",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_no_bug(
    error: Exception, said: str, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.outcome = error
    assert main(["run", "r.yaml"]) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("words", [[], ["forget"], ["run"], ["evaluate", "eval/quick.yaml"], ["run", "r.yaml", "--sometimes"]])
def test_a_wrong_call_ends_with_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: llm-unlearn" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_of_many_speaks_first(
    rank: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends all when one ends: the others wait for that, so that the first one's words are not lost."""
    slept: list[float] = []
    monkeypatch.setattr("llm_unlearn.cli.time.sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    assert main(["run", "none.yaml"]) == 2
    assert bool(slept) == (rank == "1")
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_launch_does_nothing_where_there_is_a_parent_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["r.yaml"])
    monkeypatch.setattr("llm_unlearn.cli.main", lambda words: 5)
    with pytest.raises(SystemExit) as ended:
        launch("r.yaml")
    assert ended.value.code == 5
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    launch("r.yaml")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_UNLEARN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "llm_unlearn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/llm_unlearn")
    monkeypatch.setenv("LLM_UNLEARN_CACHE", "/y")
    assert cache_folder() == Path("/y")


# ------------------------------------------------------------------------------------------------------------ evaluate


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval/quik.yaml", "--model", "embedded:target"], "eval/quik.yaml: no such file"),
        (["eval/quick.yaml", "--model", "./none"], "no such folder: ./none (looked from"),
        (
            ["eval/quick.yaml", "--model", "embedded:target", "--adapter", "./none"],
            "no such folder: ./none (looked from",
        ),
        (
            ["eval/quick.yaml", "--model", "embedded:target", "--retrained", "./none"],
            "no such folder: ./none (looked from",
        ),
        (
            ["eval/quick.yaml", "--model", "embedded:target", "--output", "kept"],
            "output: kept has an evaluation.json already",
        ),
        (
            ["eval/quick.yaml", "max_new_tokns=3", "--model", "embedded:target"],
            "command line: max_new_tokns: unknown key; did you mean 'max_new_tokens'",
        ),
    ],
)
def test_evaluate_refuses(words: list[str], expected: str, here: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "kept").mkdir()
    (here / "kept" / "evaluation.json").write_text("{}")
    assert expected in refused(capsys, "evaluate", *words)
    assert not asked.evaluations
    assert (here / "kept" / "evaluation.json").read_text() == "{}"


@pytest.mark.parametrize("option", ["--model", "--adapter", "--retrained"])
def test_evaluate_names_the_option_of_a_folder_that_is_not_there(
    option: str, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--model": "embedded:target", option: "./none"}
    assert option in refused(capsys, "evaluate", "eval/quick.yaml", *(word for pair in words.items() for word in pair))


def test_evaluate_asks_for_before_after_and_retrained(here: Path, asked: Asked) -> None:
    (here / "runs" / "x" / "adapter").mkdir(parents=True)
    (here / "full" / "model").mkdir(parents=True)
    words = [
        "--model",
        "embedded:target",
        "--adapter",
        "runs/x",
        "--retrained",
        "full",
        "--quantize",
        "nf4",
        "--output",
        "out",
    ]
    assert main(["evaluate", "eval/quick.yaml", "max_new_tokens=7", *words]) == 0
    ((suite, name, models, how),) = asked.evaluations
    assert suite.max_new_tokens == 7 and name == "eval/quick.yaml" and how["output"] == Path("out")
    assert [(column, model.base, model.adapter, model.quantize, adapter) for column, (model, adapter) in models.items()] == [
        ("before", "embedded:target", None, "nf4", None),
        ("after", "embedded:target", None, "nf4", "runs/x/adapter"),
        ("retrained", "full/model", None, "nf4", None),
    ]


def test_evaluate_of_one_model_has_one_column_beside_the_suites_own_retrained(asked: Asked) -> None:
    assert main(["evaluate", "eval/quick.yaml", "--model", "embedded:target"]) == 0
    assert main(["evaluate", "eval/quick.yaml", "retrained=null", "--model", "embedded:target"]) == 0
    assert [list(models) for _, _, models, _ in asked.evaluations] == [["model", "retrained"], ["model"]]


def test_evaluate_writes_again_where_it_is_told_to(here: Path, asked: Asked) -> None:
    (here / "kept").mkdir()
    (here / "kept" / "evaluation.json").write_text('{"suite": "eval/quick.yaml", "numbers": []}')
    assert main(["evaluate", "eval/quick.yaml", "--model", "embedded:target", "--output", "kept", "--overwrite"]) == 0
    assert len(asked.evaluations) == 1


# ------------------------------------------------------------------------------------------------------ the run folder


def begun(path: Path, *, finished: bool = False, overrides: tuple[str, ...] = ()) -> recipe.Recipe:
    """A run folder as a run leaves it, and the recipe that it is of."""
    wanted = recipe.load(path, overrides)
    run = Path(wanted.output)
    folder.write(run / folder.RECIPE, f"# hash {wanted.hash}\n{to_yaml(plain(wanted))}")
    (run / folder.LOG).write_text("")
    if finished:
        (run / folder.ADAPTER).mkdir()
        if wanted.evaluation:
            held = {"title": "x", "suite": "s", "suite_hash": "h", "models": {}, "numbers": [], "curves": {}, "answers": {}}
            (run / folder.RESULTS).write_text(json.dumps(held))
    else:
        (run / folder.CHECKPOINTS).mkdir()
    return wanted


def left(run: Path) -> dict[str, str | None]:
    return {str(found.relative_to(run)): found.read_text() if found.is_file() else None for found in run.rglob("*")}


HOWS = ((False, False), (True, False), (False, True))
"""resume, overwrite"""


@pytest.mark.parametrize(("resume", "overwrite"), HOWS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_fresh_or_empty_folder_may_be_written(resume: bool, overwrite: bool, empty: bool, here: Path, path: Path) -> None:
    if empty:
        (here / "runs" / "x").mkdir(parents=True)
    assert folder.check(recipe.load(path), resume, overwrite) is False
    assert (here / "runs").exists() is empty, "looking changes nothing"


@pytest.mark.parametrize(("resume", "overwrite"), HOWS)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_folder_is_never_touched(resume: bool, overwrite: bool, kind: str, here: Path, path: Path) -> None:
    (here / "runs").mkdir()
    if kind == "folder":
        (here / "runs" / "x").mkdir()
        (here / "runs" / "x" / "thesis.tex").write_text("years of work")
    else:
        (here / "runs" / "x").write_text("years of work")
    before = left(here)
    with pytest.raises(
        Refused,
        match=r"output: runs/x (exists and is not a run folder|is a file; runs/x must be a folder).* Nothing was changed",
    ):
        folder.check(recipe.load(path), resume, overwrite)
    assert left(here) == before


@pytest.mark.parametrize(
    ("finished", "state"),
    [(True, "holds a finished run"), (False, "holds a run that did not finish; add --resume to go on with it")],
)
def test_an_earlier_run_is_kept_unless_it_is_to_be_overwritten(finished: bool, state: str, here: Path, path: Path) -> None:
    wanted = begun(path, finished=finished)
    before = left(here)
    with pytest.raises(Refused) as caught:
        folder.check(wanted, False, False)
    assert str(caught.value).startswith(f"output: runs/x {state}. Nothing was changed; add --overwrite")
    assert folder.check(wanted, False, True) is False
    assert left(here) == before


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_the_same_recipe_goes_on_or_says_that_nothing_is_left(finished: bool, path: Path) -> None:
    wanted = begun(path, finished=finished)
    assert folder.check(wanted, True, False) is finished


@pytest.mark.parametrize("adapter", ["{}", "null"])
def test_a_run_without_a_suite_is_finished_when_its_weights_are_there(adapter: str, path: Path) -> None:
    """Nothing of it is left to resume: going on would train the same weights once more."""
    wanted = begun(path, finished=True, overrides=("evaluation=null", f"model.adapter={adapter}"))
    if adapter == "null":
        (Path(wanted.output) / folder.ADAPTER).rename(Path(wanted.output) / folder.MODEL)
    assert folder.check(wanted, True, False) is True
    with pytest.raises(Refused, match="holds a finished run"):
        folder.check(wanted, False, False)


def test_resuming_with_another_recipe_is_refused(here: Path, path: Path) -> None:
    begun(path)
    before = left(here)
    with pytest.raises(Refused, match=r"runs/x was begun with another recipe \(runs/x/recipe.yaml\)") as caught:
        folder.check(recipe.load(path, ["train.lr=1e-3"]), True, False)
    assert "--overwrite" in str(caught.value)
    assert left(here) == before


def test_a_run_whose_suite_lies_beside_its_recipe_can_be_resumed(here: Path) -> None:
    """The flattened recipe lies in the run folder, from where such a suite is not found."""
    folder.write(here / "mine" / "recipes" / "r.yaml", RECIPE.replace("quick", "own"))
    folder.write(here / "mine" / "eval" / "own.yaml", SUITE)
    wanted = begun(here / "mine" / "recipes" / "r.yaml")
    assert folder.check(wanted, True, False) is False


@pytest.mark.parametrize("verb", [[], ["--resume"]])
def test_run_refuses_before_anything_heavy(verb: list[str], path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    begun(path)
    assert "output: runs/x " in refused(capsys, "run", "r.yaml", "seed=9", *verb)
    assert not asked.runs


@pytest.mark.parametrize("finished", [False, True])
def test_going_on_and_replacing_are_not_asked_at_once(
    finished: bool, here: Path, path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = begun(path, finished=finished)
    before = left(here)
    with pytest.raises(SystemExit) as end:
        main(["run", "r.yaml", "--resume", "--overwrite"])
    assert end.value.code == 2 and "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(Refused, match="resume, overwrite: one goes on with an earlier run, the other replaces it"):
        folder.check(wanted, True, True)
    assert left(here) == before and not asked.runs


@pytest.mark.parametrize("how", HOWS)
def test_a_recipe_that_somebody_wrote_is_no_run(how: tuple[bool, bool], here: Path) -> None:
    """`exp/recipe.yaml` that says `output: exp`: a run would write its own in its place."""
    folder.write(here / "exp" / "recipe.yaml", "# mine\n" + RECIPE.replace("runs/x", "exp"))
    before = left(here)
    with pytest.raises(Refused, match=r"output: exp has a recipe\.yaml that no run wrote .*Nothing was changed; choose another"):
        folder.check(recipe.load(here / "exp" / "recipe.yaml"), *how)
    assert left(here) == before


def test_clear_removes_a_run_and_does_not_mind_its_absence(here: Path, path: Path) -> None:
    begun(path, finished=True)
    folder.clear(here / "runs" / "x")
    folder.clear(here / "runs" / "x")
    assert list((here / "runs").iterdir()) == []


# ------------------------------------------------------------------------------------------- files whole or not at all


def stopped_at(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file is interrupted halfway through its text, or just before it gets its name."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def half(path: Path) -> Any:
        class Half(io.FileIO):
            def write(self, data: Any, /) -> int:
                super().write(data[:3])
                raise KeyboardInterrupt

        path.parent.mkdir(parents=True, exist_ok=True)
        return Half(path, "w")

    if what == "name":
        monkeypatch.setattr(os, "replace", interrupt)
    else:
        monkeypatch.setattr(folder, "new_file", half)


@pytest.mark.parametrize("what", ["name", "text"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_file_leaves_nothing_behind(what: str, there: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "runs" / "evaluation.json"
    if there:
        folder.write(file, "before")
    before = left(here) or {"runs": None}
    stopped_at(what, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        folder.write(file, "afterwards")
    monkeypatch.undo()
    assert left(here) == before


def test_a_file_is_replaced_whole(here: Path) -> None:
    for text in ("before, a long text", "naïve ✓"):
        folder.write(here / "a" / "b.txt", text)
        assert (here / "a" / "b.txt").read_bytes() == text.encode()
    assert [found.name for found in (here / "a").iterdir()] == ["b.txt"]


def test_a_run_folder_stands_for_what_is_in_it(here: Path) -> None:
    (here / "run" / "adapter").mkdir(parents=True)
    (here / "run" / "model").mkdir()
    assert folder.adapter_in("run") == "run/adapter" and folder.model_in("run") == "run/model"
    assert folder.adapter_in("org/name") == "org/name" and folder.model_in("embedded:target") == "embedded:target"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (["quick.yaml", "eval/quick.yaml"], lambda here: Path("eval/quick.yaml")),
        (["mine/eval/quick.yaml", "mine/recipes/eval/quick.yaml"], lambda here: here / "mine/recipes/eval/quick.yaml"),
        (["mine/eval/quick.yaml"], lambda here: here / "mine/recipes/../eval/quick.yaml"),
        ([], lambda here: ROOT / "eval" / "quick.yaml"),
    ],
    ids=["from here", "beside the recipe", "beside its folder", "shipped"],
)
def test_a_suite_is_looked_for_here_then_beside_the_recipe_then_among_the_shipped(
    made: list[str], expected: Callable[[Path], Path], here: Path
) -> None:
    (here / "mine" / "recipes").mkdir(parents=True)
    for name in made:
        folder.write(here / name, SUITE)
    found = tree.locate("eval/quick.yaml", here / "mine" / "recipes" / "r.yaml")
    assert found.resolve() == expected(here).resolve() and found.is_file()


def test_what_new_writes_opens_and_closes_with_the_launch_lines() -> None:
    assert LAUNCH_FIRST == 'launch: r"""'
    assert LAUNCH_LAST == '# """; from llm_unlearn import launch; launch(__file__)'


def test_help_and_wrong_words_are_answered_before_anything_of_ours_is_read() -> None:
    code = (
        "import sys\nfrom llm_unlearn.cli import main\n"
        "try:\n    main([{words}])\nexcept SystemExit as end:\n    print(end.code)\n"
        "print(sorted(name for name in sys.modules if name.startswith(('llm_unlearn.', 'pydantic', 'yaml', 'numpy', 'torch'))))"
    )
    for words, status in (("'--help'", 0), ("'requests', 'add', '--help'", 0), ("'rn'", 2)):
        done = subprocess.run([sys.executable, "-c", code.replace("{words}", words)], capture_output=True, text=True, check=True)
        *_, said, modules = done.stdout.splitlines()
        light = (
            "['llm_unlearn.cli', 'llm_unlearn.option_values', 'llm_unlearn.options', 'llm_unlearn.outward', 'llm_unlearn.streams']"
        )
        assert (said, modules) == (str(status), light)


# -------------------------------------------------------------------------------------------------------- for scripts


def leaves(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Every verb that does something, with its parser: `run`, `requests add`, …"""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {parser.prog.partition(" ")[2]: parser}
    return {name: leaf for group in groups for one in group.choices.values() for name, leaf in leaves(one).items()}


def test_every_verb_can_be_asked_for_json() -> None:
    found = leaves(parser())
    assert {"run", "evaluate", "requests add", "schema"} <= found.keys()
    assert all({"--json", "--debug"} <= leaf._option_string_actions.keys() for leaf in found.values())


def test_json_is_all_that_stands_on_standard_output(path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "mine", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"status": 0, "path": "mine.yaml"} and "next: llm-unlearn plan mine.yaml" in said.err
    assert main(["run", "r.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["run"]["steps"]) == ("runs/x", 3)
    asked.outcome = SimpleNamespace(status="interrupted", step=2, kept=2, reason="", broken=False)
    assert main(["run", "r.yaml", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert main(["methods", str(ROOT / "recipes" / "methods"), "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["methods"]}
    assert "npo" in found["npo"]["objective"] and "LoRA" in found["npo"]["needs"]


def test_a_refusal_under_json_names_every_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "r.yaml", "train.lrr=1", "train.epochs=-1", "--json"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["status"] == 2 and len(found["errors"]) == 2 and "did you mean 'lr'" in found["errors"][1] + found["errors"][0]
    assert said.err.count("error: ") == 2


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_who_goes_away_ends_nothing(unbuffered: bool, tmp_path: Path) -> None:
    """`llm-unlearn … | head -1`: the work goes on, and its exit status is its own."""
    code = (
        "import sys, pathlib\nfrom llm_unlearn import verbs\nfrom llm_unlearn.cli import main\n"
        "from llm_unlearn.reply import Reply\n"
        "def talk(options):\n    for i in range(3000):\n        print('words to somebody who may have gone', flush=True)\n"
        "        print('and to the other', file=sys.stderr)\n"
        "    from rich.console import Console\n    Console().print('[b]rich[/] words')\n"
        "    pathlib.Path('done').touch()\n    return Reply(1)\n"
        "verbs.show_schema = talk\nsys.exit(main(['schema']))\n"
    )
    command = [sys.executable, *(["-u"] if unbuffered else []), "-c", code]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr and child.stdout.readline().startswith(b"words")
    child.stdout.close()
    child.stderr.close()
    assert child.wait(60) == 1 and (tmp_path / "done").exists()
