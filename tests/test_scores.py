"""Scores against the model's own forward pass: several architectures, chunks, depth, statistics, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llm_unlearn.data.batch import Batch, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models import fila, trials
from llm_unlearn.models import scores as scores_module
from llm_unlearn.models.depth import blocks_of
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import add_adapter, as_it_was, causal, trainable
from llm_unlearn.models.reference import Asked, Reference, adapter_off, centres, frozen_copy, looked_up, taken, together
from llm_unlearn.models.scores import Scorer, Scores, checkpoint_activations, head_of, score, statistics, values
from llm_unlearn.models.trials import check_depth, check_head, freeze_unreached
from llm_unlearn.objectives.distribution import CEU, ELM, IHL, KL, Entropy, Margin, Undial
from llm_unlearn.objectives.likelihood import IDK, NLL, TNPO, WGA, WTNPO, Ascent, SatImp
from llm_unlearn.objectives.preference import AP, DPO, NPO
from llm_unlearn.objectives.views import TOP, beside
from llm_unlearn.sections import Adapter
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
            lengths = [e.targets for e in batch.examples if e.stream == stream]
            assert found.owner.bincount().tolist() == lengths
            assert found.position.tolist() == [t for length in lengths for t in range(length)]
            sums = torch.stack([part.sum() for part in torch.split(found.logps, lengths)])
            assert torch.allclose(found.by_sequence(found.logps), sums, atol=1e-5)


@contextmanager
def listening(model: Any) -> Iterator[tuple[dict[int, Tensor], dict[int, int]]]:
    """What every decoder layer of a model puts out, and how often it computes: its first part is called in a recomputation too."""
    outputs: dict[int, Tensor] = {}
    calls: dict[int, int] = {}
    _, blocks = blocks_of(causal(model).base_model)

    def keep(layer: int) -> Callable[..., None]:
        def hook(block: Any, given: Any, made: Any) -> None:
            outputs[layer] = made[0] if isinstance(made, tuple) else made

        return hook

    def called(layer: int) -> Callable[..., None]:
        def hook(part: Any, given: Any) -> None:
            calls[layer] = calls.get(layer, 0) + 1

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    handles += [next(block.children()).register_forward_pre_hook(called(layer)) for layer, block in enumerate(blocks)]
    yield outputs, calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_that_ends_early_gives_the_states_of_a_whole_one(name: str) -> None:
    """Bit for bit, on every architecture, and no layer above is called; with the top, states and logits of one pass."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    check_depth(model, (0,))
    check_depth(model, (0, 1))
    batch = lay_out(examples(0))
    with torch.no_grad():
        with listening(model) as (outputs, _):
            model(input_ids=batch.input_ids, use_cache=False)
            whole = {layer: one.flatten(0, 1)[batch.at] for layer, one in outputs.items()}
        top = score(Scorer(model), head_of(model), batch)
        for layers in ((0,), (1,), (0, 1), (TOP, 0)):
            with listening(model) as (_, calls):
                found = score(Scorer(model), head_of(model), batch, layers)
            deepest = 1 if TOP in layers else max(layers)
            assert calls == {layer: 1 for layer in range(deepest + 1)}
            for stream, part in batch.tokens.items():
                for layer in set(layers) - {TOP}:
                    assert torch.equal(found[stream].hidden(layer), whole[layer][part].float())
                if TOP in layers:
                    assert torch.equal(found[stream].logits, top[stream].logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
def test_layers_above_are_never_called(
    make_model: Callable[..., Any], adapter: bool, checkpointing: bool, layers: tuple[int, ...]
) -> None:
    """Neither forward nor backward; and the gradients are those of the same states of a whole run."""

    def made() -> Any:
        model = make_model(num_hidden_layers=4)
        model = add_adapter(model, Adapter(rank=4), seed=0) if adapter else model
        for name, weight in trainable(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            checkpoint_activations(model)
        return model.train()

    batch = lay_out(examples(3, vocabulary=1024))
    model, whole = made(), made()
    with listening(model) as (_, calls):
        found = Scorer(model)(batch.input_ids, batch.at, layers)
        torch.stack([(one**2).sum() for one in found.values()]).sum().backward()
    assert calls == {layer: 1 + checkpointing for layer in range(max(layers) + 1)}
    with listening(whole) as (outputs, _):
        whole(input_ids=batch.input_ids, use_cache=False)
        states = {layer: outputs[layer].flatten(0, 1)[batch.at] for layer in layers}
        torch.stack([(one**2).sum() for one in states.values()]).sum().backward()
    for layer in layers:
        assert torch.equal(found[layer], states[layer])
    for (name, weight), other in zip(trainable(model).items(), trainable(whole).values(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        if weight.grad is not None and other.grad is not None:
            assert torch.allclose(weight.grad, other.grad, rtol=1e-5, atol=1e-5), name
            assert not any(f"layers.{above}." in name for above in range(max(layers) + 1, 4)), name
    _, blocks = blocks_of(causal(model).base_model)
    assert len(blocks) == 4  # all of them are back


def test_a_layer_that_is_not_there_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with pytest.raises(Refused, match="layer 2 is not there: the decoder layers of this model are 0 to 1"):
        check_depth(model, (2,))
    batch = lay_out(examples(3, vocabulary=1024))
    assert torch.isfinite(score(Scorer(model), head_of(model), batch)["forget"].logps).all()  # and the model is whole


def test_what_no_loss_reaches_is_frozen(make_model: Callable[..., Any]) -> None:
    model = make_model(num_hidden_layers=3)
    freeze_unreached(model, (0, 1))
    names = list(trainable(model))
    assert "model.embed_tokens.weight" in names and "model.layers.1.mlp.down_proj.weight" in names
    assert not any(part in name for name in names for part in ("layers.2.", "lm_head", "model.norm"))


def test_an_unknown_head_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()

    class Halved(torch.nn.Module):
        config, device = model.config, model.device
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def get_output_embeddings(self) -> Any:
            return model.get_output_embeddings()

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            out = model(input_ids=input_ids, use_cache=use_cache)
            out.logits = out.logits / 2
            return out

    with pytest.raises(Refused, match=r"Halved: .* not supported"):
        check_head(Halved())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_one_token_ahead_is_refused(make_model: Callable[..., Any], dtype: torch.dtype) -> None:
    model = make_model().to(dtype).eval()
    check_head(model)
    model.model.layers[0].register_forward_hook(lambda layer, given, made: made + made.roll(-1, dims=1))
    with pytest.raises(Refused, match="its states depend on the tokens that follow"):
        check_head(model)


def test_rounding_in_one_sequence_is_allowed_in_lower_precision_only(make_model: Callable[..., Any]) -> None:
    model, states = make_model(), [torch.randn(9, 8) for _ in range(5)]
    one_differs = [states[0] + torch.randn(9, 8), *states[1:]]
    last_differs = [torch.cat([one[:-1], -one[-1:]]) for one in states]
    assert not trials._are_close(model, states, one_differs)
    assert trials._are_close(model.to(torch.bfloat16), states, one_differs)
    assert not trials._are_close(model, states, last_differs)


@pytest.mark.parametrize("rows", [1, 3, 10**6])
@pytest.mark.parametrize(
    "loss",
    [
        NLL(), Ascent(), IDK(), WGA(), SatImp(), TNPO(), WTNPO(), KL(), KL(direction="reverse"), Undial(), CEU(), CEU(skip=3),
        Entropy(), IHL(), Margin(), ELM(), NPO(), DPO(), AP(),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_change_neither_values_nor_gradients(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: int, loss: Any
) -> None:
    found = {}
    for chunk in (10**9, rows * 1024):
        monkeypatch.setattr(scores_module, "CHUNK", chunk)
        model, before = make_model(0), make_model(1)
        rows = [one for one in examples(3, vocabulary=1024) if one.stream == "retain"]
        others = [replace(one, stream="retain.alternate") for one in examples(8, vocabulary=1024) if one.stream == "retain"]
        prompted = [
            replace(one, ids=(*prefix, *one.ids), answer=one.answer + len(prefix), stream=beside("retain", kind))
            for kind, prefix in (("expert", (5, 6, 7)), ("novice", (8, 9)))
            for one in rows
        ]
        batch = lay_out([*rows, *others, *prompted])
        now = score(Scorer(model), head_of(model), batch)
        with torch.no_grad():
            ref = score(Scorer(before), head_of(before), batch)
        result = values(loss, now, ref, "retain")
        result.sum().backward()
        found[chunk] = (
            result.detach(),
            torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]),
        )
    whole, cut = found.values()
    assert torch.allclose(whole[0], cut[0], rtol=1e-5, atol=1e-6)
    few = 1e-4 if isinstance(loss, CEU) else 1e-5  # p less its teacher, which are all but equal where p(y) is small as here
    assert (whole[1] - cut[1]).norm() <= few * whole[1].norm()


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


def as_it_was_once(
    model: Any, needs: dict[str, Asked], rows: Sequence[Example] = (), seed: int = 0, way: str | None = None
) -> Reference:
    """Ask the model as it is now, later: its numbers taken now where there are rows, two of them at a time."""
    scorer, head, device = Scorer(model), head_of(model), torch.device("cpu")
    rows = [row for row in rows if row.stream in needs]
    batches = [list(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    wanted = {stream: asked for stream, asked in needs.items() if asked.run}
    if way == "copy":
        ask = frozen_copy(scorer, wanted, seed)
    elif way == "adapter_off" or not rows:
        ask = adapter_off(scorer, head, wanted, seed)
    else:
        asked = [[row for row in batch if row.stream in wanted] for batch in batches]
        kept = {(row.stream, row): found for row, found in taken(scorer, head, wanted, filter(None, asked), device)}
        ask = looked_up(kept, head, wanted, device, seed)
    read = {stream: asked for stream, asked in needs.items() if asked.centres}
    of_means = [[row for row in batch if row.stream in read] for batch in batches]
    return together([ask], centres(scorer, head, read, filter(None, of_means), device), head)


def test_the_adapter_switched_off_is_the_model_as_it_was(make_model: Callable[..., Any]) -> None:
    base, batch = make_model(), lay_out(examples(5, vocabulary=1024))
    before = score(Scorer(base), head_of(base), batch)["retain"].logits.detach()
    model = add_adapter(base, Adapter(rank=4), seed=0)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    ask = as_it_was_once(model, {"retain": Asked((TOP,))})
    moved = score(Scorer(model), head_of(model), batch)["retain"].logits
    assert not torch.allclose(moved, before, atol=1e-2)
    found = ask(batch)
    assert set(found) == {"retain"} and torch.equal(found["retain"].logits, before)
    with as_it_was(model):
        assert torch.equal(score(Scorer(model), head_of(model), batch)["retain"].logits, before)


@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj")], ids=["head", "head and layers"])
@pytest.mark.parametrize("way", ["adapter_off", "kept", "copy"])
def test_reference_reads_an_adapted_head_without_its_adapter(
    make_model: Callable[..., Any], way: str, targets: tuple[str, ...]
) -> None:
    base, rows = make_model(), examples(6, count=6, vocabulary=1024)
    batch = lay_out(rows)
    with torch.no_grad():
        then = score(Scorer(base), head_of(base), batch)
        logps, logits = then["forget"].logps, then["retain"].logits
    model = add_adapter(base, Adapter(rank=4, targets=targets), seed=0)
    ask = as_it_was_once(model, {"forget": Asked(logps=True), "retain": Asked((TOP,))}, rows, way=way)
    shaken(model)
    reference = ask(batch)
    assert torch.allclose(reference["forget"].logps, logps, atol=1e-5)
    assert torch.allclose(reference["retain"].logits, logits, atol=1e-4)
    assert not reference["forget"].logps.requires_grad, "a reference has no gradient"
    assert not torch.allclose(score(Scorer(model), head_of(model), batch)["forget"].logps, logps, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_numbers_taken_before_full_training_stay_the_model_as_it_was(make_model: Callable[..., Any], tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    rows = examples(6, count=9, vocabulary=1024)
    needs = {"forget": Asked(logps=True), "retain": Asked((TOP,))}
    ask = as_it_was_once(model, needs, rows)
    batch = lay_out([rows[i] for i in (4, 1, 7, 2, 0)])
    before = score(Scorer(model), head_of(model), batch)
    logps, logits = before["forget"].logps.detach(), before["retain"].logits.detach()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight)
    found = ask(batch)
    assert torch.allclose(found["forget"].logps, logps, atol=1e-5)
    assert found["forget"].given is not None and not found["forget"].states  # four bytes a token, and no states
    assert torch.allclose(found["retain"].logits, logits, atol=1e-4)
    assert not torch.allclose(score(Scorer(model), head_of(model), batch)["retain"].logits, logits, atol=1e-1)


def shaken(model: Any) -> None:
    with torch.no_grad():
        for weight in trainable(model).values():
            weight += torch.randn_like(weight)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_states_and_centres_of_the_model_as_it_was(make_model: Callable[..., Any], adapter: bool) -> None:
    """States of chosen layers, log-probabilities besides, and means over the examples: each of the streams that ask for it."""
    plain = make_model(num_hidden_layers=3)
    model = make_model(num_hidden_layers=3)
    model = add_adapter(model, Adapter(rank=4), seed=0) if adapter else model
    rows = examples(6, count=9, vocabulary=1024, streams=("forget", "retain", "forget.alternate"))
    needs = {
        "forget": Asked((0, 1), logps=True, centres=(1,)),
        "retain": Asked((1,)),
        "forget.alternate": Asked(centres=(1,)),
    }
    ask = as_it_was_once(model, needs, rows, seed=12)
    shaken(model)
    again = as_it_was_once(model, needs, rows, way="adapter_off") if adapter else ask
    batch = lay_out([rows[i] for i in (4, 0, 1, 2, 3, 7)])
    with torch.no_grad():
        then = score(Scorer(plain), head_of(plain), batch, (0, 1, TOP))
        every = score(Scorer(plain), head_of(plain), lay_out(rows), (1,))
    found = ask(batch)
    assert set(found) == set(needs)
    for layer in (0, 1):
        assert torch.allclose(found["forget"].hidden(layer), then["forget"].hidden(layer), atol=1e-5)
    assert torch.allclose(found["forget"].logps, then["forget"].logps, atol=1e-5)
    assert torch.allclose(found["retain"].hidden(1), then["retain"].hidden(1), atol=1e-5)
    assert found["forget"].seed == 12 and set(found["retain"].states) == {1}
    assert torch.equal(found["forget"].position, then["forget"].position)
    for stream in ("forget", "forget.alternate"):  # over every token of every example, whatever is in the batch
        assert torch.allclose(found[stream].centre(1), every[stream].hidden(1).mean(0), atol=1e-5)
        assert torch.allclose(again(batch)[stream].centre(1), found[stream].centre(1), atol=1e-5)


def test_statistics_over_a_large_vocabulary() -> None:
    """Sums over 128,256 tokens keep their digits."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 128256)
    head = Head(torch.nn.Identity(), 128256)
    none = torch.zeros(5, dtype=torch.long)
    found = statistics(Scores({TOP: logits}, torch.arange(5), none, none, 1, head, 2))
    logp = logits.double().log_softmax(-1)
    mean = (logp.exp() * logp).sum(-1)
    std = (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
    for mine, exact in zip((found.logp, found.mean, found.std), (logp.diagonal(), mean, std), strict=True):
        assert torch.allclose(mine.double(), exact, atol=3e-6, rtol=0)


def test_parts_of_scores_are_those_of_their_tokens(make_model: Callable[..., Any]) -> None:
    model, batch = make_model(), lay_out(examples(4, vocabulary=1024))
    with torch.no_grad():
        whole = score(Scorer(model), head_of(model), batch, (0, TOP), seed=3)["forget"]
        part = whole.rows(slice(2, 5))
        torch.testing.assert_close(part.logps, whole.logps[2:5], rtol=1e-6, atol=1e-6)  # fewer rows may be multiplied otherwise
        assert torch.equal(part.hidden(0), whole.hidden(0)[2:5])
        assert torch.equal(part.position, whole.position[2:5]) and part.seed == 3
        given = replace(whole, given=torch.arange(len(whole.targets)).float())
        assert given.logps.tolist() == list(range(len(whole.targets)))  # what was taken before goes before what would be computed
        assert given.rows(slice(2, 5)).logps.tolist() == [2, 3, 4]


def test_what_is_frozen_stays_so_when_the_adapter_is_switched_off_and_on(make_model: Callable[..., Any]) -> None:
    """Adapter weights above an early end, and the fixed counterpart that FILA brings."""
    model = add_adapter(make_model(num_hidden_layers=3), Adapter(rank=4), seed=0)
    freeze_unreached(model, (1,))
    begun = add_adapter(make_model(), Adapter(rank=4), seed=0)
    ones = {name: torch.ones_like(weight) for name, weight in fila.adapted_weights(begun).items()}
    fila.begin(begun, ones, ones)
    for one in (model, begun):
        names = list(trainable(one))
        with as_it_was(one), torch.no_grad():
            score(Scorer(one), head_of(one), lay_out(examples(4, vocabulary=1024)))
        assert list(trainable(one)) == names
    assert not any(fila.START in name for name in trainable(begun))
