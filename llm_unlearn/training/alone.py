"""What Accelerate is told of the other processes for a while: that there are none, or that a model is spread over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate.state import AcceleratorState, DistributedType, PartialState

ALONE = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "local_process_index": 0}
"""What Accelerate asks to know whether others wait for this process; the device stays this process's own."""


@contextmanager
def told(values: Mapping[str, object]) -> Iterator[None]:
    """Inside, Accelerate goes by these values."""
    states = [vars(PartialState()), vars(AcceleratorState())]
    kept = [{name: state[name] for name in values} for state in states]
    try:
        for state in states:
            state.update(values)
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.update(before)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, Accelerate waits for nobody and shares nothing: gradients, means and checkpoints are this process's alone."""
    with told(ALONE):
        yield
