"""Numbers drawn from a key by a cryptographic hash: whoever lacks the key cannot foretell them, and no state has to be kept."""

from __future__ import annotations

from hashlib import shake_256

import numpy as np
from numpy.typing import NDArray


def uniforms(key: bytes, *what: object, count: int) -> NDArray[np.float64]:
    """(count,) uniform in (0, 1), 52 bits each: SHAKE-256 of the key and of what they are for.

    The i-th depends on the key, on `what` and on i alone, so that it is the same on every process and after a resume.
    """
    stream = shake_256(key + "".join(f"\0{part}" for part in what).encode()).digest(8 * count)
    drawn: NDArray[np.float64] = ((np.frombuffer(stream, "<u8") >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return drawn


def normals(key: bytes, *what: object, count: int) -> NDArray[np.float64]:
    """(count,) standard normal, float64 (Box & Muller 1958); as reproducible as `uniforms`."""
    half = (count + 1) // 2
    drawn = uniforms(key, *what, count=2 * half)
    radius, angle = np.sqrt(-2 * np.log(drawn[:half])), 2 * np.pi * drawn[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
