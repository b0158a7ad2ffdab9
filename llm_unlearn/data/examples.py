"""Rows become examples: token ids, and where the answer begins. The tokenizer's chat template decides what a turn looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import read, row_at, rows
from llm_unlearn.objectives.views import Kind, beside
from llm_unlearn.sections import Data
from llm_unlearn.source import Alternate, Contrast, Source
from llm_unlearn.spec import Refused, shown
from llm_unlearn.unsaid import column_name, near_column, unsaid, without_quotes

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
"""The layout of turns for a tokenizer that has none of its own (a base model's)."""


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


@dataclass(frozen=True)
class Examples:
    """All examples of a run, by stream, and what was left out on the way."""

    streams: dict[str, list[Example]]
    companions: dict[str, list[list[Example]]]  # `forget.alternate` -> for each example of `forget`, those that may stand beside it
    dropped: dict[str, int]  # stream -> rows whose answer did not fit into max_tokens
    overlap: int  # rows that stood in both sets and left the retain set


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
    conversations: Sequence[list[Turn]], tokenizer: PreTrainedTokenizerBase, stream: str, max_tokens: int
) -> list[Example | None]:
    """Conversations as examples, in order; None where truncation leaves no answer token.

    The answer begins where the rendered conversation goes on after its generation prompt, and ends with the end-of-turn token,
    which is a target even where the tokenizer pads with it; white space that a template writes after that token is not.
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
        examples.append(Example(tuple(ids), answer, stream, i) if answer < len(ids) else None)
    return examples


def _laid_out(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], stream: str, ask: bool = False) -> str:
    """Turns as the chat template writes them, with its beginning of an answer where one is asked for.

    Raises:
        Refused: it has no place for such turns, or is no template.
    """
    try:
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


def read_examples(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """Read, compare and encode the streams of a recipe.

    Raises:
        Refused: a source cannot be read, a stream has no examples, or rows stand in both sets and the recipe says that is an error.
    """
    sources = {"forget": data.forget} | ({"retain": data.retain} if data.retain else {})
    sources |= {"holdout": data.holdout} if data.holdout else {}
    found = {name: rows(source) for name, source in sources.items()}
    overlap = 0
    if data.retain:
        forget = {content_of(row, data.forget) for row in found["forget"]}
        shared = [i for i, row in enumerate(found["retain"]) if content_of(row, data.retain) in forget]
        overlap = len(shared)
        if overlap and data.overlap == "error":
            first = row_at(shared[0], data.retain)
            raise Refused(
                f"data: {overlap} of {len(found['retain'])} retain rows also stand in the forget set (first: {first}). "
                "Take them out, or say data.overlap: drop."
            )
        found["retain"] = [row for i, row in enumerate(found["retain"]) if i not in set(shared)]

    streams: dict[str, list[Example]] = {}
    dropped: dict[str, int] = {}
    companions: dict[str, list[list[Example]]] = {}
    for name, source in sources.items():
        if source.text:
            texts = [text_in(row[source.text], i, source, source.text) for i, row in enumerate(found[name])]
            streams[name], dropped[name] = encode_text(texts, tokenizer, name, source.max_tokens), 0
            for kind, prefix in _prefixes(source.contrast):
                before = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
                companions[beside(name, kind)] = [[_after(before, one, beside(name, kind))] for one in streams[name]]
            continue
        turns = [conversation(row, i, source) for i, row in enumerate(found[name])]
        encoded = encode(turns, tokenizer, name, source.max_tokens)
        kept = [(row, example) for row, example in zip(found[name], encoded, strict=True) if example]
        if source.alternate:
            stream = beside(name, "alternate")
            kept, companions[stream] = _alternates(kept, source, source.alternate, tokenizer, seed, stream)
        for kind, prefix in _prefixes(source.contrast):
            asked = _asked_otherwise(kept, source, prefix, tokenizer, beside(name, kind))
            companions[beside(name, kind)] = [[one] for one in asked]
        streams[name], dropped[name] = [example for _, example in kept], len(encoded) - len(kept)
    for name, examples in streams.items():
        if not examples:
            why = f"{dropped[name]} rows have no answer within max_tokens = {sources[name].max_tokens}"
            shared_too = f", {overlap} rows also stand in the forget set" if name == "retain" and overlap else ""
            raise Refused(f"data.{name}: no example is left; {why}{shared_too}.")
    return Examples(streams, companions, dropped, overlap)


def _alternates(
    kept: list[tuple[Row, Example]],
    source: Source,
    alternate: Alternate,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    stream: str,
) -> tuple[list[tuple[Row, Example]], list[list[Example]]]:
    """The alternate answers of each row, as examples; a row loses its place when none of its alternates fits."""
    pool = read(alternate.source) if alternate.source else []
    if alternate.source and not pool:
        raise Refused(f"{alternate.source}: has no rows; expected at least one, with an answer in {alternate.answer!r}.")
    if pool and alternate.answer not in pool[0]:
        what = f"alternate.answer names column {alternate.answer!r}, which is not there"
        raise Refused(f"{alternate.source}: {what}; {near_column(alternate.answer, pool[0])}")
    result: list[tuple[Row, Example]] = []
    alternates: list[list[Example]] = []
    for row, example in kept:
        answers = _drawn(pool, row, source, alternate, seed) if pool else row[alternate.answer]
        answers = answers if isinstance(answers, list) else [answers]
        turns = [conversation(row, example.id, source, answer, alternate.answer) for answer in answers]
        encoded = [other for other in encode(turns, tokenizer, stream, source.max_tokens) if other]
        if encoded:
            result.append((row, example))
            alternates.append(encoded)
    return result, alternates


def _drawn(pool: list[Row], row: Row, source: Source, alternate: Alternate, seed: int) -> list[object]:
    """`count` rows' answers from the pool, other than the row's own answer; which ones follows from the seed and the row's
    content."""
    own = " ".join(str(row.get(source.answer or "")).split())
    answers: list[object] = []
    for k in range(10 * alternate.count):
        value = pool[draw(seed, content_of(row, source), *([k] if k else [])) % len(pool)][alternate.answer]
        found = value if isinstance(value, list) else [value]
        if own not in (" ".join(str(one).split()) for one in found) and (alternate.count == 1 or found[0] not in answers):
            answers += found
        if len(answers) >= alternate.count:
            break
    return answers


def _prefixes(contrast: Contrast | None) -> tuple[tuple[Kind, str], ...]:
    return (("expert", contrast.expert), ("novice", contrast.novice)) if contrast else ()


def _after(before: list[int], example: Example, stream: str) -> Example:
    """A block of running text behind other text, which has no targets."""
    return Example((*before, *example.ids), example.answer + len(before), stream, example.id)


def _asked_otherwise(
    kept: list[tuple[Row, Example]], source: Source, prefix: str, tokenizer: PreTrainedTokenizerBase, stream: str
) -> list[Example]:
    """The same answers, token by token, to prompts that begin with `prefix`.

    Raises:
        Refused: the tokenizer makes other answer tokens of it.
    """
    turns = [conversation(row, example.id, source) for row, example in kept]
    if prefix:
        turns = [[*one[:-2], {**one[-2], "content": f"{prefix} {one[-2]['content']}"}, one[-1]] for one in turns]
    encoded = encode(turns, tokenizer, stream, source.max_tokens + len(tokenizer(prefix)["input_ids"]) + 8)
    result: list[Example] = []
    for (_, example), other in zip(kept, encoded, strict=True):
        answer = example.ids[example.answer :]
        if other is None or other.ids[other.answer :][: len(answer)] != answer:
            said = "its answer has other tokens behind the prefix of data.….contrast"
            raise Refused(f"{row_at(example.id, source)}: {said}; change that.")
        result.append(Example(other.ids[: other.answer + len(answer)], other.answer, stream, example.id))
    return result


def draw(*key: object) -> int:
    """A random integer in [0, 2⁶⁴) that depends on the key alone (a seed, an epoch, an example), never on a rank or on earlier
    draws."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little")


def content_of(row: Row, source: Source) -> str:
    """What makes two rows the same: the text that would be learnt, white space folded."""
    columns = [source.messages] if source.messages else [source.text] if source.text else [source.prompt, source.answer]
    return json.dumps([" ".join(str(row[column]).split()) for column in columns if column])
