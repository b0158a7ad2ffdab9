"""A model that a program made itself, as one that was loaded: with its tokenizer, and what its numbers depend on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_unlearn.data.examples import PLAIN_TEMPLATE
from llm_unlearn.models.load import Loaded, causal
from llm_unlearn.spec import Refused


def given(model: Any, tokenizer: Any) -> Loaded:
    """
    Args:
        model: a transformers causal LM, or peft's wrapper of one.
        tokenizer: a fast one; one without a chat template is given the plain question–answer layout, in place.

    Raises:
        Refused: it is no such model or tokenizer.
    """
    if not isinstance(causal(model), PreTrainedModel) or not hasattr(model, "generate"):
        raise Refused(f"model: found {type(model).__name__}; expected a transformers causal LM, or peft's wrapper of one.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise Refused(f"tokenizer: found {type(tokenizer).__name__}; expected the model's own fast tokenizer.")
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return Loaded(model, tokenizer, (str(tokenizer.chat_template), _digest(model)))


def _digest(model: Any) -> str:
    """Stands for the weights. Whatever else a program may have changed, such as a hook or an adapter's scale, is not in it, so
    nothing that such a model says is kept for later."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def answering(*models: Any) -> Iterator[None]:
    """Inside, models are in evaluation mode, as every number is taken; afterwards each layer is as it was."""
    was = [(layer, layer.training) for model in models for layer in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for layer, training in was:
            layer.training = training


def check_place(one: Loaded, device: torch.device) -> None:
    """A model is where this process computes; `cuda` is the one that is used, whichever it is.

    Raises:
        Refused: it is elsewhere.
    """
    here = one.model.device
    if here.type != device.type or (here.index != device.index and None not in (here.index, device.index)):
        raise Refused(f"model: found on {here}; this process computes on {device}: move it there.")
