"""How many tokens fit into memory at once: two short steps of the run's own window, and a line through what they took.

Sets speed alone: a window's gradient does not depend on its cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from llm_unlearn.data.batch import Layout
from llm_unlearn.training.job import Job
from llm_unlearn.training.window import Model, Window
from llm_unlearn.troubles import OutOfMemory, is_out_of_memory

MARGIN = 0.85
"""Share of the free memory that is used: allocators leave gaps, and rules keep a gradient or two."""
STATES = {"adamw": 8, "sophia": 8, "sgd": 0, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes an optimizer keeps for each weight, from its first step on."""


def fitting(job: Job, model: Model, accelerator: Accelerator, packed: bool) -> int:
    """Tokens of one micro-batch, the same on every process. Nothing is changed: gradients are cleared, and no step is taken.

    Raises:
        OutOfMemory: not even one row fits.
    """
    window = Window(job, _fullest(job), accelerator, Layout(1 << 40, packed))
    window.slots.sort(key=lambda slot: -max(len(job.example(*place).ids) for place in slot))
    ranks, slots = accelerator.num_processes, window.slots
    weights = {name: max(term.weight_at(0.0), term.weight_at(1.0)) for name, term in job.terms.items()}

    def took(count: int) -> tuple[int, int]:
        """(tokens, bytes) of a step on so many of the longest slots a process; of the process that took most."""
        window.slots = slots[: count * ranks]
        tokens = window.largest()

        def step() -> None:
            window.backward(job.terms, weights, model)

        size = _peak(accelerator.device, model, step)
        for weight in model.weights:
            weight.grad = None
        return tokens, int(accelerator.gather(torch.tensor([size], device=accelerator.device)).max())

    share = -(-len(slots) // ranks)
    try:
        (few, least), (more, most) = took(1), took(min(4, share))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = f"train.micro_batch: auto: its longest rows alone do not fit into memory (out of memory); give {ADVICE}."
        raise OutOfMemory(said) from None
    free = MARGIN * _free(accelerator) - STATES[job.settings.optimizer] * sum(weight.numel() for weight in model.weights)
    slope = max((most - least) / max(1, more - few), least / few / 4)  # what a first row takes alone is not all its own
    room = few + int((free - least) / max(1.0, slope))
    window.slots = slots
    return max(few, min(room, window.largest()))


ADVICE = "train.gradient_checkpointing: true, model.quantize: nf4, or shorter rows (max_tokens of a source)"


def _fullest(job: Job) -> int:
    """The step whose window has the most rows."""
    return max(range(min(job.schedule.steps, 100)), key=lambda step: len(job.schedule.window(step)))


def _peak(device: torch.device, model: Model, step: Callable[[], None]) -> int:
    """Bytes that a step takes above what is there already: allocated on CUDA, elsewhere what is kept for the backward pass."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    own = {weight.untyped_storage().data_ptr() for weight in model.scorer.parameters()}
    kept: dict[int, int] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        step()
    return sum(kept.values())


def _free(accelerator: Accelerator) -> float:
    """Bytes that are free for a process, the least of all."""
    device = accelerator.device
    if device.type == "cuda":
        found, _ = torch.cuda.mem_get_info(device)
        found += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        found = min(psutil.virtual_memory().available, _allowed()) // accelerator.num_processes
    return float(accelerator.gather(torch.tensor([found], device=device)).min())


def _allowed() -> int:
    """What a container may still take."""
    most, now = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not most.is_file() or not now.is_file() or not (text := most.read_text().strip()).isdigit():
        return 1 << 62
    return int(text) - int(now.read_text())


def out_of_memory(layout: Layout, step: int) -> OutOfMemory:
    """What to do where a step does not fit."""
    return OutOfMemory(
        f"out of memory in step {step}, with at most {layout.tokens} tokens in a micro-batch. Give train.micro_batch: auto, or "
        f"train.batch_tokens: {layout.tokens // 2}, which change no result, or {ADVICE}; with --resume the run goes on from its "
        "last checkpoint."
    )
