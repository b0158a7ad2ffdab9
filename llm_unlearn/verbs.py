"""What the verbs of the command line do. Heavy imports stand inside the verb that needs them, so that refusals come at once."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn import alternates, at_work, candidates, catalogue, compare, folder, many, recipe, sections
from llm_unlearn.auditing import request as auditing
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.exact import command
from llm_unlearn.outward import without_secrets
from llm_unlearn.reply import DONE, INTERRUPTED, UNFIT, Reply
from llm_unlearn.source import is_recipe, missing
from llm_unlearn.spec import Refused, dotted, schema
from llm_unlearn.starter.verb import MAIN
from llm_unlearn.thresholds import problems, reason_of
from llm_unlearn.tree import locate

if TYPE_CHECKING:
    from llm_unlearn.training.guard import Outcome


def run(options: argparse.Namespace) -> Reply:
    path = locate(str(options.recipe))
    wanted = recipe.load(path, options.overrides)
    home, first = Path(wanted.output), is_first(options.environment)
    outcome = carry_out(wanted, path, options.environment, options.cache, resume=options.resume, overwrite=options.overwrite)
    if outcome is None:
        reply = _ended(wanted, options, first)
        if first:
            print(f"{home}: this run is finished; see {home / folder.REPORT}")
        return reply
    if outcome.status == "interrupted":
        if first:
            said = f"interrupted after step {outcome.step}; the same command with --resume goes on from there."
            print(said, file=sys.stderr)
        return Reply(INTERRUPTED, {"output": wanted.output, "step": outcome.step})
    if outcome.reason and first:
        kept = f"the weights after step {outcome.kept} were kept" if outcome.kept else "the model was left as it was"
        print(f"{outcome.status}: {outcome.reason}; {kept}.", file=sys.stderr)
    ended = {"status": outcome.status, "steps": outcome.step, "kept_step": outcome.kept, "reason": outcome.reason}
    reply = _ended(wanted, options, first)
    return Reply(UNFIT if outcome.broken else reply.status, {"run": ended, **reply.facts})


def carry_out(
    wanted: recipe.Recipe, path: Path, environment: MutableMapping[str, str], cache: Path, *, resume: bool, overwrite: bool
) -> Outcome | None:
    """A recipe in its run folder, whoever asks for it; None where it was finished before.

    Args:
        path: where the recipe stands.

    Raises:
        Refused: something that it names cannot be used, or the folder holds another run.
    """
    suite, named = suite_of(wanted, path)
    home = Path(wanted.output)
    at_work.alone(home)
    if folder.check(wanted, resume, overwrite):
        if is_first(environment):
            folder.tidy(home)
        return None
    _check_compatibility(wanted, suite, named, path, cache)
    if wanted.track:  # the one tracker whose place only its environment says
        environment.setdefault("TRACKIO_DIR", str((home / folder.TRACKERS / "trackio").absolute()))
    made(wanted.model.base, cache)
    retrained = made(named, cache) if named else None
    return command.engine(wanted)(wanted, suite, cache=cache, resume=resume, overwrite=overwrite, retrained=retrained)


def _check_compatibility(
    wanted: recipe.Recipe, suite: suites.Suite | None, retrained: str | None, path: Path, cache: Path
) -> list[str]:
    """Check that suite and retrained model fit the recipe (`compatibility/`), or refuse."""
    if not suite or not wanted.evaluation:
        return []
    from llm_unlearn.compatibility import checks

    return checks.check(wanted, suite, wanted.evaluation.suite, retrained, str(path), cache)


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the first of the processes that were launched together, which speaks for all."""
    return not int(environment.get("RANK", "0"))


def _ended(wanted: recipe.Recipe, options: argparse.Namespace, first: bool) -> Reply:
    """What a run's folder says of how it ended, the same whenever it is asked."""
    home = Path(wanted.output)
    results = folder.results_in(home) if (home / folder.RESULTS).is_file() else {}
    asked, ran = bool(wanted.evaluation and wanted.evaluation.thresholds), results.get("run") or {}
    failed = reason_of(results.get("thresholds", ())) if asked else ""
    if failed and first:
        print(f"thresholds do not hold: {failed}.", file=sys.stderr)
    facts = {"evaluation": folder.wordless(results)} if options.json and results else {}
    broken = ran.get("broken") if results else folder.is_broken(home)
    return Reply(UNFIT if broken or failed else DONE, {"output": wanted.output, **facts})


def suite_of(wanted: recipe.Recipe, path: Path) -> tuple[suites.Suite | None, str | None]:
    """A recipe's suite, and the retrained model that it is compared with.

    Raises:
        Refused: a threshold reads nothing that the suite has.
    """
    if not (named := wanted.evaluation):
        return None, None
    suite = suites.load(locate(named.suite, path))
    control = named.retrained or suite.retrained
    wrong = problems(named.thresholds or (), suite, named.suite, control)
    if lines := [f"{path}: {dotted(('evaluation', 'thresholds', *keys))}: {text}" for keys, text in wrong]:
        raise Refused("\n".join(lines))
    return suite, control


def demo(options: argparse.Namespace) -> Reply:
    """The main recipe, from any folder; an earlier demo is gone on with, or said to be there."""
    options.recipe, options.resume = Path(MAIN), not options.overwrite
    reply = run(options)
    if reply.status == DONE:
        print(f"next: llm-unlearn evaluate eval/audit.yaml --model embedded:target --adapter {reply.facts['output']}")
        print("      llm-unlearn new my_recipe      # for a model and data of your own")
    return reply


def plan(options: argparse.Namespace) -> Reply:
    path = locate(str(options.recipe))
    wanted = recipe.load(path, options.overrides)
    suite, retrained = suite_of(wanted, path)
    notes = _check_compatibility(wanted, suite, retrained, path, options.cache)
    from llm_unlearn.plan import plan as make

    found = make(wanted, options.cache, show_example=options.show_example)
    print("\n".join([found.text, *(f"note       {note}" for note in notes)]))
    return Reply(facts=found.facts | {"notes": notes})


def audit(options: argparse.Namespace) -> Reply:
    wanted = recipe.load(locate(str(options.recipe)), options.overrides)
    asked = auditing.check(wanted, canaries=options.canaries, guesses=options.guesses, seed=options.seed, output=options.output)
    if found := auditing.held(asked, options.overwrite):
        if is_first(options.environment):  # it may have been killed as it removed what it needed no more, with the key
            folder.tidy(asked.output)
        print(auditing.said(found, asked.output))
        return Reply(facts=found)
    from llm_unlearn.auditing.trial import trial

    made(wanted.model.base, options.cache)
    if not trial(asked, options.cache, options.overwrite):
        words = "the same command without --overwrite" if options.overwrite else "the same command"
        print(f"interrupted; {words} goes on from there.", file=sys.stderr)
        return Reply(INTERRUPTED)
    return Reply(facts=auditing.held(asked, overwrite=False) or {})


def evaluate(options: argparse.Namespace) -> Reply:
    suite = suites.load(locate(options.suite), options.overrides)
    if candidates.is_many(options.model, options.adapter, options.before):
        return _evaluate_many(suite, options)
    options.model, options.adapter = options.model[0], (options.adapter or [None])[0]
    if options.output:
        folder.check_output(options.output, options.overwrite)
    model = sections.Model(base=folder.model_in(options.model), adapter=None, quantize=options.quantize)
    asked: dict[str, tuple[sections.Model, str | None]] = {"model": (model, None)}
    if options.adapter:
        asked = {"before": (model, None), "after": (model, folder.adapter_in(options.adapter))}
    if retrained := options.retrained or suite.retrained:
        asked["retrained"] = (model, None)  # in its place among the columns
    for option, name in (("--model", model.base), ("--adapter", options.adapter), ("--retrained", retrained)):
        if name and missing(name):
            raise Refused(f"{option}: no such folder: {name} (looked from {Path.cwd()}).")
    for run_folder in (options.adapter, options.model):
        _check_run(run_folder, suite, options.suite)
    from llm_unlearn.run import evaluate as measure

    _check_untrained(retrained, model, suite, options.cache)
    made(model.base, options.cache)
    if retrained:
        asked["retrained"] = (sections.another(model, made(retrained, options.cache)), None)
    results = measure(suite, options.suite, asked, cache=options.cache, output=options.output, texts=not options.no_text)
    return Reply(facts={"evaluation": folder.wordless(results)})


def _check_run(place: str | None, suite: suites.Suite, name: str) -> None:
    """Check that a suite fits the recipe of a run folder, if it is one whose data is still there.

    Raises:
        Refused: it measures other data.
    """
    file = Path(place or "").expanduser() / folder.RECIPE
    if not place or not file.is_file():
        return
    from llm_unlearn.compatibility import checks

    problems = checks.problems_of_run(file, suite, name)
    if problems:
        raise Refused("\n".join(f"{place}: {problem}" for problem in problems))


def _check_untrained(retrained: str | None, model: sections.Model, suite: suites.Suite, cache: Path) -> None:
    """Check a retrained model that a recipe has yet to train, before it does.

    Raises:
        Refused: it could not be compared with the model.
    """
    if retrained and is_recipe(retrained):
        from llm_unlearn.compatibility import models as compatibility

        models = {"model": model, "retrained": compatibility.control_of(model, retrained)}
        compatibility.check_models(models, suite, f"retrained: {retrained}", cache)


def _evaluate_many(suite: suites.Suite, options: argparse.Namespace) -> Reply:
    retrained = options.retrained or suite.retrained
    if retrained and missing(retrained):
        raise Refused(f"--retrained: no such folder: {retrained} (looked from {Path.cwd()}).")
    measured = candidates.candidates_of(options.model, options.adapter, options.before, options.quantize)
    _check_untrained(retrained, measured[0].model, suite, options.cache)
    asked = many.Asked(
        suite=suite,
        suite_name=options.suite,
        candidates=measured,
        retrained=made(retrained, options.cache) if retrained else None,
        output=options.output,
        overwrite=options.overwrite,
        texts=not options.no_text,
    )
    return many.evaluate(asked, options.cache)


def made(retrained: str, cache: Path) -> str:
    """A model's folder or id; a recipe's model is made now."""
    if not is_recipe(retrained):
        return folder.model_in(retrained)
    from llm_unlearn.retrained import found

    return str(found(retrained, cache))


def compare_runs(options: argparse.Namespace) -> Reply:
    found = compare.compare(options.runs, options.output, overwrite=options.overwrite, common=options.common)
    return Reply(facts={"comparison": found})


def methods(options: argparse.Namespace) -> Reply:
    found: list[tuple[catalogue.Method, recipe.Recipe]] = []
    problems: list[str] = []
    for method in catalogue.methods_in(options.folder):
        try:
            found.append((method, recipe.load(method.path, check=False)))
        except Refused as error:
            problems += str(error).splitlines()
    from llm_unlearn.report.listing import print_methods

    if found:
        print_methods(found)
    if problems:  # those that can be read were listed
        raise Refused("\n".join(problems))
    return Reply(facts={"methods": [catalogue.facts_of(*one) for one in found]})


def bench(options: argparse.Namespace) -> Reply:
    from llm_unlearn import bench as room

    suite = locate(options.suite)
    asked = room.Asked(
        methods=catalogue.methods_in(options.folder),
        suite_name=options.suite,
        suite_path=suite,
        suite=suites.load(suite),
        seeds=options.seeds,
        output=options.output,
        page=options.write or options.output / "leaderboard.md",
        jobs=options.jobs,
        cache=options.cache,
        overrides=options.overrides,
        command=without_secrets(shlex.join(["llm-unlearn", *options.words])),
    )
    return room.bench(asked, options.environment)


def write_alternates(options: argparse.Namespace) -> Reply:
    wanted = alternates.check(
        recipe.load(locate(str(options.recipe)), options.overrides),
        stream=options.stream, k=options.k, temperature=options.temperature, prompt=options.prompt,
        output=options.output or Path(f"{options.recipe.stem}_alternates.jsonl"), overwrite=options.overwrite,
        show_text=options.show_text,
    )  # fmt: skip
    alternates.make(wanted, options.cache)
    return Reply(facts={"output": str(wanted.output)})


def show_schema(options: argparse.Namespace) -> Reply:
    found = schema(recipe.Recipe if options.kind == "recipe" else suites.Suite)
    print(json.dumps(found, indent=1))
    return Reply(facts={"schema": found})
