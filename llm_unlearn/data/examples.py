"""Rows become examples: token ids, and where the answer begins. The tokenizer's chat template decides what a turn looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.sources import Row, read, rows
from llm_unlearn.recipe import Alternate, Data, Source
from llm_unlearn.spec import Refused, nearest

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
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


@dataclass(frozen=True)
class Examples:
    """All examples of a run, by stream, and what was left out on the way."""

    streams: dict[str, list[Example]]
    alternates: list[list[Example]]  # of each example of the stream that has them; else empty
    alternate_of: str | None
    dropped: dict[str, int]  # stream -> rows whose answer did not fit into max_tokens
    overlap: int  # rows that stood in both sets and left the retain set


def conversation(row: Row, source: Source, answer: Any = None) -> list[dict[str, str]]:
    """The turns of a row, the last one the assistant's; `answer` stands in for the row's own.

    Raises:
        Refused: the row has no text where text is expected, or a chat does not end with the assistant.
    """
    if source.messages:
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row[source.messages]]
        if not turns or turns[-1]["role"] != "assistant":
            raise Refused(f"{source.source}: a chat in column {source.messages!r} does not end with an assistant turn: {turns[-1:]}.")
        return turns if answer is None else [*turns[:-1], {"role": "assistant", "content": answer}]
    assert source.prompt and source.answer  # checked with the recipe
    prompt, truth = row[source.prompt], row[source.answer] if answer is None else answer
    for column, value in ((source.prompt, prompt), (source.answer, truth)):
        if not isinstance(value, str) or not value.strip():
            raise Refused(f"{source.source}: column {column!r} holds {value!r} in a row; expected text. (`where` can leave rows out.)")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": truth}]


def encode(
    conversations: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase, stream: str, max_tokens: int
) -> list[Example | None]:
    """Conversations as examples, in order; None where truncation leaves no answer token.

    The answer begins where the rendered conversation goes on after its generation prompt, and ends with the end-of-turn token, which is
    a target even where the tokenizer pads with it; white space that a template writes after that token is not.
    """
    whole = [str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in conversations]
    opens = [str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)) for turns in conversations]
    examples: list[Example | None] = []
    for i, (text, prompt, turns) in enumerate(zip(whole, opens, conversations, strict=True)):
        begin = len(prompt) if text.startswith(prompt) else sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(text, prompt, strict=False)))
        after = text.rfind(turns[-1]["content"]) + len(turns[-1]["content"])
        if text[after:].strip():
            text = text.rstrip()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"]
        answer = max(1, next((t for t, (_, end) in enumerate(offsets) if end > begin), len(offsets)))
        examples.append(Example(tuple(ids), answer, stream, i) if answer < len(ids) else None)
    return examples


def encode_text(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, stream: str, max_tokens: int) -> list[Example]:
    """Running text cut into blocks of at most `max_tokens`; every token but a block's first is a target, the end of a text too."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    examples = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]
        size = max_tokens - (bos is not None)
        for start in range(0, len(ids), size):
            block = tuple([] if bos is None else [bos]) + tuple(ids[start : start + size])
            if len(block) > 1:
                examples.append(Example(block, 1, stream, len(examples)))
    return examples


def read_examples(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """Read, compare and encode the streams of a recipe.

    Raises:
        Refused: a source cannot be read, a stream has no examples, or rows stand in both sets and the recipe says that is an error.
    """
    sources = {"forget": data.forget} | ({"retain": data.retain} if data.retain else {})
    found = {name: rows(source) for name, source in sources.items()}
    overlap = 0
    if data.retain:
        forget = {_content(row, data.forget) for row in found["forget"]}
        shared = [i for i, row in enumerate(found["retain"]) if _content(row, data.retain) in forget]
        overlap = len(shared)
        if overlap and data.overlap == "error":
            raise Refused(
                f"data: {overlap} of {len(found['retain'])} retain rows also stand in the forget set (first: row {shared[0] + 1} of "
                f"{data.retain.source}, {_short(found['retain'][shared[0]], data.retain)!r}). Take them out, or say data.overlap: drop."
            )
        found["retain"] = [row for i, row in enumerate(found["retain"]) if i not in set(shared)]

    streams: dict[str, list[Example]] = {}
    dropped: dict[str, int] = {}
    alternates: list[list[Example]] = []
    alternate_of = None
    for name, source in sources.items():
        if source.text:
            streams[name], dropped[name] = encode_text((row[source.text] for row in found[name]), tokenizer, name, source.max_tokens), 0
            continue
        encoded = encode([conversation(row, source) for row in found[name]], tokenizer, name, source.max_tokens)
        kept = [(row, example) for row, example in zip(found[name], encoded, strict=True) if example]
        if source.alternate:
            alternate_of = name
            kept, alternates = _alternates(kept, source, source.alternate, tokenizer, seed)
        streams[name], dropped[name] = [example for _, example in kept], len(encoded) - len(kept)
    for name, examples in streams.items():
        if not examples:
            raise Refused(f"data.{name}: no example is left; {dropped[name]} rows have no answer within max_tokens = {sources[name].max_tokens}.")
    return Examples(streams, alternates, alternate_of, dropped, overlap)


def _alternates(
    kept: list[tuple[Row, Example]], source: Source, alternate: Alternate, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[tuple[Row, Example]], list[list[Example]]]:
    """The alternate answers of each row, as examples; a row loses its place when none of its alternates fits."""
    pool = read(alternate.source) if alternate.source else []
    if pool and alternate.answer not in pool[0]:
        raise Refused(f"{alternate.source}: alternate.answer names column {alternate.answer!r}, which is not there; {nearest(alternate.answer, pool[0])}")
    result: list[tuple[Row, Example]] = []
    alternates: list[list[Example]] = []
    for row, example in kept:
        if pool:
            answers: Any = pool[draw(seed, source.source, example.id) % len(pool)][alternate.answer]
        else:
            answers = row[alternate.answer]
        turns = [conversation(row, source, answer) for answer in (answers if isinstance(answers, list) else [answers])]
        encoded = [other for other in encode(turns, tokenizer, "alternate", source.max_tokens) if other]
        if encoded:
            result.append((row, example))
            alternates.append(encoded)
    return result, alternates


def draw(*key: object) -> int:
    """A random integer in [0, 2⁶⁴) that depends on the key alone (a seed, an epoch, an example), never on a rank or on earlier draws."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little")


def _content(row: Row, source: Source) -> str:
    """What makes two rows the same: the text that would be learnt, white space folded."""
    columns = [source.messages] if source.messages else [source.text] if source.text else [source.prompt, source.answer]
    return json.dumps([" ".join(str(row[column]).split()) for column in columns if column])


def _short(row: Row, source: Source) -> str:
    text = str(row[source.prompt or source.messages or source.text or ""])
    return text if len(text) <= 80 else text[:77] + "…"
