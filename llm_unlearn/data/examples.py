"""Rows become examples: token ids, and where the answer begins. The tokenizer's chat template decides what a turn looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.files import Row
from llm_unlearn.data.patience import at_most
from llm_unlearn.data.sources import row_at
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, fingerprint, shown
from llm_unlearn.unsaid import column_name, unsaid, without_quotes

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
"""The layout of turns for a tokenizer that has none of its own (a base model's)."""
LONGEST = 20.0
"""Seconds of the processor's time that a chat template may take for one conversation: thousands of times what any takes."""

Turn = dict[str, str]
"""One turn of a chat: role and content."""


@dataclass(frozen=True)
class Example:
    """One sequence. Its targets are `ids[answer:]`, the end-of-turn token included."""

    ids: tuple[int, ...]
    answer: int  # index of the first answer token, at least 1
    stream: str
    id: int  # row in its source

    @property
    def targets(self) -> int:
        """T, the number of answer tokens."""
        return len(self.ids) - self.answer


def conversation(row: Row, number: int, source: Source, answer: object = None, column: str | None = None) -> list[Turn]:
    """The turns of a row, the last one the assistant's.

    Args:
        number: which row it is, counted from 0, for errors.
        answer: stands in for the row's own answer; read from `column`.

    Raises:
        Refused: the row has no text where text is expected, or its chat does not end with the assistant.
    """
    if column is not None:
        text_in(answer, number, source, column)
    if source.messages:
        turns = _chat(row[source.messages], number, source, source.messages)
        return turns if column is None else [*turns[:-1], {"role": "assistant", "content": str(answer)}]
    assert source.prompt and source.answer  # checked with the recipe
    prompt = text_in(row[source.prompt], number, source, source.prompt)
    truth = text_in(row[source.answer], number, source, source.answer) if column is None else str(answer)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": truth}]


def _chat(value: object, number: int, source: Source, column: str) -> list[Turn]:
    """A column of turns, each with a role and text."""
    where = f"{row_at(number, source)}: column {column!r}"
    if not isinstance(value, list) or not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        raise Refused(f"{where} holds {unsaid(value)}; expected a list of turns such as {{role: user, content: …}}.")
    if not value or value[-1]["role"] != "assistant":
        raise Refused(f"{where} does not end with an assistant turn, whose text is the answer.")
    if len(value) < 2 or not all(isinstance(turn["role"], str) and turn["role"].strip() for turn in value):
        what = "a turn before the answer, and a role such as user for each"
        raise Refused(f"{where} holds {unsaid(value)}; expected {what}.")
    return [{"role": turn["role"], "content": text_in(turn["content"], number, source, column)} for turn in value]


def text_in(value: object, number: int, source: Source, column: str) -> str:
    """A value as text.

    Raises:
        Refused: it is not text, or blank; names the row.
    """
    if not isinstance(value, str) or not value.strip():
        where = f"{row_at(number, source)}: column {column!r}"
        raise Refused(f"{where} holds {unsaid(value)}; expected text. (`where` can leave rows out.)")
    return value


def encode(
    conversations: Sequence[list[Turn]], tokenizer: PreTrainedTokenizerBase, stream: str, max_tokens: int, first: int = 0
) -> list[Example | None]:
    """Conversations as examples, in order; None where truncation leaves no answer token.

    The answer begins where the rendered conversation goes on after its generation prompt, and ends with the end-of-turn token,
    which is a target even where the tokenizer pads with it; white space that a template writes after that token is not.

    Args:
        first: the number of the first one's row.
    """
    texts: list[str] = []
    begins: list[int] = []
    asked: list[Turn] | None = None
    prompt = ""
    for turns in conversations:
        text = _laid_out(tokenizer, turns, stream)
        if turns[:-1] != asked:  # several answers to one question follow each other
            asked = turns[:-1]
            prompt = _laid_out(tokenizer, asked, stream, ask=True)
        same = takewhile(lambda ab: ab[0] == ab[1], zip(text, prompt, strict=False))
        begins.append(len(prompt) if text.startswith(prompt) else sum(1 for _ in same))
        after = text.rfind(turns[-1]["content"]) + len(turns[-1]["content"])
        texts.append(text.rstrip() if text[after:].strip() else text)
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    examples: list[Example | None] = []
    for i, (begin, offsets) in enumerate(zip(begins, encoded["offset_mapping"], strict=True)):
        ids = encoded["input_ids"][i][:max_tokens]
        answer = max(1, next((t for t, (_, end) in enumerate(offsets) if end > begin), len(offsets)))
        examples.append(Example(tuple(ids), answer, stream, first + i) if answer < len(ids) else None)
    return examples


def _laid_out(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], stream: str, ask: bool = False) -> str:
    """Turns as the chat template writes them, with its beginning of an answer where one is asked for.

    Raises:
        Refused: it has no place for such turns, or is no template.
    """
    try:
        with at_most(LONGEST):
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program, and may raise what it likes
        roles = ", ".join(column_name(turn["role"]) for turn in turns)
        why = without_quotes(" ".join(str(error).split()))
        if _repeats(why, turns):
            why = type(error).__name__
        found = f"{shown(roles, as_it_is=True)} ({shown(why, 300, as_it_is=True)})"
        said = f"{stream}: the chat template does not take turns of {found}"
        raise Refused(f"{said}; give model.chat_template a file that does, or the rows other roles.") from error


def _repeats(said: str, turns: list[Turn]) -> bool:
    """Whether an error repeats words of a row."""
    texts = [" ".join(turn["content"].split()) for turn in turns]
    return any(text[i : i + 12] in said for text in texts for i in range(max(1, len(text) - 11)))


def encode_text(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, stream: str, max_tokens: int) -> list[Example]:
    """Running text cut into blocks of at most `max_tokens`; every token but a block's first is a target, the end of a text too."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    examples: list[Example] = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]
        size = max_tokens - (bos is not None)
        for start in range(0, len(ids), size):
            block = tuple([] if bos is None else [bos]) + tuple(ids[start : start + size])
            if len(block) > 1:
                examples.append(Example(block, 1, stream, len(examples)))
    return examples


def frugal(tokenizer: Any) -> Any:
    """The same tokenizer, which keeps no words that it has encoded. `tokenizers` (0.23) does not give them back when a tokenizer is
    dropped, so a process of many runs would grow with each. Encoding takes a seventh longer."""
    resize = getattr(getattr(tokenizer.backend_tokenizer, "model", None), "_resize_cache", None)
    if resize:
        resize(0)
    return tokenizer


def spelling(tokenizer: Any) -> str:
    """Stands for all that decides how a tokenizer encodes a conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    marks = {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()}
    return fingerprint(rules, str(tokenizer.chat_template), marks)


def draw(*key: object) -> int:
    """A random integer in [0, 2⁶⁴) that depends on the key alone (a seed, an epoch, an example), never on a rank or on earlier
    draws."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little")


def content_of(row: Row, source: Source) -> str:
    """What makes two rows the same: the text that would be learnt, white space folded. A question with its answer is the same as a
    chat of these two turns."""
    if source.messages:
        texts = _texts_of(row[source.messages])
    else:
        texts = [row[column] for column in ([source.text] if source.text else [source.prompt, source.answer]) if column]
    return json.dumps([" ".join(str(text).split()) for text in texts])


def _texts_of(turns: Any) -> list[Any]:
    """Of a chat, however its turns are written down; what is none is refused when it is encoded."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return [turns]
    pairs = [(turn.get("role"), turn.get("content")) for turn in turns]
    plain = [role for role, _ in pairs] == ["user", "assistant"]
    return [content for _, content in pairs] if plain else [part for pair in pairs for part in pair]
