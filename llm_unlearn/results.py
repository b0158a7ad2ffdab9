"""What a run or an evaluation says, and where it says it: the terminal, the run folder, the page."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import folder as run_folder
from llm_unlearn.attacks.robustness import robustness_of
from llm_unlearn.bases import describe_base
from llm_unlearn.evaluation.aggregates import aggregates
from llm_unlearn.evaluation.numbers import answers, curves, numbers
from llm_unlearn.evaluation.rows import records
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.evaluation.tasks import task_numbers
from llm_unlearn.hub.fetching import on_hub
from llm_unlearn.look import COLUMNS, Seen
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.columns import write_columns
from llm_unlearn.sections import Evaluation
from llm_unlearn.spec import fingerprint, plain, to_yaml
from llm_unlearn.thresholds import findings
from llm_unlearn.training.guard import Outcome

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("llm-unlearn", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def results_of(
    suite: Suite,
    seen: Mapping[str, Seen],
    attacks: list[dict[str, Any]],
    *,
    title: str,
    named: Evaluation,
    run: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that `evaluation.json` says.

    Args:
        named: the suite's name, what must hold of its numbers, and whether texts are kept.
    """
    columns = [column for column in COLUMNS if column in seen]
    models = {column: seen[column].tables for column in columns}
    found = numbers(suite, models) + task_numbers(suite.tasks, {column: seen[column].answered for column in columns})
    found += aggregates(suite.aggregates, found, columns)
    return {
        "format": 1,
        "title": title,
        "suite": named.suite,
        "suite_hash": fingerprint(suite),
        "suite_settings": plain(suite),  # so that `compare` can say in what two suites differ
        "hub": on_hub(plain(suite)),
        "run": run,
        "models": {column: {"name": seen[column].name, "identity": seen[column].target.identity} for column in columns},
        "numbers": found,
        "thresholds": findings(named.thresholds or (), found),
        "attacks": attacks,
        "robustness": robustness_of(attacks, found),
        "curves": curves(suite, models),
        "answers": {} if named.texts is False else answers(models),
        **({"texts": False} if named.texts is False else {}),
    }


TEXTS = ("prompt", "truth", "written", "samples")
"""Columns of `evaluation.parquet` in which words of rows stand."""


def rows_of(suite: Suite, seen: Mapping[str, Seen]) -> list[dict[str, Any]]:
    """Everything that `evaluation.parquet` says."""
    answered = {column: one.answered for column, one in seen.items()}
    return records(suite, {column: one.tables for column, one in seen.items()}, answered)


def run_facts(recipe: Recipe, outcome: Outcome, accelerator: Accelerator, began: float, weights: int) -> dict[str, Any]:
    """How the run went and what it ran on."""
    return {
        "recipe_hash": recipe.hash,
        "seed": recipe.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "broken": outcome.broken,
        "steps": outcome.step,
        "kept_step": outcome.kept,
        "seconds": round(time.perf_counter() - began, 1),
        "trainable": weights,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "base": describe_base(recipe.model.base),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def flattened(recipe: Recipe) -> str:
    """The recipe as it was run, every default written out; it can be run again."""
    ran_under, settings = ", ".join(f"{name} {number}" for name, number in versions().items()), plain(recipe)
    hub = f"{run_folder.OF_HUB}{json.dumps(on_hub(settings))}"
    return f"{run_folder.FIRST}{recipe.hash}\n# {ran_under}\n{hub}\n{to_yaml(settings)}"


def publish(
    results: Mapping[str, Any], suite: Suite, seen: Mapping[str, Seen], folder: Path | None, log: Path | None = None,
    show: bool = True,
) -> None:  # fmt: skip
    """The terminal table, where it is to be shown, and in a folder what is kept."""
    from llm_unlearn.report.terminal import print_table

    if folder:
        keep(results, suite, seen, folder, log)
    if show:
        print_table(results)
    if folder and show:
        print(f"\n{folder / run_folder.REPORT}")


def keep(results: Mapping[str, Any], suite: Suite, seen: Mapping[str, Seen], folder: Path, log: Path | None) -> None:
    """Write the values of every row, the page, then the JSON file, which says that all are there."""
    rows = rows_of(suite, seen)
    if results.get("texts") is False:
        rows = [{name: value for name, value in row.items() if name not in TEXTS} for row in rows]
    write_columns(rows, folder / run_folder.ROWS)
    _write(results, folder, log)


def without_texts(folder: Path) -> None:
    """Take every question and answer out of a run folder: from the page, the values by row, and the numbers' file, which comes
    last and says that it was done.

    Raises:
        Refused: the run left no numbers.
    """
    results = run_folder.results_in(folder)
    gone = not results["answers"] and not (folder / run_folder.ROWS).exists()
    if gone and not ((folder / run_folder.HASHES).exists() and run_folder.unlike(folder)):  # or it was killed before they fitted
        return
    keep_numbers(results | {"answers": {}}, folder)


def keep_numbers(results: Mapping[str, Any], folder: Path) -> None:
    """Write an evaluation of which the values by row are not kept: the page, then the JSON file."""
    (folder / run_folder.ROWS).unlink(missing_ok=True)
    _write(results, folder, folder / run_folder.LOG)


def _write(results: Mapping[str, Any], folder: Path, log: Path | None) -> None:
    """The page, then the JSON file, which says that all are there."""
    from llm_unlearn.report.page import write_page

    write_page(results, run_folder.steps_in(log) if log else [], folder / run_folder.REPORT)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    if (folder / run_folder.RECIPE).is_file():  # a run, not an evaluation alone
        run_folder.seal(folder, {run_folder.RESULTS: text})
    run_folder.write(folder / run_folder.RESULTS, text)
