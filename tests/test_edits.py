"""Methods that edit weights once: each equation against a reference of its own, the Newton step against true retraining, and the
strength that the dose allows."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import RECIPE, adapted, away, job, rows, weights
from torch import Tensor

from llm_unlearn import recipe
from llm_unlearn.data.examples import Example
from llm_unlearn.methods.dampening import Dampening, FisherNoise
from llm_unlearn.methods.influence import Influence, conjugate
from llm_unlearn.methods.registry import Edit
from llm_unlearn.methods.task_vector import TaskVector
from llm_unlearn.models.load import trainable
from llm_unlearn.models.trainable_weights import choose_weights
from llm_unlearn.plan import plan
from llm_unlearn.spec import Refused
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.edits import Editing, edit
from llm_unlearn.training.guard import Outcome
from llm_unlearn.training.vectors import plus, put

FREE = Harm(retain_perplexity=None)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def edited(method: Edit, model: Any, folder: Path, accelerator: Accelerator | None = None, **settings: Any) -> Outcome:
    found, _, _ = edit(method, job(terms=method.terms, **settings), model, accelerator or Accelerator(cpu=True), folder)
    return found


def editing(method: Edit, model: Any, folder: Path, examples: Any = None) -> Editing:
    wanted = job(terms=method.terms)
    return Editing(method, replace(wanted, examples=examples or wanted.examples), model, Accelerator(cpu=True), folder, False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def nll(model: Any, example: Example) -> Tensor:
    """By definition: −Σ_t log p(y_t)."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1].double()
    total: Tensor = -logits.log_softmax(-1).gather(-1, torch.tensor(example.ids[example.answer :])[:, None]).sum()
    return total


def mean_of(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(one).sum(0) / len(parts) for one in zip(*parts, strict=True)]


def near(found: Sequence[Tensor], exact: Sequence[Tensor], share: float) -> bool:
    """‖found − exact‖ ≤ share · ‖exact‖"""
    a, b = (torch.cat([one.detach().double().flatten() for one in side]) for side in (found, exact))
    return float((a - b).norm()) <= share * float(b.norm()) and float(b.norm()) > 0


# --------------------------------------------------------------------------------------------------- what a method asks


def test_gradients_are_means_over_answers(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    situation = editing(Influence(), model, tmp_path)
    per_row = [torch.autograd.grad(nll(model, one), situation.theta) for one in situation.job.examples["forget"]]
    assert near(situation.gradient("forget"), mean_of(per_row), 1e-5)
    vector = [torch.randn_like(one) for one in situation.theta]
    exact = [sum(float((a * b).sum()) for a, b in zip(one, vector, strict=True)) for one in per_row]
    assert situation.products("forget", vector) == pytest.approx(exact, rel=1e-4, abs=1e-3)


def test_curvature_is_that_of_the_gauss_newton_matrix(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Jᵀ (diag p − p pᵀ) J v with J v from finite differences of the logits in float64."""
    model, twin = make_model(), make_model().double()
    situation = editing(Influence(curvature="cg"), model, tmp_path)
    torch.manual_seed(0)
    vector = [torch.randn_like(one) for one in situation.theta]
    theta, exact = list(twin.parameters()), []
    start, size = [one.detach().clone() for one in theta], 1e-5
    along = [one.double() for one in vector]

    def logits(example: Example) -> Tensor:
        found: Tensor = twin(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]
        return found

    for example in situation.job.examples["retain"]:
        sides = []
        for sign in (1, -1):
            put(theta, plus(start, along, sign * size))
            with torch.no_grad():
                sides.append(logits(example))
        put(theta, start)
        z, moved = logits(example), (sides[0] - sides[1]) / (2 * size)
        p = z.detach().softmax(-1)
        exact.append(torch.autograd.grad((z * (p * moved - p * (p * moved).sum(-1, keepdim=True))).sum(), theta))
    assert near(situation.curved("retain", 100, vector), mean_of(exact), 1e-3)


def test_conjugate_gradients_solve() -> None:
    torch.manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64)
    a, b = root @ root.T + torch.eye(30), torch.randn(30, dtype=torch.float64)
    (x,), residual = conjugate(lambda v: [a @ v[0]], [b], 200, 1e-10)
    assert torch.allclose(x, torch.linalg.solve(a, b), atol=1e-6) and residual <= 1e-10
    assert conjugate(lambda v: [a @ v[0]], [b], 3)[1] > 1e-3, "three steps are not enough for thirty directions"


# ----------------------------------------------------------------------------------- influence against true retraining

VOCABULARY, RIDGE = 32, 0.5


class Convex:
    """A tiny model of which only the output head is trained, so that its loss is convex: Σ_i ℓ_i + (κ/2)‖W‖², to convergence in
    float64 on the hidden states. 32 × 16 = 512 weights, 8 rows to forget and 60 to keep."""

    def __init__(self, make_model: Callable[..., Any]) -> None:
        self.model = make_model(vocabulary=VOCABULARY, hidden_size=16)
        self.examples = {name: self.small(rows(name, n, seed)) for name, n, seed in (("forget", 8, 1), ("retain", 60, 2))}
        choose_weights(self.model, ("lm_head",))
        self.optimum = self.train([*self.examples["forget"], *self.examples["retain"]])
        put(list(trainable(self.model).values()), [self.optimum.float()])

    @staticmethod
    def small(examples: Sequence[Example]) -> list[Example]:
        return [replace(one, ids=tuple(4 + i % (VOCABULARY - 4) for i in one.ids)) for one in examples]

    def states(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(N, D), (N,) at answer positions."""
        with torch.no_grad():
            found = [
                self.model.model(input_ids=torch.tensor([one.ids])).last_hidden_state[0, one.answer - 1 : -1] for one in examples
            ]
        targets = [torch.tensor(one.ids[one.answer :]) for one in examples]
        return torch.cat(found).double(), torch.cat(targets)

    def loss(self, weight: Tensor, examples: Sequence[Example]) -> Tensor:
        states, targets = self.states(examples)
        return -(states @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).sum()

    def train(self, examples: Sequence[Example]) -> Tensor:
        """(V, D) the minimum, by Newton's method with the whole Hessian."""
        states, targets = self.states(examples)
        chosen = torch.nn.functional.one_hot(targets, VOCABULARY).double()
        weight = torch.zeros(VOCABULARY, states.shape[1], dtype=torch.float64)
        for _ in range(30):
            p = (states @ weight.T).softmax(-1)
            slope = (p - chosen).T @ states + RIDGE * weight
            if float(slope.norm()) < 1e-9:
                return weight
            weight = weight - torch.linalg.solve(self.hessian(weight, states), slope.flatten()).view_as(weight)
        raise AssertionError(f"not at the minimum: slope {float(slope.norm())}")

    @staticmethod
    def hessian(weight: Tensor, states: Tensor, ridge: float = RIDGE) -> Tensor:
        """(V·D, V·D) Σ_t (diag p − p pᵀ) ⊗ h hᵀ + κ"""
        (v, d), p = weight.shape, (states @ weight.T).softmax(-1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        outer = states[:, :, None] * states[:, None, :]
        whole = (inner.flatten(1).T @ outer.flatten(1)).view(v, v, d, d).permute(0, 2, 1, 3).reshape(v * d, v * d)
        return whole + ridge * torch.eye(v * d)

    def without(self, folder: Path, **settings: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        """The weights after the edit, and the influences."""
        method = Influence(damping=RIDGE / len(self.examples["retain"]), scale=(1.0,), rows=100, **settings)
        wanted = replace(job(terms=method.terms), examples=self.examples)
        outcome, influences, _ = edit(method, wanted, self.model, Accelerator(cpu=True), folder)
        assert outcome == Outcome("finished", 1, 1)
        return weights(self.model).double().view_as(self.optimum), influences


def test_the_newton_step_comes_near_to_the_true_retrain(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Stated tolerance, with 8 of 68 rows taken out: at most 15 % of the way remains in the weights (10.4 % seen), and 10 % of the
    rise of the forget set's loss."""
    convex = Convex(make_model)
    retrained = convex.train(convex.examples["retain"])
    found, _ = convex.without(tmp_path, curvature="cg", iterations=300)
    assert lines(tmp_path)[0]["residual"] <= 1e-3
    assert float((found - retrained).norm()) <= 0.15 * float((convex.optimum - retrained).norm())
    before, after, aim = (float(convex.loss(one, convex.examples["forget"])) for one in (convex.optimum, found, retrained))
    assert aim > 1.05 * before and abs(after - aim) <= 0.1 * (aim - before)


def test_the_error_of_the_step_is_of_second_order(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Half as many rows taken out leave about a quarter of the error."""
    errors = []
    for count in (8, 4):
        convex = Convex(make_model)
        forget = convex.examples["forget"]
        convex.examples = {
            "forget": forget[:count],
            "retain": [*convex.examples["retain"], *(replace(one, stream="retain") for one in forget[count:])],
        }
        found, _ = convex.without(tmp_path / str(count), curvature="cg", iterations=300)
        errors.append(float((found - convex.train(convex.examples["retain"])).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_influences_say_what_leaving_out_a_row_does(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Each of the first rows of both sets is truly left out."""
    convex = Convex(make_model)
    forget, retain = convex.examples["forget"], convex.examples["retain"]
    before = float(convex.loss(convex.optimum, forget))
    _, influences = convex.without(tmp_path, curvature="cg", iterations=300, scores=True)
    said = {(one["stream"], one["row"]): one["influence"] for one in influences}
    assert len(said) == len(forget) + len(retain)
    exact, found = [], []
    for one in (*forget[:4], *retain[:4]):
        rest = [other for other in (*forget, *retain) if other is not one]
        exact.append((float(convex.loss(convex.train(rest), forget)) - before) / len(forget))
        found.append(said[one.stream, one.id])
    assert torch.corrcoef(torch.tensor([exact, found]))[0, 1] > 0.95
    assert min(exact[:4]) > max(0.0, *exact[4:]) and min(found[:4]) > max(0.0, *found[4:]), "forget rows hold up the forget set"


def test_ekfac_counts_curvature_per_answer(make_model: Callable[..., Any]) -> None:
    """The sum of all eigenvalues is the trace, whatever the eigenvectors; what remains is that labels are sampled."""
    pytest.importorskip("kronfluence")
    from llm_unlearn.training.ekfac import ekfac

    convex = Convex(make_model)
    retain = convex.examples["retain"]
    factors = ekfac(convex.model, retain, 0, Accelerator(cpu=True))
    trace = float(convex.hessian(convex.optimum, convex.states(retain)[0], 0.0).trace()) / len(retain)
    assert float(factors.values["lm_head"].sum()) == pytest.approx(trace, rel=0.1)


def test_ekfac_comes_nearer_than_no_step(make_model: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("kronfluence")
    convex = Convex(make_model)
    retrained = convex.train(convex.examples["retain"])
    found, _ = convex.without(tmp_path, curvature="ekfac")
    assert float((found - retrained).norm()) <= 0.5 * float((convex.optimum - retrained).norm())
    assert all(type(layer).__module__.startswith(("torch", "transformers")) for layer in convex.model.modules())


def test_ekfac_factors_solve_as_the_whole_matrix_would() -> None:
    pytest.importorskip("kronfluence")
    from llm_unlearn.training.ekfac import Factors

    torch.manual_seed(0)
    q_a, q_g = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 3))
    values, v, bias = (
        torch.rand(3, 4, dtype=torch.float64),
        torch.randn(3, 3, dtype=torch.float64),
        torch.randn(3, dtype=torch.float64),
    )
    layer = torch.nn.Linear(3, 3).double()
    factors = Factors({"x": q_a}, {"x": q_g}, {"x": values})
    found = factors.solve({"x.weight": layer.weight, "x.bias": layer.bias}, [v, bias], 0.1)  # type: ignore[dict-item]
    q = torch.kron(q_g, q_a)
    whole = q @ torch.diag(values.flatten()) @ q.T + 0.1 * torch.eye(12)
    exact = torch.linalg.solve(whole, torch.cat([v, bias[:, None]], 1).flatten()).view(3, 4)
    assert torch.allclose(found[0], exact[:, :3]) and torch.allclose(found[1], exact[:, 3])


# ------------------------------------------------------------------------------------------------------- other equations


def test_diagonal_influence_divides_by_the_fisher_information(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    edited(Influence(damping=0.3, scale=(0.7,)), model, tmp_path)
    f, r = (
        [torch.autograd.grad(nll(other, one), list(other.parameters())) for one in examples]
        for examples in (rows("forget", 8, 1), rows("retain", 10, 2))
    )
    squares = mean_of([[slope**2 for slope in one] for one in r])
    exact = [0.7 * 8 / 10 * g / (h + 0.3) for g, h in zip(mean_of(f), squares, strict=True)]
    moved = [a.detach() - b.detach() for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert near(moved, exact, 1e-3)


def test_dampening_shrinks_what_matters_more_to_the_forget_set(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    edited(Dampening(alpha=(1.5,), damping=0.8), model, tmp_path)
    f, r = (
        mean_of([[slope**2 for slope in torch.autograd.grad(nll(other, one), list(other.parameters()))] for one in examples])
        for examples in (rows("forget", 8, 1), rows("retain", 10, 2))
    )
    chosen = total = 0
    for new, old, a, b in zip(model.parameters(), other.parameters(), f, r, strict=True):
        every = (8 * a + 10 * b) / 18
        mine = a > 1.5 * every
        sure = (a - 1.5 * every).abs() > 1e-4 * a  # rounding may decide what stands on the edge
        exact = torch.where(mine, old * (0.8 * every / a).clamp(max=1), old)
        assert torch.allclose(new[sure], exact[sure].to(new), rtol=1e-3, atol=1e-7)
        chosen, total = chosen + int(mine.sum()), total + mine.numel()
    assert 0.01 < chosen / total < 0.9 and lines(tmp_path)[1]["dampened"] == pytest.approx(chosen / total, rel=1e-3)


def test_fisher_noise_is_large_where_the_retain_set_does_not_look(make_model: Callable[..., Any], tmp_path: Path) -> None:
    runs = [make_model() for _ in range(2)]
    for k, model in enumerate(runs):
        edited(FisherNoise(scale=(1e-3,), floor=1e-3), model, tmp_path / str(k))
    assert torch.equal(weights(runs[0]), weights(runs[1])), "the seed alone draws it"
    fresh = make_model()
    square = mean_of(
        [[s**2 for s in torch.autograd.grad(nll(fresh, one), list(fresh.parameters()))] for one in rows("retain", 10, 2)]
    )
    flat = torch.cat([one.flatten() for one in square])
    level = (flat / (flat.sum() / len(flat))).clamp(min=1e-3)
    xi = (weights(runs[0]) - weights(fresh)).double() / 1e-3 * level**0.25
    assert float(xi.std()) == pytest.approx(1, abs=0.02) and abs(float(xi.sum() / len(xi))) < 0.02
    for few in (level <= level.median(), level > level.median()):
        assert float(xi[few].std()) == pytest.approx(1, abs=0.03)


def test_a_negated_adapter_does_the_opposite(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """B A of each layer is −α times that of the fine-tuned adapter, exactly."""
    model, tuned = adapted(make_model), adapted(make_model)
    edited(TaskVector(scale=(0.6,)), model, tmp_path / "edit")
    situation = editing(TaskVector(), tuned, tmp_path / "tune")
    situation.train()
    names = [name for name in trainable(model) if ".lora_A." in name]
    for name in names:
        b = name.replace(".lora_A.", ".lora_B.")
        (here, there) = (trainable(one)[b].detach() @ trainable(one)[name].detach() for one in (model, tuned))
        assert float(there.norm()) > 0 and torch.allclose(here, -0.6 * there, rtol=1e-5, atol=1e-8)
    assert names


def test_a_task_vector_of_full_weights_goes_the_other_way(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, tuned, fresh = make_model(), make_model(), make_model()
    edited(TaskVector(scale=(0.6,)), model, tmp_path / "edit", lr=1e-3)
    situation = Editing(
        TaskVector(), job(terms=TaskVector().terms, lr=1e-3), tuned, Accelerator(cpu=True), tmp_path / "tune", False
    )
    situation.train()
    exact = weights(fresh) - 0.6 * (weights(tuned) - weights(fresh))
    assert torch.allclose(weights(model), exact, atol=1e-6) and not torch.equal(weights(tuned), weights(fresh))
    with torch.no_grad():
        told = [float(sum(nll(one, example) for example in rows("forget", 8, 1))) for one in (tuned, fresh, model)]
    assert told[0] < told[1] < told[2]


# ------------------------------------------------------------------------------------------------------------- the dose


def stop(**settings: Any) -> Stop:
    return Stop(**({"budget": FREE, "rows": 8} | settings))


def test_the_strength_nearest_to_the_aim_is_taken(make_model: Callable[..., Any], tmp_path: Path) -> None:
    method = Influence(scale=(0.01, 0.02, 0.04, 0.08), damping=1.0)
    looked = make_model()
    edited(method, looked, tmp_path / "all", stop=stop(until=1e9), aim=1e9)
    seen = lines(tmp_path / "all")
    assert [row.get("scale") for row in seen] == [None, 0.01, 0.02, 0.04, 0.08] and seen[0]["curvature"] > 0
    assert all(b["forget_perplexity"] > a["forget_perplexity"] for a, b in itertools.pairwise(seen))
    aim = seen[2]["forget_perplexity"] * 1.0001
    model, alone = make_model(), make_model()
    found = edited(method, model, tmp_path / "aim", stop=stop(until=aim), aim=aim)
    assert (found.status, found.step, found.kept) == ("finished", 4, 2) and found.reason.startswith("scale 0.02 was taken")
    edited(replace(method, scale=(0.02,)), alone, tmp_path / "alone")
    assert torch.equal(weights(model), weights(alone))


def test_beyond_the_budget_the_model_stays_as_it_was(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, fresh = make_model(), make_model()
    tight = stop(until=1e9, budget=Harm(retain_perplexity=1e-6))
    found = edited(FisherNoise(scale=(0.1, 0.2)), model, tmp_path, stop=tight, aim=1e9)
    assert found.kept == 0 and found.reason.startswith("no scale was within the budget")
    assert torch.equal(weights(model), weights(fresh)) and len(lines(tmp_path)) == 3


def test_nothing_is_done_where_nothing_is_left_to_forget(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, fresh = make_model(), make_model()
    found = edited(TaskVector(), model, tmp_path, stop=stop(until=1.5), aim=1.5)
    assert (found.step, found.kept) == (0, 0) and found.reason.startswith("nothing is left to forget")
    assert torch.equal(weights(model), weights(fresh))


def test_weights_that_are_not_finite_are_never_taken(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    found = edited(FisherNoise(scale=(1e-3, 1e30)), model, tmp_path / "dose", stop=stop(until=1e30), aim=1e30)
    assert found.kept == 1 and lines(tmp_path / "dose")[2]["distance"] in ("inf", "nan")
    assert all(bool(one.isfinite().all()) for one in model.parameters())
    model, fresh = make_model(), make_model()
    found = edited(FisherNoise(scale=(1e30,)), model, tmp_path / "alone")
    assert found.broken and found.status == "stopped" and torch.equal(weights(model), weights(fresh))


def test_a_training_that_is_stopped_ends_the_edit(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.training import edits

    def cut(job: Any, model: Any, *more: Any, **named: Any) -> Outcome:
        away(model, 0.1)
        return Outcome("interrupted", 2, 2, "asked to stop")

    monkeypatch.setattr(edits, "train", cut)
    model, fresh = adapted(make_model), adapted(make_model)
    assert edited(TaskVector(scale=(0.5,)), model, tmp_path).status == "interrupted"
    assert torch.equal(weights(model), weights(fresh))


# ------------------------------------------------------------------------------------------------------------- processes


def edits_of_each_kind() -> dict[str, Edit]:
    return {
        "task_vector": TaskVector(scale=(0.3, 0.6)),
        "dampening": Dampening(alpha=(1.7, 1.2)),
        "fisher_noise": FisherNoise(scale=(1e-3, 2e-3)),
        "influence": Influence(curvature="cg", damping=1.0, iterations=4, scale=(0.01, 0.02), scores=True),
    }


def told(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """The weights after an edit of a kind, what was said of it, and the influences."""
    method = edits_of_each_kind()[name]
    wanted = job(terms=method.terms, lr=1e-3, optimizer="sgd", stop=stop())
    outcome, influences, _ = edit(method, wanted, model, Accelerator(cpu=True), folder / name)
    return {"weights": weights(model), "kept": outcome.kept, "influences": [one["influence"] for one in influences]}


@pytest.mark.slow
@pytest.mark.two_processes("edits")
def test_two_processes_make_the_same_edit(make_model: Callable[..., Any], two_processes: Path) -> None:
    for name in edits_of_each_kind():
        alone, shared = told(name, make_model(), two_processes / "alone"), torch.load(two_processes / f"{name}.pt")
        start = weights(make_model())
        assert shared["kept"] == alone["kept"] > 1, name
        assert near([shared["weights"] - start], [alone["weights"] - start], 2e-3), name
        assert shared["influences"] == pytest.approx(alone["influences"], rel=1e-2, abs=1e-6), name
    assert math.isfinite(sum(alone["influences"])) and len(alone["influences"]) == 18


# --------------------------------------------------------------------------------------------------------------- the run

EDIT = RECIPE.partition("objective:")[0]


def a_recipe(folder: Path, *words: str) -> recipe.Recipe:
    (folder / "r.yaml").write_text(EDIT, encoding="utf-8")
    return recipe.load(folder / "r.yaml", words)


@pytest.mark.parametrize(
    ("words", "place", "reason"),
    [
        (["method={name: dampening}", "train.stop={}"], "model.adapter", "dampening changes weights that are there"),
        (["method={name: fisher_noise}", "train.stop={}"], "model.adapter", "give model.adapter: null"),
        (["method={name: influence}"], "method.scale", "9 strengths, and no dose to choose one by; give train.stop"),
        (["method={name: influence, scale: []}"], "method.scale", ""),
        (["method={name: influence, scale: [1.0]}", "train.rules=[{name: sharpness}]"], "train.rules", "no optimizer steps"),
        (["method={name: influence, scale: [1.0]}", "data.retain=null"], "data.retain", "missing; influence reads it."),
        (["method={name: task_vector, scale: [1.0]}", "objective.forget={loss: {name: npo}}"], "objective", "brings its own"),
        (["method={name: task_vectors}"], "method", "task_vector"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], place: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        a_recipe(tmp_path, *words)
    assert place in str(refused.value) and reason in str(refused.value)


def test_a_plan_names_the_strengths(tmp_path: Path) -> None:
    wanted = a_recipe(tmp_path, "method={name: influence, scale: [0.5, 1.0]}", "train.stop={until: 9.0}")
    text = plan(wanted, Path()).text
    assert "strengths  scale 0.5, 1" in text and "steps  " not in text
    assert (
        "of the strengths, that with which the forget set is most nearly at perplexity 9.0, before retain perplexity is 1.5" in text
    )
    assert recipe.load(tmp_path / "r.yaml", ["method={name: task_vector, scale: [1.0]}"]).hash != wanted.hash
    assert "steps  " in plan(a_recipe(tmp_path, "method={name: task_vector, scale: [1.0]}"), tmp_path).text


def test_a_null_objective_leaves_room_for_a_method(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(RECIPE, encoding="utf-8")
    text = "extends: old.yaml\nobjective: null\nmethod: {name: task_vector, scale: [1.0]}\n"
    (tmp_path / "new.yaml").write_text(text, encoding="utf-8")
    wanted = recipe.load(tmp_path / "new.yaml")
    assert not wanted.objective and set(wanted.terms) == {"forget"}


@pytest.mark.slow
def test_a_run_saves_the_edit_and_the_influences(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was killed is made again, to the same weights."""
    from pyarrow import parquet

    from llm_unlearn import run as runs
    from llm_unlearn.training import edits

    words = [
        f"model={{base: {tiny_base}, adapter: null}}", f"output={tmp_path / 'run'}",
        "method={name: influence, damping: 1.0, scale: [0.1], scores: true}",
    ]  # fmt: skip
    wanted = a_recipe(tmp_path, *words)

    class PowerCut(Exception):
        pass

    def cut(*more: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(edits, "norm", cut)
        with pytest.raises(PowerCut):
            runs.run(wanted, None, cache=tmp_path / "cache")
    assert not (tmp_path / "run" / "model").exists()
    assert runs.run(wanted, None, cache=tmp_path / "cache", resume=True) == Outcome("finished", 1, 1)
    runs.run(replace(wanted, output=str(tmp_path / "straight")), None, cache=tmp_path / "cache")
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "straight")]
    assert saved[0] == saved[1] != (tiny_base / "model.safetensors").read_bytes()
    table = parquet.read_table(tmp_path / "run" / "influence.parquet").to_pylist()
    assert {row["stream"] for row in table} == {"forget", "retain"} and set(table[0]) == {"stream", "row", "influence"}
