"""Many methods on one suite as a leaderboard: plain data for `leaderboard.json`, a markdown page, and a table in the terminal."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from llm_unlearn.catalogue import Method
from llm_unlearn.outward import canvas
from llm_unlearn.report.ranking import APART, FLOOR, against, key_of, middle, ranked, scores_of, standing, values_of
from llm_unlearn.report.verdict import Results, printable, shown, value_of

COLUMNS = (
    ("forget", "probability"),
    ("forget", "rouge"),
    ("forget", "extraction strength"),
    ("forget", "membership loss"),
    ("retain", "probability"),
    ("retain", "rouge"),
    ("retain", "multiple choice"),
    ("general", "probability"),
)
"""The numbers that stand in the table as they are, where the suite has them: set and title. All are in the JSON file."""

PIPED = 120
"""Columns of the terminal's table where there is no terminal."""

MADE_BY = "<!-- Written by `llm-unlearn bench`, which replaces it. -->"
"""The first line of the page: only a file that has it is ever replaced."""

Outcome = tuple[int, str, Results | str]
"""A run's seed, its folder, and what came out: its `evaluation.json`, or how it failed."""


def board_of(
    outcomes: Mapping[Method, Sequence[Outcome]], *, suite: str, suite_hash: str, command: str, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that `leaderboard.json` says.

    Args:
        outcomes: of each method, one per seed.
        command: the line that made it.
        left_out: names of methods whose recipe forgets other rows.
    """
    models = _models(outcomes)
    # a method that begins elsewhere (with adapters on a base that saw no row, say) is judged by where it ends, as the others are
    common: dict[str, Mapping[str, float | None]] = {
        column: models[column]["values"] for column in ("before", "retrained") if column in models
    }
    methods = []
    for method, found in outcomes.items():
        runs = [_run(*outcome, common) for outcome in found]
        facts = {"name": method.name, "recipe": str(method.path), "sentence": method.sentence, "paper": method.paper}
        values = {
            key: fmean(each)
            for key in map(" ".join, COLUMNS)
            if (each := [run["values"][key] for run in runs if run.get("values", {}).get(key) is not None])
        }
        seconds = middle(run.get("seconds") for run in runs)
        methods.append({**facts, **standing(runs), "values": values, "seconds": seconds, "runs": runs})
    done = [results for found in outcomes.values() for _, _, results in found if not isinstance(results, str)]
    known = {key_of(number) for results in done for number in results["numbers"]}
    return {
        "format": 1,
        "command": command,
        "suite": suite,
        "suite_hash": suite_hash,
        "floor": FLOOR,
        "columns": [key for key in map(" ".join, COLUMNS) if key in known],
        "machine": _several(_machine(results["run"]) for results in done),
        "versions": {
            name: _several(results["run"]["versions"][name] for results in done)
            for name in dict.fromkeys(name for results in done for name in results["run"]["versions"])
        },
        "models": models,
        "left_out": list(left_out),
        "methods": ranked(methods),
    }


def _run(seed: int, folder: str, found: Results | str, common: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """One run as plain data, every number of it included.

    Args:
        common: the values of the models that it is scored against.
    """
    if isinstance(found, str):
        return {"seed": seed, "folder": folder, "error": found}
    results = against(found, common)
    numbers = [
        {key: number[key] for key in ("set", "title", "goal", "settings")}
        | {"values": {column: value_of(number, column) for column in number["values"]}}
        for number in results["numbers"]
    ]
    how = {key: results["run"][key] for key in ("recipe_hash", "status", "reason", "steps", "kept_step", "seconds")}
    return {"seed": seed, "folder": folder, **scores_of(results), **how, "values": values_of(results, "after"), "numbers": numbers}


def _machine(run: Mapping[str, Any]) -> str:
    return f"{run['device']}, {run['processes']} process{'' if run['processes'] == 1 else 'es'}, {run['precision']}"


def _several(found: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(map(str, found)))


def _models(outcomes: Mapping[Method, Sequence[Outcome]]) -> dict[str, Any]:
    """The models that the methods are compared with: those of most methods, and who has others (another base, 4 bits)."""
    found: dict[str, tuple[str, ...]] = {}
    values: dict[tuple[str, ...], dict[str, Any]] = {}
    for method, runs in outcomes.items():
        for _, _, results in runs:
            if not isinstance(results, str):
                models = {column: results["models"][column] for column in ("before", "retrained") if column in results["models"]}
                key = found[method.name] = tuple(str(model["identity"]) for model in models.values())
                values[key] = {
                    column: {
                        "name": model["name"],
                        "values": values_of(results, column),
                    }
                    for column, model in models.items()
                }
    if not found:
        return {"others": []}
    most = Counter(found.values()).most_common(1)[0][0]
    return {**values[most], "others": [name for name, key in found.items() if key != most]}


# ------------------------------------------------------------------------------------------------------------- markdown


def markdown(board: Mapping[str, Any], page: Path, plot: Path) -> str:
    """The page as text, without a date. Recipes and the plot are linked relative to it."""
    methods, columns = board["methods"], board["columns"]
    seeds = max((len(method["runs"]) for method in methods), default=0)
    head = ["", "method", "paper", "forgotten", "kept", "score", "frontier", "forget quality p", *columns, "seconds"]
    lines = [MADE_BY, f"# Leaderboard: {_md(board['suite'])}", "", how_to_read(board, seeds), ""]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", board["command"])), default=0))
    lines += [f"{fence}sh", board["command"], fence, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for column in ("before", "retrained"):
        if column in board["models"]:
            values = board["models"][column]["values"]
            cells = ["", f"*{column}*", "", "", "", "", "", "", *(_number(values.get(key)) for key in columns), ""]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {' | '.join(_row(method, columns, page))} |" for method in methods]
    lines += ["", f"![What each method forgot and what it kept]({_relative(plot, page)})"]
    if board["models"]["others"]:
        names = ", ".join(map(_md, board["models"]["others"]))
        lines += [
            "",
            f"Scored against the models of the first rows too, though they begin from another, or have another control: {names}.",
        ]
    if board["left_out"]:
        names = ", ".join(map(_md, board["left_out"]))
        lines += ["", f"Left out, as the recipe forgets other rows than the suite asks about: {names}."]
    failed = [(method["name"], run) for method in methods for run in method["runs"] if "error" in run]
    if failed:
        lines += ["", "Failed:", ""] + [f"- {_md(name)}, seed {run['seed']}: {_md(run['error'])}" for name, run in failed]
    versions = ", ".join(f"{name} {number}" for name, number in board["versions"].items())
    if versions:
        lines += ["", f"Ran on {board['machine']}, under {versions}; suite {board['suite_hash']}."]
    return "\n".join(lines) + "\n"


def how_to_read(board: Mapping[str, Any], seeds: int) -> str:
    """One paragraph: what the three scores are and what the order is."""
    over = f"mean over {seeds} seeds ± half of the 95 % interval (Student's t)" if seeds > 1 else "one seed, hence no interval"
    return (
        "**Forgotten** says where a method ends between the model before (0) and the one retrained without the data (1): "
        "the mean, over the measures on the forget set, of 1 − |after − retrained| / |before − retrained|, not below 0. "
        "Forgetting too much costs as much as forgetting too little. Measures on which the two models are less than "
        f"{APART:g} apart are left out; perplexities count by their logarithms. **Kept** is the mean share that is left of "
        "each score on the other sets, at most 1. **Score** is their harmonic mean. A method of which any seed keeps less "
        f"than {board['floor']:g}, or less than half of any one score, has *collapsed* and stands below all that have not. "
        "● marks the frontier: no other ranked method forgets and keeps at least as much and does better in one. Numbers: "
        f"{over}; forget quality (the p-value of a Kolmogorov–Smirnov test against the retrained model) and seconds (of "
        "one run without its imports, with its measuring) are medians."
    )


def _row(method: Mapping[str, Any], columns: Sequence[str], page: Path) -> list[str]:
    paper = re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", _md(method["paper"]))
    return [
        str(method["rank"] or state_of(method)),
        f"[{_md(method['name'])}]({_relative(Path(method['recipe']), page)})",
        paper,
        *(within(method[key]) for key in ("forgotten", "kept", "score")),
        "●" if method["frontier"] else "",
        _number(method["forget_quality"]),
        *(_number(method["values"].get(key)) for key in columns),
        "—" if method["seconds"] is None else f"{method['seconds']:,.{0 if method['seconds'] >= 10 else 1}f}",
    ]


def state_of(method: Mapping[str, Any]) -> str:
    """`ranked`, or what went wrong, with the number of seeds where it did not for all."""
    count = int(method.get(method["state"], 0))
    every = len(method["runs"])
    return str(method["state"]) + (f" ({count} of {every})" if 0 < count < every else "")


def within(found: Mapping[str, float | None]) -> str:
    """A mean and its interval: `0.912 ± 0.013`."""
    mean, half = found["mean"], found["half"]
    return "—" if mean is None else f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def _number(value: float | None) -> str:
    return "—" if value is None else shown(float(value))


def _md(text: str) -> str:
    """Text that comes from a file or an error, so that it cannot be more than text in a cell."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", printable(str(text)))


def _relative(path: Path, page: Path) -> str:
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


# ------------------------------------------------------------------------------------------------------------- terminal


def print_board(board: Mapping[str, Any]) -> None:
    """The order and the three scores; the page has the rest."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llm_unlearn.report.terminal import writable

    console = Console(file=canvas("stdout"))
    if not console.is_terminal:
        console.width = PIPED
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "method", "forgotten", "kept", "score"):
        table.add_column(name, overflow="fold", no_wrap=name != "method")
    for method in board["methods"]:
        place = f"{method['rank'] or state_of(method)}{' ●' if method['frontier'] else ''}"
        cells = [place, method["name"], *(within(method[key]) for key in ("forgotten", "kept", "score"))]
        style = "" if method["rank"] else "yellow"
        table.add_row(*(Text(writable(printable(cell), console), style=style) for cell in cells))
    console.print(table)
    if any(method["frontier"] for method in board["methods"]):
        console.print(writable("● on the frontier: no other forgets and keeps at least as much and does better in one", console))
