"""A folder of recipes as a list of methods: what the header of each file says, and what its settings ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.objectives.terms import Ramp, Term, layers_read
from llm_unlearn.objectives.views import WHOLE
from llm_unlearn.recipe import Recipe
from llm_unlearn.spec import Refused
from llm_unlearn.tree import no_such_file, shipped

REFERENCE: Mapping[str, str] = {"logps": "log-probs", "hidden": "hidden states"}
"""What a loss reads of the model as it was, where the word for people is another."""


@dataclass(frozen=True)
class Method:
    """One recipe of a folder: its file, the sentence that opens it, and the paper that it names."""

    path: Path
    sentence: str
    paper: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def methods_in(name: str) -> list[Method]:
    """The recipes of one folder, by name; its own folders are not looked into. A single recipe stands for itself.

    Raises:
        Refused: there is no such folder, it holds no recipe, or two of its recipes share a name.
    """
    folder = next((path for path in (Path(name), shipped() / name) if path.exists()), None)
    if folder is None:
        say = (
            no_such_file(Path(name)) if Path(name).suffix else f"{name}: no such folder (looked from {Path.cwd()} and {shipped()})."
        )
        raise Refused(f"{say} Give a folder that holds recipes, such as recipes.")
    found = sorted(path for path in folder.iterdir() if _is_recipe(path)) if folder.is_dir() else [folder]
    if not found:
        raise Refused(f"{folder}: holds no recipe; expected *.yaml files. Give a folder that holds recipes, such as recipes.")
    by_name: dict[str, Path] = {}
    for path in found:
        if other := by_name.get(path.stem):
            raise Refused(f"{path}: has the name of {other.name} but for its ending; rename one of the two.")
        by_name[path.stem] = path
    return [Method(path, *header_of(path.read_text(encoding="utf-8", errors="replace"))) for path in found]


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and path.is_file() and not path.name.startswith(".")


def header_of(text: str) -> tuple[str, str]:
    """The sentence and the paper of a recipe's first comment lines; "" for what is not there.

    The sentence ends where the line that says how to launch begins; the paper stands in brackets at the end of that line.
    """
    comments: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("#").strip())
    at = next((i for i, line in enumerate(comments) if line.startswith(("accelerate launch ", "llm-unlearn "))), len(comments))
    paper = re.search(r"\(([^()]*\d{4}[^()]*)\)\s*$", " ".join(comments[at:]))
    return " ".join(comments[:at]).strip(), paper[1].strip() if paper else ""


def terms_of(recipe: Recipe) -> str:
    """The objective on one line: `npo(forget) + 30 × kl(retain)`; of a method, its name."""
    if recipe.method:
        return recipe.method.name
    return " + ".join(f"{_factor(term)}{term.loss.name}({term.stream or name})" for name, term in recipe.terms.items())


def _factor(term: Term) -> str:
    if isinstance(term.weight, Ramp):
        return f"{term.weight.start:g}…{term.weight.end:g} × "
    if term.budget:
        return "λ × "
    return "" if term.weight == 1 else f"{term.weight:g} × "


def needs_of(recipe: Recipe) -> list[str]:
    """What one must have to run a recipe, and what it moves, in words. A new kind of need is a line here."""
    losses = [term.loss for term in recipe.terms.values()]
    reference = dict.fromkeys(loss.needs.reference for loss in losses if loss.needs.reference != "none")
    needs = [f"reference {' and '.join(REFERENCE.get(one, one) for one in reference)}"] if reference else []
    kinds = {kind for loss in losses for kind in (*loss.needs.reads, *loss.needs.contrasts)}
    if "alternate" in kinds:
        needs.append("alternate answers")
    if "expert" in kinds:
        needs.append("two prompts")
    if layers := sorted({layer for loss in losses for layer in layers_read(loss)} - WHOLE):
        needs.append(f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}")
    needs.append("retain set" if recipe.data.retain else "forget set only")
    needs.append("LoRA" if recipe.model.adapter else "full weights")
    if recipe.model.adapter and recipe.model.adapter.init != "zero":
        needs.append(f"init {recipe.model.adapter.init}")
    needs += [f"rule {rule.name}" for rule in recipe.train.rules]
    if recipe.train.optimizer == "sophia":
        needs.append(recipe.train.optimizer)
    if recipe.model.quantize:
        needs.append(recipe.model.quantize)
    return needs


def facts_of(method: Method, recipe: Recipe) -> dict[str, Any]:
    """One method of the list as plain data."""
    said = {"name": method.name, "path": str(method.path), "sentence": method.sentence, "paper": method.paper}
    return said | {"objective": terms_of(recipe), "needs": needs_of(recipe)}
