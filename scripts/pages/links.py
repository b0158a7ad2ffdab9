"""Links that hold on GitHub, made to hold on the site: what lies outside docs/ goes to its page here, or becomes plain code."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from scripts.pages.reference import slug

ROOT = Path(__file__).parents[2]
ELSEWHERE: Mapping[str, str] = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docs/notebook.ipynb": "notebook.md",
}
"""What is no Markdown page of docs/ -> its place on the site."""
SHIPPED = "reference/shipped.md"
"""The page with every file of `FOLDERS`."""
FOLDERS = ("recipes", "recipes/methods", "eval", "launch")

FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<picture>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.DOTALL,
)
"""Code in a line, in which nothing is a link, or a link or picture, whose words may be code."""


def shipped() -> dict[str, str]:
    """Recipes, suites and launch files: path in the repository -> text."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).iterdir()) if path.suffix in (".yaml", ".sh"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def links_of(text: str) -> Iterator[tuple[str, str]]:
    """Every link and picture of a page that is no code: (words, target)."""
    for match in LINK.finditer(FENCE.sub("", text)):
        if not match["code"]:
            yield match["words"], match["target"]


def rewritten(text: str, origin: str, uri: str, repository: str | None) -> str:
    """A page of the repository as the site needs it.

    Args:
        origin: the page's path in the repository, such as docs/recipes.md.
        uri: its path on the site, such as recipes.md.
        repository: where the repository is to be seen, if that is known.
    """
    done, at = [], 0
    for block in [*FENCE.finditer(text), None]:
        prose = text[at : block.start() if block else len(text)]
        done.append(LINK.sub(lambda match: match[0] if match["code"] else _link(match, origin, uri, repository), prose))
        if block:
            done.append(block[0])
            at = block.end()
    return "".join(done)


def _link(match: re.Match[str], origin: str, uri: str, repository: str | None) -> str:
    picture, words, target = match["picture"], match["words"], match["target"]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    if path in ELSEWHERE:
        to = ELSEWHERE[path]
    elif path.startswith("docs/"):
        to = path.removeprefix("docs/")
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
