"""JSON files that a program wrote: an object, or refused by the file's name, whatever somebody made of it since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_unlearn.spec import Refused, reason

DEEPEST = 100
"""Objects and lists inside each other; whoever walks through more runs out of stack."""
KINDS: dict[type[Any], str] = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}
"""How an error names what was found, without its words."""


def object_in(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        expected: what it should be, and what to do, for the error.

    Raises:
        Refused: the file cannot be read, or holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: cannot be read ({reason(error)}); {expected}.") from None
    if not isinstance(held, dict):
        raise Refused(f"{path}: found {KINDS.get(type(held), 'a number')}, and not an object; {expected}.")
    level: list[Any] = [held]
    for _ in range(DEEPEST):
        inner = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in inner if isinstance(one, (dict, list))]
    if level:
        raise Refused(f"{path}: has more than {DEEPEST} objects and lists inside each other; {expected}.")
    return held
