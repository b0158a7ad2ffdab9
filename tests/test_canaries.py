"""The audit by canaries: its bound against values worked out by hand, and what it finds of a private and of a leaking run."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import RECIPE, log, rows

from llm_unlearn import folder
from llm_unlearn.attacks.canaries import Audited, audit, chance, refuted
from llm_unlearn.auditing import request, trial
from llm_unlearn.cli import main
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.data.reading import Examples
from llm_unlearn.data.schedule import poisson
from llm_unlearn.models.scores import Scorer, head_of, score
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.recipe import Recipe, load
from llm_unlearn.sections import Train
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.training import clipped
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train
from llm_unlearn.training.privacy import Privacy, mechanism

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


# ------------------------------------------------------------------------------------------------------------- the verb

AUDITED = """\
output: runs/x
model: {base: embedded:target, adapter: null}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 8}
objective:
  forget: {loss: {name: nll}}
train:
  {steps: 30, lr: 3.0e-3, warmup: 0.0, schedule: constant, window: {forget: 10}, checkpoint_every: 4,
   privacy: {epsilon: 1.0, delta: 1.0e-5, clip: 1.0, reproducible: true}}
"""


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(AUDITED, encoding="utf-8")
    return path


def held_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / request.FILE).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--guesses", "7"], "--guesses: found 7 with 200 canaries; expected an even number from 2 to 200."),
        (["--guesses", "202"], "--guesses: found 202 with 200 canaries"),
        (["--canaries", "1"], "--canaries: found 1; expected at least 2"),
        (["train.privacyy=null"], "train.privacyy: unknown key; did you mean 'privacy'?"),
        (
            ["objective=null", "method={name: task_vector, scale: [1.0]}", "train.privacy=null"],
            "method: task_vector does not train",
        ),
        (["objective.forget.loss.name=npo"], "objective: an audit reads which made-up rows were learnt"),
        (
            ["data.forget.alternate={answer: answer}", "objective.also={loss: {name: dpo}, stream: forget}", "train.privacy=null"],
            "with loss nll, and without alternate and contrast",
        ),
        (
            [
                "train.privacy=null",
                "train.stop={until: retrained, budget: {retain_perplexity: null}}",
                "evaluation=eval/quick.yaml",
            ],
            "train.stop.until: an audit has no retrained model",
        ),
        (["--output", "taken"], "--output: taken exists and is not an audit's folder (it has no privacy_audit.json)."),
        (["--output", "r.yaml"], "--output: r.yaml is a file; r.yaml must be a folder"),
        (["--output", "other"], "--output: other holds an audit with another guesses, seed. Nothing was changed; add --overwrite"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_heavy(
    words: list[str], expected: str, audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llm_unlearn.auditing.trial", None)
    Path("taken").mkdir()
    Path("taken/mine.txt").touch()
    key = request.check(load(audited), canaries=200, guesses=None, seed=0, output=Path("other")).key
    folder.write(Path("other") / request.FILE, json.dumps(key | {"guesses": 2, "seed": 9}))
    assert main(["audit", str(audited), *words]) == 2
    assert expected in capsys.readouterr().err
    assert held_of(Path("other"))["seed"] == 9 and sorted(Path().iterdir()) == [Path("other"), Path("r.yaml"), Path("taken")]


@pytest.mark.parametrize("shape", [{"prompt": "q", "answer": "a"}, {"messages": "m"}, {"text": "t"}], ids=str)
def test_made_up_rows_have_the_shape_of_the_recipes_own(shape: dict[str, str], tokenizer: Any) -> None:
    source = Source(source="x", **shape)
    like = [Example(tuple(range(n)), 1 if "text" in shape else n - t, "forget", 0) for n, t in ((12, 4), (50, 30))]
    made, again, other = (trial.made_up(source, "forget", like, 40, seed, tokenizer) for seed in (3, 3, 4))
    assert made == again and not {one.ids for one in made} & {one.ids for one in other}
    assert len({one.ids for one in made}) == 40 and [one.id for one in made] == list(range(2, 42))
    assert {one.stream for one in made} == {"forget"}
    words = set(trial.ordinary_words(tokenizer))
    assert {"animal", "colour"} <= words and "bir" in words  # a piece of a word is one, where it is a token behind a space
    sizes = {one.targets for one in like}
    for one in made:
        answer = tokenizer.decode(one.ids[one.answer :], skip_special_tokens=True)
        assert any(abs(one.targets - size) <= 3 for size in sizes), answer  # the first word may take more than one token
        assert set(answer.split()[1:]) <= words
    asked = tokenizer.decode(made[0].ids[: made[0].answer])
    assert ("?" in asked and len(asked.split()) >= trial.QUESTION) is ("text" not in shape)
    with pytest.raises(Refused, match=r"data\.forget\.max_tokens: found 3"):
        trial.made_up(Source(source="x", max_tokens=3, prompt="q", answer="a"), "forget", like, 4, 0, tokenizer)


def test_canaries_go_where_rows_are_seen_most_and_coins_are_fair(audited: Path, tokenizer: Any) -> None:
    audited.write_text(RECIPE.replace("npo", "nll") + "train: {window: {forget: 10, retain: 30}}\n", encoding="utf-8")
    asked = request.check(load(audited), canaries=400, guesses=200, seed=1, output=None)
    examples = Examples({"forget": rows("forget", 8, 1), "retain": rows("retain", 300, 2)}, {}, {}, 0)
    found = trial.plant(asked, examples, tokenizer)
    assert found.stream == "retain"  # 10 / 208 < 30 / 500
    assert 0.4 < found.inside.mean() < 0.6 and len(found.canaries) == 400
    put_in = [one for one, coin in zip(found.canaries, found.inside, strict=True) if coin]
    assert found.examples.streams == {"forget": examples.streams["forget"], "retain": [*examples.streams["retain"], *put_in]}
    fewer = Examples({"forget": rows("forget", 8, 1), "retain": rows("retain", 9000, 2)}, {}, {}, 0)
    assert trial.plant(asked, fewer, tokenizer).stream == "forget"  # 10 / 208 > 30 / 9200
    coins = [trial.plant(dataclasses.replace(asked, seed=seed), examples, tokenizer).inside for seed in range(2, 12)]
    assert all(abs(np.corrcoef(one, found.inside)[0, 1]) < 5 / 20 for one in coins)


def test_a_verdict_says_what_it_means() -> None:
    assert trial.verdict(Audited(2.0, 9, 10), 1.5).startswith("REFUTED: were ε 1.5 true of a canary")
    assert trial.verdict(Audited(1.0, 9, 10), 1.5).startswith(
        "Not refuted: guesses like these show an ε of 1 at least. A bound below"
    )
    assert "show nothing: by chance alone" in trial.verdict(Audited(0.0, 5, 10), 1.5)
    assert trial.verdict(Audited(1.0, 9, 10), None).startswith("The recipe claims no privacy")


@pytest.mark.slow
def test_an_audit_from_the_command_line(
    audited: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A private run is not accused; one that forgets its noise is. Interrupted, it goes on; finished, it is not made again."""
    words = ["audit", str(audited), f"model.base={tiny_base}", "--canaries", "80", "--guesses", "60"]
    train_as_it_is = trial.train

    def asked_to_stop(*given: Any, **named: Any) -> Any:
        def press(step: int) -> None:
            if step == 6:
                signal.raise_signal(signal.SIGINT)

        return train_as_it_is(*given, **named, look=press)

    with monkeypatch.context() as patch:
        patch.setattr(trial, "train", asked_to_stop)
        assert main(words) == 130
        assert "interrupted; the same command goes on from there." in capsys.readouterr().err
    assert set(held_of(Path("runs/x_audit"))) == {"recipe", "canaries", "guesses", "seed"}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words) == 0
    assert [row["step"] for row in log(Path("runs/x_audit"))] == list(range(1, 31))
    found = held_of(Path("runs/x_audit"))
    assert checked(found, load(audited)) <= found["claimed_of_canaries"]["epsilon"] < found["claimed"]["epsilon"]
    assert found["verdict"].startswith("Not refuted") and not list(Path("runs").rglob("*.key"))
    assert found["verdict"] in capsys.readouterr().out

    monkeypatch.setattr(clipped, "normals", lambda *what, count: np.zeros(count))
    assert main(words) == 0, "what is finished is said again"
    assert found["verdict"] in capsys.readouterr().out and held_of(Path("runs/x_audit")) == found
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*words, "--overwrite"]) == 0
    leaking = held_of(Path("runs/x_audit"))
    assert checked(leaking, load(audited)) > leaking["claimed_of_canaries"]["epsilon"]
    assert leaking["verdict"].startswith("REFUTED: ") and leaking["claimed"] == found["claimed"]


def checked(found: dict[str, Any], wanted: Recipe) -> float:
    """What the guesses refute, after everything in the file was worked out again from its losses and the recipe."""
    losses = found["losses"]
    order = sorted(losses, key=lambda row: row["before"] - row["after"])
    right = sum(not row["inside"] for row in order[:30]) + sum(row["inside"] for row in order[-30:])
    assert (found["right"], len(losses), found["inserted"]) == (right, 80, sum(row["inside"] for row in losses))
    assert found["refuted_epsilon"] == refuted(80, 60, right, DELTA) <= found["refutable_epsilon"] == refuted(80, 60, 60, DELTA)
    claim = wanted.train.privacy
    assert claim
    plain = mechanism(claim, {"forget": 8}, {"forget": 10}, 30, b"")
    quiet = dataclasses.replace(claim, epsilon=None, noise=plain.sigma)
    planted = mechanism(quiet, {"forget": 8 + found["inserted"]}, {"forget": 10}, 30, b"")
    assert found["noise_multiplier"] == plain.sigma and found["delta"] == DELTA and found["steps"] == 30
    assert found["claimed"] == {"epsilon": plain.epsilon(30), "sampling_rate": 1.0}
    assert found["claimed_of_canaries"] == {"epsilon": planted.epsilon(30), "sampling_rate": 10 / (8 + found["inserted"])}
    return float(found["refuted_epsilon"])


@pytest.mark.slow
def test_a_recipe_that_claims_nothing_is_audited_too(audited: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", str(audited), f"model.base={tiny_base}", "train.privacy=null", "train.steps=null", "train.epochs=10"]
    assert main([*words, "--canaries", "20", "--output", "here"]) == 0
    found = held_of(Path("here"))
    assert found["claimed"] is None is found["claimed_of_canaries"] and found["verdict"].startswith("The recipe claims no privacy")
    assert found["steps"] == 10, "ten passes over 8 rows in windows of 10, whatever the canaries add"
    assert "claimed" not in capsys.readouterr().out.partition("guesses")[0]
