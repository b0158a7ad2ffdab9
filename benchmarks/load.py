"""How much it bears: many requests, many rows, many evaluations, many runs; each with its time and its memory.

    python -m benchmarks.load ledger  [--small]   # 100,000 requests of 100 rows, put in by 8 processes at once
    python -m benchmarks.load rows    [--small]   # 1,000,000 rows to forget and 1,000,000 to keep: plan, and a run of 5 steps
    python -m benchmarks.load compare [--small]   # 10,000 evaluations on one page
    python -m benchmarks.load soak    [--small]   # short runs, one after the other in one process: what stays behind

Each prints one line of JSON. `docs/reliability.md` has the figures of the whole ones, `tests/test_load.py` runs the small ones.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ledger
from benchmarks.apart import command, tiny_model

MIB = 1 << 20


# ------------------------------------------------------------------------------------------------------------------- rows


def write_rows(path: Path, kind: str, count: int) -> None:
    """Made-up rows of about a hundred bytes; no two are the same, nor are those of two kinds."""
    with path.open("w") as file:
        for i in range(count):
            file.write(
                json.dumps(
                    {
                        "id": i,
                        "question": f"What does {kind} number {i} like most?",
                        "answer": f"It likes {i * 7919 % 100003} and the sea.",
                    }
                )
                + "\n"
            )


RECIPE = """\
output: {output}
model: {{base: {model}, adapter: {{rank: 4}}}}
data:
  forget: {{source: {forget}, prompt: question, answer: answer}}
  retain: {{source: {retain}, prompt: question, answer: answer}}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: kl}}}}
train: {{steps: 5, window: {{forget: 16, retain: 16}}}}
"""


def rows(home: Path, small: bool) -> dict[str, Any]:
    """A million rows to forget and a million to keep, in two kinds of files and in a data set's folder; beside it a thousand."""
    few, many = 1000, 60_000 if small else 1_000_000
    model, found = tiny_model(home), dict[str, Any]()
    for count in (few, many):
        for kind in ("forget", "retain"):
            write_rows(home / f"{kind}-{count}.jsonl", kind, count)
    shapes = {"few": f"{few}.jsonl", "jsonl": f"{many}.jsonl"} | ({} if small else _other_shapes(home, many))
    environment = {"HF_HOME": str(home / "hub"), "LLM_UNLEARN_CACHE": str(home / "cache")}
    for shape, ending in shapes.items():
        names = {kind: str(home / f"{kind}-{ending}") for kind in ("forget", "retain")}
        (home / f"{shape}.yaml").write_text(RECIPE.format(output=home / f"run-{shape}", model=model, **names))
        for word, verb in (("first", "plan"), ("again", "plan"), ("run", "run")):
            one = command([verb, f"{shape}.yaml"], home, environment)
            assert one["status"] == 0, one["said"]
            found |= {f"{shape}_{word}_{key}": one[key] for key in ("seconds", "peak_mib", "own_mib")}
            found[f"{shape}_{word}_said"] = one["said"].count("reading ")
            print(shape, word, {key: value for key, value in one.items() if key != "said"}, file=sys.stderr, flush=True)
    kept = sum(path.stat().st_size for path in (home / "cache" / "examples").rglob("*") if path.is_file())
    weights = [(home / f"run-{shape}" / "adapter" / "adapter_model.safetensors").read_bytes() for shape in shapes if shape != "few"]
    return found | {"rows": many, "kept_mib": kept // MIB, "same_weights": len(set(weights)) == 1}


def _other_shapes(home: Path, count: int) -> dict[str, str]:
    """The same rows as a sheet, as a parquet file, and as a folder with several of them, as a data set lies on a hub."""
    import datasets

    for kind in ("forget", "retain"):
        loaded = datasets.load_dataset(
            "json", data_files=str(home / f"{kind}-{count}.jsonl"), split="train", cache_dir=str(home / "made")
        )
        loaded.to_parquet(str(home / f"{kind}-{count}.parquet"))
        loaded.to_csv(str(home / f"{kind}-{count}.csv"))
        folder = home / f"{kind}-folder" / "data"
        folder.mkdir(parents=True)
        for i in range(4):
            loaded.shard(4, i, contiguous=True).to_parquet(str(folder / f"train-0000{i}-of-00004.parquet"))
    shutil.rmtree(home / "made")
    return {"csv": f"{count}.csv", "parquet": f"{count}.parquet", "folder": "folder"}


# ------------------------------------------------------------------------------------------------------------ evaluations

SUITE = """\
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 6}
  holdout: {source: embedded:holdout, prompt: question, answer: answer, limit: 6}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 6}
measures:
  - {name: perplexity, set: forget}
  - {name: probability, set: forget}
  - {name: exact_memorization, set: forget}
  - {name: membership, attack: {name: loss}, set: forget, against: holdout}
  - {name: perplexity, set: retain}
  - {name: probability, set: retain}
"""


def evaluations(home: Path, count: int) -> None:
    """One evaluation, and so many with other numbers and answers of their own."""
    from llm_unlearn import api

    model = tiny_model(home)
    (home / "suite.yaml").write_text(SUITE)
    name, suite = str(model), home / "suite.yaml"
    api.evaluate(name, suite, before=name, retrained=name, output=home / "one", cache=home / "cache")
    text = (home / "one" / "evaluation.json").read_text()
    chance = random.Random(0)
    for number in range(count):
        found = json.loads(text)
        forgotten, kept = chance.random(), 0.6 + 0.4 * chance.random()
        for one in found["numbers"]:
            value, forget = one["values"]["after"], one["set"] == "forget"
            then = value["value"] or 0.0
            one["values"]["before"]["value"] = then * (3.0 if forget else 1.0)
            value["value"] = then * (3.0 - 2.0 * forgotten if forget else kept)
        for row in (row for rows_ in found["answers"].values() for row in rows_):
            row["after"] = f"{row.get('after') or 'an answer'} {number}"
        found["models"]["after"]["identity"] = f"model-{number}"
        place = home / "runs" / f"run-{number:05d}"
        place.mkdir(parents=True)
        (place / "evaluation.json").write_text(json.dumps(found))


def compare(home: Path, small: bool) -> dict[str, Any]:
    """Thousands of evaluations on one page."""
    count = 300 if small else 10_000
    evaluations(home, count)
    one = command(["compare", "runs", "--output", "board"], home)
    assert one["status"] == 0, one["said"]
    whole = json.loads((home / "board" / "comparison.json").read_text())
    page = (home / "board" / "comparison.html").read_text()
    return {
        "evaluations": count, "each_kib": (home / "runs" / "run-00000" / "evaluation.json").stat().st_size >> 10,
        "seconds": one["seconds"], "peak_mib": one["peak_mib"], "runs_in_json": len(whole["runs"]),
        "values_in_json": len(whole["numbers"][0]["judgements"]), "runs_on_page": page.count('type="checkbox" id="show-'),
        "said_on_page": f"of {count:,} runs are shown" in page, "lines_in_terminal": len(one["said"].splitlines()),
        "page_kib": len(page.encode()) >> 10, "json_mib": round((home / "board" / "comparison.json").stat().st_size / MIB, 1),
        "frontier": sum(bool(run["frontier"]) for run in whole["runs"]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- soak


SOAK = 300
"""Runs: a day of five minutes each, and an hour more."""


def soak(home: Path, small: bool, runs: int = SOAK) -> dict[str, Any]:
    """Short runs with their evaluation, and questions about them, one after the other in this process: what stays behind."""
    import psutil

    from llm_unlearn import api, cli

    runs, warm = (6, 3) if small else (runs, runs // 3)
    model, process = tiny_model(home), psutil.Process()
    (home / "suite.yaml").write_text(SUITE)
    cache, before = home / "cache", Path.cwd()
    os.environ["LLM_UNLEARN_CACHE"], tempfile.tempdir = str(cache), str(home / "scratch")
    (home / "scratch").mkdir()
    os.chdir(home)
    columns = {"prompt": "question", "answer": "answer", "limit": 8}
    sets = {kind: {"source": f"embedded:{kind}", **columns} for kind in ("forget", "retain")}
    settings = {
        "output": "run", "model": {"base": str(model), "adapter": {"rank": 4}}, "data": sets,
        "objective": {"forget": {"loss": {"name": "npo"}}, "retain": {"loss": {"name": "kl"}}},
        "train": {"steps": 2, "window": {"forget": 4, "retain": 4}}, "evaluation": {"suite": str(home / "suite.yaml")},
    }  # fmt: skip
    (home / "r.yaml").write_text(json.dumps(settings))  # JSON is YAML

    def state() -> dict[str, int]:
        gc.collect()
        files = sum(1 for path in cache.rglob("*") if path.is_file()) if cache.is_dir() else 0
        here = sum(1 for path in home.iterdir())
        return {
            "rss_kib": process.memory_info().rss >> 10, "handles": process.num_fds(), "threads": process.num_threads(),
            "temporary": sum(1 for _ in (home / "scratch").rglob("*")), "in_folder": here, "in_cache": files,
            "children": len(process.children()),
        }  # fmt: skip

    seen, began = list[dict[str, int]](), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for number in range(runs):
            wanted = api.make_recipe(settings | {"seed": number % 3})
            api.unlearn(wanted, overwrite=True, cache=cache)
            if number % 3 == 0:
                assert cli.main(["plan", "r.yaml"]) == 0
                assert cli.main(["show", "run"]) == 0
                assert cli.main(["verify", "run", "--rows", "2"]) == 0
            seen.append(state())
    os.chdir(before)
    found = {
        "runs": runs, "asked": 3 * len(range(0, runs, 3)), "seconds": round(time.perf_counter() - began, 1), "warm_up": warm,
        "rss_mib_at_first": seen[0]["rss_kib"] >> 10, "rss_mib_after_warm_up": seen[warm - 1]["rss_kib"] >> 10,
        "rss_mib_at_last": seen[-1]["rss_kib"] >> 10,
        "kib_a_run": round((seen[-1]["rss_kib"] - seen[warm - 1]["rss_kib"]) / (runs - warm), 1),
    }  # fmt: skip
    return found | {f"{key}_grown": seen[-1][key] - seen[warm - 1][key] for key in seen[0] if key != "rss_kib"}


WORK: dict[str, Callable[[Path, bool], dict[str, Any]]] = {"ledger": ledger.many, "rows": rows, "compare": compare, "soak": soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(WORK))
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--runs", type=int, default=SOAK, help="of a soak")
    parser.add_argument("--home", type=Path, help="an empty folder for its files; without it, a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = options.home or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        work = partial(soak, runs=options.runs) if options.what == "soak" else WORK[options.what]
        print(json.dumps(work(home, options.small)))


if __name__ == "__main__":
    main()
