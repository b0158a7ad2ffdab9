"""What an optimizer step said, for people who follow a run: every term, the looks at the dose, the pace, the memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import psutil
import torch

LOOKS = ("forget_perplexity", "holdout_perplexity", "retain_perplexity", "retain_accuracy", "epsilon")
"""Columns of the log that a step has only where the model was looked at; the last ones stay in sight."""
RECENT = 20
"""The pace is that of so many steps."""


class Said:
    """From lines of the log to what stands beside a bar."""

    def __init__(self, terms: Iterable[str], device: torch.device) -> None:
        self.terms, self.device, self.process = list(terms), device, psutil.Process()
        self.looks: dict[str, float] = {}
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def __call__(self, row: Mapping[str, float]) -> dict[str, str]:
        """Name -> value of what one step said, shortest form."""
        self.looks |= {name: row[name] for name in LOOKS if name in row}
        self.recent.append((row["tokens"], row["seconds"]))
        named = {name: row[name] for name in self.terms if name in row} | self.looks | {"grad_norm": row["grad_norm"]}
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        found = {name.replace("_", " "): f"{value:.3g}" for name, value in named.items()}
        return found | {"tokens/s": f"{tokens / max(seconds, 1e-9):,.0f}", "memory": self._memory()}

    def _memory(self) -> str:
        """Of the device at its peak, or of this process now."""
        cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_allocated(self.device) if cuda else self.process.memory_info().rss
        return f"{held / 1e9:.2f} GB"
