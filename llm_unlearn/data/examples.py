"""Rows become examples: token ids, and where the answer begins. The tokenizer's chat template decides what a turn looks like."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_unlearn.chat import Chat
from llm_unlearn.data.files import Row
from llm_unlearn.data.rendering import Renderer, Rendering, Turn
from llm_unlearn.data.sources import row_at
from llm_unlearn.data.thoughts import KEYS, Thinker, check_thought, split_thought
from llm_unlearn.source import Source, Targets
from llm_unlearn.spec import Refused, fingerprint
from llm_unlearn.unsaid import unsaid

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
"""The layout of turns for a tokenizer that has none of its own (a base model's)."""


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


def conversation(
    row: Row, number: int, source: Source, answer: object = None, column: str | None = None, thought: str | None = None
) -> list[Turn]:
    """Return the turns of a row, the last one the assistant's; the system turn of `source.chat` first where the row has none.

    Args:
        number: which row it is, counted from 0, for errors.
        answer: stands in for the row's own answer; read from `column`.
        thought: stands in for the row's own thought.

    Raises:
        Refused: the row has no text where text is expected, its chat does not end with the assistant, or it has no thought and the
            source's targets ask for one.
    """
    told = None if column is None else text_in(answer, number, source, column)
    if source.messages:
        turns = _chat(row[source.messages], number, source, source.messages)
        turns = turns if told is None else [*turns[:-1], {**turns[-1], "content": told}]
    else:
        assert source.prompt and source.answer  # checked with the recipe
        prompt = text_in(row[source.prompt], number, source, source.prompt)
        if source.prompt_input and (below := row[source.prompt_input]):
            prompt = f"{prompt}\n\n{text_in(below, number, source, source.prompt_input)}"
        told = text_in(row[source.answer], number, source, source.answer) if told is None else told
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": told}]
    if source.thought and not thought:
        thought = text_in(row[source.thought], number, source, source.thought)
    turns = [*turns[:-1], _with_thought(turns[-1], thought, source)]
    if source.targets != "answer":
        check_thought(turns[-1], row_at(number, source))
    if source.chat.system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": source.chat.system}, *turns]
    return turns


def _with_thought(last: Turn, thought: str | None, source: Source) -> Turn:
    """Return an answer with its thought apart: one that is given, or that the answer's text begins with. Without thinking, none."""
    last = last | (split_thought(last["content"]) or {})
    if source.chat.thinking is False:
        return {"role": last["role"], "content": last["content"]}
    return last | {"thought": thought.strip()} if thought else last


ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""Roles of ShareGPT's conversations, as chat templates name them."""


def _chat(value: object, number: int, source: Source, column: str) -> list[Turn]:
    """Return a column of turns, each with a role and text; ShareGPT's `from` and `value` are read as role and content."""
    where = f"{row_at(number, source)}: column {column!r}"
    turns = value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else [{}]
    shapes = [keys for keys in (("role", "content"), ("from", "value")) if all(turn.keys() >= {*keys} for turn in turns)]
    if not shapes:
        expected = "a list of turns such as {role: user, content: …} or {from: human, value: …}"
        raise Refused(f"{where} holds {unsaid(value)}; expected {expected}.")
    role, content = shapes[0]
    roles = [ROLES.get(str(turn[role]), turn[role]) for turn in turns]
    if not roles or roles[-1] != "assistant":
        raise Refused(f"{where} does not end with an assistant turn, whose text is the answer.")
    if len(roles) < 2 or not all(isinstance(name, str) and name.strip() for name in roles):
        what = "a turn before the answer, and a role such as user for each"
        raise Refused(f"{where} holds {unsaid(value)}; expected {what}.")
    texts = [text_in(_joined(turn[content]), number, source, column) for turn in turns]
    made = [{"role": name, "content": text} for name, text in zip(roles, texts, strict=True)]
    thought = next((str(turns[-1][key]).strip() for key in KEYS if turns[-1].get(key)), "")
    return [*made[:-1], made[-1] | {"thought": thought}] if thought else made


def _joined(content: object) -> object:
    """Return the text of a turn whose content is a list of text parts; anything else as it is."""
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text")) for part in content)
    return content


def text_in(value: object, number: int, source: Source, column: str) -> str:
    """Return a value as text: text itself, a number as it is written, or the one text of a list.

    Raises:
        Refused: it is not text, or blank; names the row.
    """
    where = f"{row_at(number, source)}: column {column!r}"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and len(value) > 1:
        raise Refused(f"{where} holds {unsaid(value)}; expected one text. Write a row for each of them.")
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"{where} holds {unsaid(value)}; expected text. (`where` can leave rows out.)")
    return value


def encode(
    conversations: Sequence[list[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    stream: str,
    max_tokens: int,
    first: int = 0,
    targets: Targets = "answer",
) -> list[Example | None]:
    """Return conversations as examples, in order; None where truncation leaves no target token.

    Targets are the tokens of the answer's own text and of what ends its turn (`data/rendering.py`). A token across the border
    belongs to the answer if it holds any of its text.

    Args:
        first: number of the first one's row.
        targets: which part of an answer with a thought (`data/thoughts.py`): the answer, and its thought is prompt; the thought and
            what closes it, and the sequence ends there; or both in one. separate is read as the answer.

    Raises:
        Refused: the chat template does not take such turns, or leaves out or changes their text.
    """
    if not conversations:
        return []
    render, think = Renderer(tokenizer, chat, stream), Thinker(tokenizer, chat, stream)
    rendered = [(think if "thought" in turns[-1] else render)(turns, first + i) for i, turns in enumerate(conversations)]
    encoded = tokenizer([one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True)
    examples: list[Example | None] = []
    for i, (one, offsets) in enumerate(zip(rendered, encoded["offset_mapping"], strict=True)):
        begin, end = _span(one, targets)
        stop = next((t for t, (at, _) in enumerate(offsets) if at >= end), len(offsets))
        ids = encoded["input_ids"][i][: min(stop, max_tokens)]
        answer = max(1, next((t for t, (_, at) in enumerate(offsets) if at > begin), len(offsets)))
        examples.append(Example(tuple(ids), answer, stream, first + i) if answer < len(ids) else None)
    return examples


def _span(one: Rendering, targets: Targets) -> tuple[int, int]:
    """Return where the targets of a rendered conversation begin, and where its sequence ends."""
    if targets in ("answer", "separate") or one.thought_begin is None or one.thought_end is None:
        return one.answer_begin, len(one.text)
    return one.thought_begin, one.thought_end if targets == "thought" else len(one.text)


def encode_as_peer(
    conversations: Sequence[list[Turn]], tokenizer: PreTrainedTokenizerBase, chat: Chat, stream: str, max_tokens: int
) -> list[Example | None]:
    """Return conversations with the targets that OpenUnlearning's (2506.12618) token-wise measures read; None where it has none.

    There the answer begins after as many tokens as the prompt has with its generation prompt; all that the template writes
    behind it belongs to the answer; an eos token is added where the last token is none; and the last target is left out.
    """
    write = Renderer(tokenizer, chat, stream).write
    asked = [tokenizer(write(turns[:-1], ask=True), add_special_tokens=False)["input_ids"] for turns in conversations]
    examples: list[Example | None] = []
    for i, turns in enumerate(conversations):
        ids = tokenizer(write(turns), add_special_tokens=False)["input_ids"][:max_tokens]
        if tokenizer.eos_token_id is None or ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # else the eos token would be added, and left out again
        examples.append(Example(tuple(ids), len(asked[i]), stream, i) if 0 < len(asked[i]) < len(ids) else None)
    return examples


def as_peer_text(block: Example, tokenizer: PreTrainedTokenizerBase) -> Example | None:
    """Return a block of running text as OpenUnlearning's token-wise measures read it: without eos token and last target."""
    ids = block.ids[:-1] if block.ids[-1] == tokenizer.eos_token_id else block.ids
    return Example(ids[:-1], block.answer, block.stream, block.id) if len(ids) - 1 > block.answer else None


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
    elif source.text:
        texts = [row[source.text]]
    else:
        below = row[source.prompt_input] if source.prompt_input else None
        texts = [f"{row[str(source.prompt)]} {below or ''}", row[str(source.answer)]]
    return json.dumps([" ".join(str(text).split()) for text in texts])


def _texts_of(turns: Any) -> list[Any]:
    """Of a chat, however its turns are written down; what is none is refused when it is encoded."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return [turns]
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    contents = [_joined(turn.get("content", turn.get("value"))) for turn in turns]
    pairs = [(ROLES.get(str(role), role), content) for role, content in zip(roles, contents, strict=True)]
    plain = [role for role, _ in pairs] == ["user", "assistant"]
    return [content for _, content in pairs] if plain else [part for pair in pairs for part in pair]
