"""Records as a parquet file, to be sorted, filtered and joined by others' tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.durable import whole
from llm_unlearn.folder import new_file


def write_columns(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write records, all of the same keys, as columns; whole or not at all, for `datasets`, pandas or polars to read."""
    import pyarrow
    from pyarrow import parquet

    with whole(path) as unfinished, new_file(unfinished) as file:
        parquet.write_table(pyarrow.Table.from_pylist([dict(record) for record in records]), file)


def read_columns(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Records of these columns only; of a column that is not there, nothing."""
    from pyarrow import parquet

    there = [name for name in names if name in parquet.read_schema(path).names]
    found: list[dict[str, Any]] = parquet.read_table(path, columns=there).to_pylist()
    return found
