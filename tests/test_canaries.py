"""The audit by canaries: its bound against values worked out by hand, and what it finds of a private and of a leaking run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import rows

from llm_unlearn.attacks.canaries import audit, chance, refuted
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.schedule import poisson
from llm_unlearn.models.scores import Scorer, head_of, score
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Train
from llm_unlearn.training.loop import train
from llm_unlearn.training.privacy import Privacy, mechanism
from llm_unlearn.training.window import Job

DELTA = 1e-5


def test_the_chance_of_right_guesses_by_hand() -> None:
    assert chance(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert chance(10, 10, 9, 0.0, 0.0) == pytest.approx(11 * 2**-10)
    assert chance(10, 4, 4, math.log(3), 0.0) == pytest.approx(0.75**4)
    # r = v = 2, e^ε / (1 + e^ε) = ¾: P[B ≥ 2] = 9/16; max(P[B = 1] / 1, P[B ≤ 1] / 2) = max(6/16, 7/32) = 6/16; 2mδ = 0.2
    assert chance(10, 2, 2, math.log(3), 0.01) == pytest.approx(9 / 16 + 0.2 * 6 / 16)
    # v = 1: P[B ≥ 1] = 15/16; P[B = 0] = 1/16
    assert chance(1, 2, 1, math.log(3), 0.1) == pytest.approx(15 / 16 + 0.2 * 1 / 16)
    assert chance(10, 10, 0, 1.0, 0.0) == 1.0


def test_what_is_refuted_by_hand() -> None:
    """All r right: refuted as long as (e^ε / (1 + e^ε))^r < 5 %."""
    for guesses in (20, 100):
        rate = 0.05 ** (1 / guesses)
        assert refuted(guesses, guesses, guesses, 0.0) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert refuted(100, 100, 50, 0.0) == 0.0 == refuted(4, 4, 4, 0.0)
    assert refuted(100, 100, 90, 1e-3) < refuted(100, 100, 90, 0.0)
    assert refuted(100, 100, 90, 0.0, 0.99) < refuted(100, 100, 90, 0.0)


def test_guesses_are_the_ends_of_the_order() -> None:
    scores, inside = np.array([0.1, 0.9, 0.5, 0.8, 0.2, 0.4]), np.array([False, True, True, False, True, False])
    assert [audit(scores, inside, guesses, 0.0).right for guesses in (2, 4, 6)] == [2, 2, 4]
    assert audit(scores, inside, 3, 0.0).guesses == 2


def test_randomised_response_is_not_accused() -> None:
    """It is exactly ε-private, the case in which the bound is tight: accused in 5 % of the audits at most."""
    draw, epsilon, m = np.random.default_rng(0), 1.0, 60
    accused = 0
    for _ in range(400):
        inside = draw.random(m) < 0.5
        truth = draw.random(m) < math.exp(epsilon) / (1 + math.exp(epsilon))
        scores = np.where(truth == inside, 1.0, -1.0) + 1e-3 * draw.random(m)
        accused += audit(scores, inside, m, 0.0).epsilon > epsilon
    assert accused / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_chance_is_that_of_counting() -> None:
    """Against all outcomes of r coins that show the truth with e^ε / (1 + e^ε)."""
    rate, guesses = math.e / (1 + math.e), 6
    worlds = [(sum(coins), math.prod(rate if coin else 1 - rate for coin in coins)) for coins in product((0, 1), repeat=guesses)]
    for right in range(guesses + 1):
        below = [sum(p for b, p in worlds if right - i <= b < right) / i for i in range(1, right + 1)]
        expected = sum(p for b, p in worlds if b >= right) + 2 * 9 * 0.01 * max(below, default=0.0)
        assert chance(9, guesses, right, 1.0, 0.01) == pytest.approx(min(1.0, expected))


@pytest.mark.long
@pytest.mark.slow
def test_a_private_run_stays_below_its_claim_and_a_leaking_one_is_found(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """The same run, with the noise of its claim and without."""
    canaries = rows("forget", 200, 9)
    inside = np.random.default_rng(5).random(200) < 0.5
    trained_on = [one for one, put_in in zip(canaries, inside, strict=True) if put_in]
    claim = Privacy(epsilon=2.0, delta=DELTA, clip=1.0, reproducible=True)
    private = mechanism(claim, {"forget": len(trained_on)}, {"forget": 20}, 60, b"audit")
    leaking = dataclasses.replace(private, settings=Privacy(noise=1e-9, delta=DELTA, clip=1.0))
    assert private.epsilon(60) <= 2.0
    found = {}
    for name, run in {"private": private, "leaking": leaking}.items():
        model = make_model()
        before = losses(model, canaries)
        settings = Train(lr=3e-3, batch_tokens=400, warmup=0.0, schedule="constant", privacy=run.settings)
        schedule = poisson({"forget": len(trained_on)}, run.rates, b"audit", 60)
        job = Job({"forget": Term(loss=NLL())}, {"forget": trained_on}, schedule, settings, private=run)
        train(job, model, Accelerator(cpu=True), tmp_path / name)
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = audit(before - losses(model, canaries), inside, 200, DELTA)
    print(found)
    assert found["private"].epsilon <= 2.0, found
    assert found["leaking"].epsilon > 2.5, found


def losses(model: Any, examples: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(m,) mean −log p of each answer."""
    model.eval()
    with torch.no_grad():
        scores = score(Scorer(model), head_of(model), lay_out(examples))["forget"]
        lengths = torch.tensor([one.targets for one in examples])
        found: np.ndarray[Any, np.dtype[np.float64]] = (-scores.by_sequence(scores.logps) / lengths).double().numpy()
    return found
