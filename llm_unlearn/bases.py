"""Names of base models become folders: embedded models, GGUF files, models that a recipe makes, and what is a folder already."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder as run_folder
from llm_unlearn import gguf
from llm_unlearn import recipe as recipes
from llm_unlearn.base_names import EMBEDDED_MODELS
from llm_unlearn.data.sources import rows
from llm_unlearn.embedded import target
from llm_unlearn.models.converted import convert
from llm_unlearn.models.load import folder_identity
from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Model
from llm_unlearn.source import is_gguf, is_recipe
from llm_unlearn.spec import Refused, fingerprint, plain
from llm_unlearn.tree import locate


def resolve_base(model: Model, cache: Path) -> Model:
    """Return the same model with the folder that its base stands for.

    Raises:
        Refused: there is no model of this name, or a recipe's model has not been made (`retrained.found` makes it).
    """
    return replace(model, base=folder_of(model.base, cache))


def folder_of(name: str, cache: Path) -> str:
    """Return the folder that a name stands for; a hub id is returned as it is."""
    if name.startswith("embedded:"):
        return target.folder_of(name, cache)
    if is_gguf(name):
        return str(convert(name, cache))
    if is_recipe(name):
        final = home_of(recipes.load(locate(name)), cache) / run_folder.MODEL
        if not final.is_dir():
            raise Refused(f"{name}: the model of this recipe is not in the cache {cache}. Run a recipe that has it as model.base.")
        return str(final)
    return name


def settings_of(model: Model, cache: Path) -> Model:
    """Return the same model with a folder that has its tokenizer and config, perhaps without weights; makes no model."""
    if is_gguf(model.base):
        return replace(model, base=str(convert(model.base, cache, weights=False)))
    if is_recipe(model.base):
        wanted = recipes.load(locate(model.base))
        final = home_of(wanted, cache) / run_folder.MODEL
        return replace(model, base=str(final)) if final.is_dir() else settings_of(replace(model, base=wanted.model.base), cache)
    return model


def describe_base(base: str) -> dict[str, Any] | None:
    """Return file, architecture and precision of the GGUF file that a base comes from; None for any other base."""
    return describe_base(recipes.load(locate(base), check=False).model.base) if is_recipe(base) else gguf.describe(base)


def home_of(wanted: Recipe, cache: Path) -> Path:
    """Return the folder of a recipe's model: under the fingerprint of the recipe, its base and the rows that it reads. Makes and
    downloads no model: a hub id stands for itself, with its revision."""
    model, rules = wanted.model, wanted.train.rules or ()
    of_rules = [one for rule in rules for one in getattr(rule, "adapters", ())]
    named = [model.base, *(run_folder.adapter_in(one) for one in (*model.starts, *of_rules))]
    template = Path(model.chat_template).expanduser().read_bytes() if model.chat_template else b""
    made: Any = target.key_of((model.base.removeprefix("embedded:"),)) if model.base in EMBEDDED_MODELS else None
    if is_recipe(model.base):
        made = home_of(recipes.load(locate(model.base)), cache).name
    elif is_gguf(model.base):
        made = run_folder.sha256(gguf.locate_gguf(model.base))
    folders = [folder_identity(Path(os.path.expanduser(one))) for one in named if Path(os.path.expanduser(one)).is_dir()]
    read = {name: list(rows(wanted.sources[name])) for name in wanted.window}
    settings = {key: value for key, value in plain(wanted).items() if key not in ("output", "evaluation", "track")}
    return (
        cache / "retrained" / fingerprint(settings, made, folders, read, *([template.decode(errors="replace")] if template else []))
    )
