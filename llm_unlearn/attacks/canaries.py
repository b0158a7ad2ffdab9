"""An audit of a claimed ε from one training run: how well guesses tell the canaries that were trained on from those that were not.

m canaries are each put into the training set with probability ½; afterwards a score (such as by how much the run lowered a canary's
loss) gives guesses: in, for the k highest, out, for the k lowest. Under (ε, δ)-differential privacy so many of them are right only
so often (Steinke, Nasr & Jagielski 2023, 2305.08846, theorem 5.2); what is rarer than that refutes ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Audited:
    """What an audit found."""

    epsilon: float
    """Lower bound: with the audit's confidence, the run is not (ε′, δ)-private for any ε′ below."""
    right: int
    """Guesses that were right."""
    guesses: int


def chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How often, at most, so many guesses are right under (ε, δ)-differential privacy (theorem 5.2):

    P[B ≥ v] + 2mδ · max_i P[v − i ≤ B < v] / i, where B ~ Binomial(r, e^ε / (1 + e^ε)).

    Args:
        canaries: m, of which each was put in with probability ½.
        guesses: r of them; of the others nothing is said.
        right: v of these.
    """
    from scipy.stats import binom

    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, rate))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))  # P[v − i ≤ B < v], i = 1 … v
    slack = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * slack)


def refuted(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that so many right guesses refute; 0 where they refute none. Found by bisection, from below."""
    low, high = 0.0, 1.0
    while chance(canaries, guesses, right, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(canaries, guesses, right, middle, delta) < 1 - confidence else (low, middle)
    return low


def audit(scores: NDArray[np.float64], inside: NDArray[np.bool_], guesses: int, delta: float, confidence: float = 0.95) -> Audited:
    """Guess, and say what the guesses refute.

    Args:
        scores: (m,) higher where a canary was more likely trained on.
        inside: (m,) whether it was; decided by m fair coins that nothing else in the run knows of.
        guesses: r, half of them in, half out; fixed before the scores are seen, or the confidence is not what it says.
    """
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    right = int((~inside[order[:half]]).sum() + inside[order[len(order) - half :]].sum())
    return Audited(refuted(len(scores), 2 * half, right, delta, confidence), right, 2 * half)
