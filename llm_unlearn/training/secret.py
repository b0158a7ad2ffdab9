"""The key that a private run draws from: the same on all processes, kept with the checkpoints, and deleted with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from llm_unlearn.folder import CHECKPOINTS, PRIVACY, write
from llm_unlearn.training.privacy import Mechanism, Privacy, new_key

NAME = "secret.key"


def key_of(privacy: Privacy | None, seed: int, folder: Path, resume: bool) -> bytes:
    """A new key, or that of the run which is resumed; nothing where the run is not private."""
    if not privacy:
        return b""
    path = folder / CHECKPOINTS / NAME
    kept = path.read_bytes() if resume and path.is_file() else b""
    (key,) = broadcast_object_list([kept or new_key(privacy, seed)])
    return bytes(key)


def begin(private: Mechanism | None, folder: Path) -> None:
    """Keep the key, where only this user can read it, and say what the run will cost and what that rests on."""
    if private:
        path = folder / CHECKPOINTS / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private.key)
        print(private.said)


def spent(private: Mechanism | None, folder: Path, steps: int, main: bool) -> dict[str, Any]:
    """The facts of a private run, also written to `privacy.json` by one process; nothing where it is not private."""
    if not private:
        return {}
    facts = private.facts(steps)
    if main:
        write(folder / PRIVACY, json.dumps(facts, indent=1, ensure_ascii=False))
    return {"privacy": facts}
