"""Check that the retrained model can be compared with the original one: by their tokenizers and shapes, never by their names.

Only configs and tokenizers are read, no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.base_names import EMBEDDED_MODELS
from llm_unlearn.bases import settings_of
from llm_unlearn.chat import Chat
from llm_unlearn.data.examples import content_of
from llm_unlearn.data.rendering import apply_template
from llm_unlearn.data.sources import rows
from llm_unlearn.embedded import target
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.models.load import Loaded, read_config, read_tokenizer
from llm_unlearn.recipe import load
from llm_unlearn.sections import Model, another
from llm_unlearn.source import is_recipe
from llm_unlearn.spec import Refused
from llm_unlearn.tree import locate

TEXTS = 8
"""Rows of each set that two tokenizers encode to be compared."""
PROBE = "The quick brown fox. Größe 1,234.5 — 東京, привет!\n\tdef f(x):  return x"
"""Texts that two tokenizers encode for comparison."""


@dataclass(frozen=True)
class Architecture:
    """Properties that two models must share for their numbers to be compared."""

    name: str
    tokenizer: Any
    config: Any

    @property
    def shape(self) -> tuple[str, int, int]:
        """Model type, decoder layers and hidden size, of the text part of a model with several."""
        config = self.config.get_text_config()
        return str(config.model_type), int(config.num_hidden_layers), int(config.hidden_size)


def architecture_of(model: Model, cache: Path, name: str | None = None) -> Architecture:
    """Read the tokenizer and the config of a model; an embedded model need not have been trained.

    Raises:
        Refused: they cannot be read.
    """
    if model.base in EMBEDDED_MODELS:
        tokenizer = target.make_tokenizer()
        return Architecture(name or model.base, tokenizer, target.make_config(len(tokenizer)))
    there = settings_of(model, cache)
    return Architecture(name or model.base, read_tokenizer(there), read_config(there))


def check_retrained(original: Architecture, retrained: Architecture, texts: Iterable[str], place: str) -> None:
    """Check that the retrained model reads the same tokens as the original one, and has its shape.

    Args:
        texts: of the rows that are measured.
        place: where the retrained model was named, for the error.

    Raises:
        Refused: it does not; names both.
    """
    fix = (
        "Name a model that was trained like the original one, from the same base and without the forget set, or none: "
        "`retrained: null` in the suite."
    )
    for text in (*texts, PROBE):
        ids = [one.tokenizer(text, add_special_tokens=False)["input_ids"] for one in (original, retrained)]
        if ids[0] != ids[1]:
            what = f"{retrained.name} has another tokenizer than {original.name}, so their probabilities are of different tokens"
            raise Refused(f"{place}: {what}. {fix}")
    if original.shape != retrained.shape:
        one, other = ("{} with {} layers of {}".format(*found.shape) for found in (retrained, original))
        raise Refused(f"{place}: {retrained.name} is a {one}, and {original.name} a {other}; a retrained model has the same. {fix}")


def control_of(model: Model, retrained: str) -> Model:
    """The retrained model of this name, loaded as `model` is; of a recipe, the model that it trains."""
    return load(locate(retrained)).model if is_recipe(retrained) else another(model, retrained)


def check_models(models: Mapping[str, Architecture | Model], suite: Suite, place: str, cache: Path) -> None:
    """Check the retrained model against every other column of an evaluation.

    Args:
        models: before | after | model | retrained -> a model that is named, or one that is there.

    Raises:
        Refused: they cannot be compared.
    """
    if "retrained" not in models or are_embedded(models.values()):
        return
    read = {column: one if isinstance(one, Architecture) else architecture_of(one, cache) for column, one in models.items()}
    texts = texts_of(suite)
    for column, one in read.items():
        if column != "retrained":
            check_retrained(one, read["retrained"], texts, place)


def check_columns(columns: Mapping[str, tuple[Model, str | None] | Loaded], suite: Suite, cache: Path) -> None:
    """Check the columns of an evaluation, before any weights are read.

    Args:
        columns: before | after | model | retrained -> model and adapter, or a model that is there.

    Raises:
        Refused: the retrained model cannot be compared with the others.
    """
    models = {
        column: Architecture(f"the {column}", one.tokenizer, one.causal.config) if isinstance(one, Loaded) else one[0]
        for column, one in columns.items()
    }
    check_models(models, suite, "retrained", cache)


def are_embedded(models: Iterable[object]) -> bool:
    """Return whether all are embedded models, which are made here with one tokenizer and one shape."""
    return all(isinstance(one, Model) and one.base in EMBEDDED_MODELS for one in models)


def texts_of(suite: Suite) -> list[str]:
    """Texts of the first rows of each set of a suite."""
    return [text for source in suite.sets.values() for row in rows(source)[:TEXTS] for text in json.loads(content_of(row, source))]


def layout_of(one: Architecture) -> str:
    """Return one question and answer as the model's chat template writes them."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    return apply_template(one.tokenizer, turns, Chat())
