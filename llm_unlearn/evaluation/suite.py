"""A suite file: its sets, its measures, tasks and attacks, and the retrained model; and how these must fit together.

Needs nothing heavy, so that a suite is checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from llm_unlearn.attacks.registry import AnyAttack
from llm_unlearn.attacks.shadows import Shadows
from llm_unlearn.chat import DATE, Chat, chat_problems
from llm_unlearn.evaluation.aggregates import SET, Aggregate
from llm_unlearn.evaluation.distribution import Entropy, KnowledgeGap
from llm_unlearn.evaluation.extraction import DiscoverableExtraction, LeakAtK, PrefixExtraction
from llm_unlearn.evaluation.membership import Membership, PrivLeak
from llm_unlearn.evaluation.memorization import (
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    Perplexity,
    Probability,
    TruthRatio,
)
from llm_unlearn.evaluation.tables import Cut, Draws, Need
from llm_unlearn.evaluation.task_files import task_problems
from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.evaluation.text import ExactMatch, Fluency, KeywordRecall, Rouge
from llm_unlearn.evaluation.utility import ModelUtility, MultipleChoice, OptionProbability
from llm_unlearn.source import Source, missing, source_problems, with_chat
from llm_unlearn.spec import NaturalInt, PositiveInt, Refused, by_name, dotted, nearest, parts_of, readable, spec
from llm_unlearn.tree import Tree, build, is_file, locate, no_such_file, read_tree

AnyMeasure = Annotated[
    Perplexity
    | Probability
    | ExactMemorization
    | ExtractionStrength
    | TruthRatio
    | ForgetQuality
    | Membership
    | PrivLeak
    | PrefixExtraction
    | DiscoverableExtraction
    | LeakAtK
    | Rouge
    | ExactMatch
    | KeywordRecall
    | Fluency
    | MultipleChoice
    | OptionProbability
    | ModelUtility
    | Entropy
    | KnowledgeGap,
    by_name,
]


@spec
class Suite:
    """What is asked of a model, and what is computed from its answers."""

    sets: Mapping[str, Source]
    """Named sets. `forget`, or `forget_…`, is to look as to the retrained model, the others as before; `holdout` is to compare
    with."""
    chat: Chat = Chat(date=DATE)
    """Settings of the chat template: system turn, thinking, date, template arguments; a set may say otherwise."""
    measures: tuple[AnyMeasure, ...]
    """What is computed, in the order of the table."""
    attacks: tuple[AnyAttack, ...] = ()
    """What an adversary tries, on each model in the same way; after the measures, and slower than they are."""
    tasks: tuple[Task, ...] = ()
    """Tasks of lm-evaluation-harness, by name; asked before the measures."""
    aggregates: tuple[Aggregate, ...] = ()
    """Numbers made of these numbers, as benchmarks publish them."""
    seed: NaturalInt = 0
    """Every draw of an attack follows from it."""
    retrained: str | None = None
    """The model that never saw the forget set: a folder, a hub id, or embedded:retrained."""
    probes: bool | None = None
    """true: the sets ask about a recipe's data and are not rows of it, as benchmarks of knowledge do. Without it, `forget` and
    `retain` must hold rows of the recipe's forget and retain sets."""
    max_new_tokens: PositiveInt = 200
    """Longest greedy answer."""
    max_thought_tokens: PositiveInt = 512
    """Longest thought of a model that is asked to think before it answers; when its tokens are used up, the thought is closed for
    the model, and the answer begins, with tokens of its own."""
    batch_tokens: PositiveInt = 8192
    """Most tokens, padding included, in one forward pass per process. Sets speed and memory; numbers agree within
    1e-5 for every value."""

    def needs(self, name: str) -> set[Need]:
        """What the measures of one set are made from."""
        return {need for one in self.measures if name in sets_of(one) for need in one.needs}


def sets_of(measure: AnyMeasure) -> tuple[str, ...]:
    """The sets that a measure reads, its own first."""
    match measure:
        case Membership() | PrivLeak():
            return measure.set, measure.against
        case ModelUtility():
            return measure.set, *measure.others
        case _:
            return (measure.set,)


def load(path: Path, overrides: Iterable[str] = ()) -> Suite:
    """Read and check a suite file.

    Raises:
        Refused: every wrong key at once, each with its place, what was found and what was expected.
    """
    tree = read_tree(path, overrides)
    suite = build(Suite, tree)
    chat = suite.chat.over(Chat())
    suite = replace(suite, chat=chat, sets=with_chat(suite.sets, chat), attacks=with_chat(suite.attacks, chat))
    problems = list(_problems(suite, tree))
    if problems:
        raise Refused("\n".join(problems))
    return suite


def _problems(suite: Suite, tree: Tree) -> Iterable[str]:
    """How the parts of a suite must fit together."""

    def say(text: str, *path: str | int) -> str:
        return readable(f"{tree.place(path)}: {dotted(path)}: {text}")

    wrong = list(chat_problems(suite.chat))
    yield from (say(text, "chat", *keys) for keys, text in wrong)
    for name, source in suite.sets.items():
        found = ((where, text) for where, text in source_problems(source) if (where[1:], text) not in wrong)
        yield from (say(text, "sets", name, *where) for where, text in (*found, *_two_parts(source)))
        if source.alternate:
            yield say("a suite's sets have no alternate answers.", "sets", name, "alternate")
    for section, asked in (("measures", suite.measures), ("attacks", suite.attacks)):
        for i, one in enumerate(asked):
            named = {key: getattr(one, key, None) for key in ("set", "train_on", "trained_on", "shots_from", "against", "retain")}
            for key, name in ((key, name) for key, name in named.items() if name is not None and name not in suite.sets):
                yield say(f"found {name!r}; {nearest(name, suite.sets)}", section, i, key)
    yield from (say(text, *where) for where, text in _read_by_attacks(suite))
    yield from (say(text, *where) for where, text in _unnamed(suite))
    for i, measure in enumerate(suite.measures):
        for name in sets_of(measure):
            if name not in suite.sets and name not in (measure.set, getattr(measure, "against", None)):
                yield say(f"found {name!r}; {nearest(name, suite.sets)}", "measures", i, "others")
            if name in suite.sets:
                yield from (say(text, "measures", i) for text in _lacking(measure, name, suite.sets[name]))
    yield from (say(text, "tasks", i, key) for i, key, text in _task_problems(suite))
    if suite.retrained and missing(suite.retrained):
        yield say(f"no such folder: {suite.retrained} (looked from {Path.cwd()}).", "retrained")


def _two_parts(source: Source) -> Iterable[tuple[tuple[str, ...], str]]:
    """Check that a set measures one part of its answers. Yields (keys below the set, text)."""
    if source.targets in ("both", "separate"):
        yield ("targets",), f"found {source.targets}; a set measures one part. Set answer, or thought in a set of its own."


def _read_by_attacks(suite: Suite) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """What is wrong with the sources and recipes that attacks read by themselves: (keys, text)."""
    for where, part in parts_of(suite.attacks, ("attacks",)):
        if isinstance(part, Source):
            yield from (((*where, *key), text) for key, text in source_problems(part))
    for i, attack in enumerate(suite.attacks):
        if isinstance(attack, Shadows) and not is_file(path := locate(attack.recipe)):
            yield ("attacks", i, "recipe"), no_such_file(path)


def _task_problems(suite: Suite) -> Iterable[tuple[int, str, str]]:
    """What is wrong with the tasks. Yields (number, key, text)."""
    for i, task in enumerate(suite.tasks):
        if task.task in suite.sets:
            yield i, "task", f"a set is called {task.task!r} too; give the set another name."
        if task.asked in [other.asked for other in suite.tasks[:i]]:
            yield i, "task", f"asks {task.task} as before; take one of the two out."
        yield from ((i, key, text) for key, text in task_problems(task))


def _unnamed(suite: Suite) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """What aggregates name and nothing measures: (keys, text)."""
    tasks = [task.task for task in suite.tasks]
    for i, aggregate in enumerate(suite.aggregates):
        for k, (_, of, _) in enumerate(aggregate.parts):
            if of not in (*suite.sets, *tasks, SET) and not any(of.startswith(f"{task}_") for task in tasks):
                yield ("aggregates", i, "of", k), f"found {of!r}; {nearest(of, [*suite.sets, *tasks, SET])}"


def _lacking(measure: AnyMeasure, name: str, source: Source) -> Iterable[str]:
    """What a set would have to have for a measure."""
    if source.targets == "thought" and {"paraphrase", "perturbed"} & {*measure.needs}:
        yield f"{measure.name} compares with wrong answers, and set {name!r} asks for thoughts. Set sets.{name}.targets: answer."
        return
    if "perturbed" in measure.needs and not (source.perturbed or source.choices):
        yield f"{measure.name} compares with wrong answers; name their column in sets.{name}.perturbed."
    if "keyword" in measure.needs and not source.keyword:
        yield f"{measure.name} looks for key spans; name their column in sets.{name}.keyword."
    written = {"paraphrase", "perturbed", "generation", "keyword"}
    if source.text and any(need in written or isinstance(need, (Draws, Cut)) for need in measure.needs):
        yield f"{measure.name} needs questions and answers, and set {name!r} is running text."
