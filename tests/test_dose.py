"""The dose: how far a run forgets, what it may cost, which weights are kept, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import job, log, rows, weights

from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.likelihood import NLL, Ascent
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused
from llm_unlearn.training import loop
from llm_unlearn.training.checkpoint import Progress
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.guard import Outcome, Probe, aim_of, ask
from llm_unlearn.training.loop import train

FREE = Harm(retain_perplexity=None)
LEARN = {"retain": Term(loss=NLL(), stream="retain")}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------- the rule, on numbers


class Judged:
    """A run that only looks: what is seen at each step is given."""

    def __init__(self, stop: Stop, before: Mapping[str, float], aim: float | None = None) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.probe = Probe(stop, {"forget": rows("forget", 4, 1)}, 64, aim)
        self.progress = Progress(before=dict(before), good={"x": torch.zeros(1)}, good_look=dict(before))
        gap = self.probe.gap(before)
        self.progress.gap = math.inf if gap is None else abs(gap)

    def __call__(self, *looks: Mapping[str, float]) -> Outcome:
        for seen in looks:
            self.progress.step += 10
            if found := loop.judge(self.probe, seen, self.progress, self.model):
                return found
        return loop.ending(self.probe, self.progress)


def seen(forget: float = 1.0, retain: float = 1.0, accuracy: float = 0.9, holdout: float = 50.0) -> dict[str, float]:
    found = {"forget_perplexity": forget, "retain_perplexity": retain, "retain_accuracy": accuracy}
    return {**found, "holdout_perplexity": holdout}


def test_it_ends_when_the_aim_is_reached_and_keeps_what_is_nearest() -> None:
    found = Judged(Stop(until=10.0, budget=FREE), seen(), aim=10.0)(seen(3), seen(9), seen(12), seen(30))
    assert (found.status, found.step, found.kept) == ("finished", 30, 20)  # 9 is nearer to 10 than 12 is, as ratios go
    assert found.reason == (
        "the aim is reached at step 30: forget perplexity 12 on 4 rows (asked for: 10); step 20 was nearer to it: "
        "forget perplexity 9 on 4 rows (asked for: 10)"
    )
    assert Judged(Stop(until=10.0), seen(), aim=10.0)(seen(3), seen(10.5)).kept == 20


def test_an_aim_that_is_not_reached_is_said() -> None:
    found = Judged(Stop(until="retrained"), seen(), aim=10.0)(seen(3), seen(8), seen(6))
    assert (found.status, found.step, found.kept) == ("finished", 30, 20)
    assert found.reason == "the aim is not reached: forget perplexity 8 on 4 rows (the retrained model's: 10)"
    found = Judged(Stop(until="retrained"), seen(), aim=10.0)(seen(3), seen(6))
    assert found.reason.endswith("(the retrained model's: 10); more epochs would go further")


def test_the_holdout_set_moves_with_the_model() -> None:
    found = Judged(Stop(until="holdout"), seen())(seen(3, holdout=60), seen(20, holdout=25), seen(40, holdout=39))
    assert (found.step, found.kept) == (30, 30)
    assert found.reason == "the aim is reached at step 30: forget perplexity 40 on 4 rows (the holdout set's: 39)"


@pytest.mark.parametrize("until", [10.0, "holdout", None])
@pytest.mark.parametrize("which", [{"forget": math.inf}, {"retain": math.inf}, {"holdout": math.inf}])
def test_a_look_that_is_not_finite_ends_as_broken(until: Any, which: dict[str, float]) -> None:
    """An ascent without a budget that overflows has not reached its aim."""
    found = Judged(Stop(until=until, budget=FREE), seen(), aim=until if until != "holdout" else None)(
        seen(3), seen(**{"forget": 9} | which)
    )
    (name,) = which
    assert found == Outcome("stopped", 20, 10, f"{name} perplexity not finite at step 20", True)


def test_a_forward_pass_that_overflows_is_no_perplexity(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    accelerator = Accelerator(cpu=True)
    assert ask(rows("forget", 4, 1), 64, Scorer(model), head_of(model), accelerator)[0] == math.inf
    probe = Judged(Stop(until=50.0, budget=FREE), seen(), aim=50.0).probe
    reason = "forget perplexity not finite before the first step"
    assert loop.first(probe, seen(math.inf), Progress(), model) == Outcome("stopped", 0, 0, reason, True)
    with pytest.raises(Refused, match=r"train\.stop\.until: the retrained model's perplexity on the forget set is not finite"):
        aim_of(dose_job(until="retrained"), model, accelerator)


def test_weights_beyond_the_budget_are_never_kept() -> None:
    run = Judged(Stop(until=10.0, budget=Harm(retain_perplexity=1.5)), seen(), aim=10.0)
    found = run(seen(3, 1.4), seen(9, 1.6), seen(10))
    assert (found.status, found.step, found.kept) == ("stopped", 20, 10)
    assert found.reason == "retain perplexity 1.6 is above 1.5 × 1 at step 20"


def test_the_aim_beyond_the_budget_does_not_count() -> None:
    found = Judged(Stop(until=10.0), seen(), aim=10.0)(seen(11, 2.0))
    assert (found.status, found.kept) == ("stopped", 0) and "retain perplexity" in found.reason


def test_accuracy_may_fall_by_a_share() -> None:
    stop = Stop(budget=Harm(retain_accuracy=0.02, retain_perplexity=None))
    found = Judged(stop, seen())(seen(accuracy=0.883), seen(accuracy=0.881))
    assert (found.status, found.kept) == ("stopped", 10)
    assert found.reason == "retain accuracy 0.881 is more than 2 % below 0.9 at step 20"
    assert Judged(stop, seen())(seen(accuracy=0.95), seen(accuracy=0.9)).kept == 20


def test_both_bounds_hold() -> None:
    stop = Stop(budget=Harm(retain_accuracy=0.1, retain_perplexity=1.2))
    assert "perplexity" in Judged(stop, seen())(seen(retain=1.3, accuracy=0.1)).reason
    assert "accuracy" in Judged(stop, seen())(seen(retain=1.1, accuracy=0.1)).reason


def test_patience_waits_for_so_many_looks_in_a_row() -> None:
    stop = Stop(patience=2)
    found = Judged(stop, seen())(seen(retain=2), seen(retain=1.1), seen(retain=2), seen(retain=3), seen())
    assert (found.status, found.step, found.kept) == ("stopped", 40, 20)
    found = Judged(stop, seen())(seen(retain=1.1), seen(retain=2))
    assert (found.status, found.kept, found.reason) == ("finished", 10, "the last looks were beyond the budget")


def test_without_an_aim_the_last_within_the_budget_is_kept() -> None:
    assert Judged(Stop(), seen())(seen(9), seen(2), seen(5)) == Outcome("finished", 30, 30, "")


def test_without_bounds_nothing_is_too_much() -> None:
    found = Judged(Stop(budget=FREE), seen())(seen(9, 1e9, 0.0), seen(9, 1e300, 0.0))
    assert (found.status, found.kept) == ("finished", 20)


def test_a_retain_perplexity_that_is_not_a_number_is_harm() -> None:
    assert Judged(Stop(), seen())(seen(retain=math.nan)).status == "stopped"


# ------------------------------------------------------------------------------------------------------- on a small model


def dose_job(steps: int = 60, aim: float | None = None, **stop: Any) -> Any:
    """A model that knows nothing comes to know less: ascent on what is to be forgotten, and a little on what is to be kept."""
    terms = {"forget": Term(loss=Ascent()), "harm": Term(loss=Ascent(), stream="retain", weight=0.1)}
    found = {"budget": FREE, "every": 2, "rows": 6} | stop
    return job(steps=steps, terms=terms, aim=aim, lr=1e-3, schedule="constant", checkpoint_every=5, stop=Stop(**found))


def by_definition(model: Any, examples: Any) -> tuple[float, float]:
    nll, hits, tokens = 0.0, 0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1].double()
        target = torch.tensor(example.ids[example.answer :])
        nll -= float(logits.log_softmax(-1).gather(-1, target[:, None]).sum())
        hits, tokens = hits + int((logits.argmax(-1) == target).sum()), tokens + len(target)
    return math.exp(nll / tokens), hits / tokens


@pytest.mark.parametrize("batch_tokens", [10**6, 40])
def test_what_is_looked_at_is_what_it_is_called(make_model: Callable[..., Any], tmp_path: Path, batch_tokens: int) -> None:
    model, examples = make_model(), rows("retain", 6, 2)
    train(replace(job(steps=60, terms=LEARN, lr=1e-2)), model, Accelerator(cpu=True), tmp_path)  # so that some are hits
    found = ask(examples, batch_tokens, Scorer(model), head_of(model), Accelerator(cpu=True))
    exact = by_definition(model, examples)
    assert exact[1] > 0.2 and found == pytest.approx(exact, rel=1e-5)


def test_a_run_ends_at_a_perplexity(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    start = by_definition(model, rows("forget", 8, 1))[0]
    outcome = train(dose_job(aim=3 * start, until=3 * start, rows=8), model, Accelerator(cpu=True), tmp_path)
    assert outcome.status == "finished" and 2 < outcome.step < 60 and outcome.step % 2 == 0
    assert "the aim is reached" in outcome.reason and f"(asked for: {3 * start:.4g})" in outcome.reason
    looks = {row["step"]: row["forget_perplexity"] for row in log(tmp_path) if "forget_perplexity" in row}
    assert list(looks) == list(range(2, outcome.step + 1, 2)) and looks[outcome.step] >= 3 * start > looks[outcome.step - 2]
    nearest = min(looks, key=lambda step: abs(math.log(looks[step] / (3 * start))))
    assert outcome.kept == nearest
    assert by_definition(model, rows("forget", 8, 1))[0] == pytest.approx(looks[nearest], rel=1e-4)
    assert not any("holdout_perplexity" in row for row in log(tmp_path))


def test_a_run_ends_at_the_holdout_set(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """The model knows the forget set by heart; it forgets until it is as unlikely as rows that it never saw."""
    model = make_model()
    train(job(60, terms={"forget": Term(loss=NLL())}, lr=1e-2), model, Accelerator(cpu=True), tmp_path / "learn")
    wanted = replace(dose_job(until="holdout", rows=8), terms={"forget": Term(loss=Ascent())})
    outcome = train(wanted, model, Accelerator(cpu=True), tmp_path / "forget")
    last = [row for row in log(tmp_path / "forget") if "holdout_perplexity" in row][-1]
    assert outcome.step < 60 and "the holdout set's" in outcome.reason
    assert last["forget_perplexity"] >= last["holdout_perplexity"]


def test_nothing_is_done_where_nothing_is_left_to_forget(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    before = weights(model)
    outcome = train(dose_job(aim=5.0, until=5.0), model, Accelerator(cpu=True), tmp_path)
    assert (outcome.status, outcome.step, outcome.kept) == ("finished", 0, 0)
    assert outcome.reason.startswith("nothing is left to forget: forget perplexity") and outcome.reason.endswith("(asked for: 5)")
    assert torch.equal(weights(model), before) and log(tmp_path) == []


@pytest.mark.parametrize("until", ["aim", "budget"])
def test_a_resumed_run_ends_where_the_whole_one_does(make_model: Callable[..., Any], tmp_path: Path, until: str) -> None:
    start = by_definition(make_model(), rows("forget", 8, 1))[0]
    wanted = dose_job(aim=20 * start, until=20 * start)
    if until == "budget":
        wanted = dose_job(budget=Harm(retain_perplexity=2.0), patience=2)
    straight, broken, resumed = make_model(), make_model(), make_model()
    whole = train(wanted, straight, Accelerator(cpu=True), tmp_path / "straight")
    assert 6 < whole.step < 60 and whole.reason

    class PowerCut(Exception):
        pass

    def cut(step: int) -> None:
        if step == whole.step - 1:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(wanted, broken, Accelerator(cpu=True), tmp_path / "cut", look=cut)
    assert train(wanted, resumed, Accelerator(cpu=True), tmp_path / "cut", resume=True) == whole
    assert torch.equal(weights(resumed), weights(straight)) and log(tmp_path / "cut") == log(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.two_processes("dose")
def test_two_processes_end_where_one_does(make_model: Callable[..., Any], two_processes: Path) -> None:
    for name, wanted in processes_jobs().items():
        model = make_model()
        alone, shared = (
            train(wanted, model, Accelerator(cpu=True), two_processes / f"{name}-alone"),
            torch.load(two_processes / f"{name}.pt"),
        )
        assert (alone.status, alone.step, alone.kept) == shared["outcome"][:3], name
        assert alone.step < 60 and torch.allclose(weights(model), shared["weights"], atol=2e-3)
        for one, other in zip(log(two_processes / f"{name}-alone"), log(two_processes / name), strict=True):
            looks = {key: value for key, value in one.items() if "perplexity" in key or "accuracy" in key}
            assert looks == pytest.approx({key: other[key] for key in looks}, rel=1e-2), (name, one["step"])


def processes_jobs() -> dict[str, Any]:
    """An aim and a budget, on rows that do not deal evenly to two processes."""
    return {"aim": dose_job(aim=30000.0, until=30000.0, rows=5), "budget": dose_job(budget=Harm(retain_perplexity=2.0), rows=5)}


# ------------------------------------------------------------------------------------------------------- what the user reads


@pytest.mark.parametrize(
    ("outcome", "said", "status"),
    [
        (Outcome("finished", 84, 84), "", 0),
        (
            Outcome("finished", 40, 30, "the aim is reached"),
            "finished: the aim is reached; the weights after step 30 were kept.\n",
            0,
        ),
        (Outcome("stopped", 10, 0, "too much"), "stopped: too much; the model was left as it was.\n", 0),
        (Outcome("stopped", 3, 3, "loss not finite", True), "stopped: loss not finite; the weights after step 3 were kept.\n", 1),
    ],
    ids=["all steps", "aim", "budget", "broken"],
)
def test_how_a_run_ended_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: Outcome, said: str, status: int
) -> None:
    from llm_unlearn import verbs

    monkeypatch.setattr("llm_unlearn.run.run", lambda *_, **__: outcome)
    monkeypatch.setattr("llm_unlearn.folder.check", lambda *_: False)
    words = {"overrides": [], "resume": False, "overwrite": False, "cache": Path(), "json": False, "environment": {}}
    assert verbs.run(SimpleNamespace(recipe=Path("recipes/forget_lora.yaml"), **words)).status == status
    assert capsys.readouterr().err == said


def test_the_retrained_model_is_asked_about_the_same_rows(make_model: Callable[..., Any]) -> None:
    wanted = replace(dose_job(until="retrained", rows=5), seed=4)
    other = make_model(seed=9)
    probe = Probe.of(Stop(until="retrained", rows=5), wanted.examples, 4, 64, None)
    found = aim_of(wanted, other, Accelerator(cpu=True))
    assert found == pytest.approx(by_definition(other, probe.sets["forget"])[0], rel=1e-5)
    given = replace(wanted, aim=3.0, settings=Train(stop=Stop(until=3.0)))
    assert aim_of(given, other, Accelerator(cpu=True)) == 3.0
