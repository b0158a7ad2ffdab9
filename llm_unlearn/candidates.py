"""What the words of `evaluate` stand for: hub ids, models, adapters, run folders, folders of such, and globs.

Needs nothing heavy, so that a wrong word is refused before a model is loaded.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llm_unlearn import compare, folder, recipe, sections
from llm_unlearn.hub.fetching import ADAPTER_FILE, COMBINATION_FILE, adapter_on_hub, base_of
from llm_unlearn.source import is_gguf, missing
from llm_unlearn.spec import Refused

Bits = Literal["nf4", "fp4", "int8"] | None
MODEL_FILE = "config.json"


@dataclass(frozen=True)
class Candidate:
    """One model that is to be measured."""

    place: str
    """Where it was found: a run folder, an adapter, a model, a hub id."""
    model: sections.Model
    adapter: str | None = None
    """A saved adapter; or, of a run that is under way, the folder of its newest checkpoint."""
    before: sections.Model | None = None
    """The model that it was made from, where that is known."""
    under_way: sections.Model | None = None
    """Of a checkpoint: the recipe's model, with what it trains."""

    @property
    def run(self) -> Path:
        """The run folder, if it is one that a run wrote; of a checkpoint, the one that it lies in."""
        return Path(self.place).parents[1] if self.under_way else Path(self.place)

    @property
    def columns(self) -> dict[str, tuple[sections.Model, str | None]]:
        """What is asked: the model before and after, or one alone."""
        if self.before is None:
            return {"model": (self.model, self.adapter)}
        return {"before": (self.before, None), "after": (self.model, self.adapter)}


def is_many(models: Sequence[str], adapters: Sequence[str], before: str | None) -> bool:
    """Whether the words of `evaluate` ask for more than one model, or for one that brings its own base."""
    if len(models) > 1 or len(adapters) > 1 or before or any(_is_glob(word) for word in (*models, *adapters)):
        return True
    path = Path(os.path.expanduser(models[0]))
    if not adapters and adapter_on_hub(models[0]):
        return True
    plain = (path / folder.MODEL).is_dir() or (path / MODEL_FILE).is_file()
    return not adapters and path.is_dir() and not plain


def candidates_of(models: Sequence[str], adapters: Sequence[str], before: str | None, quantize: Bits) -> list[Candidate]:
    """Every model that the words stand for, each once, in their order.

    Args:
        models: hub ids, models, adapters, run folders, folders of such, globs.
        adapters: to be put on the one model, which is then the model before; adapters, run folders, globs.
        before: the model before of those that do not say what they were made from.
        quantize: nf4 | int8, instead of what a run's recipe says.

    Raises:
        Refused: with every word that finds nothing.
    """
    if adapters and len(models) > 1:
        raise Refused(f"--adapter: found with {len(models)} models; expected one --model, on which each adapter is put in turn.")
    found: dict[str, Candidate] = {}
    problems: list[str] = []
    for word in adapters or models:
        option = "--adapter" if adapters else "--model"
        matches = sorted(glob.glob(str(Path(os.path.expanduser(word))), recursive=True)) if _is_glob(word) else [word]
        ready = [one for match in matches for one in _of(match, quantize)]
        if adapters:
            base = _model(folder.model_in(models[0]), quantize)
            places = [match for match in matches if not missing(match)]
            ready = [Candidate(place, base, folder.adapter_in(place), base) for place in places]
        for one in ready:
            found.setdefault(os.path.abspath(one.place) if Path(one.place).exists() else one.place, one)
        if not ready:
            problems.append(f"{option}: {_nothing(word, matches)}")
    for option, name in (("--before", before), ("--model", models[0] if adapters else None)):
        if name and missing(name):
            problems.append(f"{option}: no such folder: {name} (looked from {Path.cwd()}).")
    if problems:
        raise Refused("\n".join(problems))
    start = _model(folder.model_in(before), quantize) if before else None
    return [one if one.before or not start else replace(one, before=start) for one in found.values()]


def as_it_is_now(one: Candidate) -> Candidate:
    """A run under way goes on while others are measured: its newest checkpoint, or what it made in the end.

    Raises:
        Refused: there is nothing of it any more.
    """
    if not one.under_way:
        return one
    if not (found := _in(one.run, one.model.quantize) if (one.run / folder.RECIPE).is_file() else []):
        raise Refused(f"{one.place}: is gone, and {one.run} has no other checkpoint.")
    return found[0]


def _is_glob(word: str) -> bool:
    return bool(compare.WILD.search(word)) and not Path(os.path.expanduser(word)).exists()


def _nothing(word: str, matches: Sequence[str]) -> str:
    if _is_glob(word):
        what = "and none is a model, an adapter or a finished run" if matches else "expected paths of models, adapters or runs"
        return f"{word} matches {len(matches)} paths, {what} (looked from {Path.cwd()})."
    if not Path(os.path.expanduser(word)).is_dir():
        return f"no such folder: {word} (looked from {Path.cwd()})."
    if (Path(os.path.expanduser(word)) / folder.RECIPE).is_file():
        return f"{word}: the run has no checkpoint yet. Run: llm-unlearn run {Path(word) / folder.RECIPE} --resume"
    return f"{word}: no model, adapter or finished run in this folder, nor below it."


def _of(word: str, quantize: Bits) -> list[Candidate]:
    """The models that one path or hub id stands for; a folder that is none itself stands for those below it."""
    path = Path(os.path.expanduser(word))
    if is_gguf(word) and not missing(word):
        return [Candidate(word, _model(word, quantize))]
    if not path.exists():
        return [] if missing(word) else [_on_hub(word, quantize)]
    if not path.is_dir():
        return []
    itself = _in(path, quantize)
    if (path / folder.RECIPE).is_file():
        return itself
    return [
        *itself,
        *(one for inner in sorted(path.iterdir()) if inner.is_dir() and inner.name[0] != "." for one in _of(str(inner), quantize)),
    ]


def _in(path: Path, quantize: Bits) -> list[Candidate]:
    """The model in a folder: of a run, with the base that its recipe names; an adapter, with the base that it names; a model."""
    if (path / folder.RECIPE).is_file():
        wanted = recipe.load(path / folder.RECIPE, check=False).model
        base = replace(wanted, adapter=None, trainable=None, quantize=quantize or wanted.quantize)
        if (path / folder.ADAPTER).is_dir():
            return [Candidate(str(path), base, str(path / folder.ADAPTER), base)]
        if (path / folder.MODEL).is_dir():
            after = sections.another(base, str(path / folder.MODEL))
            return [Candidate(str(path), after, None, base)]
        newest = folder.newest_checkpoint(path / folder.CHECKPOINTS)
        return [Candidate(str(newest), base, str(newest), base, under_way=wanted)] if newest else []
    if (path / ADAPTER_FILE).is_file() or (path / COMBINATION_FILE).is_file():
        return [_adapted(str(path), path, quantize)]
    return [Candidate(str(path), _model(str(path), quantize))] if (path / MODEL_FILE).is_file() else []


def _on_hub(word: str, quantize: Bits) -> Candidate:
    """What a hub id stands for: an adapter with the base that it names, or a model."""
    place = adapter_on_hub(word)
    return _adapted(word, place, quantize) if place else Candidate(word, _model(word, quantize))


def _adapted(word: str, place: Path, quantize: Bits) -> Candidate:
    """An adapter that is no run's, with the base that it names."""
    name, revision = base_of(place, word)
    base = replace(_model(name, quantize), revision=revision)
    return Candidate(word, base, str(place), base)


def _model(base: str, quantize: Bits) -> sections.Model:
    return sections.Model(base=base, adapter=None, quantize=quantize)
