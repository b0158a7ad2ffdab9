"""A suite file: its sets, its measures and the retrained model; and how tables become numbers.

Needs nothing heavy, so that a suite is checked before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from llm_unlearn.attacks.registry import AnyAttack
from llm_unlearn.evaluation.distribution import Entropy, KnowledgeGap
from llm_unlearn.evaluation.extraction import DiscoverableExtraction, LeakAtK, PrefixExtraction, extraction_curve
from llm_unlearn.evaluation.membership import Membership, PrivLeak
from llm_unlearn.evaluation.membership_attacks import Reference
from llm_unlearn.evaluation.memorization import (
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    Perplexity,
    Probability,
    TruthRatio,
)
from llm_unlearn.evaluation.tables import Cut, Draws, Need, Sample, Tables, Unavailable
from llm_unlearn.evaluation.task_files import task_problems
from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.evaluation.text import ExactMatch, Fluency, KeywordRecall, Rouge
from llm_unlearn.evaluation.utility import ModelUtility, MultipleChoice, OptionProbability
from llm_unlearn.source import Source, missing, source_problems
from llm_unlearn.spec import NaturalInt, PositiveInt, Refused, by_name, dotted, nearest, parts_of, plain, spec
from llm_unlearn.tree import Tree, build, read_tree

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
    measures: tuple[AnyMeasure, ...]
    """What is computed, in the order of the table."""
    attacks: tuple[AnyAttack, ...] = ()
    """What an adversary tries, on each model in the same way; after the measures, and slower than they are."""
    tasks: tuple[Task, ...] = ()
    """Tasks of lm-evaluation-harness, by name; asked before the measures."""
    seed: NaturalInt = 0
    """Every draw of an attack follows from it."""
    retrained: str | None = None
    """The model that never saw the forget set: a folder, a hub id, or embedded:retrained."""
    max_new_tokens: PositiveInt = 200
    """Longest greedy answer."""
    batch_tokens: PositiveInt = 8192
    """At most so many tokens, padding included, in one forward pass per process. Sets speed and memory, never the result."""

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
    problems = list(_problems(suite, tree))
    if problems:
        raise Refused("\n".join(problems))
    return suite


def _problems(suite: Suite, tree: Tree) -> Iterable[str]:
    """How the parts of a suite must fit together."""

    def say(text: str, *path: str | int) -> str:
        return f"{tree.place(path)}: {dotted(path)}: {text}"

    for name, source in suite.sets.items():
        yield from (say(text, "sets", name, *where) for where, text in source_problems(source))
        if source.alternate:
            yield say("a suite's sets have no alternate answers.", "sets", name, "alternate")
    for section, asked in (("measures", suite.measures), ("attacks", suite.attacks)):
        for i, one in enumerate(asked):
            named = {key: getattr(one, key, None) for key in ("set", "train_on", "trained_on", "shots_from", "against")}
            for key, name in ((key, name) for key, name in named.items() if name is not None and name not in suite.sets):
                yield say(f"found {name!r}; {nearest(name, suite.sets)}", section, i, key)
    yield from (say(text, *where) for where, text in _read_by_attacks(suite))
    for i, measure in enumerate(suite.measures):
        for name in sets_of(measure):
            if name not in suite.sets and name not in (measure.set, getattr(measure, "against", None)):
                yield say(f"found {name!r}; {nearest(name, suite.sets)}", "measures", i, "others")
            if name in suite.sets:
                yield from (say(text, "measures", i) for text in _lacking(measure, name, suite.sets[name]))
    yield from (say(text, "tasks", i, key) for i, key, text in _task_problems(suite))
    if suite.retrained and missing(suite.retrained):
        yield say(f"no such folder: {suite.retrained} (looked from {Path.cwd()}).", "retrained")


def _read_by_attacks(suite: Suite) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """What is wrong with the sources that attacks read by themselves: (keys, text)."""
    for where, part in parts_of(suite.attacks, ("attacks",)):
        if isinstance(part, Source):
            yield from (((*where, *key), text) for key, text in source_problems(part))


def _task_problems(suite: Suite) -> Iterable[tuple[int, str, str]]:
    """What is wrong with the tasks. Yields (number, key, text)."""
    for i, task in enumerate(suite.tasks):
        if task.task in suite.sets:
            yield i, "task", f"a set is called {task.task!r} too; give the set another name."
        if task.asked in [other.asked for other in suite.tasks[:i]]:
            yield i, "task", f"asks {task.task} as before; take one of the two out."
        yield from ((i, key, text) for key, text in task_problems(task))


def _lacking(measure: AnyMeasure, name: str, source: Source) -> Iterable[str]:
    """What a set would have to have for a measure."""
    if "perturbed" in measure.needs and not (source.perturbed or source.choices):
        yield f"{measure.name} compares with wrong answers; name their column in sets.{name}.perturbed."
    if "keyword" in measure.needs and not source.keyword:
        yield f"{measure.name} looks for key spans; name their column in sets.{name}.keyword."
    written = {"paraphrase", "perturbed", "generation", "keyword"}
    if source.text and any(need in written or isinstance(need, (Draws, Cut)) for need in measure.needs):
        yield f"{measure.name} needs questions and answers, and set {name!r} is running text."


def numbers(suite: Suite, models: Mapping[str, Tables]) -> list[dict[str, Any]]:
    """Every measure of every model, with bootstrap interval, as plain data for `evaluation.json`.

    Args:
        models: "before", "after", "retrained", … -> tables. A measure that needs what is not there says what it needs.
    """
    return [_number(measure, name, models) for measure, name in zip(suite.measures, titles(suite), strict=True)]


def _number(measure: AnyMeasure, title: str, models: Mapping[str, Tables]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, tables in models.items():
        if name == "retrained" and compares(measure):
            found[name] = {"missing": "is what the others are compared with"}
            continue
        try:
            sample = sample_of(measure, tables, models.get("retrained"))
        except Unavailable as error:
            found[name] = {"missing": str(error)}
            continue
        low, high = sample.bootstrap() or (None, None)
        found[name] = {"value": sample.value, "low": low, "high": high, "n": sample.n}
        if not math.isfinite(sample.value):
            found[name] = {"missing": f"the value is {sample.value}"}
    settings = {key: value for key, value in plain(measure).items() if key not in ("name", "set")}
    return {
        "measure": measure.name,
        "title": title,
        "set": measure.set,
        "goal": goal_of(measure),
        "knowing": measure.knowing,
        "unit": measure.unit,
        "definition": " ".join((type(measure).__doc__ or "").split()),
        "settings": settings,
        "values": found,
    }


def goal_of(measure: AnyMeasure) -> str:
    """What the value is to be like: as in the retrained model, as before, or nothing that could be said."""
    kind = measure.set.partition("_")[0]
    if kind == "forget":
        return "as retrained"
    says_nothing_of_loss = isinstance(measure, (KnowledgeGap, Entropy, PrivLeak, Membership))
    return "" if kind == "holdout" or says_nothing_of_loss else "as before"


def compares(measure: AnyMeasure) -> bool:
    """Whether a measure is itself a comparison with the retrained model, which then has no value of its own."""
    match measure:
        case ForgetQuality() | PrivLeak() | KnowledgeGap():
            return True
        case Membership():
            return isinstance(measure.attack, Reference)
        case _:
            return False


def sample_of(measure: AnyMeasure, tables: Tables, retrained: Tables | None) -> Sample:
    """One measure of one model.

    Raises:
        Unavailable: it cannot be had, or the model's numbers are none: a comparison with NaN is false, and where it is counted
            (is this token the first choice?) a broken model would look like one that has forgotten.
    """
    check_numbers(measure, tables)
    return measure(tables, retrained)


def check_numbers(measure: AnyMeasure, tables: Tables) -> None:
    """See that what a measure reads is made of numbers.

    Raises:
        Unavailable: some log p of its sets is NaN.
    """
    for name in sets_of(measure):
        answers = tables[name].likelihood.of("answer")
        if lost := sum(bool(np.isnan(logp).any()) for logp in answers.split(answers.logp.astype(float))):
            raise Unavailable(f"the value is NaN, as the model's logits are on {lost} of {len(answers.row)} rows of {name!r}")


def titles(suite: Suite) -> list[str]:
    """The title of each measure. A second one of a set that would be called the same is told by the settings that differ."""
    found: dict[tuple[str, str], AnyMeasure] = {}
    result: list[str] = []
    for measure in suite.measures:
        name = title(measure)
        first = found.setdefault((measure.set, name), measure)
        more = [] if first is measure else [_setting(key, new) for key, new in plain(measure).items() if new != plain(first)[key]]
        result.append(f"{name} ({', '.join(more)})" if more else name)
    return result


def _setting(key: str, value: object) -> str:
    return f"no {key}" if value in (None, False) else key if value is True else f"{key.replace('_', ' ')} {value}"


def title(measure: AnyMeasure) -> str:
    """The name of a measure with the setting that makes it another one: `membership min_k`, `truth ratio`, `leak@10 keyword`."""
    name = measure.name.replace("_", " ")
    match measure:
        case Membership():
            return (
                f"{name} {measure.attack.name}"
                if measure.statistic == "auc"
                else f"{name} {measure.statistic} {measure.attack.name}"
            )
        case KnowledgeGap():
            return f"{name} {measure.distance}"
        case Fluency():
            return f"{name} {measure.part}"
        case LeakAtK():
            return f"leak@{measure.k} {measure.by}"
        case _:
            return name


CURVE = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


def curves(suite: Suite, models: Mapping[str, Tables]) -> dict[str, Any]:
    """Extraction over the attacker's budget of samples, where the suite measures it."""
    measure = next((one for one in suite.measures if isinstance(one, DiscoverableExtraction)), None)
    if measure is None:
        return {}
    rates: dict[str, list[float]] = {}
    for name, tables in models.items():
        try:
            check_numbers(measure, tables)
            rates[name] = extraction_curve(
                tables[measure.set], measure.prefix, CURVE, measure.p, measure.length, measure.sampler
            ).tolist()
        except Unavailable:
            continue
    return {"extraction": {"set": measure.set, "n": list(CURVE), **rates}} if rates else {}


def answers(models: Mapping[str, Tables], most: int = 500) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each set with every model's own answer and its probability, to be read side by side."""
    any_model = next(iter(models.values()))
    result: dict[str, list[dict[str, Any]]] = {}
    for name, table in any_model.items():
        probabilities = {model: Probability(set=name)(tables, None).rows for model, tables in models.items()}
        result[name] = []
        for row in range(min(most, len(table.ids))):
            texts = {model: written[row] for model, tables in models.items() if (written := tables[name].generated) is not None}
            p = {model: float(rows[row]) for model, rows in probabilities.items() if rows is not None and rows[row] == rows[row]}
            facts = {"id": table.ids[row], "prompt": table.prompts[row], "truth": table.answers[row]}
            result[name].append({**facts, **texts, "probability": p})
    return result
