"""Losses that set an answer against the model as it was, or against another answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Need, Reads, Unit, Views
from llm_unlearn.spec import PositiveFloat, spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class NPO:
    """Negative preference optimization (Zhang et al. 2024, 2404.05868, eq. 3): −(2/β) log σ(−β Σ_t (log p − log p0)(y_t))."""

    name: Literal["npo"] = "npo"
    beta: PositiveFloat = 0.1
    """Inverse temperature; towards 0 it becomes gradient ascent."""

    unit: ClassVar[Unit] = "sequence"
    reference: ClassVar[Need] = "logps"
    reads: ClassVar[Reads] = ("answer",)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        from torch.nn.functional import logsigmoid

        ratio = now[stream].by_sequence(now[stream].logps - ref[stream].logps)  # (S,)
        return -2 / self.beta * logsigmoid(-self.beta * ratio)


@spec
class DPO:
    """Direct preference of the alternate a over the answer y (Rafailov et al. 2023, 2305.18290, eq. 7, scaled by 2/β as in
    AltPO, 2409.13474): −(2/β) log σ(β [Σ(log p − log p0)(a) − Σ(log p − log p0)(y)])."""

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Inverse temperature: how far the policy may leave the model as it was."""

    unit: ClassVar[Unit] = "sequence"
    reference: ClassVar[Need] = "logps"
    reads: ClassVar[Reads] = ("answer", "alternate")

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        from torch.nn.functional import logsigmoid

        lose = now[stream].by_sequence(now[stream].logps - ref[stream].logps)  # (S,)
        win = now["alternate"].by_sequence(now["alternate"].logps - ref["alternate"].logps)  # (S,) the same questions
        return -2 / self.beta * logsigmoid(self.beta * (win - lose))
