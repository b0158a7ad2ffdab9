"""Adapter files that are the same bytes for the same adapter, in every interpreter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG = "adapter_config.json"


def save_adapter(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapter.

    Args:
        weights: state dict of the model where its own is spread over processes.
    """
    model.save_pretrained(str(folder), state_dict=weights)
    _sort_sets(model.peft_config["default"], folder)


def save_config(config: Any, folder: Path) -> None:
    """Write the settings of an adapter whose weights are written apart."""
    config.save_pretrained(str(folder))
    _sort_sets(config, folder)


def _sort_sets(config: Any, folder: Path) -> None:
    """Sort what peft writes in the order of a set, which depends on the interpreter's hash seed (PYTHONHASHSEED)."""
    path = folder / CONFIG
    told = json.loads(path.read_text(encoding="utf-8"))
    told |= {key: sorted(value) for key, value in vars(config).items() if isinstance(value, (set, frozenset))}
    path.write_text(json.dumps(told, indent=2, sort_keys=True), encoding="utf-8")
