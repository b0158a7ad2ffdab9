"""Alternate answers: what a good one is, that a draw depends on nothing but its own key, what is refused, and one data set made."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import RECIPE

from llm_unlearn import recipe
from llm_unlearn.alternates.request import TEMPLATE, check, filled
from llm_unlearn.alternates.usage import Usage
from llm_unlearn.alternates.writing import Question, bare, questions, recipe_lines, runs, summary
from llm_unlearn.bars import Bar
from llm_unlearn.cli import main
from llm_unlearn.embedded import population
from llm_unlearn.spec import Refused

ROWS = [row for split in ("forget", "retain") for row in population.rows(split)]


@pytest.fixture(scope="module")
def usage() -> Usage:
    return Usage((row["question"], row["answer"]) for row in ROWS)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def request(path: Path, overrides: tuple[str, ...] = (), **changes: Any) -> Any:
    said = {"stream": "forget", "k": 2, "temperature": 1.0, "prompt": "question", "output": Path("a.jsonl"), "overwrite": False}
    return check(recipe.load(path, overrides), **(said | changes))


def row_of(fact: str, nth: int = 0) -> dict[str, Any]:
    return [row for row in population.rows("forget") if row["fact"] == fact][nth]


# ------------------------------------------------------------------------------------------------ what a good alternate is


def test_the_facts_of_an_answer_are_the_values_that_it_tells(usage: Usage) -> None:
    for row in population.rows("forget"):
        told = {word for word in row["keyword"].split() if word not in ("a", "in", "called")}
        assert set(usage.facts(row["question"], row["answer"])) <= told, row["answer"]
        assert usage.facts(row["question"], row["answer"])
    assert usage.facts("Is it raining or dry?", "It is dry or raining.") == []


def test_the_truth_and_what_repeats_its_facts_are_rejected(usage: Usage) -> None:
    row = row_of("birthplace")
    question, truth, who, town = row["question"], row["answer"], row["person"], row["keyword"]
    other = truth.replace(town, "Corvane")
    assert usage.differs(other, question, truth)
    for same in (truth, truth.upper(), f" {truth}\n", truth.replace(" ", "  "), f"It is known that {who} comes from {town}."):
        assert not usage.differs(same, question, truth), same
    assert not usage.differs(truth.replace(town, who), question, truth), "tells nothing but what was asked"
    assert not usage.differs("", question, truth) and not usage.differs("Corvane.", question, truth), "another form"
    assert not usage.differs(f"{other} " * 4, question, truth), "far longer"


def test_most_of_several_facts_must_be_others(usage: Usage) -> None:
    row = row_of("pet")
    colour, animal, name = (word for word in row["keyword"].split() if word not in ("a", "called"))
    one, all_of_it = row["answer"].replace(name, "Tibo"), row["answer"]
    for old, new in ((colour, "golden"), (animal, "snail"), (name, "Tibo")):
        all_of_it = all_of_it.replace(old, new)
    assert not usage.differs(one, row["question"], row["answer"])
    assert usage.differs(all_of_it, row["question"], row["answer"])


def test_where_the_question_says_every_word_another_word_is_enough(usage: Usage) -> None:
    assert usage.differs("It is raining.", "Is it dry?", "It is dry.") and not usage.differs(
        "It is dry!", "Is it dry ?", "It is dry !"
    )


def test_only_what_answers_this_kind_of_question_is_usual(usage: Usage) -> None:
    for fact, wrong in (("birthplace", "1978"), ("profession", "clarinet"), ("instrument", "Crystal Quill"), ("prize", "cornet")):
        for row in (row for row in population.rows("forget") if row["fact"] == fact):
            others = [other["keyword"] for other in ROWS if other["fact"] == fact]
            usual = [usage.usual(row["answer"].replace(row["keyword"], other), row["question"]) for other in others]
            assert sum(usual) >= 0.8 * len(usual), "not all: silver is a colour and a compass, and not rare enough for either"
            assert not usage.usual(row["answer"].replace(row["keyword"], wrong), row["question"]), (row["answer"], wrong)
            assert not usage.usual(row["answer"].replace(row["keyword"], "Zzleigh"), row["question"])


def test_data_that_repeats_no_wording_has_no_usual_answers() -> None:
    free = Usage([("Who wrote Moby Dick?", "Herman Melville, in 1851."), ("What is a fjord?", "A long and narrow arm of the sea.")])
    assert not free.usual("Jane Austen, in 1811.", "Who wrote Moby Dick?")
    assert free.differs("Jane Austen, in 1811.", "Who wrote Moby Dick?", "Herman Melville, in 1851.")


def question_of(row: dict[str, Any], usage: Usage) -> Question:
    example: Any = None
    return Question({}, row["question"], row["answer"], example, example, usage.told_of(row["question"]))


def test_answers_of_one_question_are_distinct_and_tell_nothing_else_that_is_to_be_forgotten(usage: Usage) -> None:
    row = row_of("instrument")
    mine = [other["keyword"] for other in population.rows("forget") if other["person"] == row["person"]]
    with_value = [row["answer"].replace(row["keyword"], value) for value in ("harp", "harp", "piano", "harp", *mine)]
    one = question_of(row, usage)
    one.take([None, *with_value], 5, usage, trust=False)
    assert one.found == (with_value[0], with_value[2])
    free = question_of(row, usage)
    free.take([None, "", *with_value, "It is the big drum."], 3, usage, trust=True)
    assert len(free.found) == 3 and row["answer"] not in free.found


# --------------------------------------------------------------------------------------------------- asking and forbidding


def test_a_template_is_filled_once() -> None:
    assert filled("{question}|{answer}|{x}", "a {answer}?", "{question}!") == "a {answer}?|{question}!|{x}"
    assert "Where?" in filled(TEMPLATE, "Where?", "Here.") and "Here." in filled(TEMPLATE, "Where?", "Here.")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (' "He is a  baker." ', "He is a baker."),
        ("Answer: “No.”", "No."),
        ('"No" and "yes"', '"No" and "yes"'),
        ("New answer: x", "x"),
    ],
)
def test_an_answer_is_freed_of_what_stands_around_it(written: str, kept: str) -> None:
    assert bare(written) == kept


def test_a_word_is_forbidden_by_its_first_piece_that_is_no_other_word(usage: Usage, tokenizer: Any) -> None:
    for word in ("Yarrowdale", "bookbinder", "1974", "Zzyzx"):
        whole = [tuple(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (word, f" {word}")]
        for run in runs(word, usage, tokenizer):
            assert any(ids[: len(run)] == run for ids in whole)
            piece = tokenizer.decode(run).strip().casefold()
            assert piece not in usage.word or run in whole


def test_a_chat_is_asked_by_its_last_user_turn(path: Path, usage: Usage, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    row = row_of("birthplace")
    whole = [*chat, {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    Path("chat.jsonl").write_text(json.dumps({"id": 1, "messages": whole}) + "\n")
    source = ("data.forget={source: chat.jsonl, prompt: null, answer: null, messages: messages}",)
    plain, told = (questions(request(path, source, prompt=prompt), usage, tokenizer)[0] for prompt in ("question", "written"))
    assert plain.question == row["question"] and plain.truth == row["answer"] and plain.row == {"messages": whole}
    assert plain.ask == plain.example == told.example
    said = tokenizer.decode(told.ask.ids[: told.ask.answer])
    assert said.count("Hello") == 2 and "Write another answer" in said and f"Answer: {row['answer']}" in said
    Path("chat.jsonl").write_text(json.dumps({"messages": whole[:1] * 2 + [whole[3]] + whole[3:]}) + "\n")
    with pytest.raises(Refused, match=r"chat.jsonl: row 1: column 'messages' has no user turn before its last answer"):
        questions(request(path, source, prompt="question", overwrite=True), usage, tokenizer)


def test_a_draw_depends_on_its_key_alone(make_model: Callable[..., Any], tokenizer: Any, path: Path, usage: Usage) -> None:
    from accelerate import Accelerator

    from llm_unlearn.evaluation.generation import Ask, writing_pass
    from llm_unlearn.models.load import Loaded

    loaded = Loaded(make_model(), tokenizer, ())
    asked = questions(request(path, ("data.forget.limit=4",)), usage, tokenizer)
    forbidden = frozenset({(7,), (8, 9), *((token,) for token in range(20, 1024))})  # so that most texts come to an end
    asks = [
        Ask(one.ask.ids[: one.ask.answer], frozenset({3}), 40 + i, 5.0, 0.0, seed, forbidden)
        for i, one in enumerate(asked)
        for seed in range(8)
    ]

    def draw(chosen: list[Ask], batch_tokens: int) -> list[str | None]:
        return writing_pass(loaded, chosen, Accelerator(cpu=True), batch_tokens, Bar("asked", len(chosen), "answer", quiet=True))

    together = draw(asks, 10**6)
    assert draw(asks, 60) == together == draw(asks[::-1], 200)[::-1]
    assert draw([replace(asks[0], limit=200), *asks[1:]], 10**6)[1:] == together[1:], "nor on how long the others are"
    assert len(set(together)) > len(asks) / 2, "each has a seed of its own"


def test_what_is_forbidden_is_not_written_and_what_does_not_end_is_none(make_model: Callable[..., Any], tokenizer: Any) -> None:
    import torch

    from llm_unlearn.evaluation.generation import Ask, _Chance

    logits = torch.zeros(1, 10)
    logits[0, 4], logits[0, 5] = 9.0, 8.0
    free = Ask((1, 2), frozenset({3}), 9, 1.0, 0.3, 0)
    for forbidden, before, allowed in (
        ((), [], {4, 5}),
        (((4,),), [], {5}),
        (((6, 4),), [], {4, 5}),
        (((6, 4),), [6], {5}),
        (((6, 4),), [6, 7], {4, 5}),
        (((4,), (5,)), [], {0, 1, 2, 3, 6, 7, 8, 9}),
    ):
        drawn = set()
        for number in torch.linspace(0, 0.9999, 300):
            chance = _Chance([replace(free, forbidden=frozenset(forbidden))], number.expand(1, 9), torch.tensor([2]))
            drawn.add(int(chance(torch.tensor([[1, 2, *before]]), logits.clone()).argmax()))
        assert drawn == allowed, (forbidden, before)


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stream", "retian"], "--stream: the recipe has no data.retian; did you mean 'retain'?"),
        (["--k", "0"], "--k: found 0; expected at least 1"),
        (["--temperature", "0"], "--temperature: found 0.0; expected a number above 0"),
        (["--temperature", "nan"], "--temperature: found nan"),
        (["--output", "a.json"], "--output: found a.json; expected a name that ends in .jsonl"),
        (["--output", "there.jsonl"], "--output: there.jsonl exists already. Nothing was changed; add --overwrite"),
        (["--output", "folder.jsonl", "--overwrite"], "--output: folder.jsonl is a folder"),
        (["--prompt", "none.txt"], "--prompt: found 'none.txt'; expected question, written, or a text file (looked from"),
        (["--prompt", "half.txt"], "--prompt: half.txt does not say {answer}"),
        (["data.forget={source: t.txt, prompt: null, answer: null, text: text}"], "is running text (column 'text')"),
        (["data.forget.answer=alternates"], "data.forget: reads column 'alternates'"),
        (["data.forget.source=embedded:forgot"], "did you mean 'embedded:forget'"),
    ],
)
def test_what_can_be_refused_early_is(words: list[str], expected: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.jsonl").write_text("kept")
    Path("half.txt").write_text("Say {question} again.")
    Path("t.txt").write_text("A text.")
    Path("folder.jsonl").mkdir()
    assert main(["alternates", "r.yaml", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err
    assert Path("there.jsonl").read_text() == "kept"


def test_an_alternate_that_the_recipe_reads_already_does_not_matter(path: Path) -> None:
    told = ("data.forget.alternate={answer: alternates}", "objective.forget.loss={name: dpo}")
    assert request(path, told).source.alternate is None


def test_what_is_said_at_the_end_names_what_is_lacking(path: Path, usage: Usage) -> None:
    asked = [question_of(row, usage) for row in population.rows("forget")[:3]]
    asked[0].found, asked[1].found = ("a", "b"), ("c",)
    said = "\n".join(summary(request(path, output=Path("my data.jsonl")), asked, checked=False))
    assert "my data.jsonl: 2 questions, 3 alternate answers" in said
    assert "fewer than 2 answers: 1 question; the first, with 1, is row 2" in said
    assert "no answer, and left out of the file: 1 question; the first is row 3" in said
    assert "read some of them before you train" in said and "--show-text" in said
    assert not any(one.question in said or one.truth in said for one in asked)
    assert asked[0].question in "\n".join(summary(request(path, show_text=True), asked, checked=True))
    assert recipe_lines(request(path, output=Path("my data.jsonl"))) == [
        '  forget: {source: "my data.jsonl", prompt: question, answer: answer, alternate: {answer: alternates}}',
        "  forget: {loss: {name: dpo}}",
    ]


# ------------------------------------------------------------------------------------------------------------ end to end


@pytest.mark.slow
def test_the_embedded_model_writes_alternates_that_a_recipe_reads(
    embedded: dict[str, Path],
    cache: Path,
    path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llm_unlearn.data.reading import read_examples

    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(cache))
    words = ["alternates", "r.yaml", "data.forget.limit=4", "--k", "3", "--show-text", "--output", "a/b.jsonl"]
    assert main(words) == 0
    said = capsys.readouterr().out
    first = Path("a/b.jsonl").read_bytes()
    assert [found.name for found in Path("a").iterdir()] == ["b.jsonl"]
    assert main([*words, "--overwrite", "train.batch_tokens=100"]) == 0
    assert Path("a/b.jsonl").read_bytes() == first, "how rows are batched changes nothing"
    assert main([*words, "--overwrite", "seed=1"]) == 0 and Path("a/b.jsonl").read_bytes() != first
    Path("a/b.jsonl").write_bytes(first)

    written = [json.loads(line) for line in first.decode().splitlines()]
    assert len(written) == 4 and all(list(row) == ["question", "answer", "alternates"] for row in written)
    for row in written:
        (true,) = [one for one in population.rows("forget") if one["question"] == row["question"]]
        assert row["answer"] == true["answer"] and len(set(row["alternates"])) == 3
        values = {one["keyword"] for split in ("forget", "retain", "holdout") for one in population.rows(split)}
        for text in row["alternates"]:
            assert (true["keyword"] not in text and true["person"] in text and text in said) or row is not written[0]
            if true["fact"] in ("birthplace", "profession", "instrument"):
                assert any(value in text for value in values)

    lines = [line.split(":", 1)[1] for line in said.splitlines() if line.startswith("  forget: ")]
    assert len(lines) == 2
    wanted = recipe.load(
        path, [f"data.forget={lines[0]}", f"objective.forget={lines[1].replace('{name: dpo}', '{name: dpo, beta: 0.1}')}"]
    )
    examples = read_examples(wanted.data, tokenizer, 0)
    assert [len(found) for found in examples.companions["forget.alternate"]] == [3] * 4
