"""The recipe and the suite of one serving: those of the service, with the rows of the requests put in and taken out.

Rows are named by their ids only, so that no copy of what is to be deleted is written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder
from llm_unlearn.evaluation.suite import Suite, sets_of
from llm_unlearn.recipe import Recipe
from llm_unlearn.requests.matching import RowId
from llm_unlearn.requests.service import Office
from llm_unlearn.sections import Data, Evaluation, Model
from llm_unlearn.source import Source, is_forgotten, left_out
from llm_unlearn.training.gradients import Orthogonal

Ids = Sequence[RowId]


def recipe_of(office: Office, model: str, forget: Ids, gone: Ids, earlier: Sequence[Path], output: Path) -> Recipe:
    """The service's recipe on the rows of some requests, beginning from what earlier runs left.

    Args:
        forget: ids of the rows that this run forgets.
        gone: ids of the rows of earlier requests, which are not to come back as rows to be kept.
        earlier: run folders of the model, in the order of their runs.
    """
    template = office.recipe
    data, out = template.data, (*forget, *gone)
    sets = Data(
        forget=_narrowed(data.forget, office, forget),
        retain=_without(data.retain, office, out) if data.retain else None,
        holdout=_without(data.holdout, office, out) if data.holdout else None,
        streams={name: _without(one, office, out) for name, one in data.streams.items()} if data.streams else None,
        overlap="drop",  # the other answer of the recipe would show the row
    )
    train = template.train
    if earlier and template.model.adapter and office.service.apart:
        apart = Orthogonal(adapters=tuple(map(str, earlier)), weight=office.service.apart)
        train = replace(train, rules=(*(rule for rule in train.rules if rule.name != "orthogonal"), apart))
    named = template.evaluation
    evaluation = Evaluation(
        suite=office.suite_name, retrained=named.retrained if named else None, every=named.every if named else None, texts=False
    )
    return replace(
        template, output=str(output), model=model_of(template.model, model, earlier), data=sets, train=train, evaluation=evaluation
    )


def model_of(template: Model, model: str, earlier: Sequence[Path]) -> Model:
    """The model as earlier runs left it: with their adapters, or the newest of them in its place."""
    base = replace(template, base=model, revision=template.revision if model == template.base else None)
    if not earlier:
        return base
    if template.adapter is None:
        return replace(base, base=folder.model_in(str(earlier[-1])), revision=None, start=None)
    return replace(base, start=(*template.starts, *map(str, earlier)))


def suite_of(office: Office, measured: Mapping[int, Ids], out: Ids) -> Suite:
    """The service's suite with a set `forget_N` for each request N in place of `forget`, and each measure on every one of them.

    So one evaluation of a run measures the requests that it serves and all that were served before.

    Args:
        measured: request -> ids of its rows.
        out: ids of all rows that other sets must not have.
    """
    suite, sets = office.suite, dict[str, Source]()
    mine = [name for name, source in suite.sets.items() if is_forgotten(name) and office.is_training(source)]
    every = tuple(one for ids in measured.values() for one in ids)
    whole = {
        value for attack in suite.attacks for value in vars(attack).values() if isinstance(value, str)
    }  # once for all requests
    whole |= {name for measure in suite.measures for name in sets_of(measure)[1:]}
    for name, source in suite.sets.items():
        if name in mine:
            sets |= {set_of(name, request): _narrowed(source, office, ids) for request, ids in measured.items()}
            sets |= {name: _narrowed(source, office, every)} if name in whole else {}
        else:
            sets[name] = _without(source, office, out)
    measures: list[Any] = []
    for measure in suite.measures:
        measures += [replace(measure, set=set_of(measure.set, one)) for one in measured] if measure.set in mine else [measure]
    return replace(suite, sets=sets, measures=tuple(measures))


def set_of(name: str, request: int) -> str:
    """What a set of the suite that is to be forgotten is called for one request."""
    return f"{name}_{request}" if is_forgotten(name) else name


def _narrowed(source: Source, office: Office, ids: Ids) -> Source:
    """A set's columns on the rows of the training data that have these ids, all of them."""
    data = office.service.data
    return replace(
        source, source=data.source, config=data.config, split=data.split, where={data.id: tuple(ids)}, without=None, limit=None
    )


def _without(source: Source, office: Office, ids: Ids) -> Source:
    """A set without these rows, where it reads the training data."""
    if not office.is_training(source) or not ids:
        return source
    return left_out(source, office.service.data.id, ids)
