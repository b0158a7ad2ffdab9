"""Fused kernels in the place of an architecture's norms, rotary positions and gated feed-forward blocks (Liger Kernel, 2410.10989).

Never its loss or its head: what is made of logits stands in `tokenwise.py`. Whether a model says the same afterwards is tried
(`trials.check_same`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from llm_unlearn.spec import Refused

PARTS = ("rms_norm", "rope", "swiglu", "geglu")
"""Of what the package can replace, by its own names."""


def known(device: torch.device) -> Mapping[str, Callable[..., None]]:
    """Architecture (`model_type`) -> what puts the package's kernels into a model of it.

    Raises:
        Refused: the package is not there, or no device that it runs on.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise Refused("model.kernels: liger needs its package; install it with: pip install 'llm-unlearn[liger]'.") from None
    if device.type != "cuda":
        raise Refused(f"model.kernels: liger runs on CUDA devices only, and this run is on {device.type}; give kernels: null.")
    found: Mapping[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return found


@contextmanager
def put_in(net: Any) -> Iterator[None]:
    """Inside and from then on, a model without adapters computes with the kernels. Norms and feed-forward blocks are replaced in
    this model, rotary positions for all models of its architecture in this process.

    Raises:
        Refused: the package does not know the architecture, and as `known`.
    """
    kinds, kind = known(net.device), net.config.model_type
    if kind not in kinds:
        raise Refused(f"model.kernels: liger has none for {type(net).__name__} ({kind}); give kernels: null.")
    switches = [name for name in inspect.signature(kinds[kind]).parameters if name != "model"]
    kinds[kind](model=net, **{name: name in PARTS for name in switches})
    yield
