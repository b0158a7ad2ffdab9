"""What is printed to somebody who has gone, as after `| head`, is dropped: no run of hours ends because nobody reads its words."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class Patient(io.FileIO):
    """A file descriptor whose reader may go: from then on, what is written goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for child processes and libraries, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def be_patient() -> None:
    """Put patient streams in the place of this process's own; those that a test or a notebook has put there stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        own = stream is not None and stream is getattr(sys, f"__{name}__")
        if own and not isinstance(getattr(stream.buffer, "raw", stream.buffer), Patient):
            stream.flush()
            raw = Patient(stream.fileno(), "w", closefd=False)
            buffer: Any = io.BufferedWriter(raw) if hasattr(stream.buffer, "raw") else raw  # python -u has none
            made = io.TextIOWrapper(
                buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
            )
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)
