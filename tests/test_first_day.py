"""A user's first day: is the machine ready, does the shell complete, and does the wheel work in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn import doctor
from llm_unlearn.cli import main
from llm_unlearn.completion import keys_of_recipes
from llm_unlearn.tree import LAUNCH_LAST

ROOT = Path(__file__).parents[1]


def findings(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json", *words]) == status
    return {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}


def test_the_doctor_says_what_is_there_and_what_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    found = findings(capsys, 0)
    assert found["torch"]["state"] == "ok" and found["torch"]["said"].startswith("2.")
    assert found["nf4"]["said"].startswith("a matrix and back on ") and found["nf4"]["state"] == "ok"
    assert found["hub login"]["state"] == "ok" and "hf_secret" not in str(found)
    assert found["hub"]["state"] == "note", "the tests are offline"
    monkeypatch.setattr(doctor, "version", lambda name: {"transformers": "4.50.0"}.get(name, "99.0"))
    found = findings(capsys, 1)
    assert found["transformers"] == {
        "what": "transformers", "state": "problem", "said": "4.50.0; expected >=5.23: pip install -U transformers",
    }  # fmt: skip


def test_what_is_not_installed_and_a_full_disk_are_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name in ("peft", "opacus", "optuna"):
            raise doctor.PackageNotFoundError(name)
        return "99.0"

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 << 30, 9 << 30, 1 << 30))
    found = findings(capsys, 1)
    assert found["peft"]["state"] == "problem" and "pip install 'peft>=" in found["peft"]["said"]
    assert found["opacus"]["state"] == "note" and "pip install 'llm-unlearn[privacy]'" in found["opacus"]["said"]
    assert found["optuna"]["said"] == "not installed; for sweeps: pip install 'llm-unlearn[sweep]'"
    assert found["disk here"]["state"] == "problem" and "1.0 GiB free" in found["disk here"]["said"]


def test_a_device_that_cannot_be_used_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process has it for itself. An error may have no words."""
    for error, said in (
        (RuntimeError("CUDA error: device busy\nmore"), "RuntimeError: CUDA error: device busy more"),
        (KeyError(), "KeyError"),
    ):

        def busy(device: int, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
        (found,) = doctor._devices()
        assert found.state == "problem" and found.said == f"cannot be used ({said}); nvidia-smi says who has it"


def test_every_extra_is_looked_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for extra, _ in doctor.EXTRAS.values()} == set(extras) - {"dev", "docs"}
    for package, (extra, _) in doctor.EXTRAS.items():
        assert any(one.startswith(package.replace("_", "-")) for one in extras[extra]), package


def test_every_key_of_a_recipe_can_be_completed() -> None:
    keys = keys_of_recipes()
    assert {"seed", "output", "train.lr", "model.adapter.rank", "data.forget.source", "train.stop.budget.retain_accuracy"} <= set(
        keys
    )
    assert "train" not in keys and len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("llm-unlearn evalu", ["evaluate"]),
        ("llm-unlearn requests wi", ["withdraw"]),
        ("llm-unlearn run --over", ["--overwrite"]),
        ("llm-unlearn run r.yaml train.lr", ["train.lr="]),
        ("llm-unlearn run my_rec", ["my_recipe.yaml"]),
        ("llm-unlearn evaluate my_recipe.yaml max_new", ["max_new_tokens="]),
        ("llm-unlearn evaluate my_recipe.yaml train.l", []),
        ("llm-unlearn requests add --key my_rec", []),
        ("llm-unlearn requests verify --key my_rec", ["my_recipe.yaml"]),
    ],
)
def test_bash_completes(line: str, found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_recipe.yaml").touch()
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = line.split()
    code = (
        f"source ./script; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        'f=$(complete -p llm-unlearn | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == found, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_can_read_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "evaluate" in script and "overwrite" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path: Path, cache: Path, embedded: dict[str, Path]) -> None:
    """With recipes, suites and launch files inside, and nothing of the checkout around it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for folder in ("recipes", "eval", "launch"):
        inside = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.yaml")}
        assert inside <= {str(path.relative_to(site / "llm_unlearn" / "shipped")) for path in site.rglob("*.yaml")}
    env = {**os.environ, "PYTHONPATH": str(site)}

    def said(*words: str) -> Any:
        command = [sys.executable, "-m", "llm_unlearn", *words, "--json"]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = said("demo", "train.steps=2", "train.stop=null")
    assert found["run"]["steps"] == 2 and "after" in found["evaluation"]["models"]
    assert sorted(path.name for path in home.iterdir()) == ["runs"], "nothing else is left lying about"
    assert len(said("methods")["methods"]) == len(list((ROOT / "recipes" / "methods").glob("*.yaml")))
    assert said("new", "mine")["path"] == "mine.yaml" and LAUNCH_LAST in (home / "mine.yaml").read_text()
    assert said("plan", "mine.yaml")["steps"] > 0
