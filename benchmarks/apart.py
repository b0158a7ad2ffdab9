"""A command in a process of its own, with its time and memory; and a model that it has no work with."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return round(time.perf_counter() - began, 3), found


def peak() -> int:
    """MiB that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def command(words: Sequence[str], here: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Carry out `llm-unlearn` as a user does, in a process of its own: its exit status, seconds, words, and its memory at the peak,
    with what of it are files that the system maps, and can take back, and without."""
    began, whole = time.perf_counter(), os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "llm_unlearn", *words], cwd=here, env=whole, stdout=said, stderr=subprocess.STDOUT
        )
        most = dict.fromkeys(MEMORY, 0)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            most = {key: max(value, _memory(child.pid, key)) for key, value in most.items()}
            time.sleep(0.02)
        status = ended[1]
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    seconds = round(time.perf_counter() - began, 1)
    return {"status": child.returncode, "seconds": seconds, "said": text} | {name: most[key] for key, name in MEMORY.items()}


MEMORY = {"VmHWM": "peak_mib", "RssAnon": "own_mib"}
"""What the system calls it; the second is without files that are mapped. `ru_maxrss` would count the parent's before a child's."""


def _memory(process: int, key: str) -> int:
    """MiB of a process; 0 where the system does not say."""
    try:
        found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) >> 10 if found else 0


def tiny_model(home: Path) -> Path:
    """A random model that a step takes milliseconds of, with the embedded tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_unlearn.embedded.target import make_tokenizer

    place, tokenizer = home / "tiny", make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **ends)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
