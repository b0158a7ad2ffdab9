"""Losses on the likelihood of given answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llm_unlearn.objectives.views import Need, Reads, Unit, Views
from llm_unlearn.spec import spec

if TYPE_CHECKING:
    from torch import Tensor


@spec
class NLL:
    """−log p(y_t): learn, or keep, the answers of the stream."""

    name: Literal["nll"] = "nll"

    unit: ClassVar[Unit] = "token"
    reference: ClassVar[Need] = "none"
    reads: ClassVar[Reads] = ("answer",)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        return -now[stream].logps  # (N,)


@spec
class Ascent:
    """+log p(y_t): gradient ascent on the answers' loss (Jang et al. 2023, 2210.01504, eq. 1). Unbounded: give it a `stop`."""

    name: Literal["ascent"] = "ascent"

    unit: ClassVar[Unit] = "token"
    reference: ClassVar[Need] = "none"
    reads: ClassVar[Reads] = ("answer",)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        return now[stream].logps  # (N,)


@spec
class IDK:
    """−log p(a_t): learn the alternate answer a (such as a refusal) to the stream's prompts (TOFU, 2401.06121, preference
    optimisation)."""

    name: Literal["idk"] = "idk"

    unit: ClassVar[Unit] = "token"
    reference: ClassVar[Need] = "none"
    reads: ClassVar[Reads] = ("alternate",)

    def __call__(self, now: Views, ref: Views, stream: str) -> Tensor:
        return -now["alternate"].logps  # (N,)
