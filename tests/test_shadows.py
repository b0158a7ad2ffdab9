"""Shadow models: the ratio of densities against scipy's, fair halves, and the whole attack on models that know and that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from jobs import RECIPE
from scipy.stats import norm

from llm_unlearn.attacks.asking import answers_of
from llm_unlearn.attacks.finding import Curve, Subject
from llm_unlearn.attacks.relearning import Relearning, fine_tune
from llm_unlearn.attacks.shadows import Shadows, halves, log_ratios
from llm_unlearn.evaluation.membership import auc
from llm_unlearn.evaluation.sets import encode_set
from llm_unlearn.models.forms import Again
from llm_unlearn.models.load import add_adapter
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

SETS = {"set": "forget", "against": "holdout", "retain": "retain"}


def test_of_each_pair_one_shadow_is_taught_what_the_other_is_not() -> None:
    taught = halves(6, 11, seed=0)
    assert taught.shape == (6, 11) and (taught[::2] == ~taught[1::2]).all()
    assert sorted(set(taught.sum(axis=1).tolist())) == [5, 6] and (taught.sum(axis=0) == 3).all()
    assert not (taught[0] == taught[2]).all() and not (taught == halves(6, 11, seed=1)).all()
    assert (taught == halves(6, 11, seed=0)).all()


def test_the_score_is_the_log_ratio_of_two_normal_densities() -> None:
    rng = np.random.default_rng(0)
    taught, phi, shadows = halves(6, 9, seed=1), rng.normal(size=9), rng.normal(size=(6, 9))
    expected, spread = np.zeros(9), {}
    for side in (True, False):
        own = [[shadows[k, r] for k in range(6) if taught[k, r] == side] for r in range(9)]
        spread[side] = sum((value - np.mean(values)) ** 2 for values in own for value in values) / (9 * 2)
        expected += [(1 if side else -1) * norm.logpdf(phi[r], np.mean(own[r]), np.sqrt(spread[side])) for r in range(9)]
    assert log_ratios(phi, shadows, taught) == pytest.approx(expected, rel=1e-10)


def test_two_shadows_have_no_variance_and_take_the_nearer_mean() -> None:
    taught = np.array([[True, False], [False, True]])
    shadows = np.array([[4.0, 1.0], [0.0, 3.0]])  # learnt and forgotten: 4 and 3; never seen: 0 and 1
    assert log_ratios(np.array([4.0, 1.0]), shadows, taught) == pytest.approx([8, -2])


def test_the_attack_finds_what_is_there_to_be_found() -> None:
    """Rows differ from each other far more than a row that was seen differs from itself: only an attack per row can see it."""
    rng = np.random.default_rng(2)
    rows, left = 400, 1.5
    own = rng.normal(0, 10, rows)  # how likely a row is by itself
    taught = halves(16, rows, seed=3)
    shadows = own + left * taught + rng.normal(0, 1, taught.shape)
    phi = own + left * (np.arange(rows) < rows // 2) + rng.normal(0, 1, rows)
    found = -log_ratios(phi, shadows, taught)
    best = norm.cdf(left / np.sqrt(2))  # of the best test that knows both means
    assert auc(found[: rows // 2], found[rows // 2 :]) == pytest.approx(best, abs=0.06) and best > 0.85
    assert auc(-phi[: rows // 2], -phi[rows // 2 :]) == pytest.approx(0.5, abs=0.08), "one threshold for all rows sees little"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"shadows": 3}, "an even number of shadows"), ({"retain": "forget"}, "three different sets"), ({"steps": 0}, "steps")],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Shadows(**(SETS | {"recipe": "r.yaml"} | settings))


@pytest.fixture
def subject(tiny_base: Path, tokenizer: Any) -> Subject:
    sources = {name: Source(source=f"embedded:{name}", prompt="question", answer="answer", limit=8) for name in SETS.values()}
    sets = {name: encode_set(name, source, {"answer"}, tokenizer) for name, source in sources.items()}
    model = Model(base=str(tiny_base))
    control = Again(model, None, torch.device("cpu"), "the control")
    return Subject("retrained", model, None, control, sets, None, Accelerator(cpu=True), 2000, 0, lambda text: None, control)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("  forget: {loss: {name: npo}}", "data.forget.alternate"),
        ("objective:", "train.stop.until: holdout"),
        ("  base", "model.adapter.init: fila"),
    ],
)
def test_recipes_that_shadows_cannot_carry_out_are_refused(change: str, expected: str, subject: Subject, tmp_path: Path) -> None:
    text = {
        "data.forget.alternate": RECIPE.replace("npo", "idk").replace(
            "embedded:forget, ", "embedded:forget, alternate: {source: embedded:refusals, answer: text}, "
        ),
        "train.stop.until: holdout": RECIPE + "train: {stop: {until: holdout}}\n",
        "model.adapter.init: fila": RECIPE.replace("{base: embedded:target}", "{base: embedded:target, adapter: {init: fila}}"),
    }[expected]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(Refused, match=expected):
        Shadows(recipe=str(tmp_path / "r.yaml"), shadows=2, **SETS)(subject)


def test_without_a_retrained_model_it_says_what_to_give(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(Refused, match="start from the retrained model; give it: --retrained PATH"):
        Shadows(recipe=str(tmp_path / "r.yaml"), **SETS)(replace(subject, control=None))


@pytest.mark.slow
def test_a_model_that_knows_is_found_out_and_the_control_is_not(subject: Subject, tmp_path: Path) -> None:
    """Shadows that hardly forget: what they were taught stands far above the rest, as in a model that was taught the set."""
    (tmp_path / "r.yaml").write_text(RECIPE + "train: {steps: 1, lr: 1.0e-6}\n")
    attack = Shadows(recipe=str(tmp_path / "r.yaml"), shadows=4, steps=20, window=8, lr=1e-2, **SETS)
    kept: dict[str, list[float]] = {}

    def once(key: str, make: Callable[[], list[float]]) -> list[float]:
        if key not in kept:
            kept[key] = make()
        return kept[key]

    subject = replace(subject, once=once)
    control = attack(subject)
    assert len(kept) == 4 and control.x == (2, 4)
    assert subject.control is not None
    knows = subject.control()
    net = add_adapter(knows.model, Adapter(), 0)
    mine = answers_of(subject.sets["forget"])
    fine_tune(Relearning(set="forget", steps=20, lr=1e-2, window=8).job(mine, subject), net, subject, lambda _: None, "taught")
    told: Curve = attack(replace(subject, column="before", load=lambda **_: replace(knows, model=net)))
    assert len(kept) == 4, "the shadows serve every model"
    assert told.y[-1] > 0.95 and told.notes["tpr_at_1_percent_fpr"] > 0.5 and len(told.rows) == len(mine.ids)
    assert 0.2 < control.y[-1] < 0.8
