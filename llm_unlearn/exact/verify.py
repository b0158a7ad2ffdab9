"""The proof of isolation, checked: that no kept weight depends on a deleted row, as far as files and hashes can tell, and on
request by training a line again and comparing bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from llm_unlearn import folder as run_folder
from llm_unlearn import recipe as recipes
from llm_unlearn.exact.forgetting import Session, method_of
from llm_unlearn.exact.manifest import FILE, PIECES, WEIGHTS, Manifest, Piece, adapter_files, read, save, settings_of
from llm_unlearn.exact.pieces import weights_of
from llm_unlearn.folder import sha256
from llm_unlearn.methods.exact import Exact
from llm_unlearn.models.joined import served
from llm_unlearn.spec import Refused, nearest


def problems(folder: Path) -> list[str]:
    """Everything in a run folder that is not as its manifest says, or that depends on a deleted row; empty where all is well. Reads
    files only: no model, no data.

    Raises:
        Refused: there is no manifest.
    """
    manifest = read(folder)
    recipe = recipes.load(folder / run_folder.RECIPE, check=False)
    found = []
    if manifest.settings != settings_of(recipe):
        found.append(f"{run_folder.RECIPE}: is not the recipe that the manifest was made by")
    if manifest.state != "complete":
        found.append(
            f"{FILE}: a {'deletion' if manifest.state == 'deleting' else 'training'} is under way; weights may depend on them"
        )
    if not set(manifest.deleted) <= set(manifest.rows):
        found.append(f"{FILE}: lists deleted rows that were never given")
    found += [
        f"{FILE}: piece {piece.key} ({piece.line}, {piece.stage}): {text}"
        for piece in manifest.pieces
        for text in _linked(piece, manifest)
    ]
    changed = list(_changed(folder, manifest))
    found += changed or _not_joined(folder, manifest, method_of(recipe))
    return found


def _linked(piece: Piece, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a piece's place in the manifest: its key, its ancestors, its rows."""
    if manifest.key(piece.line, piece.stage, piece.rows, piece.content, piece.parent) != piece.key:
        yield "its key does not stand for what the manifest says of it"
    known = manifest.by_key
    ancestor: Piece | None = piece
    passed: set[str] = set()
    while ancestor is not None:
        if found := set(ancestor.rows) & set(manifest.deleted):
            yield f"depends on {len(found)} deleted rows, first seen by {ancestor.stage}"
        if ancestor.key in passed:
            yield "its ancestors go round in a circle"
            return
        passed.add(ancestor.key)
        above = known.get(ancestor.parent or "")
        if ancestor.parent and above is None:
            yield f"its ancestor {ancestor.parent} is not there"
        elif above and above.sha256 != ancestor.parent_sha256:
            yield f"{ancestor.stage} began with other weights than {above.key} ({above.stage}) has"
        ancestor = above


def _changed(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files that are not what was published: other content, gone, or more than there should be."""
    for piece in manifest.pieces:
        path = folder / PIECES / piece.key / WEIGHTS
        name = path.relative_to(folder)
        if not path.is_file():
            yield f"{name}: is gone"
        elif (now := sha256(path)) != piece.sha256:
            hashes = f"SHA-256 is {now[:16]}…, the manifest says {piece.sha256[:16]}…"
            yield f"{name} ({piece.line}, {piece.stage}): was changed; {hashes}"
    here = adapter_files(folder)
    for file in sorted({*here, *manifest.adapter}):
        if here.get(file) != manifest.adapter.get(file):
            what = "is gone" if file not in here else "was changed" if file in manifest.adapter else "is not in the manifest"
            yield f"{run_folder.ADAPTER}/{file}: {what}"
    listed = {folder / PIECES / piece.key / WEIGHTS for piece in manifest.pieces}
    for path in sorted(path for ending in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.rglob(ending)):
        if path not in listed and folder / run_folder.ADAPTER not in path.parents:
            yield f"{path.relative_to(folder)}: weights that are not in the manifest; they may depend on deleted rows"


def _not_joined(folder: Path, manifest: Manifest, method: Exact) -> list[str]:
    """Whether the adapter is what the pieces that serve make, bit by bit."""
    if not manifest.serving:
        return []
    if lost := [key for key in manifest.serving if key not in manifest.by_key]:
        return [f"{FILE}: {lost[0]} serves and is no piece"]
    made = served(weights_of(folder, map(manifest.by_key.__getitem__, manifest.serving)), method)
    changed = made.differs(folder / run_folder.ADAPTER)
    return [f"{run_folder.ADAPTER}/{file}: is not what the pieces that serve make" for file in changed]


def retrained(folder: Path, line: str, cache: Path) -> list[str]:
    """Train one line again from the start, on the rows that are kept, and compare every piece bit by bit.

    Raises:
        Refused: no such line, or the rows are not there any more.
    """
    manifest = read(folder)
    recipe = recipes.load(folder / run_folder.RECIPE, check=False)
    names = list(dict.fromkeys(piece.line for piece in manifest.pieces))
    if line not in names:
        raise Refused(f"--retrain: no line {line!r} here; {nearest(line, names)}")
    found = []
    with TemporaryDirectory(prefix="llm-unlearn-") as again:
        target = Path(again)
        save(replace(manifest, pieces=[], serving=[], adapter={}), target)
        session = Session(replace(recipe, output=again), cache)
        for one in session.workshop.once_more(session.manifest, session.kept, line, set(manifest.by_key)):
            here, there = (path / PIECES / one.piece.key / WEIGHTS for path in (target, folder))
            if sha256(here) != sha256(there):
                found.append(
                    f"{there.relative_to(folder)} ({one.line.name}, {one.stage.name}): other bits than training it again makes"
                )
    return found
