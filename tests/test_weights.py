"""Weights that move with the run or find themselves, and the second-order optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import NPO_AND_NLL, SIZES, adapted, job, log, moved_by, straight_and_resumed, weights
from torch import Tensor, nn

from llm_unlearn.data.schedule import build
from llm_unlearn.models.optimizer import Sophia, make_optimizer
from llm_unlearn.objectives.distribution import Entropy
from llm_unlearn.objectives.likelihood import NLL, Ascent
from llm_unlearn.objectives.representation import EmbedMatch
from llm_unlearn.objectives.terms import Budget, Ramp, Term
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused
from llm_unlearn.training.loop import train


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------------------------ ramps


def test_a_ramp_goes_from_its_start_to_its_end(make_model: Callable[..., Any], tmp_path: Path) -> None:
    terms = {"forget": Term(loss=Ascent(), weight=Ramp(start=0.5, end=2.0)), "retain": Term(loss=NLL(), weight=3.0)}
    train(job(steps=7, terms=terms), adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert [row["forget_weight"] for row in log(tmp_path)] == pytest.approx([0.5 + 0.25 * k for k in range(7)])
    assert not any("retain_weight" in row for row in log(tmp_path))


def test_a_ramp_weighs_as_a_number_does(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Two steps with weights 1 and 3, by a ramp and one after the other."""
    sgd = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "clip": None}

    def terms(weight: float | Ramp) -> dict[str, Term]:
        return {"forget": Term(loss=Ascent(), weight=weight), "retain": Term(loss=NLL(), weight=2.0)}

    ramped = make_model()
    train(job(steps=2, terms=terms(Ramp(start=1.0, end=3.0)), **sgd), ramped, Accelerator(cpu=True), tmp_path / "ramp")
    byhand = make_model()
    whole = job(steps=2, terms=terms(1.0), **sgd)
    for step, weight in enumerate((1.0, 3.0)):
        mine = whole.schedule.step == step
        columns = (getattr(whole.schedule, name)[mine] for name in ("step", "slot", "stream", "example"))
        schedule = replace(whole.schedule, **dict(zip(("step", "slot", "stream", "example"), columns, strict=True)))
        schedule = replace(schedule, step=schedule.step * 0, steps=1)
        train(replace(whole, terms=terms(weight), schedule=schedule), byhand, Accelerator(cpu=True), tmp_path / str(step))
    assert torch.allclose(weights(ramped), weights(byhand), atol=1e-6)


def test_a_run_of_one_step_uses_the_start(make_model: Callable[..., Any], tmp_path: Path) -> None:
    terms = {"forget": Term(loss=Ascent(), weight=Ramp(start=0.5, end=2.0))}
    train(job(steps=1, terms=terms), adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert log(tmp_path)[0]["forget_weight"] == 0.5


def test_a_term_may_fade_in_from_nothing(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """What holds the model where it is has no gradient at first, but for rounding where what it is compared with was taken before:
    a first step without any is then no mistake of the recipe's."""
    still = Term(loss=EmbedMatch(layers=(1,)))
    terms = {"forget": Term(loss=Ascent(), weight=Ramp(start=0.0, end=1.0)), "retain": still}
    assert moved_by(job(steps=3, terms=terms), adapted(make_model), tmp_path).norm() > 1e-3
    assert log(tmp_path)[0]["grad_norm"] < 1e-5 < 1e-2 < log(tmp_path)[1]["grad_norm"]
    with pytest.raises(Refused, match="not one trainable weight received a gradient"):
        train(job(terms={"retain": still}, reference="adapter_off"), adapted(make_model), Accelerator(cpu=True), tmp_path / "x")


# ---------------------------------------------------------------------------------------------------------------- budgets


def budget_job(steps: int = 5, **settings: Any) -> Any:
    terms = {**NPO_AND_NLL, "retain": Term(loss=NLL(), weight=0.4, budget=Budget(at_most=6.9, rate=0.5))}
    return job(steps=steps, terms=terms, **settings)


def test_a_budget_s_weight_answers_to_the_whole_window_once_a_step(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, wanted = make_model(), budget_job(12, lr=2e-2, batch_tokens=60)
    places = [place for slot in wanted.schedule.window(0) for place in slot if place[0] == "retain"]
    tokens: list[Tensor] = []
    for example in (wanted.example(*place) for place in places):
        logits = model.double()(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]
        tokens += list(-logits.log_softmax(-1).gather(-1, torch.tensor(example.ids[example.answer :])[:, None])[:, 0].detach())
    mean = float(torch.stack(tokens).sum() / len(tokens))

    train(wanted, model.float(), Accelerator(cpu=True), tmp_path)
    rows = log(tmp_path)
    assert rows[0]["retain"] == pytest.approx(mean, rel=1e-5) and rows[0]["retain_weight"] == 0.4
    for row, following in pairwise(rows):
        assert following["retain_weight"] == pytest.approx(max(0.0, row["retain_weight"] + 0.5 * (row["retain"] - 6.9)))
    found = [row["retain_weight"] for row in rows]
    assert max(found) > 0.4 and min(found) == 0 and "forget_weight" not in rows[0]


@pytest.mark.parametrize("rules", [False, True])
def test_a_budget_works_with_rules(make_model: Callable[..., Any], tmp_path: Path, rules: bool) -> None:
    from llm_unlearn.training.gradients import TrustRegion

    wanted = budget_job(4, rules=(TrustRegion(distance=100.0),) if rules else ())
    train(wanted, make_model(), Accelerator(cpu=True), tmp_path)
    (tmp_path / "b").mkdir()
    train(budget_job(4), make_model(), Accelerator(cpu=True), tmp_path / "b")
    one, other = ([row["retain_weight"] for row in log(folder)] for folder in (tmp_path, tmp_path / "b"))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_budget_is_met(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """One term wants the retain answers to be noise (6.9 nats), the other wants them known: held at 3 nats."""
    terms = {
        "noise": Term(loss=Entropy(), stream="retain"),
        "retain": Term(loss=NLL(), weight=0.0, budget=Budget(at_most=3.0, rate=0.02)),
    }
    wanted = job(terms=terms, lr=1e-2, schedule="constant")
    wanted = replace(wanted, schedule=build(SIZES, {"forget": 8, "retain": 10}, seed=0, steps=160))
    train(wanted, make_model(), Accelerator(cpu=True), tmp_path)
    rows = log(tmp_path)
    last = [row["retain"] for row in rows[-30:]]
    assert rows[0]["retain"] > 6 and sum(last) / 30 == pytest.approx(3.0, abs=0.05)
    found = [row["retain_weight"] for row in rows[-30:]]
    assert min(found) > 0.03 and max(found) - min(found) < 0.3 * max(found)


@pytest.mark.slow
@pytest.mark.two_processes("budget")
def test_two_processes_find_the_same_weight(make_model: Callable[..., Any], two_processes: Path) -> None:
    train(budget_job(lr=2e-2), make_model(), Accelerator(cpu=True), two_processes / "alone")
    for one, other in zip(log(two_processes / "alone"), log(two_processes / "budget"), strict=True):
        assert one["retain_weight"] == pytest.approx(other["retain_weight"], rel=1e-4)
    assert len({row["retain_weight"] for row in log(two_processes / "budget")}) > 2


# ----------------------------------------------------------------------------------------------------------------- sophia


def by_hand(start: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Sophia in float64, from the equations."""
    theta, m, h = start.double(), torch.zeros(start.shape).double(), torch.zeros(start.shape).double()
    for g in (one.double() for one in gradients):
        m, h = 0.9 * m + 0.1 * g, 0.95 * h + 0.05 * g * g
        theta = theta - lr * decay * theta
        theta = theta - lr * torch.clip(m / torch.maximum(0.04 * h, torch.tensor(1e-5).double()), -1, 1)
    return theta


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sophia_is_its_equation(steps: int) -> None:
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7))
    starts = [one.detach().clone() for one in (matrix, vector)]
    scales = torch.logspace(-7, 3, 30).view(6, 5)  # below ε, in between, and clipped
    gradients = [[torch.randn(6, 5) * scales, torch.randn(7) * 1e-6] for _ in range(steps)]
    optimizer = make_optimizer(Train(optimizer="sophia", lr=0.1, weight_decay=0.2), [matrix, vector], torch.device("cpu"))
    assert isinstance(optimizer, Sophia)
    for first, second in gradients:
        matrix.grad, vector.grad = first.clone(), second.clone()
        optimizer.step()
    for weight, start, column, decay in ((matrix, starts[0], 0, 0.2), (vector, starts[1], 1, 0.0)):
        exact = by_hand(start, [one[column] for one in gradients], 0.1, decay)
        assert torch.allclose(weight.detach().double(), exact, atol=1e-6)


def test_sophia_clips_every_step_and_passes_over_what_has_no_gradient() -> None:
    weight, other = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 0.0])), nn.Parameter(torch.ones(2))
    optimizer = Sophia([{"params": [weight, other]}], lr=0.5)
    weight.grad = torch.tensor([1.0, -1e-3, 0.0, 2e-5])  # m/max(ρh, ε) = 50, −10, 0, .2
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5, 0.5, 0.0, -0.1]) and other.tolist() == [1.0, 1.0]


def test_sophia_trains_and_goes_on_where_it_was(make_model: Callable[..., Any], tmp_path: Path) -> None:
    wanted = job(steps=6, optimizer="sophia", lr=3e-3, checkpoint_every=3, terms=NPO_AND_NLL)
    straight, resumed = straight_and_resumed(wanted, make_model, tmp_path, at=4)
    assert torch.equal(weights(resumed), weights(straight))
    rows = log(tmp_path / "straight")
    assert rows[-1]["retain"] < rows[0]["retain"]
