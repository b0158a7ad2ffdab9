"""Forced routing: a mixture whose routers alone were changed gives everything back, one whose experts were changed does not."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from mixtures import make_mixture

from llm_unlearn.attacks.finding import Subject
from llm_unlearn.attacks.gap import finding_of, gap_of
from llm_unlearn.attacks.routing import CHANGED, DISTANCE, ForcedRouting
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.evaluation.sets import EncodedSet, encode_set
from llm_unlearn.models.experts import experts_of
from llm_unlearn.models.forms import Again
from llm_unlearn.models.load import add_adapter
from llm_unlearn.models.routing import Reader, Routing, distance, forced_routing, share_changed
from llm_unlearn.models.scores import Scorer
from llm_unlearn.objectives.views import TOP
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")
BATCH = lay_out([Example(tuple(range(3, 15)), 4, "forget", 0), Example(tuple(range(20, 26)), 2, "forget", 1)])


def rerouted(net: Any) -> Any:
    """The same model, every router's rows in another order: tokens go to other experts."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for weight in experts_of(net).weights.values():
            weight.copy_(weight.roll(1, 0) if len(weight) > 1 else -weight)
    return net


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return Scorer(model)(BATCH.input_ids, BATCH.at)[TOP]


@pytest.mark.parametrize("kind", KINDS)
def test_forced_routing_undoes_a_change_of_routers(kind: str) -> None:
    original = make_mixture(kind)
    model = rerouted(original)
    assert not torch.allclose(states(model), states(original), atol=1e-2)
    own = states(model)
    with forced_routing(model, original):
        assert torch.allclose(states(model), states(original), atol=1e-5)
    assert torch.equal(states(model), own)  # and nothing of it stays


def test_forced_routing_does_not_undo_a_change_of_experts_or_adapters() -> None:
    original = make_mixture("qwen3_moe")
    model = add_adapter(copy.deepcopy(original), Adapter(rank=2), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name and ".lora_B." in name:
                weight.normal_(0, 0.3)
    with forced_routing(model, original):
        assert not torch.allclose(states(model), states(original), atol=1e-2)


def test_readings_are_the_choices_of_the_model_itself() -> None:
    net = make_mixture("qwen3_moe")
    reader = Reader(net)
    with reader.reading():
        states(net)
    with torch.no_grad():
        rows = [net(torch.tensor([example.ids]), output_router_logits=True).router_logits for example in BATCH.examples]
    length = BATCH.input_ids.shape[1]
    for router, (logits, chosen) in enumerate(zip(reader.routing.logits, reader.routing.chosen, strict=True)):
        for b, row in enumerate(rows):
            own = row[router].reshape(-1, 8)
            assert torch.allclose(logits[b * length : b * length + len(own)], own, atol=1e-5)
            assert torch.equal(chosen[b * length : b * length + len(own)], own.topk(2).indices.sort(-1).values)


@pytest.mark.parametrize("kind", [*KINDS, "jamba", "granitemoehybrid"])
def test_choices_can_be_read(kind: str) -> None:
    net = make_mixture(kind)
    reader = Reader(net)
    with reader.reading():
        states(net)
    assert len(reader.routing.chosen) == len(reader.routing.logits) > 0
    assert all(one.shape[1] == 2 for one in reader.routing.chosen)


def test_measures_of_how_far_routing_moved() -> None:
    """Two routers, two tokens: the first router sends token 1 elsewhere, and nothing is further from (1, 0) than (0, 1)."""
    far, near = torch.tensor([[100.0, 0.0], [100.0, 0.0]]), torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    one = Routing((far, far), (torch.tensor([[0], [0]]),) * 2)
    other = Routing((near, far), (torch.tensor([[0], [1]]), torch.tensor([[0], [0]])))
    at = torch.tensor([0, 1])
    changed = share_changed(one, other, at)
    assert changed is not None and changed.tolist() == [0.0, 0.5]
    assert distance(one, other, at).tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert distance(one, one, at).tolist() == [0.0, 0.0]
    assert share_changed(replace(one, chosen=()), other, at) is None


def test_a_dense_model_and_another_mixture_are_refused(make_model: Any) -> None:
    with pytest.raises(Refused, match="no mixture of experts"), forced_routing(make_model(), make_model()):
        pass
    two = make_mixture("mixtral"), make_mixture("qwen3_moe")
    with pytest.raises(Refused, match="differ in number or shape"), forced_routing(*two):
        pass


@pytest.fixture(scope="module")
def sets(tokenizer: Any) -> dict[str, EncodedSet]:
    source = Source(source="embedded:forget", prompt="question", answer="answer", limit=6)
    return {"forget": encode_set("forget", source, ("answer",), tokenizer)}


@pytest.fixture(scope="module")
def bases(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture that has learned the answers, one whose routers were changed, and one that never saw them."""
    folder = tmp_path_factory.mktemp("mixtures")
    source = Source(source="embedded:forget", prompt="question", answer="answer", limit=6)
    examples = encode_set("forget", source, ("answer",), tokenizer).examples
    fresh = make_mixture("qwen3_moe", vocab_size=len(tokenizer))
    knows = copy.deepcopy(fresh).train()
    optimizer = torch.optim.AdamW([one for name, one in knows.named_parameters() if ".gate." not in name], lr=3e-3)
    for _ in range(60):
        loss = torch.zeros(())
        for example in examples:
            logits = knows(torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids[example.answer :]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, net in (("before", knows.eval()), ("after", rerouted(knows)), ("retrained", fresh)):
        net.save_pretrained(str(folder / name))
        tokenizer.save_pretrained(str(folder / name))
    return {name: folder / name for name in ("before", "after", "retrained")}


def curves_of(attack: ForcedRouting, bases: Mapping[str, Path], sets: Mapping[str, EncodedSet]) -> dict[str, Any]:
    original = Again(Model(base=str(bases["before"])), None, torch.device("cpu"))
    found = {}
    for column, base in bases.items():
        model = Model(base=str(base))
        load = Again(model, None, torch.device("cpu"))
        curve = attack(Subject(column, model, None, load, sets, original, Accelerator(cpu=True), 300, 0, lambda text: None))
        found[column] = asdict(curve)
    return found


def test_knowledge_that_was_routed_around_is_found(bases: dict[str, Path], sets: dict[str, EncodedSet]) -> None:
    attack = ForcedRouting(set="forget")
    curves = curves_of(attack, bases, sets)
    before, after, retrained = (curves[name] for name in ("before", "after", "retrained"))
    assert before["y"][0] > 0.5 > 0.1 > after["y"][0]
    assert after["y"][1] == pytest.approx(before["y"][0], abs=1e-4) and before["y"][0] == pytest.approx(before["y"][1], abs=1e-6)
    assert retrained["y"][1] < 0.1
    assert before["notes"][CHANGED] == 0 and before["notes"][DISTANCE] < 1e-6 and after["notes"][CHANGED] > 0.5
    gap = gap_of(attack, curves)
    assert gap["leaks"] and gap["came_back"] == pytest.approx(1.0, abs=0.05)
    said = finding_of(attack, curves, gap)
    assert "(the original's)" in said and "The knowledge is still in the experts and was routed around." in said
    assert f"{100 * after['notes'][CHANGED]:.0f} % of the choices of experts have changed" in said


def test_knowledge_that_is_gone_is_not(bases: dict[str, Path], sets: dict[str, EncodedSet]) -> None:
    attack = ForcedRouting(set="forget")
    curves = curves_of(attack, {**bases, "after": bases["retrained"]}, sets)
    gap = gap_of(attack, curves)
    assert not gap["leaks"] and "routed around" not in finding_of(attack, curves, gap)
