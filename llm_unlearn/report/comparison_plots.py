"""The plots of a comparison: every run has its colour and its kind of line, and what belongs to it can be hidden by its class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_unlearn.report.frontier import CROWD, frontier_plot
from llm_unlearn.report.likeness import Run
from llm_unlearn.report.plots import HALF, LABEL, RUNS, SOFT, Plot, colour_of, drawing, number_of, panels
from llm_unlearn.report.verdict import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
"""Runs beyond the number of colours have other kinds of lines."""
DASHES = ("", "8 3", "2 2.5", "9 3 2 3")
"""The same in the page's key."""
WILD = 10
"""A panel in which a value is so many times as large as nine tenths of all has a logarithmic scale."""
LEAST = 2
"""Values that a panel of the training needs, or it is left out."""

Lines = Mapping[str, tuple[Sequence[Any], Sequence[Any]]]
"""Column -> x and y."""


def comparison_plots(comparison: Mapping[str, Any], runs: Sequence[Run]) -> list[Plot]:
    """Everything that can be drawn; nothing from what is not there."""
    order = {str(run["name"]): i for i, run in enumerate(comparison["runs"])}
    plots = [_frontier(comparison), _roc(comparison["roc"], order)]
    for name, curve in comparison["curves"].items():
        caption = f"{name}: share of {curve['set']} that an attacker gets, over the samples drawn for each row"
        lines = {column: (curve["n"], line) for column, line in curve["lines"].items()}
        plots.append(_panel(caption, lines, order, _samples))
    for attack in comparison["attacks"]:
        lines = {column: (line["x"], line["y"]) for column, line in attack["lines"].items()}
        places = order | {name: order[run] for name, run in attack["of"].items() if run in order}
        plots.append(_panel(f"{attack['name']}: {attack['title']}", lines, places, lambda axes: None))
    plots.append(_training(runs, order))
    return [plot for plot in plots if plot]


def look_of(place: int) -> tuple[str, Any]:
    """The colour and the line of the run that stands at a place of the order."""
    return RUNS[place % len(RUNS)], LINES[place // len(RUNS) % len(LINES)]


def _frontier(comparison: Mapping[str, Any]) -> Plot | None:
    methods = [
        run | {"name": ending(str(run["name"]))} | {key: {"mean": run[key], "half": None} for key in ("forgotten", "kept", "score")}
        for run in comparison["runs"] if run["score"] is not None
    ]  # fmt: skip
    return frontier_plot({"methods": methods}) if methods else None


def ending(name: str) -> str:
    """A name that fits into a plot: long paths differ at their ends."""
    line = printable(name)
    return line if len(line) <= LABEL else "…" + line[1 - LABEL :]


def _roc(roc: Mapping[str, Any] | None, order: Mapping[str, int]) -> Plot | None:
    if not roc:
        return None

    def dress(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel(f"share of {printable(str(roc['against']), LABEL)} taken for seen")
        axes.set_ylabel(f"share of {printable(str(roc['set']), LABEL)} taken for seen")

    line = next(iter(roc["lines"].values()))
    rows = f"{line['members']} rows of {roc['set']} and {line['others']} of {roc['against']}"
    of = f", of {roc['of']} in all: only these stand in evaluation.json" if roc["of"] > roc["rows"] else ""
    caption = f"Membership, attack by the loss: {rows}{of}. On the dashed line the attacker guesses; above it he recognises the set"
    return _panel(caption, {name: (one["x"], one["y"]) for name, one in roc["lines"].items()}, order, dress, height=4.6)


def _samples(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("samples per example")


def _panel(caption: str, lines: Lines, order: Mapping[str, int], dress: Callable[[Axes], None], height: float = 3.8) -> Plot | None:
    """All columns in one plot: before and retrained as in every report, the runs in their colours."""
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, (x, y) in lines.items():
            _line(axes, x, y, column, order)
        dress(axes)

    return Plot(caption, drawing(draw, HALF, height, caption))


def _line(axes: Axes, x: Sequence[Any], y: Sequence[Any], column: str, order: Mapping[str, int]) -> None:
    values = [number_of(one) for one in y]
    points: Sequence[Any] = [number_of(one) for one in x]
    if any(math.isnan(one) for one in points):  # names, such as kinds of quantization
        points = [printable(str(one), LABEL) for one in x]
    if column in order:
        place = order[column]
        colour, style = look_of(place)
        axes.plot(points, values, color=colour, linestyle=style, linewidth=1.5, gid=f"run-{place}", marker=_lone(values))
    else:
        kind = column.split(" ")[0]
        shape, size = ("D", 4) if kind == "retrained" else ("o", 5)
        every = max(1, len(values) // 12)
        axes.plot(
            points, values, color=colour_of(kind), linewidth=2.2, alpha=0.85, marker=shape, markersize=size, markevery=every,
            markerfacecolor="none" if kind == "before" else colour_of(kind), zorder=1.5,
        )  # fmt: skip


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Losses of unlike methods lie orders of magnitude apart: then a linear middle, and logarithms beyond it."""
    found = sorted(value for value in values if not math.isnan(value))
    if len(found) < 2:
        return
    low, high = found[len(found) // 10], found[-1 - len(found) // 10]
    middle = max(abs(low), abs(high), 1e-12)
    if max(abs(found[0]), abs(found[-1])) > WILD * middle:
        axes.set_yscale("symlog", linthresh=middle)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _lone(values: Sequence[float]) -> str:
    return "o" if len(values) == 1 else ""


def _training(runs: Sequence[Run], order: Mapping[str, int]) -> Plot | None:
    """One panel for each thing that was logged over the steps, all runs in it."""
    logs = {run.name: run.log for run in runs if run.log and run.name in order}
    keys = [
        key for key in dict.fromkeys(key for log in logs.values() for row in log for key in row)
        if key not in ("step", "tokens", "seconds") and any(sum(key in row for row in log) >= LEAST for log in logs.values())
    ]  # fmt: skip
    count = {key: sum(any(key in row for row in log) for log in logs.values()) for key in keys}
    rare = [key for key in keys if len(logs) > CROWD and 2 * count[key] < len(logs)]
    keys = sorted((key for key in keys if key not in rare), key=lambda key: key in ("grad_norm", "lr"))
    if not keys:
        return None

    def draw(axes: Axes, key: str) -> None:
        for name in sorted(logs, key=lambda name: -order[name]):  # the best on top
            found = [(row["step"], row[key]) for row in logs[name] if key in row]
            if found:
                steps, values = zip(*found, strict=True)
                _line(axes, steps, values, name, order)
        _scale(axes, [number_of(row[key]) for log in logs.values() for row in log if key in row])

    missing = [run.name for run in runs if run.name not in logs]
    caption = f"Training, step by step: {len(logs)} runs" + (f"; no log of {len(missing)}" if missing else "")
    if rare:
        caption += f"; left out, as fewer than half of the runs have it: {', '.join(printable(key, LABEL) for key in rare)}"
    return panels(keys, draw, caption, height=2.3)
