"""What comes out when the first tokens of an answer are given: extraction by greedy decoding, and by n samples.

Neither needs a generation: one teacher-forced pass holds, after the true tokens so far, both the greedy choice and the
probability of every next true token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.evaluation.memorization import Knowing, mean_over
from llm_unlearn.evaluation.tables import Floats, Likelihood, Sample, SetTable, Tables, Unavailable
from llm_unlearn.spec import PositiveInt, spec


def _window(
    answers: Likelihood, values: NDArray[np.generic], prefix: int, length: int | None, set: str
) -> list[NDArray[np.generic]]:
    """`values` of tokens [prefix, prefix + length) of each answer that is long enough to have one there, (U,) arrays.

    Raises:
        Unavailable: no answer has more than `prefix` tokens.
    """
    end = None if length is None else prefix + length
    windows = [value[prefix:end] for value in answers.split(values) if len(value) > prefix]
    if not windows:
        longest = int(answers.length.max(initial=0))
        raise Unavailable(
            f"{set}: no answer is longer than a prefix of {prefix} tokens (the longest has {longest}). Give a smaller `prefix`."
        )
    return windows


def _check(prefix: int) -> None:
    if prefix < 0:
        raise ValueError(f"a prefix of 0 or more tokens, not {prefix}")


@spec
class PrefixExtraction:
    """Share of answers whose tokens [a, a + b) come out by greedy decoding once prompt and first a tokens are given
    (discoverable memorization, Carlini et al. 2023, 2202.07646).

    Greedy decoding reproduces the truth if and only if every true token is the first choice after the true tokens
    before it: up to the first other choice both have read the same text. So the teacher-forced `hit` decides, and
    nothing is generated. Answers with fewer than a + 1 tokens are left out; one that ends before a + b is asked for
    up to its end.
    """

    name: Literal["prefix_extraction"] = "prefix_extraction"
    set: str
    """The set that is attacked."""
    prefix: int = 5
    """a: tokens of the answer that the attacker has."""
    length: PositiveInt | None = None
    """b: tokens that must come out; none: all to the end of the answer."""

    needs: ClassVar[tuple[str, ...]] = ("answer",)
    knowing: ClassVar[Knowing] = "raises"

    def __post_init__(self) -> None:
        _check(self.prefix)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of("answer")
        windows = _window(answers, answers.hit, self.prefix, self.length, f"prefix_extraction of {self.set!r}")
        return mean_over(np.array([float(hits.all()) for hits in windows]), model[self.set])


def log_miss(logp: Floats) -> Floats:
    """log(1 − p) from log p ≤ 0 without cancellation: −inf where p is 1, and −p, not 0, where p is tiny."""
    logp = np.minimum(logp, 0)
    with np.errstate(divide="ignore"):
        missed: Floats = np.where(logp > -np.log(2), np.log(-np.expm1(logp)), np.log1p(-np.exp(logp)))
    return missed


def _extractable(log_missed: Floats, n: int, p: float) -> Floats:
    """1 where 1 − (1 − p_z)^n ≥ p, compared as n log(1 − p_z) ≤ log(1 − p)."""
    return np.asarray(float(n) * log_missed <= np.log1p(-p), dtype=np.float64)


def _log_missed(table: SetTable, prefix: int, length: int | None, set: str) -> Floats:
    answers = table.likelihood.of("answer")
    windows = _window(answers, answers.logp, prefix, length, set)
    return log_miss(np.array([float(logp.astype(float).sum()) for logp in windows]))


@spec
class DiscoverableExtraction:
    """Share of answers that come out at least once in n samples with probability p or more: 1 − (1 − p_z)^n ≥ p, with
    p_z = exp Σ log p of the tokens [a, a + b) at temperature 1 (Hayes et al. 2024, 2410.19482).

    Answers with fewer than a + 1 tokens are left out; one that ends before a + b is asked for up to its end.
    """

    name: Literal["discoverable_extraction"] = "discoverable_extraction"
    set: str
    """The set that is attacked."""
    prefix: int = 5
    """a: tokens of the answer that the attacker has."""
    length: PositiveInt | None = None
    """b: tokens that must come out; none: all to the end of the answer."""
    n: PositiveInt = 100
    """How often the attacker samples."""
    p: float = 0.5
    """How sure the attacker wants to be of seeing the answer."""

    needs: ClassVar[tuple[str, ...]] = ("answer",)
    knowing: ClassVar[Knowing] = "raises"

    def __post_init__(self) -> None:
        _check(self.prefix)
        if not 0 < self.p < 1:
            raise ValueError(f"p between 0 and 1, not {self.p}")

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        missed = _log_missed(table, self.prefix, self.length, f"discoverable_extraction of {self.set!r}")
        return mean_over(_extractable(missed, self.n, self.p), table)


def extraction_curve(table: SetTable, prefix: int, ns: Sequence[int], p: float, length: int | None = None) -> Floats:
    """(len(ns),) the share of answers that are (n, p)-discoverable for each n: `DiscoverableExtraction` along its n."""
    missed = _log_missed(table, prefix, length, "extraction_curve")
    return np.array([_extractable(missed, n, p).mean() for n in ns])
