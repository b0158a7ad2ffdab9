"""The way of a store: requests are served by deleting their rows from weights in pieces, which retrains only what saw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder
from llm_unlearn.methods.exact import Exact
from llm_unlearn.requests.certificate import STORE
from llm_unlearn.requests.derived import Ids, suite_of
from llm_unlearn.requests.judging import plainly
from llm_unlearn.requests.matching import RowId
from llm_unlearn.requests.service import Office
from llm_unlearn.requests.ways import ByRecipe, Served, Work, own_cache, part
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused, fingerprint

SHOWN = 10
"""So many rows are named that would go, too."""


def way_of(office: Office, cache: Path) -> ByRecipe | ByStore:
    """How a service serves: by deletions from a store where its recipe is of an exact method, else by runs of its recipe."""
    return ByStore(office, cache) if office.in_pieces else ByRecipe(office, cache)


@dataclass(frozen=True)
class ByStore:
    """Deletions from the run folder of the service's recipe, which the model of a request names."""

    office: Office
    cache: Path
    """Where the embedded models are."""

    def ready(self, before: Sequence[Path], known: Ids) -> None:
        from llm_unlearn.exact.manifest import FILE

        store = Path(self.office.model)
        if before and not (store / FILE).is_file():
            raise Refused(
                f"{store}: no store is there (looked from {Path.cwd()}), and {len(before)} runs have deleted rows from it, which "
                "a new one would learn again. Run this where the store was made, or put it back. If it is lost, take the rows of "
                "fulfilled requests out of the data, and name another output in the recipe. Nothing was changed."
            )
        if control := self.office.suite.retrained:
            from llm_unlearn.compatibility.checks import check_control
            from llm_unlearn.compatibility.models import texts_of

            check_control(self.office.recipe, self.office.suite, control, texts_of(self.office.suite), self.cache)

    def serve(self, work: Work) -> Served | None:
        from llm_unlearn.exact.manifest import alone

        store, output = Path(work.model), work.output
        suite = suite_of(self.office, {**work.earlier, **work.requests}, _once(work.requests.values(), work.gone))
        done = (output / folder.RESULTS).is_file()
        ids = [] if done else [id for rows in work.requests.values() for id in exact_ids(self.office, rows)]
        if not done and not self._train(store):
            return None
        with alone(store):
            if not done and not self._delete(work, ids, store, suite):
                return None
            return self._served(work, store, suite)

    def _served(self, work: Work, store: Path, suite: Any) -> Served:
        """What came of a deletion that was measured."""
        from llm_unlearn.exact.manifest import FILE, read
        from llm_unlearn.exact.measuring import PENDING
        from llm_unlearn.exact.verify import problems

        output = work.output
        (output / PENDING).unlink(missing_ok=True)  # of a serving that was killed as it removed it
        results, manifest, found = folder.results_in(output), read(store), problems(store)
        run = results["run"]
        deletions = manifest.deletions[run["before"]["deletions"] :]
        known = {
            "way": "store",
            "recipe": self.office.service.recipe,
            "suite_hash": fingerprint(suite),
            "store": {
                "folder": work.model,
                "method": self.office.recipe.method.name if self.office.recipe.method else None,
                "deletions": deletions,
                "checked": found or "every weight is as the manifest says, and none depends on a deleted row",
            },
        } | {key: run[key] for key in ("recipe_hash", "seed", "steps", "device", "precision", "versions")}
        before = {"place": STORE, "name": f"{work.model}/{folder.ADAPTER}", "files": run["before"]["adapter"]}
        after = part(STORE, f"{work.model}/{folder.ADAPTER}", store / folder.ADAPTER)
        after |= {"manifest": folder.sha256(store / FILE), "deletions": len(manifest.deletions)}
        broken = f"llm-unlearn verify {store} finds {len(found)} problems" if found else ""
        return Served(plainly(results["numbers"]), [self._base(), before], after, known, broken, lasting=True)

    def _train(self, store: Path) -> bool:
        """Train the store where there is none; False where the user interrupted it."""
        from llm_unlearn.exact.forgetting import stored
        from llm_unlearn.exact.manifest import FILE

        if not (store / FILE).is_file():
            print(f"first use: training the store {store} on all rows of {self.office.service.recipe}; killed, it goes on")
        return stored(replace(self.office.recipe, output=str(store)), self.cache).status != "interrupted"

    def _delete(self, work: Work, ids: Sequence[str], store: Path, suite: Any) -> bool:
        """Carry out the measured deletion; False where the user interrupted it."""
        from llm_unlearn.exact.manifest import read, settings_of
        from llm_unlearn.exact.measuring import Measured
        from llm_unlearn.retrained import found

        recipe = self.office.recipe
        manifest = read(store)
        if manifest.settings != settings_of(recipe):
            raise Refused(f"{store}: was made by other settings than {self.office.service.recipe} has. Restore one.")
        named = recipe.evaluation.retrained if recipe.evaluation else None
        control = found(named or suite.retrained, self.cache)
        # a row that was too long to be learnt stands in no piece
        there = {manifest.hash(id) for id in ids} & set(manifest.rows)
        scratch = own_cache(work.output, self.cache)
        measured = Measured(store, suite, self.office.suite_name, control, work.output, self.cache, scratch)
        return measured.delete(there).status != "interrupted"

    def _base(self) -> dict[str, Any]:
        """The files of the frozen base."""
        from llm_unlearn.bases import resolve_base
        from llm_unlearn.models.load import folder_of

        wanted = self.office.recipe.model
        return part("elsewhere", wanted.base, folder_of(resolve_base(wanted, self.cache).base, wanted.revision))

    def model(self, name: str, before: Sequence[Path]) -> Model:
        """The base with the store's adapter, to be released.

        Raises:
            Refused: the store is not as its manifest says, or a deletion is under way.
        """
        from llm_unlearn.exact.verify import problems

        if found := problems(Path(name)):
            raise Refused("\n".join(f"{name}: {text}" for text in found))
        wanted = self.office.recipe.model
        return replace(wanted, start=(*wanted.starts, name))


def exact_ids(office: Office, asked: Ids) -> list[str]:
    """The ids under which a store deletes these rows of the training data.

    Raises:
        Refused: a row is none that the store's recipe trains on, or others stand under its id and would go, too.
    """
    from llm_unlearn.exact.rows import identified

    method = office.recipe.method
    assert isinstance(method, Exact)
    column, wanted = office.service.data.id, set(asked)
    under: dict[str, list[RowId]] = {}
    elsewhere: dict[str, int] = {}
    for source in office.recipe.sources.values():
        for id, row in zip(*identified(source, method), strict=True):
            if office.is_training(source):
                under.setdefault(id, []).append(row[column])
            else:
                elsewhere[id] = elsewhere.get(id, 0) + 1
    mine = {id: names for id, names in under.items() if wanted & set(names)}
    if lost := wanted - {name for names in mine.values() for name in names}:
        some = ", ".join(sorted(map(str, lost))[:SHOWN])
        raise Refused(f"rows {some}: {office.service.recipe} does not train on them, so its store has nothing of them to delete.")
    more = [str(name) for names in mine.values() for name in names if name not in wanted]
    others = sum(elsewhere.get(id, 0) for id in mine)
    if more or others:
        named = f"rows {', '.join(more[:SHOWN])}" + (f" and {len(more) - SHOWN} more" if len(more) > SHOWN else "") if more else ""
        rest = f"{others} rows of other data" if others else ""
        by = f"column {method.id!r}" if method.id else "what they say"
        raise Refused(
            f"the store deletes rows by {by}, and {' and '.join(filter(None, (named, rest)))} would go with these. "
            + ("Ask for all of them together, or make" if not others else "Make")
            + " a store whose method.id names single rows."
        )
    return list(mine)


def _once(parts: Iterable[Ids], more: Ids) -> tuple[RowId, ...]:
    return tuple(dict.fromkeys([*(one for ids in parts for one in ids), *more]))
