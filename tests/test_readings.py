"""What only some measures read off a model, against float64 by another road; and that each pass is made once and kept at once."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llm_unlearn.data.batch import lay_out
from llm_unlearn.evaluation import passes
from llm_unlearn.evaluation.kept import read_part, write_part
from llm_unlearn.evaluation.likelihood import Control
from llm_unlearn.evaluation.passes import tables_of
from llm_unlearn.evaluation.sets import EncodedSet, behind, encode_set
from llm_unlearn.evaluation.tables import Cut, Draws, Need, Neighbours, Sampler, Shots, Tables
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.readings import gradient_norm
from llm_unlearn.source import Source

SAMPLERS = (Sampler(0.7, None, 1.0), Sampler(1.0, 5, 1.0), Sampler(1.0, None, 0.6), Sampler(1.5, 50, 0.8))
SHOTS, DRAWS, NEIGHBOURS = Shots("holdout", 2), Draws(3, 0), Neighbours(7)
FORGET: tuple[Need, ...] = ("answer", "perturbed", "gradient", "distance", "keyword", "generation", Cut(3), SHOTS, DRAWS, *SAMPLERS)
QA = {"prompt": "question", "answer": "answer"}


@pytest.fixture(scope="module")
def sets(tokenizer: Any) -> dict[str, EncodedSet]:
    forget = Source(source="embedded:forget", perturbed="perturbed_answer", keyword="keyword", limit=4, **QA)
    holdout = Source(source="embedded:holdout", limit=5, **QA)
    return {
        "forget": encode_set("forget", forget, FORGET, tokenizer),
        "holdout": encode_set("holdout", holdout, ("answer", SHOTS), tokenizer),
    }


def loaded(make_model: Callable[..., Any], tokenizer: Any, seed: int = 0) -> Loaded:
    return Loaded(make_model(seed), tokenizer, ("template", None, "float32", f"weights {seed}"))


def ask(
    model: Loaded, sets: dict[str, EncodedSet], batch_tokens: int = 200, cache: Path | None = None,
    controls: dict[str, Control] | None = None, leave: dict[str, Control] | None = None,
) -> Tables:  # fmt: skip
    return tables_of(
        model, sets, Accelerator(cpu=True), batch_tokens=batch_tokens, max_new_tokens=6, cache=cache, controls=controls, leave=leave
    )


@pytest.fixture(scope="module")
def both(make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]) -> tuple[Loaded, Loaded, Tables, Tables]:
    """A model and the one it is compared with, and what each said."""
    model, other = loaded(make_model, tokenizer, 0), loaded(make_model, tokenizer, 1)
    controls: dict[str, Control] = {}
    theirs = ask(other, sets, leave=controls)
    assert set(controls) == {"forget"}
    return model, other, ask(model, sets, controls=controls), theirs


def logits(model: Loaded, ids: tuple[int, ...], answer: int) -> torch.Tensor:
    """(T, V) in float64, by the model's own forward pass."""
    with torch.no_grad():
        return copy.deepcopy(model.model).double()(input_ids=torch.tensor([ids])).logits[0, answer - 1 : -1]


def test_log_p_under_a_sampler_is_what_transformers_would_draw_from(
    both: tuple[Loaded, Loaded, Tables, Tables], sets: dict[str, EncodedSet]
) -> None:
    model, _, mine, _ = both
    answers = mine["forget"].likelihood.of("answer")
    cut_off = 0
    for sampler in SAMPLERS:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(sampler.temperature)])
        warpers += [TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []
        warpers += [TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []
        for found, example in zip(answers.split(answers.more[sampler]), sets["forget"].asked, strict=True):
            told = warpers(torch.zeros(1, 1), logits(model, example.ids, example.answer)).log_softmax(-1)
            expected = told.gather(-1, torch.tensor(example.ids[example.answer :])[:, None])[:, 0].numpy()
            assert np.allclose(found, expected, atol=1e-4)
            cut_off += int(np.isneginf(found).sum())
    assert cut_off > 10, "the cuts were put to the test"


def test_distances_are_those_of_both_models_whole_distributions(
    both: tuple[Loaded, Loaded, Tables, Tables], sets: dict[str, EncodedSet]
) -> None:
    model, other, mine, theirs = both
    answers = mine["forget"].likelihood.of("answer")
    kl, js = answers.split(answers.more["kl"]), answers.split(answers.more["js"])
    for row, example in enumerate(sets["forget"].asked):
        p, q = (logits(one, example.ids, example.answer).softmax(-1).numpy() for one in (other, model))
        middle = (p + q) / 2
        assert np.allclose(kl[row], (p * np.log(p / q)).sum(-1), rtol=1e-4)
        assert np.allclose(js[row], ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2, rtol=1e-4)
        assert (js[row] < np.log(2)).all()
    assert "kl" not in theirs["forget"].likelihood.more and "kl" not in mine["holdout"].likelihood.more
    wrong = mine["forget"].likelihood.of("perturbed")
    assert np.isnan(wrong.more["kl"]).all() and not np.isnan(wrong.logp).any()


def test_a_model_is_at_no_distance_from_itself_and_none_is_taken_to_one_with_other_tokens(
    make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet]
) -> None:
    model, controls = loaded(make_model, tokenizer), dict[str, Control]()
    ask(model, sets, leave=controls)
    same = ask(model, sets, controls=controls)["forget"].likelihood.of("answer")
    assert np.abs(same.more["kl"]).max() < 1e-6 and np.abs(same.more["js"]).max() < 1e-6
    larger = Loaded(make_model(0, vocabulary=1100), tokenizer, ("larger",))
    assert "kl" not in ask(larger, sets, controls=controls)["forget"].likelihood.more


def test_gradient_norms_equal_one_backward_pass_in_float64(
    both: tuple[Loaded, Loaded, Tables, Tables], sets: dict[str, EncodedSet]
) -> None:
    model, _, mine, _ = both
    assert "gradient" in mine["forget"].per_row and "gradient" not in mine["holdout"].per_row
    for found, example in zip(mine["forget"].per_row["gradient"], sets["forget"].asked, strict=True):
        net = copy.deepcopy(model.model).double()
        told = net(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1].log_softmax(-1)
        (-told.gather(-1, torch.tensor(example.ids[example.answer :])[:, None]).mean()).backward()
        expected = torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None]).norm()
        assert found == pytest.approx(float(expected), rel=1e-4)
    assert all(weight.requires_grad and weight.grad is None for weight in model.model.parameters()), "left as it was found"


def test_gradient_norms_with_an_adapter_are_those_of_the_merged_weights(
    make_model: Callable[..., Any], sets: dict[str, EncodedSet]
) -> None:
    """On the model's own weights: the adapter's must not count, and what was frozen stays so."""
    from llm_unlearn.models.load import add_adapter
    from llm_unlearn.sections import Adapter

    model = add_adapter(make_model(0), Adapter(), 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    asked = [weight.requires_grad for weight in model.parameters()]
    batch = lay_out(sets["forget"].asked[:1])
    found = gradient_norm(model, batch)
    assert [weight.requires_grad for weight in model.parameters()] == asked
    plain = gradient_norm(make_model(0), batch)
    assert found == pytest.approx(gradient_norm(copy.deepcopy(model).merge_and_unload(), batch), rel=1e-4)
    assert abs(found - plain) > 0.01 * plain


def test_losses_behind_other_rows_equal_one_call_per_row(
    both: tuple[Loaded, Loaded, Tables, Tables], sets: dict[str, EncodedSet]
) -> None:
    model, _, mine, _ = both
    first, second = (example.ids for example in sets["holdout"].asked[:2])
    for name in ("forget", "holdout"):
        for found, example in zip(mine[name].per_row[SHOTS], sets[name].asked, strict=True):
            ids = (*first, *second[second[0] == first[0] :], *example.ids[example.ids[0] == first[0] :])
            told = logits(model, ids, len(ids) - example.targets).log_softmax(-1)
            expected = -told.gather(-1, torch.tensor(example.ids[example.answer :])[:, None]).mean()
            assert found == pytest.approx(float(expected), abs=1e-5)
    texts = [one.ids for one in behind(SHOTS, sets["forget"], sets["holdout"])]
    assert all(ids.count(first[0]) == 1 for ids in texts), "one begin-of-text token"


def test_neighbours_are_the_likeliest_swaps_of_one_token(make_model: Callable[..., Any], tokenizer: Any) -> None:
    """Every swap of every token by its odds, in float64; the best seven scored one by one."""
    model, source = loaded(make_model, tokenizer), Source(source="embedded:forget", limit=4, **QA)
    asked = encode_set("forget", source, ("answer", NEIGHBOURS), tokenizer)
    mine = ask(model, {"forget": asked})["forget"].per_row[NEIGHBOURS]
    for found, example in zip(mine, asked.asked, strict=True):
        target = torch.tensor(example.ids[example.answer :])[:, None]
        told = logits(model, example.ids, example.answer).softmax(-1)
        odds = (told / (1 - told.gather(-1, target))).scatter(-1, target, 0)
        losses = []
        for place in odds.flatten().topk(NEIGHBOURS.n).indices.tolist():
            at, token = divmod(place, odds.shape[-1])
            ids = (*example.ids[: example.answer + at], token, *example.ids[example.answer + at + 1 :])
            swapped = torch.tensor(ids[example.answer :])[:, None]
            losses.append(-float(logits(model, ids, example.answer).log_softmax(-1).gather(-1, swapped).mean()))
        assert found == pytest.approx(np.mean(losses), abs=1e-5)


def test_samples_follow_the_model_and_not_the_batch(make_model: Callable[..., Any], tokenizer: Any) -> None:
    source = Source(source="embedded:forget", limit=2, **QA)
    draws = Draws(400, 7)
    encoded = {"forget": encode_set("forget", source, ("answer", draws), tokenizer)}
    model = loaded(make_model, tokenizer)
    found = ask(model, encoded, 4000)["forget"].samples[draws]
    assert found == ask(model, encoded, 30_000)["forget"].samples[draws]
    assert found[0] != found[1] and [len(texts) for texts in found] == [400, 400]
    one_token = tables_of(model, encoded, Accelerator(cpu=True), batch_tokens=4000, max_new_tokens=1, cache=None)["forget"]
    for texts, example in zip(one_token.samples[draws], encoded["forget"].asked, strict=True):
        p = logits(model, example.ids, example.answer)[0].softmax(-1).tolist()
        expected = Counter[str]()
        for token, share in enumerate(p):
            expected[tokenizer.decode([token], skip_special_tokens=True).strip()] += share  # type: ignore[assignment]
        counted = Counter(texts)
        for text, share in expected.most_common(8):
            assert abs(counted[text] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5, text
        rare = sum(share for _, share in expected.most_common()[8:])
        assert rare > 0.05 and len(counted) > 8, "nothing of the tail is cut off"


def test_texts_of_a_set(sets: dict[str, EncodedSet], tokenizer: Any) -> None:
    one = sets["forget"]
    assert one.keywords and all(
        len(spans) == 1 and spans[0] in truth for spans, truth in zip(one.keywords, one.answers, strict=True)
    )
    for cut, example, truth in zip(one.cut[Cut(3)], one.asked, one.answers, strict=True):
        assert truth.startswith(cut) and len(cut) < len(truth)
        assert cut == tokenizer.decode(example.ids[example.answer : example.answer + 3]).strip()


# ------------------------------------------------------------------------------------------------ once, and kept at once


def test_every_answer_is_scored_once_and_every_prompt_answered_once(
    make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public implementation scored the same rows 9.5 times and decoded the same prompts 7 times in one suite."""
    from llm_unlearn.evaluation import generation, likelihood

    scored, written = Counter[tuple[int, ...]](), Counter[str]()
    score, padded = likelihood.score, generation.padded

    def counting(scorer: Any, head: Any, batch: Any) -> Any:
        scored.update(example.ids for example in batch.examples)
        return score(scorer, head, batch)

    def counting_prompts(prompts: Any, pad: int, device: Any) -> Any:
        written.update(str(prompt) for prompt in prompts)
        return padded(prompts, pad, device)

    monkeypatch.setattr(likelihood, "score", counting)
    monkeypatch.setattr(generation, "padded", counting_prompts)
    ask(loaded(make_model, tokenizer), sets)
    own = [example.ids for one in sets.values() for example in one.examples]
    others = [example.ids for one in sets.values() for example in behind(SHOTS, one, sets["holdout"])]
    assert scored == Counter(own + others)
    assert set(written.values()) == {1 + DRAWS.n} and len(written) == 4


def test_a_killed_evaluation_goes_on_where_it_was(
    make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass over each set is kept as soon as it is done: what was done before the kill is not asked again."""
    model, whole = loaded(make_model, tokenizer), ask(loaded(make_model, tokenizer), sets)
    likelihood, asked = passes.likelihood_pass, list[int]()

    def until_the_second_set(loaded: Loaded, one: EncodedSet, *more: Any) -> Any:
        asked.append(len(one.ids))
        if len(one.ids) == 5 and len(asked) == 2:
            raise KeyboardInterrupt
        return likelihood(loaded, one, *more)

    monkeypatch.setattr(passes, "likelihood_pass", until_the_second_set)
    model.model.train()
    with pytest.raises(KeyboardInterrupt):
        ask(model, sets, cache=tmp_path)
    assert model.model.training, "left as it was found"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 5, "of the first set: likelihoods, greedy answers, gradients, answers behind others, samples"
    monkeypatch.setattr(passes, "generation_pass", lambda *_: pytest.fail("the model was asked again"))
    again = ask(model, sets, cache=tmp_path)
    assert asked == [4, 5, 5], "the first set was not scored again"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(list(tmp_path.iterdir())) == 7
    for name in sets:
        assert np.array_equal(again[name].likelihood.logp, whole[name].likelihood.logp)
        assert again[name].samples == whole[name].samples and again[name].generated == whole[name].generated


def test_another_models_parts_are_never_shown(
    make_model: Callable[..., Any], tokenizer: Any, sets: dict[str, EncodedSet], tmp_path: Path
) -> None:
    """Kept by name alone, a second model evaluated into the same folder would print the first one's numbers."""
    first, second = (ask(loaded(make_model, tokenizer, seed), sets, cache=tmp_path)["forget"] for seed in (0, 1))
    for need in ("gradient", SHOTS):
        assert not np.allclose(first.per_row[need], second.per_row[need], rtol=1e-2)
    assert first.samples != second.samples and first.generated != second.generated


def test_a_part_comes_back_as_it_was(tmp_path: Path) -> None:
    part = {"a": np.array([0.1, -np.inf, np.nan]), "kind": np.array(["answer"]), "texts": [["", "a\n"], ["ü"]]}
    write_part(part, tmp_path / "one.npz")
    back = read_part(tmp_path / "one.npz")
    assert np.array_equal(back["a"], part["a"], equal_nan=True) and list(back["kind"]) == ["answer"]
    assert back["texts"] == part["texts"] and [path.name for path in tmp_path.iterdir()] == ["one.npz"]
