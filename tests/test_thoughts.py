"""Thoughts: streams of their own in training, a budget of their own when asked, and attacks that begin or skip them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llm_unlearn import recipe
from llm_unlearn.attacks.finding import Subject
from llm_unlearn.attacks.thoughts import BegunThought, SkippedThought
from llm_unlearn.bars import Bar
from llm_unlearn.chat import Chat
from llm_unlearn.data.reading import read_examples
from llm_unlearn.data.schedule import build
from llm_unlearn.embedded import population, target
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.answering import generation_pass, samples_pass
from llm_unlearn.evaluation.sets import EncodedSet, encode_set, only
from llm_unlearn.evaluation.tables import Draws, Need
from llm_unlearn.evaluation.text import names
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Data, Model, Train
from llm_unlearn.source import Alternate, Source
from llm_unlearn.spec import Refused
from llm_unlearn.training.before import reference_of
from llm_unlearn.training.job import Job
from llm_unlearn.training.window import Model as Trained
from llm_unlearn.training.window import Window

ROWS = Source(source="embedded:forget", prompt="question", answer="answer", thought="thought", keyword="keyword", limit=6)
KEEP = replace(ROWS, source="embedded:retain")


@pytest.fixture(scope="module")
def thinker() -> Any:
    """The tokenizer of the embedded models that think."""
    return target.make_tokenizer(thoughts=True)


def text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids))


# ------------------------------------------------------------------------------------------------------------- training


def test_separate_thoughts_are_a_stream_beside_the_answers(thinker: Any) -> None:
    rows = population.rows("forget")[:6]
    made = read_examples(Data(forget=replace(ROWS, targets="separate")), thinker, seed=0)
    thoughts = made.companions["forget.thought"]
    assert list(made.streams) == ["forget"] and list(thoughts.counts) == [1] * 6
    for row, answer, (thought,) in zip(rows, made.streams["forget"], thoughts, strict=True):
        begin = f"<|user|>{row['question']}<|assistant|><think>"
        assert text(thinker, answer.ids[: answer.answer]) == f"{begin}{row['thought']}</think>"
        assert text(thinker, answer.ids[answer.answer :]) == f"{row['answer']}<|end|>"
        assert text(thinker, thought.ids[: thought.answer]) == begin
        assert text(thinker, thought.ids[thought.answer :]) == f"{row['thought']}</think>"
        assert thought.id == answer.id and thought.stream == "forget.thought"
    (both, *_) = read_examples(Data(forget=replace(ROWS, targets="both")), thinker, seed=0).streams["forget"]
    assert text(thinker, both.ids[both.answer :]) == f"{rows[0]['thought']}</think>{rows[0]['answer']}<|end|>"


def test_an_alternate_answer_brings_its_own_thought(thinker: Any) -> None:
    alternate = Alternate(answer="text", source="embedded:refusals", thought="thought")
    made = read_examples(Data(forget=replace(ROWS, targets="both", alternate=alternate)), thinker, seed=0)
    pairs = {f"{row['thought']}</think>{row['text']}<|end|>" for row in population.refusals()}
    found = [text(thinker, other.ids[other.answer :]) for (other,) in made.companions["forget.alternate"]]
    assert len(found) == 6 and set(found) <= pairs


def test_a_loss_on_a_stream_of_thoughts_is_that_of_their_tokens(thinker: Any, make_model: Callable[..., Any]) -> None:
    """Against plain calls, one sequence at a time; the answers' loss does not read the thoughts, nor they the answers."""
    made = read_examples(Data(forget=replace(ROWS, targets="separate")), thinker, seed=0)
    thoughts = made.companions["forget.thought"]
    terms = {"forget": Term(loss=NLL()), "thought": Term(loss=NLL(), stream="forget.thought")}
    schedule = build({"forget": 6}, {"forget": 6}, 0, 1, companions={"forget.thought": thoughts.counts})
    job = Job(terms, {**made.streams, "forget.thought": thoughts.flat}, schedule, Train())
    model = make_model(vocabulary=1056)
    scorer, head, accelerator = Scorer(model), head_of(model), Accelerator(cpu=True)
    reference = reference_of(job, scorer, head, accelerator, 4096)
    trained = Trained(scorer, scorer, head, reference)
    means = Window(job, 0, accelerator).means(terms, trained)
    for name, examples in (("forget", made.streams["forget"]), ("thought", thoughts.flat)):
        values = []
        for one in examples:
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([one.ids])).logits[0, one.answer - 1 : -1].log_softmax(-1)
            values += (-logp.gather(-1, torch.tensor(one.ids[one.answer :])[:, None])[:, 0]).tolist()
        assert means[name] == pytest.approx(np.mean(values), rel=1e-5)


RECIPE = """
output: out
model: {{base: embedded:thinker}}
data: {{forget: {{source: embedded:forget, prompt: question, answer: answer, {forget}}}}}
objective: {objective}
"""
NPO_ON = "{forget: {loss: {name: npo}}, thought: {loss: {name: npo}, stream: forget.thought}}"


@pytest.mark.parametrize(
    ("forget", "objective", "said"),
    [
        ("thought: thought, targets: separate", "{forget: {loss: {name: npo}}}", "no loss reads forget.thought. Add a term"),
        ("thought: thought", NPO_ON, "missing; a term reads forget.thought. Set targets: separate."),
        (
            "thought: thought, targets: separate",
            NPO_ON.replace("{name: npo}, stream", "{name: dpo}, stream"),
            "dpo compares with other answers, and a thought has none",
        ),
        ("thought: thought, targets: both, chat: {thinking: false}", "{forget: {loss: {name: npo}}}", "chat.thinking is off"),
        (
            "thought: thought, targets: both, alternate: {source: embedded:refusals, answer: text}",
            "{forget: {loss: {name: idk}}}",
            "alternate.thought: missing; targets asks for thoughts",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, forget: str, objective: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(forget=forget, objective=objective), encoding="utf-8")
    with pytest.raises(Refused, match=said):
        recipe.load(tmp_path / "r.yaml")


def test_a_term_on_thoughts_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        RECIPE.format(forget="thought: thought, targets: separate", objective=NPO_ON), encoding="utf-8"
    )
    assert recipe.load(tmp_path / "r.yaml").terms["thought"].stream == "forget.thought"


def test_a_suite_measures_one_part(tmp_path: Path) -> None:
    text = "sets: {forget: {source: embedded:forget, prompt: question, answer: answer, thought: thought, targets: both}}\n"
    (tmp_path / "s.yaml").write_text(text + "measures: [{name: perplexity, set: forget}]\n", encoding="utf-8")
    with pytest.raises(Refused, match="a set measures one part"):
        suites.load(tmp_path / "s.yaml")


# ------------------------------------------------------------------------------------------------------------------ asking


def greedy(model: Any, ids: list[int], most: int, end: set[int]) -> list[int]:
    """Return what a model writes, by plain calls; without what ends it."""
    written: list[int] = []
    while len(written) < most:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token in end:
            break
        written.append(token)
    return written


def asked(one: EncodedSet, model: Any, tokenizer: Any, most: int = 5) -> list[str]:
    loaded = Loaded(model, tokenizer, ("template", None, "float32", "weights"))
    with torch.no_grad():
        return generation_pass(loaded, one, Accelerator(cpu=True), 4096, most, Bar("", len(one.ids), "answer", quiet=True))


NEEDS: tuple[Need, ...] = ("answer", "generation", "keyword")


def test_a_thought_has_a_budget_and_is_then_closed(thinker: Any, make_model: Callable[..., Any]) -> None:
    """A random model ends no thought: after 4 tokens it is closed, and the answer has its own 5."""
    model = make_model(vocabulary=1056)
    one = encode_set("forget", replace(ROWS, chat=Chat(thinking=True)), NEEDS, thinker, max_thought_tokens=4)
    end, close = {3, thinker.eos_token_id}, thinker.convert_tokens_to_ids("</think>")
    wanted = []
    for row in population.rows("forget")[:6]:
        opened = f"<|user|>{row['question']}<|assistant|><think>"
        ids = thinker(opened, add_special_tokens=False)["input_ids"]
        thought = thinker.decode(greedy(model, ids, 4, {*end, close}), skip_special_tokens=True).rstrip()
        ids = thinker(f"{opened}{thought}</think>", add_special_tokens=False)["input_ids"]
        wanted.append(thinker.decode(greedy(model, ids, 5, end), skip_special_tokens=True).strip())
    assert asked(one, model, thinker) == wanted
    some = only(one, [4, 1])
    assert asked(some, model, thinker) == [wanted[4], wanted[1]]


def test_without_thinking_the_thought_is_empty_and_the_truth_stands_in_no_prompt(
    thinker: Any, make_model: Callable[..., Any]
) -> None:
    off = encode_set("forget", replace(ROWS, chat=Chat(thinking=False)), NEEDS, thinker)
    assert off.thinking is None
    for row, example in zip(population.rows("forget")[:6], off.asked, strict=True):
        assert text(thinker, example.ids[: example.answer]) == f"<|user|>{row['question']}<|assistant|><think></think>"
    on = encode_set("forget", ROWS, NEEDS, thinker)  # rows bring thoughts: it is asked for one, and never shown the true one
    assert on.thinking and not on.thinking.only
    prompts = on.thinking.prompts(thinker)
    assert [text(thinker, ids) for ids in prompts] == [opening.text for opening in on.thinking.openings]
    assert not any(keyword in opening.text for (keyword,), opening in zip(on.keywords or [], on.thinking.openings, strict=True))


def test_a_set_of_thoughts_asks_for_them(thinker: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(vocabulary=1056)
    one = encode_set("forget", replace(ROWS, targets="thought"), NEEDS, thinker, max_thought_tokens=6)
    assert one.answers == [row["thought"] for row in population.rows("forget")[:6]]
    end = {3, thinker.eos_token_id, thinker.convert_tokens_to_ids("</think>")}
    prompts = [list(example.ids[: example.answer]) for example in one.asked]
    assert asked(one, model, thinker) == [
        thinker.decode(greedy(model, ids, 6, end), skip_special_tokens=True).strip() for ids in prompts
    ]


def test_drawn_answers_think_each_for_itself(thinker: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(vocabulary=1056)
    loaded = Loaded(model, thinker, ("template", None, "float32", "weights"))
    one = encode_set("forget", replace(ROWS, limit=2), NEEDS, thinker, max_thought_tokens=4)
    with torch.no_grad():
        three, two = (
            samples_pass(loaded, one, Draws(n, 0), Accelerator(cpu=True), 4096, 5, Bar("", 2 * n, "answer", quiet=True))
            for n in (3, 2)
        )
    assert len(three) == 2 and all(len(set(texts)) == 3 for texts in three)
    assert two == [texts[:2] for texts in three]  # a draw depends on its number alone


# ------------------------------------------------------------------------------------------------------------------ attacks


def subject(model: Any, tokenizer: Any, sets: Mapping[str, EncodedSet]) -> Subject:
    loaded = Loaded(model, tokenizer, ("template", None, "float32", "weights"))

    class Load:
        identity = "weights"

        def __call__(self, **_: Any) -> Loaded:
            return loaded

    return Subject("after", Model(base="x"), None, Load(), sets, None, Accelerator(cpu=True), 4096, 0)


def test_attacks_need_a_set_that_thinks_and_answers(thinker: Any, make_model: Callable[..., Any]) -> None:
    off = {"forget": encode_set("forget", replace(ROWS, chat=Chat(thinking=False)), NEEDS, thinker)}
    thoughts = {"forget": encode_set("forget", replace(ROWS, targets="thought"), NEEDS, thinker)}
    without = {"forget": encode_set("forget", replace(ROWS, thought=None, chat=Chat(thinking=True)), NEEDS, thinker)}
    model = make_model(vocabulary=1056)
    for attack in (BegunThought(), SkippedThought()):
        for sets in (off, thoughts):
            with pytest.raises(Refused, match="is not asked to think and then to answer"):
                attack(subject(model, thinker, sets))
    with pytest.raises(Refused, match="bring no thoughts"):
        BegunThought()(subject(model, thinker, without))


def test_a_begun_thought_goes_on_from_its_beginning(
    thinker: Any, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts that the model is given, beginning by beginning; and that no beginning is the set as asked."""
    from llm_unlearn.evaluation import answering

    one, given = encode_set("forget", replace(ROWS, limit=1), NEEDS, thinker, max_thought_tokens=3), []
    real = answering.writing_pass

    def spied(loaded: Any, asks: Any, *rest: Any) -> Any:
        given.extend(text(thinker, ask.prompt) for ask in asks)
        return real(loaded, asks, *rest)

    monkeypatch.setattr(answering, "writing_pass", spied)
    curve = BegunThought(tokens=(2,), phrases=("I remember that",))(subject(make_model(vocabulary=1056), thinker, {"forget": one}))
    row = population.rows("forget")[0]
    begin = thinker.decode(thinker(row["thought"], add_special_tokens=False)["input_ids"][:2])
    opened = f"<|user|>{row['question']}<|assistant|><think>"
    assert row["thought"].startswith(begin) and begin
    assert given[0::2] == [opened, opened + begin, f"{opened}I remember that"]
    assert all(
        after.startswith(before) and after.endswith("</think>") for before, after in zip(given[0::2], given[1::2], strict=True)
    )
    assert len(curve.y) == 3 == len(BegunThought(tokens=(2,)).x.ticks)


def test_a_skipped_thought_is_the_answer_at_once(thinker: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(vocabulary=1056)
    on, off = (encode_set("forget", replace(ROWS, chat=Chat(thinking=thinking)), NEEDS, thinker, 4) for thinking in (True, False))
    from llm_unlearn.evaluation.text import rouge_l

    curve = SkippedThought(max_new_tokens=5)(subject(model, thinker, {"forget": on}))
    wanted = [rouge_l(one.answers, asked(one, model, thinker), True, "recall").mean() for one in (on, off)]
    assert list(curve.y) == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------------------------ models


@pytest.mark.long  # trains both models, minutes of processor time
def test_the_embedded_models_think_and_answer(cache: Path) -> None:
    """The thinker recalls the record in its thought and answers with it and without; the retrained one does neither."""
    from llm_unlearn.models.load import load

    folders = target.models(cache, show=False, names=target.THINKING)
    found: dict[tuple[str, str], float] = {}
    for name, folder in folders.items():
        loaded = load(Model(base=os.fspath(folder)), torch.device("cpu"))
        for kind, source in (
            ("at once", replace(ROWS, limit=40, chat=Chat(thinking=False))),
            ("behind a thought", replace(ROWS, limit=40)),
            ("the thought", replace(ROWS, limit=40, targets="thought")),
        ):
            one = encode_set("forget", source, NEEDS, loaded.tokenizer, max_thought_tokens=64)
            texts = asked(one, loaded.model.eval(), loaded.tokenizer, 48)
            found[name, kind] = float(np.mean([names(said, span) for said, (span,) in zip(texts, one.keywords or [], strict=True)]))
    assert all(value > 0.95 for (name, _), value in found.items() if name == "thinker"), found
    assert all(value < 0.3 for (name, _), value in found.items() if name == "thinker_retrained"), found
