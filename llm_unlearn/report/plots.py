"""The page's plots: SVG that stands inside HTML, takes its colours from the page and escapes every word."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree
from zlib import crc32

from llm_unlearn.report.verdict import Number, by_set, columns_of, interval_of, printable, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"before": "○", "after": "●", "model": "●", "retrained": "◆"}
"""How a model is marked in the page's key; the plots draw the same."""

INK, SOFT, LINE, OTHER = "#010101", "#020202", "#030303", "#040404"
COLOUR = {"before": "#050505", "after": "#060606", "model": "#060606", "retrained": "#070707"}
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", OTHER: "other"} | {
    "#050505": "before", "#060606": "after", "#070707": "retrained"
}  # fmt: skip
RUNS = ("#010102", "#010103", "#010104", "#010105", "#010106", "#010107", "#010202", "#010203")
"""The colours of many runs."""
VARIABLES |= {colour: f"run-{i}" for i, colour in enumerate(RUNS)}
"""Colours that matplotlib writes -> the page's, which are others by day, by night and on paper."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.color": INK,
    "axes.labelcolor": SOFT, "axes.titlecolor": INK, "axes.titlesize": 10, "axes.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": LINE, "grid.linewidth": 0.6,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
}  # fmt: skip

HALF, WHOLE, PANEL = 5.2, 12.0, 3.1
"""Widths in inches of a plot in one column of the page, in both, and of one panel of several: a phone can show them legibly."""
GROWN = 1.6
"""So many times its size a drawing may become on a wide screen."""
LABEL = 28
"""Longest name in a plot."""


@dataclass(frozen=True)
class Plot:
    """One drawing and the sentence that says what it shows."""

    caption: str
    svg: str
    wide: bool = False
    """It takes the whole width of the page."""
    large: bool = False
    """It is not made smaller than can be read: a narrow screen scrolls it."""

    @property
    def parts(self) -> tuple[str, str]:
        """What is drawn, and the rest of the sentence."""
        head, _, rest = self.caption.partition(": ")
        return head, rest


def plots_of(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Everything that can be drawn from what is there; nothing from what is not."""
    columns = columns_of(results)
    drawn = [_dots(name, numbers, columns) for name, numbers in by_set(results).items()]
    for name, curve in results["curves"].items():
        drawn.append(_curve(name, curve, columns))
    drawn += [_attack(attack, columns) for attack in results.get("attacks", ())]
    if "forget" in results["answers"]:
        drawn.append(_rows("forget", results["answers"]["forget"], columns))
    drawn.append(_training(log, results.get("run")))
    return [plot for plot in drawn if plot]


def _dots(name: str, numbers: Sequence[Number], columns: Sequence[str]) -> Plot | None:
    """One line per measure that lies between 0 and 1, one mark with its interval per model."""

    def fits(number: Number) -> bool:
        values = [value for column in columns if (value := value_of(number, column)) is not None]
        bounded = number["measure"] not in ("perplexity", "forget_quality")
        return bounded and bool(values) and all(0 <= value <= 1 for value in values)

    wanted = [number for number in numbers if fits(number)]
    if not wanted:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lanes = [0.22 * (i - (len(columns) - 1) / 2) for i in range(len(columns))]
        for column, lane in zip(columns, lanes, strict=True):
            for y, number in enumerate(wanted):
                value = value_of(number, column)
                if value is None:
                    continue
                low, high = interval_of(number, column) or (value, value)
                axes.plot([low, high], [y + lane] * 2, color=colour_of(column), linewidth=1.4)
                _mark(axes, [value], [y + lane], column)
        axes.set_xlim(-0.02, 1.02)
        _names(axes, [number["title"] for number in wanted])

    aside = [str(number["title"]) for number in numbers if number not in wanted]
    goal = [f"to be {numbers[0]['goal']}"] if numbers[0]["goal"] else []
    said = "; ".join([*goal, *([f"{', '.join(aside)} in the table"] if aside else [])])
    caption = f"{name}: {said}" if said else name
    return Plot(caption, drawing(draw, HALF, 0.55 + 0.36 * len(wanted), caption))


def _curve(name: str, curve: Mapping[str, Any], columns: Sequence[str]) -> Plot | None:
    """The share of a set that is extracted, over the number of samples an attacker draws."""
    lines = {column: curve[column] for column in columns if curve.get(column)}
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, rates in lines.items():
            values = [number_of(rate) for rate in rates]
            axes.plot(curve["n"], values, color=colour_of(column), linewidth=1.4)
            _mark(axes, curve["n"], values, column)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("samples per example")

    caption = f"{name}: share of {curve['set']} that an attacker gets, over the samples drawn for each row"
    return Plot(caption, drawing(draw, HALF, 3.4, caption))


def _attack(attack: Mapping[str, Any], columns: Sequence[str]) -> Plot | None:
    """What an attack gets from each model, over its budget, with bootstrap intervals."""
    from matplotlib.ticker import MaxNLocator

    lines = {column: curve for column in columns if (curve := attack["curves"].get(column, {})).get("y")}
    if not lines:
        return None
    ticks, unit = list(attack["x"]["ticks"]), f" ({attack['x']['unit']})" if attack["x"]["unit"] else ""
    bounded = all(0 <= value <= 1 for curve in lines.values() for value in curve["y"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, curve in lines.items():
            axes.plot(curve["x"], curve["y"], color=colour_of(column), linewidth=1.4)
            for place, low, high in zip(curve["x"], curve["low"], curve["high"], strict=False):
                axes.plot([place] * 2, [low, high], color=colour_of(column), linewidth=1.0)
            _mark(axes, curve["x"], curve["y"], column)
        if all(float(place).is_integer() for curve in lines.values() for place in curve["x"]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(printable(f"{attack['x']['name']}{unit}"))
        if bounded:
            axes.set_ylim(-0.03, 1.03)

    def draw_names(figure: Figure) -> None:
        """Points that have names lie under each other, as names need room."""
        axes = figure.subplots()
        for i, (column, curve) in enumerate(lines.items()):
            lanes = [place + 0.22 * (i - (len(lines) - 1) / 2) for place in range(len(curve["y"]))]
            for lane, low, high in zip(lanes, curve["low"], curve["high"], strict=False):
                axes.plot([low, high], [lane] * 2, color=colour_of(column), linewidth=1.4)
            _mark(axes, curve["y"], lanes, column)
        _names(axes, ticks)
        axes.set_ylabel(printable(f"{attack['x']['name']}{unit}"))
        if bounded:
            axes.set_xlim(-0.03, 1.03)

    caption = f"{attack['title']}: {attack['y']['name'].replace('_', ' ')} on {attack['set']}"
    if ticks:
        return Plot(caption, drawing(draw_names, HALF, 0.55 + 0.36 * len(ticks), caption))
    return Plot(caption, drawing(draw, HALF, 3.0, caption))


def _names(axes: Axes, names: Sequence[object]) -> None:
    """What lies under each other is named at the left, the first on top."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [printable(str(name), LABEL) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _rows(name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Plot | None:
    """Every row's probability under every model, the rows in the order of the model that is judged."""
    present = [column for column in columns if any(column in row["probability"] for row in rows)]
    if not present:
        return None
    first = next((column for column in ("after", "model") if column in present), present[0])
    ordered = sorted(rows, key=lambda row: number_of(row["probability"].get(first)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column in present:
            values = [number_of(row["probability"].get(column)) for row in ordered]
            _mark(axes, range(1, len(ordered) + 1), values, column, size=5 if len(ordered) <= 100 else 3)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"{len(ordered)} rows, in the order of {printable(first, LABEL)}")

    caption = f"{name}: probability per token of the true answer, row by row"
    return Plot(caption, drawing(draw, HALF, 3.4, caption))


def _training(log: Sequence[Mapping[str, Any]], run: Mapping[str, Any] | None) -> Plot | None:
    """One panel for each thing that was logged over the steps."""
    keys = list(dict.fromkeys(key for row in log for key in row if key not in ("step", "tokens", "seconds", "lr")))
    keys = sorted(keys, key=lambda key: key == "grad_norm")
    if not keys:
        return None

    def draw(axes: Axes, key: str) -> None:
        found = [(number_of(row["step"]), number_of(row[key])) for row in log if key in row]
        steps, values = zip(*found, strict=True)
        lone = "o" if len(found) <= 10 else "None"
        axes.plot(steps, values, color=OTHER, linewidth=1.4, marker=lone, markersize=4, markeredgecolor=OTHER)
        if run and run["kept_step"] != run["steps"]:
            axes.axvline(run["kept_step"], color=SOFT, linewidth=1, linestyle="--")

    kept = "; dashed is the step whose weights were kept" if run and run["kept_step"] != run["steps"] else ""
    return panels(keys, draw, f"Training, step by step: each loss, and what was watched{kept}", height=2.1)


def panels(keys: Sequence[str], draw: Callable[[Axes, str], None], caption: str, height: float) -> Plot:
    """A panel over the steps for each key, a drawing of its own, so that as many stand side by side as the screen is wide."""

    def panel(key: str) -> str:
        def whole(figure: Figure) -> None:
            axes = figure.subplots()
            draw(axes, key)
            axes.set_xlabel("step")

        title = escape(printable(str(key).replace("_", " "), LABEL))
        return f"<div><b>{title}</b>{drawing(whole, PANEL, height, f'{head}: {key}')}</div>"

    head = caption.partition(": ")[0]
    drawn = "".join(panel(key) for key in keys)
    return Plot(caption, f'<div class="panels">{drawn}</div>', wide=len(keys) > 1)


def colour_of(column: str) -> str:
    return COLOUR.get(column, OTHER)


def _mark(axes: Axes, x: Sequence[float], y: Sequence[float], column: str, size: float = 6) -> None:
    """The mark of a model: hollow before, filled after, a diamond for the retrained model."""
    shape = {"retrained": "D", "before": "o", "after": "o", "model": "o"}.get(column, "s")
    axes.plot(
        x, y, linestyle="None", marker=shape, markersize=size * (0.85 if shape == "D" else 1), color=colour_of(column),
        markerfacecolor="none" if column == "before" else colour_of(column), markeredgewidth=1.3,
    )  # fmt: skip


def number_of(value: Any) -> float:
    """A number from a log, where those that are not finite stand as strings; NaN for what is no number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def drawing(
    draw: Callable[[Figure], None], width: float, height: float, caption: str, layout: Literal["constrained"] | None = "constrained"
) -> str:
    """Draw, and make the drawing a part of the page: no prolog, no metadata, ids of its own, the page's colours.

    What is drawn with the gid `run-3`, or `run-3.2`, gets the class `r3`, so that a page can hide all that belongs to a run.
    """
    from io import StringIO

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that matplotlib's font lacks: the browser has it
        figure = Figure(figsize=(width, height), layout=layout)
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    prefix = f"p{crc32(caption.encode('utf-8', 'replace')):08x}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rsplit("}", 1)[-1] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        if run := re.fullmatch(r"run-(\d+)(\.\d+)?", element.attrib.get("id", "")):
            element.attrib["class"] = f"r{run[1]}"
            del element.attrib["id"]  # parts of one run may share a gid
        element.tag = element.tag.rsplit("}", 1)[-1]
        element.attrib = {key.rsplit("}", 1)[-1]: _attribute(key, text, prefix) for key, text in element.attrib.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": printable(caption), "style": f"max-width: {72 * GROWN * width:.0f}px"}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, text: str, prefix: str) -> str:
    """An attribute with ids made this drawing's own, and colours and fonts made the page's."""
    if key == "id":
        return prefix + text
    text = re.sub(r"^#(?![0-9a-f]{6}$)|(?<=url\()#", f"#{prefix}", text)
    text = re.sub(r"#0[1-7]0[1-7]0[1-7]\b", lambda found: f"var(--{VARIABLES.get(found[0], 'ink')})", text)
    return re.sub(r"font: (?:[a-z]+ )*([\d.]+px)[^;]*", r"font-size: \1", text)
