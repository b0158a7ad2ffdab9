"""Influence functions: what the weights would be had the forget set not been there, by one Newton step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from llm_unlearn.methods.edits import BOTH, At, Situation, edit_problems
from llm_unlearn.objectives.terms import Term
from llm_unlearn.spec import PositiveFloat, PositiveFloats, PositiveInt, spec
from llm_unlearn.training.vectors import Gradient, dot, norm, plus, zeros


@spec
class Influence:
    """One Newton step that takes the forget rows out (Koh & Liang 2017, 1703.04730, eq. 1; Grosse et al. 2023, 2308.03296).

    θ is taken to minimise Σ_f ℓ + Σ_r ℓ + (κ/2)‖θ‖². The retrained model minimises the same without Σ_f ℓ, whose gradient at θ is
    −Σ_f ∇ℓ, so that its Newton step is θ + (Σ_r G + κ)⁻¹ Σ_f ∇ℓ. In means over rows, with δ = κ/n_r the damping:
    θ ← θ + s (n_f/n_r) (G_r + δ)⁻¹ ḡ_f. At s = 1 exact where the loss is quadratic, and to second order where it is convex.
    G is the Gauss–Newton matrix, its EK-FAC approximation, or the empirical Fisher matrix's diagonal."""

    name: Literal["influence"] = "influence"
    curvature: Literal["diagonal", "ekfac", "cg"] = "diagonal"
    """diagonal: of the empirical Fisher matrix. ekfac: Kronecker factors with corrected eigenvalues (linear layers only; needs the
    extra `influence`). cg: the whole Gauss–Newton matrix by conjugate gradients; two backward passes over
    `rows` an iteration, for small models."""
    damping: PositiveFloat = 1e-3
    """δ, beside curvature per answer; the log says how large that is. With `cg`, the ridge κ/n_r of the training."""
    scale: PositiveFloats = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    """s: 1 is the Newton step."""
    rows: PositiveInt = 256
    """Examples of the retain set that the curvature is measured on."""
    iterations: PositiveInt = 30
    """At most so many steps of the conjugate gradients."""
    scores: bool = False
    """Also write `influence.parquet`: for each row, by how much leaving it out raises the forget set's loss (nats per answer), to
    first order. One backward pass a row."""

    knob: ClassVar[str] = "scale"
    terms: ClassVar[Mapping[str, Term]] = BOTH
    whole: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    problems = edit_problems

    def prepare(self, situation: Situation) -> At:
        theta, n_f, n_r = situation.weights, situation.rows("forget"), situation.rows("retain")
        towards = self.solve(situation, situation.gradient("forget"))
        situation.note("newton_step", n_f / n_r * norm(towards))
        if self.scores:  # ℓ_f after leaving out i is ℓ_f + ⟨ḡ_f, (Σ_r G + κ)⁻¹ ∇ℓ_i⟩, and that matrix is its own transpose
            for stream in ("forget", "retain"):
                situation.tell(stream, [value / n_r for value in situation.products(stream, towards)])

        def at(s: float) -> Gradient:
            return plus(theta, towards, s * n_f / n_r)

        return at

    def solve(self, situation: Situation, gradient: Gradient) -> Gradient:
        """(G_r + δ)⁻¹ g"""
        if self.curvature == "diagonal":
            fisher = situation.fisher("retain", self.rows)
            situation.note("curvature", float(sum(one.double().sum() for one in fisher)) / sum(one.numel() for one in fisher))
            return [g / (f + self.damping) for g, f in zip(gradient, fisher, strict=True)]
        if self.curvature == "ekfac":
            return situation.solved("retain", self.rows, self.damping, gradient)

        def curved(v: Gradient) -> Gradient:
            return plus(situation.curved("retain", self.rows, v), v, self.damping)

        found, residual = conjugate(curved, gradient, self.iterations)
        situation.note("residual", residual)
        return found


def conjugate(
    product: Callable[[Gradient], Gradient], b: Gradient, iterations: int, enough: float = 1e-4
) -> tuple[Gradient, float]:
    """x with A x = b by conjugate gradients (Hestenes & Stiefel 1952), A positive definite; and ‖b − A x‖/‖b‖.

    Args:
        enough: the residual at which to end.
    """
    x, r, length = zeros(b), b, max(norm(b), 1e-30)
    p, square = r, dot(b, b)
    for _ in range(iterations):
        if square**0.5 <= enough * length:
            break
        ap = product(p)
        share = square / dot(p, ap)
        x, r = plus(x, p, share), plus(r, ap, -share)
        square, before = dot(r, r), square
        p = plus(r, p, square / before)
    return x, square**0.5 / length
