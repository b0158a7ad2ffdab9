"""A YAML file as a tree that knows the line of every key, and the typed value that is built from it, or one error that says
what to change.

The only place that merges `extends` and applies `key=value` words. It knows no recipe and no suite, only files,
trees and types.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import TypeAdapter

from llm_unlearn.lines import Lines, Path_, checked_key, text_of
from llm_unlearn.spec import Refused, dotted, nearest, shown

T = TypeVar("T")


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


def _read(path: Path) -> Tree:
    """One YAML file as it stands, without what it extends.

    Raises:
        Refused: the file is missing, is not UTF-8 text, is not one YAML mapping, or opens with `launch:` but is not the
            Python program that `accelerate launch` needs.
    """
    if not is_file(path):
        raise Refused(no_such_file(path))
    text = text_of(path)
    lines = Lines(text, str(path))
    data = lines.data
    if not isinstance(data, dict):
        raise Refused(f"{path}: found no settings; expected YAML such as `seed: 0`, one key on a line.")
    if "launch" in data:
        _check_launch_line(path, text)
        del data["launch"]
    return Tree(data, str(path), lines.places)


def is_file(path: Path) -> bool:
    """Whether a settings file is there; also of what no file can be named."""
    return os.path.isfile(path)


def no_such_file(path: Path) -> str:
    """What to say of a settings file that is not there, with the nearest name beside it."""
    if os.path.lexists(path):
        kind = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no ordinary file"
        return f"{path}: is {kind}; expected a settings file in YAML."
    beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, beside, 1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    return f"{shown(str(path), as_it_is=True)}: no such file (looked from {Path.cwd()}).{hint}"


LAUNCH_FIRST = 'launch: r"""'
LAUNCH_LAST = '# """; from llm_unlearn import launch; launch(__file__)'


def _check_launch_line(path: Path, text: str) -> None:
    """Refuse a file that opens like a launchable recipe but that Python could not run; parses, never executes."""
    expected = f"Expected the first key `{LAUNCH_FIRST}` and the last line `{LAUNCH_LAST}`, and no other triple quotes."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about text that is YAML
            body = ast.parse(text, str(path)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)
        why = shown(error.args[0] if error.args else "too deep", as_it_is=True)
        raise Refused(f"{place}: `accelerate launch` could not run this file ({why}). {expected}") from None
    match body:
        case [ast.AnnAssign(target=ast.Name(id="launch"), annotation=ast.Constant(value=str()), value=None), *rest]:
            runs = [ast.unparse(statement) for statement in rest]
        case _:
            runs = []
    if runs != LAUNCH_LAST.removeprefix('# """; ').split("; ") or LAUNCH_FIRST not in text.splitlines():
        raise Refused(f"{path}: the text between the two launch lines would be run as Python. {expected}")


SHAPES = {"prompt", "answer", "messages", "text"}
"""Keys that name the columns of rows; a source that brings its own keeps none of those that it replaces."""


def _merge(below: Any, above: Any) -> Any:
    """Lay `above` over `below`: mappings key by key, anything else replaced. A mapping of another `name`, or one that names other
    columns, is another thing and replaced whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        return above
    if "source" in above and (shape := SHAPES & above.keys()) and shape != SHAPES & below.keys():
        return above
    return {key: _merge(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}


def _override(tree: Tree, overrides: Iterable[str]) -> Tree:
    """Lay `train.lr=1e-4`-like words over the tree; the value is YAML."""
    data, places = tree.data, dict(tree.places)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise Refused(f"command line: found {shown(word)}; expected key=value, such as train.lr=1e-4.")
        path = checked_key(word, key)
        above = _value(value, key)
        places = {p: place for p, place in places.items() if p[: len(path)] != path} | {path: "command line"}
        for end in range(1, len(path)):  # sections that this word makes, or puts in the place of a value
            if not isinstance(_at(data, path[:end]), dict):
                places[path[:end]] = "command line"
        for part in reversed(path):
            above = {part: above}
        data = _merge(data, above)
    return replace(tree, data=data, places=places)


def _value(text: str, key: str) -> Any:
    """The value of a `key=value` word."""
    try:
        return Lines(text, "command line", numbered=False).data
    except Refused as error:
        reason = str(error).removeprefix("command line: ").removeprefix("the whole: ").removeprefix("not valid YAML. ")
        reason = shown(reason, 400, as_it_is=True)
        raise Refused(f"command line: {shown(key, as_it_is=True)}: {shown(text)} is not valid YAML ({reason}).") from None


def read_tree(path: Path, overrides: Iterable[str] = ()) -> Tree:
    """The settings of one file: what it `extends` (at most one other file, beside it), itself, then the overrides."""
    tree = _read(path)
    if "extends" in tree.data:
        named = tree.data["extends"]
        if not isinstance(named, str):
            raise Refused(f"{tree.place(('extends',))}: extends: found {shown(named)}; expected the name of one other file.")
        if not is_file(path.parent / named):
            raise Refused(f"{tree.place(('extends',))}: extends: {no_such_file(path.parent / named)}")
        below = _read(path.parent / named)
        if "extends" in below.data:
            raise Refused(
                f"{below.place(('extends',))}: extends: {path} extends this file already; a file may extend one other, not a chain."
            )
        above = {key: value for key, value in tree.data.items() if key != "extends"}
        tree = Tree(_merge(below.data, above), tree.file, {**below.places, **tree.places})
    return _override(tree, overrides)


def locate(name: str, beside: Path | None = None) -> Path:
    """A settings file by its path from here, else from the folder of the file that names it, else one shipped with the project."""
    candidates = [
        Path(name),
        *([beside.parent / name, beside.parent.parent / name] if beside else []),
        shipped() / name,
    ]
    return next((path for path in candidates if is_file(path)), Path(name))


def shipped() -> Path:
    """Where `recipes/`, `eval/` and `launch/` are: inside the installed package, or the checkout around it."""
    package = Path(__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


# ------------------------------------------------------------------------------------------------ types

ABOUT_A_KEY = (
    "unexpected_keyword_argument",
    "extra_forbidden",
    "missing",
    "missing_argument",
    "missing_keyword_only_argument",
)


def _loc_to_path(loc: Path_, data: Any, about_a_key: bool) -> Path_:
    """pydantic's location without the union tags and type labels it inserts, which nobody wrote in the file."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            path.append(part)
            data = data[part]
        elif isinstance(data, dict) and i == len(loc) - 1 and about_a_key:
            path.append(part)
    return tuple(path)


def _at(data: Any, path: Path_) -> Any:
    """The value at a path, None where nothing is."""
    for part in path:
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int))
        data = data[part] if inside else None
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
        data = _at(data, (part,))
    return here


def _explain(errors: list[Any], tree: Tree, path: Path_, schema: dict[str, Any]) -> str:
    """pydantic's errors about one key as one line: place, key, what was found, what was expected."""
    error = errors[0]
    where, key, found = tree.place(path), dotted(path) or "the whole", shown(_at(tree.data, path))
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
            return f"{where}: {key}.name: found {shown(error['ctx']['tag'])}; {nearest(error['ctx']['tag'], tags)}"
        case "union_tag_not_found":
            return f"{where}: {key}.name: missing; expected a mapping such as {{name: …}}, found {found}."
        case "literal_error" if len(errors) == 1:
            options = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"{where}: {key}: found {found}; {nearest(_at(tree.data, path), options)}"
        case _:
            messages = [one["msg"].removeprefix("Input should be ").removeprefix("Value error, ").rstrip(".") for one in errors]
            messages = [re.sub(r"\b10{6,}\b", lambda found: f"1e{len(found[0]) - 1}", text) for text in messages]
            return f"{where}: {key}: found {found}; expected {', or '.join(dict.fromkeys(messages))}."


@functools.cache
def _schema_of(kind: type[object]) -> dict[str, Any]:
    """The JSON schema of a type, of which there are few, and each takes longer than all else that is said of a wrong key."""
    return TypeAdapter(kind).json_schema()


def _foreign(tree: Tree, schema: dict[str, Any]) -> str:
    """Return the error for a file without any known key, and "" where there is none: it is no settings file, and may hold
    secrets, so its keys are not quoted."""
    keys: dict[str, set[str]] = {}
    for path, place in tree.places.items():
        if path and place != "command line":
            keys.setdefault(place.rpartition(":")[0] or place, set()).add(str(path[0]))
    valid = schema.get("properties", {})
    for file, names in keys.items():
        if not names & valid.keys():
            count = f"none of its {len(names)} keys is" if len(names) > 1 else "its only key is not"
            return f"{file}: {count} a setting here; expected some of: {', '.join(valid)}."
    return ""


SAID = 50
"""So many wrong keys are said one by one."""


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
        schema = _schema_of(kind)  # type: ignore[arg-type]
        by_path: dict[Path_, list[Any]] = {}
        for one in error.errors(include_url=False):
            by_path.setdefault(_loc_to_path(one["loc"], tree.data, one["type"] in ABOUT_A_KEY), []).append(one)
        if foreign := _foreign(tree, schema):
            raise Refused(foreign) from None
        said = [_explain(found, tree, path, schema) for path, found in list(by_path.items())[:SAID]]
        more = [f"{tree.file}: and {len(by_path) - SAID} more."] if len(by_path) > SAID else []
        raise Refused("\n".join([*said, *more])) from None
