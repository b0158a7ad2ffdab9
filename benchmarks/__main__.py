"""Measure speed and memory on this machine: training, evaluation and start-up, against a plain baseline and the machine's limits.

    python -m benchmarks                                  # a CPU: below 10 minutes on two cores
    python -m benchmarks --size 1b --json 1b.json         # a GPU, and then --size 8b
    python -m benchmarks --only npo evaluation --rounds 5
    python -m benchmarks --write docs/performance.md      # the tables, between the page's markers for this size

Ratios are what other work on the machine disturbs least: both ways are alive at once and take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import table
from benchmarks.rows import ROWS
from benchmarks.shapes import SIZES
from benchmarks.sides import Failed, begin
from llm_unlearn.cli import wait_briefly

PARTS = ("training", "evaluation", "start")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = sorted({row.method for row in ROWS.values()})
    parser.add_argument("--size", choices=SIZES, default="cpu", help="model and rows (default: cpu; tiny is for tests)")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *methods], metavar="WHAT", help=f"of {', '.join([*PARTS, *methods])}")
    parser.add_argument("--rounds", type=int, help="turns of each way (default: the size's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the page's markers")
    found = parser.parse_args()
    if found.rounds is not None and found.rounds < 1:
        parser.error(f"--rounds {found.rounds}: expected 1 or more.")
    for file in (found.json, found.write):
        if file and not file.parent.is_dir():
            parser.error(f"{file}: no such folder, {file.parent}.")
    return found


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def command(options: argparse.Namespace) -> str:
    """What was asked, without the files that it is written to."""
    words = ["python -m benchmarks", f"--size {options.size}"]
    words += [f"--only {' '.join(options.only)}"] if options.only else []
    words += [f"--rounds {options.rounds}"] if options.rounds else []
    return " ".join(words)


def measure(options: argparse.Namespace, folder: Path, found: dict[str, Any]) -> None:
    """Everything that was asked for, put into `found` as soon as it is there."""
    wait_briefly()  # both ways, as the command line has it
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one is measured; a trainer would spread over all
    say("importing")
    begin()
    from benchmarks import device, evaluation, startup, training
    from llm_unlearn.results import versions

    began, size, only = time.perf_counter(), SIZES[options.size], set(options.only or PARTS)
    rounds, shape = options.rounds or size.rounds, size.shape
    say("the machine's limits")
    tokens = size.window * 2 * 85  # a window's, about
    limits = device.limits(shape.hidden, shape.intermediate, min(tokens, size.batch_tokens), options.size == "tiny")
    device.free()
    machine = {
        "name": device.name(),
        "device": device.device().type,
        "precision": str(device.dtype()).removeprefix("torch."),
        **limits,
    }
    found |= {
        "machine": machine, "versions": versions(), "size": options.size,
        "command": command(options),
        "date": datetime.date.today().isoformat(), "recipe": size.recipe or "a small recipe",
        "model": f"Llama, {shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocabulary:,}; "
        f"{size.window} + {size.window} rows a step",
    }  # fmt: skip
    wanted = [name for name in size.rows if "training" in only or ROWS[name].method in only]
    wanted += [name for name in size.more if ROWS[name].method in only]
    rows = {name: ROWS[name] for name in wanted}
    place = training.Place.of(size, rounds, folder / "training") if rows or ("start" in only and not size.recipe) else None
    if rows and place:
        for name, row in rows.items():
            one = training.measure(name, row, size, options.size, rounds, place, limits["matmul"], say)
            found.setdefault("training", []).append(one)
            say(f"{name}: {table.spread(one['ratios'])} times as fast, {one['share']:.2f} of the memory")
    if "evaluation" in only and size.evaluation:
        found["evaluation"] = evaluation.measure(size, rounds, folder / "evaluation", limits, say)
        say(f"evaluation: {table.spread(found['evaluation']['ratios'])} times as fast")
    if "start" in only:
        recipe = size.recipe or (str(training.task_of(ROWS["GradDiff, LoRA"], size, place, 2).recipe) if place else "")
        found["start"] = startup.measure(recipe, min(rounds, 3), bool(size.recipe), folder, say)
    found["minutes"] = (time.perf_counter() - began) / 60


def main() -> None:
    options = arguments()
    if options.write:
        table.around(options.write, options.size)
    for asked in (signal.SIGTERM, signal.SIGINT):  # the latter is ignored in the background of a shell, unless one asks
        signal.signal(asked, _interrupt)
    found: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            measure(options, Path(folder), found)
    except KeyboardInterrupt:
        if found.keys() & {"training", "evaluation"}:
            print(table.page(found))
        raise SystemExit("stopped; nothing was written.") from None
    except Failed as error:
        raise SystemExit(str(error)) from None
    text = table.page(found)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    if options.write:
        table.write(options.write, options.size, text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
