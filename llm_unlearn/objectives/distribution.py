"""Losses on the whole next-token distribution. Their unit is the answer token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Needs, Views, beside
from llm_unlearn.spec import FiniteFloat, NaturalInt, PositiveFloat, spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class KL:
    """KL divergence to the model as it was, per answer token: Σ_v p0 (log p0 − log p) (TOFU, 2401.06121, "KL minimisation")."""

    name: Literal["kl"] = "kl"
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(p0 ‖ p), as in TOFU; reverse: KL(p ‖ p0)."""

    needs: ClassVar[Needs] = Needs("token", policy="logits", reference="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        p, p0 = now[stream].logits.log_softmax(-1), ref[stream].logits.log_softmax(-1)  # (N, V)
        if self.direction == "reverse":
            p, p0 = p0, p
        return (p0.exp() * (p0 - p)).sum(-1)  # (N,)


@spec
class Undial:
    """Self-distillation from adjusted logits (Dong et al. 2024, 2402.10052): cross-entropy of p to
    softmax(z0 − β · onehot(y_t))."""

    name: Literal["undial"] = "undial"
    beta: PositiveFloat = 10.0
    """How much the answer's own logit is lowered in the teacher."""

    needs: ClassVar[Needs] = Needs("token", policy="logits", reference="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        import torch

        view = now[stream]
        lowered = torch.full_like(view.targets, -self.beta, dtype=view.logits.dtype)
        teacher = ref[stream].logits.scatter_add(-1, view.targets[:, None], lowered[:, None]).softmax(-1)  # (N, V)
        return -(teacher * view.logits.log_softmax(-1)).sum(-1)  # (N,)


@spec
class CEU:
    """Cross-entropy unlearning (Yang 2025, 2503.01224): cross-entropy of p to softmax(sg z with z[y_t] = −∞), the model's
    own next choices without the answer."""

    name: Literal["ceu"] = "ceu"
    skip: NaturalInt = 1
    """So many first tokens of each answer are left out, and not counted."""

    needs: ClassVar[Needs] = Needs("token", policy="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        view = now[stream]
        later = view.position >= self.skip
        z, y = view.logits[later], view.targets[later, None]
        teacher = z.detach().scatter(-1, y, float("-inf")).softmax(-1)  # (N′, V)
        return -(teacher * z.log_softmax(-1)).sum(-1)  # (N′,)


@spec
class Entropy:
    """Maximise entropy (Yuan et al. 2024, 2410.08109): KL(uniform ‖ p) = −log V − (1/V) Σ_v log p_v."""

    name: Literal["entropy"] = "entropy"

    needs: ClassVar[Needs] = Needs("token", policy="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        from math import log

        logp = now[stream].logits.log_softmax(-1)  # (N, V)
        return -log(logp.shape[-1]) - logp.sum(-1) / logp.shape[-1]  # (N,)


@spec
class IHL:
    """Inverted hinge loss (LoKU, Cha et al. 2024, 2408.06621): 1 + p(y_t) − max_{v≠y_t} p(v); never below 0."""

    name: Literal["ihl"] = "ihl"

    needs: ClassVar[Needs] = Needs("token", policy="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        p, y = now[stream].logits.softmax(-1), now[stream].targets[:, None]
        return 1 + p.gather(-1, y)[:, 0] - p.scatter(-1, y, 0.0).amax(-1)  # (N,)


@spec
class Margin:
    """Logit-margin flattening (Entesari et al. 2025, 2506.05314): (max_v z − mean_v z)². Beside it the paper holds the retain term
    at a budget (`objective.retain.budget`)."""

    name: Literal["pdu"] = "pdu"

    needs: ClassVar[Needs] = Needs("token", policy="logits")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        z = now[stream].logits  # (N, V)
        return (z.amax(-1) - z.sum(-1) / z.shape[-1]) ** 2  # (N,)


@spec
class ELM:
    """Erasure of language memory (Gandikota et al. 2024, 2410.02760): cross-entropy of p(·|x) to
    softmax(log p0(x) − η (log p0(x|expert) − log p0(x|novice))), the two prompts from the recipe's `contrast`."""

    name: Literal["elm"] = "elm"
    eta: FiniteFloat = 1.0
    """How far from the expert towards the novice."""

    needs: ClassVar[Needs] = Needs("token", policy="logits", reference="logits", contrasts=("expert", "novice"))

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        expert, novice = (ref[kind].logits.log_softmax(-1) for kind in (beside(stream, "expert"), beside(stream, "novice")))
        teacher = (ref[stream].logits.log_softmax(-1) - self.eta * (expert - novice)).softmax(-1)  # (N, V)
        return -(teacher * now[stream].logits.log_softmax(-1)).sum(-1)  # (N,)
