"""How deep a model runs: the outputs of chosen decoder layers, and no layer above the deepest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llm_unlearn.models.combined import Members
from llm_unlearn.models.structure import decoder_layers
from llm_unlearn.objectives.views import WHOLE
from llm_unlearn.spec import Refused

Layers = tuple[int, ...]
"""Decoder layers whose output is wanted, from 0; `TOP` for the last hidden states, which the head reads, `ROUTERS` for
router logits."""

Nudge = tuple[int, Tensor]
"""A layer, and what is added to its output, (B, L, D)."""

Swap = tuple[Mapping[int, Tensor], Tensor]
"""Layers, each with what stands in place of its output, (N, D); and where, (N,) b·L + t. Every other place keeps its own."""


@contextmanager
def watched(net: Any, layers: Layers, nudge: Nudge | None, swap: Swap | None = None) -> Iterator[dict[int, Tensor]]:
    """Inside, the outputs of some decoder layers are kept, one may be nudged, some may be swapped for others at some places, and
    those above the deepest are left out."""
    outputs: dict[int, Tensor] = {}
    if WHOLE.issuperset(layers) and nudge is None and swap is None:
        yield outputs
        return
    name, blocks = blocks_of(net)
    owner, _, name = name.rpartition(".")

    def keep(layer: int) -> Callable[..., Any]:
        def hook(block: nn.Module, given: Any, made: Any) -> Any:
            first = made[0] if isinstance(made, tuple) else made
            own = first
            if nudge and nudge[0] == layer:
                first = first + nudge[1].to(first)
            if swap and layer in swap[0]:
                first = first.flatten(0, 1).index_copy(0, swap[1], swap[0][layer].to(first)).view_as(first)
            if first is not own:
                made = (first, *made[1:]) if isinstance(made, tuple) else first
            outputs[layer] = first
            return made

        return hook

    chosen = set(layers) - WHOLE | ({nudge[0]} if nudge else set()) | set(swap[0] if swap else ())
    if beyond := sorted(layer for layer in chosen if layer >= len(blocks)):
        known = f"the decoder layers of this model are 0 to {len(blocks) - 1}"
        raise Refused(f"layer {beyond[0]} is not there: {known}; see the objective's and rules' layers.")
    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in chosen]
    try:
        if WHOLE.isdisjoint(layers):
            setattr(net.get_submodule(owner), name, blocks[: max(chosen) + 1])
        yield outputs
    finally:
        setattr(net.get_submodule(owner), name, blocks)
        for handle in handles:
            handle.remove()


def blocks_of(net: Any) -> tuple[str, nn.ModuleList]:
    """Return the full name and the list of a model's decoder layers.

    Raises:
        Refused: the model combines the logits of several, or its layers were not found.
    """
    if isinstance(net, Members):
        raise Refused(
            "this model combines the logits of several, each with hidden states of its own: its layers cannot be read or changed "
            "as those of one model."
        )
    return decoder_layers(net)
