"""Words of the command line as a search space: `key=a,b,c` is a list, `key=low..high` a range, any other word an ordinary setting.

Knows nothing of how points are drawn. A value is YAML text, as it stands in the word that a child process gets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from llm_unlearn import recipe
from llm_unlearn.spec import Refused

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?:@(log)|@step=({NUMBER}))?")
LIKE_A_RANGE = re.compile(r"[-+]?\.?\d[\d.eE+-]*\.\.")
WHOLE = re.compile(r"[-+]?\d+")
SUCH_AS = "expected a list such as 0.05,0.1,0.5, or a range such as 1e-5..1e-3@log, 1..8 or 0..1@step=0.25"
OPENS, CLOSES = "[{(", "]})"


@dataclass(frozen=True)
class Listed:
    """A setting of which every value is named."""

    key: str
    values: tuple[str, ...]

    @property
    def word(self) -> str:
        """The word that says it."""
        return f"{self.key}={','.join(self.values)}"

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are checked before anything runs."""
        return self.values

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    def at(self, place: int) -> str:
        """The value at a place, from 0 on."""
        return self.values[place]


@dataclass(frozen=True)
class Range:
    """A number between two ends, both of them included; whole where both are."""

    key: str
    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def word(self) -> str:
        """The word that says it."""
        more = "@log" if self.log else f"@step={text_of(self.step)}" if self.step is not None else ""
        return f"{self.key}={text_of(self.low)}..{text_of(self.high)}{more}"

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are checked before anything runs."""
        return text_of(self.low), text_of(self.high)

    @property
    def count(self) -> int:
        """How many values there are, where they can be counted; else 0."""
        if self.step is None and (self.log or isinstance(self.low, float)):
            return 0
        if isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float):
            return (self.high - self.low) // (self.step or 1) + 1
        return int((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    def at(self, place: int) -> str:
        """The value at a place, from 0 on, of those that can be counted: there may be billions."""
        return text_of(self.low + place * (self.step or 1))


Dimension = Listed | Range
Point = Mapping[str, str]
"""Key -> the YAML text of its value."""


@dataclass(frozen=True)
class Space:
    """What is tried out: the words in the order in which they were given, as a later one may change what an earlier one made."""

    words: tuple[str | Dimension, ...]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The settings that are searched."""
        return tuple(word for word in self.words if not isinstance(word, str))

    @property
    def listed(self) -> bool:
        """Whether every value of every setting is named by a list."""
        return all(isinstance(one, Listed) for one in self.dimensions)

    @property
    def size(self) -> int | None:
        """How many points there are; None where a range cannot be counted."""
        return prod(one.count for one in self.dimensions) or None

    def points(self) -> Iterable[Point]:
        """Every point of a space that can be counted, the last setting changing first."""
        for place in range(self.size or 0):
            found = {}
            for one in reversed(self.dimensions):
                place, mine = divmod(place, one.count)
                found[one.key] = one.at(mine)
            yield {one.key: found[one.key] for one in self.dimensions}

    def settings(self, point: Point) -> list[str]:
        """The `key=value` words of one point."""
        return [word if isinstance(word, str) else f"{word.key}={point[word.key]}" for word in self.words]


def space_of(words: Sequence[str]) -> Space:
    """The search space of some words.

    Raises:
        Refused: with every word that cannot be read, or where nothing is searched.
    """
    found: list[str | Dimension] = []
    problems: list[str] = []
    for word in words:
        try:
            found.append(_read(word))
        except Refused as error:
            problems.append(str(error))
    space = Space(tuple(found))
    keys = [one.key for one in space.dimensions]
    keys_of_all = [word.partition("=")[0] for word in words]
    problems += [f"command line: {key}: stands there twice; keep one." for key in dict.fromkeys(keys) if keys_of_all.count(key) > 1]
    if not keys and not problems:
        problems.append(f"command line: nothing to search: no key=… has more than one value; {SUCH_AS}.")
    if problems:
        raise Refused("\n".join(problems))
    return space


def _read(word: str) -> str | Dimension:
    """One word."""
    key, equals, value = word.partition("=")
    if not equals:
        return word  # the recipe says what is wrong with it
    if LIKE_A_RANGE.match(value):
        return _range(key, value)
    parts = _split(value)
    if len(parts) == 1:
        return word
    if not all(parts):
        raise Refused(f"command line: {key}: found {value!r}, in which a value is empty; {SUCH_AS}.")
    if twice := [part for part in dict.fromkeys(parts) if parts.count(part) > 1]:
        raise Refused(f"command line: {key}: {twice[0]} stands in the list twice; keep one.")
    return Listed(key, tuple(parts))


def _range(key: str, value: str) -> Range:
    found = RANGE.fullmatch(value)
    if not found:
        raise Refused(f"command line: {key}: found {value!r}; {SUCH_AS}.")
    ends = found[1], found[2], *([found[4]] if found[4] else [])
    kind = int if all(map(WHOLE.fullmatch, ends)) else float
    low, high, *step = map(kind, ends)
    if not low < high:
        raise Refused(f"command line: {key}: found {value!r}; the first end of a range is the lower one, {found[2]}..{found[1]}.")
    if found[3] and low <= 0:
        raise Refused(f"command line: {key}: found {value!r}; a logarithmic range begins above 0.")
    if step and not 0 < step[0] <= high - low:
        raise Refused(f"command line: {key}: found {value!r}; expected a step above 0 that fits into the range.")
    return Range(key, low, high, bool(found[3]), step[0] if step else None)


def _split(value: str) -> list[str]:
    """The parts between commas; one inside brackets, braces or quotes is YAML's own."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in OPENS:
            depth += 1
        elif letter in CLOSES:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def text_of(value: int | float | None) -> str:
    """A number as YAML reads it, without the digits that adding steps leaves."""
    if isinstance(value, float):
        value = float(f"{value:.12g}")
    return repr(value)


MOST_CHECKED = 256
"""So many points of a grid are read before the first run; of a larger space, each value beside the first of every other."""


def checked(path: Path, space: Space, more: Sequence[str]) -> recipe.Recipe:
    """The recipe at the first point, after all values have been tried.

    Args:
        more: words that every run gets besides.

    Raises:
        Refused: a key is unknown or a value does not fit; each problem once.
    """
    first = {one.key: one.ends[0] for one in space.dimensions}
    points: list[Point] = [first]
    if space.size and space.size <= MOST_CHECKED:
        points = list(space.points())
    else:
        points += [{**first, one.key: value} for one in space.dimensions for value in one.ends[1:]]
    problems: list[str] = []
    for point in points:
        try:
            recipe.load(path, [*space.settings(point), *more])
        except Refused as error:
            problems += str(error).splitlines()
    if problems:
        raise Refused("\n".join(dict.fromkeys(problems)))
    return recipe.load(path, [*space.settings(first), *more])
