"""A YAML text as plain data, with the line of every key. Whatever it holds, it is read at once and in little memory, or refused.

Plain data is text, numbers, true, false, null, lists and keys: no tag makes an object of anything.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from llm_unlearn.spec import FLOAT, Refused, dotted, shown

Path_ = tuple[str | int, ...]

DEEPEST = 50
"""Lists and keys inside each other; a recipe has eight."""
REPEATED = 100_000
"""Characters that all aliases (*name) may stand for together."""
LARGEST, MOST = 1 << 22, 200_000
"""Bytes of a settings file, and values in it, such as row ids. A value takes a kilobyte as it is read, and 25 µs."""
PLAINLY = {
    "bool": re.compile("true|false", re.IGNORECASE),
    "int": re.compile("[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"),
    "float": re.compile("[^_:]*"),
}
"""How a value is written that every reader of YAML takes for the same; `no` may be a country, 0042 an id or 34, 1:30 a time."""
DIGITS = 400
"""Characters of a number."""
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge")}


class _Yaml(yaml.SafeLoader):
    """YAML 1.1, in which `1e-5` is a float, as everybody expects, not a string. What else the two versions of YAML read as
    different things is refused (`PLAINLY`)."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node with all below it, which is refused where it goes too deep (each level takes some of Python's stack) or on and
        on."""
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST or self.count > MOST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            found = f"{MOST:,} values" if self.count > MOST else f"{DEEPEST} levels inside each other"
            raise yaml.composer.ComposerError(None, None, f"more than {found}", mark)
        try:
            return super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        finally:
            self.depth -= 1


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def _without_content(error: yaml.YAMLError) -> str:
    """Return what is wrong with a file and where, without its words: it may be no settings file, but one that holds secrets."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or "it cannot be read as text")
    words = re.sub(r"'(?!<)[^']*'|\"[^\"]*\"", "…", " ".join(problem.split()))
    return f"Line {mark.line + 1}, column {mark.column + 1}: {words}." if mark else f"{words}."


class Lines:
    """The data of one YAML text, and where in it each key was written."""

    def __init__(self, text: str, file: str, numbered: bool = True) -> None:
        """Read a text.

        Args:
            numbered: whether places name the line in the file.

        Raises:
            Refused: it is not YAML, or not plain data.
        """
        self.file, self.numbered = file, numbered
        self.places: dict[Path_, str] = {}
        self._met: set[int] = set()
        self._repeated = 0
        try:
            self._loader = _Yaml(text)
            self.node = self._loader.get_single_node()
        except yaml.YAMLError as error:
            said = _without_content(error) if numbered else shown(" ".join(str(error).split()), 400, as_it_is=True)
            raise Refused(f"{file}: not valid YAML. {said}") from None
        self.data = None if self.node is None else self._plain(self.node, (), ())

    def _place(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}" if self.numbered else self.file

    def _plain(self, node: yaml.Node, path: Path_, above: tuple[yaml.Node, ...]) -> Any:
        """A node as plain data; records the line of every key and item, and refuses a key that is written twice."""
        where = f"{self._place(node)}: {dotted(path) or 'the whole'}"
        if node in above:
            raise Refused(f"{where}: refers to itself. Write the value out.")
        self._once(node, where)
        if node.tag not in PLAIN and not (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:value"):
            raise Refused(f"{where}: has the tag {shown(node.tag)}; expected plain text, numbers, lists and keys. Take it out.")
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            self.places.update({(*path, i): self._place(child) for i, child in enumerate(node.value)})
            return [self._plain(child, (*path, i), above) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, path: Path_, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in PLAIN:
                raise Refused(f"{place}: {dotted(path) or 'the whole'}: found a key that is no text; expected one such as `seed`.")
            key = key_node.value  # as it is written: `on` and 1e-5 are names where a name is expected
            _text(key, f"{place}: {dotted((*path, key))}")
            if key in result:
                raise Refused(f"{place}: {dotted((*path, key))} is written twice. Keep one of the two.")
            self.places[(*path, key)] = place
            result[key] = self._plain(value_node, (*path, key), above)
        return result

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind == "timestamp":
            return node.value
        if kind in PLAINLY and not PLAINLY[kind].fullmatch(node.value):
            meant = "true or false" if kind == "bool" else "a plain number"
            found = f"found {shown(node.value)}, which some read as {kind}, others as text"
            raise Refused(f"{where}: {found}; write {meant}, or quote it.")
        try:
            if kind in ("int", "float") and len(node.value) > DIGITS:
                raise ValueError
            value = self._loader.construct_object(node)  # type: ignore[no-untyped-call]
        except (yaml.YAMLError, ValueError, LookupError):
            raise Refused(f"{where}: {shown(node.value)} cannot be read as {kind}; put text in quotes.") from None
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise Refused(f"{where}: found {shown(node.value)}; expected a number of at most 64 bits.")
        if type(value) is float and not math.isfinite(value):
            raise Refused(f"{where}: found {value}; expected a finite number.")
        return _text(value, where) if isinstance(value, str) else value

    def _once(self, node: yaml.Node, where: str) -> None:
        """Refuse aliases that stand for more than a file can hold: a few lines could fill any memory."""
        if id(node) in self._met:
            self._repeated += 1 + len(node.value)
            if self._repeated > REPEATED:
                raise Refused(f"{where}: its aliases (*name) repeat more than {REPEATED:,} characters. Write the values out.")
        self._met.add(id(node))


def _text(text: str, where: str) -> str:
    """A text, if every character of it is one that files and paths can hold."""
    wrong = next((one for one in text if one == "\0" or "\ud800" <= one <= "\udfff"), None)
    if wrong is not None:
        raise Refused(f"{where}: found {shown(text)}, which holds U+{ord(wrong):04X}; expected text without it.")
    return text


def checked_key(word: str, key: str) -> Path_:
    """The path that a `key=value` word names.

    Raises:
        Refused: it is none, or goes deeper than any setting.
    """
    path = tuple(_text(key, "command line").split("."))
    if not all(path) or len(path) > DEEPEST:
        raise Refused(f"command line: found {shown(word)}; expected key=value, such as train.lr=1e-4.")
    return path


def text_of(path: Path) -> str:
    """The text of a settings file.

    Raises:
        Refused: it is too large, or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise Refused(f"{path}: has {size:,} bytes; expected settings, of at most {LARGEST:,}.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}); expected a text file.") from None
