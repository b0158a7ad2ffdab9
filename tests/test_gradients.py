"""Rules on the whole step: each equation on plain numbers, then on a small model, whatever the cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import NPO_AND_NLL, adapted, job, log, moved_by, rules, straight_and_resumed, weights
from torch import Tensor, nn

from llm_unlearn.data.batch import lay_out
from llm_unlearn.models.load import trainable
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Budget, Term
from llm_unlearn.spec import Refused
from llm_unlearn.training.gradients import (
    AnyRule,
    Bilevel,
    Latent,
    Orthogonal,
    Project,
    Saliency,
    Sharpness,
    Tamper,
    TrustRegion,
    total,
)  # fmt: skip
from llm_unlearn.training.loop import Training, train
from llm_unlearn.training.vectors import dot, norm, plus
from llm_unlearn.training.window import Window, disturbance

RULES = ["project", "project_ema", "bilevel", "sharpness", "latent", "tamper", "saliency", "trust_region", "orthogonal"]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ----------------------------------------------------------------------------------------------- equations, on plain numbers

Slope = Callable[[list[Tensor]], list[Tensor]]


@dataclass
class Plain:
    """A step without a model: the gradient of each term is a function of the weights."""

    weights: list[nn.Parameter]
    slopes: Mapping[str, Slope]
    importances: Mapping[str, list[Tensor]] = field(default_factory=dict)
    directions: list[list[Tensor]] = field(default_factory=list)
    kl: Callable[[list[Tensor]], float] = lambda weights: 0.0
    memory: dict[str, list[Tensor]] = field(default_factory=dict)
    row: dict[str, float] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    forget: Mapping[str, Term] = field(default_factory=lambda: {"forget": Term(loss=NLL())})
    others: Mapping[str, Term] = field(default_factory=lambda: {"retain": Term(loss=NLL())})

    def gradient(self, terms: Mapping[str, Term], latent: Latent | None = None) -> list[Tensor]:
        self.asked.append((*terms, *([latent.name] if latent else [])))
        here = [weight.detach().clone() for weight in self.weights]
        found = [torch.zeros_like(one) for one in here]
        for name in terms:
            found = plus(found, self.slopes[name](here))
        return found

    def measured(self, terms: Mapping[str, Term]) -> dict[str, float]:
        return {name: self.kl([weight.detach() for weight in self.weights]) for name in terms}

    def importance(self, stream: str, rows: int) -> list[Tensor]:
        return self.importances[stream]

    def earlier(self) -> list[list[Tensor]]:
        return self.directions

    def note(self, name: str, value: float) -> None:
        self.row[name] = value


def plain(f: list[float], r: list[float], **more: Any) -> Plain:
    """Constant gradients; two weights, so that all of them count as one vector."""
    start = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(len(f) - 1))]
    return Plain(start, {"forget": lambda _: split(f), "retain": lambda _: split(r)}, **more)


def split(values: list[float]) -> list[Tensor]:
    return [torch.tensor(values[:1]), torch.tensor(values[1:])]


def flat(values: list[Any]) -> list[float]:
    return torch.cat([torch.as_tensor(one).detach().flatten() for one in values]).tolist()


def quadratic(matrix: Tensor, centre: Tensor) -> Slope:
    """The gradient H (θ − c) of ½ (θ − c)ᵀ H (θ − c), over all weights as one vector."""

    def slope(weights: list[Tensor]) -> list[Tensor]:
        whole = matrix @ (torch.cat([one.flatten() for one in weights]) - centre)
        return [one.view_as(weight) for one, weight in zip(whole.split([w.numel() for w in weights]), weights, strict=True)]

    return slope


def test_without_a_rule_it_is_the_sum() -> None:
    assert flat(total([], plain([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]))) == [5.0, 7.0, 9.0]


def test_project_takes_out_the_conflict_and_nothing_else() -> None:
    step = plain([1.0, -2.0, 0.0], [1.0, 1.0, 0.0])  # ⟨f, r⟩ = −1, ⟨r, r⟩ = 2: f′ = f + r/2
    found = total([Project()], step)
    assert flat(found) == pytest.approx([1.5 + 1, -1.5 + 1, 0.0])
    assert dot(plus(found, split([1.0, 1.0, 0.0]), -1), split([1.0, 1.0, 0.0])) == pytest.approx(0)
    assert step.row["cosine"] == pytest.approx(-1 / 10**0.5)
    assert flat(total([Project()], plain([1.0, 2.0, 0.0], [1.0, 1.0, 0.0]))) == [2.0, 3.0, 0.0]
    assert flat(total([Project()], plain([1.0, 2.0, 0.0], [0.0, 0.0, 0.0]))) == [1.0, 2.0, 0.0]


def test_project_compares_with_a_running_mean() -> None:
    rule, step = Project(ema=0.75), plain([0.0, -1.0, 0.0], [4.0, 0.0, 0.0])
    assert flat(total([rule], step)) == [4.0, -1.0, 0.0]  # the first r is the mean: no conflict
    step.slopes = {"forget": lambda _: split([0.0, -1.0, 0.0]), "retain": lambda _: split([0.0, 4.0, 0.0])}
    found = total([rule], step)  # r̄ = ¾ (4, 0, 0) + ¼ (0, 4, 0) = (3, 1, 0); ⟨f, r̄⟩ = −1, ⟨r̄, r̄⟩ = 10; r itself is added
    assert flat(step.memory["project.mean"]) == [3.0, 1.0, 0.0]
    assert flat(found) == pytest.approx([0.3, -1 + 0.1 + 4, 0.0])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_bilevel_makes_its_share_of_f_whatever_r_is(gamma: float) -> None:
    f = [1.0, -2.0, 2.0]
    for r in ([3.0, 1.0, 0.0], [-9.0, 1.0, 4.0], [0.0, 0.0, 0.0]):
        found = total([Bilevel(gamma=gamma)], plain(f, r))
        assert dot(found, split(f)) == pytest.approx(gamma * 9)
    assert flat(total([Bilevel()], plain([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]))) == [1.0, 2.0, 3.0]


def test_sharpness_is_the_gradient_further_up_and_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    h, centre, start = torch.randn(5, 5), torch.randn(5), torch.randn(5)
    step = Plain([nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())], {"forget": quadratic(h, centre)})
    step.slopes = {**step.slopes, "retain": lambda w: [one * 0 + 7 for one in w]}
    before = [weight.detach().clone() for weight in step.weights]
    found = total([Sharpness(rho=0.3)], step)
    first = h @ (start - centre)
    exact = h @ (start + 0.3 * first / first.norm() - centre) + 7
    assert torch.allclose(torch.tensor(flat(found)), exact, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, step.weights, strict=True))
    assert step.asked == [("forget",), ("forget",), ("retain",)]  # r is not taken twice


def test_sharpness_where_there_is_no_slope() -> None:
    assert flat(total([Sharpness()], plain([0.0, 0.0], [1.0, 2.0]))) == [1.0, 2.0]


def test_saliency_frees_the_salient_share_and_what_has_no_importance() -> None:
    f, r = torch.arange(1.0, 101), torch.ones(100)
    for quantile, free in ((0.0, 100), (0.25, 76), (0.5, 51), (0.9, 11)):  # 1 + 99 quantile is the first that is free
        step = plain([1.0] * 101, [1.0] * 101)
        step.importances = {"forget": [torch.zeros(1), f], "retain": [torch.ones(1), r]}
        rule = Saliency(quantile=quantile)
        rule.begin(step)
        found = total([rule], step)
        assert flat(found[:1]) == [2.0]  # without any importance
        assert flat(found[1:]) == [0.0] * (100 - free) + [2.0] * free


def test_saliency_weighs_forget_against_retain() -> None:
    step = plain([1.0] * 5, [1.0] * 5)
    step.importances = {
        "forget": [torch.tensor([4.0]), torch.tensor([4.0, 1.0, 0.0, 0.0])],
        "retain": [torch.tensor([4.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])],
    }
    rule = Saliency(quantile=0.75)
    rule.begin(step)  # ratios ≈ 1, 4, ¼, 0, and 0 where nothing matters: not a number would free it
    assert flat(total([rule], step)) == [2.0, 2.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("by", [0.01, 0.5, 30.0])
def test_trust_region_keeps_the_distance(by: float) -> None:
    step, rule = plain([0.0] * 3, [0.0] * 3), TrustRegion(distance=0.5)
    rule.begin(step)
    for _ in range(5):
        before = [weight.detach().clone() for weight in step.weights]
        for weight in step.weights:
            weight.data += by
        rule.after(step, before)
        far = norm([weight.detach() for weight in step.weights])
        assert far <= 0.5 * (1 + 1e-6) and step.row["distance"] == pytest.approx(far, rel=1e-5)
    assert far == pytest.approx(min(0.5, 5 * by * 3**0.5))


@pytest.mark.parametrize(
    ("bound", "share"), [(1.0, 1.0), (0.4, 0.5), (0.3, 0.5), (0.2, 0.25), (0.07, 0.125), (0.05, 0.0), (1e-9, 0.0)]
)
def test_trust_region_halves_a_step_and_drops_it_in_the_end(bound: float, share: float) -> None:
    step = plain([0.0] * 3, [0.0] * 3, kl=lambda w: float((torch.cat([one.flatten() for one in w]) - 1).norm()) / 3**0.5 / 2)
    for weight in step.weights:
        weight.data += 1  # where the KL is 0; a step to 2 has a KL of ½, half of it of ¼
    before = [weight.detach().clone() for weight in step.weights]
    for weight in step.weights:
        weight.data += 1
    TrustRegion(kl=bound, halvings=3).after(step, before)
    assert step.row["step_share"] == share and step.row["trust_region.kl"] == pytest.approx(share / 2)
    assert flat(step.weights) == [1 + share] * 3


def test_trust_region_does_not_take_a_step_to_what_is_not_a_number() -> None:
    step = plain([0.0] * 2, [0.0] * 2, kl=lambda w: float(w[0][0]))
    for weight in step.weights:
        weight.data += float("nan")
    TrustRegion(kl=0.1).after(step, split([0.0, 0.0]))
    assert flat(step.weights) == [0.0, 0.0] and step.row["step_share"] == 0


def test_tamper_is_the_loop_written_by_hand() -> None:
    torch.manual_seed(1)
    h, attack, c, d, start = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), torch.randn(4), torch.randn(4)
    step = Plain([nn.Parameter(start[:1].clone()), nn.Parameter(start[1:].clone())], {"forget": quadratic(h, c)})
    step.slopes = {**step.slopes, "tamper.attack": quadratic(attack, d), "retain": lambda w: [one * 0 for one in w]}
    before = [weight.detach().clone() for weight in step.weights]
    found = total([Tamper(steps=3, lr=0.2, weight=0.6)], step)
    theta, exact = start.clone(), h @ (start - c)
    for _ in range(3):
        towards = attack @ (theta - d)
        theta = theta - 0.2 * towards / towards.norm()
        exact = exact + 0.6 / 3 * (h @ (theta - c))
    assert torch.allclose(torch.tensor(flat(found)), exact, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, step.weights, strict=True))


def test_orthogonal_is_the_gradient_of_its_penalty() -> None:
    torch.manual_seed(2)
    a, other = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))
    earlier = [torch.randn(2, 6), torch.randn(8, 6)]
    step = Plain([a, other], {name: lambda w: [one * 0 for one in w] for name in ("forget", "retain")}, directions=[earlier, []])
    found = total([Orthogonal(adapters=("x", "y"), weight=0.3)], step)
    penalty = 0.3 * torch.stack([((one @ a.T) ** 2).sum() for one in earlier]).sum()
    penalty.backward()
    assert torch.allclose(found[0], a.grad, atol=1e-5) and not found[1].any()  # type: ignore[arg-type]
    assert step.row["overlap"] == pytest.approx(penalty.item(), rel=1e-5)


def test_the_order_of_rules_is_theirs_not_the_recipe_s() -> None:
    """latent and sharpness say how f is taken, then project, then what is added, and the mask lies on all of it."""

    def step() -> Plain:
        made = plain([1.0, -2.0, 0.0], [1.0, 1.0, 0.0])
        made.slopes = {**made.slopes, "tamper.attack": lambda _: split([0.0, 0.0, 1.0])}
        made.importances = {"forget": split([1.0, 9.0, 9.0]), "retain": split([1.0, 1.0, 1.0])}
        made.directions = [[], []]
        return made

    every: list[AnyRule] = [Saliency(quantile=0.5), Orthogonal(adapters=("x",)), Tamper(steps=1, weight=2.0), Project()]
    every += [Sharpness(), Latent()]
    for order in (every, every[::-1]):
        one = step()
        next(rule for rule in order if isinstance(rule, Saliency)).begin(one)
        found = total(order, one)
        # f′ = (1.5, −1.5, 0), + r = (2.5, −.5, 0), + 2 f = (4.5, −4.5, 0), masked
        assert flat(found) == pytest.approx([0.0, -4.5, 0.0])
        first = ("forget", "latent")
        assert one.asked == [first, first, ("retain",), ("tamper.attack",), ("forget",)]


# ------------------------------------------------------------------------------------------------------- on a small model


def a_model(make_model: Callable[..., Any], adapter: bool) -> Any:
    return adapted(make_model) if adapter else make_model()


def a_job(name: str, folder: Path, make_model: Callable[..., Any], **settings: Any) -> Any:
    """SGD, so that what is compared is the gradient and not its sign."""
    defaults = {"optimizer": "sgd", "lr": 0.05, "schedule": "constant", "terms": NPO_AND_NLL}
    return job(**(defaults | {"steps": 3, "rules": rules(name, folder, make_model)} | settings))


def cases() -> list[Any]:
    both = [(name, adapter) for name in RULES for adapter in (True, False) if adapter or name != "orthogonal"]
    return [pytest.param(name, adapter, id=f"{name}-{'lora' if adapter else 'full'}") for name, adapter in both]


@pytest.mark.parametrize(("name", "adapter"), cases())
def test_micro_batches_do_not_change_a_rule(make_model: Callable[..., Any], tmp_path: Path, name: str, adapter: bool) -> None:
    found = {}
    for batch_tokens in (10**6, 60):
        wanted = a_job(name, tmp_path, make_model, batch_tokens=batch_tokens)
        found[batch_tokens] = moved_by(wanted, a_model(make_model, adapter), tmp_path / str(batch_tokens))
    whole, cut = found.values()
    assert whole.norm() > 1e-3 and float((whole - cut).norm() / whole.norm()) < 1e-4
    rows = [log(tmp_path / str(batch_tokens)) for batch_tokens in found]
    for one, other in zip(*rows, strict=True):
        assert list(one)[:2] == ["step", "lr"] and one == pytest.approx(other, rel=1e-3, abs=1e-6)
    without = moved_by(a_job(name, tmp_path, make_model, rules=()), a_model(make_model, adapter), tmp_path / "without")
    assert float((whole - without).norm() / without.norm()) > 1e-3, "the rule did nothing"


@pytest.mark.parametrize("name", [name for name in RULES if name != "saliency"])
def test_checkpointed_activations_do_not_change_a_rule(make_model: Callable[..., Any], tmp_path: Path, name: str) -> None:
    found = []
    for checkpointing in (False, True):
        wanted = a_job(name, tmp_path, make_model, steps=2, gradient_checkpointing=checkpointing)
        found.append(moved_by(wanted, a_model(make_model, True), tmp_path / str(checkpointing)))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_rules_work_in_bf16(make_model: Callable[..., Any], tmp_path: Path, name: str, adapter: bool) -> None:
    """A bf16 base under an fp32 adapter, or fp32 weights, both computed in bf16: near what fp32 gives."""
    if name == "orthogonal" and not adapter:
        return
    wanted = a_job(name, tmp_path, make_model, steps=2)
    exact = moved_by(wanted, a_model(make_model, adapter), tmp_path / "exact")
    model = adapted(lambda: make_model().to(torch.bfloat16)) if adapter else make_model()
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    found = moved_by(wanted, model, tmp_path / "bf16", Accelerator(cpu=True, mixed_precision="bf16"))
    assert found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
    assert cosine > (0.8 if name in ("saliency", "trust_region") else 0.97), float(cosine)  # which draw a line somewhere


@pytest.mark.parametrize("name", ["project_ema", "saliency", "trust_region", "budget"])
def test_resume_gives_the_same_bits(make_model: Callable[..., Any], tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"steps": 6, "checkpoint_every": 3, "optimizer": "adamw", "lr": 1e-2}
    if name == "budget":
        terms = {**NPO_AND_NLL, "retain": Term(loss=NLL(), weight=1.5, budget=Budget(at_most=5.0, rate=0.2))}
        wanted = job(terms=terms, **settings)
    else:
        wanted = a_job(name, tmp_path, make_model, **settings)
    straight, resumed = straight_and_resumed(wanted, lambda: a_model(make_model, True), tmp_path, at=5)
    assert torch.equal(weights(resumed), weights(straight))
    assert log(tmp_path / "cut") == log(tmp_path / "straight")


def test_names_of_earlier_adapters_are_those_of_this_one(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Of adapters as peft really saves them, one of them inside a run folder."""
    wanted = a_job("orthogonal", tmp_path, make_model)
    (tmp_path / "run").mkdir()
    (tmp_path / "earlier1").rename(tmp_path / "run" / "adapter")
    paths = (str(tmp_path / "run"), str(tmp_path / "earlier2"))
    model = adapted(make_model)
    training = Training(job(rules=(Orthogonal(adapters=paths),)), model, Accelerator(cpu=True))
    names = list(trainable(model))
    for name, found in zip(names, training.earlier(), strict=True):
        assert [one.shape[0] for one in found] == ([2, 4] if "lora_A" in name else [])
    assert sum("lora_A" in name for name in names) == 14
    kept = moved_by(a_job("orthogonal", tmp_path, make_model, rules=(Orthogonal(adapters=paths),)), model, tmp_path / "x")
    assert kept.norm() > 0 and log(tmp_path / "x")[-1]["overlap"] < log(tmp_path / "x")[0]["overlap"]
    assert wanted.settings.rules[0].name == "orthogonal"


def test_an_adapter_of_another_model_is_refused_before_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    wanted = a_job("orthogonal", tmp_path, lambda: make_model(hidden_size=64))
    with pytest.raises(Refused, match=r"orthogonal: .*earlier1 adapts no layer that is trained here, or one of another model"):
        train(wanted, adapted(make_model), Accelerator(cpu=True), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"adapter_model\.safetensors: weights that cannot be read"):
        train(job(rules=(Orthogonal(adapters=(str(tmp_path / "empty"),)),)), adapted(make_model), Accelerator(cpu=True), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_latent_layer_that_is_not_there_is_refused_before_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="layer 8 is not there: the decoder layers of this model are 0 to 1"):
        train(job(rules=(Latent(),)), adapted(make_model), Accelerator(cpu=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layer", [0, 1])
def test_the_adversary_brings_the_answers_back_within_its_bound(make_model: Callable[..., Any], layer: int) -> None:
    model, rule = adapted(make_model, 0.2), Latent(layer=layer, epsilon=0.5, iterations=8)
    training = Training(job(rules=(rule,)), model, Accelerator(cpu=True))
    window = Window(training.job, 0, training.accelerator)
    (part,) = window.parts(training.forget)
    batch = part.batch and part.batch.only({"forget"})
    assert batch is not None
    _, delta = disturbance(training.model, batch, rule)
    lengths = delta.norm(dim=-1)
    assert lengths.max() <= 0.5 * (1 + 1e-5) and lengths.max() > 0.49
    nll = {"forget": Term(loss=NLL())}
    calm = window.backward(nll, {"forget": 1.0}, training.model)["forget"]
    disturbed = window.backward(nll, {"forget": 1.0}, training.model, rule)["forget"]
    weak = window.backward(nll, {"forget": 1.0}, training.model, Latent(layer=layer, epsilon=0.5, iterations=1))["forget"]
    assert disturbed < weak < calm - 0.05
    found = []
    for b, example in enumerate(batch.examples):  # a row alone finds the δ that it found among others
        _, mine = disturbance(training.model, lay_out([example]), rule)
        found.append(float((mine[0] - delta[b, : mine.shape[1]]).norm() / mine.norm()))
    assert max(found) < 1e-3


@pytest.mark.slow
@pytest.mark.two_processes("rules")
def test_two_processes_do_not_change_a_rule(make_model: Callable[..., Any], two_processes: Path) -> None:
    """`processes.py` trains with every rule in turn, with adapters and with full weights; here alone."""
    for case in cases():
        name, adapter = case.values
        here = two_processes / f"{case.id}-alone"
        alone = moved_by(a_job(name, two_processes, make_model), a_model(make_model, adapter), here)
        shared = torch.load(two_processes / f"{case.id}.pt")
        assert float((alone - shared).norm() / alone.norm()) < 1e-3, case.id
        for one, other in zip(log(here), log(two_processes / str(case.id)), strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5), case.id
