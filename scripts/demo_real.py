"""The main job on a real pretrained model: SmolLM2-135M-Instruct learns made-up people, forgets eight of them, and is measured and
attacked. Prints where the report is, and opens it where there is a display.

    python scripts/demo_real.py [--general QUESTIONS.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import webbrowser
from dataclasses import replace
from pathlib import Path

from llm_unlearn.cli import cache_folder, main, settle
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.utility import MultipleChoice
from llm_unlearn.recipe import load
from llm_unlearn.source import Source
from llm_unlearn.spec import plain, to_yaml
from llm_unlearn.tree import locate

RECIPE, QUESTIONS = "recipes/forget_smollm2.yaml", 40
COLD = "two models are trained first; each line says how long it still takes"
WARM = "both models are in the cache; each line says how long it still takes"


def with_questions(suite: suites.Suite, general: Path) -> suites.Suite:
    """Return the suite with a multiple choice from a file of questions: `query`, `choices` and `gold`, the right one's index."""
    asked = Source(source=str(general), prompt="query", answer="gold", choices="choices", limit=QUESTIONS)
    measures = (*suite.measures, MultipleChoice(set="questions"))
    return replace(suite, sets={**suite.sets, "questions": asked}, measures=measures)


def is_warm() -> bool:
    """Return whether the cache has both models that the recipe compares with."""
    from llm_unlearn.bases import home_of
    from llm_unlearn.folder import MODEL

    names = ("recipes/smollm2/learn.yaml", "recipes/smollm2/retrain.yaml")
    return all((home_of(load(locate(name)), cache_folder()) / MODEL).is_dir() for name in names)


def demo(general: Path) -> int:
    """Run the recipe and return its exit status."""
    settle()  # before `is_warm` imports torch, which reads the environment once
    wanted, began = load(locate(RECIPE)), time.monotonic()
    output = Path(wanted.output)
    words = ["run", RECIPE, "--overwrite"]
    if general.is_file():
        assert wanted.evaluation
        suite = with_questions(suites.load(locate(wanted.evaluation.suite)), general)
        place = output.with_name(f"{output.name}_suite.yaml")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(to_yaml(plain(suite)), encoding="utf-8")
        words.append(f"evaluation.suite={json.dumps(str(place))}")
    else:
        print(f"{general}: not there; general ability is measured on the project's own questions and text alone")
    print(WARM if is_warm() else COLD, flush=True)
    status = main(words)
    report = (output / "report.html").resolve()
    if status:
        return status
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; the report: {report}")
    if report.is_file() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open(report.as_uri())
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--general", type=Path, default=Path("../shared/data/general/arc_easy.jsonl"), help="questions of your own")
    sys.exit(demo(parser.parse_args().general))
