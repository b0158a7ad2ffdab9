"""The passes against one call per answer; and that a table is kept under what it is made of, never under a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llm_unlearn.data.examples import spelling
from llm_unlearn.data.rendering import TurnEnd
from llm_unlearn.evaluation import passes
from llm_unlearn.evaluation.extraction import PrefixExtraction
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import EncodedSet, encode_set
from llm_unlearn.evaluation.tables import Tables
from llm_unlearn.models.load import Loaded
from llm_unlearn.source import Source

NEEDS = ("answer", "paraphrase", "perturbed", "generation")
SOURCE = Source(
    source="embedded:forget",
    prompt="question",
    answer="answer",
    paraphrase="paraphrased_answer",
    perturbed="perturbed_answer",
    limit=6,
)
KEEP = Source(source="embedded:general", prompt="question", answer="answer", limit=3)


@pytest.fixture(scope="module")
def sets(tokenizer: Any) -> dict[str, EncodedSet]:
    return {
        "forget": encode_set("forget", SOURCE, NEEDS, tokenizer),
        "general": encode_set("general", KEEP, ("answer",), tokenizer),
    }


def loaded(make_model: Callable[..., Any], tokenizer: Any, seed: int = 0) -> Loaded:
    return Loaded(make_model(seed), tokenizer, ("template", None, "float32", f"weights {seed}"))


def ask(model: Loaded, sets: dict[str, EncodedSet], batch_tokens: int = 300, cache: Path | None = None) -> Tables:
    return tables_of(model, sets, Accelerator(cpu=True), batch_tokens=batch_tokens, max_new_tokens=7, cache=cache)


def test_a_set_has_every_answer_once(sets: dict[str, EncodedSet]) -> None:
    forget = sets["forget"]
    assert len(forget.ids) == 6 and len(forget.examples) == 6 * (1 + 1 + 4)
    assert forget.row == sorted(forget.row)
    assert [forget.kind.count(kind) for kind in ("answer", "paraphrase", "perturbed")] == [6, 6, 24]
    assert len(sets["general"].examples) == 3


def test_likelihoods_equal_one_call_per_answer(make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]) -> None:
    model = loaded(make_model, tokenizer)
    table = ask(model, sets)["forget"]
    net = model.model.double()
    for a, example in enumerate(sets["forget"].examples):
        with torch.no_grad():
            logp = net(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1].log_softmax(-1)
        targets = torch.tensor(example.ids[example.answer :])
        part = slice(table.likelihood.start[a], table.likelihood.start[a + 1])
        mean = (logp.exp() * logp).sum(-1)
        assert np.allclose(table.likelihood.logp[part], logp.gather(-1, targets[:, None])[:, 0], atol=1e-5)
        assert np.array_equal(table.likelihood.hit[part], logp.argmax(-1) == targets)
        assert np.allclose(table.likelihood.mean[part], mean, atol=1e-5)
        assert np.allclose(table.likelihood.std[part], (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt(), atol=1e-4)
    assert list(table.likelihood.row) == sets["forget"].row and list(table.likelihood.kind) == sets["forget"].kind


def test_generations_equal_one_call_per_prompt(make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]) -> None:
    model = loaded(make_model, tokenizer)
    table = ask(model, sets)["forget"]
    answers = [example for example, kind in zip(sets["forget"].examples, sets["forget"].kind, strict=True) if kind == "answer"]
    for example, text in zip(answers, table.generated or [], strict=True):
        ids = list(example.ids[: example.answer])
        for _ in range(7):
            with torch.no_grad():
                ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == example.ids[-1]:
                break
        assert text == tokenizer.decode(ids[example.answer :], skip_special_tokens=True).strip()


def test_a_row_that_is_cut_does_not_end_the_others(make_model: Callable[..., Any], tokenizer: Any) -> None:
    """The last token of a row that is cut is an ordinary word, and ends no answer."""
    longest = max(len(example.ids) for example in encode_set("forget", SOURCE, ("answer",), tokenizer).asked)
    cut = encode_set("forget", replace(SOURCE, max_tokens=longest - 1), ("answer",), tokenizer)
    asked = sorted(range(len(cut.ids)), key=lambda row: -len(cut.asked[row].ids))
    first = replace(cut, examples=[cut.examples[row] for row in asked])
    end = first.end(tokenizer)
    assert len(first.asked[0].ids) == longest - 1 and first.asked[0].ids[-1] not in end.tokens
    assert end == TurnEnd(tokens=frozenset({tokenizer.eos_token_id})) == cut.end(tokenizer)


def test_models_with_one_tokenizer_share_what_it_encoded(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    assert spelling(other) == spelling(tokenizer)
    other.chat_template = str(other.chat_template) + " "
    assert spelling(other) != spelling(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["Kirunavaara"])
    assert spelling(other) != spelling(tokenizer)


def test_the_budget_changes_nothing(make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]) -> None:
    model = loaded(make_model, tokenizer)
    small, large = ask(model, sets, 40), ask(model, sets, 10**6)
    for name in sets:
        assert np.allclose(small[name].likelihood.logp, large[name].likelihood.logp, atol=1e-5)
        assert small[name].generated == large[name].generated


def test_tables_are_kept_by_content(
    make_model: Callable[..., Any],
    tokenizer: Any,
    sets: dict[str, EncodedSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, other = loaded(make_model, tokenizer, 0), loaded(make_model, tokenizer, 1)
    mine, theirs = ask(first, sets, cache=tmp_path), ask(other, sets, cache=tmp_path)
    assert not np.allclose(mine["forget"].likelihood.logp, theirs["forget"].likelihood.logp, atol=1e-2)
    assert len(list(tmp_path.iterdir())) == 6, "two models: likelihoods of two sets, generations of one"

    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked again")

    with monkeypatch.context() as patch:
        patch.setattr(passes, "likelihood_pass", nobody)
        again = ask(first, sets, cache=tmp_path)
        assert np.array_equal(again["forget"].likelihood.logp, mine["forget"].likelihood.logp)
        assert again["forget"].generated == mine["forget"].generated and again["general"].generated is None
        assert again["forget"].answers == mine["forget"].answers
        changed = {"forget": replace(sets["forget"], answers=["other", *sets["forget"].answers[1:]])}
        for asked in (
            lambda: ask(replace(first, parts=("changed",)), sets, cache=tmp_path),
            lambda: ask(first, changed, cache=tmp_path),
        ):
            with pytest.raises(AssertionError, match="asked again"):
                asked()


@pytest.mark.slow
def test_extraction_by_hits_is_extraction_by_generation(embedded: dict[str, Path], cache: Path) -> None:
    """Prefix extraction is read off teacher-forced choices; letting the model write gives the same verdict on every row."""
    from llm_unlearn.models.load import load
    from llm_unlearn.sections import Model

    for name in ("target", "retrained"):
        model = load(Model(base=str(embedded[name]), adapter=None), torch.device("cpu"))
        encoded = encode_set("forget", replace(SOURCE, limit=None), ("answer",), model.tokenizer)
        tables = ask(model, {"forget": encoded}, 8192)
        rows = PrefixExtraction(set="forget", prefix=4)(tables, None).rows
        assert rows is not None and len(rows) == 40
        for example, extracted in zip(encoded.examples, rows, strict=True):
            prompt = torch.tensor([example.ids[: example.answer + 4]])
            with torch.no_grad():
                written = model.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=example.targets - 4, do_sample=False
                )
            assert (tuple(written[0].tolist()) == example.ids) == bool(extracted)
