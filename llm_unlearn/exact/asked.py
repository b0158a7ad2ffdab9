"""Which rows of a run in pieces are kept, and which are asked to go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llm_unlearn.exact.manifest import Manifest
from llm_unlearn.exact.rows import Known, find


def standing(manifest: Manifest, known: Mapping[str, Known]) -> dict[str, Known]:
    """The rows that are there and not deleted."""
    rows, deleted = set(manifest.rows), set(manifest.deleted)
    hashes = {id: manifest.hash(id) for id in known}
    return {id: one for id, one in known.items() if hashes[id] in rows and hashes[id] not in deleted}


def meant(manifest: Manifest, known: Mapping[str, Known], ids: Iterable[str], where: Mapping[str, str]) -> set[str]:
    """Hashes of the rows that are asked for and not deleted yet. An id may have left the data, but not one that was never there.

    Raises:
        Refused: there is no such row.
    """
    ids = list(ids)
    gone = {manifest.hash(id) for id in ids} & set(manifest.rows)
    unknown = [id for id in ids if manifest.hash(id) not in gone]
    found = find(standing(manifest, known), unknown, where) if unknown or where else []
    return {*gone, *(manifest.hash(id) for id in found)} - set(manifest.deleted)
