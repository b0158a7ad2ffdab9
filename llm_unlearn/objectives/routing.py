"""Losses on the routing of mixtures of experts. Their unit is the answer token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Needs, Views
from llm_unlearn.spec import spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class RouterKL:
    """Keep the routing of a mixture of experts where it was: (1/R) Σ_l KL(r0_l ‖ r_l) over its R routers, r_l the softmax of the
    router's logits at the token, r0_l that of the reference model.

    An anchor with the aim of GRIP (Zhu et al. 2026, 2601.16905), which projects router gradients instead: methods otherwise lead
    tokens past the experts that know the answer. It also holds frozen routers, whose inputs move with the layers below."""

    name: Literal["router_kl"] = "router_kl"

    needs: ClassVar[Needs] = Needs("token", policy="routing", reference="routing")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        r, r0 = now[stream].routing.log_softmax(-1), ref[stream].routing.log_softmax(-1)  # (N, R, E)
        return (r0.exp() * (r0 - r)).sum(-1).sum(-1) / r.shape[1]  # (N,)
