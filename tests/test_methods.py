"""Every recipe of `recipes/methods` takes steps on the embedded default: what it says fits the model, the data and itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn import recipe
from llm_unlearn.catalogue import methods_in
from llm_unlearn.cli import cache_folder
from llm_unlearn.folder import ADAPTER, MODEL
from llm_unlearn.methods.edits import strengths_of
from llm_unlearn.methods.exact import Exact
from llm_unlearn.methods.noisy_finetune import NoisyFinetune
from llm_unlearn.methods.registry import Edit
from llm_unlearn.source import is_recipe

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
MAIN = sorted((ROOT / "recipes").glob("*.yaml"))


def test_every_row_of_the_literature_has_a_recipe() -> None:
    """The losses that are one half of a method only (`nll`, `embed_match`, `ap`) stand in the recipe of another. `router_kl` needs
    a mixture of experts, and stands in `recipes/forget_moe.yaml`."""
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
        edit = isinstance(wanted.method, Edit)
        if wanted.train.privacy or (wanted.method and not edit):  # ends without a look at the forget set
            continue
        stop = wanted.train.stop
        assert stop and stop.until == "retrained" and stop.budget.retain_accuracy == 0.02, method.path


@pytest.mark.slow
@pytest.mark.parametrize("path", [*MAIN, *METHODS], ids=lambda path: path.stem)
def test_every_recipe_takes_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from llm_unlearn.exact.command import engine

    monkeypatch.chdir(ROOT)
    wanted = recipe.load(path, words_for(path, tmp_path), check=False)
    outcome: Any = engine(wanted)(wanted, None, cache=cache_folder())
    assert outcome.status == "finished"
    edit = wanted.method if isinstance(wanted.method, Edit) else None  # has strengths, and where it trains steps before them
    if isinstance(wanted.method, Exact):
        assert outcome.step > 2, "every stage of every line takes two"
    else:
        assert outcome.step == (len(strengths_of(edit)) if edit else 0) + (not edit or edit.trains) * (wanted.train.steps or 0)
    saved = next((tmp_path / "run" / name for name in (ADAPTER, MODEL) if (tmp_path / "run" / name).is_dir()), None)
    assert saved
    found = {name: weight for file in saved.glob("**/*.safetensors") for name, weight in load_file(str(file)).items()}
    assert found and all(bool(weight.isfinite().all()) for weight in found.values())
    if not isinstance(wanted.method, Exact):  # of which some blocks may be switched off
        assert all(bool(weight.any()) for name, weight in found.items() if "lora_B" in name), "an adapter that did not move"
    assert torch.is_grad_enabled()


def words_for(path: Path, folder: Path) -> list[str]:
    """A few steps of a recipe, on data and models that are here."""
    whole, text = recipe.load(path, check=False), path.read_text(encoding="utf-8")
    steps = 12 if isinstance(whole.method, NoisyFinetune) else 2  # ten of them noisy
    words = [f"output={folder / 'run'}", f"train.steps={steps}", "evaluation=null", "train.window={forget: 4, retain: 4}"]
    if whole.train.stop:  # a method that trains without the forget set has no dose
        words.append("train.stop={until: null, budget: {retain_accuracy: null, retain_perplexity: null}}")
    if isinstance(whole.method, Edit):
        words.append(f"method.{whole.method.knob}={[*strengths_of(whole.method)[:1], *strengths_of(whole.method)[-1:]]}")
    if hasattr(whole.method, "rows"):
        words.append("method.rows=4")
    if not whole.data.forget.source.startswith("embedded:"):  # hub ids: nothing is downloaded here
        assert text.startswith("# Not run here."), "a recipe of a published checkpoint says so"
        keys = "prompt: question, answer: answer, text: null, config: null, split: null, max_tokens: 64"
        words += ["model.base=embedded:target", *(f"data.{one}={{source: embedded:{one}, {keys}}}" for one in ("forget", "retain"))]
        words += ["data.holdout=null", "train.gradient_checkpointing=false"]
    if path.stem == "wmdp_cyber":  # of a deeper model
        words += ["model.trainable=[layers.2.mlp.down_proj]", "objective.forget.loss={name: rmu, layer: 2}"]
        words += ["objective.retain.loss={name: embed_match, layers: [2]}"]
    if is_recipe(whole.model.base):  # whose model takes minutes to train
        words.append("model.base=embedded:target")
    if whole.model.base == "embedded:base":  # which takes a minute to train, and is made as the others are
        words.append("model.base=embedded:retrained")
    if isinstance(whole.method, NoisyFinetune):
        words.append("method.reference=embedded:retrained")
    if any(term.loss.name == "router_kl" for term in whole.objective.values()):
        from mixtures import write_mixture

        from llm_unlearn.embedded.target import make_tokenizer

        words = [word for word in words if not word.startswith("model.base=")]
        words.append(f"model.base={write_mixture('qwen3_moe', folder / 'mixture', make_tokenizer())}")
    if path.stem == "second_request":  # of a first one that is there
        model, _ = adapted_target()
        model.save_pretrained(str(folder / "first"))
        words += [f"model.start={folder / 'first'}", f"train.rules=[{{name: orthogonal, adapters: [{folder / 'first'}]}}]"]
    return words


def adapted_target() -> Any:
    """The embedded model under an adapter that is not at its start."""
    from jobs import away

    from llm_unlearn.bases import resolve_base
    from llm_unlearn.models.load import add_adapter, load
    from llm_unlearn.sections import Adapter, Model

    loaded = load(resolve_base(Model(base="embedded:target"), cache_folder()), torch.device("cpu"))
    return away(add_adapter(loaded.model, Adapter(), 0), 0.01), loaded
