"""From Python: a recipe read or built, carried out, opened again; model objects measured as named ones are; the notebook runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llm_unlearn
from llm_unlearn import Refused, evaluate, load_recipe, make_recipe, open_evaluation, open_run, unlearn
from llm_unlearn.models import given

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "output": "runs/mine",
    "model": {"base": "embedded:target", "adapter": {"rank": 4, "alpha": 8.0}},
    "data": {
        "forget": {"source": "embedded:forget", "prompt": "question", "answer": "answer", "limit": 6},
        "retain": {"source": "embedded:retain", "prompt": "question", "answer": "answer", "limit": 6},
    },
    "objective": {"forget": {"loss": {"name": "npo"}}, "retain": {"loss": {"name": "kl"}}},
    "train": {"steps": 2, "lr": 1e-3},
}
SUITE = """\
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 6}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 6}
measures:
  - {name: perplexity, set: forget}
  - {name: probability, set: forget}
  - {name: probability, set: retain}
  - {name: rouge, set: forget}
max_new_tokens: 8
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def test_every_name_is_there_and_none_costs_anything_before_it_is_used() -> None:
    assert all(getattr(llm_unlearn, name) is not None for name in llm_unlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'forgett'"):
        llm_unlearn.forgett  # noqa: B018
    code = "import sys, llm_unlearn; print(sorted({'torch', 'pandas', 'pydantic', 'yaml'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = "import sys\nfrom llm_unlearn import load_recipe, unlearn\nprint(sorted({'torch', 'pandas'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_recipe_is_the_same_from_a_file_and_from_python(here: Path) -> None:
    from llm_unlearn.spec import to_yaml

    (here / "r.yaml").write_text(to_yaml(SETTINGS))
    assert make_recipe(SETTINGS) == load_recipe("r.yaml")
    changed = load_recipe("r.yaml", {"train.lr": 1e-5, "model.adapter": None, "data.forget.where": {"person": ["Ü, 'b'"]}})
    assert changed.train.lr == 1e-5 and changed.model.adapter is None and changed.data.forget.where == {"person": ("Ü, 'b'",)}
    assert load_recipe("recipes/forget_lora.yaml").output == "runs/forget_lora", "shipped ones are found from anywhere"


def test_a_wrong_recipe_is_refused_with_every_key(here: Path) -> None:
    with pytest.raises(Refused) as refused:
        make_recipe({**SETTINGS, "train": {"lrr": 1}, "objective": {"forget": {"loss": {"name": "nppo"}}}})
    first, second = str(refused.value).splitlines()
    assert first.startswith("make_recipe: objective.forget.loss.name: found 'nppo'; did you mean 'npo'?")
    assert second.startswith("make_recipe: train.lrr: unknown key; did you mean 'lr'?")
    with pytest.raises(Refused, match="no run folder"):
        open_run("nowhere")
    with pytest.raises(Refused, match=r"evaluation\.json: cannot be read"):
        open_evaluation("nowhere")
    with pytest.raises(Refused, match=r"model: no such folder: \./nowhere"):
        evaluate("./nowhere", "suite.yaml")
    with pytest.raises(Refused, match="give one or the other"):
        evaluate("embedded:target", "suite.yaml", adapter="runs/mine", before="embedded:target")


def test_a_suite_is_found_beside_its_recipe(here: Path) -> None:
    """Wherever one stands: it is carried out from here."""
    (here / "away").mkdir()
    (here / "away" / "mine.yaml").write_text("extends: ../suite.yaml\n")
    (here / "away" / "r.yaml").write_text(json.dumps({**SETTINGS, "evaluation": "mine.yaml"}))
    named, shipped = load_recipe("away/r.yaml").evaluation, load_recipe("recipes/forget_lora.yaml").evaluation
    assert named and named.suite == "away/mine.yaml"
    assert shipped and shipped.suite == "eval/quick.yaml", "found from everywhere"


@pytest.mark.slow
def test_a_run_and_an_object_say_the_same(here: Path, cache: Path, embedded: dict[str, Path]) -> None:
    evaluation = {"suite": "suite.yaml", "retrained": "embedded:retrained", "thresholds": [
        {"measure": "perplexity", "set": "forget", "at_most": 0.5}, {"measure": "probability", "set": "retain", "at_least": 0.5},
    ]}  # fmt: skip
    run = unlearn(make_recipe({**SETTINGS, "evaluation": evaluation}), cache=cache)
    assert run.recipe.output == "runs/mine" and list(run.log["step"]) == [1, 2]
    found = run.evaluation
    assert list(found.numbers.columns) == ["before", "after", "retrained", "judgement", "unit"] and len(found.numbers) == 4
    assert list(found.thresholds["holds"]) == [False, True] and not found.holds
    assert len(found.values) == 12 and set(found.rows["model"]) == {"before", "after", "retrained"}
    assert len(found.answers) == 12 and {"truth", "before", "after"} <= set(found.answers.columns)
    assert found.headline in repr(found) and "<table" in found._repr_html_()

    model, tokenizer = run.load()
    model.train()
    again = evaluate(model, "suite.yaml", tokenizer=tokenizer, retrained="embedded:retrained", cache=cache)
    assert all(layer.training for layer in model.modules()), "left as it was"
    assert list(again.numbers["model"]) == list(found.numbers["after"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 1.5 if "lora_B" in name else 1.0
    moved = evaluate(model, "suite.yaml", tokenizer=tokenizer, before="embedded:target", cache=cache, output="out")
    assert list(moved.numbers["before"]) == list(found.numbers["before"])
    assert abs(moved.numbers["after"] - found.numbers["after"]).max() > 1e-6, "nothing of an object is taken from the cache"
    assert list(open_evaluation("out").numbers["after"]) == list(moved.numbers["after"])
    with pytest.raises(Refused, match=r"Nothing was changed; .*overwrite=True"):
        evaluate(model, "suite.yaml", tokenizer=tokenizer, cache=cache, output="out")
    on_gpu: Any = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda:0")))
    given.check_place(on_gpu, torch.device("cuda"))
    with pytest.raises(Refused, match="tokenizer: found NoneType"):
        evaluate(model, "suite.yaml", cache=cache)
    with pytest.raises(Refused, match="expected a transformers causal LM"):
        evaluate(torch.nn.Linear(2, 2), "suite.yaml", tokenizer=tokenizer, cache=cache)
    with pytest.raises(Refused, match="has attacks"):
        evaluate(model, ROOT / "eval" / "audit.yaml", tokenizer=tokenizer, cache=cache)
    with pytest.raises(Refused, match="holds a finished run"):
        unlearn(run.recipe, cache=cache)
    assert unlearn(run.recipe, resume=True, cache=cache) == run


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the client that runs notebooks
def test_the_notebook_runs(here: Path, embedded: dict[str, Path]) -> None:
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(str(ROOT / "docs" / "notebook.ipynb"), as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    said = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert (
        any("image/png" in output.get("data", {}) for output in said) and (here / "runs" / "notebook" / "evaluation.json").is_file()
    )
