"""Texts that are written many at once are those that are written alone, without a cache, by the definition."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from golden import END, SHAPE, make_golden, make_words

from llm_unlearn.evaluation import desk, generation
from llm_unlearn.evaluation.generation import Ask, written
from llm_unlearn.models.decoding import Decoding, decoding_of
from llm_unlearn.models.load import Loaded

WIDE = SHAPE | {"head_dim": 4, "initializer_range": 0.6}
KINDS = {
    "llama": lambda: make_golden(),
    "sliding": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**WIDE, sliding_window=7)),
    "both": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**WIDE, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "states": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(**WIDE, mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=8, mamba_chunk_size=8)
    ),
}
"""By what their caches hold: all tokens, the last ones, layers of either kind, and states that cannot be cut."""


def make(kind: str) -> Loaded:
    torch.manual_seed(0)
    return Loaded(KINDS[kind]().eval(), make_words(), (kind,))


def many(temperature: float, count: int = 40) -> list[Ask]:
    """Prompts of 1 to 30 tokens, 1 to 40 to be written, some of which end at a word."""
    chance, asks = random.Random(0), []
    for i in range(count):
        prompt = tuple(chance.randrange(4, 64) for _ in range(chance.choice((1, 2, 3, 5, 9, 20, 30))))
        until = (make_words().decode(4 + i),) if i % 3 == 0 else ()
        limit, runs = chance.choice((1, 2, 5, 12, 30, 40)), frozenset({(20 + i % 9, 30)} if temperature else ())
        asks.append(Ask(prompt, frozenset({END}), limit, temperature, 0.01, seed=i, forbidden=runs, unfinished=True, until=until))
    return sorted(asks, key=lambda ask: -len(ask.prompt) - ask.limit)


def alone(loaded: Loaded, ask: Ask) -> tuple[list[int], bool]:
    """Token by token, the whole text read anew for each."""
    text = list[int]()
    numbers = torch.rand(99, generator=torch.Generator().manual_seed(ask.seed))
    while len(text) < ask.limit and not any(said in loaded.tokenizer.decode(text) for said in ask.until):
        logits = loaded.model(input_ids=torch.tensor([[*ask.prompt, *text]]), use_cache=False).logits[0, -1].float()
        if ask.temperature:
            for run in ask.forbidden:
                if tuple(text[len(text) - len(run) + 1 :]) == run[:-1]:
                    logits[run[-1]] = -torch.inf
            p = (logits / ask.temperature).softmax(-1) * (logits.softmax(-1) >= ask.floor * logits.softmax(-1).max())
            token = int((p.cumsum(-1) > numbers[len(text)] * p.sum() * (1 - 1e-6)).int().argmax())
        else:
            token = int(logits.argmax())
        if token == END:
            return text, True
        text.append(token)
    return text, False


@contextmanager
def watched(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of each call of a model."""
    calls = list[tuple[int, int]]()
    hook = model.register_forward_pre_hook(lambda _, __, named: calls.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def all_of(loaded: Loaded, asks: list[Ask], batch_tokens: int) -> list[tuple[list[int], bool]]:
    found = list(written(loaded, asks, batch_tokens, torch.device("cpu")))
    assert sorted(i for i, _, _ in found) == list(range(len(asks)))
    return [(text, ended) for _, text, ended in sorted(found)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_together_is_what_is_written_alone(kind: str, temperature: float) -> None:
    loaded, asks = make(kind), many(temperature, 16 if kind == "states" else 40)  # which is slow without its own kernels
    expected = [alone(loaded, ask) for ask in asks]
    lengths = {len(text) for text, _ in expected}
    assert len(lengths) > 5 and max(lengths) > 20, "very different ones"
    for batch_tokens in (10, 120, 400, 10**6):  # each alone, two or more at once, ten or more, all
        assert all_of(loaded, asks, batch_tokens) == expected


@pytest.mark.parametrize("kind", ["llama", "states"])
@torch.no_grad()
def test_a_batch_is_filled_up_where_what_was_computed_can_be_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make(kind)
    assert decoding_of(loaded.model) == Decoding(), "tried before calls are counted"
    asks = [replace(ask, prompt=ask.prompt * 2, limit=40, until=("n",) if i % 4 else ()) for i, ask in enumerate(many(0.0))]
    asks.sort(key=lambda ask: -len(ask.prompt))  # three of four end at their first word
    with watched(loaded.model) as calls:
        found = all_of(loaded, asks, 600)
    steps, read = len(calls), sum(rows for rows, tokens in calls if tokens > 1)
    monkeypatch.setattr(desk, "CUTTABLE", set())
    with watched(loaded.model) as calls:
        assert all_of(loaded, asks, 600) == found
    assert read == len(asks) and steps < 0.7 * len(calls) if kind == "llama" else steps == len(calls)


@torch.no_grad()
def test_no_batch_is_larger_than_its_budget_and_large_ones_are_not_filled_up_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asks, sizes = make("llama"), many(1.0, 80), list[tuple[int, int]]()
    write = generation._Writer.write

    def noted(writer: Any, here: desk.Desk, *given: Any, **named: Any) -> Any:
        after, found = write(writer, here, *given, **named)
        sizes.append((len(here.rows), max(writer.asks[i].limit + len(writer.asks[i].prompt) for i in here.rows)))
        assert here.ids.shape[1] < sizes[-1][1], "padding that none needs is cut off"
        return after, found

    monkeypatch.setattr(generation._Writer, "write", noted)
    filled = all_of(loaded, asks, 700)
    assert all(rows * widest <= 700 for rows, widest in sizes) and max(rows for rows, _ in sizes) > 10
    rounds = len(sizes)
    monkeypatch.setattr(generation, "MANY", 4)
    assert all_of(loaded, asks, 700) == filled and len(sizes) - rounds < rounds
