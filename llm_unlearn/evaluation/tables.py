"""What a model said of a set, as plain arrays: the only thing that measures ever see.

Shapes: R rows of a set, A answers scored (a row has its answer, perhaps a paraphrase and several wrong ones), N answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["answer", "paraphrase", "perturbed", "peer"]
"""`peer`: the row's own answer with the targets that OpenUnlearning reads (`data/examples.py`)."""
Distance = Literal["kl", "js"]


@dataclass(frozen=True)
class Sampler:
    """How a next token is drawn: from softmax(logits / temperature), cut to the `top_k` likeliest, then to the fewest of them
    that hold `top_p`, and divided by what is left."""

    temperature: float
    top_k: int | None
    top_p: float


@dataclass(frozen=True)
class Draws:
    """`n` answers to each prompt, drawn at temperature 1 from the whole distribution."""

    n: int
    seed: int


@dataclass(frozen=True)
class Shots:
    """The answers scored again behind the first `count` rows of another set."""

    set: str
    count: int


@dataclass(frozen=True)
class Neighbours:
    """The answers scored again with one token swapped, in `n` ways."""

    n: int


@dataclass(frozen=True)
class Cut:
    """The truth as text, cut to so many tokens."""

    tokens: int


PerRow = Literal["gradient"] | Shots | Neighbours
"""Passes that give one number per row: the norm of the gradient of NLL/T, or NLL/T of the answer in other company."""
Need = Literal["answer", "paraphrase", "perturbed", "peer", "generation", "keyword", "distance"] | PerRow | Sampler | Draws | Cut
"""What a measure must have of a set: answers to score, texts to write, and what is kept only where it is asked for."""
Column = Distance | Sampler
"""Further numbers per answer token."""


@dataclass(frozen=True)
class Likelihood:
    """Numbers per answer token from one teacher-forced pass; answers are laid end to end, answer a is `start[a]:start[a + 1]`."""

    row: Ints  # (A,) the row of the set that an answer belongs to, ascending within a kind
    kind: NDArray[np.str_]  # (A,) of `Kind`
    start: Ints  # (A + 1,)
    logp: Floats  # (N,) log p of the target, nats
    hit: NDArray[np.bool_]  # (N,) the target is the model's first choice
    mean: Floats  # (N,) mean of log p under the model's own distribution, −entropy
    std: Floats  # (N,) its standard deviation
    more: Mapping[Column, Floats] = field(default_factory=dict)
    """(N,) each: the distances to the retrained model, or log p of the target under a sampler; NaN but for "answer"."""

    @property
    def entropy(self) -> Floats:
        """(N,) of the model's distribution, nats."""
        return -self.mean

    def of(self, kind: Kind) -> Likelihood:
        """The answers of one kind only, in the order of their rows."""
        chosen = np.flatnonzero(self.kind == kind)
        lengths = np.diff(self.start)[chosen]
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(start[-1]) - np.repeat(start[:-1] - self.start[chosen], lengths)
        return Likelihood(
            self.row[chosen],
            self.kind[chosen],
            start,
            self.logp[tokens],
            self.hit[tokens],
            self.mean[tokens],
            self.std[tokens],
            {name: column[tokens] for name, column in self.more.items()},
        )

    @property
    def length(self) -> Ints:
        """(A,) answer tokens T, the end-of-turn token included."""
        return np.diff(self.start)

    @property
    def nll(self) -> Floats:
        """(A,) −Σ log p over the answer's tokens, nats."""
        return -self.sum(self.logp)

    def sum(self, values: NDArray[np.generic]) -> Floats:
        """(N,) -> (A,) sums over each answer's tokens; every answer has at least one."""
        return np.add.reduceat(values.astype(np.float64), self.start[:-1]) if len(self.row) else np.zeros(0)

    def split(self, values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """(N,) -> A arrays, one per answer."""
        return np.split(values, self.start[1:-1]) if len(self.row) else []


@dataclass(frozen=True)
class SetTable:
    """One set seen by one model."""

    ids: list[str]  # (R,)
    prompts: list[str]  # (R,)
    answers: list[str]  # (R,) the truth
    likelihood: Likelihood
    generated: list[str] | None = None  # (R,) greedy answers, where a measure asked for them
    keywords: list[list[str]] | None = None  # (R,) the key spans of each truth, where the set has a column of them
    cut: Mapping[Cut, list[str]] = field(default_factory=dict)  # (R,) each: the truth, cut
    per_row: Mapping[PerRow, Floats] = field(default_factory=dict)  # (R,) each, where a measure asked for it
    samples: Mapping[Draws, list[list[str]]] = field(default_factory=dict)  # (R, n) each: answers that were drawn


Tables = Mapping[str, SetTable]
"""What one model said: set name -> table."""


@dataclass(frozen=True)
class Sample:
    """A statistic and the rows it is computed from, so that one routine gives value and bootstrap interval for every measure.

    `groups` are arrays whose first axis is rows; each group is resampled on its own (one for a mean over a set, two for an AUC of
    one set against another). `statistic` maps the groups to one number. `rows` are the per-row values that a reader may browse,
    where the measure has them.
    """

    groups: tuple[Floats, ...]
    statistic: Callable[[tuple[Floats, ...]], float]
    rows: Floats | None = None
    interval: bool = True
    sparse: Floats | None = None
    """(R,) as `rows`, for a measure that has no value for some rows: NaN there."""
    others: Floats | None = None
    """(H,) the values of the rows of the set that it is held against; NaN for those left out."""

    @property
    def n(self) -> int:
        """Rows that the value rests on."""
        return sum(len(group) for group in self.groups)

    @property
    def value(self) -> float:
        return float(self.statistic(self.groups))

    def bootstrap(self, draws: int = 400, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Percentile bootstrap interval over rows; None where resampling rows does not make sense (a p-value)."""
        if not self.interval or any(len(group) < 2 for group in self.groups):
            return None
        values = [
            self.statistic(tuple(group[at] for group, at in zip(self.groups, chosen, strict=True)))
            for chosen in _resampled(tuple(len(group) for group in self.groups), draws, seed)
        ]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


@lru_cache(16)
def _resampled(sizes: tuple[int, ...], draws: int, seed: int) -> list[tuple[Ints, ...]]:
    """Which rows of each group every resample takes; the same ones for all measures on sets of these sizes, so drawn once."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, size, size) for size in sizes) for _ in range(draws)]


def mean_of(rows: Floats) -> Sample:
    """The plain mean over rows."""
    return Sample((rows,), lambda groups: float(groups[0].mean()), rows)


class Unavailable(ValueError):
    """A measure cannot be had from these tables; the text says what it needs and how to give it."""
