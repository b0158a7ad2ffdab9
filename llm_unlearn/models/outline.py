"""A model built from its config on the meta device, without weights: what `plan` and `run` ask before anything is loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_unlearn.data.capacity import Capacity
from llm_unlearn.models.load import causal, read_config
from llm_unlearn.models.quantized import Quantization, check_quantized
from llm_unlearn.models.structure import body_of, check_decoder
from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused, reason

OFFSET = 2
"""Rows before the first position in the tables of the OPT family."""
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Keys in which architectures state how many positions a model was made for."""


def outline_of(model: Model) -> Any:
    """Build a model without weights; of a hub id, only small files are read.

    Raises:
        Refused: no architecture that transformers knows stands there, or it has no body below its head.
    """
    config = read_config(model)
    try:
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        unknown = "Unrecognized configuration class" in str(error)  # followed by the names of all others
        text = f"{type(config).__name__} belongs to none in transformers" if unknown else reason(error)
        raise Refused(f"{model.base}: no causal language model can be built from its config.json ({text}).") from error
    body_of(net)
    check_decoder(net)
    return net


def capacity_of(model: Any, name: str = "the model", most: int = 0) -> Capacity:
    """Return which ids and lengths a model can read; its weights may be on the meta device.

    Args:
        model: a transformers causal LM, or peft's wrapper of one.
        name: what the user calls it.
        most: tokens of the longest sequence that is planned. Shapes are tried only if these are more than `trained`.
    """
    net = causal(model)
    config = net.config.get_text_config()
    trained = next((int(limit) for key in LIMITS if isinstance(limit := getattr(config, key, None), int) and limit > 0), None)
    embedding = net.get_input_embeddings()
    rows = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
    limited = trained is not None and (_has_table(net, trained) or (most > trained and _breaks_beyond(net, trained)))
    return Capacity(name, rows, trained if limited else None, trained)


def check_outline(recipe: Recipe, net: Any, device: torch.device) -> tuple[Capacity, Quantization | None]:
    """Ask the outline of a recipe's model what it can read, and how its weights are quantized; the same in `plan` and `run`.

    Raises:
        Refused: the recipe cannot train on weights that are quantized so.
    """
    return capacity_of(net, recipe.model.base, longest_allowed(recipe)), check_quantized(recipe, net.config, device)


def longest_allowed(recipe: Recipe) -> int:
    """Return the most tokens that an example of any source may have."""
    return max(source.max_tokens for source in recipe.sources.values())


def _has_table(net: Any, trained: int) -> bool:
    """Return whether positions come from a table of that many rows: a second embedding, or a table of sines."""
    tables = [
        part.weight.shape[0] for part in net.modules() if isinstance(part, nn.Embedding) and part is not net.get_input_embeddings()
    ]
    sines = [part.shape[0] for part in net.buffers() if part.ndim == 2]
    return trained in tables or trained + OFFSET in tables or trained in sines


def _breaks_beyond(net: Any, trained: int) -> bool:
    """Return whether shapes no longer fit with one token more (MPT's biases); tried without weights."""
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(copy.deepcopy(net.config))

    def runs(length: int) -> bool:
        try:
            with torch.no_grad():
                outline(input_ids=torch.zeros((1, length), dtype=torch.long, device="meta"), use_cache=False)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    return not runs(trained + 1) and runs(2)
