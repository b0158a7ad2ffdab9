"""Runs that come to nothing good are noticed within the steps that are promised, and the last good weights are kept; sound runs are
left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import PowerCut, adapted, job, log, weights

from llm_unlearn import recipe
from llm_unlearn.models.load import trainable
from llm_unlearn.objectives.likelihood import Ascent
from llm_unlearn.objectives.terms import Term
from llm_unlearn.training import divergence, loop
from llm_unlearn.training.checkpoint import Progress
from llm_unlearn.training.divergence import Watch
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.loop import train
from llm_unlearn.training.window import Window

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def said_by(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, dict[str, float]], dict[str, float]]) -> None:
    """Let the terms say something else from step to step; the gradient is what it was."""
    backward, count = Window.backward, [0]

    def changed(self: Window, *given: Any, **named: Any) -> dict[str, float]:
        count[0] += 1
        return change(count[0], backward(self, *given, **named))

    monkeypatch.setattr(Window, "backward", changed)


def carried_out(wanted: Any, model: Any, folder: Path, **named: Any) -> tuple[Any, list[torch.Tensor]]:
    """How it ended, and the weights after every step."""
    seen = [weights(model)]
    outcome = train(wanted, model, Accelerator(cpu=True), folder, look=lambda step: seen.append(weights(model)), **named)
    return outcome, seen


def test_weights_that_do_not_move_end_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """A learning rate so small that every update rounds to nothing."""
    model = make_model()
    outcome, _ = carried_out(job(steps=40, lr=1e-30), model, tmp_path)
    assert (outcome.status, outcome.broken, outcome.step) == ("stopped", True, divergence.STILL)
    assert "not one trained weight has moved in 10 steps" in outcome.reason and "train.lr" in outcome.reason


def test_a_short_run_that_does_not_move_is_seen_at_its_end(make_model: Callable[..., Any], tmp_path: Path) -> None:
    outcome, _ = carried_out(job(steps=3, lr=1e-30), make_model(), tmp_path)
    assert outcome.broken and outcome.step == 3 and "has moved in 3 steps" in outcome.reason


def test_one_bit_of_one_weight_is_seen_on_every_process(make_model: Callable[..., Any]) -> None:
    """Of a model that is spread over processes one saves what it remembers of the start, and all go on from that."""
    watches: list[Watch] = []

    def gathered(mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.stack([divergence._sums(weight.detach()) for weight in one.weights]) for one in watches])

    there: Any = SimpleNamespace(gather=gathered, reduce=lambda found, how: found, device=torch.device("cpu"))
    for seed in (0, 1):
        watches.append(Watch(job(), make_model(seed=seed), Progress(), there))
        watches[-1].sharded = True
    start = watches[0]._digest()
    assert not any(one._moved(start) for one in watches)
    for weight in watches[1].weights:
        place = weight.data.view(-1)[-1:]
        held = place.clone()
        place.copy_(torch.nextafter(held, torch.tensor(9.0)))
        assert all(one._moved(start) for one in watches)
        place.copy_(held)
    large = torch.randn(3 * divergence.PART + 5)
    assert divergence._sums(large).tolist() == pytest.approx([large.double().sum().item(), large.double().square().sum().item()])


def test_steps_of_a_warm_up_are_not_counted(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    wanted = job(steps=30, lr=1e-2, warmup=0.8)
    first = train(wanted, model, Accelerator(cpu=True), tmp_path)
    assert first.status == "finished" and first.step == 30


@pytest.mark.parametrize(("value", "said"), [(0.0, "is exactly 0"), (0.6931, "is 0.6931, the same")])
def test_a_forget_loss_that_never_changes_ends_the_run(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, said: str
) -> None:
    said_by(monkeypatch, lambda step, found: found | {"forget": value})
    model = adapted(make_model)
    start = weights(model)
    outcome, seen = carried_out(job(steps=60, lr=1e-3), model, tmp_path)
    assert outcome.broken and outcome.step == divergence.UNCHANGED and f"objective.forget {said} since the first" in outcome.reason
    assert outcome.kept == 10 and torch.equal(weights(model), seen[10]) and not torch.equal(weights(model), start)


def test_a_forget_loss_that_comes_to_rest_is_sound(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by(monkeypatch, lambda step, found: found | {"forget": max(0.0, 0.9 - 0.1 * step)})
    assert carried_out(job(steps=60, lr=1e-3), adapted(make_model), tmp_path)[0].status == "finished"


def test_an_exploding_loss_ends_the_run_with_the_last_good_weights(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by(monkeypatch, lambda step, found: found | ({"retain": 4000.0 + step} if step > 23 else {"retain": 2.0}))
    model = adapted(make_model)
    outcome, seen = carried_out(job(steps=60, lr=1e-3), model, tmp_path)
    assert outcome.broken and outcome.step == 23 + divergence.BEYOND - 1 and outcome.kept == 20
    assert "retain is 4.03e+03, 2e+03 times what it was, 5 steps in a row, at step 28" in outcome.reason
    assert torch.equal(weights(model), seen[20])


def test_one_wild_step_and_an_ascent_without_bound_are_sound(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wild(step: int, found: dict[str, float]) -> dict[str, float]:
        return {"forget": -(2.0**step), "retain": 1e6 if step % 7 == 0 else 0.1}

    said_by(monkeypatch, wild)
    assert carried_out(job(steps=40, lr=1e-3), adapted(make_model), tmp_path)[0].status == "finished"


def test_an_exploding_gradient_ends_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    wanted = replace(job(steps=60, lr=1e-3, optimizer="sgd"), terms={"forget": Term(loss=Ascent())})

    def spoil(step: int) -> None:
        if step == 15:
            dict(trainable(model))["lm_head.weight"].data *= 1e6  # what stands before it has gradients as much larger

    outcome = train(wanted, model, Accelerator(cpu=True), tmp_path, look=spoil)
    assert outcome.broken and "grad_norm is" in outcome.reason and outcome.step == 15 + divergence.BEYOND - 1 and outcome.kept == 10


def test_weights_that_are_not_finite_are_not_kept(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted(make_model)

    def spoil(step: int) -> None:
        if step == 13:
            next(iter(trainable(model).values())).data[0, 0] = float("inf")

    outcome = train(job(steps=40, lr=1e-3), model, Accelerator(cpu=True), tmp_path, look=spoil)
    assert outcome.broken and (outcome.step, outcome.kept) == (13, 10) and "not finite at step 14" in outcome.reason
    assert torch.isfinite(weights(model)).all()


def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered is part of a checkpoint: the median, steps in a row, the copy."""
    ends = []
    for name, at in (("straight", None), ("cut", 25)):
        model = adapted(make_model)
        monkeypatch.undo()
        backward = Window.backward

        def changed(self: Window, *given: Any, backward: Any = backward, **named: Any) -> dict[str, float]:
            return backward(self, *given, **named) | {"retain": 4000.0 if Steps.now >= 23 else 2.0}

        class Steps:
            now = 0

        monkeypatch.setattr(Window, "backward", changed)

        def look(step: int, steps: Any = Steps, at: int | None = at) -> None:
            steps.now = step
            if step == at:
                raise PowerCut

        wanted = job(steps=60, lr=1e-3, checkpoint_every=8)
        if at:
            with pytest.raises(PowerCut):
                train(wanted, model, Accelerator(cpu=True), tmp_path / name, look=look)
            model, Steps.now = adapted(make_model), 24
        outcome = train(wanted, model, Accelerator(cpu=True), tmp_path / name, look=lambda step: look(step, at=None), resume=True)
        ends.append((outcome, weights(model)))
    assert ends[0][0] == ends[1][0] and ends[0][0].broken and torch.equal(ends[0][1], ends[1][1])
    assert log(tmp_path / "straight") == log(tmp_path / "cut")


def test_a_collapse_that_no_budget_bounds_is_said(
    make_model: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = {"retain": Term(loss=Ascent())}
    unbound = Stop(budget=Harm(retain_perplexity=None), every=2, rows=10)
    wanted = replace(job(steps=60, lr=3e-3, stop=unbound), terms=terms)
    outcome = train(wanted, adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert outcome.status == "finished" and not outcome.broken and outcome.step == 60
    said = capsys.readouterr().err
    assert said.count("warning: retain ") == 1 and "no budget of train.stop ends the run" in said
    assert "most of what was to be kept is gone" in outcome.reason
    bound = replace(wanted, settings=replace(wanted.settings, stop=Stop(every=2, rows=10)))
    assert train(bound, adapted(make_model), Accelerator(cpu=True), tmp_path / "b").status == "stopped"
    assert "warning" not in capsys.readouterr().err


METHODS = sorted(path.name for path in (ROOT / "recipes" / "methods").glob("*.yaml"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_shipped_recipe_is_taken_for_one_of_these(
    name: str, cache: Path, embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first 60 steps, without the dose that would end it before; how near it comes to a bound is printed."""
    from llm_unlearn.exact.command import engine

    monkeypatch.chdir(ROOT)
    text = recipe.load(Path("recipes/methods") / name)
    words = [f"output={tmp_path / 'run'}", "evaluation=null"]
    words += ["train.steps=60"] if text.train.privacy is None and text.terms else []
    words += ["train.stop.until=null", "train.stop.patience=1000"] if text.train.stop else []
    wanted = recipe.load(Path("recipes/methods") / name, words)
    ends: list[Any] = []
    carry = loop.train

    def kept(*given: Any, **named: Any) -> Any:
        ends.append(carry(*given, **named))
        return ends[-1]

    for module in ("llm_unlearn.run", "llm_unlearn.training.edits", "llm_unlearn.exact.pieces"):
        monkeypatch.setattr(f"{module}.train", kept)
    outcome = engine(wanted)(wanted, None, cache=cache)
    assert not outcome.broken and not any(one.broken for one in ends), outcome.reason
    rows = [json.loads(line) for path in tmp_path.rglob("log.jsonl") for line in path.read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    if norms:
        usual = max(sorted(norms)[len(norms) // 2], divergence.GRADIENT_LEAST)
        terms = [key for key in (wanted.terms or {}) if key != "forget" and key in rows[-1]]
        losses = {key: max(abs(row[key]) for row in rows) for key in terms}
        print(f"\n{name}: {len(rows)} steps, gradient at most {max(norms) / usual:.3g} times its median, {losses}")
    assert all(math.isfinite(norm) for norm in norms)
