"""Scores against the model's own forward pass: several architectures, chunks, statistics, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llm_unlearn.data.batch import Batch, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models import scores as scores_module
from llm_unlearn.models.load import add_adapter, as_it_was, trainable
from llm_unlearn.models.reference import reference_of
from llm_unlearn.models.scores import Scorer, check_head, head_of, score, statistics, values
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.recipe import Adapter
from llm_unlearn.spec import Refused

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "mistral": transformers.MistralConfig(**SMALL),
    "gemma2 (soft cap)": transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere (logit scale)": transformers.CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "granite (logits scaling)": transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "gpt-neox": transformers.GPTNeoXConfig(**{name: size for name, size in SMALL.items() if name != "num_key_value_heads"}),
}  # fmt: skip


def examples(seed: int, count: int = 7, vocabulary: int = 64, streams: tuple[str, ...] = ("forget", "retain")) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(3, 12, (), generator=draw))
        answer = int(torch.randint(1, length, (), generator=draw))
        ids = tuple(torch.randint(0, vocabulary, (length,), generator=draw).tolist())
        made.append(Example(ids, answer, streams[i % len(streams)], i))
    return made


def one_by_one(model: Any, batch: Batch, stream: str) -> Tensor:
    """(N, V) logits at the answer positions of a stream, each sequence alone, by the model's own forward pass."""
    rows = []
    for example in batch.examples:
        if example.stream == stream:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].float()
            rows.append(logits[example.answer - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    check_head(model)
    batch = lay_out(examples(0))
    with torch.no_grad():
        for stream, found in score(Scorer(model), head_of(model), batch).items():
            own = one_by_one(model, batch, stream)
            assert torch.allclose(found.logits, own, atol=2e-5, rtol=1e-4)
            targets = torch.cat([torch.tensor(e.ids[e.answer :]) for e in batch.examples if e.stream == stream])
            assert torch.equal(found.targets, targets)
            assert torch.allclose(found.logps, own.log_softmax(-1).gather(-1, targets[:, None])[:, 0], atol=2e-5)
            assert found.owner.bincount().tolist() == [e.targets for e in batch.examples if e.stream == stream]


def test_an_unknown_head_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()

    class Halved(torch.nn.Module):
        config, device = model.config, model.device
        base_model = model.base_model

        def get_output_embeddings(self) -> Any:
            return model.get_output_embeddings()

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            out = model(input_ids=input_ids, use_cache=use_cache)
            out.logits = out.logits / 2
            return out

    with pytest.raises(Refused, match=r"Halved: .* not supported"):
        check_head(Halved())


@pytest.mark.parametrize("rows", [1, 3, 10**6])
@pytest.mark.parametrize("loss", [NLL(), KL(), KL(direction="reverse")], ids=str)
def test_chunks_change_neither_values_nor_gradients(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: int, loss: Any
) -> None:
    found = {}
    for chunk in (10**9, rows * 1024):
        monkeypatch.setattr(scores_module, "CHUNK", chunk)
        model, before = make_model(0), make_model(1)
        batch = lay_out(examples(3, vocabulary=1024))
        now = score(Scorer(model), head_of(model), batch)
        with torch.no_grad():
            ref = score(Scorer(before), head_of(before), batch)
        result = values(loss, now, dict(ref), "retain")
        result.sum().backward()
        found[chunk] = (
            result.detach(),
            torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]),
        )
    whole, cut = found.values()
    assert torch.allclose(whole[0], cut[0], rtol=1e-5, atol=1e-6)
    assert (whole[1] - cut[1]).norm() <= 1e-6 * whole[1].norm()


def test_statistics_against_float64(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "CHUNK", 5 * 1024)
    model = make_model()
    batch = lay_out(examples(4, vocabulary=1024))
    found = score(Scorer(model), head_of(model), batch)["forget"]
    mine = statistics(found)
    for n, row in enumerate(found.logits.detach().double()):
        p = row.softmax(-1)
        logp = p.log()
        mean = float((p * logp).sum())
        assert mine.logp[n] == pytest.approx(float(logp[found.targets[n]]), abs=1e-5)
        assert mine.mean[n] == pytest.approx(mean, rel=1e-5)
        assert mine.std[n] == pytest.approx(float((p * (logp - mean) ** 2).sum().sqrt()), rel=1e-4)
        assert bool(mine.hit[n]) == bool(row.argmax() == found.targets[n])


def test_the_adapter_switched_off_is_the_model_as_it_was(make_model: Callable[..., Any]) -> None:
    base, batch = make_model(), lay_out(examples(5, vocabulary=1024))
    before = score(Scorer(base), head_of(base), batch)["retain"].logits.detach()
    model = add_adapter(base, Adapter(rank=4), seed=0)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    ask = reference_of(Scorer(model), head_of(model), {"retain": "logits"}, [], 10**6, torch.device("cpu"))
    moved = score(Scorer(model), head_of(model), batch)["retain"].logits
    assert not torch.allclose(moved, before, atol=1e-2)
    found = ask(batch)
    assert set(found) == {"retain"} and torch.equal(found["retain"].logits, before)
    with as_it_was(model):
        assert torch.equal(score(Scorer(model), head_of(model), batch)["retain"].logits, before)


@pytest.mark.parametrize("tied", [True, False])
def test_numbers_taken_before_full_training_stay_the_model_as_it_was(make_model: Callable[..., Any], tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    rows = examples(6, count=9, vocabulary=1024)
    ask = reference_of(Scorer(model), head_of(model), {"forget": "logps", "retain": "logits"}, rows, 20, torch.device("cpu"))
    batch = lay_out([rows[i] for i in (4, 1, 7, 2, 0)])
    before = score(Scorer(model), head_of(model), batch)
    logps, logits = before["forget"].logps.detach(), before["retain"].logits.detach()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)
    found = ask(batch)
    assert torch.allclose(found["forget"].logps, logps, atol=1e-5)
    assert torch.allclose(found["retain"].logits, logits, atol=1e-4)
    assert not torch.allclose(score(Scorer(model), head_of(model), batch)["retain"].logits, logits, atol=1e-1)
