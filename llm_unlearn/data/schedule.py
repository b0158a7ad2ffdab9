"""Which optimizer step sees which example: a table made from the seed before anything trains.

Epochs, the pairing of forget and retain rows, resume ("start at step k") and "what did step 137 see?" are rows of it. It does not
depend on the number of processes. A private run draws its rows from a secret key instead.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.chance import uniforms
from llm_unlearn.data.examples import draw

Slot = tuple[tuple[str, int], ...]
"""Examples, as (stream, index), that must lie in one micro-batch: an answer, and beside it its companions, such as an alternate
answer that a loss compares it with."""


@dataclass(frozen=True)
class Schedule:
    """The table (step, slot, stream, example), one row per example seen, ordered by step and slot."""

    streams: tuple[str, ...]
    step: NDArray[np.int32]  # (K,)
    slot: NDArray[np.int32]  # (K,) within the step
    stream: NDArray[np.int8]  # (K,) index into `streams`
    example: NDArray[np.int32]  # (K,) index into the stream's examples
    steps: int
    """Optimizer steps; a step of a Poisson schedule may see nothing."""

    def window(self, step: int) -> list[Slot]:
        """What one optimizer step sees, on all processes together."""
        first, last = np.searchsorted(self.step, [step, step + 1])
        slots: dict[int, list[tuple[str, int]]] = {}
        for k in range(first, last):
            slots.setdefault(int(self.slot[k]), []).append((self.streams[self.stream[k]], int(self.example[k])))
        return [tuple(slot) for slot in slots.values()]

    def seen(self, stream: str) -> NDArray[np.int32]:
        """The indices of a stream's examples that any step sees, ascending."""
        return np.unique(self.example[self.stream == self.streams.index(stream)])


def build(
    sizes: Mapping[str, int],
    window: Mapping[str, int],
    seed: int,
    epochs: float = 1,
    steps: int | None = None,
    companions: Mapping[str, Sequence[int] | NDArray[np.int64]] | None = None,
) -> Schedule:
    """Lay out a run.

    Args:
        sizes: examples per stream. The first stream sets the epoch: each of its examples once, in a fresh order. The last step
        of an
            epoch takes what is left of it. The other streams go round in fresh orders of their own, at their full window size.
        window: examples of each stream per step.
        seed: the only source of every order and draw.
        epochs: passes over the first stream; a fraction ends the run inside an epoch.
        steps: number of steps, instead of epochs.
        companions: such as `forget.alternate` -> k for each example of `forget`: a drawn one of the k goes into the example's slot.
    """
    leading = next(iter(sizes))
    per_epoch = ceil(sizes[leading] / window[leading])
    total = steps if steps is not None else max(1, round(epochs * per_epoch))
    companions = companions or {}
    streams = (*sizes, *companions)
    offsets = {name: np.concatenate([[0], np.cumsum(counts)]) for name, counts in companions.items()}
    beside = {name: [other for other in companions if other.rpartition(".")[0] == name] for name in sizes}
    rounds: dict[str, NDArray[np.int64]] = {name: np.zeros(0, np.int64) for name in sizes}
    number = dict.fromkeys(sizes, 0)
    table = _Table()
    for step in range(total):
        slot = 0
        for name, size in window.items():
            want = size if name != leading else min(size, sizes[name] - (step % per_epoch) * size)
            while len(rounds[name]) < want:
                order = np.random.default_rng([seed, draw(name), number[name]]).permutation(sizes[name])
                rounds[name], number[name] = np.concatenate([rounds[name], order]), number[name] + 1
            chosen, rounds[name] = rounds[name][:want], rounds[name][want:]
            if not beside[name]:
                table.add(step, slot, streams.index(name), chosen)
                slot += want
                continue
            for example in chosen.tolist():
                table.add(step, slot, streams.index(name), [example])
                for other in beside[name]:
                    pick = draw(seed, step // per_epoch, example) % int(companions[other][example])
                    table.add(step, slot, streams.index(other), [int(offsets[other][example]) + pick])
                slot += 1
    return table.done(streams, total)


class _Table:
    """A schedule on its way: rows of numbers as small as they may be, since an epoch of a million examples has millions of them."""

    def __init__(self) -> None:
        self.columns = array("i"), array("i"), array("b"), array("i")

    def add(self, step: int, slot: int, stream: int, examples: NDArray[np.int64] | Sequence[int]) -> None:
        """Some examples of one stream in one step, in slots that follow each other."""
        count = len(examples)
        for column, values in zip(
            self.columns, ([step] * count, range(slot, slot + count), [stream] * count, examples), strict=True
        ):
            column.extend(values)

    def done(self, streams: tuple[str, ...], steps: int) -> Schedule:
        step, slot, stream, example = self.columns
        return Schedule(
            streams, np.frombuffer(step, np.int32), np.frombuffer(slot, np.int32), np.frombuffer(stream, np.int8),
            np.frombuffer(example, np.int32), steps,
        )  # fmt: skip


def by_key(keys: Sequence[str], window: int, seed: object, passes: float, stream: str, steps: int | None = None) -> Schedule:
    """Lay out training on one stream so that what is drawn for an example depends on its key alone: in each pass the
    examples stand in the order of draws made from the seed, the pass and the key. Without one of them, the others keep theirs.

    Args:
        passes: over all examples; a fraction ends inside a pass.
        steps: number of steps, instead of passes.
    """
    per_pass = ceil(len(keys) / window)
    total = steps if steps is not None else max(1, round(passes * per_pass))
    table = _Table()
    for step in range(total):
        number, at = divmod(step, per_pass)
        if at == 0:
            order = sorted(range(len(keys)), key=lambda i: (draw(seed, number, keys[i]), keys[i]))
        table.add(step, 0, 0, order[at * window : (at + 1) * window])
    return table.done((stream,), total)


def poisson(sizes: Mapping[str, int], rates: Mapping[str, float], key: bytes, steps: int) -> Schedule:
    """Lay out a run in which each example enters each step by a draw of its own: what a private run's accountant supposes.

    Args:
        rates: stream -> q, the probability with which each of its examples enters a step.
        key: the only source of the draws; an example's draw depends on the key, the step, the stream and its index alone.
        steps: optimizer steps. Their sizes vary, and a step may be empty.
    """
    table = _Table()
    for step in range(steps):
        slot = 0
        for stream, (name, size) in enumerate(sizes.items()):
            drawn = np.flatnonzero(uniforms(key, "sample", step, name, count=size) < rates[name])
            table.add(step, slot, stream, drawn)
            slot += len(drawn)
    return table.done(tuple(sizes), steps)
