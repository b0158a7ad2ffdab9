"""The sets of a suite as a tokenizer sees them: answers to score and prompts to answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_unlearn.chat import Chat
from llm_unlearn.data.examples import Example, as_peer_text, conversation, encode, encode_as_peer, encode_text, text_in
from llm_unlearn.data.files import Row
from llm_unlearn.data.rendering import Turn, TurnEnd, turn_end
from llm_unlearn.data.sources import row_at, rows
from llm_unlearn.data.thoughts import Opening, Thinker
from llm_unlearn.evaluation.tables import Cut, Need, Shots
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, fingerprint
from llm_unlearn.unsaid import unsaid

MAX_THOUGHT = 512
"""Most tokens of a thought, unless a suite says otherwise."""


@dataclass(frozen=True)
class Thinking:
    """Settings for a model that thinks before it answers the prompts of a set."""

    openings: list[Opening]  # (R,)
    limit: int
    """Most tokens of a thought; when they are used up, it is closed for the model, and the answer begins."""
    only: bool
    """The thought itself is what the set asks for, and no answer is written."""
    thoughts: list[str]
    """(R,) the rows' own; empty where a row has none."""

    def only_rows(self, chosen: Sequence[int]) -> Thinking:
        """Return the same for some rows."""
        return replace(self, openings=[self.openings[row] for row in chosen], thoughts=[self.thoughts[row] for row in chosen])

    def end(self, tokenizer: Any) -> TurnEnd:
        """Return what ends a thought."""
        ends = [opening.end(tokenizer) for opening in self.openings[:1]]
        return ends[0] if ends else TurnEnd()

    def prompts(self, tokenizer: Any, thoughts: Sequence[str] | None = None) -> list[tuple[int, ...]]:
        """(R,) Return the prompts of the thoughts, or (R · n,) those of the answers behind (R · n,) thoughts, n to a prompt."""
        texts = [opening.text for opening in self.openings]
        if thoughts is not None:
            n = len(thoughts) // len(texts) if texts else 1
            around = [(opening.text, opening.close) for opening in self.openings for _ in range(n)]
            # a blank before the answer is a part of its first token
            texts = [(text + thought + close).rstrip(" ") for (text, close), thought in zip(around, thoughts, strict=True)]
        return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    @property
    def fingerprint(self) -> str:
        """Stands for all that decides the prompts and what is written to them."""
        return fingerprint([[one.text, one.close] for one in self.openings], self.limit, self.only)


def thinking_of(
    conversations: Sequence[list[Turn]], tokenizer: Any, source: Source, name: str, limit: int = MAX_THOUGHT
) -> Thinking | None:
    """Return how a model is asked to think before it answers, or None where it is asked without.

    It thinks where the settings say so, and where rows bring thoughts and the settings do not say otherwise.
    """
    if source.chat.thinking is False or not (source.chat.thinking or any("thought" in turns[-1] for turns in conversations)):
        return None
    think = Thinker(tokenizer, source.chat, name)
    openings = [think.opening(turns[:-1]) for turns in conversations]
    return Thinking(openings, limit, source.targets == "thought", [turns[-1].get("thought", "") for turns in conversations])


@dataclass(frozen=True)
class EncodedSet:
    """A set of a suite as this tokenizer sees it: A answers to score, and R prompts to answer."""

    ids: list[str]
    prompts: list[str]
    answers: list[str]
    row: list[int]  # (A,)
    kind: list[str]  # (A,)
    examples: list[Example]  # (A,), their stream is their kind
    needs: frozenset[Need]
    keywords: list[list[str]] | None = None  # (R,)
    cut: Mapping[Cut, list[str]] = field(default_factory=dict)  # (R,) each
    chat: Chat | None = field(default_factory=Chat)
    """Settings of its chat template; None for running text, which has no turns."""
    thinking: Thinking | None = None
    """Settings of the thought before an answer; None: the model answers at once."""

    @property
    def generate(self) -> bool:
        """Whether its prompts are to be answered."""
        return "generation" in self.needs

    @property
    def asked(self) -> list[Example]:
        """(R,) the examples of the rows themselves, without paraphrases and wrong answers."""
        return [example for example, kind in zip(self.examples, self.kind, strict=True) if kind == "answer"]

    def end(self, tokenizer: Any) -> TurnEnd:
        """Return what ends an answer to its prompts."""
        return turn_end(tokenizer, self.chat) if self.chat else TurnEnd()

    @property
    def fingerprint(self) -> str:
        """Stands for all that is scored."""
        scored = [[row, kind, one.answer, *one.ids] for row, kind, one in zip(self.row, self.kind, self.examples, strict=True)]
        return fingerprint(self.ids, self.prompts, self.answers, scored)

    @property
    def fingerprint_asked(self) -> str:
        """Stands for the rows themselves."""
        return fingerprint(self.ids, self.prompts, self.answers, [[one.answer, *one.ids] for one in self.asked])


def only(one: EncodedSet, chosen: Sequence[int]) -> EncodedSet:
    """Some rows of a set; of what is asked of them only what each answers for itself: its own answer, and what is written."""
    own, keep = one.asked, range(len(chosen))
    return EncodedSet(
        [one.ids[row] for row in chosen],
        [one.prompts[row] for row in chosen],
        [one.answers[row] for row in chosen],
        list(keep),
        ["answer" for _ in keep],
        [own[row] for row in chosen],
        one.needs & {"generation"},
        chat=one.chat,
        thinking=one.thinking.only_rows(chosen) if one.thinking else None,
    )


def behind(shots: Shots, one: EncodedSet, other: EncodedSet) -> list[Example]:
    """(R,) the rows of a set behind the first rows of another, as one running text; a second begin-of-text token is left out."""
    first, *rest = [example.ids for example in other.asked[: shots.count]]
    begin = first[0]
    text = [*first, *(token for ids in rest for token in (ids[1:] if ids[0] == begin else ids))]
    result = []
    for example in one.asked:
        same = example.ids[0] == begin and example.answer > 1
        ids = (*text, *example.ids[same:])
        result.append(Example(ids, len(text) + example.answer - same, example.stream, example.id))
    return result


def encode_set(
    name: str, source: Source, needs: Iterable[Need], tokenizer: Any, max_thought_tokens: int = MAX_THOUGHT
) -> EncodedSet:
    """Read and encode one set; answers that do not fit into `max_tokens` are left out, with their row. Of a set whose targets are
    thoughts, these stand in the place of answers.

    Args:
        max_thought_tokens: longest thought that a model may write before it answers.

    Raises:
        Refused: the set cannot be read, or a measure needs wrong answers and a row has none.
    """
    needs = frozenset(needs)
    found = rows(source)
    if source.text:
        blocks = encode_text(
            (text_in(row[source.text], i, source, source.text) for i, row in enumerate(found)), tokenizer, name, source.max_tokens
        )
        texts = [str(tokenizer.decode(block.ids[block.answer :])) for block in blocks]
        ids = [str(i) for i in range(len(blocks))]
        scored = [(i, replace(block, stream="answer")) for i, block in enumerate(blocks)]
        if "peer" in needs:
            read = [(i, as_peer_text(block, tokenizer)) for i, block in enumerate(blocks)]
            scored += [(i, replace(one, stream="peer")) for i, one in read if one]
        at, examples = [i for i, _ in scored], [one for _, one in scored]
        return EncodedSet(ids, [""] * len(ids), texts, at, [one.stream for one in examples], examples, needs, chat=None)
    wanted: list[tuple[int, str, list[dict[str, str]]]] = []
    for i, row in enumerate(found):
        wanted.append((i, "answer", conversation(row, i, source)))
        if "paraphrase" in needs and source.paraphrase and row[source.paraphrase]:
            wanted.append((i, "paraphrase", conversation(row, i, source, row[source.paraphrase], source.paraphrase)))
        if "perturbed" in needs and (column := source.perturbed or source.choices):
            wrong = row[column]
            if not isinstance(wrong, list) or not wrong:
                raise Refused(f"{row_at(i, source)}: column {column!r} holds {unsaid(wrong)}; expected a list of wrong answers.")
            wanted.extend((i, "perturbed", conversation(row, i, source, answer, column)) for answer in wrong)
    asked = [turns for _, _, turns in wanted]
    encoded = encode(asked, tokenizer, source.chat, name, source.max_tokens, targets=source.targets)
    whole = {i for (i, kind, _), example in zip(wanted, encoded, strict=True) if kind == "answer" and example}
    if not whole:
        raise Refused(f"set {name!r}: no answer fits into max_tokens = {source.max_tokens}.")
    number = {i: r for r, i in enumerate(sorted(whole))}
    kept = [
        (number[i], kind, replace(example, stream=kind))
        for (i, kind, _), example in zip(wanted, encoded, strict=True)
        if example and i in whole
    ]
    turns = {i: turns for i, kind, turns in wanted if kind == "answer"}
    if "peer" in needs:
        peer = encode_as_peer([turns[i] for i in number], tokenizer, source.chat, name, source.max_tokens)
        kept += [(row, "peer", replace(example, stream="peer")) for row, example in enumerate(peer) if example]
    own = [example for _, kind, example in kept if kind == "answer"]
    return EncodedSet(
        [str(found[i].get("id", i)) for i in number],
        [turns[i][-2]["content"] for i in number],
        [turns[i][-1]["thought" if source.targets == "thought" else "content"] for i in number],
        [row for row, _, _ in kept],
        [kind for _, kind, _ in kept],
        [example for _, _, example in kept],
        needs,
        [_spans(found[i], i, source) for i in number] if source.keyword else None,
        {need: [_first(example, need.tokens, tokenizer) for example in own] for need in needs if isinstance(need, Cut)},
        source.chat,
        thinking_of([turns[i] for i in number], tokenizer, source, name, max_thought_tokens),
    )


def _spans(row: Row, number: int, source: Source) -> list[str]:
    """The key spans of one row: text, or a list of texts.

    Raises:
        Refused: the column holds something else.
    """
    value = row[str(source.keyword)]
    if value is None:
        return []
    return [text_in(one, number, source, str(source.keyword)) for one in (value if isinstance(value, list) else [value])]


def _first(example: Example, tokens: int, tokenizer: Any) -> str:
    """The answer as text, cut to so many tokens."""
    return str(tokenizer.decode(example.ids[example.answer :][:tokens], skip_special_tokens=True)).strip()
