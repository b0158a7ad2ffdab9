"""What is asked for: which set, how many answers, in which words; and all that can be refused before anything heavy is imported."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from llm_unlearn.options import QUESTION
from llm_unlearn.recipe import Recipe
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, nearest

COLUMN = "alternates"
WRITTEN = "written"
TEMPLATE = """\
Here are a question and an answer to it.

Question: {question}
Answer: {answer}

Write another answer to the same question. Keep the style, the form and about the length of the answer above, but let its facts \
be different: every name, place, date, number or other thing that it tells must be another one, and just as believable. \
Write the new answer and nothing else."""
"""What `--prompt written` asks a model that follows instructions."""


@dataclass(frozen=True)
class Request:
    """What is to be written, and where."""

    recipe: Recipe
    stream: str
    source: Source
    k: int
    temperature: float
    template: str | None  # None asks the question itself
    output: Path
    show_text: bool = False
    """Say what some rows ask and what was written."""


def check(
    recipe: Recipe, *, stream: str, k: int, temperature: float, prompt: str, output: Path, overwrite: bool, show_text: bool = False
) -> Request:  # fmt: skip
    """All that can be refused before anything heavy is imported.

    Raises:
        Refused: an option cannot be used, or the output is there already.
    """
    if stream not in recipe.sources:
        raise Refused(f"--stream: the recipe has no data.{stream}; {nearest(stream, recipe.sources)}")
    source = replace(recipe.sources[stream], alternate=None)
    if source.text:
        raise Refused(
            f"data.{stream}: is running text (column {source.text!r}), which has no question that could have another answer; "
            "expected prompt and answer, or messages."
        )
    if COLUMN in (source.prompt, source.answer, source.messages):
        raise Refused(f"data.{stream}: reads column {COLUMN!r}, the name that the new column gets; rename it in {source.source}.")
    if k < 1:
        raise Refused(f"--k: found {k}; expected at least 1, the number of other answers to each question.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise Refused(f"--temperature: found {temperature}; expected a number above 0, such as 1.0.")
    if output.suffix != ".jsonl":
        raise Refused(f"--output: found {output}; expected a name that ends in .jsonl, as a recipe reads it.")
    if output.is_dir():
        raise Refused(f"--output: {output} is a folder; expected the name of a file.")
    if output.exists() and not overwrite:
        raise Refused(f"--output: {output} exists already. Nothing was changed; add --overwrite, or choose another.")
    if output.is_file() and output.stat().st_size and not _is_own(output):
        raise Refused(f"--output: {output} was not written by this command (no {COLUMN!r} in its first line). Choose another name.")
    return Request(recipe, stream, source, k, temperature, _template(prompt), output, show_text)


def _is_own(path: Path) -> bool:
    """Return whether a file begins with a row that has the column of other answers."""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            row = json.loads(file.readline(1 << 20))
        except (ValueError, RecursionError):
            return False
    return isinstance(row, dict) and COLUMN in row


def _template(prompt: str) -> str | None:
    if prompt in (QUESTION, WRITTEN):
        return TEMPLATE if prompt == WRITTEN else None
    path = Path(os.path.expanduser(prompt))
    if not path.is_file():
        raise Refused(f"--prompt: found {prompt!r}; expected {QUESTION}, {WRITTEN}, or a text file (looked from {Path.cwd()}).")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise Refused(f"--prompt: {prompt} is not UTF-8 text ({error}).") from None
    if lacking := [place for place in ("{question}", "{answer}") if place not in text]:
        raise Refused(f"--prompt: {prompt} does not say {' and '.join(lacking)}, where the row's own text is put; add it.")
    return text


def filled(template: str, question: str, answer: str) -> str:
    """A template with its places filled; what is put in is not looked through for places again."""
    said = {"{question}": question, "{answer}": answer}
    return re.sub(r"\{question\}|\{answer\}", lambda place: said[place[0]], template)
