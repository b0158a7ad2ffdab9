"""`verify`: a run folder's hashes, and its numbers made again; what was changed afterwards is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn import folder, make_recipe, unlearn
from llm_unlearn.cli import main
from llm_unlearn.spec import Refused

SETTINGS: dict[str, Any] = {
    "output": "run",
    "model": {"base": "embedded:target", "adapter": {"rank": 4, "alpha": 8.0}},
    "data": {"forget": {"source": "embedded:forget", "prompt": "question", "answer": "answer", "limit": 6}},
    "objective": {"forget": {"loss": {"name": "npo"}}},
    "train": {"steps": 2, "lr": 1e-3},
    "evaluation": {"suite": "suite.yaml", "retrained": "embedded:retrained"},
}
SUITE = """\
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 6}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 6}
measures:
  - {name: perplexity, set: forget}
  - {name: probability, set: retain}
  - {name: rouge, set: forget}
max_new_tokens: 8
"""


def made(home: Path) -> Path:
    (home / "adapter").mkdir(parents=True)
    for name in ("recipe.yaml", "log.jsonl", "adapter/adapter_model.safetensors"):
        (home / name).write_text(name)
    folder.seal(home, {folder.RESULTS: "ü"})
    (home / folder.RESULTS).write_text("ü", encoding="utf-8")
    return home


def test_a_sealed_folder_is_as_it_was(tmp_path: Path) -> None:
    home = made(tmp_path / "run")
    (home / "checkpoints").mkdir()
    (home / "checkpoints" / "state").write_text("comes and goes")
    assert folder.unlike(home) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda home: (home / "log.jsonl").write_text("x"), "log.jsonl: was changed after the run"),
        (lambda home: (home / "adapter" / "adapter_model.safetensors").unlink(), "adapter/adapter_model.safetensors: is gone"),
        (lambda home: (home / "adapter" / "more.safetensors").touch(), "adapter/more.safetensors: was added after the run"),
        (lambda home: (home / folder.RESULTS).write_text("u"), "evaluation.json: was changed after the run"),
    ],
)
def test_every_change_is_named(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    home = made(tmp_path / "run")
    change(home)
    assert folder.unlike(home) == [said]


def test_without_hashes_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = made(tmp_path / "run")
    for held in ('{"format": 1}', '{"files": ["adapter/a"]}', '{"files": 5}', '{"files": {"a": 5}}', "5", "[]", "{", "[" * 9000):
        (home / folder.HASHES).write_text(held)
        with pytest.raises(Refused, match=r"hashes\.json: .*changed since the run wrote it"):
            folder.unlike(home)
    (home / folder.HASHES).unlink()
    assert main(["verify", str(home)]) == 2
    assert "has no hashes.json" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def verified(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["verify", "run", *words, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_numbers_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], embedded: dict[str, Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suite.yaml").write_text(SUITE)
    unlearn(make_recipe(SETTINGS))
    found = verified(capsys, 0, "--rows", "2", "--seed", "5")
    assert found["problems"] == [] and found["kept"][-1] == (
        "12 answers were scored and written again, drawn by --seed 5, and are the same"
    )
    assert verified(capsys, 0, "--rows", "all")["kept"][-1] == "3 numbers were made again, and are the same"

    shutil.copytree("run", "kept")
    text = Path("run/evaluation.json").read_text()
    results = json.loads(text)
    (one,) = (one for one in results["numbers"] if one["title"] == "perplexity")
    one["values"]["after"]["value"] *= 1.1
    Path("run/evaluation.json").write_text(json.dumps(results))
    assert verified(capsys, 1, "--rows", "0")["problems"] == ["evaluation.json: was changed after the run"]
    folder.seal(Path("run"))  # whoever changes a number can change its hash
    (problem,) = verified(capsys, 1, "--rows", "all")["problems"]
    assert problem.startswith("evaluation.json: perplexity on forget, after: ")

    shutil.rmtree("run")
    shutil.copytree("kept", "run")
    shutil.rmtree("run/adapter")
    silent = {"suite": "suite.yaml", "texts": False}
    unlearn(make_recipe({**SETTINGS, "output": "other", "train": {"steps": 4, "lr": 1e-2}, "evaluation": silent}))
    assert main(["verify", "other", "--rows", "2"]) == 0, "without texts in the file none are compared"
    shutil.copytree("other/adapter", "run/adapter")
    folder.seal(Path("run"))
    problems = verified(capsys, 1, "--rows", "3")["problems"]
    assert problems and all("evaluation.parquet: after, set " in one for one in problems), "other weights give other values"

    Path("run/recipe.yaml").write_text(Path("run/recipe.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert "evaluation.json: is of recipe " in verified(capsys, 1, "--rows", "0")["problems"][-1]
    assert main(["verify", "run", "--retrain", "shard 1"]) == 2
