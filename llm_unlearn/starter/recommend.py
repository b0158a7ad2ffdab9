"""Settings to start with, by the size and kind of the model, the length of the answers, and the memory of the device.

Every number of `llm-unlearn new --model …` is in this file, with its reason and where it comes from. Three kinds of model were
measured by this project: its own of a million weights (docs/leaderboard.md), SmolLM2-135M-Instruct on rows of TOFU (one seed), and
none above: there the numbers are those of the papers that are named, and the reason says "not measured here".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Value = Any
"""Plain data of a recipe."""


@dataclass(frozen=True)
class Size:
    """Settings measured or published for models up to a number of weights."""

    weights: float
    lr: float
    """Of LoRA."""
    why_lr: str
    window: tuple[int, int]
    """Most rows of the forget and the retain set in an optimizer step."""
    epochs: int
    """Fewest passes over the forget set; the stopping rule ends a run before."""
    beta_times_tokens: float
    """NPO's β times the mean length of an answer: its gradient falls to 12 % once an answer has lost 2/β nats, of any length."""
    retain_per_token: float
    """Weight of the retain term (a value per token) beside NPO (a value per answer), for each token of a mean answer."""
    retain: float
    """Weight of the retain term beside WGA; both have a value per token."""
    measured: str


_PUBLISHED = "not measured here: learning rate from published recipes, the rest as for SmolLM2-135M"
SIZES = (
    Size(
        weights=20e6, lr=1e-3, why_lr="as for the embedded models", window=(16, 32), epochs=40, beta_times_tokens=7.5,
        retain_per_token=2.0, retain=5.0, measured="measured here on a model of 1.1 M weights",
    ),
    Size(
        weights=400e6, lr=1e-3, why_lr="1e-3 reached the retrained model of SmolLM2-135M within 20 steps, 1e-4 did not move it",
        window=(16, 16), epochs=10, beta_times_tokens=3.9, retain_per_token=0.43, retain=1.0,
        measured="measured here on SmolLM2-135M-Instruct and 19 rows of a TOFU author, one seed",
    ),
    Size(
        weights=30e9, lr=1e-4, why_lr="ten times the 1e-5 with which TOFU's authors (2401.06121) train all weights of 7 B",
        window=(16, 16), epochs=10, beta_times_tokens=3.9, retain_per_token=0.43, retain=1.0, measured=_PUBLISHED,
    ),
    Size(
        weights=math.inf, lr=5e-5, why_lr="half of that, as QLoRA halves its rate above 30 B (2305.14314)", window=(16, 16),
        epochs=10, beta_times_tokens=3.9, retain_per_token=0.43, retain=1.0, measured=_PUBLISHED,
    ),
)  # fmt: skip
"""Ascending. Update these lines when something is measured; nothing else repeats them."""

FEWEST_STEPS = 60
"""Optimizer steps that a run may take at least: of a few rows, ten epochs are too few."""
STEPS_AN_EPOCH = 5
"""Optimizer steps into which the forget set is cut, where it is small."""
LOOK, PATIENCE = 2, 10
"""Steps between two looks at the probe rows, as perplexity rose from 5.8 to 52 within five; and looks beyond the budget that end a
run, as a single dip is noise."""
ROOM = 0.85
"""Share of the free memory that the estimate may fill."""
LONGEST_TEXT = 1024
"""Tokens of a block of running text."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model that the settings depend on, from the config and the tokenizer."""

    name: str
    weights: int
    has_experts: bool
    quantization: str | None
    """Method of a base that is quantized already."""
    has_template: bool
    context: int | None
    """Longest sequence."""


@dataclass(frozen=True)
class DataFacts:
    """Facts of the data that the settings depend on, from the rows, as the tokenizer encodes them."""

    rows: int
    """Examples of the forget set."""
    answer: float
    """Mean tokens of a target in the forget set."""
    longest: int
    """Most tokens of an example, of any set."""
    longest_answer: int
    has_holdout: bool
    is_text: bool
    overlap: int
    """Retain rows that are in the forget set, too."""


@dataclass(frozen=True)
class Setting:
    """One choice, with its reason."""

    value: Value
    reason: str


@dataclass(frozen=True)
class Fit:
    """A way to fit a run into memory, from the fastest to the smallest."""

    batch_tokens: int
    gradient_checkpointing: bool
    quantize: str | None


FITS = (
    Fit(8192, False, None), Fit(2048, False, None), Fit(8192, True, None), Fit(2048, True, None), Fit(512, True, None),
    Fit(2048, True, "nf4"), Fit(512, True, "nf4"),
)  # fmt: skip
"""Tried in this order: smaller micro-batches cost little, recomputation a third of the time, four bits precision."""


def size_of(weights: int) -> Size:
    """Return the line of the table for a number of weights."""
    return next(size for size in SIZES if weights <= size.weights)


def settings_of(model: ModelFacts, data: DataFacts) -> dict[str, Setting]:
    """Return the settings of a recipe by their keys, but for those that decide memory (`FITS`)."""
    size = size_of(model.weights)
    forget = min(size.window[0], max(4, data.rows // STEPS_AN_EPOCH), data.rows)
    retain = max(1, round(forget * size.window[1] / size.window[0]))
    steps = math.ceil(data.rows / forget)
    epochs = max(size.epochs, math.ceil(FEWEST_STEPS / steps))
    beta, weight = _rounded(size.beta_times_tokens / data.answer), _rounded(size.retain_per_token * data.answer)
    measured = size.measured
    npo = f"npo with beta {beta:g} and weight {weight:g} of the retain term"
    if data.has_holdout:
        loss = Setting(
            {"name": "wga", "beta": 1.0},
            f"one value per token, whatever the length of an answer ({data.answer:.0f} tokens here); needs an aim to stop at, "
            f"which the holdout set is; {measured}. Without an aim: {npo}",
        )
        kept = Setting(size.retain, f"both terms have one value per token; {measured}")
        stop = {"until": "holdout", "budget": {"retain_accuracy": 0.02}, "every": LOOK, "patience": PATIENCE}
        aim = "as unlikely as rows of the same kind that the model never saw"
    else:
        loss = Setting(
            {"name": "npo", "beta": beta},
            f"ends by itself, as no holdout set says how far to go; beta is {size.beta_times_tokens:g} / {data.answer:.0f}, the "
            f"mean tokens of an answer, as its gradient fades after 2 / beta nats; {measured}",
        )
        kept = Setting(
            weight, f"{size.retain_per_token:g} x {data.answer:.0f} tokens: one value per token beside one per answer; {measured}"
        )
        stop = {"budget": {"retain_accuracy": 0.02}, "every": LOOK, "patience": PATIENCE}
        aim = "no aim without holdout rows: all steps, unless the retain set suffers"
    experts = "; routers stay frozen, expert matrices are adapted (not measured here)" if model.has_experts else ""
    return {
        "model.adapter": Setting({"kind": "lora", "rank": 16, "alpha": 32}, f"the rank of every figure in the docs{experts}"),
        "model.precision": Setting("auto", "bf16 where the accelerator computes in it, fp32 elsewhere"),
        "objective.forget.loss": loss,
        "objective.retain.weight": kept,
        "train.epochs": Setting(epochs, f"{epochs * steps} optimizer steps at most; the stopping rule ends it before"),
        "train.lr": Setting(size.lr, f"{size.why_lr}; {measured}"),
        "train.schedule": Setting("constant", "a rate that falls would make `how far` depend on the number of steps")
        if data.has_holdout
        else Setting("linear", "the run ends with its steps"),
        "train.window": Setting({"forget": forget, "retain": retain}, f"{steps} steps an epoch"),
        "train.stop": Setting(stop, f"{aim}; looked at every {LOOK} steps, as a run can pass its aim between two looks"),
    }


def fits_of(model: ModelFacts, can_quantize: bool) -> list[Fit]:
    """Return the ways to fit a run into memory that are open to a model: four bits only for one that is not quantized."""
    return [fit for fit in FITS if fit.quantize is None or (can_quantize and not model.quantization)]


def tokens_of(model: ModelFacts, data: DataFacts) -> int:
    """Return `max_tokens` of the sources: the longest row, in steps of 64, within the model's context."""
    context = model.context or 1 << 30
    return min(context, LONGEST_TEXT if data.is_text else max(64, -(-data.longest // 64) * 64))


def new_tokens_of(model: ModelFacts, data: DataFacts) -> int:
    """Return `max_new_tokens` of the suite: room for the longest answer, and a quarter more."""
    room = model.context - data.longest if model.context else 1 << 30
    wanted = min(400, max(16, -(-round(1.25 * data.longest_answer) // 16) * 16))
    return max(8, min(wanted, room)) if room > 8 else wanted


def _rounded(value: float) -> float:
    """Two significant digits."""
    return float(f"{value:.2g}")
