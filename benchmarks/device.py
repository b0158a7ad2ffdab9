"""What depends on the device: precision, waiting for it, its memory; and its limits, the rate of matrix products and of copying."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MMAP_THRESHOLD, SMALL, LARGE = -3, 1 << 20, 1 << 25


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """What is computed in: bf16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def frugal(wanted: bool) -> None:
    """Give freed memory of a megabyte and more back at once (glibc), so that a peak is of what was held and not of what malloc
    kept; or, for speed, only of 32 MB and more, where malloc's own rule ends up. The same for every way that is measured."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, SMALL if wanted else LARGE)


def held() -> int:
    """Bytes of memory in use now: of this process on a CPU, of tensors on CUDA."""
    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak()


def peak() -> int:
    """The most bytes that were in use since the process began."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def name() -> str:
    """The machine, in words."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{found[0] if found else platform.machine()}, {torch.get_num_threads()} threads"


def _fastest(act: Callable[[], object], least: float = 0.5) -> float:
    """Seconds of the fastest of several calls, of which there are enough to fill `least` seconds."""
    act()
    synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < 50):
        began = time.perf_counter()
        act()
        synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_rate(m: int, k: int, n: int) -> float:
    """FLOPs per second of an (m, k) by (k, n) product in the precision of the device."""
    a, b = (torch.randn(shape, dtype=dtype(), device=device()) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / _fastest(lambda: a @ b)


def limits(hidden: int, intermediate: int, tokens: int, small: bool) -> dict[str, Any]:
    """What the machine can do: products of large squares, products as the model has them (a window's tokens through the largest
    matrix of a layer), and bytes read and written per second by a copy."""
    side = 512 if small else 8192 if device().type == "cuda" else 2048
    source = torch.ones((1 << (22 if small else 28)) // 4, device=device())
    copy = torch.empty_like(source)
    found = {
        "square": matmul_rate(side, side, side),
        "model": matmul_rate(tokens, hidden, intermediate),
        "bandwidth": 2 * source.nbytes / _fastest(lambda: copy.copy_(source)),
    }
    return found | {"matmul": max(found["square"], found["model"])}
