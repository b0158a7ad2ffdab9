"""Where a run can go on after it was stopped: trainable weights, optimizer, schedule and progress, written whole or not at all.

A run folder may be somebody else's: nothing in a checkpoint is run when it is read.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_unlearn.durable import about, make_folder, put
from llm_unlearn.folder import newest_checkpoint
from llm_unlearn.models.load import trainable
from llm_unlearn.models.sharded import fill, is_sharded, whole
from llm_unlearn.models.sound import weights_in
from llm_unlearn.reply import UNABLE
from llm_unlearn.spec import Refused, reason
from llm_unlearn.training.sharded import load_optimizer, save_optimizer
from llm_unlearn.troubles import reply_to

DAMAGED = (pickle.UnpicklingError, EOFError, OSError, LookupError, RuntimeError, TypeError, ValueError)
"""What torch and Accelerate raise of files that are cut off, empty, foreign, or would run something."""
WEIGHTS, PROGRESS = "trainable.safetensors", "progress.pt"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    before: dict[str, float] = field(default_factory=dict)
    """The probe's values before the run."""
    good_step: int = 0
    """The step of the best weights that were looked at."""
    good: dict[str, Tensor] = field(default_factory=dict)
    """The weights at that step."""
    good_look: dict[str, float] = field(default_factory=dict)
    """What was seen at that step."""
    gap: float = float("inf")
    """How far their forget set was from the aim."""
    beyond: int = 0
    """Looks in a row that were beyond the budget."""
    warned: bool = False
    """Whether it was said that most of what is to be kept is gone."""
    multipliers: dict[str, float] = field(default_factory=dict)
    """Weights that a budget has found."""
    batch_tokens: int = 0
    """Of one micro-batch, where that was found by a probe."""
    watch: dict[str, Any] = field(default_factory=dict)
    """What is remembered to notice that a run comes to nothing good (divergence.py)."""
    safe_step: int = 0
    """Where no probe keeps the best weights, the step of the last ones before anything was wrong."""
    safe: dict[str, Tensor] = field(default_factory=dict)
    """The weights at that step."""
    memory: dict[str, list[Tensor]] = field(default_factory=dict)
    """What rules keep from step to step."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class Checkpoints:
    """The checkpoints of one run; only the newest is kept."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, model: nn.Module, progress: Progress, scheduler: Any,
        optimizer: Any, wrapped: nn.Module,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.accelerator = accelerator
        self.progress = progress

        # Accelerate would save the frozen base with every checkpoint; only what is trained is needed. And what is registered
        # with it to be saved it reads as a pickle that may run anything.
        def save(models: list[Any], weights: list[Any], where: str) -> None:
            weights.clear()
            kept = snapshot(model) if accelerator.is_main_process or is_sharded(model) else {}
            if accelerator.is_main_process:
                save_file(kept, str(Path(where) / WEIGHTS))
                torch.save({"progress": progress.state_dict(), "schedule": scheduler.state_dict()}, Path(where) / PROGRESS)
            save_optimizer(accelerator, optimizer, wrapped, Path(where))

        def load(models: list[Any], where: str) -> None:
            models.clear()
            restore(model, weights_in(Path(where) / WEIGHTS))
            held = torch.load(Path(where) / PROGRESS, map_location="cpu", weights_only=True)
            progress.load_state_dict(held["progress"])
            scheduler.load_state_dict(held["schedule"])
            load_optimizer(accelerator, optimizer, wrapped, Path(where))

        self.hooks = (accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load))
        self.optimizer = optimizer

    def save(self) -> None:
        """Write the state after `progress.step` steps, then drop older ones."""
        name = self.folder / f"step-{self.progress.step:06d}"
        if name.exists():
            return
        unfinished = name.with_suffix(".unfinished")
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            make_folder(self.folder)
        self.accelerator.wait_for_everyone()
        try:
            with about(name):
                self.accelerator.save_state(str(unfinished), safe_serialization=True)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk it would be in the way
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            put(unfinished, name)  # on the disk, before the older ones are not
            for other in self.folder.glob("step-*"):
                if other != name:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """No more is saved: let go of the model, and of the optimizer's states, which the accelerator would keep in memory."""
        for hook in self.hooks:
            hook.remove()
        self.optimizer.state.clear()

    def load(self) -> bool:
        """Go back to the newest checkpoint; False where there is none."""
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return False
        if any(newest.glob("custom_checkpoint_*")):  # Accelerate would read it as a pickle that may run anything
            raise Refused(f"{newest}: of another version of this project, or none of it. Add --overwrite to begin anew.")
        try:
            self.accelerator.load_state(str(newest))
        except DAMAGED as error:  # tensors are read, and nothing that would be run
            if reply_to(error)[1].status == UNABLE and not isinstance(error, OSError):  # no memory, or a process is gone
                raise
            said = f"not a checkpoint of this project ({reason(error)})"
            raise Refused(f"{newest}: {said}. Remove it, or add --overwrite to begin anew.") from None
        device, memory = self.accelerator.device, self.progress.memory
        memory.update({name: [one.to(device) for one in kept] for name, kept in memory.items()})
        return True


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable weights in CPU memory; where they are sharded, every process must ask."""
    return {name: whole(weight) for name, weight in trainable(model).items()}


def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a snapshot back."""
    for name, weight in trainable(model).items():
        fill(weight, weights[name])
