"""What a setting is: a frozen class of typed fields that refuses what it does not know. Every setting of the project is one.

With the error that all rooms raise for what a user gave, and the fingerprint under which results are kept.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from llm_unlearn.outward import without_secrets

T = TypeVar("T")


def readable(line: str) -> str:
    """A line as a terminal may show it: what it would obey is written out, and of a very long one the middle is left out."""
    if not line.isprintable():
        line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return line if len(line) <= 2000 else f"{line[:1200]} … {line[-600:]}"


def reason(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; with its kind, where the words alone say little."""
    text = shown(" ".join(str(error).split()), 300, as_it_is=True)
    return (
        text if text and isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}".rstrip(": ")
    )


class Refused(ValueError):
    """A setting, file or row that cannot be used. Its text names the place, what was found, what was expected and what to do, one
    line for each; what was found may be of any length and hold anything, and no terminal is to obey it."""

    def __init__(self, text: str) -> None:
        super().__init__("\n".join(map(readable, without_secrets(text).split("\n"))))


class Busy(Exception):
    """Another process is at work where two would undo each other's. Its text says where; nothing was changed, and the same command
    does it later."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a class of typed fields a frozen setting: unknown keys and wrong types are refused, nothing is coerced."""
    config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)
    return cast(type[T], made)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Make a class of typed fields what must stand in a file that a program wrote; what else stands there is passed over."""
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))(cls)
    return cast(type[T], made)


LARGEST, LARGEST_INT = 1e30, 2**63 - 1
"""No setting is beyond these: 1e30, divided by what optimizers divide by, is still a number in float32, in which models compute;
and torch has no whole numbers beyond 2⁶³."""
PositiveInt = Annotated[int, pydantic.Field(gt=0, le=LARGEST_INT)]
NaturalInt = Annotated[int, pydantic.Field(ge=0, le=LARGEST_INT)]
AtLeastTwo = Annotated[int, pydantic.Field(ge=2, le=LARGEST_INT)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, le=LARGEST, allow_inf_nan=False)]
FiniteFloat = Annotated[float, pydantic.Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], pydantic.Field(min_length=1)]
NaturalInts = Annotated[tuple[NaturalInt, ...], pydantic.Field(min_length=1)]
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
Part = Annotated[float, pydantic.Field(gt=0, lt=1)]
"""A share that leaves something on both sides."""
Portion = Annotated[float, pydantic.Field(gt=0, le=1)]
"""A share of something, or all of it."""

at_least_one = pydantic.Field(min_length=1)
"""Marks what may not be empty: `Annotated[tuple[str, ...], at_least_one]`."""

by_name = pydantic.Field(discriminator="name")
"""Marks a union of specs whose `name` says which one is meant: `Annotated[NPO | KL, by_name]`. The union is the registry."""


def shown(found: object, most: int = 200, as_it_is: bool = False) -> str:
    """What was found, as an error shows it: on one line, and not longer than one reads.

    Args:
        as_it_is: it is text of ours, and needs no quotes.
    """
    text = str(found) if as_it_is else repr(found)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def dotted(path: Iterable[str | int]) -> str:
    """A key path as one writes it: `objective.forget.loss`, `measures[2].set`."""
    text = ""
    for part in path:
        name = part if isinstance(part, int) or (len(part) <= 100 and part.isprintable()) else shown(part, 100)
        text += f"[{part}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def nearest(found: object, valid: Iterable[str]) -> str:
    """' Did you mean X? ' when a valid name is near, and always the list of valid names."""
    names = list(valid)
    near = difflib.get_close_matches(str(found)[:200], names, 1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + "Valid: " + ", ".join(names) + "."


def plain(value: object) -> Any:
    """A spec as plain data: what a flattened YAML file says."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def from_json(kind: type[T], text: str, place: str) -> T:
    """A spec from the JSON that `plain` makes.

    Raises:
        Refused: it is none; `place` is where the text stands.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"{place}: {dotted(first['loc']) or 'found'}: {first['msg']}; expected what a run writes there.") from None


def typed(kind: type[T], data: object, place: str, expected: str) -> T:
    """A record from the plain data of a file.

    Raises:
        Refused: it is none; names the first key that is wrong, and `place`, where the data stands.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except (pydantic.ValidationError, ValueError) as error:
        if not isinstance(error, pydantic.ValidationError):
            raise Refused(f"{place}: {reason(error)}; {expected}.") from None
        first = error.errors()[0]
        key = dotted(part for part in first["loc"] if part != "function-after")
        whole = isinstance(first["input"], (dict, list))  # which may hold words of rows
        found = "" if whole else f", found {shown(first['input'])}"
        raise Refused(f"{place}: {key or 'found'}: {first['msg']}{found}; {expected}.") from None


def parts_of(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """A setting and everything that it is made of, each with its keys: specs, tuples and mappings are opened, in their order."""
    yield path, value
    inner: Iterable[tuple[str | int, object]] = ()
    if dataclasses.is_dataclass(value):
        inner = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (tuple, list)):
        inner = enumerate(value)
    for key, one in inner:
        yield from parts_of(one, (*path, key))


def schema(kind: type[object]) -> dict[str, Any]:
    """The JSON Schema of a spec class, for editors."""
    return TypeAdapter(kind).json_schema()


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that stand for the content of plain data, bytes or specs. A key that is null counts as not given:
    an optional setting that a later version adds leaves the runs and tables of earlier ones what they are."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (str, bytes, int, float, bool, type(None), list, tuple, dict)):
            part = plain(part)
        digest.update(part if isinstance(part, bytes) else json.dumps(_given(part), sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _given(part: object) -> object:
    """Plain data without the keys that are null."""
    if isinstance(part, Mapping):
        return {key: _given(value) for key, value in part.items() if value is not None}
    return [_given(one) for one in part] if isinstance(part, (list, tuple)) else part


FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
"""What YAML 1.2 reads as a number, and YAML 1.1, which PyYAML speaks, does not."""


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that our reader would take for a number: a row may have the id 1e5."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def to_flow(value: object) -> str:
    """Plain data as YAML in one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML in the order given, which is read as the same data again."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
