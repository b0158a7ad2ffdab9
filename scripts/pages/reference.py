"""The reference of recipes and suites: every key with its type, default and meaning, read off the settings themselves.

One section for each spec class, in the order in which a reader of the root meets it. Nothing here knows a key or a class by name,
so that a setting that is added stands on the page with the next build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_unlearn.spec import LARGEST_INT, schema

Schema = Mapping[str, Any]

ARXIV = re.compile(r"(?<![\w/.\[])(\d{4}\.\d{5})(?![\w.]*\d)")
"""An arXiv id that is not part of a link already."""

SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


@dataclass
class Section:
    """One spec class on the page."""

    heading: str
    """Its `name` where it is one of several, else the key that holds it, or the class where there are more such keys."""
    level: int
    spec: Schema
    paths: list[str] = field(default_factory=list)
    """The keys that hold it."""
    names: tuple[str, ...] = ()
    """The values of its `name`, where that says which of several is meant."""


@dataclass
class Group:
    """Settings of which a key takes one, told apart by their `name`."""

    path: str
    members: list[str] = field(default_factory=list)


def page(kind: type[object], title: str, words: str) -> str:
    """The page of one root class, in Markdown.

    Args:
        words: what stands above the first table.
    """
    whole = schema(kind)
    sections = _sections(whole)
    lines = [f"# {title}", "", words, "", *_table(whole, sections)]
    for one in sections.values():
        if isinstance(one, Group):
            members = " · ".join(_link(sections[name]) for name in one.members)
            lines += ["", f"## {one.path}", "", f"One of, by `name`: {members}", ""]
        else:
            lines += ["", f"{'#' * one.level} {one.heading}", "", *_said(one), "", *_table(one.spec, sections)]
    return "\n".join(lines) + "\n"


def _sections(whole: Schema) -> dict[str, Section | Group]:
    """Definition -> its section, and `group PATH` -> the group, in the order of the page."""
    defs, found, taken = whole["$defs"], dict[str, Section | Group](), set[str]()

    def walk(properties: Mapping[str, Schema], above: str) -> None:
        for key, one in properties.items():
            for path, refs, several in _held(one, f"{above}.{key}" if above else key):
                if several and f"group {path}" not in found:
                    found[f"group {path}"] = Group(path, list(refs))
                new = [ref for ref in refs if ref not in found]
                for ref in refs:
                    names = _names(defs[ref]) if several else ()
                    heading = ", ".join(names) or path
                    if ref in new:
                        heading = f"{heading} ({path})" if slug(heading) in taken else heading
                        taken.add(slug(heading))
                        found[ref] = Section(heading, 3 if several else 2, defs[ref], [], names)
                    section = found[ref]
                    assert isinstance(section, Section)
                    section.paths.append(path)
                for ref in new:
                    walk(defs[ref]["properties"], path)

    walk(whole["properties"], "")
    for section in found.values():
        if isinstance(section, Section) and not section.names and len(set(section.paths)) > 1:
            section.heading = section.spec["title"]  # it belongs to no one key
    return found


def _held(one: Schema, path: str) -> Iterator[tuple[str, list[str], bool]]:
    """The definitions that a key holds: (path of what holds them, definitions, whether a `name` tells them apart)."""
    if "$ref" in one:
        yield path, [_name_of(one["$ref"])], False
    elif "oneOf" in one:
        yield path, [_name_of(part["$ref"]) for part in one["oneOf"]], True
    for part in one.get("anyOf", ()):
        yield from _held(part, path)
    if isinstance(items := one.get("items"), Mapping):
        yield from _held(items, f"{path}[]")
    for part in one.get("prefixItems", ()):
        yield from _held(part, f"{path}[]")
    if isinstance(values := one.get("additionalProperties"), Mapping):
        yield from _held(values, f"{path}.NAME")


def _name_of(ref: str) -> str:
    return ref.rpartition("/")[2]


def _names(spec: Schema) -> tuple[str, ...]:
    """What its `name` may be."""
    name = spec["properties"].get("name", {})
    return tuple(name.get("enum", ())) or ((name["const"],) if "const" in name else ())


def _said(section: Section) -> Iterable[str]:
    """Its docstring, and the keys that hold it."""
    yield prose(section.spec.get("description", ""))
    where = ", ".join(f"`{path}`" for path in dict.fromkeys(section.paths))
    if not section.names and section.paths != [section.heading]:
        yield from ("", f"Stands at {where}.")


def _table(spec: Schema, sections: Mapping[str, Section | Group]) -> Iterable[str]:
    """A row for each key."""
    required = spec.get("required", ())
    if not spec.get("properties"):
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, one in spec["properties"].items():
        default = "**required**" if key in required or "default" not in one else f"`{_cell(json.dumps(_short(one['default'])))}`"
        if "default" not in one and key not in required:
            default = ""  # made by a factory: empty
        yield f"| `{key}` | {_cell(_type(one, sections))} | {default} | {_cell(prose(one.get('description', '')))} |"


def _short(value: object) -> object:
    """A default that is a whole section is said by its own table; one of several settings is said with its name."""
    return {} if isinstance(value, Mapping) and "name" not in value else value


def _type(one: Schema, sections: Mapping[str, Section | Group]) -> str:
    """A type as one reads it, with links to the sections of specs."""
    if "$ref" in one:
        return _link(sections[_name_of(one["$ref"])])
    if "oneOf" in one:
        return next(
            f"[one of {len(group.members)}](#{slug(group.path)})"
            for group in sections.values()
            if isinstance(group, Group) and group.members == [_name_of(part["$ref"]) for part in one["oneOf"]]
        )
    if "anyOf" in one:
        types = list(dict.fromkeys(_type(part, sections) for part in one["anyOf"]))
        return " or ".join(name for name in types if not (name == "integer" and "number" in types))
    if "const" in one:
        return f"`{one['const']}`"
    if "enum" in one:
        return " | ".join(f"`{value}`" for value in one["enum"])
    match one.get("type"):
        case "array":
            inner = one.get("items") or {"anyOf": one.get("prefixItems", [])}
            return f"list of {_inner(inner, sections)}" + (", not empty" if one.get("minItems") else "")
        case "object":
            inner = one.get("additionalProperties")
            return f"mapping to {_inner(inner, sections)}" if isinstance(inner, Mapping) else "mapping"
        case "integer" | "number" as number:
            told = {key: sign for key, sign in SIGNS.items() if key in one and abs(one[key]) < LARGEST_INT}  # those bound all
            bounds = " and ".join(f"{sign} {one[key]:g}" for key, sign in told.items())
            return f"{number} {bounds}".strip()
    return str(one.get("type", "anything"))


def _inner(one: Schema, sections: Mapping[str, Section | Group]) -> str:
    """A type that stands within another."""
    inner = _type(one, sections)
    return f"({inner})" if " or " in inner else inner


def _link(section: Section | Group) -> str:
    assert isinstance(section, Section)
    return f"[{section.heading}](#{slug(section.heading)})"


def _cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def prose(text: str) -> str:
    """A docstring in Markdown: lines of a paragraph joined, arXiv ids linked, what would be markup there as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("\r", ""))
    plain = [part if i % 2 else _linked(re.sub(r"([*_<])", r"\\\1", part)) for i, part in enumerate(parts)]
    return "\n\n".join(" ".join(block.split()) for block in "".join(plain).split("\n\n"))


def _linked(text: str) -> str:
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site (pymdownx.slugs) make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
