"""A sharded optimizer's state on disk, looked through before torch reads it, since torch reads parts of it as pickles that may run
anything, and a checkpoint may be somebody else's."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

INDEX = ".metadata"
KNOWN = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
"""What torch writes into an index: sizes and places, and nothing that acts."""


class Index(pickle.Unpickler):
    """Reads an index of shards, and nothing else that a pickle can name."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint of this project does")


def check(folder: Path) -> None:
    """Look through every state below a folder.

    Raises:
        pickle.UnpicklingError: a state would do more than be read.
    """
    for index in sorted(folder.rglob(INDEX)):
        with index.open("rb") as file:
            found = Index(file).load()
        for at, info in found.storage_data.items():
            if not isinstance(found.state_dict_metadata.get(at.fqn), BytesStorageMetadata):
                continue  # a tensor, which torch reads as one and nothing else
            if info.transform_descriptors or PurePath(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{at.fqn} lies in {info.relative_path!r}, where no checkpoint of this project has it")
            with (index.parent / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
