"""Words in Markdown: names and settings that somebody else chose become text, and never markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence


def marked(text: object) -> str:
    """Text on one line in which nothing is markup: neither Markdown nor HTML, nor a link that viewers make by themselves."""
    line = " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    line = re.sub(r"(?<=\w)(\\_)(?=\w)", "_", line)  # within a word it marks nothing
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
    return re.sub(r"^([-+=!:]|\d+[.)])", lambda found: f"{found[1][:-1]}\\{found[1][-1]}", line)


def code(text: object) -> str:
    """Text as code on one line, in as many backticks as it needs."""
    line = " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}" if line else ""


def fenced(language: str, text: str) -> str:
    """Lines of code in a fence longer than any in them."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def quoted(text: object) -> str:
    """A name as a string of Python."""
    return json.dumps(str(text))


def listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {one}" for one in lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of Markdown, the first of them the head."""
    head, *rest = rows
    line = "|" + "|".join(" --- " for _ in head) + "|"
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            line,
            *("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row) + " |" for row in rest),
        ]
    )


def papers(text: str) -> str:
    """A definition of ours with a link for each arXiv number in it."""
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", marked(text))
