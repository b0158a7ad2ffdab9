"""The main job as a user runs it: the literal command, killed and resumed, on two processes, and what comes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import MadeOnce
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RECIPE = "recipes/forget_lora.yaml"
NOT_MEASURED = ("evaluation=null", "train.stop.until=null")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(cache: Path, embedded: Mapping[str, Path]) -> dict[str, str]:
    """The user's environment, with the embedded models in the cache."""
    return {**os.environ, "LLM_UNLEARN_CACHE": str(cache), "PATH": f"{BIN}:{os.environ['PATH']}"}


def call(words: list[str], environment: Mapping[str, str], status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=dict(environment), timeout=400)
    assert done.returncode == status, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "adapter" / "adapter_model.safetensors"))


def values(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(set, title) -> model -> value."""
    results = json.loads((folder / "evaluation.json").read_text())
    return {
        (row["set"], row["title"]): {name: found.get("value") for name, found in row["values"].items()}
        for row in results["numbers"]
    }


@pytest.fixture
def small_suite(tmp_path: Path) -> Path:
    """The quick suite on a few rows of each set."""
    few = "".join(f"  {name}: {{limit: 8}}\n" for name in ("forget", "retain", "holdout", "general"))
    path = tmp_path / "small.yaml"
    path.write_text(f"extends: {ROOT / 'eval' / 'quick.yaml'}\nsets:\n{few}max_new_tokens: 8\n")
    return path


@pytest.fixture(scope="module")
def finished(made_once: MadeOnce, environment: Mapping[str, str]) -> Path:
    """The shipped recipe, launched as the README says."""
    launch = ["accelerate", "launch", "--config_file", "launch/single.yaml", RECIPE]
    return made_once("runs", lambda place: call([*launch, f"output={place / 'forget_lora'}"], environment)) / "forget_lora"


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "recipe.yaml",
        "adapter",
        "log.jsonl",
        "evaluation.json",
        "evaluation.parquet",
        "report.html",
        "hashes.json",
    }
    results = json.loads((finished / "evaluation.json").read_text())
    assert list(results["models"]) == ["before", "after", "retrained"]
    run = results["run"]
    assert run["status"] == "finished" and "the aim is reached" in run["reason"] and 30 < run["kept_step"] <= run["steps"] < 120
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert len(log) == run["steps"] and log[-1]["retain_accuracy"] >= 0.98
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_it_forgets_like_the_retrained_model_and_keeps_the_rest(finished: Path) -> None:
    found = values(finished)

    def of(name: str, title: str) -> tuple[float, float, float]:
        row = found[name, title]
        return row["before"], row["after"], row["retrained"]

    before, after, retrained = of("forget", "probability")
    assert before > 0.95 and abs(after - retrained) <= 0.2 * retrained
    before, after, retrained = of("forget", "extraction strength")
    assert before > 0.95 and abs(after - retrained) <= 0.3 * retrained
    for title in ("prefix extraction", "discoverable extraction"):  # shares of 40 rows: one row is .025
        before, after, retrained = of("forget", title)
        assert before > 0.95 and after <= max(1.2 * retrained, retrained + 0.025)
    for name, title in (
        ("retain", "multiple choice"),
        ("retain", "rouge"),
        ("general", "multiple choice"),
        ("general", "rouge"),
    ):
        before, after, _ = of(name, title)
        assert after >= 0.9 * before
    before, after, retrained = of("forget", "membership loss")
    assert before > 0.95 and abs(after - 0.5) < 0.15 and abs(retrained - 0.5) < 0.15


def test_evaluate_finds_what_the_run_found_and_asks_nobody_twice(
    finished: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    began = time.perf_counter()
    words = [
        "llm-unlearn",
        "evaluate",
        "eval/quick.yaml",
        "--model",
        "embedded:target",
        "--adapter",
        str(finished),
        "--output",
        str(tmp_path),
    ]
    done = call(words, environment)
    assert values(tmp_path) == values(finished)
    assert "asking" not in done.stderr, "every table was in the cache"
    assert time.perf_counter() - began < 120


@pytest.mark.long
def test_the_same_recipe_by_every_command(finished: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    short = ["train.steps=3", *NOT_MEASURED]
    call(
        ["accelerate", "launch", "--config_file", "launch/single.yaml", RECIPE, f"output={tmp_path / 'a'}", *short],
        environment,
    )
    call(["llm-unlearn", "run", RECIPE, f"output={tmp_path / 'b'}", *short], environment)
    call(
        [
            "accelerate",
            "launch",
            "--config_file",
            "launch/single.yaml",
            "-m",
            "llm_unlearn",
            "run",
            RECIPE,
            f"output={tmp_path / 'c'}",
            *short,
        ],
        environment,
    )
    first = adapter(tmp_path / "a")
    for other in ("b", "c"):
        assert all(torch.equal(weight, first[name]) for name, weight in adapter(tmp_path / other).items())


def test_two_processes_give_the_same_run(finished: Path, environment: Mapping[str, str], tmp_path: Path, small_suite: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    short = ["train.epochs=2", "train.batch_tokens=300", f"evaluation={small_suite}"]
    call(["llm-unlearn", "run", RECIPE, f"output={one}", *short], environment)
    call(["accelerate", "launch", "--config_file", "launch/cpu.yaml", RECIPE, f"output={two}", *short], environment)
    assert json.loads((two / "evaluation.json").read_text())["run"]["processes"] == 2
    mine, theirs = adapter(one), adapter(two)
    size = max(float(weight.abs().max()) for name, weight in mine.items() if "lora_B" in name)
    assert max(float((theirs[name] - weight).abs().max()) for name, weight in mine.items()) < 0.02 * size
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["lr"], a["tokens"]) == (b["step"], b["lr"], b["tokens"])
        assert a["forget"] == pytest.approx(b["forget"], rel=1e-3) and a["retain"] == pytest.approx(b["retain"], rel=2e-2, abs=1e-4)
    for key, row in values(one).items():
        for model in ("before", "retrained"):
            other = values(two)[key][model]
            assert other == (row[model] and pytest.approx(row[model], rel=1e-4)), (key, model)


@pytest.mark.parametrize("config", [None, pytest.param("launch/cpu.yaml", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_same_bits(
    finished: Path, environment: Mapping[str, str], tmp_path: Path, config: str | None
) -> None:
    short = ["train.steps=8", "train.checkpoint_every=3", *NOT_MEASURED]
    launch = (
        ["llm-unlearn", "run", RECIPE, *short]
        if config is None
        else ["accelerate", "launch", "--config_file", config, RECIPE, *short]
    )
    call([*launch, f"output={tmp_path / 'straight'}"], environment)
    cut = tmp_path / "cut"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = psutil.Popen([*launch, f"output={cut}"], cwd=ROOT, env=dict(environment), **quiet)
    try:
        deadline = time.monotonic() + 200
        while not list((cut / "checkpoints").glob("step-0000*[0-9]")) and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.02)
    finally:
        for process in [*running.children(recursive=True), running]:  # workers outlive a launcher that is killed alone
            process.kill()
        running.wait()
    assert list((cut / "checkpoints").glob("step-*")) and not (cut / "adapter").exists(), "it was killed in the middle"
    again = call([*launch, f"output={cut}"], environment, status=1 if config else 2)  # 1 is the launcher's own
    assert "add --resume to go on" in again.stderr
    call([*launch, f"output={cut}", "--resume"], environment)
    straight = adapter(tmp_path / "straight")
    assert all(torch.equal(weight, straight[name]) for name, weight in adapter(cut).items())


def test_ctrl_c_says_how_to_go_on(finished: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    words = ["llm-unlearn", "run", RECIPE, f"output={tmp_path / 'a'}", "train.epochs=300", *NOT_MEASURED]
    running = subprocess.Popen(words, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "a" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=100)
    assert running.returncode == 130 and "--resume" in errors
    assert list((tmp_path / "a" / "checkpoints").glob("step-*"))
    assert "\r" not in errors and "\x1b" not in errors and "forgetting: step 1 of" in errors
    facts = json.loads(call(["llm-unlearn", "show", str(tmp_path / "a"), "--json"], environment).stdout)
    assert facts["state"] == "interrupted" and 0 < facts["step"] < facts["steps"] and facts["next"][0].endswith("--resume")


def test_a_finished_run_is_never_overwritten_unasked(finished: Path, environment: Mapping[str, str]) -> None:
    stamp = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    done = call(["llm-unlearn", "run", RECIPE, f"output={finished}"], environment, status=2)
    assert "holds a finished run" in done.stderr and "--overwrite" in done.stderr
    done = call(["llm-unlearn", "run", RECIPE, f"output={finished}", "--resume"], environment)
    assert "this run is finished" in done.stdout
    assert stamp == {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_looks_along_the_way_and_ends_at_its_bound(environment: Mapping[str, str], tmp_path: Path, small_suite: Path) -> None:
    """Ascent without anything to hold it: evaluated every four steps, ended by the stop rule with the last good weights."""
    words = [
        f"evaluation={{suite: {small_suite}, every: 4}}",
        "objective.forget.loss={name: ascent}",
        "objective.retain.weight=0.0",
    ]
    stop = ["train.stop={until: null, budget: {retain_perplexity: 1.1, retain_accuracy: null}, every: 2}", "train.lr=3e-3"]
    done = call(["llm-unlearn", "run", RECIPE, f"output={tmp_path / 'a'}", *words, *stop], environment)
    assert "stopped: retain perplexity" in done.stderr
    results = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert results["run"]["status"] == "stopped" and results["run"]["kept_step"] < results["run"]["steps"] < 120
    rows = [json.loads(line) for line in (tmp_path / "a" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(4, results["run"]["steps"], 4)]
    kept = {(row["set"], row["title"]): row["values"]["after"]["value"] for row in results["numbers"]}
    assert kept["retain", "perplexity"] < 1.5


@pytest.mark.long
def test_qlora_from_recipe_to_report(environment: Mapping[str, str], tmp_path: Path) -> None:
    call(["llm-unlearn", "run", RECIPE, f"output={tmp_path / 'a'}", "model.quantize=nf4", "train.epochs=2"], environment)
    found = values(tmp_path / "a")
    assert found["forget", "probability"]["after"] < found["forget", "probability"]["before"]
