"""Many requests in one ledger (`python -m benchmarks.load ledger`)."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.apart import ROOT, command, peak, timed

PROCESSES = 8
MIB = 1 << 20


def putting_in(path: str, mine: Sequence[int], rows: int, told: Any) -> None:
    """One process of many: each of its requests twice, as a caller does who got no answer."""
    from llm_unlearn.requests.ledger import Ledger
    from llm_unlearn.requests.records import Row

    ledger = Ledger(Path(path), "load")
    locked, slowest, twice = 0, 0.0, 0
    for number in mine:
        found = [Row(f"{number}-{i}", ledger.digest(number, i), 100.0) for i in range(rows)]
        asked = {"key": f"case-{number}", "kind": "ids", "selector": ledger.digest(number), "model": "m", "due": None}
        began = time.perf_counter()
        try:
            first, _ = ledger.add(rows=found, **asked)
            slowest = max(slowest, time.perf_counter() - began)
            if number % 10 == 0:
                again, new = ledger.add(rows=found, **asked)
                twice += new or again.id != first.id
        except sqlite3.OperationalError:
            locked += 1
    told.put({"locked": locked, "slowest": slowest, "twice": twice, "peak_mib": peak()})


def many(home: Path, small: bool) -> dict[str, Any]:
    """Requests put in by eight processes at once, then all that is asked of a ledger."""
    from llm_unlearn.requests import chain
    from llm_unlearn.requests.ledger import Ledger
    from llm_unlearn.requests.records import FULFILLED, PENDING, WITHDRAWN, Verdict, canonical

    count, rows = (800, 10) if small else (100_000, 100)
    path, spawn = home / "requests.db", multiprocessing.get_context("spawn")
    Ledger(path, "load")
    told = spawn.Queue()
    # neighbours ask for the same requests: an eighth of them is put in by two processes
    shares = [[*range(i, count, PROCESSES), *range((i + 1) % PROCESSES, count, 8 * PROCESSES)] for i in range(PROCESSES)]
    children = [spawn.Process(target=putting_in, args=(str(path), share, rows, told)) for share in shares]
    began = time.perf_counter()
    for child in children:
        child.start()
    said = [told.get() for _ in children]
    seconds = time.perf_counter() - began
    for child in children:
        child.join()
    one = Ledger(path, "load")
    every = one.requests()
    found: dict[str, Any] = {
        "requests": count, "rows_each": rows, "found": len(every), "keys": len({request.key for request in every}),
        "adds_per_second": round(sum(map(len, shares)) / seconds), "locked": sum(each["locked"] for each in said),
        "twice": sum(each["twice"] for each in said), "slowest_add": round(max(each["slowest"] for each in said), 2),
        "peak_mib_of_a_process": max(each["peak_mib"] for each in said), "file_mib": path.stat().st_size // MIB,
    }  # fmt: skip
    found["request_seconds"], _ = timed(lambda: one.request(count // 2))
    found["withdraw_seconds"], _ = timed(lambda: one.move(count, [PENDING], WITHDRAWN, WITHDRAWN))
    found["row_counts_seconds"], counts = timed(one.row_counts)
    found["all_rows"] = sum(counts.values()) == count * rows
    found["claim_seconds"], run = timed(lambda: one.claim("m", "s"))
    found["served_by_seconds"], mine = timed(lambda: one.served_by(run.id))
    verdicts = [Verdict(each.id, FULFILLED, "", {"numbers": []}, lambda place: canonical(dict(place))) for each in mine]
    found["finish_seconds"], _ = timed(lambda: one.finish(run.id, "accepted", verdicts, []))
    found["fulfilled"] = len(one.requests(FULFILLED))
    found["certificates"] = sum(1 for _ in one.each_certificate())
    found["verify_seconds"], found["problems"] = timed(lambda: len(chain.problems(one)))
    return found | {"peak_mib": peak()} | (_by_command(home, path) if not small else {})


def _by_command(home: Path, path: Path) -> dict[str, Any]:
    """The verbs on the same ledger: a listing, and some requests put in beside each other."""
    service = "recipe: recipes/forget_lora.yaml\nsuite: eval/quick.yaml\nledger: {}\ndata: {{source: embedded:forget, id: id}}\nthresholds: [{{measure: perplexity, set: forget, at_least: 1.5}}]\n"  # noqa: E501
    (home / "requests.yaml").write_text(service.format(path.name))
    listing = command(["requests", "list"], home)
    whole = command(["requests", "list", "--all"], home)
    from llm_unlearn.embedded import population

    ids = [str(row["id"]) for row in population.rows("forget")][:16]
    words = [sys.executable, "-m", "llm_unlearn", "requests", "add", "--ids"]
    began = time.perf_counter()
    for start in range(0, len(ids), PROCESSES):
        children = [
            subprocess.Popen([*words, one], cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
            for one in ids[start : start + PROCESSES]
        ]
        assert [child.wait() for child in children] == [0] * len(children)
    return {
        "list_seconds": listing["seconds"], "list_lines": len(listing["said"].splitlines()), "list_peak_mib": listing["peak_mib"],
        "list_all_seconds": whole["seconds"], "list_all_lines": len(whole["said"].splitlines()),
        "list_all_peak_mib": whole["peak_mib"],
        "added_by_command": len(ids), "by_command_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
