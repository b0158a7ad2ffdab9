"""Settings as strangers may read them: without values of filters, words of prompts, and paths of this machine. Pure functions on
plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from llm_unlearn.source import is_shipped, missing

FILTERS = ("where", "without", "like")
WITHHELD = "withheld"
NAMES = ("source", "base", "start", "adapters", "output", "suite", "retrained", "include", "recipe")
"""Keys under which a file or folder may stand."""
PATH = re.compile(r"(?<![\w:/.<>)\]])~?/(?:[^\s'\"`,;:()<>|/]+/)+[^\s'\"`,;:()<>|/]*")


def described(value: Any, places: Iterable[Path] = (), key: str = "", hub: Collection[str] | None = None) -> Any:
    """Plain data with local paths reduced to their last part, and with no value that a filter or a prompt gives.

    Args:
        places: folders of this machine that are taken out of sentences, too.
        key: under which it stands.
        hub: the names that were ids of a hub where they were used; without it, as they look from here.
    """
    if isinstance(value, Mapping):
        if key in FILTERS:
            return dict.fromkeys(map(str, value), WITHHELD)
        if key == "contrast" and "expert" in value:  # prompts that say what is to be forgotten
            return {name: WITHHELD for name in value}
        return {name: described(one, places, str(name), hub) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(one, places, key, hub) for one in value]
    if not isinstance(value, str):
        return value
    if key == "chat_template":
        return WITHHELD
    return local_name(value) if key in NAMES and is_local(value, hub) else without_paths(value, places)


def is_local(name: str, hub: Collection[str] | None = None) -> bool:
    """Whether a name is that of a file or folder, here or on the machine of the run.

    Args:
        hub: the names that were ids of a hub where they were used; every other one is local then.
    """
    if is_shipped(name):
        return False
    if hub is not None:
        return name not in hub
    try:
        return missing(name) or PurePath(name).is_absolute() or Path(os.path.expanduser(name)).exists()
    except (OSError, ValueError):  # too long, or no name at all
        return False


def local_name(name: str) -> str:
    """The last part of a path."""
    return PurePath(name).name or WITHHELD


def without_paths(text: str, places: Iterable[Path] = ()) -> str:
    """A sentence in which every absolute path is its last part only."""
    for place in sorted(map(str, places), key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(f"{place}/", "")
    return PATH.sub(lambda found: local_name(found.group()), text)
