"""Mixtures of experts and hybrids through the training window: gradients of plain transformers and peft, one sequence at a time."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from jobs import away, job, log, moved_by, straight_and_resumed, weights
from mixtures import make_mixture, write_mixture
from test_window import apart, gradients_of, in_windows, make_examples, make_job, model_of, weights_of, whole_batch

from llm_unlearn import recipe
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.load import add_adapter, trainable
from llm_unlearn.models.scores import Scorer, checkpoint_activations, head_of, score
from llm_unlearn.models.trainable_weights import Group, choose_weights, table
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.routing import RouterKL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.objectives.views import ROUTERS, TOP
from llm_unlearn.plan import plan
from llm_unlearn.sections import Adapter
from llm_unlearn.spec import Refused
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import check, train
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
    window = Window(job, 0, Accelerator(cpu=True))
    first = window.means(terms, mine)["retain"]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
    for _ in range(12):
        window.backward(terms, weights_of(job), mine)
        optimizer.step()
        optimizer.zero_grad()
    assert first > 0.01 and window.means(terms, mine)["retain"] < first / 4


def test_gradient_checkpointing_gives_the_same_gradient_of_router_kl() -> None:
    found = []
    for checkpointing in (False, True):
        model, before = moved("qwen3_moe", True)
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        job = make_job(NPO(), 10_000, RouterKL())
        Window(job, 0, Accelerator(cpu=True)).backward(job.terms, weights_of(job), model_of(job, model, before))
        found.append(gradients_of(model))
    assert apart(found[1], {name: one.double() for name, one in found[0].items()}) < 1e-6


def routed_job(steps: int, **settings: Any) -> Job:
    """npo, kl and router_kl."""
    terms = {"forget": Term(loss=NPO(), weight=0.7), "retain": Term(loss=KL(), weight=1.5)}
    terms["routing"] = Term(loss=RouterKL(), weight=3.0, stream="retain")
    return job(steps, terms=terms, **settings)


def adapted_mixture(kind: str = "qwen3_moe") -> Any:
    """A fresh adapter that has moved a little, so that KL has a gradient."""
    return away(add_adapter(make_mixture(kind, vocab_size=1024), Adapter(rank=2), seed=0), 0.05)


@pytest.mark.parametrize("kind", ROUTED)
def test_a_resumed_run_has_the_same_bits(kind: str, tmp_path: Path) -> None:
    wanted = routed_job(4, checkpoint_every=2)
    straight, resumed = straight_and_resumed(wanted, lambda: adapted_mixture(kind), tmp_path, at=2)
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(weights(straight), weights(adapted_mixture(kind)))


@pytest.mark.parametrize("way", ["adapter_off", "kept", "copy"])
def test_ways_to_ask_the_reference_give_the_same_router_kl(way: Any, tmp_path: Path) -> None:
    first = log_of(routed_job(2, reference=way), tmp_path / way)
    assert first == pytest.approx(log_of(routed_job(2, reference="adapter_off"), tmp_path / "off"), rel=1e-3, abs=1e-6)
    assert len(first) == 2 and all(value > 0 for value in first)


def log_of(wanted: Job, folder: Path) -> list[float]:
    train(wanted, adapted_mixture(), Accelerator(cpu=True), folder)
    return [row["routing"] for row in log(folder)]


@pytest.mark.slow
@pytest.mark.two_processes("mixtures")
def test_two_processes_move_a_mixture_as_one_does(two_processes: Path, tmp_path: Path) -> None:
    for kind in ROUTED:
        alone = moved_by(routed_job(2, optimizer="sgd", lr=0.05), adapted_mixture(kind), tmp_path / kind)
        shared = torch.load(two_processes / f"{kind}.pt")
        assert float((alone - shared).norm() / alone.norm()) < 1e-4 and float(alone.norm()) > 0


MIXTURE = """\
output: {folder}/run
model: {{base: {base}, adapter: {{rank: 4}}}}
data:
  forget: {{source: embedded:forget, prompt: question, answer: answer, limit: 8}}
  retain: {{source: embedded:retain, prompt: question, answer: answer, limit: 8}}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: nll}}}}
  routing: {{loss: {{name: router_kl}}, stream: retain}}
train: {{steps: 2, stop: null}}
"""


def test_columns_of_adapted_layers_are_aligned() -> None:
    names = ("q_proj", "feed_forward.shared_expert.gate_proj")
    rows = table([Group(name, (128, 64), 2, 1024, 4) for name in names])
    assert len({(row.index("128×64"), row.index("2 layers"), row.index("rank 4"), len(row)) for row in rows}) == 1


def test_plan_lists_experts_and_frozen_routers(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    base = write_mixture("qwen3_moe", tmp_path / "base", tokenizer)
    (tmp_path / "r.yaml").write_text(MIXTURE.format(folder=tmp_path, base=base))
    found = plan(recipe.load(tmp_path / "r.yaml"), cache)
    assert re.search(r"^adapted +self_attn\.q_proj +64×64 +2 layers +rank 4 +1,024$", found.text, re.M)
    assert re.search(r"^ +mlp\.experts\.gate_up_proj +8×48×64 +2 layers +rank 4 +7,168$", found.text, re.M)
    assert re.search(r"^frozen +mlp\.gate +8×64 +2 layers .*router", found.text, re.M)
    assert sum(group["trainable"] for group in found.facts["changed"]) == found.facts["trainable"]
    assert [group["name"] for group in found.facts["frozen_routers"]] == ["mlp.gate"]
    named = plan(recipe.load(tmp_path / "r.yaml", ["model.adapter.targets=[gate]"]), cache)
    assert [group["name"] for group in named.facts["changed"]] == ["mlp.gate"] and named.facts["frozen_routers"] == []
    full = plan(recipe.load(tmp_path / "r.yaml", ["model.adapter=null"]), cache)
    assert "mlp.gate" not in {group["name"] for group in full.facts["changed"]}
    assert full.facts["trainable"] == full.facts["weights"] - 2 * 8 * 64


def test_plan_refuses_router_kl_for_a_dense_model(tmp_path: Path, tiny_base: Path, cache: Path) -> None:
    (tmp_path / "r.yaml").write_text(MIXTURE.format(folder=tmp_path, base=tiny_base))
    with pytest.raises(Refused, match="router_kl needs a mixture of experts"):
        plan(recipe.load(tmp_path / "r.yaml"), cache)
    with pytest.raises(Refused, match="router logits cannot be read inside compiled layers"):
        recipe.load(tmp_path / "r.yaml", ["train.compile=layers"])
