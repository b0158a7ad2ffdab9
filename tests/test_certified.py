"""Noisy fine-tuning: its noise against closed forms and a simulation of the worst case, its steps, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import RECIPE, log, on_processes, refusal, rows, straight_and_resumed, weights
from safetensors.torch import load_file
from scipy import optimize, stats

from llm_unlearn import recipe
from llm_unlearn.data.chance import normals
from llm_unlearn.data.schedule import build
from llm_unlearn.methods.noisy_finetune import NoisyFinetune, delta_of, told_apart
from llm_unlearn.models.load import trainable
from llm_unlearn.models.trainable_weights import choose_weights
from llm_unlearn.run import run
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused
from llm_unlearn.training.certified import Certified, certified_by
from llm_unlearn.training.checkpoint import Progress
from llm_unlearn.training.divergence import Watch
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train
from llm_unlearn.training.window import Window

SETTINGS = NoisyFinetune(reference="x", epsilon=2.0, delta=1e-3, radius=0.5, noisy_steps=4, rate=0.05, clip=1.0, decay=0.1)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ----------------------------------------------------------------------------------------------------------- the noise


def test_delta_of_a_gaussian_mechanism_is_its_integral() -> None:
    """δ(ε) = ∫ max(0, p − e^ε q) for N(μ, 1) and N(0, 1)."""
    x = np.linspace(-30, 30, 2_000_001)
    for mu, epsilon in ((0.5, 0.3), (1.0, 1.0), (2.5, 4.0)):
        excess = np.maximum(0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))
        assert delta_of(mu, epsilon) == pytest.approx(np.trapezoid(excess, x), rel=1e-6)


def test_the_largest_mu_is_found_from_below() -> None:
    for epsilon, delta in ((0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-3), (50.0, 1e-2)):
        mu = told_apart(epsilon, delta)
        assert delta_of(mu, epsilon) <= delta < delta_of(mu * (1 + 1e-9), epsilon)


def test_the_sensitivity_is_the_least_sum_of_squares() -> None:
    """Against a search over all ways to hide 2 C₀ and what the gradients add: z ← c z + s − a, from 2 C₀ to 0, never below."""
    for changes in ({}, {"decay": 0.0}, {"radius": 0.02, "decay": 0.5}, {"noisy_steps": 1}, {"noisy_steps": 7, "rate": 0.5}):
        wanted = dataclasses.replace(SETTINGS, **changes)
        c, s, steps = 1 - wanted.decay, 2 * wanted.rate * wanted.clip, wanted.noisy_steps

        def distances(a: Any, c: float = c, s: float = s, begin: float = 2 * wanted.radius) -> list[float]:
            z = [begin]
            for one in a:
                z.append(c * z[-1] + s - one)
            return z[1:]

        rules: Any = [
            {"type": "eq", "fun": lambda a: distances(a)[-1]},
            {"type": "ineq", "fun": lambda a: np.array([0, *distances(a)[:-1]])},
        ]
        least = optimize.minimize(
            lambda a: a @ a, np.full(steps, s + 0.1), constraints=rules, bounds=[(0, None)] * steps, tol=1e-13
        )
        assert least.success and wanted.sensitivity == pytest.approx(math.sqrt(least.fun), rel=1e-4)


def test_without_gradients_the_bound_is_what_two_gaussians_are() -> None:
    """d ← c d + N(0, σ²) from ±C₀ ends at N(±c^T C₀, σ² Σ c^2k): their distance in standard deviations is exactly Δ / σ."""
    wanted = dataclasses.replace(SETTINGS, rate=1e-300)
    spread = wanted.sigma * math.sqrt(sum(0.9 ** (2 * k) for k in range(4)))
    mu = 2 * 0.9**4 * wanted.radius / spread
    assert mu == pytest.approx(told_apart(wanted.epsilon, wanted.delta), rel=1e-9)


def test_no_threshold_tells_the_worst_gradients_apart() -> None:
    """Gradients that always push the two runs apart, in one dimension, a million times: P[x > t] ≤ e^ε Q[x > t] + δ for all t."""
    draw, count = np.random.default_rng(0), 1_000_000
    ends = []
    for side in (1.0, -1.0):
        x = np.full(count, side * SETTINGS.radius)
        for _ in range(SETTINGS.noisy_steps):
            x = 0.9 * x + SETTINGS.rate * SETTINGS.clip * np.sign(x) + SETTINGS.sigma * draw.standard_normal(count)
        ends.append(np.sort(x))
    t = np.linspace(ends[1][0], ends[0][-1], 4001)
    above = [1 - np.searchsorted(end, t) / count for end in ends]
    found = float(np.max(above[0] - math.exp(SETTINGS.epsilon) * above[1]))
    assert 0 < found <= SETTINGS.delta + 4 * math.sqrt(SETTINGS.delta / count)


# ----------------------------------------------------------------------------------------------------------- the steps


def certified_job(folder: Path, steps: int = 6, **changes: Any) -> Job:
    streams = {"forget": rows("forget", 8, 1), "retain": rows("retain", 10, 2)}
    wanted = dataclasses.replace(SETTINGS, reference=str(folder), **changes)
    schedule = build({"forget": 8, "retain": 10}, {"forget": 5, "retain": 7}, seed=3, steps=steps)
    settings = Train(lr=1e-2, batch_tokens=200, warmup=0.0, checkpoint_every=1, clip=None)
    return Job(wanted.terms, streams, schedule, settings, certified=Certified(wanted, str(folder), b"a key"))


@pytest.fixture
def public(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A model that never saw the forget set."""
    make_model(seed=7).save_pretrained(tmp_path / "public")
    tokenizer.save_pretrained(tmp_path / "public")
    return tmp_path / "public"


def test_the_noisy_steps_are_those_of_the_proof(make_model: Callable[..., Any], public: Path, tmp_path: Path) -> None:
    """Replayed in float64 with the gradients that the model has on the way."""
    model, origin = make_model(), make_model(seed=7)
    base = weights(origin).double()
    away = weights(model).double() - base
    expected = base + away * min(1.0, 0.5 / float(away.norm()))
    sizes = [weight.numel() for weight in trainable(model).values()]
    seen: list[torch.Tensor] = []
    move = Certified.move

    def watch(self: Certified, net: Any, start: Any, step: int) -> None:
        seen.append(torch.cat([weight.grad.flatten() for weight in net]).double())
        move(self, net, start, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Certified, "move", watch)
        train(certified_job(public, steps=4), model, Accelerator(cpu=True), tmp_path / "run")
    assert len(seen) == 4 and max(float(slope.norm()) for slope in seen) > 1.0
    for step, slope in enumerate(seen):
        noise = np.concatenate([normals(b"a key", "certified", step, k, count=size) for k, size in enumerate(sizes)])
        cut = slope * min(1.0, 1.0 / float(slope.norm()))
        expected = base + 0.9 * (expected - base) - 0.05 * cut + SETTINGS.sigma * torch.from_numpy(noise)
    assert float((weights(model).double() - expected).abs().max()) < 1e-5


def test_the_beginning_is_forgotten_as_far_as_it_can_be(make_model: Callable[..., Any], public: Path, tmp_path: Path) -> None:
    """Two models far apart are, with the same key, within what the proof says after each noisy step: z ← c z + s."""
    ends = []
    for seed in (0, 1):
        model = make_model(seed=seed)
        train(certified_job(public, steps=4), model, Accelerator(cpu=True), tmp_path / str(seed))
        AcceleratorState._reset_state(reset_partial_state=True)
        ends.append(weights(model))
    bound = 2 * 0.5
    for _ in range(4):
        bound = 0.9 * bound + 2 * 0.05 * 1.0
    assert 0 < float((ends[0] - ends[1]).norm()) <= bound + 1e-4
    assert float((weights(make_model(seed=0)) - weights(make_model(seed=1))).norm()) > 10 * bound


def test_it_goes_on_where_it_was_bit_for_bit(make_model: Callable[..., Any], public: Path, tmp_path: Path) -> None:
    for at in (2, 5):  # within the noisy steps, and after them
        straight, resumed = straight_and_resumed(certified_job(public), make_model, tmp_path / str(at), at)
        assert torch.equal(weights(straight), weights(resumed))
        assert log(tmp_path / str(at) / "straight") == log(tmp_path / str(at) / "cut")
        AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------- a certificate is of what is kept


def draws_in(model: Any, public: Any, wanted: NoisyFinetune) -> float:
    """Return how many draws of noise these weights hold, from their RMS distance to the reference: σ² Σ_{k<n} c^2k."""
    apart = (weights(model).double() - weights(public).double()).square().mean() / wanted.sigma**2
    c2 = (1 - wanted.decay) ** 2
    return math.log(1 - float(apart) * (1 - c2)) / math.log(c2)


@pytest.mark.parametrize("said", [4000.0, math.nan])
@pytest.mark.parametrize("since", [2, 13, 15])
def test_whatever_ends_the_run_the_kept_weights_hold_every_noisy_step(
    make_model: Callable[..., Any], public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: int, said: float
) -> None:
    """The loss is wild from some step on, within the twelve noisy ones or after them."""
    backward, count = Window.backward, [0]

    def changed(self: Window, *given: Any, **named: Any) -> dict[str, float]:
        count[0] += 1
        found = backward(self, *given, **named)
        return found | {"retain": said if count[0] >= since else 2.0}

    monkeypatch.setattr(Window, "backward", changed)
    model, wanted = make_model(), certified_job(public, steps=24, noisy_steps=12)
    outcome = train(wanted, model, Accelerator(cpu=True), tmp_path / "run")
    assert wanted.certified
    assert outcome.kept >= 12 and wanted.certified.facts(outcome.kept)["epsilon"] == 2.0
    assert outcome.broken == (math.isnan(said) or since > 13)  # one that was always so high has not exploded
    if outcome.kept == 12:
        assert draws_in(model, make_model(seed=7), wanted.certified.settings) == pytest.approx(12, rel=0.05)
    else:
        assert outcome.kept == outcome.step


def test_a_run_that_explodes_after_the_noise_keeps_the_last_noisy_weights(
    make_model: Callable[..., Any], public: Path, tmp_path: Path
) -> None:
    """The certificate once was of weights that held ten of fifteen draws."""
    wanted = certified_job(public, steps=24, noisy_steps=15)
    wanted = dataclasses.replace(wanted, settings=dataclasses.replace(wanted.settings, lr=1000.0))
    model = make_model()
    outcome = train(wanted, model, Accelerator(cpu=True), tmp_path / "run")
    assert wanted.certified and outcome.broken and outcome.kept == 15 < outcome.step
    assert draws_in(model, make_model(seed=7), wanted.certified.settings) == pytest.approx(15, rel=0.05)


def test_a_gradient_that_is_not_finite_counts_as_nothing(make_model: Callable[..., Any]) -> None:
    """Such a step is decay and noise, and does not end the run: where it ended would tell of weights without their noise."""
    made, moved = Certified(SETTINGS, "x", b"a key"), []
    for value in (math.nan, math.inf, 0.0):
        model = make_model()
        mine = list(trainable(model).values())
        origin = [torch.zeros_like(weight) for weight in mine]
        for weight in mine:
            weight.grad = torch.ones_like(weight) * value
        made.move(mine, origin, 1)
        moved.append(weights(model))
    assert torch.isfinite(moved[0]).all() and torch.equal(moved[0], moved[2]) and torch.equal(moved[1], moved[2])


def test_a_checkpoint_of_an_earlier_version_gives_back_nothing_before_the_noise(
    make_model: Callable[..., Any], public: Path
) -> None:
    """It holds a copy of weights from within the noisy steps, and what their losses were."""
    job = certified_job(public, steps=40, noisy_steps=12)
    old = Progress(step=14, safe_step=10, safe={"x": torch.zeros(1)}, watch={"seen": {"retain": [1e9]}})
    watch = Watch(job, make_model(), old, Accelerator(cpu=True))
    assert watch.before({"retain": 2.0, "lr": 1e-2, "grad_norm": 1.0}, {"retain": 1.0}) is None
    assert old.safe_step == 14 and "x" not in old.safe and old.watch["seen"]["retain"] == [2.0]


WHOLE = """\
output: {folder}
model: {{base: {base}, adapter: null}}
data:
  forget: {{source: embedded:forget, prompt: question, answer: answer, limit: 8}}
  retain: {{source: embedded:retain, prompt: question, answer: answer, limit: 10}}
method: {{name: noisy_finetune, reference: {public}, epsilon: 2, delta: 1.0e-3, radius: 0.5, noisy_steps: 3, rate: 0.05,
  reproducible: true}}
train: {{steps: 5, lr: 1.0e-2, optimizer: sgd, warmup: 0.0, window: {{retain: 7}}, batch_tokens: 200}}
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_certificate(
    tiny_base: Path, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """As whole runs: the noise is drawn once for all of them, and the gradient that is clipped is that of the whole window."""
    make_model(seed=7, hidden_size=64).save_pretrained(tmp_path / "public")
    tokenizer.save_pretrained(tmp_path / "public")
    found = []
    for name in ("alone", "certified"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "recipe.yaml"
        file.write_text(WHOLE.format(folder=tmp_path / name / "run", base=tiny_base, public=tmp_path / "public"))
        if name == "alone":
            run(recipe.load(file), None, cache=tmp_path)
        else:
            on_processes(2, "processes.py", str(tmp_path), "certified")
        facts = json.loads((tmp_path / name / "run" / "privacy.json").read_text())
        found.append((facts, load_file(tmp_path / name / "run" / "model" / "model.safetensors")))
    (certificate, alone), (other, shared) = found
    base = load_file(tiny_base / "model.safetensors")
    assert certificate == other and certificate["epsilon"] == 2.0 and alone.keys() == shared.keys()
    apart, moved = (
        math.sqrt(sum(float((one[name].double() - two[name].double()).square().sum()) for name in alone))
        for one, two in ((alone, shared), (alone, base))
    )
    assert apart <= 1e-5 * moved and moved > 1


def test_the_facts_claim_nothing_before_the_noisy_steps_are_done() -> None:
    made = Certified(SETTINGS, "x", b"hush")
    assert made.facts(3)["epsilon"] is None and made.facts(4)["epsilon"] == 2.0
    assert "hush" not in repr(made) + json.dumps(made.facts(4)) + made.said
    assert all(one in made.said for one in made.assumptions)


# ------------------------------------------------------------------------------------------------------------- refused


def test_weights_that_stay_must_be_those_of_the_reference(make_model: Callable[..., Any], public: Path, tmp_path: Path) -> None:
    model = make_model()
    choose_weights(model, ("layers.1.",))
    with pytest.raises(Refused, match=r"model\.trainable: .* is not trained and differs from the reference's"):
        train(certified_job(public), model, Accelerator(cpu=True), tmp_path / "run")
    same = make_model(seed=7)
    choose_weights(same, ("layers.1.",))
    assert train(certified_job(public), same, Accelerator(cpu=True), tmp_path / "run").step == 6


def test_another_architecture_is_refused(make_model: Callable[..., Any], public: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"method\.reference: .* has no weight like"):
        train(certified_job(public), make_model(num_hidden_layers=3), Accelerator(cpu=True), tmp_path / "run")


def test_a_run_without_all_noisy_steps_is_refused() -> None:
    assert certified_by(SETTINGS, 4, b"", str) and not certified_by(None, 0, b"", str)
    with pytest.raises(Refused, match=r"method\.noisy_steps: 4 of them, and the run has 3 steps"):
        certified_by(SETTINGS, 3, b"", str)


METHOD = (
    RECIPE[: RECIPE.index("objective")].replace("embedded:target}", "embedded:target, adapter: null}")
    + "method: {name: noisy_finetune, reference: embedded:retrained, epsilon: 1, delta: 1.0e-5, radius: 0.1}\n"
)


@pytest.mark.parametrize(
    ("override", "place", "reason"),
    [
        ("model.adapter={rank: 4}", "model.adapter", "the weights below it saw the forget set"),
        ("train.rules=[{name: sharpness}]", "train.rules", "the proof knows no step but its own"),
        ("train.stop={every: 2}", "train.stop", "tell of the forget rows"),
        ("train.privacy={noise: 1, delta: 1.0e-5, clip: 1}", "train.privacy", "is another guarantee"),
        ("method.reference=./nowhere", "method.reference", "no such folder: ./nowhere"),
        ("data.retain=null", "data.retain", "missing; noisy_finetune reads it."),
    ],
)
def test_what_would_break_the_certificate_is_refused(tmp_path: Path, override: str, place: str, reason: str) -> None:
    stands, said = refusal(tmp_path, METHOD, override)
    assert stands.drawn_openly is False and f": {place}: " in said and reason in said
