"""Deletions that are measured: what a suite says of the adapter before is kept as numbers while the adapter itself goes, and stands
beside what the suite says of the adapter after."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder as run_folder
from llm_unlearn.bases import resolve_base
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.exact import forgetting
from llm_unlearn.exact.asked import meant
from llm_unlearn.exact.forgetting import NOTHING, finished, method_of, recipe_in
from llm_unlearn.exact.manifest import Manifest, adapter_files, read
from llm_unlearn.exact.rows import Known, read_known
from llm_unlearn.look import Looks
from llm_unlearn.models.joined import WEIGHTS
from llm_unlearn.models.load import read_tokenizer
from llm_unlearn.models.outline import capacity_of, longest_allowed, outline_of
from llm_unlearn.models.sound import weights_in
from llm_unlearn.report.terminal import print_table
from llm_unlearn.results import keep_numbers, results_of, run_facts
from llm_unlearn.run import start
from llm_unlearn.sections import Evaluation, Model, another
from llm_unlearn.source import is_forgotten, left_out, same_data
from llm_unlearn.spec import Refused, fingerprint
from llm_unlearn.thresholds import findings
from llm_unlearn.training.guard import Outcome
from llm_unlearn.tree import Tree, build

PENDING = "numbers_before.json"
"""What was measured before a deletion that is not measured after yet: numbers and hashes, no text."""


@dataclass(frozen=True)
class Measured:
    """A deletion, how it is measured, and where the numbers go."""

    store: Path
    """The run folder of the exact method."""
    suite: Suite
    suite_name: str
    retrained: str | None
    """The model that never saw the rows: a folder, a hub id or embedded:…"""
    home: Path
    """The folder that gets `evaluation.json` and its page."""
    cache: Path
    """Where the embedded models are."""
    tables: Path
    """Where tables go, which hold texts of the rows; it may be the cache."""
    says: dict[str, Any] = field(default_factory=dict)
    """What `evaluation.json` is to say in place of what follows from these."""

    def delete(self, hashes: Collection[str], leaving: Collection[str] = ()) -> Outcome:
        """Measure, delete, measure again. Called again after a kill, it goes on: what was measured before is not measured again,
        and what was deleted is passed over. No question and no answer is written.

        Args:
            hashes: of the rows, as the store's manifest names them; they may have left the data.
            leaving: of rows that a later call deletes, and that may have left it, too.

        Raises:
            Refused: something cannot be read; nothing was deleted.
        """
        began, recipe = time.perf_counter(), recipe_in(self.store)
        accelerator = start(recipe.model)
        if not (self.home / PENDING).is_file():
            manifest = finished(self.store)
            if manifest.state == "deleting":  # begun without numbers, and there is no way back
                _, outcome = forgetting.forget(self.store, leaving={*hashes, *leaving}, cache=self.cache)
                if outcome.status == "interrupted":
                    return outcome
                manifest = read(self.store)
            facts = {
                "deletions": len(manifest.deletions),
                "asked": sorted(set(hashes) - set(manifest.deleted)),
                "adapter": adapter_files(self.store),
                "results": self._look("before"),
            }
            if accelerator.is_main_process:
                run_folder.write(self.home / PENDING, json.dumps(facts))
            accelerator.wait_for_everyone()
        _, outcome = forgetting.forget(self.store, hashes=hashes, leaving=leaving, cache=self.cache)
        if outcome.status == "interrupted":
            return outcome
        after = self._look("after")
        if accelerator.is_main_process:
            earlier, manifest = pending(self.home), read(self.store)
            serving = [weights_in(path) for path in (self.store / run_folder.ADAPTER).rglob(WEIGHTS)]  # one, or several averaged
            about = run_facts(recipe, outcome, accelerator, began, sum(one.numel() for part in serving for one in part.values()))
            facts = {"deletions": manifest.deletions, "before": {key: earlier[key] for key in ("deletions", "adapter")}}
            asked_for = recipe.evaluation.thresholds if recipe.evaluation else None
            run = {"run": about | (self.says.get("run") or {}) | facts}
            results = beside(earlier["results"], after) | self.says | run
            results["thresholds"] = findings(asked_for or (), results["numbers"])
            keep_numbers(results, self.home)
            (self.home / PENDING).unlink()
            print_table(results)
        accelerator.wait_for_everyone()
        return outcome

    def _look(self, column: str) -> dict[str, Any]:
        """What `evaluation.json` would say of the adapter as it is now, under this column, and of the retrained model."""
        recipe = recipe_in(self.store)
        model = replace(recipe.model, adapter=None)
        asked: dict[str, tuple[Model, str | None]] = {column: (model, str(self.store / run_folder.ADAPTER))}
        if self.retrained:
            asked["retrained"] = (another(model, self.retrained), None)
        accelerator = start(recipe.model)
        name = f"{self.store} {column} this deletion"
        seen = Looks(self.suite, accelerator, self.tables)(asked, name)
        found = results_of(self.suite, seen, [], title=str(self.home), named=Evaluation(suite=self.suite_name), run=None)
        found["models"][column]["name"] = name
        return found | {"answers": {}}


def pending(home: Path) -> dict[str, Any]:
    """What was measured before a deletion.

    Raises:
        Refused: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads((home / PENDING).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = f"{home / PENDING}: cannot be read ({error}). Remove it; the numbers before this deletion are lost then."
        raise Refused(text) from None
    return found


def beside(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Two evaluations by one suite as one. A column's values follow from its model and the retrained one alone, which both have.
    Where rows left the data in between, a set may be there no more."""

    def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        return {**one, **other}

    known = {(one["set"], one["title"]): one["values"] for one in before["numbers"]}
    numbers = [
        {**number, "values": joined(known.get((number["set"], number["title"]), {}), number["values"])}
        for number in after["numbers"]
    ]
    curves = {name: joined(before["curves"].get(name, {}), curve) for name, curve in after["curves"].items()}
    return {**after, "models": joined(before["models"], after["models"]), "numbers": numbers, "curves": curves}


# ----------------------------------------------------------------------------------------------- a run's own evaluation


def forget(folder: Path, ids: Iterable[str], where: Mapping[str, str], cache: Path) -> tuple[dict[str, Any], Outcome]:
    """Delete rows from a run that has an evaluation, and make its numbers again: `before` is the adapter before this deletion, and
    sets to be kept lose the deleted rows. One that was broken off comes to its end first.

    Returns:
        What it cost (on the first process), and whether it came to its end.

    Raises:
        Refused: as `forgetting.forget`, or something cannot be measured; nothing was deleted.
    """
    ids, facts, outcome = list(ids), dict(NOTHING), Outcome("finished", 0, 0)
    if (folder / PENDING).is_file():
        manifest, known = finished(folder), _known(folder, cache)
        begun = set(pending(folder)["asked"])
        outcome = _again(folder, manifest, known, begun, cache).delete(begun, {*map(manifest.hash, ids)})
        if outcome.status == "interrupted":
            return {}, outcome
        facts = read(folder).deletions[-1]
        if not (ids or where):
            return facts, outcome
    manifest, known = finished(folder), _known(folder, cache)
    asked = meant(manifest, known, ids, where)
    if not asked and manifest.state == "complete":
        return facts, outcome
    try:
        outcome = _again(folder, manifest, known, asked, cache).delete(asked)
    except Refused as error:
        if read(folder).deleted != manifest.deleted:
            raise
        (folder / PENDING).unlink(missing_ok=True)
        raise Refused(f"{error}\nNothing was deleted; --no-evaluation deletes without measuring.") from None
    ended = outcome.status != "interrupted" and start(recipe_in(folder).model).is_main_process
    return (read(folder).deletions[-1] if ended else {}), outcome


def _known(folder: Path, cache: Path) -> dict[str, Known]:
    recipe = recipe_in(folder)
    model = resolve_base(recipe.model, cache)
    capacity = capacity_of(outline_of(model), recipe.model.base, longest_allowed(recipe))
    return read_known(recipe, method_of(recipe), read_tokenizer(model), capacity)


def _again(folder: Path, manifest: Manifest, known: Mapping[str, Known], asked: set[str], cache: Path) -> Measured:
    """The evaluation of a run, on the rows that are left once these are deleted."""
    results, recipe = run_folder.results_in(folder), recipe_in(folder)
    if "suite_settings" not in results:
        raise Refused(f"{folder / run_folder.RESULTS}: does not say by which suite it was made; add --no-evaluation.")
    suite = build(Suite, Tree(results["suite_settings"], str(folder / run_folder.RESULTS)))
    gone = {*manifest.deleted, *asked}
    rows = [row for id, one in known.items() if manifest.hash(id) in gone for row in one.rows]
    column = method_of(recipe).id
    narrowed = {
        name: left_out(source, column, dict.fromkeys(row[column] for row in rows))
        if column and not is_forgotten(name) and any(same_data(source, one) for one in recipe.sources.values())
        else source
        for name, source in suite.sets.items()
    }
    says = {
        "title": results["title"],
        # what the sets lost is said by a hash: the ids of deleted rows are not to be kept
        "suite_hash": fingerprint(results["suite_settings"], sorted(gone)),
        "suite_settings": results["suite_settings"],
        "run": results["run"],
    }
    control = results["models"].get("retrained", {}).get("name")
    asked_of = replace(suite, sets=narrowed, attacks=())
    return Measured(folder, asked_of, results["suite"], control, folder, cache, cache, says)
