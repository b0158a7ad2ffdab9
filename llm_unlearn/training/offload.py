"""What autograd keeps between the forward and the backward pass lies in CPU memory meanwhile.

Only what a pass makes is moved. Weights stay: what has their storage, and what has the layout of a matrix's transpose, as a linear
layer keeps it — so that the copies which autocast or a gathering of shards makes of weights, and holds anyway, are not carried
back and forth. Small tensors stay too. With gradient checkpointing what is kept, and so moved, is the input of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

LEAST = 1 << 20
"""Bytes from which on a tensor is worth a copy."""

Key = tuple[int, int, int, torch.dtype]
"""Storage, offset, elements and type: what is kept for several steps of the backward pass is copied once."""


@dataclass(eq=False)
class Copied:
    """Some elements in CPU memory, as they lay."""

    flat: Tensor  # (numel,)
    source: torch.device
    storage: StorageWeakRef  # as long as it is held, no other storage has this one's address


@dataclass(frozen=True)
class Laid:
    """A tensor whose elements were copied: its axes from the widest stride to the narrowest, and its shape in that order."""

    copied: Copied
    order: tuple[int, ...]
    shape: torch.Size

    def on(self, flat: Tensor) -> Tensor:
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view(self.shape).permute(places)


class Offload:
    """One pass: what autograd hands over to be kept, and asks for again."""

    def __init__(self, model: nn.Module, device: torch.device, least: int = LEAST) -> None:
        """
        Args:
            device: what lies there is moved.
            least: bytes; what is smaller stays.
        """
        weights = [*model.parameters(), *model.buffers()]
        self.device, self.least = device, least
        self.storages = {one.untyped_storage().data_ptr() for weight in weights for one in _tensors(weight)}
        self.shapes = {weight.shape for weight in weights if weight.ndim == 2}
        self.copies: WeakValueDictionary[Key, Copied] = WeakValueDictionary()
        self.latest: tuple[Copied, Tensor] | None = None

    def stays(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, nn.Parameter):  # shards, packed weights: they know themselves where they lie
            return True
        storage = tensor.untyped_storage()
        if tensor.device.type != self.device.type or min(tensor.nbytes, storage.nbytes()) < self.least or not tensor.numel():
            return True
        if storage.data_ptr() in self.storages:
            return True
        return tensor.ndim == 2 and tensor.stride(0) == 1 and tensor.stride(1) > 1 and tensor.T.shape in self.shapes

    def pack(self, tensor: Tensor) -> Tensor | Laid:
        """What is kept in the place of a tensor."""
        if self.stays(tensor):
            return tensor
        order = tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        rows = tensor.permute(order)
        if not rows.is_contiguous():  # a piece of a larger storage, which should not be held for its sake
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                return tensor  # the same elements several times over
            order, rows = tuple(range(tensor.ndim)), tensor.contiguous()
        key = (int(tensor.untyped_storage()._cdata), int(tensor.storage_offset()), tensor.numel(), tensor.dtype)
        found = self.copies.get(key) if rows.data_ptr() == tensor.data_ptr() else None
        if found is None:
            found = self._copy(rows.reshape(-1), tensor)
            if rows.data_ptr() == tensor.data_ptr():
                self.copies[key] = found
        return Laid(found, order, rows.shape)

    def _copy(self, flat: Tensor, of: Tensor) -> Copied:
        kept = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return Copied(kept.copy_(flat, non_blocking=True), of.device, StorageWeakRef(of.untyped_storage()))  # type: ignore[no-untyped-call]

    def unpack(self, kept: Tensor | Laid) -> Tensor:
        """The tensor, where it was. Copies and kernels of one stream run in their order, so that nothing must be waited for."""
        if isinstance(kept, Tensor):
            return kept
        if self.latest is None or self.latest[0] is not kept.copied:  # neighbours in the backward pass read the same input
            self.latest = kept.copied, kept.copied.flat.to(kept.copied.source, non_blocking=True)
        return kept.on(self.latest[1])


@contextmanager
def offloaded(model: nn.Module, device: torch.device, least: int = LEAST) -> Iterator[Offload]:
    """Inside, what autograd keeps is moved to the CPU (`Offload`); afterwards too, until the backward pass has asked for it."""
    offload = Offload(model, device, least)
    try:
        with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
            yield offload
    finally:
        offload.latest = None


def _tensors(weight: Tensor) -> Iterator[Tensor]:
    """A weight, and the scales that a quantized one has beside it."""
    yield weight
    state = getattr(weight, "quant_state", None)
    for owner in (weight, state, getattr(state, "state2", None)):
        if owner is not None:
            yield from (one for one in vars(owner).values() if isinstance(one, Tensor))
