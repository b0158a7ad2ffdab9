"""What somebody else's model or adapter may not bring: code, pickles, kernels from a hub. Said before anything of it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_unlearn.spec import Refused, reason
from llm_unlearn.written import object_in

OWN_CODE = "brings Python of its own, which is never run here; name a model of an architecture that transformers itself has"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
"""Weights in these files are pickles: whoever reads one does what its author wrote."""


def why(error: Exception) -> str:
    """What a library says of a model; where it asks for leave to run code, that there is none."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return OWN_CODE
    return reason(error)


def check_weights(folder: Path, name: str, wanted: str) -> None:
    """Weights are read from safetensors and from nothing else.

    Args:
        name: what the user called the model or adapter.
        wanted: the files that hold its weights, such as `model*.safetensors`.

    Raises:
        Refused: pickles lie in their place.
    """
    if not any(folder.glob(wanted)) and (found := sorted(path.name for kind in PICKLES for path in folder.glob(kind))):
        raise Refused(
            f"{name}: its weights are pickles ({', '.join(found[:3])}), which can run code when they are read; expected {wanted}. "
            "Have whoever made it write safetensors, or read it where it can harm nothing and write it again with save_pretrained."
        )


def check_adapter(folder: Path, name: str) -> None:
    """An adapter's settings name no module that would be imported, and its weights are no pickle.

    Raises:
        Refused: they do, or they are.
    """
    check_weights(folder, name, "adapter_model*.safetensors")
    place = folder / "adapter_config.json"
    if place.is_file() and object_in(place, "expected what peft writes").get("megatron_config"):
        raise Refused(f"{place}: megatron_config: has peft import a module by its name; expected none. Take it out.")


def check_kernels(config: Any, name: str) -> None:
    """A model's settings name no kernel of a hub, which would be code.

    Raises:
        Refused: they do.
    """
    for part in parts_of(config):
        for key in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, key, None) or ""):
                raise Refused(
                    f"{name}: its config.json asks for the kernel {getattr(part, key)!r} of a hub, which is code and never fetched "
                    "here; take the setting out of config.json."
                )


def parts_of(config: Any) -> Iterator[Any]:
    """Iterate over a config and those of its parts, such as the decoder of a model that also reads images."""
    yield config
    for key in getattr(config, "sub_configs", ()):
        if (part := getattr(config, key, None)) is not None:
            yield from parts_of(part)
