"""What mkdocs does beside rendering: it adds the generated pages, mends links out of docs/, and refuses a site that would fetch
anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.recipe import Recipe
from scripts.pages import commands, links, notebook, reference

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc\s*=\s*["']?(?:https?:)?//[^"'>\s]+"""
    r"""|<link\b(?=[^>]*\brel\s*=\s*["']?(?:stylesheet|preload|preconnect|prefetch|dns-prefetch|modulepreload|icon))"""
    r"""[^>]*\bhref\s*=\s*["']?(?:https?:)?//[^"'>\s]+"""
    r"""|url\(\s*["']?(?:https?:)?//[^)]+|@import\s+["'](?:https?:)?//[^"']+|class="mermaid\"""",
    re.IGNORECASE,
)
"""What a browser would fetch from elsewhere as it shows a page. (Mermaid's diagrams are drawn by a script from elsewhere.)"""


def generated() -> Mapping[str, str]:
    """Path on the site -> text of the pages that are made from the code and from files of the root."""
    said = (
        "Every key, read off the settings themselves; `llm-unlearn schema{}` prints the same as a JSON Schema, for editors. "
        "How to write one: [{}]({})."
    )
    pages = {
        "reference/recipe.md": reference.page(Recipe, "Recipe reference", said.format("", "Recipes", "../recipes.md")),
        "reference/suite.md": reference.page(Suite, "Suite reference", said.format(" suite", "Evaluation", "../evaluation.md")),
        "reference/commands.md": commands.page(),
        links.SHIPPED: "# Recipes, suites and launch files\n\nAs they are shipped.\n\n"
        + "\n".join(f"## {path}\n\n````yaml\n{text.rstrip()}\n````\n" for path, text in links.shipped().items()),
    }
    texts = {name: (links.ROOT / name).read_text(encoding="utf-8") for name in links.ELSEWHERE}
    return pages | {
        uri: notebook.page(texts[name]) if name.endswith(".ipynb") else texts[name] for name, uri in links.ELSEWHERE.items()
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, text in generated().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    origin = next((name for name, place in links.ELSEWHERE.items() if place == uri), f"docs/{uri}")
    repository = config.extra.get("repository")  # the theme's own repo_url lets every reader's browser ask that host for stars
    return links.rewritten(markdown, origin, uri, repository)


def on_post_build(config: MkDocsConfig) -> None:
    if found := list(fetched(Path(config.site_dir))):
        raise PluginError("the site would fetch from elsewhere: " + "; ".join(found[:5]))


def fetched(site: Path) -> Iterator[str]:
    """What the pages and styles of a built site would fetch from elsewhere: file, and what it says."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in FETCHED.finditer(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site)}: {match[0][:120]}"
