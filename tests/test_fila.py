"""What weights matter to a set of answers, and an adapter that begins where the forget set lives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import job, log, moved_by, rows, straight_and_resumed, weights
from torch import Tensor

from llm_unlearn.models import fila
from llm_unlearn.models.load import Loaded, as_it_was, load, trainable
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.terms import Term
from llm_unlearn.run import prepare, save
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.spec import Refused
from llm_unlearn.training.fisher import fisher
from llm_unlearn.training.loop import train

FILA = Adapter(rank=4, alpha=12, init="fila")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def answers(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = torch.arange(4, 34)[None] * 7 % 1024 if ids is None else ids
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def begun(make_model: Callable[..., Any], wanted: Any = None, **changes: Any) -> Any:
    return prepare(make_model(**changes), Model(base="x", adapter=FILA), wanted or job(), Accelerator(cpu=True))


def npo_and_kl(**settings: Any) -> Any:
    return job(terms={"forget": Term(loss=NPO()), "retain": Term(loss=KL(), weight=2.0)}, **settings)


# ----------------------------------------------------------------------------------------------------------------- fisher


def test_fisher_is_the_mean_of_squared_gradients_of_single_answers(make_model: Callable[..., Any]) -> None:
    model, examples = make_model(), rows("forget", 5, 1)
    theta = list(model.parameters())
    found = fisher(Scorer(model), head_of(model), theta, examples, Accelerator(cpu=True))
    exact = [torch.zeros_like(weight) for weight in theta]
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]
        nll = -logits.log_softmax(-1).gather(-1, torch.tensor(example.ids[example.answer :])[:, None]).sum()
        for total, slope in zip(exact, torch.autograd.grad(nll, theta), strict=True):
            total += slope**2 / len(examples)
    for mine, his in zip(found, exact, strict=True):
        assert torch.allclose(mine, his, rtol=1e-4, atol=1e-6 * float(his.max()))
    assert all(weight.grad is None for weight in theta)


@pytest.mark.slow
@pytest.mark.two_processes("fila")
def test_two_processes_find_the_same_importance_and_train_the_same_adapter(
    make_model: Callable[..., Any], two_processes: Path
) -> None:
    model = make_model()
    mine = fisher(Scorer(model), head_of(model), list(model.parameters()), rows("forget", 5, 1), Accelerator(cpu=True))
    for rank in range(2):
        for one, other in zip(mine, torch.load(two_processes / f"fisher-{rank}.pt"), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.max()))
    alone = moved_by(npo_and_kl(optimizer="sgd", lr=0.05), begun(make_model), two_processes / "alone")
    assert float((alone - torch.load(two_processes / "moved.pt")).norm() / alone.norm()) < 1e-3


# ------------------------------------------------------------------------------------------------------------------- fila


def test_the_start_is_the_best_of_its_rank() -> None:
    """Against the weighted singular value decomposition by way of eigenvectors, and against thousands of others."""
    torch.manual_seed(0)
    w, forget, retain = torch.randn(7, 9), torch.rand(7, 9) * torch.logspace(-2, 2, 7)[:, None], torch.rand(7, 9)
    d = (forget / (retain + 1e-3 * retain.sum() / 63)).sum(-1).sqrt()

    def cost(product: Tensor) -> float:
        return float((d[:, None] * (w - product)).norm())

    b, a = fila.factors(w, forget, retain, 3)
    assert b.shape == (7, 3) and a.shape == (3, 9)
    best = cost(b @ a)
    whole = (d[:, None] * w).double()
    values, vectors = torch.linalg.eigh(whole.T @ whole)
    assert best == pytest.approx(values[:-3].sum().sqrt().item(), rel=1e-4)
    projected = (w.double() @ vectors[:, -3:] @ vectors[:, -3:].T).float()
    assert torch.allclose(b @ a, projected, atol=1e-4)
    for k in range(2000):
        near = b + 10 ** -(k % 4) * torch.randn_like(b), a + 10 ** -(k % 4) * torch.randn_like(a)
        assert cost(near[0] @ near[1]) >= best
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    assert cost(u[:, :3] * s[:3] @ v[:3]) > 1.01 * best  # without the weights it is another


def test_weights_that_matter_to_nobody_do_no_harm() -> None:
    torch.manual_seed(0)
    w, forget = torch.randn(6, 5), torch.rand(6, 5)
    forget[2] = 0
    for retain in (torch.rand(6, 5), torch.zeros(6, 5)):
        b, a = fila.factors(w, forget, retain, 2)
        assert b.isfinite().all() and a.isfinite().all()
    b, a = fila.factors(w, torch.zeros(6, 5), torch.zeros(6, 5), 2)
    assert b.isfinite().all() and a.isfinite().all()


def test_a_rank_beyond_the_layer_s_own(make_model: Callable[..., Any]) -> None:
    """k_proj of this model gives 16 numbers: an adapter of rank 20 has four directions without use there."""
    model = prepare(make_model(), Model(base="x", adapter=replace(FILA, rank=20)), job(), Accelerator(cpu=True))
    assert torch.allclose(answers(model), answers(make_model()), atol=1e-4)


def test_the_model_is_as_it_was_at_the_start_and_with_adapters_off(make_model: Callable[..., Any], tmp_path: Path) -> None:
    before, model = answers(make_model()), begun(make_model)
    assert not torch.equal(answers(model), before) and torch.allclose(answers(model), before, atol=1e-5)
    names = list(trainable(model))
    assert len(names) == 28 and all("lora_" in name and ".default." in name for name in names)
    frozen = {name: weight.detach().clone() for name, weight in model.named_parameters() if name not in names}
    scale = {type(layer).__name__: layer.scaling for layer in model.modules() if hasattr(layer, "scaling") and hasattr(layer, "r")}
    assert next(iter(scale.values())) == {"default": 3.0, "start": 3.0}
    assert moved_by(npo_and_kl(steps=5), model, tmp_path).norm() > 0.01
    assert list(trainable(model)) == names, "the frozen counterpart stays frozen, though peft switches it off and on"
    for name, weight in model.named_parameters():
        assert torch.equal(weight, frozen[name]) if name in frozen else True, name
    assert not torch.allclose(answers(model), before, atol=1e-3)
    with as_it_was(model):
        assert torch.equal(answers(model), before)
    rows = log(tmp_path)
    assert rows[0]["retain"] == pytest.approx(0, abs=1e-5) and rows[0]["forget"] == pytest.approx(2 / 0.1 * 0.6931, rel=1e-3)
    assert rows[-1]["forget"] < rows[0]["forget"]


def test_the_saved_adapter_gives_the_trained_model_on_the_fresh_base(tiny_base: Path, tmp_path: Path) -> None:
    spec = Model(base=str(tiny_base), adapter=FILA)
    loaded = load(spec, torch.device("cpu"), train=True)
    model = prepare(loaded.model, spec, npo_and_kl(), Accelerator(cpu=True))
    train(npo_and_kl(steps=5), model, Accelerator(cpu=True), tmp_path)
    folder = save(model, loaded, tmp_path, whole=False, accelerator=Accelerator(cpu=True))
    again: Loaded = load(spec, torch.device("cpu"), adapter=str(folder))
    assert again.model.peft_config["default"].r == 8 and list(again.model.peft_config) == ["default"]
    assert torch.allclose(answers(again.model), answers(model), atol=1e-5)
    assert not torch.allclose(answers(again.model), answers(load(spec, torch.device("cpu")).model), atol=1e-3)
    merged = copy.deepcopy(again.model).merge_and_unload()
    assert torch.allclose(answers(merged), answers(model), atol=1e-4)


def test_resume_gives_the_same_bits(make_model: Callable[..., Any], tmp_path: Path) -> None:
    wanted = npo_and_kl(steps=6, checkpoint_every=3)
    straight, resumed = straight_and_resumed(wanted, lambda: begun(make_model), tmp_path, at=4)
    assert torch.equal(weights(resumed), weights(straight)) and torch.equal(answers(resumed), answers(straight))


def test_a_bf16_base(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Taking away and giving back are rounded each on its own: the start is the model as it was but for bf16's own noise."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    base = make_model().to(torch.bfloat16)
    before, exact = answers(base), answers(make_model())
    model = prepare(base, Model(base="x", adapter=FILA), npo_and_kl(), accelerator)
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        start = answers(model)
    assert (start - before).norm() < 4 * (before - exact).norm()
    assert moved_by(npo_and_kl(), model, tmp_path, accelerator).norm() > 0.01


def test_only_some_layers(make_model: Callable[..., Any]) -> None:
    chosen = replace(FILA, targets=("down_proj",), layers=(1,))
    model = prepare(make_model(), Model(base="x", adapter=chosen), job(), Accelerator(cpu=True))
    assert len(trainable(model)) == 2 and torch.allclose(answers(model), answers(make_model()), atol=1e-5)


def test_an_architecture_that_keeps_its_weights_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's layers hold (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def small() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=256)).eval()

    model = begun(lambda: small())
    assert torch.allclose(answers(model), answers(small()), atol=1e-5)
    assert moved_by(npo_and_kl(), model, tmp_path).norm() > 0.01


def test_what_is_no_linear_layer_is_refused(make_model: Callable[..., Any]) -> None:
    chosen = replace(FILA, targets=("embed_tokens", "q_proj"))
    with pytest.raises(Refused, match=r"model\.adapter\.init: fila.*embed_tokens"):
        prepare(make_model(), Model(base="x", adapter=chosen), job(), Accelerator(cpu=True))
