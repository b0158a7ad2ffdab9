"""The evaluation table: TOFU's suite, carried out by the project and measure by measure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import device, ours, plain_suite, work
from benchmarks.shapes import LENGTHS, TEMPLATE_TOKENS, WRONG, Size, write_model, write_set
from benchmarks.sides import Failed, side

TARGET = 8.0
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}  # of a number, float32 and bf16
ROUNDS = {"cpu": 1, "cuda": 2}  # at most: one takes as long as many steps


def write_suite(size: Size, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The suite file of `plain_suite.MEASURES`, and its sets."""
    files = {name: write_set(name, count, size.shape.vocabulary, folder) for name, count in size.evaluation.items()}
    sets: dict[str, dict[str, str]] = {}
    for name, file in files.items():
        sets[name] = {"source": str(file), "prompt": "question", "answer": "answer"}
        sets[name] |= {"paraphrase": "paraphrase"} if "paraphrase" in LENGTHS[name] else {}
        sets[name] |= {"perturbed": "perturbed"} if name in WRONG else {}
    tree = {
        "sets": sets,
        "measures": [measure for _, measure in plain_suite.MEASURES],
        "max_new_tokens": size.max_new_tokens,
        "batch_tokens": size.batch_tokens,
    }
    path = folder / "suite.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path, files


def floor(size: Size, files: dict[str, Path], limits: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the matrix products alone, every answer scored and every text written once; and of reading the weights once for
    each token of the longest text, as nothing less writes it."""
    total, longest = 0.0, 0
    for name, file in files.items():
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            asked = TEMPLATE_TOKENS + len(row["question"].split())
            answers = [row["answer"], *([row["paraphrase"]] if "paraphrase" in row else []), *row.get("perturbed", [])]
            for tokens in (len(answer.split()) + 1 for answer in answers):
                total += work.forward(size.shape, asked + tokens, tokens)
            if name != "holdout":
                written = min(size.max_new_tokens, int(row["question"].split()[-1][1:]) + 1)
                total, longest = total + work.forward(size.shape, asked + written, written), max(longest, written)
    read = work.weights(size.shape) * device.dtype().itemsize * longest
    return total / limits["matmul"], read / limits["bandwidth"]


def measure(size: Size, rounds: int, folder: Path, limits: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds from a model's folder to its numbers, each way from nothing that was kept.

    Raises:
        Failed: a way failed, or the numbers differ.
    """
    folder.mkdir()
    rounds = min(rounds, ROUNDS[device.device().type])
    model = write_model(size.shape, folder / "model", dtype=device.dtype(), device=device.device(), writes=True)
    device.free()
    suite, files = write_suite(size, folder)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    used: dict[str, dict[str, int]] = {}
    difference = 0.0
    with ExitStack() as both:
        children = {
            "plain": both.enter_context(side(plain_suite.evaluate, model, files, size.batch, size.max_new_tokens)),
            "ours": both.enter_context(side(ours.evaluate, suite, model, folder)),
        }
        for number in range(rounds):
            found: dict[str, Any] = {}
            for way, child in children.items():
                say(f"evaluation: {way}, round {number + 1} of {rounds}")
                found[way] = child.ask("go")
                seconds[way].append(found[way]["seconds"])
                base = child.made["base"]
                used.setdefault(way, {"whole": found[way]["peak"], "imports": base, "above": found[way]["peak"] - base})
            numbers = json.loads((found["ours"]["out"] / "evaluation.json").read_text(encoding="utf-8"))["numbers"]
            difference = max(difference, *differences(numbers, found["plain"]["numbers"]))
    say(f"evaluation: numbers differ by {difference:.1e}")
    if not difference <= TOLERANCE[device.device().type]:
        raise Failed(f"evaluation: the numbers of both ways differ by {difference:.1e}")
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    bounds = []
    if statistics.median(ratios) < TARGET:
        products, reading = floor(size, files, limits)
        took = statistics.median(seconds["ours"])
        bounds.append(f"products alone {products:.3g}, reading the weights for the longest text {reading:.3g} of {took:.3g} s")
    return {"seconds": seconds, "memory": used, "ratios": ratios, "difference": difference, "bounds": bounds,
            "rows": dict(size.evaluation), "targets": {"speed": TARGET}}  # fmt: skip


def differences(numbers: list[dict[str, Any]], plain: list[float]) -> list[float]:
    """Of each number, |a − b| / max(1, |b|): nearly all are shares."""
    found = [one["values"]["model"]["value"] for one in numbers]
    return [abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, plain, strict=True)]
