"""Two runs of one recipe write the same files, byte for byte but for their times, whatever the interpreter's hash seed is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_jobs import BEGIN, EXACT, SUITE, contents
from jobs import ROOT

WHOLE = BEGIN.replace("adapter: {rank: 2, alpha: 4}", "adapter: null").replace("output: run", "output: whole")
FILA = BEGIN.replace("alpha: 4}", "alpha: 4, init: fila}").replace("output: run", "output: fila").replace("kl", "nll")
FILA = FILA.replace("npo", "ihl")
EVALUATED = BEGIN + "evaluation: suite.yaml\n"
RECIPES = {"run": EVALUATED, "whole": WHOLE, "fila": FILA, "exact": EXACT.replace("output: run", "output: exact")}
SCRIPT = """\
import sys
from llm_unlearn.cli import main
assert [main(["run", f"{name}.yaml"]) for name in sys.argv[1:]] == [0] * len(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_interpreters_write_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    """peft keeps the names of adapted layers in a set, and once wrote them in its order."""
    found = []
    home = tmp_path / "home"  # of one name, as the base's and the cache's are written into some of the files
    for seed in ("1", "2"):
        home.mkdir()
        (home / "suite.yaml").write_text(SUITE)
        for name, text in RECIPES.items():
            (home / f"{name}.yaml").write_text(text.replace("BASE", str(tiny_base)))
        environment = os.environ | {"PYTHONHASHSEED": seed, "LLM_UNLEARN_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *RECIPES], capture_output=True, text=True, cwd=home, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        salted = {"exact": home / "exact" / "adapter"}  # the names of pieces come from a salt of each run's own
        found.append({name: contents(salted.get(name, home / name)) for name in RECIPES} | {"cache": contents(home / "cache")})
        home.rename(tmp_path / f"of seed {seed}")
    one, other = found
    assert {name: len(files) for name, files in one.items()} == {name: len(files) for name, files in other.items()}
    assert one == other, [f"{name}/{file}" for name in one for file in one[name] if one[name][file] != other[name].get(file)]
    assert all(name in found[0][run] for run, name in (("run", "adapter/adapter_config.json"), ("exact", "adapter_config.json")))
