"""What holds while a gradient is made: layers run compiled, and what autograd keeps lies in CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator

from llm_unlearn.models.compiled import Compiled
from llm_unlearn.models.trials import check_same
from llm_unlearn.sections import Train
from llm_unlearn.training.offload import offloaded


def during(settings: Train, model: Any, accelerator: Accelerator, packed: bool) -> Callable[[], AbstractContextManager[object]]:
    """The context of every forward and backward pass of a run (`Model.during`).

    Args:
        packed: sequences will lie end to end.

    Raises:
        Refused: the model's layers cannot be compiled, or give other numbers then.
    """
    compiled = Compiled(model) if settings.compile else None
    if compiled:
        if accelerator.is_main_process:
            print("train.compile: compiling the decoder layers, which takes a minute or more before the first step", flush=True)
        with accelerator.autocast():  # as in training: what is compiled is compiled for a precision
            check_same(model, compiled.inside, "train.compile: {}; give compile: null.", packed)
    moves = settings.offload is not None and accelerator.device.type == "cuda"
    if settings.offload and not moves and accelerator.is_main_process:
        print(f"train.offload: nothing is moved, as this run is on a {accelerator.device.type.upper()}; the numbers are the same.")
    if not compiled and not moves:
        return nullcontext

    @contextmanager
    def inside() -> Iterator[None]:
        layers = compiled.inside() if compiled else nullcontext()
        kept = offloaded(model, accelerator.device) if moves else nullcontext()
        with layers, kept:
            yield

    return inside
