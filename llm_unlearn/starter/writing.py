"""A recipe and its suite as text: each setting with its reason as a comment above it."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm_unlearn.source import Source
from llm_unlearn.spec import shown, to_flow
from llm_unlearn.starter.recommend import DataFacts, Setting
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST

ONLY_MEASURED = ("paraphrase", "perturbed", "keyword")
"""Columns that only a suite reads."""
SECTIONS = ("model", "objective", "train")


def source_settings(source: Source, suite: bool) -> dict[str, Any]:
    """Return the keys of a source that are not as by default; without the columns that only a suite reads, in a recipe."""
    given = {field.name: getattr(source, field.name) for field in fields(source)}  # type: ignore[arg-type]
    default = {field.name: field.default for field in fields(source)}  # type: ignore[arg-type]
    return {
        key: value
        for key, value in given.items()
        if value is not None and value != default[key] and (suite or key not in ONLY_MEASURED)
    }


def recipe_text(
    path: Path, head: Iterable[str], output: str, base: str, sources: Mapping[str, Source], settings: Mapping[str, Setting],
    suite: str,
) -> str:  # fmt: skip
    """Return the text of a recipe that `accelerate launch` takes.

    Args:
        head: comments about the model and the device.
        settings: by their keys, such as `train.lr`.
        suite: its name as the recipe says it.
    """
    lines = [
        f"# Make {shown(base, 80)} forget given rows. Written by `llm-unlearn new`, each setting with its reason.",
        f"#   accelerate launch {shown(str(path), as_it_is=True)} [key=value ...]",
        *_comments(head, ""),
        LAUNCH_FIRST,
        "seed: 0",
        f"output: {to_flow(output)}",
        "",
        "model:",
        f"  base: {to_flow(base)}",
        *_section("model", settings),
        "",
        "data:",
        *(f"  {name}: {to_flow(source_settings(source, suite=False))}" for name, source in sources.items()),
        *_section("data", settings),
        "",
        "objective:",
        *_term("forget", settings["objective.forget.loss"], None),
        *_term("retain", Setting({"name": "kl"}, ""), settings["objective.retain.weight"]),
        "",
        "train:",
        *_section("train", settings),
        "",
        f"evaluation: {to_flow(suite)}",
        LAUNCH_LAST,
    ]
    return "\n".join(lines) + "\n"


def _section(name: str, settings: Mapping[str, Setting]) -> list[str]:
    lines = []
    for key, setting in settings.items():
        section, _, inner = key.partition(".")
        if section == name:
            lines += [*_comments([setting.reason], "  "), f"  {inner}: {to_flow(setting.value)}"]
    return lines


def _term(name: str, loss: Setting, weight: Setting | None) -> list[str]:
    term = {"loss": loss.value} | ({"weight": weight.value} if weight else {})
    return [*_comments([loss.reason, weight.reason if weight else ""], "  "), f"  {name}: {to_flow(term)}"]


def _comments(texts: Iterable[str], indent: str) -> list[str]:
    wrap = textwrap.TextWrapper(width=120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
    return [line for text in texts if text for line in wrap.wrap(" ".join(text.split()))]


def suite_text(path: Path, recipe: Path, sources: Mapping[str, Source], base: str, data: DataFacts, new_tokens: int) -> str:
    """Return the text of a suite that measures the data of a recipe."""
    command = f"llm-unlearn evaluate {_word(str(path))} --model {_word(base)} --adapter {_word(f'runs/{recipe.stem}')}"
    lines = [
        f"# What is left after forgetting by {shown(recipe.name, as_it_is=True)}, on its own rows.",
        f"#   {command}",
        *_comments([RETRAINED], ""),
        "sets:",
        *(f"  {name}: {to_flow(source_settings(source, suite=True))}" for name, source in sources.items()),
        "",
        "measures:",
        "  # What is left of the forget set",
        *_measures("forget", sources["forget"], data),
    ]
    if "holdout" in sources:
        lines.append("  # Whether it can be told that the rows were once seen: 0.5 is no better than guessing")
        for attack in ("loss", "zlib", "min_k", "min_k++"):
            measure = {"name": "membership", "attack": {"name": attack}, "set": "forget", "against": "holdout"}
            lines.append(f"  - {to_flow(measure)}")
    lines += ["  # What is kept", *_measures("retain", sources["retain"], data), "", f"max_new_tokens: {new_tokens}"]
    return "\n".join(lines) + "\n"


RETRAINED = (
    "With a model that was trained in the same way without the forget set, add `retrained: MODEL`: then every number is compared "
    "with one that never saw the rows, and `until: retrained` in train.stop forgets just so far."
)


def _word(text: str) -> str:
    """A word of a command, in one line."""
    return shown(shlex.quote(text), as_it_is=True)


def _measures(name: str, source: Source, data: DataFacts) -> list[str]:
    """The measures of a set that its columns allow."""
    wanted: list[dict[str, Any]] = [{"name": "perplexity"}, {"name": "probability"}]
    asked, wrong = not source.text, bool(source.perturbed)
    if asked:
        wanted.append({"name": "rouge"})
    if name == "forget":
        if wrong and source.paraphrase:
            wanted.append({"name": "truth_ratio", "aggregate": "closer_to_one_better"})
        wanted += [{"name": "exact_memorization"}, {"name": "extraction_strength"}]
        if asked:
            wanted.append({"name": "prefix_extraction", "prefix": 3 if data.answer < 20 else 5})
    elif wrong:
        wanted.append({"name": "multiple_choice"})
    return [f"  - {to_flow({'name': one['name'], 'set': name} | one)}" for one in wanted]
