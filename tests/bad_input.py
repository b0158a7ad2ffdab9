"""Bad input, made by the thousand: what can be wrong with a setting, a file, a row, a model, and how it must be refused."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_unlearn.spec import Refused

Keys = tuple[str | int, ...]

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "empty list": [],
    "lists": [[1, [2]]],
    "empty mapping": {},
    "mapping": {"name": "x", "": 1},
    "list of mappings": [{"name": "none"}],
    "zero": 0,
    "minus one": -1,
    "largest": (1 << 63) - 1,
    "beyond floats": 1e308,
    "half": 0.5,
    "empty text": "",
    "blank": " \t",
    "text": "plain",
    "megabyte": "x" * 1_000_000,
    "escape": "\x1b[31mred\x07",
    "right to left": "\u202egnp.exe",
    "other letters": "模型/ﬁ\u0301/\U0001f984",
    "nobody's home": "~nobody-here/x",
    "far up": "../../../../../../../../nothing/here",
    "number in quotes": "1e-5",
    "lines": "a\nb\r\nc",
}
"""Values that stand in the place of one that is right."""
HOSTILE = {
    "tag of Python": "!!python/object/apply:os.system ['touch pwned']",
    "tag of an object": "!!python/object:pathlib.Path {}",
    "tag of bytes": "!!binary aGVsbG8=",
    "tag of a set": "!!set {a, b}",
    "tag of pairs": "!!omap [a: 1]",
    "own tag": "!recipe {a: 1}",
    "400 digits": "1" + "0" * 400,
    "400 digits in hex": "0x1" + "0" * 400,
    "5,000 digits": "9" * 5000,
    "100,000 digits": "9" * 100_000,
    "of sixty": "1" + ":59" * 30_000,
    "beyond all floats": "1e999",
    "no number": ".nan",
    "minus infinity": "-.inf",
    "nothing of text": '"a\\0b"',
    "half a character": '"\\ud800"',
    "no escape": '"\\q"',
    "open quote": '"abc',
    "open list": "[1, 2",
    "tab": "\t- x",
    "unknown alias": "*none",
    "itself": "&a [*a]",
    "10,000 lists": "[" * 10_000,
    "10,000 mappings": "{a: " * 10_000,
    "60 lists, closed": "[" * 60 + "]" * 60,
    "merge": "{<<: {a: 1}}",
    "list as a key": "{? [a, b] : 1}",
    "equals": "=",
}
"""YAML in the place of a value that is right, none of which may pass."""


def places(data: Any, above: Keys = ()) -> Iterator[Keys]:
    """Every key and item of plain data, by its path."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


def at(data: Any, path: Keys) -> Any:
    for key in path:
        data = data[key]
    return data


def put(data: dict[str, Any], path: Keys, value: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    made = copy.deepcopy(data)
    at(made, path[:-1])[path[-1]] = value
    return made


def without(data: dict[str, Any], path: Keys) -> dict[str, Any]:
    """A copy that lacks a key or an item."""
    made = copy.deepcopy(data)
    del at(made, path[:-1])[path[-1]]
    return made


def misspelt(data: dict[str, Any], path: Keys) -> dict[str, Any]:
    """A copy with a key that nobody knows in the place of one."""
    made = copy.deepcopy(data)
    inner = at(made, path[:-1])
    inner[f"{path[-1]}_"] = inner.pop(path[-1])
    return made


def refusal(call: Callable[[], object]) -> str | None:
    """What a call refuses, or None where it accepts; anything else that it raises is a fault of ours. Says whether the words are
    such as one can read: whole lines, not too many, not too long, and nothing in them that a terminal would obey."""
    try:
        call()
    except Refused as error:
        said = str(error)
        lines = said.split("\n")
        assert said.strip() and len(lines) <= 60, f"{len(lines)} lines"
        for line in lines:
            assert line.strip() and len(line) <= 2500, f"a line of {len(line)} characters: {line[:300]}"
            assert all(one.isprintable() for one in line), f"would be obeyed by a terminal: {line[:300]!r}"
            assert "Traceback" not in line
        return said
    return None


def content(folder: Path) -> str:
    """Stands for every name and byte of a folder: nothing in it was changed where this is the same."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0" + str(path.lstat().st_mode).encode() + b"\0")
        if path.is_symlink():
            digest.update(os.fsencode(os.readlink(path)))
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
