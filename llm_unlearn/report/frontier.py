"""What each method, or each trial of a sweep, forgot against what it kept, as an SVG file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_unlearn.report.plots import HALF, LABEL, STYLE, WHOLE, Plot, drawing
from llm_unlearn.report.verdict import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1a1a1a", "#5c5c5c", "#c8c8c8"
BEST, OTHER, BROKEN = "#0072b2", "#7a7a7a", "#d55e00"
"""On the frontier, ranked, collapsed: colours of Okabe and Ito, which colour-blind people tell apart; the marks differ too."""

PAGE = {"#ffffff": "paper", INK: "ink", BEST: "best", OTHER: "soft", BROKEN: "warn"}
"""The plot's own colours -> those of the page that it stands in."""

WHITE: dict[Any, Any] = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "text.color": INK, "axes.titlecolor": INK,
    "axes.labelcolor": INK, "axes.edgecolor": SOFT, "grid.color": LINE, "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK,
}  # fmt: skip
"""The file stands alone, so its colours are its own and not those of a page."""

SIZE, SMALL = (9.6, 6.4), 9
"""Inches of the plot; points of a label."""
FEW, MANY, CROWD = (HALF, 4.8), (WHOLE, 8.0), 12
"""The same inside a page, in one column of it or, with more than so many runs, in both."""
LEGEND = "●  frontier: nothing beats it     ○  ranked     ✖ ▼  collapsed, ▼ below this plot     crosses: 95 % intervals over seeds"
MARGIN, LEAST = 0.12, 0.04
"""Free share of an axis round the points, and the shortest axis."""


def frontier_svg(board: Mapping[str, Any], *, legend: str = LEGEND, maker: str = "llm-unlearn bench") -> str:
    """The plot as text; the same board gives the same text.

    Args:
        board: its `methods`, each with a name, as `ranking.ranked` gives them.
        maker: the command that writes the file, and may replace it.
    """
    from io import StringIO

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = StringIO()
    with rc_context(STYLE | WHITE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that matplotlib's font lacks: the browser has it
        figure = Figure(figsize=SIZE)
        _draw(figure, board, legend)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": maker})
    head, mark, rest = file.getvalue().partition("<metadata>")
    return f"{head}<title>What each method forgot against what it kept</title>\n {mark}{rest}"


def frontier_plot(board: Mapping[str, Any]) -> Plot:
    """The same plot of single runs as a part of a page, in the page's colours; larger where there are many."""
    count = len(board["methods"])
    caption = f"Frontier: what each run forgot against what it kept. {LEGEND.rpartition('     ')[0]}"
    size = FEW if count <= CROWD else MANY
    svg = drawing(lambda figure: _draw(figure, board), *size, caption, layout=None)
    for colour, variable in PAGE.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Plot(caption, svg, wide=count > CROWD, large=count > CROWD)


def _draw(figure: Figure, board: Mapping[str, Any], title: str = "") -> None:
    left, low = 0.86 / figure.get_figwidth(), 0.58 / figure.get_figheight()
    axes = figure.subplots(gridspec_kw={"left": left, "right": 0.98, "bottom": low, "top": 0.94})
    shown = [one for one in board["methods"] if one["state"] != "failed" and one["score"]["mean"] is not None]
    standing = [one for one in shown if one["state"] == "ranked"]
    bottom = _bottom(standing or shown)
    axes.set_xlim(-0.03, 1.06)
    axes.set_ylim(bottom, 1 + MARGIN * (1 - bottom))
    axes.set_xlabel("forgotten: 0 as the model before, 1 as the retrained model")
    axes.set_ylabel("kept: share of the scores on everything else")
    if title:
        axes.set_title(title, loc="left", fontsize=SMALL)

    best = sorted((one["forgotten"]["mean"], one["kept"]["mean"]) for one in standing if one["frontier"])
    if best:
        x = [0.0, *(point[0] for point in best), best[-1][0]]
        y = [best[0][1], *(point[1] for point in best), bottom]
        axes.step(x, y, where="pre", color=BEST, linewidth=1.2, alpha=0.7, zorder=1)
    words = [_point(axes, one, bottom) for one in shown]
    for name, x_, marker in (("before", 0.0, "o"), ("retrained", 1.0, "D")):
        axes.plot([x_], [1.0], linestyle="None", marker=marker, markersize=8, color=INK, markerfacecolor="none", clip_on=False)
        words.append((x_, 1.0, name, INK))
    _label(axes, words)


def _bottom(shown: Sequence[Mapping[str, Any]]) -> float:
    """Where the axis of what was kept begins: below every method that did not collapse, which may lie close together."""
    lowest = min((one["kept"]["mean"] for one in shown), default=0.0)
    return float(max(0.0, lowest - MARGIN * max(1 - lowest, LEAST)))


def _point(axes: Axes, one: Mapping[str, Any], bottom: float) -> tuple[float, float, str, str]:
    """The mark of one method with its intervals, and where its label belongs."""
    x, y = one["forgotten"]["mean"], one["kept"]["mean"]
    name = printable(str(one["name"]), LABEL)
    broken = one["state"] == "collapsed"
    colour = BROKEN if broken else BEST if one["frontier"] else OTHER
    marker, words = ("X" if broken else "o"), name
    if y < bottom:
        y, marker, words = bottom, "v", f"{name} (kept {y:.2f})"
    else:
        axes.errorbar(
            x, y, xerr=one["forgotten"]["half"], yerr=one["kept"]["half"], color=colour, linewidth=0.7, alpha=0.6, zorder=1
        )
    face = colour if broken or one["frontier"] else "white"
    axes.plot([x], [y], linestyle="None", marker=marker, markersize=7, color=colour, markerfacecolor=face, clip_on=False, zorder=3)
    return x, y, words, colour


def _label(axes: Axes, words: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name beside its mark, at the nearest place where it meets no other name or mark; a line leads to far ones."""
    dots = 72 / axes.figure.dpi  # from pixels to points
    marks = [(dots * float(at[0]), dots * float(at[1])) for at in axes.transData.transform([word[:2] for word in words])]
    low, high = ([dots * float(at) for at in corner] for corner in (axes.bbox.min, axes.bbox.max))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for (x, y), (at_x, at_y, text, colour) in zip(marks, words, strict=True):
        wide, tall = 0.62 * SMALL * len(text), 1.2 * SMALL

        def box(radius: float, angle: float, x: float = x, y: float = y, wide: float = wide, tall: float = tall) -> Box:
            """The text's rectangle, its near edge or corner on a circle round the mark."""
            dx, dy = math.cos(angle), math.sin(angle)
            middle_x, middle_y = x + dx * (radius + wide / 2), y + dy * (radius + tall / 2)
            return middle_x - wide / 2, middle_y - tall / 2, middle_x + wide / 2, middle_y + tall / 2

        def cost(place: tuple[float, float]) -> float:
            found = box(*place)
            inside = found[0] >= low[0] - 4 and found[1] >= low[1] and found[2] <= high[0] + 8 and found[3] <= high[1] + 4
            return sum(_shared(found, other) for other in taken) + (0 if inside else 500) + place[0]

        places = [(radius, math.pi * step / 8) for radius in (8, 16, 28, 44, 64, 90, 120) for step in range(16)]
        chosen = min(places, key=cost)
        found = box(*chosen)
        taken.append(found)
        centre = ((found[0] + found[2]) / 2 - x, (found[1] + found[3]) / 2 - y)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            text, (at_x, at_y), centre, textcoords="offset points", ha="center", va="center", fontsize=SMALL,
            color=INK if colour == OTHER else colour, arrowprops=line if chosen[0] > 16 else None, annotation_clip=False, zorder=4,
        )  # fmt: skip


Box = tuple[float, float, float, float]
"""Left, low, right, high, in points."""


def _shared(a: Box, b: Box) -> float:
    """The area on which two rectangles lie over each other."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
