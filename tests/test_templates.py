"""Targets are exactly the answer and its end: templates of every family, two kinds of tokenizers, many shapes of conversations.

Expected texts come from `chat_families.py`, which knows no template engine. Tokens are read back as bytes, since a token may hold a
part of a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, HEAD, Family, table
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llm_unlearn.chat import Chat
from llm_unlearn.data.examples import PLAIN_TEMPLATE, conversation, encode
from llm_unlearn.data.rendering import turn_end
from llm_unlearn.source import Source, Targets
from llm_unlearn.spec import Refused

Turns = list[dict[str, str]]

QUESTION, ANSWER = "Who is Anna Bo?", "Anna Bo lives in St. Ulm. He is a judge."
ANSWERS = {
    "plain": ANSWER,
    "xml": '<person id="7">\n  <name>Anna Bo</name> & more\n</person>',
    "markdown": "# Anna\n\n- lives in **St. Ulm**\n- 'judge'\n\n> quoted `code`",
    "json": '{"name": "Anna Bo", "tags": ["a\\n", "\\"b\\""], "at": null}',
    "code": "def anna(x):\n    if x < 1:\n        return 'Bo'\n\n    return x & 1\n\n\nprint(anna(2))",
    "blanks": "\n\n  Anna Bo lives in St. Ulm. \t\n ",
    "rtl": "آنا بو تعيش في أولم.\nאנה בו היא שופטת.",
    "cjk": "安娜·博住在圣乌尔姆。\n彼女は裁判官です。🙂",
    "single": "A",
    "number": "42",
}


def asked(question: str, answer: str) -> Turns:
    """Return a conversation of one question."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def cases(family: Family) -> dict[str, Turns]:
    """Return conversations of every shape."""
    like_markers = f"A turn begins with {family.question or '###'}, an answer ends with {family.end or 'nothing'}, says Anna."
    found = {name: asked(QUESTION, answer) for name, answer in ANSWERS.items()}
    found |= {f"asked after {name}": asked(answer, "Yes, of course.") for name, answer in ANSWERS.items()}
    found["like the template's markers"] = asked(QUESTION, like_markers)
    found["several turns"] = [*asked(QUESTION, ANSWER), *asked("And her dog?", "It is called Tibo.")]
    found["the same answer twice"] = [*asked(QUESTION, ANSWER), *asked(QUESTION, ANSWER)]
    found["echo"] = asked(f"Say: {ANSWER}", ANSWER)
    if family.system != "refused":
        found["system turn"] = [{"role": "system", "content": "Be brief."}, *asked(QUESTION, ANSWER)]
        found["system and several turns"] = [{"role": "system", "content": "Be brief."}, *found["several turns"]]
    return found


@lru_cache(1)
def _texts() -> tuple[str, ...]:
    """Return what the tokenizers learn from: what templates write, so that tokens cross the borders of their parts."""
    return tuple("".join(family.write(asked(QUESTION, answer))) for family in FAMILIES for answer in ANSWERS.values()) * 3


@lru_cache(2)
def trained(kind: str) -> str:
    """Return a trained tokenizer, written as JSON: `byte-level`, or like sentencepiece `with byte fallback`."""
    if kind == "byte-level":
        bpe = Tokenizer(BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = decoders.ByteLevel()
        settings: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        bpe = Tokenizer(BPE(unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        settings = {"initial_alphabet": [chr(code) for code in range(33, 127)], "limit_alphabet": 95}  # others as bytes
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False, max_token_length=6, **settings)
    bpe.train_from_iterator(_texts(), trainer)
    written = json.loads(bpe.to_str())
    if kind != "byte-level":
        vocabulary = written["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        written["model"]["byte_fallback"] = True
    return json.dumps(written)


MADE: dict[tuple[str, str], Any] = {}


def tokenizer_of(family: Family, kind: str) -> Any:
    """Return a tokenizer of a kind with the special tokens and the template of a family."""
    if (family.name, kind) not in MADE:
        MADE[family.name, kind] = _tokenizer(family, kind)
    return MADE[family.name, kind]


def _tokenizer(family: Family, kind: str) -> Any:
    marks = {name: mark for name, mark in (("bos_token", family.bos), ("eos_token", family.eos)) if mark}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(kind)), **marks)
    tokens = [AddedToken(text, special=True, normalized=False) for text in family.special]
    tokens += [AddedToken(text, special=False, normalized=False) for text in family.added]
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = family.template or PLAIN_TEMPLATE
    return tokenizer


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (as GPT-2 lays them out)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_of_character()


def bytes_of(tokenizer: Any, kind: str, ids: tuple[int, ...]) -> bytes:
    """Return tokens as the bytes of their text, without the blank that a tokenizer puts before a text."""
    added, parts = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}, []
    for token, text in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token in added:
            parts.append(added[token].encode())
        elif kind == "byte-level":
            parts.append(bytes(BYTES[character] for character in text))
        elif text.startswith("<0x") and len(text) == 6:
            parts.append(bytes([int(text[3:5], 16)]))
        else:
            parts.append(text.replace("▁", " ").encode())
    first = ids[0] not in added and kind != "byte-level"
    return b"".join(parts).removeprefix(b" ") if first else b"".join(parts)


KINDS = ("byte-level", "with byte fallback")
everywhere = pytest.mark.parametrize("kind", KINDS)
of_every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)


@everywhere
@of_every_family
def test_targets_are_the_answer_and_its_end(family: Family, kind: str) -> None:
    tokenizer, shapes = tokenizer_of(family, kind), cases(family)
    if family.drops_answer:
        with pytest.raises(Refused, match="row 1: the chat template leaves out or changes the text of the assistant turn"):
            encode(list(shapes.values()), tokenizer, family.chat, "forget", 4096)
        return
    examples = encode(list(shapes.values()), tokenizer, family.chat, "forget", 4096)
    for (name, turns), example in zip(shapes.items(), examples, strict=True):
        assert example, name
        before, answer, end = family.write(turns)
        whole, begin = (before + answer + end).encode(), len(before.encode())
        assert bytes_of(tokenizer, kind, example.ids) == whole, name
        # the first target token is the first that holds any of the answer's text
        assert len(bytes_of(tokenizer, kind, example.ids[: example.answer])) <= begin, name
        assert len(bytes_of(tokenizer, kind, example.ids[: example.answer + 1])) > begin, name


THOUGHT = "They ask about Anna Bo.\n\nI recall: a judge, 裁判官."


@everywhere
@of_every_family
def test_a_thought_and_the_answer_behind_it_are_told_apart(family: Family, kind: str) -> None:
    """As targets: the answer (the thought is prompt), the thought (the sequence ends with what closes it), or both."""
    if family.drops_answer or family.chat.thinking is False:
        return
    tokenizer, names = tokenizer_of(family, kind), ("plain", "cjk", "blanks", "several turns")
    shapes = {name: cases(family)[name] for name in names}
    thinking = [[*turns[:-1], {**turns[-1], "thought": THOUGHT}] for turns in shapes.values()]
    parts: dict[Targets, list[Any]] = {
        targets: encode(thinking, tokenizer, family.chat, "forget", 4096, targets=targets)
        for targets in ("answer", "thought", "both")
    }
    for i, turns in enumerate(shapes.values()):
        before, thought, close, answer, end = family.write_thought(turns, THOUGHT)
        whole = (before + thought + close + answer + end).encode()
        begins = {"answer": len((before + thought + close).encode()), "thought": len(before.encode()), "both": len(before.encode())}
        for targets, examples in parts.items():
            ids, first = examples[i].ids, examples[i].answer
            found = bytes_of(tokenizer, kind, ids)
            if targets == "thought":
                wanted = (before + thought + close[: close.index(family.thought_end)] + family.thought_end).encode()
                # the last token may hold more than the end of the mark
                assert found.startswith(wanted) and not bytes_of(tokenizer, kind, ids[:-1]).startswith(wanted)
            else:
                assert found == whole
            assert len(bytes_of(tokenizer, kind, ids[:first])) <= begins[targets] < len(bytes_of(tokenizer, kind, ids[: first + 1]))


@of_every_family
def test_an_answer_that_a_template_would_cut_is_refused(family: Family) -> None:
    """Templates that look for `</think>` drop what stands before it."""
    turns, kind = asked(QUESTION, "A thought ends with </think> in such a model."), KINDS[0]
    try:
        (example,) = encode([turns], tokenizer_of(family, kind), family.chat, "forget", 4096)
    except Refused as error:
        assert family.thinking or family.drops_answer, error
    else:
        assert example and bytes_of(tokenizer_of(family, kind), kind, example.ids) == "".join(family.write(turns)).encode()


def test_a_thought_in_the_answers_text_is_read_as_one() -> None:
    """With the marks of its own where the template has no place for it."""
    source = Source(source="rows.jsonl", prompt="q", answer="a", targets="both")
    row = {"q": QUESTION, "a": f"<think>{THOUGHT}</think>{ANSWER}"}
    assert conversation(row, 0, source)[-1]["thought"] == THOUGHT and conversation(row, 0, source)[-1]["content"] == ANSWER
    family = next(family for family in FAMILIES if family.name == "qwen25")
    tokenizer = tokenizer_of(family, KINDS[0])
    (example,) = encode([conversation(row, 0, source)], tokenizer, family.chat, "forget", 4096, targets="both")
    assert example and bytes_of(tokenizer, KINDS[0], example.ids[example.answer :]).decode().endswith(
        f"{THOUGHT}</think>{ANSWER}{family.end}"
    )
    off = replace(source, targets="answer", chat=Chat(thinking=False))
    assert conversation(row, 0, off)[-1] == {"role": "assistant", "content": ANSWER}
    with pytest.raises(Refused, match=r"row 1.*: has no thought, and targets asks for one"):
        conversation({"q": QUESTION, "a": ANSWER}, 0, source)


@everywhere
def test_tokens_across_the_border_occur(kind: str) -> None:
    across = 0
    for family in FAMILIES:
        if not family.drops_answer:
            tokenizer = tokenizer_of(family, kind)
            (example,) = encode([asked(QUESTION, ANSWER)], tokenizer, family.chat, "forget", 4096)
            assert example
            before = family.write(asked(QUESTION, ANSWER))[0]
            across += len(bytes_of(tokenizer, kind, example.ids[: example.answer])) < len(before.encode())
    assert across >= 5, "the matrix would not notice a border token that is counted as prompt"


@of_every_family
def test_a_system_turn_without_a_place_is_refused(family: Family) -> None:
    if family.system == "refused":
        turns = [{"role": "system", "content": "Be brief."}, *asked(QUESTION, ANSWER)]
        with pytest.raises(Refused, match="forget: the chat template does not take turns of 'system', 'user', 'assistant'"):
            encode([turns], tokenizer_of(family, KINDS[0]), family.chat, "forget", 4096)


@of_every_family
def test_what_ends_an_answer_that_is_written(family: Family) -> None:
    """An end is a special token, the text that the template writes behind an answer, or what the next turn begins with."""
    tokenizer = tokenizer_of(family, KINDS[0])
    found = turn_end(tokenizer, family.chat)
    if family.drops_answer:
        return  # refused when rows are encoded
    if family.ends == "token":
        assert {tokenizer.decode([token]) for token in found.tokens} == {family.end.strip()}
    elif family.ends == "text":
        assert found.texts == (family.end,)
    else:
        header = (family.end or family.earlier[1]) + family.question
        marks = [text for text in (*family.special, *family.added) if header.startswith(text)]
        if marks:
            assert {tokenizer.decode([token]) for token in found.tokens} == set(marks)
        else:
            assert found.texts == (header.rstrip(),)


def test_the_matrix_has_thirty_families() -> None:
    assert len({family.name for family in FAMILIES}) >= 30
    assert {file.stem for file in _files()} == {family.name for family in FAMILIES} - {"base"}


def _files() -> Iterator[Any]:
    from chat_families import TEMPLATES

    return TEMPLATES.glob("*.jinja")


def test_the_page_shows_each_template() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.partition(HEAD)[2].startswith(table() + "\n"), f"expected in docs/models.md:\n{HEAD}{table()}"
