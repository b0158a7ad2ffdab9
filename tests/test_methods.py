"""Every recipe of `recipes/methods` takes steps on the embedded default: what it says fits the model, the data and itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_unlearn import recipe
from llm_unlearn.catalogue import methods_in
from llm_unlearn.cli import cache_folder
from llm_unlearn.folder import ADAPTER, MODEL
from llm_unlearn.methods.exact import Exact
from llm_unlearn.methods.registry import Edit

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))


def test_every_row_of_the_literature_has_a_recipe() -> None:
    """The losses that are one half of a method only (`nll`, `embed_match`, `ap`) stand in the recipe of another."""
    recipes = [recipe.load(path) for path in METHODS]
    used = {term.loss.name for one in recipes for term in one.objective.values()}
    ways = {one.method.name for one in recipes if one.method}
    rules = {rule.name for path in (*METHODS, ROOT / "recipes" / "second_request.yaml") for rule in recipe.load(path).train.rules}
    assert used == {
        "nll", "ascent", "kl", "npo", "simnpo", "dpo", "idk", "ap", "wga", "tnpo", "wtnpo", "satimp", "undial", "ceu", "entropy",
        "ihl", "flat", "pdu", "relabel", "rmu", "rmu_adaptive", "embed_match", "circuit_break", "repnoise", "elm", "lunar",
    }  # fmt: skip
    assert {"task_vector", "dampening", "fisher_noise", "influence", "uld", "guided"} <= ways
    assert rules == {"project", "bilevel", "sharpness", "latent", "tamper", "orthogonal", "saliency", "trust_region"}


def test_every_recipe_has_a_sentence_a_paper_and_the_common_dose() -> None:
    for method in methods_in("recipes/methods"):
        assert method.sentence.endswith(".") and method.paper, method.path
        wanted = recipe.load(method.path)
        if wanted.method and not isinstance(wanted.method, Edit):  # trains without the forget set: it has no dose
            continue
        stop = wanted.train.stop
        assert stop and stop.until == "retrained" and stop.budget.retain_accuracy == 0.02, method.path


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_recipe_takes_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from llm_unlearn.exact.command import engine

    monkeypatch.chdir(ROOT)
    words = [
        f"output={tmp_path / 'run'}",
        "train.steps=2",
        "evaluation=null",
        "train.window={forget: 4, retain: 4}",
    ]
    if recipe.load(path).train.stop:  # a method that trains without the forget set has no dose
        words.append("train.stop={until: null, budget: {retain_accuracy: null, retain_perplexity: null}}")
    wanted = recipe.load(path, words)
    outcome: Any = engine(wanted)(wanted, None, cache=cache_folder())
    assert outcome.status == "finished"
    edit = wanted.method if isinstance(wanted.method, Edit) else None  # has strengths, and where it trains steps before them
    if isinstance(wanted.method, Exact):
        assert outcome.step > 2, "every stage of every line takes two"
    else:
        assert outcome.step == (len(edit.strengths) if edit else 0) + 2 * (not edit or edit.trains)
    saved = next((tmp_path / "run" / name for name in (ADAPTER, MODEL) if (tmp_path / "run" / name).is_dir()), None)
    assert saved and any(saved.rglob("*.safetensors"))
    assert torch.is_grad_enabled()
