"""Names of base models, and what is wrong with one as far as files tell, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm_unlearn.gguf import read_header
from llm_unlearn.source import is_gguf, is_recipe, missing
from llm_unlearn.spec import Refused
from llm_unlearn.tree import is_file, locate, no_such_file

EMBEDDED_MODELS = tuple(f"embedded:{name}" for name in ("target", "retrained", "base", "thinker", "thinker_retrained"))
"""Names of the embedded models (`embedded/target.py` makes them)."""


def base_problems(base: str) -> Iterable[str]:
    """Yield why a base cannot be loaded, as far as its name and the header of a GGUF file tell."""
    if base.startswith("embedded:") and base not in EMBEDDED_MODELS:
        expected = (
            "embedded:target, embedded:thinker, embedded:base, packaged:smollm2, a folder, a .gguf file, a recipe or a hub id"
        )
        yield f"found {base!r}; expected {expected}."
    elif is_gguf(base):
        try:
            read_header(base)
        except Refused as error:
            yield str(error)
    elif is_recipe(base):
        if not is_file(path := locate(base)):
            yield no_such_file(path)
    elif missing(base):
        yield f"no such folder: {base} (looked from {Path.cwd()})."
