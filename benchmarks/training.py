"""The training table: each row's gradients compared, its memory taken, and its steps timed in turns with the plain baseline's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import device, ours, plain, work
from benchmarks.rows import GIGABYTES_AT, Row, write_recipe
from benchmarks.shapes import Size, write_model, write_set
from benchmarks.sides import Failed, side
from llm_unlearn import recipe as recipes

WAYS: dict[str, Callable[..., None]] = {"plain": plain.train, "ours": ours.train}
TOLERANCE = 1e-3  # relative difference of the gradients in float32
WARM = 2  # steps before anything is timed: in the second, the optimizer's moments are there, and memory has its peak
SPARE = WARM + 1  # steps that are not timed, the last one for the stages
CHECKED = 4  # rows of each stream whose gradients are compared


@dataclass(frozen=True)
class Place:
    """The models and rows that all rows of the table share."""

    folder: Path
    model: Path
    twin: Path
    data: Path

    @staticmethod
    def of(size: Size, rounds: int, folder: Path) -> Place:
        for name in ("model", "twin", "data"):
            (folder / name).mkdir(parents=True)
        model = write_model(size.shape, folder / "model" / "model", dtype=device.dtype(), device=device.device())
        device.free()
        twin = model
        if size.twin:
            twin = folder / "twin" / "model"
            write_model(size.shape, twin, dtype=torch.float32, device=device.device(), layers=size.twin)
            device.free()
        for name in ("forget", "retain"):
            write_set(name, size.window * (rounds * size.steps + SPARE), size.shape.vocabulary, folder / "data")
        return Place(folder, model, twin, folder / "data")


def measure(
    name: str, row: Row, size: Size, called: str, rounds: int, place: Place, rate: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """One row of the table.

    Args:
        called: the size's name.
        rate: of matrix products, FLOPs per second.

    Raises:
        Failed: a way failed, or both do not compute the same gradient.
    """
    difference = compare(name, row, size, place, say)
    task = task_of(row, size, place, rounds * size.steps + SPARE)
    used: dict[str, dict[str, int]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as both:
        children = {way: both.enter_context(side(train, task)) for way, train in WAYS.items()}
        for way, child in children.items():
            say(f"{name}: memory, {way}")
            base, peak = child.made["base"], child.ask(("steps", WARM))["peak"]
            used[way] = {"whole": peak, "imports": base, "above": peak - base}
        for number in range(rounds):
            say(f"{name}: speed, round {number + 1} of {rounds}")
            for way, child in children.items():
                seconds[way].append(child.ask(("steps", size.steps))["seconds"] / size.steps)
        stages = children["ours"].ask(("stages", 1))
        begin = children["ours"].made["begin"]
    if row.trains != "lora" and row.method != "graddiff":  # the model as it was is asked once, before the first step
        before = begin / len(task.windows) / work.EPOCHS
        seconds["ours"] = [one + before for one in seconds["ours"]]
        stages["reference"] = stages.get("reference", 0.0) + before
    return {"name": name, "difference": difference, "memory": used, "stages": stages} | judged(
        row, size, called, task, seconds, used, stages, rate
    )


def task_of(row: Row, size: Size, place: Place, steps: int, *, check: bool = False) -> ours.Task:
    """What both ways are given."""
    model = place.twin if check else place.model
    size = replace(size, window=min(size.window, CHECKED)) if check else size
    layers = size.twin if check and size.twin else size.shape.layers
    path = write_recipe(row, size, model, place.data, steps, check=check, layers=layers)
    windows = ours.windows_of(ours.job_of(recipes.load(path)))
    return ours.Task(row, path, model, windows, layers, size.recomputed, check)


def compare(name: str, row: Row, size: Size, place: Place, say: Callable[[str], None]) -> float:
    """The relative difference of both ways' gradients, as one plain step in float32 shows them."""
    files = {way: place.folder / f"{way}.pt" for way in WAYS}
    for way, train in WAYS.items():
        say(f"{name}: gradient, {way}")
        with side(train, task_of(row, size, place, 1, check=True)) as one:
            one.ask(("change", files[way]))
    found = ours.difference(files["ours"], files["plain"])
    for file in files.values():
        file.unlink()
    if not found <= TOLERANCE:
        raise Failed(f"{name}: both ways do not compute the same: their gradients differ by {found:.1e} (at most {TOLERANCE:.0e})")
    say(f"{name}: gradients differ by {found:.1e}")
    return found


def judged(
    row: Row, size: Size, called: str, task: ours.Task, seconds: dict[str, list[float]], used: dict[str, dict[str, int]],
    stages: dict[str, float], rate: float,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a row, its targets, and what bounds it where it does not reach them."""
    windows = task.windows[WARM : WARM + len(seconds["ours"]) * size.steps]
    tokens = [float(sum(len(ids) for stream in window.values() for ids, _ in stream)) for window in windows]
    needed = [work.flops(row, size.shape, window) for window in windows]
    per_turn = [slice(i, i + size.steps) for i in range(0, len(windows), size.steps)]
    each: dict[str, list[float]] = {"tokens": tokens, "flops": needed}
    turn = {what: [sum(values[part]) / size.steps for part in per_turn] for what, values in each.items()}
    speed = {way: [t / s for t, s in zip(turn["tokens"], times, strict=True)] for way, times in seconds.items()}
    mfu = {way: [f / s / rate for f, s in zip(turn["flops"], times, strict=True)] for way, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    share = used["ours"]["above"] / used["plain"]["above"]
    floor = statistics.median(turn["flops"]) / rate
    least = work.memory(row, size.shape, device.dtype() != torch.float32)
    targets: dict[str, Any] = {"speed": row.speed, "memory": row.memory, "mfu": (row.mfu or {}).get(called)}
    targets["gigabytes"] = row.gigabytes if called == GIGABYTES_AT else None
    bounds = []
    took = statistics.median(seconds["ours"])
    if statistics.median(ratios) < row.speed or (targets["mfu"] and statistics.median(mfu["ours"]) < targets["mfu"]):
        whole = sum(stages.values())
        parts = [f"{stage} {part / whole:.0%}" for stage, part in sorted(stages.items(), key=lambda one: -one[1])[:4]]
        most = statistics.median(seconds["plain"]) / floor
        bounds.append(f"products alone {floor:.3g} of {took:.3g} s (at most {most:.1f}×); {', '.join(parts)}")
    much = used["ours"]["above"] / 1e9
    if (row.memory and share > row.memory) or (targets["gigabytes"] and much > targets["gigabytes"]):
        bounds.append(f"weights, gradients and moments alone {least / 1e9:.2f} of {much:.2f} GB")
    return {"seconds": seconds, "tokens_per_second": speed, "mfu": mfu, "ratios": ratios, "share": share,
            "floor": floor, "least_memory": least, "targets": targets, "bounds": bounds}  # fmt: skip
