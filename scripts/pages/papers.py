"""Where each paper is used, read off the code that cites it: the last column of docs/papers.md.

`python -m scripts.pages.papers` writes the column anew, and names the papers that have no line yet.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "papers.md"
ID = re.compile(r"(?<![\w./-])(\d{4}\.\d{5})(?![\w.]*\d)")
ROW = re.compile(r"^\| \[(\d{4}\.\d{5})\]\((\S+)\) \| (.*?) \| (.*?) \|$", re.MULTILINE)

KINDS: Mapping[str, str] = {
    "objectives/": "loss",
    "training/gradients.py": "rule",
    "methods/": "method",
    "evaluation/membership_attacks.py": "membership attack",
    "evaluation/": "measure",
    "attacks/": "attack",
}
"""What the specs of a part of the package are."""


def cited() -> dict[str, list[str]]:
    """arXiv id -> where it is used, in words: losses, rules, measures, attacks, other files; then recipes, suites, benchmarks."""
    found: dict[str, list[str]] = {}
    for folder in ("llm_unlearn", "recipes", "eval", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and "shipped" not in path.parts:
                for paper, place in _places(path):
                    if place not in found.setdefault(paper, []):
                        found[paper].append(place)
    for path in sorted((ROOT / "docs").glob("*.md")):
        for paper in {match[1] for match in ID.finditer(path.read_text(encoding="utf-8"))} if path != PAGE else ():
            if not any("](" not in place for place in found.setdefault(paper, [])):  # the code, where it cites it, says more
                found[paper].append(f"[{path.stem}]({path.name})")
    return found


def _places(path: Path) -> Iterator[tuple[str, str]]:
    """(arXiv id, what cites it) of one file."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    if path.suffix == ".yaml":
        yield from ((match[1], f"`{name}`") for match in ID.finditer(text))
        return
    inside = name.removeprefix("llm_unlearn/")
    kind = next((kind for part, kind in KINDS.items() if inside.startswith(part)), "")
    left = text.splitlines()
    for node in ast.parse(text).body:
        names = _names(node) if kind and isinstance(node, ast.ClassDef) else []
        if names:
            lines = left[node.lineno - 1 : node.end_lineno]
            left[node.lineno - 1 : node.end_lineno] = [""] * len(lines)
            yield from ((match[1], f"{kind} {', '.join(f'`{one}`' for one in names)}") for match in ID.finditer("\n".join(lines)))
    yield from ((match[1], f"`{name}`") for match in ID.finditer("\n".join(left)))


def _names(node: ast.ClassDef) -> list[str]:
    """The values of a spec's `name`, as a recipe or suite writes them."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "name" and isinstance(part.annotation, ast.Subscript):
            return [
                one.value for one in ast.walk(part.annotation.slice) if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
    return []


def written(page: str) -> str:
    """The page with its last column as the code has it."""
    places = cited()
    return ROW.sub(
        lambda row: f"| [{row[1]}]({row[2]}) | {row[3]} | {' · '.join(places.get(row[1], ['nothing cites it']))} |", page
    )


def lacking(page: str) -> list[str]:
    """The papers that are cited and have no line."""
    return sorted(cited().keys() - {row[1] for row in ROW.finditer(page)})


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit("\n".join(f"{one}: has no line in {PAGE.name}" for one in lacking(PAGE.read_text(encoding="utf-8"))) or 0)
