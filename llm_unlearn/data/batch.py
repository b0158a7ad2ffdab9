"""Examples laid out for the model: padded in length order or end to end, labels shifted, units counted. Nowhere else.

Shapes, here and everywhere: B sequences of a micro-batch, L its padded length, N answer tokens (positions whose next token is
a target), S sequences of one stream, D hidden size, V vocabulary, T tokens of one answer, or of all sequences end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import Slot


@dataclass(frozen=True)
class Packing:
    """Where sequences begin that lie end to end."""

    position_ids: Tensor  # (1, T) the place of each token within its sequence
    starts: Tensor  # (B + 1,) int32
    longest: int  # L
    place: Tensor  # (T,) b·L + t, where each token would lie if all were padded to the longest

    @staticmethod
    def of(lengths: Sequence[int]) -> Packing:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        position = torch.cat([torch.arange(length) for length in lengths])
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return Packing(position[None], starts, max(lengths), row * max(lengths) + position)

    def to(self, device: torch.device) -> Packing:
        position, starts, place = (tensor.to(device, non_blocking=True) for tensor in (self.position_ids, self.starts, self.place))
        return Packing(position, starts, self.longest, place)


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, those of a stream side by side: padded, or end to end where `packing` says how.

    Padding stands to the right and attention is causal, so no answer token ever sees it: no mask is needed, and a padding
    token that is also the end-of-turn token hides nothing.
    """

    input_ids: Tensor  # (B, L), or (1, T) end to end
    at: Tensor  # (N,) the position before a target, in the order of `input_ids`
    targets: Tensor  # (N,)
    owner: Tensor  # (N,) the sequence within its stream, 0 … S−1
    position: Tensor  # (N,) the place within its answer, 0 … T−1
    tokens: dict[str, slice]  # stream -> its part of N
    sequences: dict[str, int]  # stream -> S
    examples: tuple[Example, ...]  # (B,)
    packing: Packing | None = None

    def to(self, device: torch.device) -> Batch:
        ids, at, targets, owner, position = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.at, self.targets, self.owner, self.position)
        )
        packing = self.packing and self.packing.to(device)
        return Batch(ids, at, targets, owner, position, self.tokens, self.sequences, self.examples, packing)

    def only(self, streams: Collection[str]) -> Batch | None:
        """The part of it that is of these streams; None where there is none."""
        wanted = [example for example in self.examples if example.stream in streams]
        if len(wanted) == len(self.examples):
            return self
        return lay_out(wanted, self.packing is not None).to(self.input_ids.device) if wanted else None


def lay_out(examples: Sequence[Example], packed: bool = False) -> Batch:
    """One micro-batch. Streams keep the order in which they first appear, examples of a stream their order.

    Args:
        packed: end to end, for a model that can read it so (`models/packing.py`).
    """
    order = {stream: i for i, stream in enumerate(dict.fromkeys(example.stream for example in examples))}
    examples = sorted(examples, key=lambda example: order[example.stream])
    lengths = [len(example.ids) for example in examples]
    starts = [0, *accumulate(lengths)] if packed else [b * max(lengths) for b in range(len(lengths))]
    input_ids = torch.zeros(sum(lengths) if packed else len(lengths) * max(lengths), dtype=torch.long)
    at, targets, owner, position = [], [], [], []
    count = 0  # targets laid out so far
    tokens: dict[str, slice] = {}
    sequences: dict[str, int] = {}
    for start, example in zip(starts, examples, strict=False):
        ids = torch.tensor(example.ids)
        input_ids[start : start + len(ids)] = ids
        at.append(torch.arange(example.answer - 1, len(ids) - 1) + start)
        targets.append(ids[example.answer :])
        owner.append(torch.full((example.targets,), sequences.get(example.stream, 0)))
        position.append(torch.arange(example.targets))
        before = tokens.get(example.stream, slice(count, 0)).start
        tokens[example.stream] = slice(before, count := count + example.targets)
        sequences[example.stream] = sequences.get(example.stream, 0) + 1
    return Batch(
        input_ids.view(1 if packed else len(lengths), -1), torch.cat(at), torch.cat(targets), torch.cat(owner), torch.cat(position),
        tokens, sequences, tuple(examples), Packing.of(lengths) if packed else None,
    )  # fmt: skip


def answer_lengths(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Stream -> T of each of its answers: what the loop counts a loss's units from."""
    lengths: dict[str, list[int]] = {}
    for example in examples:
        lengths.setdefault(example.stream, []).append(example.targets)
    return lengths


def cut(
    lengths: Sequence[int],
    batch_tokens: int,
    ranks: int = 1,
    sequences: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Deal items to ranks and cut each rank's share into micro-batches of at most `batch_tokens` tokens, padding included.

    Items of like length lie together, and every rank gets as many micro-batches as any other; where items run out, a rank gets
    an empty one, so that all ranks meet in each backward pass.

    Args:
        lengths: tokens of each item's longest sequence.
        sequences: how many sequences an item is made of; without it, one.
        sizes: tokens of each item where they will lie end to end; without it, every sequence is padded to the longest.

    Returns:
        [rank][micro-batch] -> indices into `lengths`. An item longer than the budget gets a micro-batch of its own.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = [by_length[rank::ranks] for rank in range(ranks)]
    dealt: list[list[list[int]]] = []
    for share in shares:
        batches: list[list[int]] = []
        held = 0  # sequences, or tokens, in the last micro-batch
        for i in share:  # descending: the first of a micro-batch sets its padded length
            more = sizes[i] if sizes else sequences[i] if sequences else 1
            if batches and (1 if sizes else lengths[batches[-1][0]]) * (held + more) <= batch_tokens:
                batches[-1].append(i)
                held += more
            else:
                batches.append([i])
                held = more
        dealt.append(batches)
    most = max(len(batches) for batches in dealt)
    return [batches + [[] for _ in range(most - len(batches))] for batches in dealt]


@dataclass(frozen=True)
class Layout:
    """How the examples of one optimizer step become micro-batches."""

    tokens: int
    """At most so many in one, padding included."""
    packed: bool = False
    """End to end, without padding."""


def micro_batches(
    window: Sequence[Slot], example: Callable[[str, int], Example], layout: Layout, rank: int = 0, ranks: int = 1
) -> list[Batch | None]:
    """This rank's share of one optimizer step; None stands for "nothing here, but take part in the backward pass"."""
    slots = [[example(stream, index) for stream, index in slot] for slot in window]
    lengths = [max(len(one.ids) for one in slot) for slot in slots]
    streams = list(dict.fromkeys(one.stream for slot in slots for one in slot))
    batches: list[Batch | None] = []
    sizes = [sum(len(one.ids) for one in slot) for slot in slots] if layout.packed else None
    for chosen in cut(lengths, layout.tokens, ranks, [len(slot) for slot in slots], sizes)[rank]:
        members = [one for i in sorted(chosen) for one in slots[i]]
        batches.append(lay_out(sorted(members, key=lambda one: streams.index(one.stream)), layout.packed) if members else None)
    return batches
