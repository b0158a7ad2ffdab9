"""Losses on hidden states inside the model. The model runs only as deep as the layer that is read, forward and backward.

Layer l is the output of decoder block l, counted from 0 as in the names of its weights (`layers.7.mlp…`). The papers train a few
weights at or below it: `model.trainable` or `model.adapter.layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Needs, Views, beside, window_of
from llm_unlearn.spec import NaturalInt, NaturalInts, NonNegativeFloat, PositiveFloat, spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class RMU:
    """Representation misdirection (Li et al. 2024, 2403.03218, eq. 1): mean_d (h_l − c·u)², u a unit vector drawn once from the
    seed, uniform in [0, 1)^D before it is normalised."""

    name: Literal["rmu"] = "rmu"
    layer: NaturalInt = 7
    """Layer l."""
    c: PositiveFloat = 6.5
    """Length of the vector that the states are steered to; it wants to be above their own length."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        h = now[stream].hidden(self.layer)  # (N, D)
        return _mean_square(h - self.c * _direction(h, now[stream].seed, self.layer))


@spec
class AdaptiveRMU:
    """RMU whose length follows the token (Dang et al. 2024, 2408.06223): mean_d (h_l − β‖h0_l‖·u)²."""

    name: Literal["rmu_adaptive"] = "rmu_adaptive"
    layer: NaturalInt = 7
    """Layer l."""
    beta: PositiveFloat = 5.0
    """Length of the vector in units of the token's own state before."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden", reference="hidden")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        h, h0 = now[stream].hidden(self.layer), ref[stream].hidden(self.layer)  # (N, D)
        length = h0.norm(dim=-1, keepdim=True)
        return _mean_square(h - self.beta * length * _direction(h, now[stream].seed, self.layer))


@spec
class EmbedMatch:
    """Keep the states of the retain stream: mean_d (h_l − h0_l)² (WMDP, Li et al. 2024, 2403.03218, eq. 2), or ‖h_l − h0_l‖₂
    (circuit breakers, Zou et al. 2024, 2406.04313); the sum over the layers."""

    name: Literal["embed_match"] = "embed_match"
    layers: NaturalInts = (7,)
    """Layers l."""
    distance: Literal["mean_square", "norm"] = "mean_square"
    """mean_square as beside RMU, norm as in circuit breakers."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden", reference="hidden")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        import torch

        moved = [now[stream].hidden(layer) - ref[stream].hidden(layer) for layer in self.layers]  # of (N, D)
        if self.distance == "norm":  # its gradient at 0, where every run begins, is 0, as torch defines it
            return torch.stack([torch.linalg.vector_norm(one, dim=-1) for one in moved]).sum(0)
        return torch.stack([_mean_square(one) for one in moved]).sum(0)


@spec
class CircuitBreak:
    """Reroute the states of the forget stream (circuit breakers, Zou et al. 2024, 2406.04313): Σ_l relu(cos(h_l, h0_l)), 0 once
    they are orthogonal to what they were. Beside it, `embed_match` with distance norm; both weights may move with the run.

    A run begins at h = h0, where cos has its maximum and no gradient; public code leaves it by rounding noise. Here h0 is turned a
    little."""

    name: Literal["circuit_break"] = "circuit_break"
    layers: NaturalInts = (10, 20)
    """Layers l."""
    turn: NonNegativeFloat = 1e-3
    """h0 is replaced by h0 + turn · ‖h0‖ · u, u a unit vector drawn from the seed."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden", reference="hidden")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        import torch

        parts = []
        for layer in self.layers:
            h, h0 = now[stream].hidden(layer), ref[stream].hidden(layer)  # (N, D)
            turned = h0 + self.turn * h0.norm(dim=-1, keepdim=True) * _direction(h0, now[stream].seed, layer)
            parts.append(torch.cosine_similarity(h, turned, dim=-1).relu())
        return torch.stack(parts).sum(0)


@spec
class Lunar:
    """Steer the forget stream to where refusals lie (LUNAR, Shen et al. 2025, 2502.07218): mean_d (h_l − (h0_l + α r))², r the mean
    state of the stream's alternate answers (refusals) less that of its own, both before.

    The paper trains the down projection of layer l alone, and writes the loss on its output; as nothing else of h_l moves then,
    the two differences are the same. The retain stream gets `embed_match` on the same layer.
    """

    name: Literal["lunar"] = "lunar"
    layer: NaturalInt = 7
    """Layer l."""
    alpha: PositiveFloat = 1.0
    """How far along r."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden", reference="hidden", contrasts=("alternate",))

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        steer = ref[beside(stream, "alternate")].centre(self.layer) - ref[stream].centre(self.layer)  # (D,)
        return _mean_square(now[stream].hidden(self.layer) - ref[stream].hidden(self.layer) - self.alpha * steer)


@spec
class RepNoise:
    """Make the states of the forget stream look like noise (Rosati et al. 2024, 2405.14577): Σ_l MMD²(h_l of the window, N(0, I)).

    The kernel is a sum of five Gaussians exp(−‖x − y‖²/b), b from ¼ to 4 times the mean squared distance within the pooled sample,
    as in the paper's code. What is expected over the noise has a closed form, so none is drawn. MMD² compares all pairs of the
    window's tokens; the value of token i is its own part, and the mean of the values is MMD², with its exact gradient, b
    held fixed.
    """

    name: Literal["repnoise"] = "repnoise"
    layers: NaturalInts = (7,)
    """Layers l."""

    needs: ClassVar[Needs] = Needs("token", policy="hidden", window=True)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        import torch

        whole = ref[window_of(stream)]
        return torch.stack([_mmd_to_noise(now[stream].hidden(layer), whole.hidden(layer)) for layer in self.layers]).sum(0)


def _mmd_to_noise(x: Tensor, window: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N,) each token's part of MMD²(window, N(0, I)): k̄(x_i, window) − 2 E_y k(x_i, y) + E_{y,y′} k(y, y′)."""
    d, m = x.shape[-1], len(window)
    norms = (window**2).sum(-1).sum() / m
    spread = 2 * norms - 2 * ((window.sum(0) / m) ** 2).sum()  # mean ‖x − x′‖²
    bandwidth = (spread + 2 * (norms + d) + 2 * d) / 4  # … of two draws from the pooled sample, half states, half noise
    square = ((x**2).sum(-1)[:, None] + (window**2).sum(-1) - 2 * x @ window.T).clamp(min=0)  # (N, M)
    parts = x.new_zeros(len(x))
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        b = bandwidth * factor
        pairs = (-square / b).exp().sum(-1) / m
        pairs = 2 * pairs - pairs.detach()  # token i also moves the parts of the others, by as much as its own
        to_noise = (-(x**2).sum(-1) / (b + 2) - d / 2 * (2 / b).log1p()).exp()  # (b/(b + 2))^(d/2) · …, and its digits
        parts = parts + pairs - 2 * to_noise + (-d / 2 * (4 / b).log1p()).exp()
    return parts


def _direction(like: Tensor, seed: int, layer: int) -> Tensor:
    """(D,) a unit vector that depends on the seed and the layer alone."""
    import torch

    draw = torch.Generator().manual_seed(1000003 * seed + layer)
    u = torch.rand(like.shape[-1], generator=draw)
    unit: Tensor = u / u.norm()
    return unit.to(like)


def _mean_square(values: Tensor) -> Tensor:
    """(N, D) -> (N,)"""
    return (values**2).sum(-1) / values.shape[-1]
