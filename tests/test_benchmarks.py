"""Benchmarks name functions of the project to time them: they must be there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_times_is_there(path: Path) -> None:
    found = runpy.run_path(str(path))
    assert callable(found["main"])
    for stage, functions in found.get("STAGES", {}).items():
        for place, name in functions:
            assert callable(getattr(place, name)), stage
