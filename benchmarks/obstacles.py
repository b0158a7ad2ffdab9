"""The three obstacles of unlearning that the survey names (2405.07406), measured on the embedded data, one method of each family.

    python benchmarks/obstacles.py seeds    [--board runs/bench/leaderboard.json]   # stochasticity: each method over its seeds
    python benchmarks/obstacles.py sequence [--jobs 2]                              # incrementality: 1, 2, 4, 8 requests one by one
    python benchmarks/obstacles.py share    [--jobs 2]                              # catastrophic forgetting: 1 % to 50 % of rows
    python benchmarks/obstacles.py plot     [--write docs/obstacles.svg]            # both as a picture

All people that `embedded:target` learnt stand in one file, and a recipe of `recipes/methods` forgets some of them and keeps
the others. `forgotten` and `kept` are those of the leaderboard (`llm_unlearn/report/ranking.py`); all methods are scored against
`embedded:target` before and a model retrained without the rows, also those that begin from another model. Each run is a process of
its own by a command that a user could type; the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_unlearn import folder
from llm_unlearn.children import Child, carry_out
from llm_unlearn.embedded import population
from llm_unlearn.report.ranking import against, scores_of, values_of

ROOT = Path(__file__).parents[1]
METHODS = ("npo", "task_vector", "dampening", "influence", "noisy_finetune", "sisa")
"""A gradient method, edits by a task vector, by Fisher information and by influence, a certified one, an exact one."""
EXACT = ("sisa",)
FULL = ("dampening", "influence", "noisy_finetune")
"""Methods of full weights: a later request begins from the whole model that the earlier one left."""
REQUESTS = (1, 2, 4, 8)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
COLUMNS = ("forgotten", "kept")
VALUES = ("forget probability", "forget extraction strength", "retain probability", "retain multiple choice", "general probability")


@dataclass(frozen=True)
class Place:
    """The folder of a measurement, and the rows in it."""

    home: Path
    jobs: int
    methods: Sequence[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of everybody whom the target learnt, those of the forget split first."""
        return [row for split in ("forget", "retain") for row in population.rows(split)]

    def write(self, name: str, text: str) -> Path:
        """A file that is the same each time; it is left alone where it is there."""
        path = self.home / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return path

    @property
    def people(self) -> str:
        """The file of all rows."""
        return str(self.write("people.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows)).resolve())

    def settings(self, name: str, forget: Sequence[str], gone: Sequence[str], **more: Any) -> dict[str, Any]:
        """What a run changes in a recipe: some rows are forgotten, all that are not gone are kept.

        Args:
            forget: ids of the rows.
            gone: ids of the rows that are not to be kept.
        """
        own = {"forget": {"source": self.people, "where": {"id": list(forget)}}}
        return {
            "output": str(self.home / name),
            "data": own | {"retain": {"source": self.people, "without": {"id": list(gone)}}},
        } | more

    def run(self, method: str, settings: Mapping[str, Any]) -> list[str]:
        """The words of a command."""
        recipe = ROOT / "recipes" / "methods" / f"{method}.yaml"
        return ["run", str(recipe), *(f"{key}={json.dumps(value)}" for key, value in settings.items()), "--resume"]

    def suite(self, name: str, forget: Sequence[str], retain: Mapping[str, Any], retrained: str) -> Path:
        """eval/quick.yaml on other rows."""
        whole = yaml.safe_load((ROOT / "eval" / "quick.yaml").read_text(encoding="utf-8"))
        whole["sets"]["forget"] |= {"source": self.people, "where": {"id": list(forget)}}
        whole["sets"]["retain"] |= {"source": self.people} | dict(retain)
        return self.write(f"{name}.suite.yaml", yaml.safe_dump(whole | {"retrained": retrained}, sort_keys=False))

    def carry_out(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Those of the commands whose run is not finished, side by side.

        Args:
            commands: name of a run folder -> words behind `llm-unlearn`.
        """
        waiting = [
            Child(name, [sys.executable, "-m", "llm_unlearn", *words], self.home / "logs" / f"{name.replace('/', '-')}.txt")
            for name, words in commands.items()
            if not (self.home / name / folder.RESULTS).is_file() and not (self.home / name / DONE).is_file()
        ]
        failures = carry_out(waiting, self.jobs, os.environ, done=len(commands) - len(waiting))
        if failures is None:
            raise SystemExit(130)
        for name, said in failures.items():
            print(f"{name}: {said}", file=sys.stderr)
        for child in waiting:  # a run that measures nothing says by this that it ended
            if child.name not in failures:
                (self.home / child.name).mkdir(parents=True, exist_ok=True)
                (self.home / child.name / DONE).touch()

    def results(self, name: str) -> Mapping[str, Any] | None:
        """What a run measured; None where it failed."""
        return folder.results_in(self.home / name) if (self.home / name / folder.RESULTS).is_file() else None


DONE = ".obstacles"


Scored = Mapping[str, float | None] | None


def scored(results: Mapping[str, Any] | None, common: Mapping[str, Any] | None) -> Scored:
    """Forgotten and kept against the common models, and the numbers that stand in the tables."""
    if results is None or common is None:
        return None
    last = "after" if "after" in results["models"] else "model"
    both = {column: values_of(common, column) for column in ("before", "retrained")}
    values = values_of(results, last)
    numbers = [{**one, "values": {**one["values"], "after": one["values"].get(last, {})}} for one in results["numbers"]]
    found = scores_of(against({**results, "numbers": numbers}, both))
    return {column: found[column] for column in COLUMNS} | {key: values.get(key) for key in VALUES}


# ----------------------------------------------------------------------------------------------------- one after the other


def sequence(place: Place) -> list[str]:
    """Eight people ask one after the other; the same people in one request, beside it."""
    rows = population.rows("forget")
    people = list(dict.fromkeys(row["person"] for row in rows))
    ids = [[row["id"] for row in rows if row["person"] in people[: k + 1]] for k in range(len(people))]
    own = [[row["id"] for row in rows if row["person"] == person] for person in people]
    others = {"without": {"person": people}}  # what is kept is measured on those who never ask
    suites = {k: place.suite(f"sequence-{k}", ids[k - 1], others, "embedded:retrained") for k in REQUESTS}
    commands = {
        f"together/{method}-{k}": place.run(
            method, place.settings(f"together/{method}-{k}", ids[k - 1], ids[k - 1], evaluation=str(suites[k]))
        )
        for k in REQUESTS
        for method in place.methods
        if method not in EXACT
    }
    place.carry_out(commands)
    for k in range(1, len(people) + 1):
        step: dict[str, Sequence[str]] = {}
        for method in place.methods:
            name, evaluation = f"sequence/{method}-{k}", str(suites.get(k, suites[8]))
            if method not in EXACT:
                model = _begun(place, method, k)
                step[name] = place.run(method, place.settings(name, own[k - 1], ids[k - 1], evaluation=evaluation, **model))
            elif k == 1:
                first = place.settings(f"sequence/{method}", ids[0], ids[0], evaluation={"suite": evaluation, "retrained": None})
                step[f"sequence/{method}"] = place.run(method, first)
            else:
                step[name] = ["forget", str(place.home / f"sequence/{method}"), "--where", f"person={people[k - 1]}"]
        place.carry_out(step)
        if k in REQUESTS:
            here = place.home / "sequence"
            place.carry_out(
                {
                    f"sequence/{method}-{k}-seen": [
                        "evaluate", str(suites[k]), "--model", "embedded:base", "--adapter", str(here / method),
                        "--output", str(here / f"{method}-{k}-seen"),
                    ]
                    for method in EXACT
                }
            )  # fmt: skip
    return _sequence_table(place)


def _begun(place: Place, method: str, k: int) -> dict[str, Any]:
    """What the k-th request begins from: all that the earlier ones left."""
    before = [(place.home / f"sequence/{method}-{i}").resolve() for i in range(1, k)]
    if not before:
        return {}
    return {"model": {"base": str(before[-1] / folder.MODEL)} if method in FULL else {"start": [str(one) for one in before]}}


def _sequence_table(place: Place) -> list[str]:
    lines = _head(
        "method", "requests", *(f"{one}, one by one" for one in COLUMNS), *(f"{one}, together" for one in COLUMNS), *VALUES
    )
    for method, k, one, whole in _sequence_points(place):
        lines.append(_row(method, str(k), *_cells(one, COLUMNS), *_cells(whole, COLUMNS), *_cells(one, VALUES)))
    return lines


def _sequence_points(place: Place) -> Iterator[tuple[str, int, Scored, Scored]]:
    """Method, number of requests, what came of them one by one, and together."""
    for method in place.methods:
        for k in REQUESTS:
            common = place.results(f"together/npo-{k}")
            name = f"sequence/{method}-{k}-seen" if method in EXACT else f"sequence/{method}-{k}"
            yield method, k, scored(place.results(name), common), scored(place.results(f"together/{method}-{k}"), common)


# ------------------------------------------------------------------------------------------------------ more and more rows


def share(place: Place) -> list[str]:
    """The rows of the first so many people, beside a control that is retrained without just them."""
    rows = place.rows
    commands: dict[str, Sequence[str]] = {}
    for part in SHARES:
        ids = [row["id"] for row in rows[: max(1, round(part * len(rows)))]]
        name = f"{100 * part:g}"
        beside = place.suite(f"share-{name}", ids, {"without": {"id": ids}}, "embedded:retrained")
        control = {"extends": str(ROOT / "recipes/methods/retrain.yaml")} | place.settings(f"share/retrain-{name}", ids, ids)
        retrained = place.write(f"share/retrain-{name}.yaml", yaml.safe_dump(control, sort_keys=False))
        own = {"suite": str(beside.resolve()), "retrained": str(retrained.resolve())}  # made once, on first use
        for method in place.methods:
            run = f"share/{method}-{name}"
            commands[run] = place.run(method, place.settings(run, ids, ids, evaluation=own))
    place.carry_out(commands)
    lines = _head("method", "share", *COLUMNS, *VALUES)
    for method, percent, found in _share_points(place):
        lines.append(_row(method, f"{percent:g} %", *_cells(found, COLUMNS), *_cells(found, VALUES)))
    return lines


def _share_points(place: Place) -> Iterator[tuple[str, float, Scored]]:
    """Method, percentage of the rows that it forgot, and what came of it."""
    for method in place.methods:
        for part in SHARES:
            common = place.results(f"share/npo-{100 * part:g}")
            yield method, 100 * part, scored(place.results(f"share/{method}-{100 * part:g}"), common)


# --------------------------------------------------------------------------------------------------------- over the seeds


def seeds(board: Path) -> list[str]:
    """Each method of a leaderboard over its seeds: mean, standard deviation, least and largest."""
    lines = _head("method", "seeds", *(f"{one}: mean, s.d., range" for one in (*COLUMNS, "forget probability")))
    for method in json.loads(board.read_text(encoding="utf-8"))["methods"]:
        runs = [run for run in method["runs"] if "error" not in run]
        cells = [_spread(run[one] for run in runs) for one in COLUMNS]
        lines.append(_row(method["name"], str(len(runs)), *cells, _spread(run["values"].get("forget probability") for run in runs)))
    return lines


def _spread(values: Iterable[float | None]) -> str:
    found = [one for one in values if one is not None]
    if len(found) < 2:
        return "—"
    return f"{statistics.fmean(found):.3f}, {statistics.stdev(found):.3f}, {min(found):.3f}–{max(found):.3f}"


def _cells(found: Scored, keys: Sequence[str]) -> list[str]:
    return ["—" if not found or found[key] is None else f"{found[key]:.2f}" for key in keys]


def _head(*words: str) -> list[str]:
    return [_row(*words), "|" + "---|" * len(words)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------------------------ the picture


def plot(place: Place, path: Path) -> None:
    """What is forgotten and kept over requests and over shares, as an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from llm_unlearn.report.frontier import WHITE
    from llm_unlearn.report.plots import STYLE

    requests = [(method, float(k), one) for method, k, one, _ in _sequence_points(place)]
    panels = (
        ("requests, one after the other", REQUESTS, requests),
        ("share of the rows, %", [100 * p for p in SHARES], list(_share_points(place))),
    )
    with rc_context(STYLE | WHITE):
        figure = Figure(figsize=(9.6, 6.0), layout="constrained")
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        for column, (title, ticks, points) in enumerate(panels):
            for row, name in enumerate(COLUMNS):
                axes = grid[row][column]
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                for method, colour, marker in zip(place.methods, COLOURS, MARKERS, strict=False):
                    line = [(x, found[name]) for one, x, found in points if one == method and found and found[name] is not None]
                    axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.4, label=method)
            grid[1][column].set_xlabel(title)
        for row, name in enumerate(COLUMNS):
            grid[row][0].set_ylabel(name)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(place.methods), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "benchmarks/obstacles.py"})


COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Of Okabe and Ito, which colour-blind people tell apart."""
MARKERS = ("o", "s", "^", "v", "D", "P")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seeds", "sequence", "share", "plot"))
    parser.add_argument("--board", type=Path, default=Path("runs/bench/leaderboard.json"), help="made by llm-unlearn bench")
    parser.add_argument("--output", type=Path, default=Path("runs/obstacles"), help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", type=Path, default=Path("docs/obstacles.svg"), help="the file of the plot")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, metavar="NAME", help=f"recipes/methods/NAME.yaml: {', '.join(METHODS)}"
    )
    options = parser.parse_args()
    place = Place(options.output, options.jobs, options.methods)
    if options.what == "plot":
        plot(place, options.write)
        return
    lines = seeds(options.board) if options.what == "seeds" else {"sequence": sequence, "share": share}[options.what](place)
    place.write(f"{options.what}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
