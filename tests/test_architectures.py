"""The main job on small models of the architectures that transformers brings, against plain transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import Bench, examine

RIGHT = (
    "llama", "gpt2", "gemma3_text", "mixtral", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "granite", "cohere2", "gpt_neox",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.of(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("kind", RIGHT)
def test_an_architecture_computes_what_transformers_and_peft_compute(kind: str, bench: Bench, tmp_path: Path) -> None:
    assert examine(kind, bench, tmp_path) == ""
