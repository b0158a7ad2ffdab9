"""How tables become numbers: every measure of every model with its interval, curves, and the answers to be read side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_unlearn.evaluation.distribution import Entropy, KnowledgeGap
from llm_unlearn.evaluation.extraction import DiscoverableExtraction, LeakAtK, extraction_curve
from llm_unlearn.evaluation.membership import Membership, PrivLeak
from llm_unlearn.evaluation.membership_attacks import Reference
from llm_unlearn.evaluation.memorization import ForgetQuality, Probability
from llm_unlearn.evaluation.suite import AnyMeasure, Suite, sets_of
from llm_unlearn.evaluation.tables import Sample, Tables, Unavailable
from llm_unlearn.evaluation.text import Fluency
from llm_unlearn.source import is_forgotten
from llm_unlearn.spec import plain


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
        "kind": measure.kind,
        "knowing": measure.knowing,
        "unit": measure.unit,
        "definition": " ".join((type(measure).__doc__ or "").split()),
        "settings": settings,
        "values": found,
    }


def goal_of(measure: AnyMeasure) -> str:
    """What the value is to be like: as in the retrained model, as before, or nothing that could be said."""
    if is_forgotten(measure.set):
        return "as retrained"
    says_nothing_of_loss = isinstance(measure, (KnowledgeGap, Entropy, PrivLeak, Membership))
    return "" if measure.set.partition("_")[0] == "holdout" or says_nothing_of_loss else "as before"


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
    """Return the name of a measure with what makes it another one: `membership min_k`, `leak@10 keyword`, `privleak peer`."""
    variant = getattr(getattr(measure, "attack", measure), "variant", None)
    return f"{_name(measure)} {variant}" if variant else _name(measure)


def _name(measure: AnyMeasure) -> str:
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
