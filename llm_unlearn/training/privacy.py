"""Differential privacy: what a recipe may ask for, the noise that it takes, and the privacy that is spent step by step.

DP-SGD (Abadi et al. 2016, 1607.00133): each example enters a step with probability q; its gradient g_i is cut to norm C; the step
goes along (Σ_i clip(g_i) + N(0, σ²C² I)) / B, where B is the number of examples that a step has on average, never the true one.
(`training/clipped.py` computes it, `data/schedule.py` draws it.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from llm_unlearn.spec import Part, PositiveFloat, Refused, spec


@spec
class Privacy:
    """(ε, δ)-differential privacy of every row that is trained on, by DP-SGD (Abadi et al. 2016, 1607.00133). Needs the extra
    `privacy` (Opacus, whose accountants are used)."""

    epsilon: PositiveFloat | None = None
    """ε after the last step; the noise is found from it. Instead of `noise`."""
    noise: PositiveFloat | None = None
    """σ: the noise's standard deviation over `clip`; ε follows. Instead of `epsilon`."""
    delta: Part
    """δ; below 1 / number of rows."""
    clip: PositiveFloat
    """C: the largest norm of one example's gradient."""
    per_example: Literal["mean", "sum"] = "mean"
    """Where a loss gives a value per token, an example counts with the mean, or the sum, over its own answer."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """rdp: Rényi (Mironov 2017, 1702.07476), safe and a little high. prv: numerical composition (Gopi et al. 2021, 2106.02848),
    tighter and slower."""
    reproducible: bool = False
    """Draw samples and noise from the recipe's `seed` instead of a secret key: for tests. The guarantee then holds only towards
    those who do not know the seed, and the recipe names it."""


@dataclass(frozen=True)
class Mechanism:
    """One private run: its settings, sampling rates and secret."""

    settings: Privacy
    rates: Mapping[str, float]
    """Stream -> q."""
    expected: float
    """B: examples in a step on average, of all streams."""
    steps: int
    key: bytes = field(repr=False)
    """What samples and noise are drawn from."""

    @property
    def rate(self) -> float:
        """The largest q: the row that is seen most often has the least privacy, and is the one that counts."""
        return max(self.rates.values())

    @cached_property
    def sigma(self) -> float:
        """The noise's standard deviation over C.

        Raises:
            Refused: Opacus is missing, or no noise gives so small an ε.
        """
        wanted, target = self.settings, self.settings.epsilon
        if target is None:
            assert wanted.noise is not None
            return wanted.noise
        with _opacus() as (_, get_noise_multiplier):
            try:
                return float(
                    get_noise_multiplier(
                        target_epsilon=target, target_delta=wanted.delta, sample_rate=self.rate, steps=self.steps,
                        accountant=wanted.accountant, epsilon_tolerance=min(0.01, target / 100),
                    )
                )  # fmt: skip
            except ValueError as error:
                raise Refused(f"train.privacy.epsilon: no noise gives {target:g} in {self.steps} steps ({error}).") from None

    def epsilon(self, steps: int) -> float:
        """ε that so many steps have spent, at the recipe's δ."""
        if steps == 0:
            return 0.0
        with _opacus() as (create_accountant, _):
            accountant = create_accountant(self.settings.accountant)
            if self.settings.accountant == "rdp":  # it adds up: what one step costs is worked out once
                from opacus.accountants.analysis.rdp import get_privacy_spent

                spent = self._of_a_step * steps
                return float(get_privacy_spent(orders=accountant.DEFAULT_ALPHAS, rdp=spent, delta=self.settings.delta)[0])
            accountant.history = [(self.sigma, self.rate, steps)]
            return float(accountant.get_epsilon(delta=self.settings.delta))

    @cached_property
    def _of_a_step(self) -> Any:
        """The Rényi divergence of one step, at Opacus' orders."""
        from opacus.accountants.analysis.rdp import compute_rdp
        from opacus.accountants.rdp import RDPAccountant

        orders = RDPAccountant.DEFAULT_ALPHAS
        return compute_rdp(q=self.rate, noise_multiplier=self.sigma, steps=1, orders=orders)

    def spent(self, steps: int) -> dict[str, float]:
        """What a step's line of the log says."""
        return {"epsilon": self.epsilon(steps)}

    @property
    def said(self) -> str:
        """What is told before a run: what it will cost, and what that rests on."""
        wanted = self.settings
        return "\n".join(
            [
                f"privacy    ε {self.epsilon(self.steps):.3g} at δ {wanted.delta:g} for every row after {self.steps} steps: "
                f"noise {self.sigma:.3g} × clip {wanted.clip:g}, a row enters a step with probability {self.rate:.3g} "
                f"({wanted.accountant}); it rests on:",
                *(f"           {one}" for one in self.assumptions),
            ]
        )

    def facts(self, kept: int) -> dict[str, Any]:
        """Return what is written beside the result.

        ε is that of all planned steps, also of a run that ended before: where it ends is read from noisy gradients, so that only
        the whole sequence of steps has an ε that was fixed beforehand (Rogers et al. 2016, 1605.08294).

        Args:
            kept: the step whose weights are kept.
        """
        wanted = self.settings
        return {
            "epsilon": self.epsilon(self.steps), "delta": wanted.delta, "noise_multiplier": self.sigma, "clip": wanted.clip,
            "sampling_rate": self.rate, "steps": self.steps, "kept_step": kept, "accountant": wanted.accountant,
            "kind": "differential privacy", "unit": "one row, added or removed", "assumptions": self.assumptions,
        }  # fmt: skip

    @property
    def assumptions(self) -> list[str]:
        """What the guarantee rests on, besides the mechanism."""
        drawn = (
            "samples and noise are drawn from the recipe's seed: it holds only towards those who do not know the seed"
            if self.settings.reproducible
            else "samples and noise are drawn from a key of the operating system that is deleted at the end of the run"
        )
        return [
            "the model before the run (base and start) has not seen these rows",
            "the numbers of rows of each set are public, and a row says nothing of another",
            drawn,
            "only the trained weights are covered: losses in the log, and the evaluation, read the rows as they are",
            "settings were not tuned on the same rows; runs on the same rows add up",
        ]


def mechanism(privacy: Privacy, sizes: Mapping[str, int], window: Mapping[str, int], steps: int, key: bytes) -> Mechanism:
    """What a run does for its privacy.

    Args:
        sizes: stream -> its examples, of the streams that are trained on.
        window: stream -> examples in a step on average.

    Raises:
        Refused: δ is so large that whole rows could be published under it.
    """
    rows = sum(sizes.values())
    if privacy.delta * rows >= 1:
        raise Refused(
            f"train.privacy.delta: found {privacy.delta:g} for {rows} rows; with δ of 1 / {rows} or more, publishing a row "
            f"would count as private. Take less, such as {0.1 / rows:.0e}."
        )
    rates = {name: min(1.0, window[name] / size) for name, size in sizes.items()}
    return Mechanism(privacy, rates, sum(rates[name] * size for name, size in sizes.items()), steps, key)


@contextmanager
def _opacus() -> Iterator[tuple[Any, Any]]:
    """Its accountants by name, and its search for σ; their advice on orders that could be tried is left out.

    Raises:
        Refused: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from opacus.accountants import create_accountant
            from opacus.accountants.utils import get_noise_multiplier
        except ImportError:
            raise Refused("train.privacy: needs opacus; install it with: pip install 'llm-unlearn[privacy]'.") from None
        yield create_accountant, get_noise_multiplier
