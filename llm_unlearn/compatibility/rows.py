"""Check that the sets of a suite hold rows of a recipe's data: by what the rows say, never by the names of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_unlearn.data.examples import content_of
from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import rows
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.methods.exact import Exact
from llm_unlearn.recipe import Recipe
from llm_unlearn.source import Source, is_forgotten, same_data
from llm_unlearn.spec import dotted, parts_of

PASSAGES, PASSAGE = 16, 80
"""Number of passages that are compared in running text, and their characters; one that occurs in both is a match."""
ANSWER = 12
"""Characters from which an answer by itself tells one row from another; `yes` does not."""


@dataclass
class _Set:
    """A set of a suite: what its rows say."""

    name: str
    source: Source
    rows: list[tuple[str, ...]] = field(default_factory=list)
    """For each row its keys: the whole content first, then what also tells it from others."""


@dataclass(frozen=True)
class Fit:
    """Result of comparing a suite with a recipe."""

    problems: list[str]
    """Problems, each with the keys of the suite that it is about and what to do."""
    notes: list[str]


def fit_of(recipe: Recipe, suite: Suite, name: str) -> Fit:
    """Compare the rows of a suite with those of a recipe.

    A set `forget`, or `forget_…`, must hold rows of the recipe's forget set, or rows that share a question or an answer with it,
    and none that the recipe keeps; `retain` likewise rows of the retain set, and none that are forgotten. Other sets are free.
    Where one of the two is running text and the other is not, or the suite says `probes: true`, rows are not looked for.

    Args:
        name: of the suite, for errors.

    Raises:
        Refused: a set cannot be read.
    """
    new = f"llm-unlearn new NAME --model {recipe.model.base} --forget {recipe.data.forget.source}"
    new += f" --retain {recipe.data.retain.source}" if recipe.data.retain else ""
    fix = f"Name the recipe's data in the suite's sets, or write a suite for it: {new}"
    if not _knows_population(recipe) and (problem := _of_population(recipe, suite, name)):
        return Fit([f"{problem}. {fix}"], [])
    forgotten = [_Set(key, one) for key, one in suite.sets.items() if is_forgotten(key)]
    kept = [_Set(key, one) for key, one in suite.sets.items() if key.partition("_")[0] == "retain"]
    if _is_same(recipe, forgotten, kept):
        return Fit([], [])
    for one in (*forgotten, *kept):
        one.rows = [_keys(row, one.source) for row in rows(one.source)]
    wanted = {key for one in (*forgotten, *kept) for keys in one.rows for key in keys}
    shared = {stream: _shared(source, wanted) for stream, source in recipe.sources.items()}
    deletes_later = isinstance(recipe.method, Exact)  # rows of its retain set may be deleted from what it trained
    problems = [] if deletes_later else [f"{problem} {fix}" for problem in _swapped(forgotten, kept, shared)]
    notes: list[str] = []
    if not problems and not suite.probes:
        for sets, stream in ((forgotten, "forget"), (kept, "retain")):
            if stream in recipe.sources:
                found = _fitting(sets, stream, recipe.sources[stream], shared[stream])
                problems += [f"{problem} {fix}{PROBES}" for problem in found.problems]
                notes += found.notes
    return Fit([f"{name}: {problem}" for problem in problems], notes)


PROBES = (
    " If the set asks about the same data in other words, set `probes: true` in the suite; a set of other rows that are to be kept "
    "may have any other name."
)


def _swapped(forgotten: Sequence[_Set], kept: Sequence[_Set], shared: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Yield sets that are measured as forgotten and kept by the recipe, or the other way round."""
    forget, retain = shared["forget"], shared.get("retain", frozenset())
    for one in forgotten:
        if count := sum(keys[0] in retain and keys[0] not in forget for keys in one.rows):
            yield f"sets.{one.name}: {count} of {len(one.rows)} rows are in the recipe's retain set, so they are not forgotten."
    for one in kept:
        if count := sum(keys[0] in forget for keys in one.rows):
            yield f"sets.{one.name}: {count} of {len(one.rows)} rows are in the recipe's forget set, so they are not kept."


def _fitting(sets: Sequence[_Set], stream: str, source: Source, shared: frozenset[str]) -> Fit:
    """Check that one at least of the sets has rows of a stream, and how many rows it has besides."""
    comparable = [one for one in sets if bool(one.source.text) == bool(source.text)]
    fitting = [one for one in comparable if _is_related(one.source, source) or not all(map(shared.isdisjoint, one.rows))]
    if comparable and not fitting:
        text = f"none of its rows is in {source.source}, the recipe's {stream} set."
        return Fit([f"sets.{one.name}: {text}" for one in comparable[:1]], [])
    others = {one.name: sum(map(shared.isdisjoint, one.rows)) for one in fitting}
    rest = {one.name: len(one.rows) for one in fitting}
    text = f"are not in the recipe's {stream} set"
    return Fit([], [f"{count} of {rest[name]} rows of sets.{name} {text}" for name, count in others.items() if count])


def _is_same(recipe: Recipe, forgotten: Sequence[_Set], kept: Sequence[_Set]) -> bool:
    """Return whether every set reads what the recipe reads, so that no row needs to be compared."""
    pairs = [(one.source, recipe.data.forget) for one in forgotten] + [(one.source, recipe.data.retain) for one in kept]
    return all(source and same_data(one, source) and _columns(one) == _columns(source) for one, source in pairs)


def _columns(source: Source) -> tuple[object, ...]:
    """Return the settings that decide which rows are read, and their text."""
    columns = (source.prompt, source.prompt_input, source.answer, source.choices, source.messages, source.text)
    return (*columns, source.where, source.without, source.like, source.split)


def _is_related(one: Source, other: Source) -> bool:
    """Return whether two read one data set in different parts or columns, as benchmarks keep rows and probes together."""
    files = [Path(os.path.expanduser(source.source)) for source in (one, other)]
    together = one.source == other.source or (all(file.exists() for file in files) and files[0].samefile(files[1]))
    says = [(source.config, source.split, source.prompt, source.answer, source.messages, source.text) for source in (one, other)]
    return together and says[0] != says[1]


def _keys(row: Row, source: Source) -> tuple[str, ...]:
    """Return the keys that tell a row from others: its content, its last question, its answer, or passages of its text."""
    content = content_of(row, source)
    texts = json.loads(content)
    if source.text:
        return content, *_passages(texts[-1])
    question, answer = texts[-2] if len(texts) == 2 else texts[-3] if len(texts) > 2 else "", texts[-1]
    keys = [content, f"question: {question}" if question else "", f"answer: {answer}" if len(answer) >= ANSWER else ""]
    return tuple(key for key in keys if key)


def _passages(text: str) -> Iterator[str]:
    """Passages at even distances."""
    step = max(1, (len(text) - PASSAGE) // PASSAGES)
    starts = range(0, max(1, len(text) - PASSAGE + 1), step)
    return (f"text: {text[start : start + PASSAGE]}" for start in [*starts][:PASSAGES])


def _shared(source: Source, wanted: set[str]) -> frozenset[str]:
    """Those of the keys that the rows of a source have, too."""
    found, passages = set[str](), {key.removeprefix("text: "): key for key in wanted if key.startswith("text: ")}
    for row in rows(source):
        found |= wanted.intersection(_keys(row, source))
        if source.text and passages:
            text = json.loads(content_of(row, source))[-1]
            met = [passage for passage in passages if passage in text]
            found |= {passages.pop(passage) for passage in met}
    return frozenset(found)


def _knows_population(recipe: Recipe) -> bool:
    """Return whether a recipe is about the made-up people of the project: by its model, or by its data."""
    return any(name.startswith("embedded:") for name in (recipe.model.base, *(one.source for one in recipe.sources.values())))


def _of_population(recipe: Recipe, suite: Suite, name: str) -> str:
    """Why a suite about the made-up people does not fit a recipe about others; "" where the recipe's rows are copies of theirs."""
    parts = [(where, one) for where, one in parts_of((suite.sets, suite.attacks)) if isinstance(one, Source)]
    read = {dotted(("sets" if where[0] == 0 else "attacks", *where[1:])): one for where, one in parts}
    made_up = {where: one for where, one in read.items() if one.source.startswith("embedded:")}
    if not made_up:
        return ""
    wanted = {key for one in made_up.values() for row in rows(one) for key in _keys(row, one)}
    if any(_shared(source, wanted) for source in recipe.sources.values()):
        return ""
    where = ", ".join(made_up)
    return f"{name}: {where}: asks about made-up people (embedded:…), and the recipe forgets rows of {recipe.data.forget.source}"
