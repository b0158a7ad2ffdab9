"""The words of the command line: every verb, what it takes, and which function carries it out. Only what parses values is imported
here, so that help and wrong words are answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from llm_unlearn import option_values

EPILOG = "A recipe can also be launched itself, on one process or many: accelerate launch RECIPE [key=value ...]"
METHODS = "recipes/methods"
"""The shipped recipes of single methods."""
QUESTION = "question"
"""How `alternates` asks unless told otherwise: the question itself."""
SERVICE = "requests.yaml"
"""The service file that is meant where none is named."""
FORMATS = ("auto", "qa", "messages", "sharegpt", "alpaca", "text")
"""Of rows, for `new`; `starter/columns.py` says what they look like."""
STATES = ("pending", "running", "fulfilled", "needs attention", "withdrawn")
"""Of deletion requests; `requests/records.py` says what they mean."""
SCORE = 90.0
"""Likeness, of 100, from which a row counts as a repetition of a text."""
CODES = (
    "Exit status: 0 done · 1 some request needs attention (run), or something does not fit (verify) · 2 refused, and nothing was "
    "changed · 3 another process serves this model (run) · 70 a bug, please report it · 74 the machine could not · "
    "130 interrupted; the same command goes on."
)

Verb = Callable[[str, str, str], argparse.ArgumentParser]
"""(name, `module:function`, what it does in a line) -> the parser of its own words."""


def parser() -> argparse.ArgumentParser:
    """The whole grammar. What is parsed has `verb`, the `module:function` that takes it."""
    whole = argparse.ArgumentParser(
        "llm-unlearn", description="Make a language model forget given data, and measure what is left.", epilog=EPILOG
    )
    verb = _verbs(whole, None)
    one = verb("run", "verbs:run", "carry out a recipe: train, measure, report")
    _takes_recipe(one)
    how = one.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this recipe's run folder")
    how.add_argument("--overwrite", action="store_true", help="replace an earlier run in the run folder")
    one = verb("plan", "verbs:plan", "say what a run will do, and write nothing")
    _takes_recipe(one)
    one.add_argument("--show-example", action="store_true", help="also show the first example of each stream, targets marked")
    _exact(verb)
    _audit(verb)
    _takes_models(verb("evaluate", "verbs:evaluate", "run a suite on a model, before and after an adapter, beside a retrained one"))
    one = verb("compare", "verbs:compare_runs", "put finished runs or evaluations beside each other: table, JSON, one HTML page")
    one.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, an evaluation's folder, a folder above, a quoted glob")
    one.add_argument("--output", type=Path, help="folder for comparison.json and comparison.html")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in the output folder")
    one.add_argument("--common", action="store_true", help="of runs measured by different suites, compare what is the same")
    _show(verb)
    _many(verb)
    _sweep(verb)
    _alternates(verb)
    _push(verb)
    _requests(verb("requests", "", "deletion requests: add, list, run, verify, export"))
    _begin(verb)
    return whole


def _begin(verb: Verb) -> None:
    """What one needs on the first day."""
    one = verb("demo", "verbs:demo", "carry out the main recipe on the embedded default, in the folder where you are")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.steps=10")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier run in runs/forget_lora")
    one = verb("doctor", "doctor:doctor", "say whether this machine is ready: versions, devices, hub login, disk")
    one.add_argument("--online", action="store_true", help="also ask the hub whether the login is valid")
    one = verb("completion", "completion:completion", "print a script that lets a shell complete verbs, options and recipe keys")
    one.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    _new(verb)
    one = verb("schema", "verbs:show_schema", "print the JSON Schema of recipes, or of suites, for editors")
    one.add_argument("kind", nargs="?", choices=("recipe", "suite"), default="recipe")


def _new(verb: Verb) -> None:
    one = verb("new", "starter.verb:new", "write a recipe; with --model, --forget and --retain, one for your model and data")
    one.epilog = (
        "With a model and data, NAME_suite.yaml is written, too: a suite that measures these data. Of the model only config and "
        "tokenizer are read. The settings depend on its size and kind and on the rows; each is written with its reason."
    )
    one.add_argument("name", metavar="NAME", help="the recipe is written to NAME.yaml")
    one.add_argument("--model", metavar="BASE", help="the model that is to forget: a hub id or a folder")
    data = "a json, jsonl, csv, parquet or txt file, a folder, or ID[:CONFIG[:SPLIT]] of a hub"
    one.add_argument("--forget", metavar="DATA", help=f"rows to be forgotten: {data}")
    one.add_argument("--retain", metavar="DATA", help="rows to be kept")
    one.add_argument("--holdout", metavar="DATA", help="rows of the same kind that the model never saw: how far to forget")
    one.add_argument("--format", choices=FORMATS, default="auto", help="how rows are read; default: told from their columns")


def _verbs(parser: argparse.ArgumentParser, epilog: str | None) -> Verb:
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, epilog=epilog)
        added.set_defaults(verb=function, json=False, debug=False)
        if function:  # a group of verbs does nothing itself
            added.add_argument("--json", action="store_true", help="for scripts: one JSON object, and words to standard error")
            added.add_argument("--debug", action="store_true", help="where it ends in an error, show the traceback, too")
        return added

    return verb


def _show(verb: Verb) -> None:
    one = verb("show", "following.command:show", "say what a run is and where it stands, finished or under way")
    one.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, store, audit, bench, sweep or comparison")
    one.add_argument("--follow", action="store_true", help="show it again and again until the run ends; Ctrl-C leaves it alone")


def _exact(verb: Verb) -> None:
    one = verb(
        "forget", "exact.command:forget", "delete rows from a finished run of an exact method; without rows, finish a deletion"
    )
    one.add_argument("run", type=Path, metavar="RUN", help="a run folder of sisa, s3t or modules")
    one.add_argument(
        "--ids", nargs="+", action="extend", default=[], metavar="ID", help="rows, by the column that the method names as id"
    )
    one.add_argument(
        "--where", nargs="+", action="extend", type=option_values.pair, default=[], metavar="column=value",
        help="rows that say so in all of these; each column once",
    )  # fmt: skip
    one.add_argument("--no-evaluation", action="store_true", help="do not measure the run's suite again, before and after")
    one = verb("verify", "checking:verify", "check a run: its files, a sample of its numbers, the proof of an exact one")
    one.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    rows = "rows of each set that are asked again: 0 none, all for every number"
    one.add_argument("--rows", type=option_values.rows, default=4, metavar="N", help=rows)
    one.add_argument("--seed", type=int, metavar="S", help="draw the same rows as an earlier check; default: at random")
    one.add_argument("--retrain", metavar="LINE", help="of an exact run, train one line again, such as 'shard 1', and compare bits")


def _audit(verb: Verb) -> None:
    one = verb("audit", "verbs:audit", "try a recipe's claimed privacy: train it with made-up rows, and guess which it saw")
    _takes_recipe(one)
    one.add_argument("--canaries", type=option_values.count, default=200, metavar="N", help="made-up rows; default 200")
    one.add_argument(
        "--guesses",
        type=option_values.count,
        metavar="K",
        help="number of guesses, half of them members; default: half of the canaries",
    )
    one.add_argument("--seed", type=int, default=0, metavar="S", help="what the rows and their coins are drawn from; default 0")
    one.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for privacy_audit.json; default: the recipe's output and _audit"
    )
    one.add_argument("--overwrite", action="store_true", help="replace an earlier audit in the output folder")


def _many(verb: Verb) -> None:
    one = verb("methods", "verbs:methods", "list the methods of a folder of recipes, and what each needs")
    one.add_argument("folder", nargs="?", metavar="FOLDER", default=METHODS, help=f"default: {METHODS}")
    one = verb(
        "bench",
        "verbs:bench",
        "run every recipe of a folder with several seeds on one suite, and rank them",
    )
    one.add_argument("folder", metavar="FOLDER", help=f"a folder of recipes, such as {METHODS}")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in every recipe, such as train.steps=50")
    one.add_argument("--suite", required=True, help="the suite that every run is measured by, such as eval/quick.yaml")
    one.add_argument("--seeds", type=option_values.count, default=3, metavar="N", help="seeds 0 to N-1 of each recipe; default 3")
    one.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for runs and leaderboard; default runs/bench")
    one.add_argument("--jobs", type=option_values.count, default=1, metavar="N", help="runs at a time; default 1")
    one.add_argument(
        "--write", type=Path, metavar="PAGE", help="the leaderboard's page; default leaderboard.md in the output folder"
    )


def _sweep(verb: Verb) -> None:
    one = verb("sweep", "sweeping.command:sweep", "try out settings of a recipe, show what nothing beats, and choose one")
    one.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/forget_lora.yaml")
    one.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="what is tried: key=a,b,c or key=low..high, with @log or @step=…; key=value is a setting of all trials",
    )
    one.add_argument("--suite", help="measures every trial; default: the recipe's")
    one.add_argument(
        "--output", type=Path, default=Path("runs/sweep"), metavar="DIR", help="folder of the sweep; default runs/sweep"
    )
    one.add_argument(
        "--trials", type=option_values.count, metavar="N", help="number of trials in all; default: all of a grid, else 20"
    )
    one.add_argument("--jobs", type=option_values.count, default=1, metavar="N", help="trials at a time; default 1")
    one.add_argument("--sampler", choices=("tpe", "nsga2", "random", "grid"), help="default: grid for lists alone, else tpe")
    one.add_argument("--seed", type=int, default=0, metavar="S", help="what they are drawn from; default 0")
    one.add_argument(
        "--storage", metavar="URL", help="a database for the study, such as sqlite:///sweep.db; default: a file in DIR"
    )
    one.add_argument("--no-prune", action="store_true", help="let every trial run to its end")
    one.add_argument("--pick", metavar="RULE", help="kept>=0.95 or forgotten>=0.9: most of the other side; default: harmonic mean")


def _alternates(verb: Verb) -> None:
    one = verb("alternates", "verbs:write_alternates", "let the model write other answers to a set's questions, for dpo and idk")
    _takes_recipe(one)
    one.add_argument("--stream", default="forget", help="the set that is asked: forget (default) or retain")
    one.add_argument("--k", type=int, default=5, help="other answers to each question (default 5)")
    one.add_argument("--temperature", type=float, default=1.0, help="how far a draw may leave the likeliest words (default 1.0)")
    one.add_argument(
        "--prompt",
        default=QUESTION,
        help="question (default): ask the question itself, the true answer forbidden · written: ask in words for different facts, "
        "for a model that follows instructions · FILE.txt: your own words, with {question} and {answer}",
    )
    one.add_argument("--output", type=Path, metavar="FILE.jsonl", help="the data set; without it, RECIPE_alternates.jsonl here")
    one.add_argument("--show-text", action="store_true", help="show three questions with what was written, too")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier file")


def _push(verb: Verb) -> None:
    one = verb("push", "hub.command:push", "publish a finished run on a model hub: weights, recipe, evaluation, and a model card")
    one.epilog = (
        "Exit status: 0 pushed · 2 refused, and nothing was pushed · 3 somebody else pushes there · 4 the hub did not answer · "
        "130 interrupted. After 3, 4 and 130 the same command goes on. Log in before: hf auth login."
    )
    one.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/forget_lora")
    one.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the repository; it is made if it is not there")
    one.add_argument("--public", action="store_true", help="everybody may read it; without it, private")
    one.add_argument("--merge", action="store_true", help="the whole model, its adapter merged, instead of the adapter")
    one.add_argument("--revision", default="main", metavar="BRANCH", help="the branch; it is made if it is not there; default main")
    one.add_argument("--anyway", action="store_true", help="also a run that does not hold what it should; its card says so")
    one.add_argument("--dry-run", action="store_true", help="show files and card; write nothing and ask nobody")


def _requests(parser: argparse.ArgumentParser) -> None:
    """The sub-verbs of `requests`."""
    parser.epilog = CODES
    plain = _verbs(parser, CODES)

    def verb(name: str, function: str, text: str) -> argparse.ArgumentParser:
        added = plain(name, function, text)
        added.add_argument(
            "--service", type=Path, default=Path(SERVICE), metavar="FILE", help=f"the service file; default {SERVICE}"
        )
        return added

    verb("new", "requests.verbs:new", "write a service file to start from")
    one = verb("add", "requests.verbs:add", "find the rows that are to be forgotten, show which they are, and put the request in")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--where",
        action="append",
        type=option_values.pair,
        metavar="column=value",
        help="rows with this value; again, for several columns",
    )
    which.add_argument(
        "--ids", nargs="+", action="extend", metavar="ID", help="rows by their id; - reads them from standard input, one a line"
    )
    which.add_argument("--text", help="rows that nearly repeat this text; @FILE reads it from a file, - from standard input")
    one.add_argument("--score", type=float, default=SCORE, help=f"likeness from which a row counts for --text; default {SCORE:g}")
    one.add_argument("--model", help="the model that is to forget; default: model.base of the service's recipe, or its store")
    one.add_argument("--due", type=option_values.day, metavar="YYYY-MM-DD", help="the day by which it must be served")
    one.add_argument("--key", help="your own name for the request; the same key again is the same request")
    one.add_argument("--dry-run", action="store_true", help="show what would be found, and change nothing")
    one.add_argument("--show-text", action="store_true", help="show what the rows say, too")
    one.add_argument("--yes-many", action="store_true", help="confirm a request for more than the service's `most` of all rows")
    one = verb("list", "requests.verbs:show", "requests with their states, those that are due first, first")
    one.add_argument("--state", action="append", choices=STATES, help="only those in this state; again, for several")
    one.add_argument("--all", action="store_true", help="every one of them; without it, the first 200")
    one = verb("run", "requests.verbs:run", "serve what is pending, together or one by one; goes on with what was killed")
    one.add_argument("--one-by-one", action="store_true", help="a run for each request, each from what the one before left")
    one.add_argument("--show-text", action="store_true", help="print an error's words even if they repeat a row's")
    one = verb("verify", "requests.verbs:verify", "check the ledger's chain, and signature and weights of every certificate")
    one.add_argument("certificates", nargs="*", type=Path, metavar="FILE", help="certificates to check; default: all of the ledger")
    one.add_argument("--key", type=Path, metavar="PEM", help="the public key that must have signed; default: your own")
    one = verb("export", "requests.verbs:export", "write the newest certificate of each request, and the public key, into a folder")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one = verb("model", "requests.verbs:model", "write the model as the accepted runs left it, every adapter merged, into a folder")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one.add_argument("--model", help="which, where the ledger has several; default: model.base of the service's recipe")
    for name, function, text in (
        ("withdraw", "requests.verbs:withdraw", "take a request back that is not served yet"),
        ("retry", "requests.verbs:retry", "let a request that needs attention be served again"),
    ):
        verb(name, function, text).add_argument("request", type=int, metavar="N", help="its number in `list`")


def _takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/forget_lora.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.lr=1e-4")


def _takes_models(one: argparse.ArgumentParser) -> None:
    one.add_argument("suite", metavar="SUITE", help="a suite file, such as eval/quick.yaml")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the suite to change")
    one.add_argument(
        "--model",
        required=True,
        action="append",
        help="hub id, folder, run folder, adapter, or embedded:target; again, a folder of such, or a quoted glob, for many",
    )
    one.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="adapter or run folder to put on the model; the model alone is then the column `before`; may be given again",
    )
    one.add_argument("--before", help="the model before, of models that do not say what they were made from")
    one.add_argument("--retrained", help="the model that never saw the forget set; without it, the one that the suite names")
    one.add_argument("--quantize", choices=("nf4", "fp4", "int8"), help="load the models in 4 or 8 bits")
    one.add_argument(
        "--output",
        type=Path,
        help="folder for evaluation.json, evaluation.parquet and report.html; of many, goes on where it ended",
    )
    one.add_argument("--no-text", action="store_true", help="keep numbers only: no question and no answer in the output folder")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in the output folder")
