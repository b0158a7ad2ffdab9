"""The rows of the training table: which method, what it trains, and what is aimed at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.shapes import Size

C, ALPHA = 6.5, 100.0  # RMU's length of the vector, and the weight of its retain term
CHECK_RATE = 1e3  # so large a step that what it changes is not lost in the rounding of the weights themselves


@dataclass(frozen=True)
class Row:
    """One way of training, and the targets: against the plain baseline, and on an H200-class GPU."""

    method: Literal["graddiff", "npo", "kl", "rmu"]
    trains: Literal["full", "lora", "few"]
    speed: float  # at least so many times the baseline's tokens per second
    memory: float | None = None  # at most such a share of its memory
    mfu: dict[str, float] | None = None  # size -> at least such a share of the matmul rate
    gigabytes: float | None = None  # at most so many in all
    quantize: Literal["nf4"] | None = None

    def layer(self, layers: int) -> int:
        """The layer that RMU reads: the end of the first quarter of the model."""
        return max(1, layers // 4) - 1

    def trained_layers(self, layers: int) -> range | None:
        """The layers that have weights that are trained; None for all. Public code trains three, up to the one that is read."""
        top = self.layer(layers)
        if self.method != "rmu":
            return None
        return range(max(0, top - 2), top + 1) if self.trains == "few" else range(top + 1)


ROWS = {
    "GradDiff, full": Row("graddiff", "full", 2, 1 / 2, {"1b": 0.5}),
    "GradDiff, LoRA": Row("graddiff", "lora", 2, 1 / 2),
    "NPO, full": Row("npo", "full", 3, 1 / 3),
    "NPO, LoRA": Row("npo", "lora", 3, 1 / 3, {"1b": 0.4}, 24),
    "NPO, LoRA, nf4": Row("npo", "lora", 3, 1 / 3, None, 12, "nf4"),
    "KL, full": Row("kl", "full", 3, 1 / 3),
    "KL, LoRA": Row("kl", "lora", 3, 1 / 3),
    "RMU, few layers": Row("rmu", "few", 4),
    "RMU, LoRA": Row("rmu", "lora", 4),
}
"""Name -> row. GradDiff: ascent + nll; NPO: npo + nll; KL: ascent + kl; RMU: rmu + embed_match at a quarter of the depth."""
GIGABYTES_AT = "8b"  # the size at which the targets in gigabytes hold


def objective(row: Row, layers: int) -> dict[str, Any]:
    """The terms of a row's recipe."""
    layer = row.layer(layers)
    forget, retain = {
        "graddiff": ({"name": "ascent"}, {"name": "nll"}),
        "npo": ({"name": "npo", "beta": 0.1}, {"name": "nll"}),
        "kl": ({"name": "ascent"}, {"name": "kl"}),
        "rmu": ({"name": "rmu", "layer": layer, "c": C}, {"name": "embed_match", "layers": [layer]}),
    }[row.method]
    return {"forget": {"loss": forget}, "retain": {"loss": retain, "weight": ALPHA if row.method == "rmu" else 1.0}}


def write_recipe(row: Row, size: Size, model: Path, data: Path, steps: int, *, check: bool, layers: int) -> Path:
    """A row as a recipe file (JSON, which is YAML too).

    Args:
        check: one plain step in float32 whose change of the weights is the gradient, for the comparison of both ways.
    """
    chosen = row.trained_layers(layers)
    wanted: dict[str, Any] = {"base": str(model), "adapter": None, "quantize": None if check else row.quantize}
    if row.trains == "lora":
        wanted["adapter"] = {} if chosen is None else {"layers": list(chosen)}
    if row.trains == "few":
        wanted["trainable"] = [f"layers.{layer}.mlp.down_proj" for layer in chosen or ()]
    if check:
        wanted["precision"] = "fp32"
    columns = {"prompt": "question", "answer": "answer"}
    tree = {
        "output": str(model.parent / "run"),
        "model": wanted,
        "data": {name: {"source": str(data / f"{name}.jsonl"), **columns} for name in ("forget", "retain")},
        "objective": objective(row, layers),
        "train": {
            "steps": steps, "window": {"forget": size.window, "retain": size.window}, "batch_tokens": size.batch_tokens,
            "schedule": "constant", "warmup": 0.0, "gradient_checkpointing": size.recomputed,
            **({"optimizer": "sgd", "lr": CHECK_RATE, "clip": None} if check else {"lr": 1e-6}),
        },
    }  # fmt: skip
    path = model.parent / f"{row.method}-{row.trains}-{steps}{'-check' if check else ''}.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path
