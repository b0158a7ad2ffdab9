"""The figures as tables in Markdown, and their place in a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks {size}: written by the command below -->", "<!-- end of benchmarks {size} -->"
EXPLAINED = {
    "training": (
        "Both ways see the same examples, and their gradients were compared first: they differ by {worst:.0e} at most. Ratios "
        "are of turns in alternation, median (lowest to highest). Memory is the peak of each way's own process after two steps, "
        "before anything was timed{memory}, and its ratio is of that. MFU: the operations that the work needs "
        "(`benchmarks/work.py`) per second, as a share of the fastest matrix product."
    ),
    "evaluation": "Numbers of both ways differ by {difference:.0e} at most. Rows: {rows}.",
}


def page(found: Mapping[str, Any]) -> str:
    """All that was measured, as Markdown."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    took = f"{found['minutes']:.1f} minutes" if "minutes" in found else "stopped before the end"
    lines = [
        f"`{found['command']}`, {found['date']}, {took}: {machine['name']}; {versions}. Matrix products "
        f"{machine['square'] / 1e12:.3g} TFLOP/s (squares), {machine['model'] / 1e12:.3g} (a window through the model's largest "
        f"layer), {machine['precision']}; copying {machine['bandwidth'] / 1e9:.3g} GB/s. Model: {found['model']}.",
    ]
    if rows := found.get("training"):
        cuda = machine["device"] == "cuda"
        memory = "" if cuda else ", above what its imports take (whole in parentheses)"
        worst = max(row["difference"] for row in rows)
        lines += ["", *training(rows, cuda), "", EXPLAINED["training"].format(worst=worst, memory=memory), "", *stages(rows)]
    if one := found.get("evaluation"):
        lines += ["", *evaluation(one), "", EXPLAINED["evaluation"].format(
            difference=one["difference"], rows=", ".join(f"{name} {count}" for name, count in one["rows"].items())
        )]  # fmt: skip
    if one := found.get("start"):
        names = {
            "help": "`llm-unlearn --help`",
            "refused": "refusing a wrong recipe",
            "first step": f"first training step of `{found['recipe']}`, warm cache",
        }
        lines += ["", *table(["start", "seconds"], [[names[name], spread(times)] for name, times in one.items()])]
    return "\n".join(lines)


def training(rows: Sequence[Mapping[str, Any]], cuda: bool) -> list[str]:
    against = ["plain", "ratio", "target"]
    head = ["work", "tokens/s", *against, "peak GB", *against, "MFU", "plain", "target", "what bounds it"]
    lines = []
    for row in rows:
        targets, speed, mfu = row["targets"], row["tokens_per_second"], row["mfu"]
        memory = {
            way: f"{used['above'] / 1e9:.2f}" + ("" if cuda else f" ({used['whole'] / 1e9:.2f})")
            for way, used in row["memory"].items()
        }
        wanted = [f"≤ {targets['memory']:.2f}"] if targets["memory"] else []
        wanted += [f"≤ {targets['gigabytes']} GB"] if targets["gigabytes"] else []
        lines.append([
            row["name"], *(f"{statistics.median(speed[way]):,.0f}" for way in ("ours", "plain")), spread(row["ratios"]),
            f"≥ {targets['speed']:g}", memory["ours"], memory["plain"], f"{row['share']:.2f}", ", ".join(wanted) or "–",
            *(f"{statistics.median(mfu[way]):.0%}" for way in ("ours", "plain")),
            f"≥ {targets['mfu']:.0%}" if targets["mfu"] else "–", "; ".join(row["bounds"]) or "reached",
        ])  # fmt: skip
    return table(head, lines)


def stages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a step's time goes."""
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    lines = [[row["name"], *(f"{row['stages'].get(name, 0.0):.3f}" for name in names)] for row in rows]
    return table(["seconds of a step", *names], lines)


def evaluation(one: Mapping[str, Any]) -> list[str]:
    memory = [f"{one['memory'][way]['above'] / 1e9:.2f}" for way in ("ours", "plain")]
    times = [f"{statistics.median(one['seconds'][way]):.2f}" for way in ("ours", "plain")]
    bounds = "; ".join(one["bounds"]) or "reached"
    head = ["evaluation", "seconds", "plain", "ratio", "target", "peak GB", "plain", "what bounds it"]
    return table(head, [["TOFU's suite", *times, spread(one["ratios"]), f"≥ {one['targets']['speed']:g}", *memory, bounds]])


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def around(path: Path, size: str) -> tuple[str, str]:
    """What stands before and after the tables of a size, the markers included.

    Raises:
        SystemExit: the page has none for this size.
    """
    page, begin, end = path.read_text(encoding="utf-8") if path.is_file() else "", BEGIN.format(size=size), END.format(size=size)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path}: has no place for this; put these two lines where it is to stand:\n{begin}\n{end}")
    return before + begin, end + after


def write(path: Path, size: str, text: str) -> None:
    """Put it between the page's markers."""
    before, after = around(path, size)
    path.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")
