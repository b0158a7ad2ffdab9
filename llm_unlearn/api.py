"""What programs and notebooks use: a recipe read or built, carried out; a model measured; what came out, as pandas tables.

from llm_unlearn import evaluate, load_recipe, unlearn

run = unlearn(load_recipe("recipes/forget_lora.yaml", {"train.lr": 5e-4}))
run.evaluation.numbers                      # before, after, retrained
model, tokenizer = run.load()
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import folder, recipe
from llm_unlearn.cli import cache_folder, settle
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.headline import headline
from llm_unlearn.report.verdict import columns_of, interval_of, judge, value_of
from llm_unlearn.sections import Model
from llm_unlearn.source import missing
from llm_unlearn.spec import Refused
from llm_unlearn.thresholds import reason_of
from llm_unlearn.tree import Tree, locate
from llm_unlearn.verbs import carry_out, made

if TYPE_CHECKING:
    from pandas import DataFrame

    from llm_unlearn.models.load import Loaded

Changes = Mapping[str, object]
"""Settings by their keys, such as {"train.lr": 1e-4, "model.adapter": None}."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a suite found: `evaluation.json`, and what can be read off it."""

    results: Mapping[str, Any]
    """Everything that `evaluation.json` says."""
    folder: Path | None = None
    """Where it was kept, if it was."""

    @property
    def headline(self) -> str:
        """The whole in a few sentences."""
        return headline(self.results)

    @property
    def numbers(self) -> DataFrame:
        """One row a measure and set; a column for each model, and the judgement. Missing values are NaN."""
        import pandas as pd

        columns = columns_of(self.results)
        found = [
            {"set": one["set"], "measure": one["title"]}
            | {column: value_of(one, column) for column in columns}
            | {"judgement": judge(one), "unit": one.get("unit")}
            for one in self.results["numbers"]
        ]
        return pd.DataFrame(found, columns=["set", "measure", *columns, "judgement", "unit"]).set_index(["set", "measure"])

    @property
    def values(self) -> DataFrame:
        """One row a measure, set and model: value, the ends of its 95 % bootstrap interval, and how many units it rests on."""
        import pandas as pd

        found = []
        for one in self.results["numbers"]:
            for column, said in one["values"].items():
                low, high = interval_of(one, column) or (None, None)
                found.append((one["set"], one["title"], column, said.get("value"), low, high, said.get("n")))
        return pd.DataFrame(found, columns=["set", "measure", "model", "value", "low", "high", "n"])

    @property
    def answers(self) -> DataFrame:
        """What each model wrote to each question: set, id, prompt, truth, and a column for each model."""
        import pandas as pd

        columns = columns_of(self.results)
        found = [{"set": name, **row} for name, rows in self.results["answers"].items() for row in rows]
        return pd.DataFrame(found).reindex(columns=["set", "id", "prompt", "truth", *columns])

    @property
    def thresholds(self) -> DataFrame:
        """What was asked of the numbers, what came, and whether it holds."""
        import pandas as pd

        keys = ["measure", "set", "asked", "value", "bound", "holds", "why"]
        return pd.DataFrame(list(self.results.get("thresholds", ())), columns=keys)

    @property
    def holds(self) -> bool:
        """Whether every threshold of the recipe holds."""
        return not reason_of(self.results.get("thresholds", ()))

    @property
    def rows(self) -> DataFrame:
        """The values of every row and model (`evaluation.parquet`).

        Raises:
            Refused: they were not kept.
        """
        import pandas as pd

        if not self.folder or not (self.folder / folder.ROWS).is_file():
            raise Refused("rows: the values of single rows were not kept; give evaluate(…, output=FOLDER).")
        return pd.read_parquet(self.folder / folder.ROWS)

    def __repr__(self) -> str:
        return f"{self.headline}\n\n{self.numbers.to_string(float_format='%.3g', na_rep='–')}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.headline)}</p>{self.numbers.to_html(float_format='%.3g', na_rep='–', border=0)}"


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was carried out."""
        return recipe.load(self.folder / folder.RECIPE, check=False)

    @property
    def log(self) -> DataFrame:
        """One row for each optimizer step: every term, gradient norm, learning rate."""
        import pandas as pd

        return pd.DataFrame(folder.steps_in(self.folder / folder.LOG))

    @property
    def evaluation(self) -> Evaluation:
        """What its suite found.

        Raises:
            Refused: the run was not measured, or is not finished.
        """
        return Evaluation(folder.results_in(self.folder), self.folder)

    def load(self, device: str | None = None) -> tuple[Any, Any]:
        """(model, tokenizer): its base with its adapter on it, or its whole model, for `generate` or for `evaluate`.

        Args:
            device: such as cuda:1; without it, the accelerator if there is one.

        Raises:
            Refused: the run has no weights yet.
        """
        import torch

        from llm_unlearn.bases import resolve_base
        from llm_unlearn.candidates import candidates_of
        from llm_unlearn.models.load import load

        here = torch.device(device) if device else torch.accelerator.current_accelerator() or torch.device("cpu")
        (one,) = candidates_of([str(self.folder)], [], None, None)
        if one.under_way:
            raise Refused(f"{self.folder}: the run is not finished. Run: llm-unlearn run {self.folder / folder.RECIPE} --resume")
        loaded = load(resolve_base(one.model, cache_folder()), here, one.adapter)
        return loaded.model, loaded.tokenizer


def load_recipe(path: str | Path, changes: Changes | None = None) -> Recipe:
    """A recipe file, from here or shipped with the project, with some settings changed.

    Raises:
        Refused: every wrong key at once, with its place, what was found and what was expected.
    """
    place = locate(str(path))
    wanted = recipe.load(place, list(_words(changes or {})))
    named = wanted.evaluation
    if named and (beside := locate(named.suite, place)) != locate(named.suite, HERE):  # it is carried out here, and lies there
        wanted = replace(wanted, evaluation=replace(named, suite=str(beside)))
    return wanted


HERE = Path("recipe")
"""Where a recipe stands that is in no file."""


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe written in Python: the same keys as in YAML, nested.

    Raises:
        Refused: as for a file; the place is `make_recipe`.
    """
    plain = json.loads(json.dumps(settings, default=str))
    return recipe.checked(Tree(plain, "make_recipe"))


def unlearn(wanted: Recipe, *, resume: bool = False, overwrite: bool = False, cache: Path | None = None) -> Run:
    """Carry out a recipe, as `llm-unlearn run` does.

    Args:
        resume: go on from the newest checkpoint of its run folder; a finished run is handed back as it is.
        overwrite: replace an earlier run in its folder.
        cache: where embedded models and tables are kept; without it, where the command line keeps them.

    Raises:
        Refused: something that it names cannot be used, or the folder holds another run.
        KeyboardInterrupt: it was interrupted; `resume=True` goes on.
    """
    environment = settle()
    outcome = carry_out(wanted, HERE, environment, cache or cache_folder(), resume=resume, overwrite=overwrite)
    if outcome and outcome.status == "interrupted":
        raise KeyboardInterrupt(f"interrupted after step {outcome.step}; unlearn(…, resume=True) goes on from there")
    return Run(Path(wanted.output))


def evaluate(
    model: Any, suite: str | Path, *, tokenizer: Any = None, adapter: str | None = None, before: Any = None,
    retrained: str | None = None, changes: Changes | None = None, output: str | Path | None = None, overwrite: bool = False,
    cache: Path | None = None,
) -> Evaluation:  # fmt: skip
    """Measure a model, as `llm-unlearn evaluate` does.

    Args:
        model: a transformers model (with peft's adapters or without), or the name of one: hub id, folder, embedded:target.
        suite: a suite file, from here or shipped with the project.
        tokenizer: of a model that is an object.
        adapter: an adapter or run folder to put on a named model, which alone is then the model before.
        before: the model before, likewise an object or a name; an object has the tokenizer of `model`.
        retrained: the model that never saw the forget set; without it, the one that the suite names.
        changes: settings of the suite to change.
        output: folder for `evaluation.json`, `evaluation.parquet` and `report.html`.

    Raises:
        Refused: something that is named cannot be used; or attacks are asked of an object, which they could not load afresh.
    """
    settle()
    wanted, kept = suites.load(locate(str(suite)), list(_words(changes or {}))), cache or cache_folder()
    home = Path(output) if output is not None else None
    if home:
        folder.check_output(home, overwrite)
    objects = [one for one in (model, before) if one is not None and not isinstance(one, (str, Path))]
    if objects and wanted.attacks:
        raise Refused(f"{suite}: has attacks, which load a model afresh; save the model, and give its folder instead.")
    if adapter and (objects or before is not None):
        raise Refused("adapter: is put on a model that is named, which is then the model before; give one or the other.")
    from llm_unlearn.models.given import answering
    from llm_unlearn.run import evaluate as measure

    asked: dict[str, tuple[Model, str | None] | Loaded] = {"model": _asked(model, tokenizer, "model")}
    if adapter:
        asked = {"before": asked["model"], "after": (_named(model, "model"), folder.adapter_in(adapter))}
    elif before is not None:
        asked = {"before": _asked(before, tokenizer, "before"), "after": asked["model"]}
    if control := retrained or wanted.retrained:
        asked["retrained"] = (_named(made(control, kept), "retrained"), None)
    with answering(*objects):
        results = measure(wanted, str(suite), asked, cache=kept, output=home, show=False)
    return Evaluation(results, home)


def open_run(path: str | Path) -> Run:
    """A run folder that is there.

    Raises:
        Refused: it is none.
    """
    if not (Path(path) / folder.RECIPE).is_file():
        raise Refused(f"{path}: no run folder (it has no {folder.RECIPE}; looked from {Path.cwd()}).")
    return Run(Path(path))


def open_evaluation(path: str | Path) -> Evaluation:
    """The evaluation in a folder that `run` or `evaluate` wrote.

    Raises:
        Refused: there is none.
    """
    return Evaluation(folder.results_in(Path(path)), Path(path))


def _words(changes: Changes) -> Iterator[str]:
    """Settings as the command line's words: JSON is YAML, too."""
    return (f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in changes.items())


def _asked(model: Any, tokenizer: Any, name: str) -> tuple[Model, str | None] | Loaded:
    if isinstance(model, (str, Path)):
        return _named(model, name), None
    from llm_unlearn.models.given import given

    return given(model, tokenizer)


def _named(model: Any, name: str) -> Model:
    place = folder.model_in(str(model))
    if missing(place):
        raise Refused(f"{name}: no such folder: {place} (looked from {Path.cwd()}).")
    return Model(base=place, adapter=None)
