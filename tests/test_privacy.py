"""Differential privacy: the gradient of a private step against its definition, the draws, the account, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from jobs import RECIPE, ROOT, adapted, log, moved_by, refusal, rows, straight_and_resumed, weights
from scipy import stats
from test_window import DEFINITIONS, Rank, Whole, apart, gradients_of, model_of
from torch import Tensor, nn

from llm_unlearn import recipe
from llm_unlearn.data.chance import normals, uniforms
from llm_unlearn.data.schedule import poisson
from llm_unlearn.objectives.distribution import CEU, KL
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.representation import EmbedMatch
from llm_unlearn.objectives.terms import Term, count
from llm_unlearn.plan import plan
from llm_unlearn.run import run
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused
from llm_unlearn.training import secret
from llm_unlearn.training.clipped import Clipped
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train
from llm_unlearn.training.privacy import Mechanism, Privacy, mechanism
from llm_unlearn.training.secret import new_key
from llm_unlearn.training.window import Window

KEY = b"a key"
SIZES, RATES = {"forget": 12, "retain": 18}, {"forget": 0.5, "retain": 0.25}
TERMS = {"forget": Term(loss=NLL(), weight=0.7), "retain": Term(loss=NLL(), weight=1.5)}
SILENT = 1e-12
"""A noise that cannot be seen, where a gradient is held against a reference."""


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def private_job(terms: Any = None, noise: float = SILENT, clip: float = 0.5, steps: int = 4, **settings: Any) -> Job:
    """Poisson windows of rows of very different length; keywords are those of `train:`."""
    asked = Privacy(noise=noise, delta=1e-3, clip=clip, per_example=settings.pop("per_example", "mean"), reproducible=True)
    streams = {name: rows(name, size, k) for k, (name, size) in enumerate(SIZES.items(), 1)}
    chosen = Train(**({"lr": 1e-2, "batch_tokens": 200, "warmup": 0.0, "privacy": asked} | settings))
    made = Mechanism(asked, RATES, 10.5, steps, KEY)
    return Job(terms or TERMS, streams, poisson(SIZES, RATES, KEY, steps), chosen, 4, private=made)


def reference(job: Job, step: int, model: Any, before: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The definition, in float64, row by row: each gradient divided by max(1, norm / C), their sum over a constant."""
    assert job.private
    model, before = copy.deepcopy(model).double(), copy.deepcopy(before).double()
    asked, total, norms = job.private.settings, {}, []
    for ((stream, index),) in job.schedule.window(step):
        loss = torch.zeros((), dtype=torch.float64)
        for name, term in job.terms.items():
            if (term.stream or name) == stream and count(term.loss, [job.example(stream, index).targets]):
                whole = Whole(job, [{"answer": job.example(stream, index)}], stream, model, before)
                units = DEFINITIONS[type(term.loss)](term.loss, whole)
                mean = term.loss.needs.unit == "token" and asked.per_example == "mean"
                loss = loss + term.weight_at(0.0) * units.sum() / (max(1, len(units)) if mean else 1)
        model.zero_grad()
        if not loss.requires_grad:  # nothing of so short an answer counts
            continue
        loss.backward()
        one = gradients_of(model)
        norms.append(float(torch.cat([part.flatten() for part in one.values()]).norm()))
        for name, part in one.items():
            total[name] = total.get(name, 0.0) + part.clone() / max(1.0, norms[-1] / asked.clip) / 10.5
    return total, norms


def found(job: Job, step: int, model: Any, before: Any, ranks: int = 1, recomputed: bool = False) -> tuple[dict[str, Tensor], bool]:
    """The same through `Clipped`, the ranks one after another; and whether examples were taken side by side."""
    model = copy.deepcopy(model)
    mine, total, side_by_side = model_of(job, model, before), {}, False
    for rank in range(ranks):
        here: Any = Rank(rank, ranks)
        here.distributed_type = DistributedType.NO
        assert job.private
        clipped = Clipped(job.private, mine, here, recomputed)
        clipped.backward(Window(job, step, here), job.terms, {name: term.weight_at(0.0) for name, term in job.terms.items()}, step)
        side_by_side = bool(clipped.layers)
        for name, part in gradients_of(model).items():
            total[name] = total.get(name, 0.0) + part
    return total, side_by_side


CASES: dict[str, dict[str, Any]] = {
    "nll": {},
    "the sum over an answer": {"per_example": "sum"},
    "a value per answer": {"terms": {"forget": Term(loss=NPO()), "retain": Term(loss=KL(), weight=3.0)}},
    "two losses on a row": {"terms": {**TERMS, "more": Term(loss=NPO(), weight=0.5, stream="forget")}},
    "tokens left out": {"terms": {"forget": Term(loss=CEU(skip=3)), "retain": Term(loss=NLL())}},
    "states": {"terms": {"forget": Term(loss=EmbedMatch(layers=(0,))), "retain": Term(loss=NLL())}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_each_example_is_clipped_by_itself(make_model: Callable[..., Any], case: str, adapter: bool) -> None:
    before = make_model(num_hidden_layers=2)
    model = adapted(make_model, 0.1) if adapter else make_model(seed=1)
    _, norms = reference(private_job(**CASES[case]), 0, model, before)
    middle = float(np.median(norms))
    assert min(norms) < middle < max(norms)
    exact, _ = reference(private_job(**CASES[case], clip=middle), 0, model, before)
    for batch_tokens, ranks in ((10**6, 1), (60, 1), (200, 2)):
        job = private_job(**CASES[case], clip=middle, batch_tokens=batch_tokens)
        gradient, side_by_side = found(job, 0, model, before, ranks)
        assert apart(gradient, exact) <= 1e-5, f"{batch_tokens} tokens a micro-batch, {ranks} ranks"
        assert side_by_side == adapter


def test_recomputed_activations_and_the_loop_of_one_give_the_same(make_model: Callable[..., Any]) -> None:
    model, before, job = adapted(make_model, 0.1), make_model(), private_job(clip=2.0)
    alone, side_by_side = found(job, 1, model, before, recomputed=True)
    assert not side_by_side
    together, _ = found(job, 1, model, before)
    assert apart(together, {name: one.double() for name, one in alone.items()}) <= 1e-5


def test_layers_that_do_not_see_examples_side_by_side_are_taken_one_by_one(make_model: Callable[..., Any]) -> None:
    """As experts do, which get the tokens of all examples in one row."""

    class Flat(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x.flatten(0, 1)[None])[0]
            return made.view(*x.shape[:2], -1)

    model, before = adapted(make_model, 0.1), make_model()
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.up_proj = Flat(mlp.up_proj)
    gradient, side_by_side = found(private_job(), 0, model, before)
    assert not side_by_side
    exact, _ = reference(private_job(), 0, model, before)
    assert apart(gradient, exact) <= 1e-5


def test_a_gradient_of_nothing_is_the_noise(make_model: Callable[..., Any]) -> None:
    """An empty window: N(0, (σ C / B)²) on every weight, another one at every step, the same on every rank."""
    job = private_job(noise=2.0, clip=3.0)
    nothing = dataclasses.replace(job, schedule=poisson(SIZES, dict.fromkeys(SIZES, 0.0), KEY, 4))
    model, before = make_model(), make_model()
    drawn = [found(nothing, step, model, before)[0] for step in (0, 1)]
    one, other = (torch.cat([part.flatten() for part in gradient.values()]).double().numpy() for gradient in drawn)
    assert len(one) > 50_000
    assert stats.kstest(one / (2.0 * 3.0 / 10.5), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))
    shared, _ = found(nothing, 0, model, before, ranks=2)  # both ranks add the same; summed here, it stands there twice
    assert apart(shared, {name: 2.0 * part.double() for name, part in drawn[0].items()}) < 1e-6


def test_noise_is_added_to_the_sum(make_model: Callable[..., Any]) -> None:
    model, before = adapted(make_model, 0.1), make_model()
    loud, quiet = (found(private_job(noise=noise), 2, model, before)[0] for noise in (0.3, SILENT))
    for k, name in enumerate(quiet):
        added = 0.3 * 0.5 / 10.5 * normals(KEY, "noise", 2, k, count=quiet[name].numel())
        assert np.allclose((loud[name] - quiet[name]).flatten().numpy(), added, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the draws


def test_draws_are_uniform_normal_and_of_their_key() -> None:
    uniform, normal = uniforms(KEY, "a", 1, count=100_001), normals(KEY, "a", 1, count=100_001)
    assert 0 < uniform.min() < uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3 and stats.kstest(normal, "norm").pvalue > 1e-3
    assert np.array_equal(uniforms(KEY, "a", 1, count=7), uniform[:7])
    for others in (uniforms(b"another", "a", 1, count=100_001), uniforms(KEY, "a", 2, count=100_001)):
        assert abs(np.corrcoef(uniform, others)[0, 1]) < 0.02


def test_each_example_enters_each_step_by_a_draw_of_its_own() -> None:
    steps = 4000
    table = poisson(SIZES, RATES, KEY, steps)
    seen = np.zeros((steps, 30), bool)
    seen[table.step, table.example + np.array([0, 12])[table.stream]] = True
    assert seen.sum() == len(table.step) and table.steps == steps
    rates = np.repeat([0.5, 0.25], [12, 18])
    assert np.all(np.abs(seen.mean(0) - rates) < 5 * np.sqrt(rates * (1 - rates) / steps))
    across = np.corrcoef(seen.T)[np.triu_indices(30, 1)]
    along = [np.corrcoef(seen[1:, i], seen[:-1, i])[0, 1] for i in range(30)]
    assert max(np.abs([*across, *along])) < 5 / np.sqrt(steps)
    sizes = seen.sum(1)
    assert sizes.var() == pytest.approx((rates * (1 - rates)).sum(), rel=0.1)
    assert [len(table.window(k)) for k in range(9)] == sizes[:9].tolist()
    more = poisson({"retain": 19}, {"retain": 0.25}, KEY, steps)  # one row more, and no other stream: the same draws
    kept = more.example < 18
    assert np.array_equal(more.example[kept], table.example[table.stream == 1])


def test_a_step_may_be_empty_and_still_counts() -> None:
    table = poisson({"forget": 2}, {"forget": 0.01}, KEY, 20)
    assert table.steps == 20 and [] in [table.window(k) for k in range(20)]
    assert poisson({"forget": 2}, {"forget": 1.0}, KEY, 2).window(1) == [(("forget", 0),), (("forget", 1),)]


def test_a_key_is_secret_or_of_the_seed() -> None:
    assert new_key(False, 0) != new_key(False, 0) and len(new_key(False, 0)) == 32
    assert new_key(True, 0) == new_key(True, 0) != new_key(True, 1)
    assert "hush" not in repr(Mechanism(Privacy(noise=1.0, delta=1e-3, clip=1.0), RATES, 1.0, 1, b"hush"))


# ----------------------------------------------------------------------------------------- nothing but the noise is read


@pytest.mark.parametrize("step_of", [lambda step: math.nan, lambda step: 4000.0 if step > 14 else 2.0, lambda step: 0.7])
def test_no_loss_ends_a_private_run(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, step_of: Callable[[int], float]
) -> None:
    """Losses that are not finite, explode, or never change: they are computed from the rows without noise."""
    backward = Clipped.backward

    def changed(self: Clipped, window: Any, terms: Any, factors: Any, step: int) -> dict[str, float]:
        return backward(self, window, terms, factors, step) | {"forget": step_of(step), "retain": step_of(step)}

    monkeypatch.setattr(Clipped, "backward", changed)
    outcome = train(private_job(noise=0.5, steps=25, lr=1e-3), adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert (outcome.status, outcome.step, outcome.kept, outcome.broken) == ("finished", 25, 25, False)
    assert ("not finite at step 1;" in capsys.readouterr().err) == math.isnan(step_of(1))


def test_the_noisy_gradient_may_end_a_private_run_which_then_claims_all_planned_steps(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end follows from what is private already. The gradient that ended it was read, though no step was taken."""
    backward = Clipped.backward

    def changed(self: Clipped, window: Any, terms: Any, factors: Any, step: int) -> dict[str, float]:
        found = backward(self, window, terms, factors, step)
        if step == 7:
            self.model.weights[0].grad = torch.full_like(self.model.weights[0], math.inf)
        return found

    monkeypatch.setattr(Clipped, "backward", changed)
    job = private_job(noise=0.5, steps=25, lr=1e-3)
    outcome = train(job, adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert job.private and outcome.broken and outcome.kept == 7 and "grad_norm not finite at step 8" in outcome.reason
    facts = secret.spent(job.noisy, tmp_path, outcome.kept, True)["privacy"]
    assert facts["epsilon"] == job.private.epsilon(25) > job.private.epsilon(8)
    assert (facts["steps"], facts["kept_step"]) == (25, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_row_whose_gradient_is_not_finite_counts_as_nothing(make_model: Callable[..., Any], value: float) -> None:
    job, model = private_job(), adapted(make_model, 0.1)
    here: Any = Rank(0, 1)
    here.distributed_type = DistributedType.NO
    assert job.private
    clipped = Clipped(job.private, model_of(job, model, make_model()), here, False)
    each = [torch.randn(3, *weight.shape) for weight in clipped.model.weights]
    with_it, without = ([torch.zeros_like(weight) for weight in clipped.model.weights] for _ in range(2))
    clipped._add(without, [one[[0, 2]] for one in each])
    each[1][1] = value
    clipped._add(with_it, each)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(with_it, without, strict=True))


@pytest.mark.parametrize("name", ["dampening", "influence", "sisa", "task_vector"])
def test_no_guarantee_is_claimed_where_weights_move_without_noise(tmp_path: Path, name: str) -> None:
    """An edit once wrote the ε of a training that never was."""
    method = PRIVATE[: PRIVATE.index("objective")] + PRIVATE[PRIVATE.index("train") :] + f"method: {{name: {name}}}\n"
    (tmp_path / "r.yaml").write_text(method)
    with pytest.raises(Refused, match=rf"train\.privacy: {name} moves weights outside of private steps"):
        recipe.load(tmp_path / "r.yaml")


# ------------------------------------------------------------------------------------------------------------- a run


def test_a_run_goes_on_where_it_was_bit_for_bit(make_model: Callable[..., Any], tmp_path: Path) -> None:
    job = private_job(noise=0.5, steps=6, checkpoint_every=2)
    straight, resumed = straight_and_resumed(job, lambda: adapted(make_model), tmp_path, 5)
    assert torch.equal(weights(straight), weights(resumed))
    assert log(tmp_path / "straight") == log(tmp_path / "cut")
    spent = [row["epsilon"] for row in log(tmp_path / "cut")]
    assert spent == sorted(spent) and job.private and spent[-1] == job.private.epsilon(6)


def test_empty_steps_move_the_weights_by_noise_alone(make_model: Callable[..., Any], tmp_path: Path) -> None:
    job = private_job(noise=0.5)
    nothing = dataclasses.replace(job, schedule=poisson(SIZES, dict.fromkeys(SIZES, 0.0), KEY, 3))
    assert moved_by(nothing, adapted(make_model), tmp_path).norm() > 1e-3
    assert all({"forget", "retain"}.isdisjoint(row) and row["tokens"] == 0 for row in log(tmp_path))


@pytest.mark.slow
@pytest.mark.two_processes("privacy")
def test_two_processes_train_as_one(make_model: Callable[..., Any], two_processes: Path) -> None:
    for name, make in processes_models(make_model).items():
        alone = moved_by(private_job(noise=0.01, optimizer="sgd"), make(), two_processes / name)
        shared = [torch.load(two_processes / f"{name}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(*shared)
        assert (shared[0] - alone).norm() <= 1e-4 * alone.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp_finetune", "noisy_finetune"])
def test_the_shipped_recipes_say_what_they_promise(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    steps = "train.steps=3" if name == "dp_finetune" else "method.noisy_steps=3"
    wanted = recipe.load(Path(f"recipes/{name}.yaml"), [f"output={tmp_path / 'run'}", "evaluation=null", "train.steps=4", steps])
    run(wanted, None, cache=cache)
    facts = json.loads((tmp_path / "run" / "privacy.json").read_text())
    told = capsys.readouterr().out
    assert facts["epsilon"] == pytest.approx(8, abs=0.1) and all(f"           {one}\n" in told for one in facts["assumptions"])
    assert not list((tmp_path / "run").rglob("*.key"))
    assert "noise" in plan(wanted, Path()).text or "σ" in plan(wanted, Path()).text


def test_the_key_is_kept_for_its_user_only(tmp_path: Path) -> None:
    job = private_job()
    key = secret.key_of(False, 0, tmp_path, resume=True)
    assert job.private and len(key) == 32 and secret.key_of(None, 0, tmp_path, resume=True) == b""
    secret.begin(dataclasses.replace(job.private, key=key), tmp_path)
    (kept,) = tmp_path.rglob("*.key")
    assert kept.stat().st_mode & 0o777 == 0o600 and kept.read_bytes() == key
    assert secret.key_of(False, 0, tmp_path, resume=True) == key != secret.key_of(False, 0, tmp_path, resume=False)


def processes_models(make_model: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    return {"lora": lambda: adapted(make_model, 0.1), "full": make_model}


# ----------------------------------------------------------------------------------------------------------- the account


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_account_is_that_of_opacus(accountant: Any) -> None:
    from opacus.accountants import create_accountant
    from opacus.accountants.utils import get_noise_multiplier

    asked = Privacy(epsilon=3.0, delta=1e-4, clip=1.0, accountant=accountant)
    mine = mechanism(asked, {"forget": 40, "retain": 160}, {"forget": 8, "retain": 16}, 50, KEY)
    assert mine.rates == {"forget": 0.2, "retain": 0.1} and mine.rate == 0.2 and mine.expected == 24
    theirs = create_accountant(accountant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on orders that could be tried
        sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-4, sample_rate=0.2, steps=50, accountant=accountant)
    for _ in range(20):
        theirs.step(noise_multiplier=sigma, sample_rate=0.2)
    assert mine.sigma == sigma
    assert mine.epsilon(20) == theirs.get_epsilon(delta=1e-4)
    assert mine.epsilon(0) == 0 < mine.epsilon(20) < mine.epsilon(50) <= 3.0
    assert mine.epsilon(50) > 2.95


def test_one_step_on_all_rows_is_a_gaussian_mechanism() -> None:
    """RDP of it is α / 2σ² (Mironov 2017): ε = min_α α / 2σ² + log((α−1)/α) − (log δ + log α)/(α−1) (Balle et al. 2020)."""
    asked = Privacy(noise=2.0, delta=1e-5, clip=1.0)
    mine = mechanism(asked, {"forget": 10}, {"forget": 16}, 1, KEY)
    alpha = np.linspace(1.01, 63, 100_000)
    exact = np.min(alpha / 8 + np.log((alpha - 1) / alpha) - (np.log(1e-5) + np.log(alpha)) / (alpha - 1))
    assert mine.rate == 1.0 and mine.epsilon(1) == pytest.approx(exact, rel=1e-3)


def test_prv_is_tighter_than_rdp() -> None:
    loose, tight = (
        mechanism(Privacy(noise=1.1, delta=1e-4, clip=1.0, accountant=name), {"forget": 100}, {"forget": 10}, 50, KEY)  # type: ignore[arg-type]
        for name in ("rdp", "prv")
    )
    assert 0.5 * loose.epsilon(50) < tight.epsilon(50) < loose.epsilon(50)


# ------------------------------------------------------------------------------------------------------------- refused

PRIVATE = RECIPE.replace("npo", "nll") + "train: {steps: 4, privacy: {noise: 1.0, delta: 1.0e-4, clip: 1.0}}\n"


@pytest.mark.parametrize(
    ("override", "place", "reason"),
    [
        ("train.privacy.epsilon=3", "train.privacy", "give epsilon, and the noise is found from it, or noise"),
        ("train.privacy.noise=null", "train.privacy", "give epsilon, and the noise is found from it, or noise"),
        ("train.rules=[{name: project}]", "train.rules", "reads gradients without noise"),
        ("train.stop={every: 2}", "train.stop", "where a run ends would tell of the rows"),
        ("data.overlap=drop", "data.overlap", "a row that leaves because of another tells of that one"),
        ("model.adapter={init: fila}", "model.adapter.init", "statistics of the rows, without noise"),
        ("objective.retain.budget={at_most: 1.0}", "objective.retain.budget", "true means of the loss"),
        ("objective.forget.loss={name: repnoise, layers: [0]}", "objective.forget.loss", "repnoise reads more than the row itself"),
        ("objective.forget.loss={name: dpo}", "objective.forget.loss", "dpo reads more than the row itself"),
        ("objective.forget.loss={name: lunar, layer: 1}", "objective.forget.loss", "lunar reads more than the row itself"),
    ],
)
def test_what_would_break_the_guarantee_is_refused(tmp_path: Path, override: str, place: str, reason: str) -> None:
    stands, said = refusal(tmp_path, PRIVATE, override)
    assert stands.train.privacy == Privacy(noise=1.0, delta=1e-4, clip=1.0) and f": {place}: " in said and reason in said


def test_layers_that_mix_examples_are_refused(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model)
    model.base_model.model.model.norm = nn.BatchNorm1d(32)
    with pytest.raises(Refused, match=r"train\.privacy: .*norm is a BatchNorm1d"):
        found(private_job(), 0, model, make_model())


def test_a_model_spread_over_processes_is_refused(make_model: Callable[..., Any]) -> None:
    job, model, here = private_job(), adapted(make_model), Rank(0, 2)
    here.distributed_type = DistributedType.FSDP  # type: ignore[attr-defined]
    assert job.private
    with pytest.raises(Refused, match=r"train\.privacy: the model is spread over processes \(FSDP\)"):
        Clipped(job.private, model_of(job, model, make_model()), here, False)  # type: ignore[arg-type]


def test_a_delta_under_which_rows_could_be_published_is_refused() -> None:
    asked = Privacy(noise=1.0, delta=0.01, clip=1.0)
    assert mechanism(asked, {"forget": 99}, {"forget": 9}, 1, KEY)
    with pytest.raises(Refused, match=r"train\.privacy\.delta: found 0\.01 for 100 rows"):
        mechanism(asked, {"forget": 40, "retain": 60}, {"forget": 9, "retain": 9}, 1, KEY)


def test_an_epsilon_that_no_noise_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opacus.accountants.utils.MAX_SIGMA", 100)  # its search goes on to a million
    asked = Privacy(epsilon=1e-9, delta=1e-5, clip=1.0)
    with pytest.raises(Refused, match=r"train\.privacy\.epsilon: no noise gives 1e-09 in 9 steps"):
        _ = mechanism(asked, {"forget": 10}, {"forget": 5}, 9, KEY).sigma


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    with pytest.raises(Refused, match=r"pip install 'llm-unlearn\[privacy\]'"):
        mechanism(Privacy(noise=1.0, delta=1e-3, clip=1.0), {"forget": 10}, {"forget": 5}, 1, KEY).epsilon(1)
