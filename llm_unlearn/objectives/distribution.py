"""Losses on the whole next-token distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Need, Reads, Unit, Views
from llm_unlearn.spec import spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class KL:
    """KL divergence to the model as it was, per answer token: Σ_v p0 (log p0 − log p) (TOFU, 2401.06121, "KL minimisation")."""

    name: Literal["kl"] = "kl"
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(p0 ‖ p), as in TOFU; reverse: KL(p ‖ p0)."""

    unit: ClassVar[Unit] = "token"
    reference: ClassVar[Need] = "logits"
    reads: ClassVar[Reads] = ("answer",)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        p, p0 = now[stream].logits.log_softmax(-1), ref[stream].logits.log_softmax(-1)  # (N, V)
        if self.direction == "reverse":
            p, p0 = p0, p
        return (p0.exp() * (p0 - p)).sum(-1)  # (N,)
