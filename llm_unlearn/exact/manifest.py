"""The manifest of a run in pieces: which weights are there, what each was trained on, and what is deleted; no text of any row."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llm_unlearn import folder as run_folder
from llm_unlearn.exact.rows import digest
from llm_unlearn.folder import write
from llm_unlearn.recipe import Recipe
from llm_unlearn.spec import Busy, Refused, fingerprint, plain

FILE, PIECES, WORK, WEIGHTS = "manifest.json", "pieces", "work", "weights.safetensors"
"""Names in the run folder: the manifest, kept weights, training under way, and a piece's one file."""
LOCK = "manifest.lock"
"""The file that is locked while somebody reads the manifest, to save another."""
FORMAT = 1
KEY = re.compile(r"[0-9a-f]{16}")
State = Literal["building", "storing", "deleting", "complete"]
"""What is under way: the first training of a run, which then deletes its forget set · of a store · a deletion · nothing."""
BEGUN: tuple[State, ...] = ("building", "storing")
"""The first training is under way."""


@dataclass(frozen=True)
class Piece:
    """The weights that one stage ended with, and everything that decides them."""

    key: str
    """Fingerprint of all that follows but the costs: the piece's folder."""
    line: str
    stage: str
    rows: list[str]
    """Salted hashes of the rows that this stage is the first of its line to see. With its ancestors', all that it depends on."""
    content: str
    """Salted hash of the token ids of all that it passes over."""
    parent: str | None
    """Key of the piece that it began with; None: the fresh adapter, which follows from the seed."""
    parent_sha256: str | None = None
    sha256: str = ""
    steps: int = 0
    examples: int = 0
    """Examples seen, repeats counted."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """All that can be checked of a run folder."""

    salt: str
    settings: str
    """Fingerprint of what decides the weights besides the rows: `settings_of`."""
    base: str
    """Identity of the frozen model."""
    threads: int
    """CPU threads that it was trained with; another number may round otherwise."""
    versions: dict[str, str]
    rows: list[str]
    """Salted hashes of all rows that were ever given."""
    deleted: list[str] = field(default_factory=list)
    """Salted hashes of those that are deleted, asked for or done."""
    state: State = "building"
    """What is under way."""
    pieces: list[Piece] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)
    """Keys of the pieces that the adapter is made of."""
    adapter: dict[str, str] = field(default_factory=dict)
    """File of the adapter -> its SHA-256."""
    deletions: list[dict[str, Any]] = field(default_factory=list)
    """What each deletion cost."""
    format: int = FORMAT

    def hash(self, id: str) -> str:
        """What stands for a row here."""
        return digest(self.salt, id)

    def key(self, line: str, stage: str, rows: list[str], content: str, parent: str | None) -> str:
        return fingerprint(self.settings, self.base, self.threads, line, stage, rows, content, parent)

    @property
    def by_key(self) -> dict[str, Piece]:
        return {piece.key: piece for piece in self.pieces}


def settings_of(recipe: Recipe) -> str:
    """Stands for what decides the weights besides rows and base."""
    whole = plain(recipe)
    return fingerprint({name: whole[name] for name in ("seed", "model", "method", "train")})


def new_manifest(recipe: Recipe, base: str, threads: int, versions: dict[str, str], ids: list[str]) -> Manifest:
    """Of a run that has trained nothing yet."""
    made = Manifest(secrets.token_hex(16), settings_of(recipe), base, threads, versions, [])
    return replace(made, rows=sorted(made.hash(id) for id in ids))


def save(manifest: Manifest, folder: Path) -> None:
    write(folder / FILE, json.dumps(asdict(manifest), indent=1))


def read(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        Refused: there is none, or it is not one of ours.
    """
    path = folder / FILE
    if not path.is_file():
        raise Refused(f"{folder}: has no {FILE}; expected the run folder of an exact method (sisa, s3t, modules).")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise Refused(f"{path}: format {data['format']!r}; this version reads {FORMAT}.")
        pieces = [Piece(**piece) for piece in data["pieces"]]
        for key in (*(one.key for one in pieces), *data.get("serving", ())):
            if not KEY.fullmatch(key):  # it is the name of a folder
                raise ValueError(f"{key!r} is no piece's key")
        return Manifest(**{**data, "pieces": pieces})
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path}: cannot be read as a manifest ({error}). Restore it, or carry out the run again.") from None


@contextmanager
def alone(folder: Path, speaks: bool = True) -> Iterator[None]:
    """Inside, nobody else changes a run folder that has a manifest: two who read the same one, and save each its own, would lose
    what one of them deleted. Held by the kernel for this process, which may go in again.

    Args:
        speaks: of several processes, one holds it for all.

    Raises:
        Busy: somebody else is at it.
    """
    if not speaks or not (folder / FILE).is_file():
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = f"{folder}: another process deletes rows from it, or trains it. Nothing was changed; try again when it has ended."
        raise Busy(said) from None
    try:
        yield
    finally:
        lock.release()


def adapter_files(folder: Path) -> dict[str, str]:
    """File of the adapter in a run folder -> its SHA-256."""
    inside = folder / run_folder.ADAPTER
    return {path.relative_to(inside).as_posix(): run_folder.sha256(path) for path in sorted(inside.rglob("*")) if path.is_file()}
