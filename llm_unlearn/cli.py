"""The verbs of the command line. Heavy imports stand inside the verb that needs them, so that help and refusals come at once."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llm_unlearn import alternates, candidates, catalogue, compare, folder, many, recipe, sections
from llm_unlearn.auditing import command as auditing
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.exact import command
from llm_unlearn.options import count, takes_models, takes_recipe
from llm_unlearn.requests import cli as requests_cli
from llm_unlearn.source import is_recipe, missing
from llm_unlearn.spec import Refused, schema
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST, locate, shipped

EPILOG = "A recipe can also be launched itself, on one process or many: accelerate launch RECIPE [key=value ...]"


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, or ended by the recipe's own bound · 1 a loss was not finite · 2 refused, with the reason on standard error ·
        130 interrupted.
    """
    parser = _parser()
    options, more = parser.parse_known_args(words)
    if more and (any(word.startswith("-") for word in more) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # settings may stand before and after options
        options.overrides = [*options.overrides, *more]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels whenever peft imports it
    # Threads that wait for each other spin by default: beside any other load, a small model then runs many times slower on a CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options.words = list(sys.argv[1:] if words is None else words)
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        return verb(options)
    except Refused as error:
        if int(os.environ.get("RANK", "0")):
            time.sleep(10)  # the first process says the same and ends all; who is still here then has a reason of its own
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def launch(file: str) -> None:
    """What the last line of a recipe calls when `accelerate launch` runs the recipe as a program."""
    if multiprocessing.parent_process() is None:  # a data worker that imports the main file again must not start a second run
        sys.exit(main(["run", file, *sys.argv[1:]]))


def cache_folder() -> Path:
    """Where embedded models and tables are kept: $LLM_UNLEARN_CACHE, else llm_unlearn in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLM_UNLEARN_CACHE") or Path(home) / "llm_unlearn")


def config_folder() -> Path:
    """Where this user's signing key is kept: llm_unlearn in the user's configuration."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llm_unlearn"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "llm-unlearn", description="Make a language model forget given data, and measure what is left.", epilog=EPILOG
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(verb=function)
        return added

    one = verb("run", run, "carry out a recipe: train, measure, report")
    takes_recipe(one)
    one.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this recipe's run folder")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier run in the run folder")
    takes_recipe(verb("plan", plan, "say what a run will do, and write nothing"))
    command.add(verb, cache_folder)
    auditing.add(verb, cache_folder)
    one = verb("evaluate", evaluate, "run a suite on a model, before and after an adapter, beside a retrained one")
    takes_models(one)
    one = verb("compare", compare_runs, "put finished runs or evaluations beside each other: table, JSON, one HTML page")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, an evaluation's folder, a folder above, a quoted glob")
    one.add_argument("--output", type=Path, help="folder for comparison.json and comparison.html")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in the output folder")
    one.add_argument("--common", action="store_true", help="of runs measured by different suites, compare what is the same")
    one = verb("methods", methods, "list the methods of a folder of recipes, and what each needs")
    one.add_argument("folder", nargs="?", metavar="FOLDER", default=catalogue.METHODS, help=f"default: {catalogue.METHODS}")
    one = verb(
        "bench", bench, "run every recipe of a folder with several seeds on one suite, and rank them; goes on where it ended"
    )
    one.add_argument("folder", metavar="FOLDER", help=f"a folder of recipes, such as {catalogue.METHODS}")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in every recipe, such as train.steps=50")
    one.add_argument("--suite", required=True, help="the suite that every run is measured by, such as eval/quick.yaml")
    one.add_argument("--seeds", type=count, default=3, metavar="N", help="seeds 0 to N-1 of each recipe; default 3")
    one.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for runs and leaderboard; default runs/bench")
    one.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time; default 1")
    one.add_argument(
        "--write", type=Path, metavar="PAGE", help="the leaderboard's page; default leaderboard.md in the output folder"
    )
    one = verb("alternates", write_alternates, "let the model write other answers to the questions of a set, for dpo and idk")
    takes_recipe(one)
    one.add_argument("--stream", default="forget", help="the set that is asked: forget (default) or retain")
    one.add_argument("--k", type=int, default=5, help="other answers to each question (default 5)")
    one.add_argument("--temperature", type=float, default=1.0, help="how far a draw may leave the likeliest words (default 1.0)")
    one.add_argument(
        "--prompt",
        default=alternates.QUESTION,
        help="question (default): ask the question itself, the true answer forbidden · written: ask in words for different facts, "
        "for a model that follows instructions · FILE.txt: your own words, with {question} and {answer}",
    )
    one.add_argument("--output", type=Path, metavar="FILE.jsonl", help="the data set; without it, RECIPE_alternates.jsonl here")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    requests_cli.add_verbs(verb("requests", serve_requests, "deletion requests: add, list, run, verify, export"))
    one = verb("new", new, "write a recipe to start from")
    one.add_argument("name", metavar="NAME", help="the recipe is written to NAME.yaml")
    one = verb("schema", show_schema, "print the JSON Schema of recipes, or of suites, for editors")
    one.add_argument("kind", nargs="?", choices=("recipe", "suite"), default="recipe")
    return parser


def run(options: argparse.Namespace) -> int:
    path = locate(str(options.recipe))
    wanted = recipe.load(path, options.overrides)
    suite = suites.load(locate(wanted.evaluation.suite, path)) if wanted.evaluation else None
    if folder.check(wanted, options.resume, options.overwrite):
        print(f"{wanted.output}: this run is finished; see {Path(wanted.output) / folder.REPORT}")
        return 0
    named = (wanted.evaluation.retrained if wanted.evaluation else None) or (suite.retrained if suite else None)
    outcome = command.engine(wanted)(
        wanted, suite, cache=cache_folder(), resume=options.resume, overwrite=options.overwrite,
        retrained=_made(named) if named else None,
    )  # fmt: skip
    if outcome.status == "interrupted":
        print(
            f"interrupted after step {outcome.step}; the same command with --resume goes on from there.",
            file=sys.stderr,
        )
        return 130
    if outcome.reason:
        kept = f"the weights after step {outcome.kept} were kept" if outcome.kept else "the model was left as it was"
        print(f"{outcome.status}: {outcome.reason}; {kept}.", file=sys.stderr)
    return int(outcome.broken)


def plan(options: argparse.Namespace) -> int:
    path = locate(str(options.recipe))
    wanted = recipe.load(path, options.overrides)
    if wanted.evaluation:
        suites.load(locate(wanted.evaluation.suite, path))
    from llm_unlearn.plan import plan as make

    print(make(wanted, cache_folder()))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    suite = suites.load(locate(options.suite), options.overrides)
    if candidates.is_many(options.model, options.adapter, options.before):
        return _evaluate_many(suite, options)
    options.model, options.adapter = options.model[0], (options.adapter or [None])[0]
    if options.output and (options.output / folder.RESULTS).exists() and not options.overwrite:
        raise Refused(
            f"--output: {options.output} has an {folder.RESULTS} already. Nothing was changed; add --overwrite, or choose another."
        )
    model = sections.Model(base=folder.model_in(options.model), adapter=None, quantize=options.quantize)
    asked: dict[str, tuple[sections.Model, str | None]] = {"model": (model, None)}
    if options.adapter:
        asked = {"before": (model, None), "after": (model, folder.adapter_in(options.adapter))}
    if retrained := options.retrained or suite.retrained:
        asked["retrained"] = (replace(model, base=retrained), None)  # in its place among the columns
    for option, name in (("--model", model.base), ("--adapter", options.adapter), ("--retrained", retrained)):
        if name and missing(name):
            raise Refused(f"{option}: no such folder: {name} (looked from {Path.cwd()}).")
    from llm_unlearn.run import evaluate as carry_out

    if retrained:
        asked["retrained"] = (replace(model, base=_made(retrained)), None)
    carry_out(suite, options.suite, asked, cache=cache_folder(), output=options.output)
    return 0


def _evaluate_many(suite: suites.Suite, options: argparse.Namespace) -> int:
    retrained = options.retrained or suite.retrained
    if retrained and missing(retrained):
        raise Refused(f"--retrained: no such folder: {retrained} (looked from {Path.cwd()}).")
    asked = many.Asked(
        suite=suite,
        suite_name=options.suite,
        candidates=candidates.candidates_of(options.model, options.adapter, options.before, options.quantize),
        retrained=_made(retrained) if retrained else None,
        output=options.output,
        overwrite=options.overwrite,
    )
    return many.evaluate(asked, cache_folder())


def _made(retrained: str) -> str:
    """A model's folder or id; a recipe's model is made now."""
    if not is_recipe(retrained):
        return folder.model_in(retrained)
    from llm_unlearn.retrained import found

    return str(found(retrained, cache_folder()))


def compare_runs(options: argparse.Namespace) -> int:
    compare.compare(options.runs, options.output, overwrite=options.overwrite, common=options.common)
    return 0


def methods(options: argparse.Namespace) -> int:
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
    return 0


def bench(options: argparse.Namespace) -> int:
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
        overrides=options.overrides,
        command=shlex.join(["llm-unlearn", *options.words]),
    )
    return room.bench(asked, os.environ)


def write_alternates(options: argparse.Namespace) -> int:
    wanted = alternates.check(
        recipe.load(locate(str(options.recipe)), options.overrides),
        stream=options.stream, k=options.k, temperature=options.temperature, prompt=options.prompt,
        output=options.output or Path(f"{options.recipe.stem}_alternates.jsonl"), overwrite=options.overwrite,
    )  # fmt: skip
    alternates.make(wanted, cache_folder())
    return 0


def serve_requests(options: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Refused("requests: expected one process, found several; start it without `accelerate launch`.")
    desk: Callable[[argparse.Namespace, Path, Path], int] = options.desk
    return desk(options, cache_folder(), config_folder())


def new(options: argparse.Namespace) -> int:
    path = Path(options.name if options.name.endswith((".yaml", ".yml")) else f"{options.name}.yaml")
    if path.exists():
        raise Refused(f"{path}: exists already. Nothing was changed; choose another name.")
    pattern = (shipped() / "recipes" / "forget_lora.yaml").read_text(encoding="utf-8")
    body = pattern[pattern.index(LAUNCH_FIRST) :].replace("output: runs/forget_lora", f"output: runs/{path.stem}")
    assert body.rstrip().endswith(LAUNCH_LAST)
    folder.write(path, f"# What this makes a model forget, and how.\n#   accelerate launch {path} [key=value ...]\n{body}")
    print(f"{path}\nnext: llm-unlearn plan {path}")
    return 0


def show_schema(options: argparse.Namespace) -> int:
    print(json.dumps(schema(recipe.Recipe if options.kind == "recipe" else suites.Suite), indent=1))
    return 0
