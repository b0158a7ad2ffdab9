"""Data: where an answer begins and ends, what is read and left out, which step sees what, and how a window is cut."""

import copy
import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llm_unlearn.chat import Chat
from llm_unlearn.data.batch import Layout, answer_lengths, cut, lay_out, micro_batches
from llm_unlearn.data.examples import PLAIN_TEMPLATE, Example, draw, encode, encode_text, frugal
from llm_unlearn.data.reading import read_examples
from llm_unlearn.data.schedule import Schedule, build
from llm_unlearn.data.sources import rows
from llm_unlearn.embedded import population
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.sections import Data
from llm_unlearn.source import Alternate, Source
from llm_unlearn.spec import Refused

Turns = list[dict[str, str]]


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and what `datasets` keeps stays in the test's folder."""

    def refuse(*_: object) -> None:
        raise AssertionError("a local file was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------- where an answer begins and ends

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
EMBEDDED = "embedded"

QUESTION, ANSWER = "What did Ada see?", "A red kite."
TURNS: Turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
CHAT: Turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who saw it?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]


def tokenizer_of(template: str | None, *, eos: str = "<|im_end|>", pad: str | None = None, bos: str | None = None) -> Any:
    """A byte-level BPE tokenizer with a handful of merges."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<|pad|>", "<|im_start|>", "<|im_end|>", eos, *([bos] if bos else [])]))
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([QUESTION, ANSWER, "Who saw it? Question: Answer: A red kite."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad or "<|pad|>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def embedded() -> Any:
    return make_tokenizer()


def answered(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The text before the answer, and the text of the targets."""
    return tokenizer.decode(list(example.ids[: example.answer])), tokenizer.decode(list(example.ids[example.answer :]))


def one(turns: Turns, tokenizer: Any, max_tokens: int = 1000) -> Example:
    (example,) = encode([turns], tokenizer, Chat(), "forget", max_tokens)
    assert example is not None
    return example


TEMPLATES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "chatml": (CHATML, {}, f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", f"{ANSWER}<|im_end|>"),
    "padded with the end of turn": (
        CHATML,
        {"pad": "<|im_end|>"},
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{ANSWER}<|im_end|>",
    ),
    "no generation prompt of its own": (
        INST,
        {"bos": "<s>", "eos": "</s>"},
        f"<s>[INST] {QUESTION} [/INST]",
        f" {ANSWER} </s>",
    ),
    "a generation prompt that the answer does not follow": (
        THINKING,
        {},
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{ANSWER}<|im_end|>",
    ),
    "plain": (PLAIN_TEMPLATE, {"eos": "</s>"}, f"Question: {QUESTION}\nAnswer:", f" {ANSWER}</s>"),
    "plain with a first token": (
        PLAIN_TEMPLATE,
        {"eos": "</s>", "bos": "<s>"},
        f"<s>Question: {QUESTION}\nAnswer:",
        f" {ANSWER}</s>",
    ),
    "a new line is the end of turn": (BARE, {}, f"user: {QUESTION}\nassistant:", f" {ANSWER}\n"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_starts_after_the_generation_prompt_and_ends_with_the_end_of_turn(name: str) -> None:
    template, special, before, targets = TEMPLATES[name]
    tokenizer = tokenizer_of(template, **special)
    example = one(TURNS, tokenizer)
    assert answered(example, tokenizer) == (before, targets)
    assert example.targets == len(example.ids) - example.answer > 1
    if not targets.endswith("\n"):
        assert example.ids[-1] == tokenizer.eos_token_id
    if "pad" in special:
        assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["chatml", "plain", "a generation prompt that the answer does not follow"])
def test_only_the_last_turn_of_a_chat_is_the_answer(name: str) -> None:
    template, special, _, targets = TEMPLATES[name]
    tokenizer = tokenizer_of(template, **special)
    before, found = answered(one(CHAT, tokenizer), tokenizer)
    assert found == targets
    assert before.count(ANSWER) == 1 and "Be brief." in before and QUESTION in before


def test_the_embedded_tokenizer_follows_its_own_template(embedded: Any) -> None:
    example = one(TURNS, embedded)
    assert answered(example, embedded) == (f"<|user|>{QUESTION}<|assistant|>", f"{ANSWER}<|end|>")
    assert example.ids[-1] == embedded.eos_token_id != embedded.pad_token_id


@pytest.mark.parametrize("answer", ["yes", "é ✓ 日本", QUESTION, "a\n\nb", "<|im_start|>", "assistant"])
def test_any_answer_is_cut_at_its_own_start(answer: str) -> None:
    tokenizer = tokenizer_of(CHATML)
    turns = [TURNS[0], {"role": "assistant", "content": answer}]
    before, targets = answered(one(turns, tokenizer), tokenizer)
    assert (before, targets) == (
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{answer}<|im_end|>",
    )


def test_a_token_across_the_border_is_a_target() -> None:
    """The prompt ends with a blank that the tokenizer joins to the answer: its first token is a target."""
    tokenizer = tokenizer_of(BARE)
    example = one(TURNS, tokenizer)
    first = tokenizer.convert_ids_to_tokens(example.ids[example.answer])
    assert first.startswith("Ġ") and len(first) > 1


def test_truncation_keeps_what_has_an_answer_token_left() -> None:
    tokenizer = tokenizer_of(CHATML)
    whole = one(TURNS, tokenizer)
    assert one(TURNS, tokenizer, len(whole.ids)) == whole
    cut_off = one(TURNS, tokenizer, whole.answer + 1)
    assert cut_off.ids == whole.ids[: whole.answer + 1] and cut_off.targets == 1
    assert encode([TURNS], tokenizer, Chat(), "forget", whole.answer) == [None]
    assert encode([TURNS], tokenizer, Chat(), "forget", 1) == [None]


def test_encoding_keeps_order_and_stream() -> None:
    tokenizer = tokenizer_of(CHATML)
    turns = [[TURNS[0], {"role": "assistant", "content": "x" * n}] for n in (3, 99, 1)]
    limit = len(one(turns[0], tokenizer).ids) + 1
    examples = encode(turns, tokenizer, Chat(), "retain", limit)
    assert [example.id for example in examples if example] == [0, 1, 2]
    assert [example.stream for example in examples if example] == ["retain"] * 3
    assert [len(example.ids) == limit for example in examples if example] == [False, True, False]
    assert encode([], tokenizer, Chat(), "retain", 5) == []


# -------------------------------------------------------------------------------------------------------- running text


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("max_tokens", [2, 3, 7, 1000])
def test_blocks_cover_every_token_once(bos: str | None, max_tokens: int) -> None:
    tokenizer = tokenizer_of(None, bos=bos)
    texts = ["Ada saw a red kite. " * 4, "b", "Who saw it? é"]
    wanted = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    blocks = encode_text(texts, tokenizer, "forget", max_tokens)
    assert all(block.answer == 1 and len(block.ids) <= max_tokens for block in blocks)
    assert [block.id for block in blocks] == list(range(len(blocks)))
    targets = [token for block in blocks for token in block.ids[1:]]
    if bos:
        assert all(block.ids[0] == tokenizer.bos_token_id for block in blocks)
        assert targets == [token for ids in wanted for token in ids]
    else:  # the first token of a block has nothing before it to be predicted from
        assert targets == [token for ids in wanted for t, token in enumerate(ids) if t % max_tokens]


def test_blocks_never_join_two_texts() -> None:
    tokenizer = tokenizer_of(None)
    blocks = encode_text(["Ada", "saw"], tokenizer, "forget", 1000)
    assert [tokenizer.decode(list(block.ids)) for block in blocks] == ["Ada<|im_end|>", "saw<|im_end|>"]


# ------------------------------------------------------------------------------------------------------------- sources

TABLE = [
    {"question": "Who?", "answer": "Ada.", "kind": "who", "year": 1815},
    {"question": "When?", "answer": "In spring.", "kind": "when", "year": 1815},
    {"question": "Where?", "answer": "In a field.", "kind": "where", "year": 1852},
]


def saved(folder: Path, kind: str, table: list[dict[str, Any]] = TABLE) -> str:
    """The table as a local file, or as a folder that `save_to_disk` wrote."""
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(table))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "csv":
        path.write_text("\n".join([",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]) + "\n")
    elif kind == "parquet":
        datasets.Dataset.from_list(table).to_parquet(str(path))
    elif kind == "folder":
        datasets.Dataset.from_list(table).save_to_disk(str(path))
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(table)}).save_to_disk(str(path))
    return str(path)


def pairs(source: str, **more: Any) -> Source:
    return Source(source=source, prompt="question", answer="answer", **more)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "dictionary"])
def test_local_rows_are_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    assert rows(pairs(saved(tmp_path, kind))) == TABLE


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert rows(Source(source=str(tmp_path / "a.txt"), text="text")) == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize("split", ["forget", "retain", "holdout", "general"])
def test_embedded_rows_are_those_of_the_population(split: str) -> None:
    assert rows(pairs(f"embedded:{split}")) == population.rows(split)


@pytest.mark.parametrize(
    ("where", "limit", "left"),
    [
        ({"kind": "when"}, None, ["When?"]),
        ({"year": 1815}, None, ["Who?", "When?"]),
        ({"year": 1815}, 1, ["Who?"]),
        ({"kind": ("who", "where")}, None, ["Who?", "Where?"]),
        ({"kind": ("who", "where"), "year": 1852}, None, ["Where?"]),
        (None, 2, ["Who?", "When?"]),
        (None, 9, ["Who?", "When?", "Where?"]),
    ],
)
def test_where_and_limit_choose_rows(where: dict[str, Any] | None, limit: int | None, left: list[str], tmp_path: Path) -> None:
    source = pairs(saved(tmp_path, "jsonl"), where=where, limit=limit)
    assert [row["question"] for row in rows(source)] == left


@pytest.mark.parametrize(
    ("where", "without", "left"),
    [
        (None, {"kind": "when"}, ["Who?", "Where?"]),
        (None, {"kind": ("who", "where")}, ["When?"]),
        ({"year": 1815}, {"kind": "who"}, ["When?"]),
        (None, {"kind": "nobody"}, ["Who?", "When?", "Where?"]),
    ],
)
def test_rows_are_left_out(where: dict[str, Any] | None, without: dict[str, Any], left: list[str], tmp_path: Path) -> None:
    source = pairs(saved(tmp_path, "jsonl"), where=where, without=without)
    assert [row["question"] for row in rows(source)] == left
    assert "no rows are left after without on kind" in refusal(
        replace(source, where=None, without={"kind": ("who", "when", "where")})
    )
    assert "without names column 'knid', which is not there; did you mean 'kind'" in refusal(replace(source, without={"knid": 1}))


def refusal(source: Source) -> str:
    with pytest.raises(Refused) as caught:
        rows(source)
    assert source.source in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"prompt": "question", "answer": "anwser"},
            "answer names column 'anwser', which is not there; did you mean 'answer'?",
        ),
        (
            {"prompt": "qestion", "answer": "answer"},
            "prompt names column 'qestion', which is not there; did you mean 'question'?",
        ),
        (
            {"messages": "chat"},
            "messages names column 'chat', which is not there; Valid: question, answer, kind, year.",
        ),
        ({"text": "txet"}, "text names column 'txet'"),
        (
            {"prompt": "question", "answer": "answer", "where": {"yaer": 3}},
            "where names column 'yaer', which is not there; did you mean 'year'?",
        ),
        (
            {"prompt": "question", "answer": "answer", "alternate": Alternate(answer="anser")},
            "alternate.answer names column 'anser'",
        ),
        ({"prompt": "question", "answer": "answer", "perturbed": "wrong"}, "perturbed names column 'wrong'"),
        (
            {"prompt": "question", "answer": "answer", "where": {"kind": ("who", "hwo", "whn")}},
            "where: 2 of 3 values stand in no row, the first of them 'kind' = 'hwo'",
        ),
        (
            {"prompt": "question", "answer": "answer", "where": {"year": 1900}},
            "no rows are left after where on year",
        ),
    ],
)
def test_a_column_or_row_that_is_not_there_is_named(columns: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(Source(source=saved(tmp_path, "jsonl"), **columns))


EMPTY = {"a.json": "[]", "a.jsonl": "", "a.csv": "question,answer\n"}


@pytest.mark.parametrize("name", [*EMPTY, "a.parquet"])
def test_a_set_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in EMPTY:
        path.write_text(EMPTY[name])
    else:
        datasets.Dataset.from_list(TABLE).select([]).to_parquet(str(path))
    assert refusal(pairs(str(path))) == f"{path}: has no rows; expected at least one."


def test_unreadable_data_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"question": ')
    assert "cannot read a .xlsx file; expected one of .json, .jsonl, .csv, .parquet, .txt" in refusal(
        pairs(str(tmp_path / "a.xlsx"))
    )
    assert "cannot be read as a data set" in refusal(pairs(str(tmp_path / "a.parquet")))
    assert "a.jsonl:1: not a line of JSON" in refusal(pairs(str(tmp_path / "a.jsonl")))
    said = refusal(pairs("embedded:forgot"))
    assert "no such data; did you mean" in said and "forget'?" in said and "refusals" in said


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub"), OSError()]
)
def test_a_hub_id_that_is_not_there_is_refused_in_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*words: object, **more: object) -> None:
        asked.append((words, more))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = refusal(pairs("nobody/nothing", config="full", split="test"))
    assert said.startswith("nobody/nothing: no such file or folder (looked from ")
    assert f"and no data set of this name can be read from the hub ({type(error).__name__}" in said
    assert asked == [(("nobody/nothing", "full"), {"split": "test"})]


# ------------------------------------------------------------------------------------------------ rows become examples


def table(folder: Path, name: str, *found: dict[str, Any]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def qa(*answers: str, question: str = "Q") -> list[dict[str, Any]]:
    return [{"question": f"{question}{i}", "answer": answer} for i, answer in enumerate(answers)]


def test_rows_in_both_sets_are_an_error_that_names_the_row(tmp_path: Path, embedded: Any) -> None:
    forget = pairs(table(tmp_path, "forget", *qa("a", "b")))
    mixed = [*qa("x", "y", question="R"), {"question": " Q1\n", "answer": "b"}, {"question": "Q0", "answer": "a"}]
    retain = pairs(table(tmp_path, "retain", *mixed))
    with pytest.raises(Refused) as caught:
        read_examples(Data(forget=forget, retain=retain), embedded, 0)
    said = str(caught.value)
    assert said.startswith("data: 2 of 4 retain rows also stand in the forget set") and "data.overlap: drop" in said
    assert f"(first: {retain.source}: row 3)" in said and "Q1" not in said


def test_rows_in_both_sets_leave_the_retain_set_where_the_recipe_says_so(tmp_path: Path, embedded: Any) -> None:
    forget = pairs(table(tmp_path, "forget", *qa("a", "b")))
    retain = pairs(table(tmp_path, "retain", *qa("a", "c"), {"question": "Q1", "answer": "b"}))
    found = read_examples(Data(forget=forget, retain=retain, overlap="drop"), embedded, 0)
    assert found.overlap == 2 and found.dropped == {"forget": 0, "retain": 0}
    assert [answered(example, embedded)[1] for example in found.streams["retain"]] == ["c<|end|>"]
    assert len(found.streams["forget"]) == 2


def test_the_same_question_with_another_answer_is_no_overlap(tmp_path: Path, embedded: Any) -> None:
    data = Data(forget=pairs(table(tmp_path, "f", *qa("a"))), retain=pairs(table(tmp_path, "r", *qa("b"))))
    assert read_examples(data, embedded, 0).overlap == 0


def test_a_tokenizer_that_keeps_no_words_encodes_the_same(embedded: Any) -> None:
    texts = ["Who is Ada?", "Who is Ada, who?", "ä\n"] * 3
    other = copy.deepcopy(embedded)
    assert frugal(other) is other and other(texts)["input_ids"] == embedded(texts)["input_ids"]


def test_a_chat_and_a_question_with_its_answer_are_the_same_row(tmp_path: Path, embedded: Any) -> None:
    """However the keys of its turns are ordered, and whatever else they say."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    other = [{"content": one["content"], "role": one["role"], "at": "noon"} for one in turns]
    forget = pairs(table(tmp_path, "f", {"question": "Who?", "answer": "Ada."}))
    for name, chats in (("a", turns), ("b", other)):
        place = table(tmp_path, name, {"chat": chats}, {"chat": [turns[0], {**turns[1], "content": "Bo."}]})
        data = Data(forget=forget, retain=Source(source=place, messages="chat"), overlap="drop")
        assert read_examples(data, embedded, 0).overlap == 1


def test_rows_whose_answer_does_not_fit_are_dropped_and_counted(tmp_path: Path, embedded: Any) -> None:
    found = [
        *qa("a"),
        {"question": "why " * 50, "answer": "b"},
        *qa("c", question="R"),
        {"question": "how " * 50, "answer": "d"},
    ]
    examples = read_examples(Data(forget=pairs(table(tmp_path, "f", *found), max_tokens=20)), embedded, 0)
    assert examples.dropped == {"forget": 2}
    assert [answered(example, embedded)[1] for example in examples.streams["forget"]] == ["a<|end|>", "c<|end|>"]
    assert [example.id for example in examples.streams["forget"]] == [0, 2]


def test_a_forget_set_without_examples_is_refused(tmp_path: Path, embedded: Any) -> None:
    source = pairs(table(tmp_path, "f", *qa("a", "b")), max_tokens=3)
    with pytest.raises(Refused, match=r"data.forget: no example is left; 2 rows have no answer within max_tokens = 3"):
        read_examples(Data(forget=source), embedded, 0)


def test_a_retain_set_that_is_all_forget_set_is_said_to_be_that(tmp_path: Path, embedded: Any) -> None:
    forget, retain = (pairs(table(tmp_path, name, *qa("a", "b"))) for name in ("f", "r"))
    with pytest.raises(Refused, match=r"data.retain: no example is left.* 2 rows also stand in the forget set"):
        read_examples(Data(forget=forget, retain=retain, overlap="drop"), embedded, 0)


def test_chats_and_running_text_become_examples(tmp_path: Path, embedded: Any) -> None:
    chats = Source(source=table(tmp_path, "chats", {"chat": CHAT}), messages="chat")
    (tmp_path / "a.txt").write_text("Ada saw a red kite. " * 30)
    text = Source(source=str(tmp_path / "a.txt"), text="text", max_tokens=16)
    found = read_examples(Data(forget=chats, retain=text), embedded, 0)
    assert [answered(example, embedded)[1] for example in found.streams["forget"]] == [f"{ANSWER}<|end|>"]
    assert len(found.streams["retain"]) > 5 and {example.stream for example in found.streams["retain"]} == {"retain"}


BAD_ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "no question": (
        {"prompt": "q", "answer": "a"},
        [{"q": "x", "a": "y"}, {"q": None, "a": "y"}],
        ["row 2", "'q' holds None"],
    ),
    "blank answer": (
        {"prompt": "q", "answer": "a"},
        [{"q": "x", "a": "y"}, {"q": "x", "a": " "}],
        ["row 2", "'a' holds ' '"],
    ),
    "truth value as answer": ({"prompt": "q", "answer": "a"}, [{"q": "x", "a": True}], ["row 1", "'a' holds True"]),
    "no chat": ({"messages": "m"}, [{"m": TURNS}, {"m": None}], ["row 2", "'m'"]),
    "empty chat": (
        {"messages": "m"},
        [{"m": TURNS}, {"m": []}],
        ["row 2", "'m'", "does not end with an assistant turn"],
    ),
    "chat without an answer": (
        {"messages": "m"},
        [{"m": TURNS}, {"m": TURNS[:1]}],
        ["row 2", "does not end with an assistant turn"],
    ),
    "chat in other words": ({"messages": "m"}, [{"m": [{"by": "user", "text": "x"}]}], ["row 1", "'m'", "role"]),
    "blank turn": ({"messages": "m"}, [{"m": [TURNS[0], {"role": "assistant", "content": None}]}], ["row 1", "'m'"]),
    "no text": ({"text": "t"}, [{"t": "x"}, {"t": None}], ["row 2", "'t' holds None"]),
    "no alternate": (
        {"prompt": "q", "answer": "a", "alternate": Alternate(answer="o")},
        [{"q": "x", "a": "y", "o": "z"}, {"q": "x", "a": "y", "o": None}],
        ["row 2", "'o' holds None"],
    ),
    "no text in a list of alternates": (
        {"prompt": "q", "answer": "a", "alternate": Alternate(answer="o")},
        [{"q": "x", "a": "y", "o": ["z", None]}],
        ["row 1", "'o' holds None"],
    ),
    "no text in an alternate of a chat": (
        {"messages": "m", "alternate": Alternate(answer="o")},
        [{"m": TURNS, "o": "z"}, {"m": TURNS, "o": None}],
        ["row 2", "'o' holds None"],
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_text_is_refused_by_its_number(name: str, tmp_path: Path, embedded: Any) -> None:
    columns, found, expected = BAD_ROWS[name]
    source = Source(source=table(tmp_path, "f", *found), **columns)
    with pytest.raises(Refused) as caught:
        read_examples(Data(forget=source), embedded, 0)
    for part in [source.source, *expected]:
        assert part in str(caught.value)


# --------------------------------------------------------------------------------------------------- alternate answers


def test_alternates_come_from_a_column_of_lists(tmp_path: Path, embedded: Any) -> None:
    found = [{**row, "other": other} for row, other in zip(qa("a", "b", "c"), (["d", "e"], ["f"], ["g", "h", "i"]), strict=True)]
    source = pairs(table(tmp_path, "f", *found), alternate=Alternate(answer="other"))
    examples = read_examples(Data(forget=source), embedded, 0)
    assert set(examples.companions) == {"forget.alternate"}
    said = [[answered(other, embedded) for other in of_row] for of_row in examples.companions["forget.alternate"]]
    prompts = [answered(example, embedded)[0] for example in examples.streams["forget"]]
    assert said == [
        [(prompt, f"{text}<|end|>") for text in texts] for prompt, texts in zip(prompts, ("de", "f", "ghi"), strict=True)
    ]
    assert {other.stream for of_row in examples.companions["forget.alternate"] for other in of_row} == {"forget.alternate"}


def test_alternates_come_from_a_column_of_text_and_for_chats(tmp_path: Path, embedded: Any) -> None:
    source = Source(
        source=table(tmp_path, "f", {"chat": CHAT, "other": "Nobody."}),
        messages="chat",
        alternate=Alternate(answer="other"),
    )
    examples = read_examples(Data(forget=source), embedded, 0)
    ((other,),), (own,) = examples.companions["forget.alternate"], examples.streams["forget"]
    assert answered(other, embedded) == (answered(own, embedded)[0], "Nobody.<|end|>")


def test_a_row_none_of_whose_alternates_fits_leaves_with_its_answer(tmp_path: Path, embedded: Any) -> None:
    """Here because its list is empty; otherwise an alternate is cut as an answer is."""
    found = [{**qa("a")[0], "other": ["x"]}, {**qa("b", question="R")[0], "other": []}]
    source = pairs(table(tmp_path, "f", *found), alternate=Alternate(answer="other"))
    examples = read_examples(Data(forget=source), embedded, 0)
    assert [answered(example, embedded)[1] for example in examples.streams["forget"]] == ["a<|end|>"]
    assert len(examples.companions["forget.alternate"]) == 1 and examples.dropped == {"forget": 1}


def drawn(source: Source, tokenizer: Any, seed: int) -> dict[str, str]:
    """Prompt -> the alternate that was drawn for it."""
    examples = read_examples(Data(forget=source), tokenizer, seed)
    assert all(len(of_row) == 1 for of_row in examples.companions["forget.alternate"])
    return dict(answered(of_row[0], tokenizer) for of_row in examples.companions["forget.alternate"])


def test_refusals_are_drawn_for_each_question_from_the_seed(tmp_path: Path, embedded: Any) -> None:
    found = qa(*(f"answer {i}" for i in range(40)))
    alternate = Alternate(source="embedded:refusals", answer="text")
    source = pairs(table(tmp_path, "f", *found), alternate=alternate)
    first = drawn(source, embedded, 0)
    assert len(first) == 40 and set(first.values()) <= {f"{text}<|end|>" for text in (row["text"] for row in population.refusals())}
    assert len(set(first.values())) > 5
    assert drawn(source, embedded, 0) == first
    assert drawn(source, embedded, 1) != first


def test_the_refusal_to_a_question_does_not_depend_on_the_other_rows(tmp_path: Path, embedded: Any) -> None:
    found = qa(*(f"answer {i}" for i in range(40)))
    alternate = Alternate(source="embedded:refusals", answer="text")
    first = drawn(pairs(table(tmp_path, "f", *found), alternate=alternate), embedded, 0)
    assert drawn(pairs(table(tmp_path, "turned", *found[::-1]), alternate=alternate), embedded, 0) == first
    fewer = drawn(pairs(table(tmp_path, "fewer", *found[1::2]), alternate=alternate), embedded, 0)
    assert fewer == {prompt: first[prompt] for prompt in fewer} and len(fewer) == 20


def test_a_column_of_alternates_that_is_not_there_is_named(tmp_path: Path, embedded: Any) -> None:
    source = pairs(table(tmp_path, "f", *qa("a")), alternate=Alternate(source="embedded:refusals", answer="txt"))
    with pytest.raises(
        Refused,
        match=r"embedded:refusals: alternate.answer names column 'txt', which is not there; did you mean 'text'",
    ):
        read_examples(Data(forget=source), embedded, 0)


def test_a_draw_depends_on_its_key_alone() -> None:
    values = [draw(0, epoch, example) for epoch in range(20) for example in range(50)]
    assert len(set(values)) == 1000 and all(0 <= value < 2**64 for value in values)
    assert values[0] == 11786585988135882660, "the same in every release, or runs could not be resumed or repeated"
    assert 0.45 < np.mean([value / 2**64 for value in values]) < 0.55


# ------------------------------------------------------------------------------------------------------------- batches


def some(count: int, rng: random.Random, streams: tuple[str, ...] = ("forget", "retain"), most: int = 12) -> list[Example]:
    found = []
    for i in range(count):
        length = rng.randint(2, most)
        found.append(Example(tuple(rng.randint(0, 50) for _ in range(length)), rng.randint(1, length - 1), rng.choice(streams), i))
    return found


def by_loop(examples: list[Example]) -> tuple[list[list[int]], list[tuple[str, int, int, int]]]:
    """What `lay_out` must say, token by token: padded rows; (stream, sequence, place, target) per answer token."""
    names = list(dict.fromkeys(example.stream for example in examples))
    placed = [example for name in names for example in examples if example.stream == name]
    length = max(len(example.ids) for example in placed)
    padded = [[*example.ids, *[0] * (length - len(example.ids))] for example in placed]
    targets = []
    for b, example in enumerate(placed):
        number = [one for one in placed if one.stream == example.stream].index(example)
        for t in range(example.answer, len(example.ids)):
            targets.append((example.stream, number, b * length + t - 1, example.ids[t]))
    return padded, targets


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_is_what_a_loop_over_its_tokens_says(seed: int) -> None:
    rng = random.Random(seed)
    examples = some(rng.randint(1, 9), rng, ("forget", "retain", "forget.alternate"))
    batch = lay_out(examples)
    padded, expected = by_loop(examples)
    assert batch.input_ids.tolist() == padded
    found = []
    for name, part in batch.tokens.items():
        columns = (batch.owner[part].tolist(), batch.at[part].tolist(), batch.targets[part].tolist())
        found += [(name, *row) for row in zip(*columns, strict=True)]
    assert found == expected
    assert len(batch.at) == len(expected) == sum(example.targets for example in examples)
    assert batch.sequences == dict(Counter(example.stream for example in examples))
    assert list(batch.sequences) == list(batch.tokens) == list(dict.fromkeys(example.stream for example in examples))
    assert Counter(batch.examples) == Counter(examples)
    assert all(
        tensor.dtype == torch.long and tensor.min() >= 0 for tensor in (batch.input_ids, batch.at, batch.targets, batch.owner)
    )


def test_a_target_equal_to_the_padding_is_a_target() -> None:
    batch = lay_out([Example((5, 6, 0), 1, "forget", 0), Example((7, 8, 9, 0, 0), 3, "forget", 1)])
    assert batch.targets.tolist() == [6, 0, 0, 0]
    assert batch.at.tolist() == [0, 1, 7, 8]
    assert batch.owner.tolist() == [0, 0, 1, 1]


def test_a_batch_moves_whole() -> None:
    batch = lay_out(some(4, random.Random(0))).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (batch.input_ids, batch.at, batch.targets, batch.owner, batch.position)} == {"meta"}


def test_answers_are_measured_by_stream() -> None:
    examples = [
        Example((1, 2, 3), 1, "forget", 0),
        Example((1, 2), 1, "forget", 1),
        Example((1, 2, 3, 4), 2, "retain", 0),
    ]
    assert answer_lengths(examples) == {"forget": [2, 1], "retain": [2]}
    assert answer_lengths([]) == {}


@pytest.mark.parametrize("seed", range(60))
def test_a_cut_deals_every_item_once_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 50))]
    budget, ranks = rng.randint(1, 200), rng.randint(1, 6)
    dealt = cut(lengths, budget, ranks)
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1, "every rank meets the others in each backward pass"
    assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in (batch for batches in dealt for batch in batches):
        assert len(batch) <= 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    shares = [sum(len(batch) for batch in batches) for batches in dealt]
    assert max(shares) - min(shares) <= 1
    assert any(batches[-1] for batches in dealt), "no round in which nobody has anything"
    assert dealt == cut(lengths, budget, ranks)


def test_a_cut_wastes_no_micro_batch() -> None:
    assert cut([4] * 6, 8) == [[[0, 1], [2, 3], [4, 5]]]
    assert cut([4] * 6, 24) == [[[0, 1, 2, 3, 4, 5]]]
    assert cut([1, 9, 3], 1) == [[[1], [2], [0]]]
    assert cut([5], 100, 3) == [[[0]]] + [[[]]] * 2


def case(seed: int) -> tuple[Callable[[str, int], Example], Schedule, int, int]:
    """Random streams with alternates, their schedule, a budget, and a number of ranks."""
    rng = random.Random(seed)
    found = {name: some(rng.randint(1, 12), rng, (name,)) for name in ("forget", "retain")}
    counts = [rng.randint(1, 3) for _ in found["forget"]]
    found["forget.alternate"] = some(sum(counts), rng, ("forget.alternate",), most=20)
    sizes = {name: len(found[name]) for name in ("forget", "retain")}
    window = {"forget": rng.randint(1, 8), "retain": rng.randint(1, 8)}
    schedule = build(sizes, window, seed, 2, companions={"forget.alternate": counts})
    return lambda stream, i: found[stream][i], schedule, rng.randint(10, 150), rng.randint(1, 4)


@pytest.mark.parametrize("seed", range(40))
def test_the_micro_batches_of_all_ranks_are_the_window(seed: int) -> None:
    example, schedule, budget, ranks = case(seed)
    for step in range(schedule.steps):
        window = schedule.window(step)
        shares = [micro_batches(window, example, Layout(budget), rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        found = Counter(one for share in shares for batch in share if batch for one in batch.examples)
        assert found == Counter(example(*place) for slot in window for place in slot)


@pytest.mark.parametrize("seed", range(40))
def test_a_micro_batch_keeps_its_budget_also_where_slots_differ_in_size(seed: int) -> None:
    example, schedule, budget, ranks = case(seed)
    checked = 0
    for step in range(schedule.steps):
        for rank in range(ranks):
            for batch in micro_batches(schedule.window(step), example, Layout(budget), rank, ranks):
                slots = batch.sequences.get("forget", 0) + batch.sequences.get("retain", 0) if batch else 0
                assert batch is None or slots == 1 or batch.input_ids.numel() <= budget
                checked += 1
    assert checked


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_and_its_alternate_lie_in_one_micro_batch_in_the_same_order(seed: int) -> None:
    example, schedule, budget, ranks = case(seed)
    for step in range(schedule.steps):
        window = schedule.window(step)
        owner = {slot[1][1]: slot[0][1] for slot in window if len(slot) == 2}
        for rank in range(ranks):
            for batch in micro_batches(window, example, Layout(budget), rank, ranks):
                members = batch.examples if batch else ()
                own = [one.id for one in members if one.stream == "forget"]
                assert own == [owner[one.id] for one in members if one.stream == "forget.alternate"]


# -------------------------------------------------------------------------------------------------------- the schedule


def visits(schedule: Schedule, stream: str, steps: range | None = None) -> list[int]:
    steps = steps if steps is not None else range(schedule.steps)
    return [i for step in steps for slot in schedule.window(step) for name, i in slot if name == stream]


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_sees_each_forget_example_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"forget": rng.randint(1, 30), "retain": rng.randint(1, 30)}
    window = {"forget": rng.randint(1, 12), "retain": rng.randint(1, 12)}
    schedule = build(sizes, window, seed, 3)
    per_epoch = -(-sizes["forget"] // window["forget"])
    assert schedule.steps == 3 * per_epoch
    orders = [visits(schedule, "forget", range(epoch * per_epoch, (epoch + 1) * per_epoch)) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(sizes["forget"]))
    if sizes["forget"] > 6:
        assert orders[0] != orders[1] != orders[2]
    for step in range(schedule.steps):
        counts = Counter(name for slot in schedule.window(step) for name, _ in slot)
        assert counts["retain"] == window["retain"], "the retain stream keeps its full size"
        assert 1 <= counts["forget"] <= window["forget"]
        assert counts["forget"] == window["forget"] or step % per_epoch == per_epoch - 1
    went = visits(schedule, "retain")
    for start in range(0, len(went), sizes["retain"]):
        assert len(set(went[start : start + sizes["retain"]])) == len(went[start : start + sizes["retain"]]), "round after round"


def test_a_schedule_follows_from_its_seed_alone() -> None:
    sizes, window = {"forget": 20, "retain": 50}, {"forget": 6, "retain": 7}
    first = build(sizes, window, 0, 2)
    state = str(np.random.get_state()), random.getstate()
    again = build(sizes, window, 0, 2)
    assert (str(np.random.get_state()), random.getstate()) == state
    assert [first.window(step) for step in range(first.steps)] == [again.window(step) for step in range(again.steps)]
    assert visits(build(sizes, window, 1, 2), "forget") != visits(first, "forget")
    longer = build(sizes, window, 0, 9)
    assert [longer.window(step) for step in range(first.steps)] == [first.window(step) for step in range(first.steps)]
    beside = build({"forget": 20}, {"forget": 6}, 0, 2)
    assert visits(beside, "forget") == visits(first, "forget"), "one stream does not change what another sees"


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, None, 4), (2.5, None, 10), (0.5, None, 2), (0.01, None, 1), (9, 3, 3), (1, 30, 30)],
)
def test_epochs_or_steps_say_how_long_a_run_is(epochs: float, steps: int | None, expected: int) -> None:
    assert build({"forget": 20}, {"forget": 6}, 0, epochs, steps).steps == expected


def test_seen_is_what_the_windows_see() -> None:
    schedule = build({"forget": 20, "retain": 90}, {"forget": 6, "retain": 7}, 0, 1)
    assert schedule.streams == ("forget", "retain")
    assert schedule.seen("forget").tolist() == list(range(20))
    assert schedule.seen("retain").tolist() == sorted(set(visits(schedule, "retain")))
    assert len(schedule.seen("retain")) == 28


def test_an_alternate_sits_in_the_slot_of_its_answer() -> None:
    counts = [1, 3, 2, 4]
    offsets = [0, 1, 4, 6]
    schedule = build({"forget": 4, "retain": 9}, {"forget": 3, "retain": 2}, 0, 60, companions={"forget.alternate": counts})
    picked: dict[int, list[int]] = {i: [] for i in range(4)}
    for step in range(schedule.steps):
        for slot in schedule.window(step):
            if slot[0][0] == "forget":
                (_, example), (stream, index) = slot
                assert stream == "forget.alternate"
                picked[example].append(index - offsets[example])
            else:
                assert len(slot) == 1
    for example, count in enumerate(counts):
        assert len(picked[example]) == 60, "one in each epoch"
        assert set(picked[example]) == set(range(count)), "every alternate has its turn"
    assert schedule.seen("forget.alternate").tolist() == list(range(10))
    again = build({"forget": 4, "retain": 9}, {"forget": 1, "retain": 2}, 0, 60, companions={"forget.alternate": counts})
    turns = {
        (k // 4, slot[0][1]): slot[1][1]
        for k, slot in enumerate(s for t in range(again.steps) for s in again.window(t) if len(s) == 2)
    }
    first = {(epoch, example): offsets[example] + picks[epoch] for example, picks in picked.items() for epoch in range(60)}
    assert turns == first, "the draw is the epoch's and the example's, whatever the window"
