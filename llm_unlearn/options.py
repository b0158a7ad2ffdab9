"""Words that several verbs take, and what they may be."""

from __future__ import annotations

import argparse
from pathlib import Path


def count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; expected a whole number from 1 on")
    return int(word)


def takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as recipes/forget_lora.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.lr=1e-4")


def takes_models(one: argparse.ArgumentParser) -> None:
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
    one.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in the output folder")
