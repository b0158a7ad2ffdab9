"""What every optimizer step said, a line each, which a run that was killed goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llm_unlearn.durable import about, settle, whole
from llm_unlearn.folder import new_file, no_link


class Log:
    """`log.jsonl`: one line per optimizer step, written by one process; a resumed run goes on after its checkpoint."""

    def __init__(self, path: Path, active: bool, step: int) -> None:
        self.path, self.active = path, active
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step] if step and path.exists() else []
            with whole(path) as unfinished, new_file(unfinished) as file:
                file.write("".join(line + "\n" for line in kept).encode())

    def write(self, row: Mapping[str, float]) -> None:
        if self.active:
            with about(self.path), open(self.path, "a", encoding="utf-8", opener=no_link) as file:
                file.write(json.dumps({key: value if np.isfinite(value) else str(value) for key, value in row.items()}) + "\n")

    def settle(self) -> None:
        """Have the disk hold it, before a checkpoint says that so many steps are done."""
        if self.active:
            settle(self.path)


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; the last may be half a line, where the process was killed."""
    return path.read_text().split("\n")[:-1]
