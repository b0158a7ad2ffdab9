"""Whether what was read is what it should be: every weight there, in its place, and a number. Libraries load half a model, fill it
up at random, and only warn; a model that has forgotten nothing would then be called one that has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm_unlearn.spec import Refused, reason, shown
from llm_unlearn.written import object_in

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def weights_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        Refused: there is no such file, or it is damaged.
    """
    try:
        return load_file(str(path))
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError is no ValueError, and OSError where the file is not there
        raise Refused(f"{path}: weights that cannot be read ({reason(error)}); expected a whole safetensors file.") from error


def check_model(net: Any, report: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which the files lack weights, hold layers beside it, or hold what is no number.

    Args:
        report: what transformers found (`output_loading_info`).
        name: what the recipe calls the model.
    """
    if lacking := sorted(report["missing_keys"]):
        raise Refused(f"{name}: the files lack {_some(lacking)}; expected every weight that config.json asks for.")
    if other := sorted(report["mismatched_keys"]):
        key, there, asked = other[0]
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        found = f"{key} is {'×'.join(map(str, there))} in the files, and config.json asks for {'×'.join(map(str, asked))}{more}"
        raise Refused(f"{name}: {found}; one of the two is wrong.")
    known = {_any_layer(one) for one in net.state_dict()}
    if not any("#" in one for one in known):
        raise Refused(f"{name}: config.json asks for a model without layers; expected some.")
    if beside := sorted(one for one in report["unexpected_keys"] if re.search(r"\d", one) and _any_layer(one) in known):
        raise Refused(
            f"{name}: the files also hold {_some(beside)}, layers that config.json does not ask for; one of the two is wrong."
        )
    _check_numbers(dict(net.named_parameters()), name)


def check_adapter_files(folder: Path) -> None:
    """Refuse an adapter's folder of which nothing could be made.

    Raises:
        Refused: its settings are none of an adapter, or its weights are not there in safetensors.
    """
    config, weights = folder / "adapter_config.json", folder / ADAPTER_WEIGHTS
    if not config.is_file():
        raise Refused(f"{folder}: no adapter there (adapter_config.json); expected a folder that peft wrote.")
    found = object_in(config, "expected what peft writes").get("peft_type")
    if not isinstance(found, str) or found not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise Refused(f"{config}: peft_type: found {shown(found)}; expected an adapter that peft knows, such as LORA.")
    if not weights.is_file():
        raise Refused(f"{weights}: no such file; expected the adapter's weights in safetensors.")


def check_adapter(model: Any, folder: Path, adapter: str) -> None:
    """Refuse an adapter that was made for another model, or of which the file lacks a part: peft would leave out what does not
    fit, make up what is not there, and the model be as it was.

    Args:
        adapter: its name in the model.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        there = set(file.keys())
    ours = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if lacking := sorted(ours.keys() - there):
        raise Refused(f"{folder}: the adapter has no weights for {_some(lacking)}; expected an adapter of this model.")
    if there - ours.keys():  # a copy of the embeddings goes with some
        ours = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=True)
    if beside := sorted(there - ours.keys()):
        raise Refused(f"{folder}: the adapter has weights for {_some(beside)}, which this model does not have; expected its own.")
    _check_numbers(ours, str(folder))


def _check_numbers(weights: Mapping[str, Tensor], name: str) -> None:
    for key, one in weights.items():
        if one.is_floating_point() and not one.is_meta and one.element_size() > 1 and not bool(torch.isfinite(one).all()):
            raise Refused(f"{name}: {key} holds what is no finite number; expected weights that a run did not break.")


def _any_layer(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _some(keys: Iterable[str]) -> str:
    first, *more = keys
    return f"{first}{f' and {len(more)} more' if more else ''}"
