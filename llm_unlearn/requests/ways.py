"""Ways of serving deletion requests: what a serving is given, what it must hand back, and the way of a recipe. Another way is
another class with `serve`, such as that of a store (`stores.py`); ledger, thresholds and certificates stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llm_unlearn import folder
from llm_unlearn.durable import make_folder, remove, whole
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.verdict import Number
from llm_unlearn.requests.certificate import files_of
from llm_unlearn.requests.derived import Ids, model_of, recipe_of, suite_of
from llm_unlearn.requests.judging import plainly
from llm_unlearn.requests.service import Office
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused, fingerprint


@dataclass(frozen=True)
class Work:
    """One serving: which rows a model is to forget, and where the result goes."""

    model: str
    requests: Mapping[int, Ids]
    """Request -> ids of its rows, of those that are served now."""
    earlier: Mapping[int, Ids]
    """The same of those that were fulfilled before: measured again, and not to be undone."""
    gone: Ids
    """Rows of other requests: nothing may teach them again. The same as often as a run goes on."""
    before: Sequence[Path]
    """Run folders whose result is the model now, in their order; none before the first."""
    output: Path
    """The run folder. If it is there, a serving that was killed goes on."""


@dataclass(frozen=True)
class Served:
    """What came of it."""

    numbers: list[Number]
    """Of one evaluation with the columns `before`, `after` and perhaps `retrained`; a request N is measured on `forget_N`."""
    before: list[dict[str, Any]]
    """The weights before: place, name, and SHA-256 of each file."""
    after: dict[str, Any]
    facts: dict[str, Any]
    """How it went: way, recipe and suite by hash, seed, steps, versions."""
    broken: str = ""
    """Why the result cannot be used, whatever was measured."""
    lasting: bool = False
    """The model has become this, whatever was measured: what was deleted does not come back."""


class Way(Protocol):
    """How requests are served. Called again with the same work after a kill, it goes on and does nothing twice."""

    def ready(self, before: Sequence[Path], known: Ids) -> None:
        """Look, before anything is claimed, whether what earlier runs left is there to go on from, and whether the suite fits.

        Args:
            known: ids of the training data.

        Raises:
            Refused: it is not, or does not. Nothing was changed.
        """
        ...

    def serve(self, work: Work) -> Served | None:
        """Carry it out; None when the user interrupted it.

        Raises:
            Refused: it cannot be carried out.
            Busy: another process is at work on the same weights.
        """
        ...


@dataclass(frozen=True)
class ByRecipe:
    """A run of the service's recipe on the rows, begun from what the runs before left."""

    office: Office
    cache: Path
    """Where the embedded models are."""

    def ready(self, before: Sequence[Path], known: Ids) -> None:
        needed = before if self.office.recipe.model.adapter else before[-1:]
        if lost := [path for path in needed if not path.is_dir()]:
            said = f"{lost[0]}: is not there, and the model now is what this run left. Put it back"
            raise Refused(f"{said}, or correct `output` of the service. Nothing was changed.")
        from llm_unlearn.compatibility import checks

        office = self.office  # of any row, as every serving has the same columns, sets and models
        wanted = recipe_of(office, office.model, known[:1], (), before, office.output)
        suite = suite_of(office, {0: known[:1]}, known[:1])
        control = (wanted.evaluation and wanted.evaluation.retrained) or suite.retrained
        checks.check(wanted, suite, office.suite_name, control, office.service.recipe, self.cache)

    def serve(self, work: Work) -> Served | None:
        forget = tuple(dict.fromkeys(one for ids in work.requests.values() for one in ids))
        gone = tuple(one for one in work.gone if one not in set(forget))
        wanted = recipe_of(self.office, work.model, forget, gone, work.before, work.output)
        suite = suite_of(self.office, {**work.earlier, **work.requests}, (*forget, *gone))
        if not folder.check(wanted, resume=True, overwrite=False):
            from llm_unlearn.run import run

            outcome = run(wanted, suite, cache=own_cache(work.output, self.cache), resume=True)
            if outcome.status == "interrupted":
                return None
        from llm_unlearn.results import without_texts

        without_texts(work.output)
        results = folder.results_in(work.output)
        facts = results["run"]
        known = {
            "way": "recipe",
            "recipe_hash": wanted.hash,
            "suite_hash": fingerprint(suite),
            "recipe": self.office.service.recipe,
        }
        known |= {key: facts[key] for key in ("seed", "status", "steps", "kept_step", "device", "precision", "versions")}
        after = folder.MODEL if wanted.model.adapter is None else folder.ADAPTER
        return Served(
            plainly(results["numbers"]),
            self._weights(wanted, work),
            part("output", f"{work.output.name}/{after}", work.output / after),
            known,
            str(facts["reason"] or "a loss was not finite") if facts["broken"] else "",
        )

    def _weights(self, wanted: Recipe, work: Work) -> list[dict[str, Any]]:
        """The files of the model before: its base, and the adapters that are merged into it."""
        from llm_unlearn.bases import resolve_base
        from llm_unlearn.models.load import folder_of

        def placed(name: str, at: Path) -> dict[str, Any]:
            ours = at.is_relative_to(work.output.parent)
            return part("output" if ours else "elsewhere", str(at.relative_to(work.output.parent)) if ours else name, at)

        base = wanted.model.base
        found = [placed(base, folder_of(resolve_base(wanted.model, self.cache).base, wanted.model.revision))]
        return found + [placed(name, folder_of(folder.adapter_in(name))) for name in wanted.model.starts]

    def model(self, name: str, before: Sequence[Path]) -> Model:
        """The model as the accepted runs left it, to be released."""
        return model_of(self.office.recipe.model, name, before)


def release(model: Model, output: Path, cache: Path) -> None:
    """Write a model, every adapter that it starts from merged, with its tokenizer, as `transformers` reads it.

    Raises:
        Refused: the model or an adapter cannot be read.
    """
    import torch

    from llm_unlearn.bases import resolve_base
    from llm_unlearn.models.load import load

    wanted = replace(resolve_base(model, cache), quantize=None)
    loaded = load(wanted, torch.device("cpu"), full_precision=True)
    with whole(output) as unfinished:
        loaded.causal.save_pretrained(str(unfinished))
        loaded.tokenizer.save_pretrained(str(unfinished))


def part(place: str, name: str, at: Path) -> dict[str, Any]:
    """Weights as a certificate names them."""
    return {"place": place, "name": name, "files": files_of(at)}


def own_cache(output: Path, cache: Path) -> Path:
    """A cache for this run alone, as tables hold the texts of the rows; the embedded models are shared."""
    scratch = _scratch(output)
    make_folder(scratch)  # with those above it: a ledger must not say more of a run than the disk
    (cache / "embedded").mkdir(parents=True, exist_ok=True)
    if not (scratch / "embedded").is_symlink():
        (scratch / "embedded").symlink_to((cache / "embedded").resolve(), target_is_directory=True)
    return scratch


def tidy(output: Path) -> None:
    """Remove what a run needed while it was under way: its cache, which holds texts of the rows, and checkpoints."""
    remove(_scratch(output))
    folder.tidy(output)


def _scratch(output: Path) -> Path:
    return output.with_name(f"{output.name}.scratch")


def withheld(error: Refused, texts: Sequence[str]) -> str:
    """An error's words, unless they repeat words of a row."""
    said, size = str(error), 12
    short = any(text in said for text in texts if 4 <= len(text) <= size)
    long = any(text[i : i + size] in said for text in texts if len(text) > size for i in range(0, len(text) - size + 1))
    return "the reason repeats words of the rows and is not kept; --show-text prints it" if short or long else said
