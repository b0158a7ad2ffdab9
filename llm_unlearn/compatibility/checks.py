"""Check that a recipe is measured by what fits it: a suite on its data, and a retrained model of its kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm_unlearn.compatibility.models import architecture_of, are_embedded, check_retrained, control_of, layout_of, texts_of
from llm_unlearn.compatibility.rows import Fit, fit_of
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.recipe import Recipe, load
from llm_unlearn.spec import Refused


def check(recipe: Recipe, suite: Suite | None, suite_name: str, retrained: str | None, place: str, cache: Path) -> list[str]:
    """Check what a recipe is measured by: the rows of its suite, and the retrained model.

    Args:
        retrained: a folder, a hub id, embedded:… or a recipe that makes the model; None compares with nothing.
        place: of the recipe, for errors.

    Returns:
        What should be known and is no reason to refuse.

    Raises:
        Refused: every problem, a line for each.
    """
    problems: list[str] = []
    if recipe.train.stop and recipe.train.stop.until == "retrained" and not retrained:
        text = "compares with the retrained model, and neither evaluation nor its suite names one"
        problems.append(f"train.stop.until: {text}. Set evaluation.retrained, or train.stop.until: holdout, or a perplexity.")
    fit = fit_of(recipe, suite, suite_name) if suite else Fit([], [])
    problems += [f"evaluation.suite: {problem}" for problem in fit.problems]
    if suite and retrained:
        try:
            check_control(recipe, suite, retrained, texts=[] if fit.problems else texts_of(suite), cache=cache)
        except Refused as error:
            problems += str(error).splitlines()
    if problems:
        raise Refused("\n".join(f"{place}: {problem}" for problem in problems))
    differs = suite is not None and recipe.chat != suite.chat
    note = f"chat of the recipe and of {suite_name} differ: the model is trained on other prompts than it is asked"
    return [*fit.notes, note] if differs else fit.notes


def check_control(recipe: Recipe, suite: Suite, retrained: str, texts: Iterable[str], cache: Path) -> None:
    """Check that the retrained model of a recipe or its suite can be compared with the recipe's model.

    Raises:
        Refused: it cannot.
    """
    control = control_of(recipe.model, retrained)
    if are_embedded((recipe.model, control)):
        return
    by_suite = not (recipe.evaluation and recipe.evaluation.retrained)
    key = "evaluation.suite: retrained" if by_suite else "evaluation.retrained"
    original, other = architecture_of(recipe.model, cache), architecture_of(control, cache, retrained)
    check_retrained(original, other, texts, key)
    if recipe.train.stop and recipe.train.stop.until == "retrained" and layout_of(original) != layout_of(other):
        text = f"{retrained} lays out conversations by another chat template than {original.name}"
        raise Refused(f"train.stop.until: {text}. Set model.chat_template to a file that both use.")


def problems_of_run(file: Path, suite: Suite, name: str) -> list[str]:
    """Why a suite does not fit the recipe of a run folder; none where that recipe or its data cannot be read any more."""
    try:
        recipe = load(file, check=False)
        fit = fit_of(recipe, suite, name)
    except Refused:
        return []
    return fit.problems
