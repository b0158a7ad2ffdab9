"""Mixtures of experts and hybrids through the training window: gradients of plain transformers and peft, one sequence at a time."""

import copy
from typing import Any

import pytest
import torch
from mixtures import make_mixture
from test_window import apart, gradients_of, in_windows, make_examples, make_job, model_of, weights_of, whole_batch

from llm_unlearn.data.examples import Example
from llm_unlearn.models.load import add_adapter, trainable
from llm_unlearn.models.scores import Scorer, head_of, score
from llm_unlearn.models.trainable_weights import choose_weights
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.routing import RouterKL
from llm_unlearn.objectives.views import ROUTERS, TOP
from llm_unlearn.sections import Adapter
from llm_unlearn.spec import Refused
from llm_unlearn.training.loop import check
from llm_unlearn.training.window import Window

ROUTED = ("qwen3_moe", "mixtral", "gpt_oss")


def moved(kind: str, adapter: bool, **changes: Any) -> tuple[Any, Any]:
    """A model that has moved away from how it was, and how it was."""
    before = make_mixture(kind, vocab_size=1024, **changes)
    model = copy.deepcopy(before)
    if adapter:
        model = add_adapter(model, Adapter(rank=2), seed=0)
    else:
        choose_weights(model, None)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if not adapter or ".lora_B." in name:
                weight += (0.1 if adapter else 0.02) * torch.randn_like(weight)
    return model, before


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("kept", [KL(), RouterKL()], ids=["kl", "router_kl"])
def test_window_gradient_is_that_of_whole_sequences_in_float64(kind: str, adapter: bool, kept: Any) -> None:
    """However the window is cut, and on two ranks; the load-balancing loss of transformers takes no part."""
    model, before = moved(kind, adapter, router_aux_loss_coef=10.0)
    exact, said = whole_batch(make_job(NPO(), 10_000, kept), 0, model, before)
    for tokens, ranks in ((10_000, 1), (60, 2)):
        job = make_job(NPO(), tokens, kept)
        found, means = in_windows(job, 0, model, before, ranks)
        assert means == pytest.approx(said, rel=1e-4)
        assert apart(found, exact) < 2e-5, (tokens, ranks)
        assert set(found) == set(exact) and not any(".gate." in name or ".router." in name for name in found)


@pytest.mark.parametrize("kind", [*ROUTED, "qwen3_next", "deepseek_v3", "jamba", "granitemoehybrid"])
def test_router_logits_are_those_that_transformers_returns(kind: str) -> None:
    net = make_mixture(kind, vocab_size=1024)
    (example,) = make_examples("retain", 1, seed=3)
    with torch.no_grad():
        from llm_unlearn.data.batch import lay_out

        batch = lay_out([example, Example(example.ids[:4], 2, "retain", 9)])
        scores = score(Scorer(net), head_of(net), batch, (ROUTERS, TOP))["retain"]
        routers = net(input_ids=torch.tensor([example.ids]), output_router_logits=True).router_logits
    own = torch.stack([one.reshape(len(example.ids), -1) for one in routers if one is not None], 1)[example.answer - 1 : -1]
    assert scores.routing.shape[1:] == own.shape[1:]
    assert torch.allclose(scores.routing[: example.targets], own, atol=1e-5)


def test_router_kl_is_refused_for_a_dense_model(make_model: Any) -> None:
    with pytest.raises(Refused, match="router_kl needs a mixture of experts, and LlamaForCausalLM has no routers"):
        check(make_job(NPO(), 100, RouterKL()), make_model())


def test_router_kl_brings_the_routing_of_retained_rows_back() -> None:
    """Steps along its gradient alone, of an adapter that has moved it."""
    model, before = moved("qwen3_moe", True)
    job = make_job(NPO(), 10_000, RouterKL())
    terms = {"retain": job.terms["retain"]}
    mine = model_of(job, model, before)
    window = Window(job, 0, mine_accelerator())
    first = window.means(terms, mine)["retain"]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
    for _ in range(12):
        window.backward(terms, weights_of(job), mine)
        optimizer.step()
        optimizer.zero_grad()
    assert first > 0.01 and window.means(terms, mine)["retain"] < first / 4


def mine_accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def test_gradient_checkpointing_gives_the_same_gradient_of_router_kl() -> None:
    from llm_unlearn.models.scores import checkpoint_activations

    found = []
    for checkpointing in (False, True):
        model, before = moved("qwen3_moe", True)
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        job = make_job(NPO(), 10_000, RouterKL())
        Window(job, 0, mine_accelerator()).backward(job.terms, weights_of(job), model_of(job, model, before))
        found.append(gradients_of(model))
    assert apart(found[1], {name: one.double() for name, one in found[0].items()}) < 1e-6
