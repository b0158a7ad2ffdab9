"""A model whose weights are spread over processes (FSDP2): what that asks of whoever runs it, reads its weights or sets them.

Each decoder layer's weights are together on a process only while it runs. What stands outside of them (embeddings, last norm and
head) is together from a forward pass to the end of its backward pass, so that the head may be called as often as a process likes
in between. In all passes every process must take part, also where it has nothing to ask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_unlearn.models.depth import Layers


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in model.modules())


def take_part(scorer: nn.Module, layers: Layers, device: torch.device) -> dict[int, Tensor]:
    """One token through the model, by a process that has nothing to ask while others do; layer -> (1, D)."""
    one = torch.zeros((1, 1), dtype=torch.long, device=device)
    found: dict[int, Tensor] = scorer(one, one[0], layers)
    return found


def at_rest(scorer: nn.Module) -> None:
    """After a forward pass without a backward pass: weights that are still together are spread again. Else a later pass would
    see them as they are now, whatever the optimizer makes of them."""
    for part in scorer.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(weight: Tensor) -> Tensor:
    """A copy of a weight in CPU memory; of a sharded one, all of it, for which every process must ask."""
    weight = weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).to("cpu", copy=True).contiguous()


@torch.no_grad()
def fill(weight: Tensor, values: Tensor) -> None:
    """Set a weight; of a sharded one, this process's share."""
    if isinstance(weight, DTensor):  # every process has all of the values: none need be sent
        values = distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(values)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a sharded model is saved as, whole, by name; weights that are tied once. Every process must ask."""
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(once)
    return {name: whole(values) for name, values in model.state_dict().items() if name not in tied}
