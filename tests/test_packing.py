"""Sequences laid end to end: the same states and gradients as padded ones, where a model's attention can keep them apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from jobs import adapted, job
from test_scores import ARCHITECTURES, SMALL, examples
from test_window import CASES, Rank, apart, gradients_of, make_adapted, make_job, model_of, weights_of
from torch import Tensor

from llm_unlearn.data.batch import Layout, Packing, cut, lay_out
from llm_unlearn.models import packing as packing_module
from llm_unlearn.models.load import add_adapter, load
from llm_unlearn.models.packing import NAME
from llm_unlearn.models.scores import Scorer, checkpoint_activations, head_of, score
from llm_unlearn.models.trials import can_pack
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.views import TOP
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.spec import Refused
from llm_unlearn.training.loop import Training
from llm_unlearn.training.privacy import Privacy, mechanism
from llm_unlearn.training.window import Window

PACK = {
    **ARCHITECTURES,
    "mistral (window)": transformers.MistralConfig(**SMALL, sliding_window=3),
    "gemma3 (windows, own masks)": transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=3),
    "gemma3 (wide windows)": transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=12),
    "qwen2 (eager)": transformers.Qwen2Config(**SMALL, attn_implementation="eager"),
}  # fmt: skip
CANNOT = {"gemma2 (soft cap)", "qwen2 (eager)", "mistral (window)", "gemma3 (windows, own masks)"}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(PACK[name], attn_implementation=PACK[name]._attn_implementation).eval()


def test_a_packed_batch_is_the_padded_one_without_its_padding() -> None:
    rows = examples(3)
    padded, packed = lay_out(rows), lay_out(rows, packed=True)
    lengths = [len(row.ids) for row in packed.examples]
    assert packed.packing is not None and packed.input_ids.shape == (1, sum(lengths))
    assert torch.equal(packed.input_ids[0, packed.at + 1], packed.targets) and torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.packing.place[packed.at], padded.at)
    assert packed.packing.starts.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert packed.packing.position_ids[0].tolist() == [t for length in lengths for t in range(length)]
    assert torch.equal(padded.input_ids.flatten()[packed.packing.place], packed.input_ids[0])
    (part,) = [packed.only({"retain"})]
    assert part is not None and part.packing is not None and {row.stream for row in part.examples} == {"retain"}
    assert packed.only({"forget", "retain"}) is packed


def test_a_packed_micro_batch_holds_tokens_and_no_padding() -> None:
    lengths, sizes = [9, 5, 4, 2, 2], [9, 5, 4, 2, 2]
    assert cut(lengths, 11, sizes=sizes)[0] == [[0], [1, 2, 3], [4]]
    assert cut(lengths, 11)[0] == [[0], [1, 2], [3, 4]]  # 2 · 5, and 3 · 5 would be too many


@pytest.mark.parametrize("name", PACK)
def test_states_and_gradients_are_those_of_padded_sequences(name: str) -> None:
    model, rows = made(name), examples(5)
    assert can_pack(model, 12) == (name not in CANNOT)
    if name in CANNOT:
        assert model.config._attn_implementation != NAME
        return
    found = []
    for packed in (False, True):
        model.zero_grad()
        batch = lay_out(rows, packed)
        scores = score(Scorer(model), head_of(model), batch, (0, TOP))
        sum(one.logps.sum() + one.hidden(0).square().sum() for one in scores.values()).backward()  # type: ignore[union-attr]
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        found.append(
            ([one.logps.detach() for one in scores.values()], [one.hidden(0).detach() for one in scores.values()], gradient)
        )
    (logps, hidden, whole), (packed_logps, packed_hidden, packed_whole) = found
    for one, other in zip([*logps, *hidden], [*packed_logps, *packed_hidden], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert (whole - packed_whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("tokens", [30, 10**6])
@pytest.mark.parametrize(("loss", "kept"), CASES, ids=lambda loss: str(loss).replace("name=", ""))
def test_a_window_has_the_same_gradient(make_model: Callable[..., Any], loss: Any, kept: Any, tokens: int) -> None:
    def small() -> Any:
        return make_model(num_hidden_layers=3)

    found = []
    for packed in (False, True):
        wanted = make_job(loss, tokens, kept)
        model = make_adapted(small, True)
        assert can_pack(model, 12)
        Window(wanted, 0, Rank(0, 1), Layout(tokens, packed)).backward(
            wanted.terms, weights_of(wanted), model_of(wanted, model, None)
        )  # type: ignore[arg-type]
        found.append(gradients_of(model))
    assert apart(found[1], {name: one.double() for name, one in found[0].items()}) < 1e-5


def test_activations_are_recomputed_end_to_end_too(make_model: Callable[..., Any]) -> None:
    found = []
    for recomputed in (False, True):
        model = make_model().train()
        assert can_pack(model, 12)
        if recomputed:
            checkpoint_activations(model)
        scores = score(Scorer(model), head_of(model), lay_out(examples(5, vocabulary=1024), packed=True))
        sum(one.logps.sum() for one in scores.values()).backward()  # type: ignore[union-attr]
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_training_packs_where_it_can(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A private run does not: its gradients belong to single rows. Nor does a model whose attention mixes sequences."""
    assert Training(job(), adapted(make_model), Accelerator(cpu=True)).layout.packed
    private = mechanism(Privacy(noise=1.0, delta=1e-3, clip=1.0), {"forget": 8}, {"forget": 2}, 4, b"k" * 32)
    wanted = job(terms={"forget": job().terms["retain"].__class__(loss=NPO())})
    object.__setattr__(wanted, "private", private)
    assert not Training(wanted, adapted(make_model), Accelerator(cpu=True)).layout.packed
    real = packing_module._spread

    def mixes(one: Tensor, at: Tensor, count: int, longest: int) -> Tensor:
        return real(one, at.flip(0), count, longest)

    monkeypatch.setattr(packing_module, "_spread", mixes)
    model = adapted(make_model)
    assert not Training(job(), model, Accelerator(cpu=True)).layout.packed
    assert model.config._attn_implementation == "sdpa"


def test_generation_and_padded_batches_are_as_before(make_model: Callable[..., Any]) -> None:
    model, prompt = make_model(), torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    before = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    batch = lay_out(examples(5, vocabulary=1024))
    with torch.no_grad():
        plain = score(Scorer(model), head_of(model), batch)["forget"].logps
        assert can_pack(model, 12)
        assert torch.equal(score(Scorer(model), head_of(model), batch)["forget"].logps, plain)
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False), before)


def test_a_layer_below_all_that_is_trained_keeps_nothing_for_the_backward_pass(make_model: Callable[..., Any]) -> None:
    """An adapter on the last layer only: what autograd keeps does not grow with the layers below it."""
    kept = {}
    for layers in (2, 5):
        model = add_adapter(make_model(num_hidden_layers=layers), Adapter(rank=4, layers=(layers - 1,)), seed=0)
        assert can_pack(model, 12)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, sizes=sizes: sizes.append(one.numel()) or one, lambda one: one):
            score(Scorer(model), head_of(model), lay_out(examples(5, vocabulary=1024), packed=True))
        kept[layers] = sum(sizes)
    assert kept[2] == kept[5] > 0


@pytest.mark.parametrize("wanted", ["eager", "sdpa", None])
def test_a_recipe_may_name_the_attention(tiny_base: Path, wanted: Any) -> None:
    loaded = load(Model(base=str(tiny_base), attention=wanted), torch.device("cpu"))
    assert loaded.causal.config._attn_implementation == (wanted or "sdpa")
    assert can_pack(loaded.model, 12) == (wanted != "eager")


def test_attention_that_is_not_here_is_refused(tiny_base: Path) -> None:
    with pytest.raises(Refused, match=r"cannot be loaded .*[Ff]lash"):
        load(Model(base=str(tiny_base), attention="flash_attention_2"), torch.device("cpu"))


def test_the_longest_sequence_sets_the_grid() -> None:
    packing = Packing.of([2, 4, 1])
    assert packing.longest == 4 and packing.place.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert packing.starts.dtype == torch.int32
