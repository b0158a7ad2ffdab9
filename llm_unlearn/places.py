"""Folders that are to be written to: what stands in their way, and links that lead out of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from llm_unlearn.spec import Refused

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")
"""Beginning of an address, also one given as a path, which has one slash only; a drive is one letter."""


def in_the_way(folder: Path) -> Path | None:
    """The file that stands where a folder, or one above it, would have to be."""
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), None)
    return there if there and not there.is_dir() else None


def check_place(folder: Path, key: str) -> None:
    """Check that a folder is there, or can be made.

    Args:
        key: setting or option that names it.

    Raises:
        Refused: it is an address; a file, or a link to nothing or to itself, is in its place or in that of a folder above it.
    """
    if ADDRESS.match(str(folder)):
        raise Refused(
            f"{key}: {folder} is an address, which must be a folder of this machine. Set a local folder, and copy it later."
        )
    blocked = in_the_way(folder)
    if blocked:
        what = (
            f"a link to {os.readlink(blocked)}, which is not there" if blocked.is_symlink() and not blocked.is_file() else "a file"
        )
        raise Refused(f"{key}: {blocked} is {what}; {folder} must be a folder. Nothing was changed; choose another {key}.")


def no_way_out(folder: Path) -> None:
    """A folder that is written to or cleared holds no link to what lies elsewhere.

    Raises:
        Refused: it does: whoever wrote through it would write there.
    """
    where = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(where):
                said = f"{path}: a link that leads out of {folder}, to {path.resolve()}"
                raise Refused(f"{said}. Nothing was changed; put a copy in its place, or take it out.")


def check_replaced(path: Path, keys: Collection[str]) -> None:
    """Check that a JSON file which is replaced is one of ours; one that was damaged is replaced, too.

    Raises:
        Refused: it is a whole JSON file without any of these keys.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return
    if not isinstance(told, dict) or not told.keys() & set(keys):
        raise Refused(f"--overwrite: {path} was not written by this command. Nothing was changed; choose another output.")
