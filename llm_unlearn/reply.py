"""What a verb answers: an exit status that scripts can use, and the facts behind its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE, UNFIT, REFUSED, BUSY, UNREACHABLE, BUG, UNABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 70, 74, 130, 143
"""Done, or ended by the recipe's own bound · done, and something in it does not hold, such as a loss that was not finite · refused,
and nothing was changed · another process is at it · a service did not answer, try again · a bug of llm-unlearn, please report it ·
the machine could not: no room, no right, no memory; what was finished is kept · interrupted by Ctrl-C, the same command goes on ·
the same by SIGTERM or SIGHUP, as of a preempted node."""


@dataclass(frozen=True)
class Reply:
    """What came of a verb."""

    status: int = DONE
    """The process's exit status."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was said to people in words, as plain JSON data for `--json`."""
