"""Fused kernels: put in where they can be, with the numbers of the model itself, and refused where not. The package and a GPU are
not there when tests run, so another package stands in its place, whose functions are written down here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from jobs import job

from llm_unlearn.models import kernels
from llm_unlearn.models.load import causal, has_adapter, load
from llm_unlearn.run import prepare
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

PLACE = "liger_kernel.transformers.monkey_patch"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """(factor) -> what a package was asked for whose norms are `factor` times those of Llama."""

    def install(factor: float) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def llama(
            rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
            swiglu: bool = True, model: Any = None,
        ) -> None:  # fmt: skip
            asked.append({name: value for name, value in locals().items() if name not in ("asked", "factor")})
            norm = model.model.norm

            def forward(states: torch.Tensor) -> torch.Tensor:
                size = states.square().sum(-1, keepdim=True) / states.shape[-1] + norm.variance_epsilon
                return factor * norm.weight * states / size.sqrt()

            norm.forward = forward

        for depth in range(1, 4):
            monkeypatch.setitem(sys.modules, ".".join(PLACE.split(".")[:depth]), ModuleType("another"))
        sys.modules[PLACE].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama}  # type: ignore[attr-defined]
        return asked

    return install


def prepared(model: Any) -> Any:
    return prepare(model, Model(base="any", kernels="liger"), job(), Accelerator(cpu=True))


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    known = kernels.known
    monkeypatch.setattr(kernels, "known", lambda device: known(torch.device("cuda")))


@pytest.mark.usefixtures("as_if_on_cuda")
def test_norms_positions_and_blocks_are_asked_for_and_the_loss_is_not(
    make_model: Callable[..., Any], package: Callable[..., list[dict[str, Any]]]
) -> None:
    asked, model = package(1.0), make_model()
    made = prepared(model)
    assert has_adapter(made) and causal(made) is model
    (one,) = asked
    assert one.pop("model") is model
    assert one == {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.usefixtures("as_if_on_cuda")
def test_other_numbers_are_refused(make_model: Callable[..., Any], package: Callable[..., Any]) -> None:
    package(1.01)
    with pytest.raises(Refused, match=r"model\.kernels: liger gives other numbers on a few tokens, 1 % apart; give kernels: null"):
        prepared(make_model())


@pytest.mark.usefixtures("as_if_on_cuda")
def test_an_architecture_that_is_not_known_is_named(make_model: Callable[..., Any], package: Callable[..., Any]) -> None:
    package(1.0)
    model = make_model()
    model.config.model_type = "marsian"
    with pytest.raises(Refused, match=r"model\.kernels: liger has none for LlamaForCausalLM \(marsian\)"):
        prepared(model)


def test_a_cpu_is_refused(package: Callable[..., Any]) -> None:
    package(1.0)
    with pytest.raises(Refused, match="runs on CUDA devices only, and this run is on cpu"):
        load(Model(base="./nothing is read before", kernels="liger"), torch.device("cpu"), train=True)


def test_a_missing_package_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(Refused, match=r"pip install 'llm-unlearn\[liger\]'"):
        kernels.known(torch.device("cuda"))
