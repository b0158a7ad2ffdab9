"""One suite on many models, one after the other: each is measured beside its base, and all are compared.

OUTPUT/
    NAME/evaluation.json    of each model, with report.html, and a copy of the run's log.jsonl
    comparison.json, comparison.html
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import compare, folder, sections
from llm_unlearn.candidates import Candidate, as_it_is_now
from llm_unlearn.durable import make_folder
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.places import check_place, no_way_out
from llm_unlearn.reply import DONE, UNFIT, Reply
from llm_unlearn.spec import Refused, fingerprint, reason
from llm_unlearn.troubles import is_out_of_memory
from llm_unlearn.written import object_in

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llm_unlearn.look import Looks, Seen


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and where it goes."""

    suite: Suite
    suite_name: str
    candidates: Sequence[Candidate]
    retrained: str | None
    output: Path | None
    overwrite: bool
    texts: bool = True
    """Keep questions and answers, too."""


def evaluate(asked: Asked, cache: Path) -> Reply:
    """Measure what is not measured yet, one model after the other, and compare all.

    Returns:
        DONE, all are there · UNFIT, some could not be loaded or measured, and were named; with the comparison.

    Raises:
        Refused: the output folder holds other evaluations, or the models cannot be measured alike; nothing was changed.
    """
    from llm_unlearn.look import Looks
    from llm_unlearn.report.likeness import Run
    from llm_unlearn.run import start

    names = compare.names_of([one.place for one in asked.candidates])
    folders = dict(zip(names, _folders(asked.output, names), strict=True))
    accelerator = start(asked.candidates[0].model)
    known = _known(asked, names, folders, accelerator, cache)
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    look = Looks(asked.suite, accelerator, cache)
    runs: list[Run] = []
    failed: list[str] = []
    for place, (name, one) in enumerate(zip(names, asked.candidates, strict=True)):
        home = folders[name]
        if failed:
            accelerator.free_memory()
        try:
            results = known.get(name)
            if results is None and (now := as_it_is_now(one)).place != one.place:
                one, (name, home) = now, _renamed(asked, now, place)
            if main:
                print(f"[{place + 1}/{len(names)}] {name}{': measured before' if results else ''}", flush=True)
            if new := results is None:
                results, looks = _measure(asked, one, look)
        except Exception as error:
            if not (why := _why_not(error, accelerator)):
                raise
            failed.append(f"{name}: {why}")
            continue
        if main:
            if new:
                _keep(results, asked.suite, looks, one, home)
            runs.append(Run(name, str(home or one.place), results, folder.steps_in(one.run / folder.LOG)))
    comparison = compare.publish(runs, asked.output) if main and runs else None
    if main and failed:
        print("\n".join(f"not measured: {line}" for line in failed), file=sys.stderr)
    accelerator.wait_for_everyone()
    return Reply(UNFIT if failed else DONE, {"comparison": comparison, "not_measured": failed})


def _folders(output: Path | None, names: Sequence[str]) -> Iterator[Path | None]:
    """Where each model's evaluation goes: names without what a path or another system would take amiss."""
    taken: set[str] = set()
    for name in names:
        parts = [re.sub(r"[^\w.\-]+", "-", part).strip("-") for part in name.split("/")]
        start = unique = "/".join(part for part in parts if part.strip(".")) or "model"
        count = 1
        while unique in taken:
            count += 1
            unique = f"{start}-{count}"
        taken.add(unique)
        yield output / unique if output else None


def _renamed(asked: Asked, one: Candidate, place: int) -> tuple[str, Path | None]:
    """Name and folder of a run that has gone on since it was named."""
    places = [one.place if i == place else other.place for i, other in enumerate(asked.candidates)]
    names = compare.names_of(places)
    return names[place], list(_folders(asked.output, names))[place]


def _why_not(error: Exception, accelerator: Accelerator) -> str:
    """Why one model could not be measured, where the next may be all the same; "" where none can. Of many processes each would have
    to know of the error of one."""
    if isinstance(error, Refused):
        return str(error)
    if accelerator.num_processes > 1:
        return ""
    lacking = isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno is None)
    return f"out of memory ({reason(error)})" if is_out_of_memory(error) else reason(error) if lacking else ""


def _asked_of(asked: Asked, one: Candidate) -> dict[str, tuple[sections.Model, str | None]]:
    """Column -> model and adapter, the retrained model among them."""
    if not asked.retrained:
        return one.columns
    return {**one.columns, "retrained": (sections.another(one.model, asked.retrained), None)}


def _known(
    asked: Asked, names: Sequence[str], folders: Mapping[str, Path | None], accelerator: Accelerator, cache: Path
) -> dict[str, dict[str, Any]]:
    """The evaluations that the output folder holds already: of the same suite, and of the same weights.

    Raises:
        Refused: one is of another suite or other weights, a comparison there is of other runs, or the models compute in
            different precisions, of which one process can have only one.
    """
    from llm_unlearn.models.load import dtype_of

    precisions = {str(dtype_of(one.model, accelerator.device)).removeprefix("torch."): one.place for one in asked.candidates}
    if len(precisions) > 1:
        found = ", ".join(f"{name} ({place})" for name, place in precisions.items())
        raise Refused(f"--model: the models compute in {found}; evaluate each precision by itself, and compare the folders.")
    known: dict[str, dict[str, Any]] = {}
    if asked.output:
        check_place(asked.output, "--output")
        no_way_out(asked.output)
    problems = _other_comparison(asked.output, asked.overwrite)
    for name, one in zip(names, asked.candidates, strict=True):
        place = folders[name]
        if place is None or not (place / folder.RESULTS).is_file():
            continue
        try:
            results = folder.results_in(place)
            same = results["suite_hash"] == fingerprint(asked.suite) and _identities(asked, one, accelerator, cache) == {
                column: model["identity"] for column, model in results["models"].items()
            }
        except Refused:
            same = False
        if same:
            known[name] = results
        elif not asked.overwrite:
            problems.append(
                f"--output: {place / folder.RESULTS} is of another suite or of other weights than {one.place}. Nothing was "
                "changed; add --overwrite to replace it, or choose another folder."
            )
    if problems:
        raise Refused("\n".join(problems))
    return known


def _other_comparison(output: Path | None, overwrite: bool) -> list[str]:
    """A comparison of runs that lie elsewhere, or a single evaluation, is not replaced unasked; that of this folder is."""
    if output is None or overwrite:
        return []
    if (output / folder.RESULTS).is_file():
        return [f"--output: {output} has an {folder.RESULTS} already. Nothing was changed; add --overwrite, or choose another."]
    file = output / compare.RESULTS
    if not file.is_file():
        return []
    try:
        places = [Path(run["folder"]).absolute() for run in object_in(file, "expected a comparison")["runs"]]
    except (ValueError, KeyError, TypeError):
        places = [Path("/")]
    if all(place.is_relative_to(output.absolute()) for place in places):
        return []
    return [f"--output: {file} compares runs that lie elsewhere. Nothing was changed; add --overwrite, or choose another folder."]


def _identities(asked: Asked, one: Candidate, accelerator: Accelerator, cache: Path) -> dict[str, str]:
    """What each column's numbers depend on, from files alone."""
    from llm_unlearn.bases import resolve_base
    from llm_unlearn.models.load import dtype_of, parts_of, read_tokenizer

    found = {}
    for column, (asked_model, adapter) in _asked_of(asked, one).items():
        model = resolve_base(asked_model, cache)
        parts = parts_of(model, read_tokenizer(model), dtype_of(model, accelerator.device), adapter)
        found[column] = fingerprint(*parts)
    return found


def _measure(asked: Asked, one: Candidate, look: Looks) -> tuple[dict[str, Any], dict[str, Seen]]:
    """One candidate beside its base and the retrained model: what is said of it, and what it said."""
    from llm_unlearn.compatibility.checks import problems_of_run
    from llm_unlearn.compatibility.models import check_columns
    from llm_unlearn.look import attacked
    from llm_unlearn.results import results_of

    columns = _asked_of(asked, one)
    check_columns(columns, asked.suite, look.cache)
    if problems := problems_of_run(one.run / folder.RECIPE, asked.suite, asked.suite_name):
        raise Refused(problems[0])
    if one.under_way:
        looks = look({column: wanted for column, wanted in columns.items() if column not in ("after", "model")})
        looks["after"] = see_checkpoint(one, look)
        attacks = []  # a checkpoint cannot be loaded afresh
    else:
        looks = look(columns, one.place)
        attacks = attacked(asked.suite, looks, look.accelerator, look.cache)
    return results_of(
        asked.suite,
        looks,
        attacks,
        title=one.place,
        run=_facts(one, looks),
        named=sections.Evaluation(suite=asked.suite_name, texts=None if asked.texts else False),
    ), looks


def see_checkpoint(one: Candidate, look: Looks) -> Seen:
    """Look at a run as it was at its newest checkpoint, which holds only the weights that are trained."""
    from llm_unlearn.bases import resolve_base
    from llm_unlearn.look import Look
    from llm_unlearn.models.load import Loaded, add_adapter, dtype_of, load, parts_of
    from llm_unlearn.models.sound import weights_in
    from llm_unlearn.models.trainable_weights import choose_weights
    from llm_unlearn.training.checkpoint import WEIGHTS, restore

    assert one.under_way, "of a checkpoint"
    if one.under_way.adapter and one.under_way.adapter.init == "fila":
        raise Refused(f"{one.place}: with init fila the base changes too, and a checkpoint has none of it; finish the run first.")
    model, device = resolve_base(one.under_way, look.cache), look.accelerator.device
    loaded = load(model, device)
    net = loaded.model
    if model.adapter:
        net = add_adapter(net, model.adapter, seed=0)  # the checkpoint replaces what the seed draws
    else:
        choose_weights(net, model.trainable)
    restore(net, weights_in(Path(one.place) / WEIGHTS))
    now = Loaded(net.eval(), loaded.tokenizer, parts_of(model, loaded.tokenizer, dtype_of(model, device), one.adapter))
    mine = Look(look.suite, now, look.accelerator, look.cache, look.controls, encoded=look.encoded)
    return mine.seen(now, one.place, one.place, model, one.adapter)


def _facts(one: Candidate, looks: Mapping[str, Seen]) -> dict[str, Any] | None:
    """How the run went, if the run folder says so of these very weights."""
    try:
        results = folder.results_in(one.run)
    except Refused:
        return None
    same = "after" in looks and results["models"].get("after", {}).get("identity") == looks["after"].target.identity
    return results.get("run") if same else None


def _keep(results: dict[str, Any], suite: Suite, looks: Mapping[str, Seen], one: Candidate, place: Path | None) -> None:
    """Write one evaluation as soon as it is there, so that nothing is asked twice."""
    from llm_unlearn.report.headline import headline
    from llm_unlearn.results import keep

    print(f"  {headline(results)}", flush=True)
    if place:
        make_folder(place)
        log = one.run / folder.LOG
        if log.is_file():
            shutil.copyfile(log, place / folder.LOG)
        keep(results, suite, looks, place, log if results["run"] else None)
