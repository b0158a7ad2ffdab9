"""How a YAML file becomes one frozen, typed tree, or one error that says what to change.

Every setting of the project is a field of a `@spec` class. This is the only place that reads YAML, merges `extends`, applies
`key=value` overrides and talks to pydantic; it knows no recipe and no suite, only files, trees and types.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
Path_ = tuple[str | int, ...]


class Refused(ValueError):
    """A setting, file or row that cannot be used. Its text names the place, what was found, what was expected and what to do."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a class of typed fields a frozen setting: unknown keys and wrong types are refused, nothing is coerced."""
    config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    return pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)


PositiveInt = Annotated[int, pydantic.Field(gt=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]

by_name = pydantic.Field(discriminator="name")
"""Marks a union of specs whose `name` says which one is meant: `Annotated[NPO | KL, by_name]`. The union is the registry."""


# ------------------------------------------------------------------------------------------------ YAML


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2: `1e-5` is a float, as everybody expects, not a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Tree:
    """A settings file as plain data, with the place where each key was written."""

    data: dict[str, Any]
    file: str
    places: dict[Path_, str] = field(default_factory=dict)

    def place(self, path: Path_) -> str:
        """The file and line (or "command line") of a key, or of the nearest key above it that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.file)


def _plain(loader: _Yaml, node: yaml.Node, file: str, path: Path_, places: dict[Path_, str]) -> Any:
    """A YAML node as plain data; records the line of every key and refuses a key that is written twice."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, file, (*path, i), places) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))  # type: ignore[no-untyped-call]
        place = f"{file}:{key_node.start_mark.line + 1}"
        if key in result:
            raise Refused(f"{place}: {dotted((*path, key))} is written twice. Keep one of the two.")
        places[(*path, key)] = place
        result[key] = _plain(loader, value_node, file, (*path, key), places)
    return result


def _read(path: Path) -> Tree:
    """One YAML file as it stands, without what it extends.

    Raises:
        Refused: the file is missing, is not UTF-8 text, is not one YAML mapping, or opens with `launch:` but is not the
            Python program that `accelerate launch` needs.
    """
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise Refused(f"{path}: no such file (looked from {Path.cwd()}).{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Yaml(text)
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}).") from None
    except yaml.YAMLError as error:
        raise Refused(f"{path}: not valid YAML. {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise Refused(f"{path}: found no settings; expected YAML such as `seed: 0`, one key on a line.")
    places: dict[Path_, str] = {}
    data = _plain(loader, node, str(path), (), places)
    if "launch" in data:
        _check_launch_line(path, text)
        del data["launch"]
    return Tree(data, str(path), places)


LAUNCH_FIRST = 'launch: r"""'
LAUNCH_LAST = '# """; from llm_unlearn import launch; launch(__file__)'


def _check_launch_line(path: Path, text: str) -> None:
    """Refuse a file that opens like a launchable recipe but that Python could not run; parses, never executes."""
    expected = f"Expected the first key `{LAUNCH_FIRST}` and the last line `{LAUNCH_LAST}`, and no other triple quotes."
    try:
        body = ast.parse(text, str(path)).body
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise Refused(f"{path}:{line}: `accelerate launch` could not run this file ({error.args[0]}). {expected}") from None
    if [ast.unparse(statement) for statement in body[1:]] != LAUNCH_LAST.removeprefix('# """; ').split("; "):
        raise Refused(f"{path}: the text between the two launch lines would be run as Python. {expected}")


def _merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key, anything else replaced; another `name` is another thing, replaced whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        return above
    return {key: _merge(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}


def _override(tree: Tree, overrides: Iterable[str]) -> Tree:
    """Lay `train.lr=1e-4`-like words over the tree; the value is YAML."""
    data, places = tree.data, dict(tree.places)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise Refused(f"command line: found {word!r}; expected key=value, such as train.lr=1e-4.")
        try:
            above: Any = yaml.load(value, _Yaml)
        except yaml.YAMLError as error:
            raise Refused(f"command line: {key}: {value!r} is not valid YAML ({' '.join(str(error).split())}).") from None
        path = tuple(key.split("."))
        places = {p: place for p, place in places.items() if p[: len(path)] != path} | {path: "command line"}
        for part in reversed(path):
            above = {part: above}
        data = _merge(data, above)
    return replace(tree, data=data, places=places)


def read_tree(path: Path, overrides: Iterable[str] = ()) -> Tree:
    """The settings of one file: what it `extends` (at most one other file, beside it), itself, then the overrides."""
    tree = _read(path)
    if "extends" in tree.data:
        named = tree.data["extends"]
        if not isinstance(named, str):
            raise Refused(f"{tree.place(('extends',))}: extends: found {named!r}; expected the name of one other file.")
        below = _read(path.parent / named)
        if "extends" in below.data:
            raise Refused(f"{below.file}: extends: {path} extends it already; a file may extend one other, not a chain.")
        above = {key: value for key, value in tree.data.items() if key != "extends"}
        tree = Tree(_merge(below.data, above), tree.file, {**below.places, **tree.places})
    return _override(tree, overrides)


# ------------------------------------------------------------------------------------------------ types


def dotted(path: Iterable[str | int]) -> str:
    """A key path as one writes it: `objective.forget.loss`, `measures[2].set`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(found: object, valid: Iterable[str]) -> str:
    """' Did you mean X? ' when a valid name is near, and always the list of valid names."""
    names = list(valid)
    near = difflib.get_close_matches(str(found), names, 1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + "Valid: " + ", ".join(names) + "."


def _loc_to_path(loc: Path_, data: Any) -> Path_:
    """pydantic's location without the union tags and type labels it inserts, which nobody wrote in the file."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            path.append(part)
            data = data[part]
        elif isinstance(data, dict) and i == len(loc) - 1 and part != data.get("name"):
            path.append(part)
    return tuple(path)


def _at(data: Any, path: Path_) -> Any:
    for part in path:
        data = data[part] if not isinstance(data, dict) or part in data else None
    return data


def _schema_at(schema: dict[str, Any], path: Path_, data: Any) -> dict[str, Any]:
    """The JSON schema of the mapping at `path`: follows references, optional values and `name`-tagged unions."""
    definitions = schema.get("$defs", {})
    here = schema
    for part in (*path, None):
        while "properties" not in here and "additionalProperties" not in here and "items" not in here:
            if "$ref" in here:
                here = definitions[here["$ref"].rpartition("/")[2]]
            elif "discriminator" in here:
                tag = data.get("name") if isinstance(data, dict) else None
                here = {"$ref": here["discriminator"]["mapping"].get(tag, "")}
                if not here["$ref"]:
                    return {}
            elif "anyOf" in here:
                here = next((option for option in here["anyOf"] if option.get("type") != "null"), {})
            else:
                return here
        if part is None:
            return here
        if "properties" in here and part in here["properties"]:
            here = here["properties"][part]
        elif isinstance(part, int):
            here = here.get("items", {})
        else:
            extra = here.get("additionalProperties")
            here = extra if isinstance(extra, dict) else {}
        data = data[part] if isinstance(data, (dict, list)) and (isinstance(part, int) or part in data) else None
    return here


def _explain(error: Any, tree: Tree, schema: dict[str, Any]) -> str:
    """One pydantic error as one line: place, key, what was found, what was expected."""
    path = _loc_to_path(error["loc"], tree.data)
    where, key, found = tree.place(path), dotted(path), _at(tree.data, path)
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            names = _schema_at(schema, path[:-1], tree.data).get("properties", {})
            return f"{where}: {key}: unknown key; {nearest(path[-1], names)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            about = _schema_at(schema, path[:-1], tree.data).get("properties", {}).get(path[-1], {})
            text = f" ({about['description'].split(chr(10))[0].rstrip('.')})" if "description" in about else ""
            return f"{where}: {key}: missing; expected a value{text}."
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
            where = tree.place((*path, "name"))
            return f"{where}: {key}.name: found {error['ctx']['tag']!r}; {nearest(error['ctx']['tag'], tags)}"
        case "union_tag_not_found":
            return f"{where}: {key}.name: missing; expected a mapping such as {{name: …}}, found {found!r}."
        case "literal_error":
            options = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"{where}: {key}: found {found!r}; {nearest(found, options)}"
        case _:
            message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ").rstrip(".")
            return f"{where}: {key}: found {found!r}; expected {message}."


def build(kind: type[T], tree: Tree) -> T:
    """The typed value of a tree.

    Raises:
        Refused: one line per wrong key, each with its place, the full key path, what was found and what was expected.
    """
    adapter = TypeAdapter(kind)
    try:
        # JSON mode is pydantic's way to be strict about scalars and still accept lists as tuples and mappings as classes.
        return adapter.validate_json(json.dumps(tree.data, default=str), strict=True)
    except pydantic.ValidationError as error:
        schema = adapter.json_schema()
        lines = dict.fromkeys(_explain(one, tree, schema) for one in error.errors(include_url=False))
        raise Refused("\n".join(lines)) from None


def plain(value: object) -> Any:
    """A spec as plain data: what a flattened YAML file says."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def schema(kind: type[object]) -> dict[str, Any]:
    """The JSON Schema of a spec class, for editors."""
    return TypeAdapter(kind).json_schema()


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that stand for the content of plain data, bytes or specs."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (str, bytes, int, float, bool, type(None), list, tuple, dict)):
            part = plain(part)
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML in the order given."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)
