"""Pages to look at: of real runs, and of the same with everything in them that a run seldom has.

    python tests/sample_pages.py FOLDER                              # writes them there
    python tests/sample_pages.py --keep RUN AUDIT OTHER OTHER …      # makes real_runs.json anew, of run folders

`real_runs.json` has the main run (recipes/forget_lora.yaml) with its log, the attacks of eval/audit.yaml on its adapter, and other
runs: simnpo, relabel, and graddiff at a rate that is too high. Of their answers the first of each set are kept.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn.report.comparison import comparison_of
from llm_unlearn.report.comparison_page import write_comparison
from llm_unlearn.report.frontier import frontier_svg
from llm_unlearn.report.likeness import Run
from llm_unlearn.report.page import write_page
from llm_unlearn.sections import Threshold
from llm_unlearn.thresholds import findings

FILE = Path(__file__).with_name("real_runs.json")
KEPT = 10
"""Answers of each set in the file."""

RUNNING = "window.hacked = 1"
HOSTILE = (
    f"<script>{RUNNING}</script>",
    f'<img src=x onerror="{RUNNING}">',
    f'</style></title></textarea></script></noscript><svg onload="{RUNNING}"><style>body {{ display: none }}</style>',
    f'<a href="javascript:{RUNNING}">click</a> <iframe srcdoc="<script>parent.{RUNNING}</script>"></iframe>',
    f"\" onmouseover=\"{RUNNING}\" x=' onfocus='{RUNNING}' autofocus tabindex=1 `{RUNNING}`",
    "controls \x00 \x07 \x1b[31m \x7f \x85 \u2028 \u2029 \ufeff \ud800 end",
    "\u202eelif.exe \u2067 turned round \u2066\u202d and never turned back",
    '=HYPERLINK("http://evil.example/", "x")  +1+1  @SUM(A1)  -2  {{ 7 * 191 }} {% raw %} ${7 * 191} $x^2$ ]]> <!-- -->',
    "שלום עולם, האם אתה זוכר? مرحبا بالعالم 123 (abc) — mixed",
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈🇪🇺 e\u0301\u0302\u0303\u0304" + "\u0335" * 40 + " 漢字仮名交じり文 ไทย हिन्दी",
    "word" * 60,
    "a line\n\n\n    another\ttabbed\n" * 3,
    "long " * 2_000_000,
)
"""What data and models may say: to be shown, never obeyed, and not to break the page."""


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def more_rows(results: dict[str, Any], count: int) -> None:
    """Every set has so many rows, the real ones again and again."""
    for name, rows in results["answers"].items():
        results["answers"][name] = [rows[i % len(rows)] | {"id": f"{rows[i % len(rows)]['id']}-{i}"} for i in range(count)]


def with_everything(results: dict[str, Any], attacks: list[Any], robustness: Mapping[str, Any]) -> dict[str, Any]:
    """The main run with attacks, tasks, an aggregate, missing values, thresholds, a fourth model and hostile texts."""
    made = copy.deepcopy(results) | {"attacks": copy.deepcopy(attacks), "robustness": robustness}
    first = made["numbers"][1]
    task = first | {"measure": "task", "title": "acc", "set": "mmlu_high_school_geography", "goal": "as before"}
    mean = first | {
        "measure": "aggregate",
        "title": "kept and forgotten",
        "set": "all",
        "goal": "",
        "settings": {"mean": "harmonic"},
    }
    lost = copy.deepcopy(first) | {"title": "a measure of which the title is longer than any column is wide"}
    lost["values"]["after"] = {"missing": "needs a column that is not there, and says at some length how to name it"}
    made["numbers"] += [task, mean, lost]
    for i, text in enumerate(HOSTILE[:-1]):
        of = text if i in (1, 6) else "forget"
        made["numbers"].append(first | {"title": f"{text} {i}", "definition": text, "set": of, "settings": {text: text}})
    made["models"]["other"] = {"name": HOSTILE[0], "identity": HOSTILE[1]}
    made["numbers"][0]["values"]["other"] = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 3}
    made["attacks"][0]["finding"] += HOSTILE[2]
    made["attacks"][1]["curves"]["after"] = {"missing": HOSTILE[1]}
    made["attacks"][1]["gap"] |= {"gap": None, "came_back": None, "leaks": False}
    made["attacks"][1]["gap"]["best"].pop("after")
    asked = [
        Threshold(measure="extraction strength", set="forget", at_most=0.3),
        Threshold(measure="exact memorization", set="forget", at_most=1.0, of="retrained"),
        Threshold(measure="probability", set="forget", judged="as retrained"),
        Threshold(measure=HOSTILE[0], set=HOSTILE[1], at_least=0.5),
    ]
    made["thresholds"] = findings(asked, made["numbers"])
    answers = made["answers"]["forget"]
    for i, text in enumerate(HOSTILE):
        said = dict.fromkeys(made["models"], text)
        answers.append(copy.deepcopy(answers[0]) | {"id": f"hostile/{i} {text[:40]}", "prompt": text, "truth": text} | said)
    made["answers"]["retain"][0] |= {"after": "", "truth": ""}
    return made


def collapsed(results: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(results)
    for one in made["numbers"]:
        if one["goal"] == "as before" and one["knowing"] == "raises":
            one["values"]["after"] |= {"value": 0.01, "low": 0.0, "high": 0.02}
    return made | {"run": made["run"] | {"status": "stopped", "reason": "retain accuracy 0.01 is below 0.5", "kept_step": 12}}


def alone(results: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation of one model by itself has."""
    made = copy.deepcopy(results) | {"run": None, "models": {"model": results["models"]["before"]}}
    for one in made["numbers"]:
        one["values"] = {"model": one["values"]["before"]}
        if one["measure"] == "forget_quality":
            one["values"]["model"] = {"missing": "needs a retrained model: --retrained PATH"}
    made["curves"] = {
        name: {"set": curve["set"], "n": curve["n"], "model": curve["before"]} for name, curve in made["curves"].items()
    }
    for rows in made["answers"].values():
        for row in rows:
            said = [row.pop(column, None) for column in ("before", "after", "retrained")]
            row["probability"] = {"model": row["probability"]["before"]}
            row |= {} if said[0] is None else {"model": said[0]}
    return made


def runs_of(real: Mapping[str, Any], count: int) -> list[Run]:
    """Runs to compare: the real ones, one that collapsed, hostile ones, and variations up to `count`."""
    found = [Run("forget_lora", "runs/forget_lora", real["run"], real["log"])]
    found += [
        Run(name, f"runs/{name}", results, real["log"][: 20 + 5 * i]) for i, (name, results) in enumerate(real["others"].items())
    ]
    found.append(Run("collapsed", "runs/collapsed", collapsed(real["run"]), real["log"][:12]))
    said = copy.deepcopy(real["run"])
    for row, text in zip(said["answers"]["forget"], HOSTILE, strict=False):
        row["after"] = text
    said["answers"]["forget"][-1]["after"] = HOSTILE[-1]
    found.append(Run(HOSTILE[0] + HOSTILE[2], f"runs/{HOSTILE[1]}", said, []))
    for i in range(len(found), count):
        made = copy.deepcopy(real["run"])
        for one in made["numbers"]:
            one["values"]["after"]["value"] *= 1 - 0.01 * (i + 1)
        found.append(Run(f"bench/method_{i:02d}/seed-0", f"runs/bench/method_{i:02d}/seed-0", made, []))
    return found[:count]


def write_all(folder: Path) -> None:
    """Every page by its name; `frontier.svg` beside them."""
    real = read()
    run, log = real["run"], real["log"]
    write_page(run, log, folder / "run.html")
    write_page(with_everything(run, real["attacks"], real["robustness"]), [], folder / "everything.html")
    write_page(collapsed(run) | {"curves": {}}, [], folder / "collapsed.html")
    write_page(alone(run), [], folder / "alone.html")
    write_page(run | {"numbers": [], "answers": {}, "curves": {}, "models": {}, "run": None}, [], folder / "nothing.html")
    long = copy.deepcopy(run)
    more_rows(long, 125)  # of four sets
    write_page(long, [], folder / "rows.html")
    runs = runs_of(real, 8)
    made = comparison_of(runs) | {"notes": [f"A note {HOSTILE[1]}"], "left_out": ["runs/x: no evaluation.json there"]}
    write_comparison(made, runs, folder / "comparison.html")
    many = [replace(one, log=[]) for one in runs_of(real, 14)]
    write_comparison(comparison_of(many) | {"curves": {}}, many, folder / "many.html")
    methods = [
        one | {key: {"mean": one[key], "half": 0.02} for key in ("forgotten", "kept", "score")} for one in made["runs"]
    ]  # fmt: skip
    (folder / "frontier.svg").write_text(frontier_svg({"methods": methods}).encode("utf-8", "replace").decode(), encoding="utf-8")


def keep(run: Path, audit: Path, *others: Path) -> None:
    """Make `real_runs.json` of run folders and an evaluation with attacks."""

    def cut(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        name = f"runs/{folder.name.removeprefix('pages_')}"
        text = json.dumps(found | {"answers": {of: rows[:KEPT] for of, rows in found["answers"].items()}}, ensure_ascii=False)
        made: dict[str, Any] = json.loads(text.replace(str(folder), name))
        return made

    whole = cut(audit)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = {"run": cut(run), "log": log, "attacks": whole["attacks"], "robustness": whole["robustness"]}
    made = kept | {"others": {folder.name.removeprefix("pages_"): cut(folder) for folder in others}}
    FILE.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--keep":
        keep(*(Path(word) for word in sys.argv[2:]))
    else:
        write_all(Path(sys.argv[1]))
