"""Links that hold on GitHub, made to hold on the site: what lies outside docs/ goes to its page here, or becomes plain code."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from scripts.pages.reference import slug

ROOT = Path(__file__).parents[2]
ROOT_PAGES: Mapping[str, str] = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Pages that stand in the root of the repository -> their place on the site."""
SHIPPED = "reference/shipped.md"
"""The page with every file of `FOLDERS`."""
FOLDERS = ("recipes", "recipes/methods", "eval", "launch")

FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def shipped() -> dict[str, str]:
    """Recipes, suites and launch files: path in the repository -> text."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).iterdir()) if path.suffix in (".yaml", ".sh"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def outside_code(text: str) -> list[tuple[str, bool]]:
    """The text in pieces: (piece, whether it is code, in a block or in a line)."""
    pieces: list[tuple[str, bool]] = []
    for block, fenced in _cut(text, FENCE):
        pieces += [(block, True)] if fenced else _cut(block, CODE)
    return pieces


def _cut(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for match in pattern.finditer(text):
        pieces += [(text[at : match.start()], False), (match[0], True)]
        at = match.end()
    return [*pieces, (text[at:], False)]


def links_of(text: str) -> Iterator[tuple[str, str]]:
    """Every link and picture of a page that is no code: (words, target)."""
    for match in LINK.finditer(_without_code(text)):
        yield match[2], match[3]


def _without_code(text: str) -> str:
    """The page with code in lines kept (a link's words may be code) and blocks taken out."""
    return FENCE.sub("", text)


def rewritten(text: str, origin: str, uri: str, repository: str | None) -> str:
    """A page of the repository as the site needs it.

    Args:
        origin: the page's path in the repository, such as docs/recipes.md.
        uri: its path on the site, such as recipes.md.
        repository: where the repository is to be seen, if that is known.
    """
    link: Callable[[re.Match[str]], str] = lambda match: _link(match, origin, uri, repository)  # noqa: E731
    return "".join(block if fenced else LINK.sub(link, block) for block, fenced in _cut(text, FENCE))


def _link(match: re.Match[str], origin: str, uri: str, repository: str | None) -> str:
    picture, words, target = match[1], match[2], match[3]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    if path.startswith("docs/"):
        to = path.removeprefix("docs/")
    elif path in ROOT_PAGES:
        to = ROOT_PAGES[path]
    elif path == "README.md":
        to = "index.md"
    elif path in shipped():
        to, anchor = SHIPPED, slug(path)
    elif repository:
        return f"{picture}[{words}]({repository.rstrip('/')}/blob/main/{path})"
    else:
        return words if "`" in words else f"`{words}`"
    to = posixpath.relpath(to, posixpath.dirname(uri) or ".")
    return f"{picture}[{words}]({to}{'#' if anchor else ''}{anchor})"
