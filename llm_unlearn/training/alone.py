"""A process of a launch that trains something by itself for a while, beside the others, as if it were the only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, DistributedType, PartialState

ALONE = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "local_process_index": 0}
"""What Accelerate asks to know whether others wait for this process; the device stays this process's own."""


@contextmanager
def alone() -> Iterator[None]:
    """Inside, Accelerate waits for nobody and shares nothing: gradients, means and checkpoints are this process's alone."""
    states = [vars(PartialState()), vars(AcceleratorState())]
    kept = [{name: state[name] for name in ALONE} for state in states]
    try:
        for state in states:
            state.update(ALONE)
        yield
    finally:
        for state, values in zip(states, kept, strict=True):
            state.update(values)
