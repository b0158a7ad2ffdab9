"""`llm-unlearn verify`: a run folder held against its own hashes, its weights, its numbers, and the proof of an exact run."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import candidates, folder, recipe, sections
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.exact.manifest import FILE as MANIFEST
from llm_unlearn.reply import DONE, UNFIT, Reply
from llm_unlearn.report.columns import read_columns
from llm_unlearn.report.verdict import value_of
from llm_unlearn.spec import Refused, from_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llm_unlearn.evaluation.tables import Tables

CLOSE = {"fp32": 1e-3, "bf16": 5e-2}
"""Precision -> how far a log-likelihood or number that is made again may be off, beside its own size: other hardware and other
batches round otherwise."""


@dataclass(frozen=True)
class Check:
    """One promise, and what does not keep it."""

    what: str
    """In words, for where all is well."""
    problems: Sequence[str]


def verify(options: argparse.Namespace) -> Reply:
    """Print each promise with what came of it; 1 where one is not kept."""
    home: Path = options.run
    if not (home / folder.RECIPE).is_file():
        raise Refused(f"{home}: no run folder (it has no {folder.RECIPE}; looked from {Path.cwd()}).")
    found: list[Check] = []
    for check in _checks(home, options):
        found.append(check)
        words = [f"{home}: {line}" for line in check.problems] or [f"{home}: {check.what}"]
        print("\n".join(words), flush=True)
    problems = [line for check in found for line in check.problems]
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}")
    return Reply(UNFIT if problems else DONE, {"problems": problems, "kept": [one.what for one in found if not one.problems]})


def _checks(home: Path, options: argparse.Namespace) -> Iterator[Check]:
    """From what costs nothing to what runs a model."""
    exact = (home / MANIFEST).is_file()
    if not exact or (home / folder.HASHES).is_file():
        yield Check("every file is as the run left it", folder.unlike(home))
    if exact:
        yield from _proof(home, options)
    elif options.retrain:
        raise Refused(f"--retrain: {home} has no {MANIFEST}: it is no run of sisa, s3t or modules.")
    if not (home / folder.RESULTS).is_file():
        return
    results = folder.results_in(home)
    yield Check("its numbers are of this recipe", list(_origins(home, results)))
    if options.rows and not exact:
        yield from _numbers(home, results, options)


def _proof(home: Path, options: argparse.Namespace) -> Iterator[Check]:
    """Of an exact run: that no kept weight depends on a deleted row."""
    from llm_unlearn.exact.verify import problems, retrained

    found = problems(home)
    yield Check("every weight is as its manifest says, and none saw a deleted row", found)
    if options.retrain and not found:
        same = f"{options.retrain} was trained again and has the same bits"
        yield Check(same, retrained(home, options.retrain, options.cache))


def _origins(home: Path, results: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers say that they were made of, against what lies beside them."""
    named = (results.get("run") or {}).get("recipe_hash")
    there = recipe.load(home / folder.RECIPE, check=False).hash
    if named and named != there:
        yield f"{folder.RESULTS}: is of recipe {named}, and {folder.RECIPE} is {there}"


def _numbers(home: Path, results: Mapping[str, Any], options: argparse.Namespace) -> Iterator[Check]:
    """The models asked again: some rows of each set, or everything."""
    import random

    from llm_unlearn.run import start

    again = Again.of(home, results, options.cache)
    accelerator = start(next(iter(again.models.values()))[0])
    if options.rows == "all":
        yield again.whole(accelerator)
        return
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    count = 0
    problems: list[str] = []
    for asked, found in again.sample(accelerator, int(options.rows), random.Random(seed)):
        count += asked
        problems += found
    yield Check(f"{count} answers were scored and written again, drawn by --seed {seed}, and are the same", problems)


@dataclass(frozen=True)
class Again:
    """What is needed to ask the models of a run again."""

    home: Path
    results: Mapping[str, Any]
    suite: Suite
    models: Mapping[str, tuple[sections.Model, str | None]]
    """Column -> model and adapter."""
    cache: Path

    @staticmethod
    def of(home: Path, results: Mapping[str, Any], cache: Path) -> Again:
        """
        Raises:
            Refused: the run has no weights, or the suite's settings cannot be read.
        """
        suite = from_json(Suite, json.dumps(results.get("suite_settings")), f"{home / folder.RESULTS}: suite_settings")
        (run,) = candidates.candidates_of([str(home)], [], None, None)
        models = {column: one for column, one in run.columns.items() if column in results["models"]}
        if "retrained" in results["models"]:
            models["retrained"] = (sections.another(run.model, str(results["models"]["retrained"]["name"])), None)
        return Again(home, results, suite, models, cache)

    @property
    def close(self) -> float:
        """How far off a number may be."""
        return CLOSE.get((self.results.get("run") or {}).get("precision", "fp32"), CLOSE["bf16"])

    def _same(self, old: float | None, new: float | None) -> bool:
        """Whether a number that was made again is the one that was kept."""
        return old == new if old is None or new is None else abs(old - new) <= self.close * max(1.0, abs(old))

    def sample(self, accelerator: Accelerator, rows: int, draw: Any) -> Iterator[tuple[int, list[str]]]:
        """
        Args:
            rows: of each set.
            draw: a `random.Random`.

        Yields:
            For each model: how many answers were made again, and which are other ones.

        Raises:
            Refused: the values of single rows were not kept.
        """
        if not (self.home / folder.ROWS).is_file():
            raise Refused(f"{self.home}: has no {folder.ROWS}, so no row can be compared; --rows all makes every number again.")
        columns = ["set", "id", "model", "tokens", "nll", "written"]
        kept = {(row["model"], row["set"], row["id"]): row for row in read_columns(self.home / folder.ROWS, columns)}
        for column in self.models:
            made = self._asked(column, accelerator, rows, draw)
            pairs = [(name, table.ids[i], table, i) for name, table in made.items() for i in range(len(table.ids))]
            yield (
                len(pairs),
                [
                    f"{folder.ROWS}: {column}, set {name}, row {id}: {text}"
                    for name, id, table, i in pairs
                    for text in self._differs(kept.get((column, name, id)), table, i)
                ],
            )

    def _asked(self, column: str, accelerator: Accelerator, rows: int, draw: Any) -> Tables:
        """One model on some rows of each set, nothing taken from the cache."""
        from llm_unlearn.bases import resolve_base
        from llm_unlearn.evaluation.encoding import encode_sets, suite_capacity
        from llm_unlearn.evaluation.passes import tables_of
        from llm_unlearn.evaluation.sets import only
        from llm_unlearn.models.load import load

        model, adapter = self.models[column]
        loaded = load(resolve_base(model, self.cache), accelerator.device, adapter)
        sets = {}
        capacity = suite_capacity(self.suite.sets, loaded)
        for name, whole in encode_sets(self.suite.sets, self.suite.needs, loaded, capacity, self.suite.max_thought_tokens).items():
            sets[name] = only(whole, sorted(draw.sample(range(len(whole.ids)), min(rows, len(whole.ids)))))
        return tables_of(
            loaded, sets, accelerator, batch_tokens=self.suite.batch_tokens, max_new_tokens=self.suite.max_new_tokens,
            cache=None, title=column,
        )  # fmt: skip

    def _differs(self, kept: Mapping[str, Any] | None, table: Any, row: int) -> Iterator[str]:
        """What a row that was made again has otherwise."""
        if kept is None:
            yield "is in the data now, and was not when the run was measured"
            return
        answers = table.likelihood.of("answer")
        nll, tokens = float(answers.nll[row]), int(answers.length[row])
        exact = self.close == CLOSE["fp32"] and "written" in kept  # a run may keep no texts
        if tokens != kept["tokens"]:
            yield f"has {tokens} tokens now, {kept['tokens']} then: its text, or the tokenizer, has changed"
        elif not self._same(kept["nll"], nll if math.isfinite(nll) else None):
            yield f"−log p of its answer is {nll:.4g} now, {kept['nll']} in the file"
        elif exact and table.generated is not None and table.generated[row] != kept["written"]:
            yield "the model writes another answer than the file has"

    def whole(self, accelerator: Accelerator) -> Check:
        """Every number made again by the run's suite, but for attacks and tasks; those that differ."""
        from dataclasses import replace
        from tempfile import TemporaryDirectory

        from llm_unlearn.bases import resolve_base
        from llm_unlearn.evaluation.aggregates import SET, aggregates
        from llm_unlearn.evaluation.numbers import numbers
        from llm_unlearn.look import Looks

        suite = replace(self.suite, attacks=(), tasks=())
        with TemporaryDirectory(prefix="llm-unlearn-") as empty:
            looks = Looks(suite, accelerator, Path(empty))
            models = {column: (resolve_base(model, self.cache), adapter) for column, (model, adapter) in self.models.items()}
            tables = {column: one.tables for column, one in looks(models, str(self.home)).items()}
        found = numbers(suite, tables)
        known = {(one["set"], one["title"]) for one in found}
        of_tasks = [one for one in self.results["numbers"] if (one["set"], one["title"]) not in known and one["set"] != SET]
        found += aggregates(suite.aggregates, found + of_tasks, list(self.models))
        made = {(one["set"], one["title"]): one for one in found}
        problems, not_made = [], [str(attack.get("title")) for attack in self.results.get("attacks") or ()]
        for then in self.results["numbers"]:
            if not (now := made.get((then["set"], then["title"]))):
                not_made.append(f"{then['title']} on {then['set']}")
                continue
            for column in self.models:
                old, new = value_of(then, column), value_of(now, column)
                if not self._same(old, new):
                    problems.append(f"{folder.RESULTS}: {then['title']} on {then['set']}, {column}: {new} now, {old} in the file")
        same = f"{len(self.results['numbers']) - len(not_made)} numbers were made again, and are the same"
        return Check(f"{same}; not made again: {', '.join(not_made)}" if not_made else same, problems)
