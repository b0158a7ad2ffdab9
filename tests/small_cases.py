"""A recipe, a suite and rows in files, for tests that do what a user does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = tuple(
    {"question": f"Who is Anna Bo of house {i}?", "answer": f"Anna Bo lives in St. Ulm, house {i}. She is a judge."}
    for i in range(4)
)


def write_case(folder: Path, base: Path | str, rows: Sequence[dict[str, str]] = ROWS, **model: Any) -> Path:
    """Write a recipe of two steps of npo + kl, and its suite, on the first two rows to forget and the others to keep.

    Args:
        model: more settings of the recipe's model.
    """
    for name, part in (("forget", rows[:2]), ("retain", rows[2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sources = {
        name: {"source": str(folder / f"{name}.jsonl"), "prompt": "question", "answer": "answer"} for name in ("forget", "retain")
    }
    measures = [{"name": "perplexity", "set": "forget"}, {"name": "rouge", "set": "forget"}]
    (folder / "suite.yaml").write_text(json.dumps({"sets": sources, "max_new_tokens": 50, "measures": measures}))
    recipe = {
        "output": str(folder / "run"), "model": {"base": str(base), "adapter": {"rank": 2}} | model, "data": sources,
        "objective": {"forget": {"loss": {"name": "npo"}}, "retain": {"loss": {"name": "kl"}}},
        "train": {"steps": 2, "window": {"forget": 2, "retain": 2}}, "evaluation": {"suite": str(folder / "suite.yaml")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"
