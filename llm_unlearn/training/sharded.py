"""Training with the weights spread over processes (FSDP2, through Accelerate): when that is so, and what cannot be trained so.

A launch file asks for it (`distributed_type: FSDP`). Only training is spread: before and after it, every process holds whole
models, and looks at them as in any other launch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    load_fsdp_optimizer,
    parse_choice_from_env,
    parse_flag_from_env,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from llm_unlearn.methods.retrain import Retrain
from llm_unlearn.models.depth import blocks_of
from llm_unlearn.models.load import causal
from llm_unlearn.models.scores import Scorer
from llm_unlearn.models.structure import body_of
from llm_unlearn.recipe import Recipe
from llm_unlearn.spec import Refused
from llm_unlearn.training import shards
from llm_unlearn.training.alone import told

FILE = "launch/fsdp2.yaml"
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Every process holds the whole model."""
RULES = ("project", "bilevel", "sharpness", "tamper")
"""Rules on the whole step that only add, multiply and measure gradients and weights; checked against one process."""


def check_launch() -> None:
    """Before Accelerate begins.

    Raises:
        Refused: the launch file asks for DeepSpeed.
    """
    # What the launcher was asked stands in the environment, and how Accelerate reads it decides what it makes of this process.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise Refused(f"the launch file asks for DeepSpeed, which is not supported; {FILE} spreads a model over processes.")


def make_accelerator(precision: str) -> Accelerator:
    """The accelerator of this process: of many like it, each with whole models; `spread` is what shards.

    Args:
        precision: "bf16" or "no".

    Raises:
        Refused: the launch file asks for what cannot be had here.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or is_asked():
        return Accelerator(mixed_precision=precision)
    state, plugin = PartialState(), _plugin(precision)
    plain = state.distributed_type
    if plain == DistributedType.MULTI_CPU:  # Accelerate shards only what it takes for GPUs; torch shards on CPU cores as well
        state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=plugin)
    if not accelerator.is_fsdp2:
        raise Refused(
            f"the launch asks for FSDP, and Accelerate made {accelerator.distributed_type.value} of this process. Start it with "
            f"accelerate launch --config_file {FILE} (launch/fsdp2_cpu.yaml on CPU cores)."
        )
    for one in (state, accelerator.state):
        one.distributed_type = plain
    return accelerator


def _plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """What the launch file says of sharding. Weights travel in the precision of the computation, gradients in float32."""
    if (version := parse_choice_from_env("FSDP_VERSION", "1")) != "2":
        raise Refused(f"the launch file asks for FSDP version {version}; give fsdp_version: 2 in its fsdp_config (see {FILE}).")
    kind = torch.bfloat16 if precision == "bf16" else None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    )
    unfit = {
        "fsdp_cpu_ram_efficient_loading": "every process looks at the whole model before the training; give false",
        "fsdp_activation_checkpointing": "it is the recipe that says so (train.gradient_checkpointing); give false",
        "fsdp_offload_params": "weights that are kept in CPU memory are not supported; give false",
    }
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    for name, on in zip(unfit, (plugin.cpu_ram_efficient_loading, plugin.activation_checkpointing, offload), strict=True):
        if on:
            raise Refused(f"the launch file: fsdp_config.{name}: {unfit[name]}.")
    return plugin


def is_asked() -> bool:
    """Whether this launch shards, as `make_accelerator` found."""
    return is_initialized() and "fsdp_plugin" in vars(AcceleratorState())


def spread() -> AbstractContextManager[None]:
    """Inside, what Accelerate prepares is sharded, where the launch asks for it."""
    return told({"distributed_type": DistributedType.FSDP}) if is_asked() else nullcontext()


def prepare(scorer: Scorer, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as the launch wants them: as they are, copied to every process, or spread over all.

    Decoder layers are sharded one by one. The rest (embeddings, last norm, head, whether tied or not) is one group at the root.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        _, blocks = blocks_of(body_of(causal(scorer.model))[1])
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    wrapped, prepared = accelerator.prepare(scorer, optimizer)
    if isinstance(wrapped, FSDPModule):
        wrapped.set_reduce_scatter_unused_params(True)  # a process without a row for the head sends zeros for it
        accelerator.free_memory()  # only forgets: else each checkpoint would hold all weights, those that are frozen included
    return wrapped, prepared


def save_optimizer(accelerator: Accelerator, optimizer: Any, wrapped: nn.Module, folder: Path) -> None:
    """Every process writes its share of a sharded optimizer's state; any other is Accelerate's own work."""
    if isinstance(wrapped, FSDPModule):
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, wrapped, str(folder))


def load_optimizer(accelerator: Accelerator, optimizer: Any, wrapped: nn.Module, folder: Path) -> None:
    """Read what `save_optimizer` has written, on as many processes or on others."""
    if isinstance(wrapped, FSDPModule):
        shards.check(folder)
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, wrapped, str(folder))


def check(recipe: Recipe) -> None:
    """Whether a recipe can be trained with its model spread over processes, where the launch asks for that.

    Raises:
        Refused: it cannot, and why.
    """
    if not is_asked():
        return
    model, train = recipe.model, recipe.train
    found: dict[str, object] = {
        "train.privacy": train.privacy and "no process would have the norm of one example's gradient",
        "method": recipe.method and not isinstance(recipe.method, Retrain) and f"{recipe.method.name} needs whole weights",
        "model.quantize": model.quantize and "quantized weights are not sharded",
        "model.adapter.init": model.adapter and model.adapter.init == "fila" and "fila also changes the base, which is saved whole",
        "train.optimizer": "8bit" in train.optimizer and "8-bit states are not sharded; use adamw, sgd or sophia",
        "train.compile": train.compile and "compiled layers were not tried on shards",
        "train.offload": train.offload and "weights that are gathered for a layer would be moved with what it makes",
        "train.micro_batch": train.micro_batch == "auto" and "one process may run out of memory while others wait for it",
        "evaluation.every": recipe.evaluation and recipe.evaluation.every and "looks need the whole model; measure at the end",
    }
    for rule in train.rules:
        found[f"train.rules: {rule.name}"] = rule.name not in RULES and "it needs whole weights"
        ema = getattr(rule, "ema", 0.0)
        found[f"train.rules: {rule.name}.ema"] = ema and "what it remembers is not kept with checkpoints"
    for name, term in recipe.terms.items():
        found[f"objective.{name}"] = term.loss.needs.window and "it compares all rows of a window, which need passes of their own"
    if reasons := [f"{place}: {why}" for place, why in found.items() if why]:
        lines = [f"{reason} (the launch asks for FSDP; see {FILE})." for reason in reasons]
        raise Refused("\n".join(lines))


def check_whole(accelerator: Accelerator, place: str) -> None:
    """Every process must hold the whole model.

    Raises:
        Refused: it is spread over them.
    """
    if accelerator.distributed_type not in WHOLE:
        raise Refused(
            f"{place}: the model is spread over processes ({accelerator.distributed_type.value}), so that none has the norm of a "
            "whole gradient. Launch with one model per process (launch/), or take another way."
        )
