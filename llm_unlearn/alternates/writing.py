"""Other answers to the questions of a set, written by the model itself, for losses that teach one (AltPO, Mekala et al. 2024,
2409.13474).

A good alternate answers the same question in the same form, and its facts are different. Asked again by chance, a model that
knows an answer by heart repeats it: the embedded target gives each token of the truth with p = .997, and where heat moves it
away, it is the grammar that breaks. So the truth is *forbidden* instead. The words that carry its facts are those that the
question does not say and that are about as rare in the recipe's data as the rarest of them; the first piece of each cannot be
written. All other tokens the model writes as surely as ever, and where the fact stood it takes the next best: another town.

The next best is not always a town. What a small model writes is therefore held against the data (`Usage.usual`): it must have
the wording of an answer to this kind of question, its facts must be told in such answers, and none of them may be told of the
same subject elsewhere, for that would teach what is to be forgotten. Questions that still lack answers are asked again, hotter,
and with the facts of the answers found so far forbidden too. (Embedded forget set, five each: 193 alternates, all of which name
a value that the population has for that kind of fact. Without this check 126 of 200 do, without forbidding either 78 of 149.)

A large model words its answers freely: if fewer than half of the questions have an answer in the data's words after the first
round, what differs from the truth is enough, and the summary says so. So it is with a small model too, where the data is too
little to tell: with the embedded forget set and no retain set beside it, 76 of 200.

Every draw follows from the seed, the question and the number of the draw (as far as the model's own arithmetic is the same in
any batch: on a CPU it is but for the last digits, in bf16 less so).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import folder
from llm_unlearn.alternates.request import COLUMN, Request, filled
from llm_unlearn.alternates.usage import Usage, words
from llm_unlearn.bars import Bar
from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import row_at, rows
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

if TYPE_CHECKING:
    from llm_unlearn.data.examples import Example
    from llm_unlearn.data.rendering import Turn
    from llm_unlearn.evaluation.generation import Ask
    from llm_unlearn.models.load import Loaded

ROUNDS = 8
"""How often a question is asked again that still lacks answers; each round is hotter than the one before it by a quarter."""
PER_LACKING = 4
"""Draws for each answer that is still lacking."""
FLOOR = 0.1
"""In the first round, tokens less likely than this share of the likeliest are never drawn; half of it in each further round."""


@dataclass
class Question:
    """One row on its way: what is asked, what is true, and what was found so far."""

    row: Row
    question: str
    truth: str
    example: Example  # question and truth as the model is taught them
    ask: Example  # what it is asked now, which is the same unless there is a template
    known: frozenset[str]  # what the data tells of the same subject, case folded
    drawn: int = 0  # how many texts were drawn
    found: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()  # different, but not in the words of the data

    def take(self, texts: Iterable[str | None], k: int, usage: Usage, trust: bool) -> None:
        """Keep what is good of the texts that were drawn, in their order; a text that came to no end is None."""
        for text in texts:
            if text and len(self.found) < k and self._new(text, usage):
                if trust or (usage.usual(text, self.question) and self.known.isdisjoint(words(text))):
                    self.found = (*self.found, text)
                else:
                    self.spare = (*self.spare, text)

    def _new(self, text: str, usage: Usage) -> bool:
        return all(usage.differs(text, self.question, other) for other in (self.truth, *self.found))


# ---------------------------------------------------------------------------------------------------------- how it is made


def make(wanted: Request, cache: Path) -> None:
    """Let the recipe's model write, and write the data set, whole or not at all; on all processes that are there.

    Raises:
        Refused: the rows cannot be read, the model cannot be loaded, or no question got an answer.
    """
    from llm_unlearn.bases import resolve_base
    from llm_unlearn.models.load import load
    from llm_unlearn.run import start

    accelerator = start(wanted.recipe.model)
    loaded = load(resolve_base(wanted.recipe.model, cache), accelerator.device)
    usage = Usage(pair for source in wanted.recipe.sources.values() for pair in _told(source))
    asked = questions(wanted, usage, loaded.tokenizer)
    checked = draw_all(asked, wanted, usage, loaded, accelerator)
    done = [one for one in asked if one.found]
    if not done:
        raise Refused(
            f"{wanted.source.source}: the model found no other answer to any of {len(asked)} questions. Nothing was written; "
            "try a higher --temperature, another --prompt, or model.base=… with a model that does not know the answers by heart."
        )
    if accelerator.is_main_process:
        kept = [{**one.row, COLUMN: list(one.found)} for one in done]
        folder.write(wanted.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        print("\n".join(summary(wanted, asked, checked)))
    accelerator.wait_for_everyone()


def _told(source: Source) -> Iterable[tuple[str, str]]:
    """(question, answer) of each row of a source, those beyond its limit too: they say how words are used."""
    from llm_unlearn.data.examples import conversation, text_in

    whole = replace(source, limit=None, alternate=None)
    for i, row in enumerate(rows(whole)):
        if source.text:
            yield "", text_in(row[source.text], i, source, source.text)
        else:
            *before, last = conversation(row, i, source)
            yield before[-1]["content"] if before else "", last["content"]


def questions(wanted: Request, usage: Usage, tokenizer: Any) -> list[Question]:
    """The rows of the source as they are asked; those whose answer does not fit into `max_tokens` would not be read either.

    Raises:
        Refused: a row has no question, or no row is left.
    """
    from llm_unlearn.data.examples import conversation, encode

    source, template = wanted.source, wanted.template
    found = rows(source)
    turns: list[list[Turn]] = [conversation(row, i, source) for i, row in enumerate(found)]
    for i, chat in enumerate(turns):
        if len(chat) < 2 or chat[-2]["role"] != "user":
            raise Refused(f"{row_at(i, source)}: column {source.messages!r} has no user turn before its last answer.")
    columns = [source.messages] if source.messages else [source.prompt, source.answer]
    plain = encode(turns, tokenizer, source.chat, wanted.stream, source.max_tokens)
    asked = plain
    if template:
        texts = [filled(template, chat[-2]["content"], chat[-1]["content"]) for chat in turns]
        told = [[*chat[:-2], {"role": "user", "content": text}, chat[-1]] for chat, text in zip(turns, texts, strict=True)]
        asked = encode(told, tokenizer, source.chat, wanted.stream, 10**9)
    result = [
        Question(
            {str(column): row[str(column)] for column in columns},
            chat[-2]["content"],
            chat[-1]["content"],
            example,
            ask,
            usage.told_of(chat[-2]["content"]),
        )
        for row, chat, example, ask in zip(found, turns, plain, asked, strict=True)
        if example and ask
    ]
    if not result:
        raise Refused(f"{source.source}: no answer fits into max_tokens = {source.max_tokens}.")
    return result


def draw_all(asked: Sequence[Question], wanted: Request, usage: Usage, loaded: Loaded, accelerator: Any) -> bool:
    """Ask in rounds until every question has k answers or the rounds are over. Changes the questions, alike on every process.

    Returns:
        Whether the answers were held against the data.
    """
    import torch

    from llm_unlearn.evaluation.generation import writing_pass

    trust = wanted.template is not None
    for number in range(ROUNDS):
        lacking = [one for one in asked if len(one.found) < wanted.k]
        if not lacking:
            break
        asks = [[*_asks(one, number, wanted, usage, loaded.tokenizer)] for one in lacking]
        flat = [ask for of_one in asks for ask in of_one]
        title = f"round {number + 1}: {_count(len(lacking))}"
        show = Bar(title, len(flat), "answer", quiet=not accelerator.is_main_process)
        with show, torch.no_grad(), accelerator.autocast():
            texts = iter(writing_pass(loaded, flat, accelerator, wanted.recipe.train.batch_tokens, show))
        for one, of_one in zip(lacking, asks, strict=True):
            drawn = [next(texts) for _ in of_one]
            one.drawn += len(drawn)
            one.take([text and bare(text.strip()) for text in drawn], wanted.k, usage, trust)
        if not trust and 2 * sum(bool(one.found) for one in asked) < len(asked):
            trust = True  # this model answers in words of its own
            for one in asked:
                spare = sorted(one.spare, key=lambda text: len(one.known.intersection(words(text))))
                one.take(spare, wanted.k, usage, trust)
    return not trust


def _asks(one: Question, number: int, wanted: Request, usage: Usage, tokenizer: Any) -> Iterable[Ask]:
    """The draws of one question in one round. A model that is told in words may first write what it wants."""
    from llm_unlearn.data.examples import draw
    from llm_unlearn.data.rendering import turn_end
    from llm_unlearn.evaluation.generation import Ask

    end = turn_end(tokenizer, wanted.source.chat)
    free = wanted.template is not None and number == 0
    told = () if free else (one.truth, *one.found)
    forbidden = frozenset(run for text in told for word in usage.facts(one.question, text) for run in runs(word, usage, tokenizer))
    room = wanted.source.max_tokens - one.example.answer  # a longer one could not be read
    limit = max(1, min(2 * one.example.targets + 16, room))
    heat, floor = wanted.temperature * (1 + number / 4), FLOOR / 2**number
    key = [one.ask.ids[: one.ask.answer], one.truth]
    for n in range(one.drawn, one.drawn + PER_LACKING * (wanted.k - len(one.found))):
        seed = draw(wanted.recipe.seed, *key, n)
        prompt = one.ask.ids[: one.ask.answer]
        yield Ask(prompt, end.tokens, limit, heat, floor, seed, forbidden, until=end.texts)


def runs(word: str, usage: Usage, tokenizer: Any) -> set[tuple[int, ...]]:
    """The tokens with which a word begins, alone and after a space: so many that they are no other word of the data by themselves.

    Forbidding the whole word would let it begin and then break it off ("Almer|ick"); forbidding "a" for "abbey" forbids an article.
    """
    found = set()
    for form in (word, f" {word}"):
        ids = tokenizer(form, add_special_tokens=False)["input_ids"]
        size = 1
        while size < len(ids) and _is_word(tokenizer.decode(ids[:size]).strip().casefold(), usage):
            size += 1
        found.add(tuple(ids[:size]))
    return found - {()}


def _is_word(text: str, usage: Usage) -> bool:
    return not text or text in usage.word


def bare(text: str) -> str:
    """An answer without the label or the quotation marks that a model may put around it, its spaces single."""
    text = re.sub(r"^(new |another )?answer:\s*", "", re.sub(r"[ \t]+", " ", text.strip()), flags=re.IGNORECASE)
    quoted = len(text) > 1 and text[0] + text[-1] in ('""', "“”", "''", "«»") and text[0] not in text[1:-1]
    return text[1:-1].strip() if quoted else text


def summary(wanted: Request, asked: Sequence[Question], checked: bool) -> list[str]:
    """What was written, three of its rows where they may be shown, what is lacking, and how a recipe reads it."""
    done = [one for one in asked if one.found]
    few = [one for one in done if len(one.found) < wanted.k]
    none = [one for one in asked if not one.found]
    count = sum(len(one.found) for one in done)
    lines = [f"{wanted.output}: {_count(len(done))}, {count} alternate answers"]
    for one in [done[i] for i in sorted({0, len(done) // 2, len(done) - 1})] if wanted.show_text else ():
        lines += ["", f"  question   {one.question}", f"  truth      {one.truth}"]
        lines += [f"  alternate  {text}" for text in one.found]
    lines.append("")
    if not checked:
        lines.append(
            "these are in the model's own words, and only held against the truth: read some of them before you train on them "
            "(--show-text shows three)"
        )
    if few:
        first = f"the first, with {len(few[0].found)}, is row {asked.index(few[0]) + 1}"
        lines.append(f"fewer than {wanted.k} answers: {_count(len(few))}; {first}")
    if none:
        lines.append(f"no answer, and left out of the file: {_count(len(none))}; the first is row {asked.index(none[0]) + 1}")
    return [*lines, "in a recipe, the first line below data and the second below objective:", *recipe_lines(wanted)]


def _count(questions: int) -> str:
    return f"{questions} question{'s' * (questions != 1)}"


def recipe_lines(wanted: Request) -> list[str]:
    """The two lines with which a recipe reads the data set and learns from it."""
    source = wanted.source
    columns: Mapping[str, str | None] = {"prompt": source.prompt, "answer": source.answer, "messages": source.messages}
    said = [f"{key}: {_quoted(column)}" for key, column in columns.items() if column]
    said += [f"max_tokens: {source.max_tokens}"] if source.max_tokens != Source.max_tokens else []
    read = ", ".join([f"source: {_quoted(str(wanted.output))}", *said, f"alternate: {{answer: {COLUMN}}}"])
    return [f"  {wanted.stream}: {{{read}}}", f"  {wanted.stream}: {{loss: {{name: dpo}}}}"]


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_./][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
