"""Parts of a table on disk, each in a file of its own, under a fingerprint of all that it depends on."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.durable import whole
from llm_unlearn.folder import new_file

Part = Mapping[str, Any]
"""What one pass found of one set: arrays, and lists of text."""


def write_part(part: Part, path: Path) -> None:
    """Keep a part; the file appears whole or not at all."""
    arrays = {name: value for name, value in part.items() if isinstance(value, np.ndarray)}
    texts = {name: value for name, value in part.items() if name not in arrays}
    with whole(path) as unfinished, new_file(unfinished) as file:
        np.savez_compressed(file, json=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]  # of the stubs


def read_part(path: Path) -> Part | None:
    """A part that was kept; None where there is none, or a damaged one, which is made again."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            arrays = {name: file[name] for name in file.files if name != "json"}
            return {**arrays, **json.loads(file["json"].tobytes())}
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
