"""What a run with noise asks of its processes: one key, kept with the checkpoints and deleted with them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list

from llm_unlearn.durable import whole
from llm_unlearn.folder import CHECKPOINTS, PRIVACY, write

NAME = "secret.key"


class Noisy(Protocol):
    """A run whose guarantee comes from noise: private training, or a certificate."""

    @property
    def key(self) -> bytes: ...

    @property
    def said(self) -> str:
        """What is told before the run: what it costs, and what that rests on."""
        ...

    def facts(self, kept: int) -> dict[str, Any]:
        """Return what is written beside the result: the guarantee of the weights that step `kept` left."""
        ...


def new_key(reproducible: bool, seed: int) -> bytes:
    """A key of the operating system's randomness, or, where the recipe says so, one of the seed."""
    return sha256(f"private {seed}".encode()).digest() if reproducible else token_bytes(32)


def key_of(reproducible: bool | None, seed: int, folder: Path, resume: bool) -> bytes:
    """A new key, or that of the run which is resumed, the same on all processes; nothing where none is asked for (None)."""
    if reproducible is None:
        return b""
    path = folder / CHECKPOINTS / NAME
    kept = path.read_bytes() if resume and path.is_file() else b""
    (key,) = broadcast_object_list([kept or new_key(reproducible, seed)])
    return bytes(key)


def begin(noisy: Noisy | None, folder: Path) -> None:
    """Keep the key, where only this user can read it, and say what the guarantee is."""
    if noisy:
        with whole(folder / CHECKPOINTS / NAME) as unfinished:  # a resumed run's key must not be lost as it is written again
            unfinished.touch(0o600)
            unfinished.write_bytes(noisy.key)
        print(noisy.said)


def spent(noisy: Noisy | None, folder: Path, kept: int, main: bool) -> dict[str, Any]:
    """Return the facts of such a run, also written to `privacy.json` by one process; nothing of any other run.

    Args:
        kept: the step whose weights are kept, which need not be the last.
    """
    if not noisy:
        return {}
    facts = noisy.facts(kept)
    if main:
        write(folder / PRIVACY, json.dumps(facts, indent=1, ensure_ascii=False))
    return {"privacy": facts}
