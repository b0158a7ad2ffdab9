"""The mode in which a model is trained: nothing random, whatever an architecture does in train mode.

Dropout, router noise (Mixtral, Phi-3.5-MoE), layer drop (OPT) and sampled routing would be drawn per process: a run would depend on
the number of its processes, and an untouched adapter would differ from its reference. They all read `module.training`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_unlearn.models.scores import Scorer
from llm_unlearn.models.trials import few_tokens
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused


def enable_training(model: nn.Module) -> None:
    """Set a model to evaluation mode, except for the modules that must know that they are trained: those that recompute their
    activations, and 8- and 4-bit layers of bitsandbytes, which compute by the flag."""
    for module in model.modules():
        recomputes = bool(getattr(module, "gradient_checkpointing", False))
        module.training = recomputes or type(module).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def check_training_mode(model: Any) -> None:
    """Compare two passes over a few tokens in the mode of training with each other, and with evaluation mode.

    Raises:
        Refused: they differ, so that what the run trains is not what its suite measures.
    """
    was = [(module, module.training) for module in model.modules()]
    ids, at = few_tokens(model)
    scorer = Scorer(model)
    try:
        model.eval()
        measured = scorer(ids, at)[TOP].float()
        enable_training(model)
        first, second = (scorer(ids, at)[TOP].float() for _ in range(2))
    finally:
        for module, training in was:
            module.training = training
    size = float(measured.abs().max())
    if not torch.allclose(first, second, rtol=0, atol=1e-4 * size):
        text = "computes other numbers each time while it is trained"
    elif not torch.allclose(first, measured, rtol=0, atol=5e-2 * size):
        text = "computes other numbers while it is trained than when it is evaluated"
    else:
        return
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    raise Refused(f"{name}: {text}; this architecture is not supported. Set noise and dropout to 0 in its config.json.")
