"""Runs in pieces: the first training and its first deletion, and every later one."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llm_unlearn import folder as run_folder
from llm_unlearn import recipe as recipes
from llm_unlearn.at_work import at_work, turn
from llm_unlearn.bases import resolve_base
from llm_unlearn.durable import remove
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.exact.asked import meant, standing
from llm_unlearn.exact.foreseen import said
from llm_unlearn.exact.manifest import BEGUN, FILE, Manifest, State, alone, new_manifest, read, save, settings_of
from llm_unlearn.exact.pieces import Wanted, Workshop, wanted
from llm_unlearn.exact.rows import Known, read_known
from llm_unlearn.folder import BEFORE
from llm_unlearn.look import Looks, attacked
from llm_unlearn.methods.exact import S3T, Exact
from llm_unlearn.models.load import add_adapter, load, trainable
from llm_unlearn.models.outline import capacity_of, longest_allowed
from llm_unlearn.places import no_way_out
from llm_unlearn.recipe import Recipe
from llm_unlearn.results import flattened, publish, results_of, run_facts, versions, without_texts
from llm_unlearn.run import start
from llm_unlearn.sections import Model, another
from llm_unlearn.spec import Refused, fingerprint
from llm_unlearn.training import sharded
from llm_unlearn.training.guard import Outcome
from llm_unlearn.training.tracking import tell_numbers, tracked


def method_of(recipe: Recipe) -> Exact:
    """The recipe's method, which is one of ours.

    Raises:
        Refused: it is another, or something in the recipe does not go with it.
    """
    method = recipe.method
    if not isinstance(method, Exact):
        raise Refused("method: expected sisa, s3t or modules.")
    return method


class Session:
    """A run folder in the hands of the processes that are there: its rows, its frozen base, its manifest."""

    def __init__(
        self, recipe: Recipe, cache: Path, overwrite: bool = False, state: State = "building", leaving: Collection[str] = ()
    ) -> None:
        """
        Args:
            state: of the manifest, where there is none yet.
            leaving: hashes of rows that are to be deleted, and may have left the data.
        """
        self.recipe, self.method, self.folder, self.cache = recipe, method_of(recipe), Path(recipe.output), cache
        self.accelerator: Accelerator = start(recipe.model)
        sharded.check(recipe)
        no_way_out(self.folder)
        self.model: Model = resolve_base(recipe.model, cache)
        loaded = load(self.model, self.accelerator.device, train=True)
        capacity = capacity_of(loaded.model, recipe.model.base, longest_allowed(recipe))
        self.known = read_known(recipe, self.method, loaded.tokenizer, capacity)
        assert recipe.model.adapter
        net = add_adapter(loaded.model, recipe.model.adapter, recipe.seed)
        self.base = fingerprint(*loaded.parts)
        self.workshop = Workshop(recipe, self.method, self.folder, net, self.accelerator)
        self.weights = sum(weight.numel() for weight in trainable(net).values())
        there = loaded.causal.config.get_text_config().num_hidden_layers
        if isinstance(self.method, S3T) and self.method.slices > there:
            raise Refused(f"method.slices: found {self.method.slices}, one block of layers each; this model has {there} layers.")
        if self.main:
            with turn(self.folder):
                if overwrite:
                    run_folder.clear(self.folder)
                if not (self.folder / FILE).is_file():
                    run_folder.write(self.folder / run_folder.RECIPE, flattened(recipe))
                    made = new_manifest(recipe, self.base, torch.get_num_threads(), versions(), list(self.known))
                    save(replace(made, state=state), self.folder)
        self.accelerator.wait_for_everyone()
        self.manifest = read(self.folder)
        self._check(leaving)

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _check(self, leaving: Collection[str]) -> None:
        """The folder must be of these settings and this base, and the rows that stay must still be there.

        Raises:
            Refused: it is not so.
        """
        if self.manifest.settings != settings_of(self.recipe):
            raise Refused(f"{self.folder / FILE}: was made by other settings than {run_folder.RECIPE} says. Restore one.")
        if self.manifest.base != self.base:
            raise Refused(f"model.base: {self.recipe.model.base} is not the model that {self.folder} was trained on.")
        there = {self.manifest.hash(id) for id in self.known}
        gone = set(self.manifest.rows) - set(self.manifest.deleted) - there - set(leaving)
        if gone:
            raise Refused(
                f"data: {len(gone)} rows of this run are not in its data any more, or were changed. Put them back; rows that are "
                "to be forgotten are deleted with llm-unlearn forget RUN --ids, before or after they leave the data; all at once."
            )

    @property
    def kept(self) -> dict[str, Known]:
        """The rows that are not deleted."""
        return standing(self.manifest, self.known)

    def train(self, name: str = BEFORE, state: State = "building") -> tuple[Manifest, Outcome]:
        """With all rows: the model before, or a store of which nothing is deleted yet.

        Args:
            name: of the adapter's folder in the run folder.
            state: of the manifest, from then on.
        """
        alive, outcome = self.workshop.settle(self.manifest, self.kept, training=True)
        if outcome.status != "interrupted" and self.main:
            self.workshop.publish(self.manifest, alive, name, state)
        return self._again(outcome)

    def delete(self, hashes: Iterable[str]) -> tuple[Manifest, Outcome]:
        """Make the weights a function of the other rows alone, and say what it cost.

        Args:
            hashes: of the rows, besides those of a deletion that was broken off.
        """
        asked = sorted({*self.manifest.deleted, *hashes})
        begun = replace(self.manifest, deleted=asked, state="deleting")
        self.workshop.compare(begun, standing(begun, self.known))
        if self.main:
            if (self.folder / run_folder.RESULTS).is_file():
                without_texts(self.folder)
            save(begun, self.folder)  # from here on there is no way back
        self._again(Outcome("finished", 0, 0))
        began = time.perf_counter()
        alive, outcome = self.workshop.settle(self.manifest, self.kept, training=self.method.retrains)
        if outcome.status != "interrupted" and self.main:
            facts = self._cost(alive, time.perf_counter() - began)
            done = replace(self.manifest, deletions=[*self.manifest.deletions, facts])
            self.workshop.publish(done, alive, run_folder.ADAPTER, "complete")
        return self._again(outcome)

    def _again(self, outcome: Outcome) -> tuple[Manifest, Outcome]:
        self.accelerator.wait_for_everyone()
        self.manifest = read(self.folder)
        return self.manifest, outcome

    def _cost(self, alive: list[list[Wanted]], seconds: float) -> dict[str, Any]:
        """What a deletion cost, beside what training everything anew on the rows that are kept would have."""
        before = self.manifest.by_key
        whole = [one for chain in wanted(self.recipe, self.method, self.manifest, self.kept) for one in chain]
        pieces = self.workshop.finished(alive, self.manifest)
        new = [piece for piece in pieces if piece.key not in before]
        counted = sum(row["rows"] for row in self.manifest.deletions)
        rows = len(self.manifest.deleted) - counted
        sizes: dict[str, int] = {}
        for piece in before.values():
            sizes[piece.line] = sizes.get(piece.line, 0) + len(piece.rows)
        examples, full = sum(piece.examples for piece in new), sum(one.seen for one in whole)
        steps, all_steps = sum(piece.steps for piece in new), sum(one.schedule.steps for one in whole)
        spent, all_spent = sum(piece.seconds for piece in new), sum(piece.seconds for piece in pieces)
        return {
            "rows": rows,
            "retrained": len(new),
            "dropped": len(before.keys() - {piece.key for piece in pieces}) - len(new),
            "serving": len(pieces),
            "steps": steps,
            "full_steps": all_steps,
            "examples": examples,
            "full_examples": full,
            "seconds": round(spent, 2),
            "full_seconds": round(all_spent, 2),
            "wall_seconds": round(seconds, 2),
            "share": round(examples / max(1, full), 6),
            "expected_share": round(self.method.expected(rows, sizes), 6),
        }


def run(
    recipe: Recipe, suite: Suite | None, *, cache: Path, resume: bool = False, overwrite: bool = False, retrained: str | None = None
) -> Outcome:
    """Train with all rows, delete the forget set, and measure both. What was broken off goes on by itself.

    Args:
        suite: what to measure before and after; None measures nothing.
        retrained: the model that never saw the forget set: a folder, a hub id or embedded:….
    """
    began = time.perf_counter()
    with alone(Path(recipe.output), start(recipe.model).is_main_process):
        session = Session(recipe, cache, overwrite)
        with at_work(session.folder, 0, session.main) as ended, tracked(recipe, session.accelerator):
            outcome = _carry_out(session, suite, began, retrained)
            if outcome.status == "interrupted":
                ended.append("interrupted")
    return outcome


def _carry_out(session: Session, suite: Suite | None, began: float, retrained: str | None) -> Outcome:
    """What is not done yet of training, deleting and measuring."""
    recipe = session.recipe
    outcome = Outcome("finished", 0, 0)
    if session.manifest.state in BEGUN:
        manifest, outcome = session.train()
        if outcome.status == "interrupted":
            return outcome
    if session.manifest.state != "complete":
        manifest, after = session.delete(session.manifest.hash(id) for id, one in session.known.items() if one.asked)
        if after.status == "interrupted":
            return after
        outcome = Outcome("finished", outcome.step + manifest.deletions[-1]["steps"], outcome.kept)
        if session.main:
            print(said(manifest.deletions[-1]))
    folder, accelerator = session.folder, session.accelerator
    measured = (folder / run_folder.RESULTS).is_file()  # and killed before the model with all rows was gone
    if suite and recipe.evaluation and not measured:
        facts = run_facts(recipe, outcome, accelerator, began, session.weights) | {"deletions": session.manifest.deletions}
        model = replace(session.model, adapter=None)
        del session.workshop
        asked: dict[str, tuple[Model, str | None]] = {"before": (model, str(folder / BEFORE))} if (folder / BEFORE).is_dir() else {}
        asked["after"] = (model, str(folder / run_folder.ADAPTER))
        if retrained:
            asked["retrained"] = (another(model, retrained), None)
        seen = Looks(suite, accelerator, session.cache)(asked, str(folder))
        attacks = attacked(suite, seen, accelerator, session.cache)
        if session.main:
            results = results_of(suite, seen, attacks, title=str(folder), named=recipe.evaluation, run=facts)
            publish(results, suite, seen, folder)
            tell_numbers(accelerator, results["numbers"])
    if session.main:
        remove(folder / BEFORE)  # while it is there the run is not finished, whatever else is
        if not suite:
            run_folder.seal(folder)
    accelerator.wait_for_everyone()
    return outcome


def stored(recipe: Recipe, cache: Path) -> Outcome:
    """Train on all rows of a recipe, those of its forget set too, and delete none: a store, whose deletions come later. What was
    broken off goes on by itself; nothing is done where the store is there.

    Raises:
        Refused: the run folder holds a run of another kind that did not finish.
    """
    folder, wanted_recipe = Path(recipe.output), replace(recipe, evaluation=None)
    state = read(folder).state if (folder / FILE).is_file() else "storing"
    if state not in BEGUN:
        return Outcome("finished", 0, 0)
    if state != "storing":
        raise Refused(f"{folder}: {UNFINISHED}")
    run_folder.check(wanted_recipe, resume=True, overwrite=False)
    return Session(wanted_recipe, cache, state="storing").train(run_folder.ADAPTER, "complete")[1]


UNFINISHED = "its run is not finished; go on with it (llm-unlearn run RECIPE --resume), and forget then."


def recipe_in(folder: Path) -> Recipe:
    """The recipe of a run folder, as a run in that place."""
    return replace(recipes.load(folder / run_folder.RECIPE, check=False), output=str(folder))


def finished(folder: Path) -> Manifest:
    """The manifest of a run that may be asked to forget more.

    Raises:
        Refused: the run is not finished, or it is none of ours.
    """
    manifest = read(folder)
    if manifest.state in BEGUN or (folder / BEFORE).exists():
        raise Refused(f"{folder}: {UNFINISHED}")
    return manifest


NOTHING = {"rows": 0, "note": "these rows were deleted before; nothing was left to do"}


def forget(
    folder: Path, ids: Iterable[str] = (), *, where: Mapping[str, str] | None = None, hashes: Collection[str] = (),
    leaving: Collection[str] = (), cache: Path,
) -> tuple[dict[str, Any], Outcome]:  # fmt: skip
    """Delete rows from a finished run: retrain (or switch off) what they touched, and replace the adapter.

    Ids that were deleted before are passed over. Without ids, a deletion that was broken off is finished. Questions and answers
    that an evaluation left in the folder are taken out.

    Args:
        folder: a run folder of an exact method.
        where: column -> value; the rows that say so are deleted too.
        hashes: of more rows, as the manifest names them.
        leaving: hashes of rows that a later call deletes, and that may have left the data.

    Returns:
        What it cost (as in the manifest; on the first process), and whether it came to its end.

    Raises:
        Refused: the run is not finished, there is no such row, or a piece was changed. Nothing was changed.
        Busy: another process changes it.
    """
    recipe, ids = recipe_in(folder), list(ids)
    with alone(folder, start(recipe.model).is_main_process):
        manifest = finished(folder)
        session = Session(recipe, cache, leaving={*map(manifest.hash, ids), *hashes, *leaving})
        asked = meant(manifest, session.known, ids, where or {}) | (set(hashes) - set(manifest.deleted))
        if not asked and manifest.state == "complete":
            return dict(NOTHING), Outcome("finished", 0, 0)
        manifest, outcome = session.delete(asked)
    return ({} if outcome.status == "interrupted" or not session.main else manifest.deletions[-1]), outcome
