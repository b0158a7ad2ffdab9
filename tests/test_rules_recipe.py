"""Rules, budgets and the dose in a recipe: what cannot act is refused before anything is loaded, with its place and its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import RECIPE

from llm_unlearn import recipe
from llm_unlearn.objectives.terms import Budget, Ramp
from llm_unlearn.plan import plan
from llm_unlearn.spec import Refused, plain, to_yaml
from llm_unlearn.training.dose import Harm
from llm_unlearn.training.gradients import Project, Sharpness

NO_RETAIN = ("data.retain=null", "objective.retain=null")


def loaded(folder: Path, *overrides: str) -> recipe.Recipe:
    path = folder / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return recipe.load(path, overrides)


def test_rules_and_weights_are_read_and_written(tmp_path: Path) -> None:
    wanted = loaded(
        tmp_path,
        "train.rules=[{name: project, ema: 0.9}, {name: sharpness}]",
        "objective.forget.weight={start: 0, end: 2}",
        "objective.retain.budget={at_most: 0.5}",
        "train.stop={until: 30, budget: {retain_accuracy: 0.02}}",
    )
    assert wanted.train.rules == (Project(ema=0.9), Sharpness(rho=0.01))
    assert wanted.objective["forget"].weight == Ramp(start=0.0, end=2.0)
    assert wanted.objective["retain"].budget == Budget(at_most=0.5, rate=1.0)
    stop = wanted.train.stop
    assert stop and stop.until == 30.0 and isinstance(stop.until, float)
    assert stop.budget == Harm(retain_accuracy=0.02, retain_perplexity=1.5)
    (tmp_path / "again.yaml").write_text(to_yaml(plain(wanted)), encoding="utf-8")
    assert recipe.load(tmp_path / "again.yaml") == wanted
    assert "0…2 × npo" in plan(wanted, Path()).text and "(1, held at 0.5) × nll" in plan(wanted, Path()).text


@pytest.mark.parametrize(
    ("overrides", "place", "reason"),
    [
        (["train.rules=[{name: project}, {name: project}]"], "train.rules[1]", "project stands twice; a rule acts once."),
        (
            ["train.rules=[{name: project}, {name: bilevel}]"],
            "train.rules",
            "project and bilevel are two ways to make one gradient of two; keep one of them.",
        ),
        *(
            (
                [f"train.rules=[{{name: {name}}}]", *NO_RETAIN],
                "train.rules[0]",
                f"{name} weighs the forget against the retain terms",
            )
            for name in ("project", "bilevel", "saliency")
        ),
        (["train.rules=[{name: trust_region}]"], "train.rules[0]", "has no bound; give distance or kl."),
        (
            ["train.rules=[{name: trust_region, kl: 0.1}]", *NO_RETAIN],
            "train.rules[0].kl",
            "kl is measured on the retain set, and there is none; give data.retain.",
        ),
        (
            ["train.rules=[{name: orthogonal, adapters: [recipes]}]", "model.adapter=null"],
            "train.rules[0]",
            "compares adapters, and full weights are trained; give model.adapter.",
        ),
        (["train.rules=[{name: orthogonal, adapters: [./nowhere]}]"], "train.rules[0].adapters[0]", "no such folder: ./nowhere"),
        (
            ["train.rules=[{name: latent, layer: 3}]", "objective.forget.loss={name: rmu, layer: 2}"],
            "train.rules[0].layer",
            "disturbs layer 3, and the forget terms read no deeper than layer 2.",
        ),
        (
            ["train.rules=[{name: saliency}]", "train.weight_decay=0.1"],
            "train.rules[0]",
            "decay would move the weights that saliency holds still; give train.weight_decay: 0.",
        ),
        (["train.stop={}", *NO_RETAIN], "train.stop", "looks at the retain set, and there is none; give data.retain, or budget: "),
        (
            ["train.stop={until: holdout}"],
            "train.stop.until",
            "compares with the holdout set, and there is none; give data.holdout.",
        ),
        (
            ["train.stop={until: retrained}"],
            "train.stop.until",
            "compares with the retrained model, and none is named; give evaluation",
        ),
        (
            ["objective.retain={loss: {name: nll}, weight: {start: 1, end: 2}, budget: {at_most: 1}}"],
            "objective.retain.weight",
            "a budget finds the weight itself; give its first value as one number.",
        ),
        (["model.adapter.init=fila", "model.quantize=nf4"], "model.adapter.init", "needs gradients of the base weights"),
        (["model.adapter.init=fila", *NO_RETAIN], "model.adapter.init", "weighs the forget against the retain set"),
        (["train.rules=[{name: sharp}]"], "train.rules[0].name", "did you mean 'sharpness'?"),
        (["train.stop={until: never}"], "train.stop.until", "retrained"),
        (["train.stop={until: -3}"], "train.stop.until", "expected 'retrained' or 'holdout', or greater than 0."),
        (["train.stop={budget: {retain_accuracy: 1.0}}"], "train.stop.budget.retain_accuracy", "less than 1"),
        (["train.stop={retain_perplexity: 1.5}"], "train.stop.retain_perplexity", "budget"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_act_is_refused_with_its_place(tmp_path: Path, overrides: list[str], place: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        loaded(tmp_path, *overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert f" {place}: " in lines[0] and reason in lines[0], lines[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.rules=[{name: latent, layer: 2}]", "objective.forget.loss={name: rmu, layer: 2}"],
        ["train.rules=[{name: latent, layer: 3}]"],
        ["train.stop={until: 12.5, budget: {retain_perplexity: null}}", *NO_RETAIN],
        ["train.rules=[{name: trust_region, distance: 1}]", *NO_RETAIN],
        ["train.rules=[{name: trust_region, kl: 1}]", "objective.retain=null"],
        ["train.stop={until: holdout}", "data.holdout={source: embedded:retain, prompt: question, answer: answer}"],
        ["model.adapter.init=fila", "objective.retain=null"],
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_can_act_is_not_refused(tmp_path: Path, overrides: list[str]) -> None:
    assert loaded(tmp_path, *overrides).hash
