"""Ids of a model hub: with the revision that may stand behind them, and whether what lies there is an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.source import HUB_ID, missing
from llm_unlearn.spec import Refused, reason, shown
from llm_unlearn.written import object_in

ADAPTER_FILE, COMBINATION_FILE = "adapter_config.json", "combination.json"
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
MODEL_FILES = ("*.safetensors", *SMALL_FILES)
"""What is fetched of a model or adapter."""


def named(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """`USER/NAME@REVISION` in its two parts; a name without one keeps the revision that is given beside it."""
    start, sign, end = name.partition("@")
    return (start, end) if sign and start and end else (name, revision)


def is_shaped_so(name: str) -> bool:
    """Whether a name could be an id of the hub."""
    return bool(HUB_ID.fullmatch(named(name)[0]))


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean something on the hub: it is shaped so, and nothing here has it."""
    return is_shaped_so(name) and not missing(name) and not os.path.exists(os.path.expanduser(name))


def on_hub(settings: Any, key: str = "") -> list[str]:
    """The names in settings, as plain data, that mean models and data of the hub, here and now: elsewhere, and later, a folder of
    this machine may look like one."""
    if isinstance(settings, Mapping):
        return sorted({name for key, one in settings.items() for name in on_hub(one, str(key))})
    if isinstance(settings, (list, tuple)):
        return sorted({name for one in settings for name in on_hub(one, key)})
    meant = key in ("base", "start", "source", "retrained") and isinstance(settings, str)
    return [settings] if meant and is_hub_id(settings) else []


def adapter_on_hub(name: str) -> Path | None:
    """The local copy of a hub repository that holds an adapter, or several that are combined; None of anything else, and where the
    hub cannot be asked and has not been before. Weights come with it.

    Raises:
        Refused: it holds one, and its files could not be fetched.
    """
    if not is_hub_id(name):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, revision = named(name)
    for file in (ADAPTER_FILE, COMBINATION_FILE):
        try:
            hf_hub_download(repo, file, revision=revision)
        except (HfHubHTTPError, HFValidationError, OSError):
            continue  # no such file or repository: whoever loads the model says which
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_FILES)))
        except Exception as error:
            raise Refused(f"{name}: an adapter on the hub, and its files cannot be read ({reason(error)}).") from error
    return None


def base_of(folder: Path, name: str) -> tuple[str, str | None]:
    """The base that the adapter in a folder names, and the revision of it; of combined ones, that of the first.

    Raises:
        Refused: it names none; `name` is what the user called the adapter.
    """
    place = folder / ADAPTER_FILE
    if not place.is_file():
        place = next(iter(sorted(folder.glob(f"*/{ADAPTER_FILE}"))), place)
    instead = f"name the model: --model BASE --adapter {name}"
    found = object_in(place, instead)
    base, revision = found.get("base_model_name_or_path"), found.get("revision")
    if not base:
        raise Refused(f"{place}: base_model_name_or_path is empty; {instead}.")
    for key, one in (("base_model_name_or_path", base), ("revision", revision or "")):
        if not isinstance(one, str):
            raise Refused(f"{place}: {key}: found {shown(one)}; expected text. Mend it, or {instead}.")
    return base, revision
