"""The command `new`: a recipe to start from, for the embedded model or for a model and data of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_unlearn import folder
from llm_unlearn.places import check_place
from llm_unlearn.reply import Reply
from llm_unlearn.spec import Refused
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST, shipped

MAIN = "recipes/forget_lora.yaml"
"""The main job on the embedded default."""


def new(options: argparse.Namespace) -> Reply:
    """Write NAME.yaml; with --model and data, NAME_suite.yaml as well."""
    path = Path(options.name if options.name.endswith((".yaml", ".yml")) else f"{options.name}.yaml")
    suite = path.with_name(f"{path.stem}_suite{path.suffix}")
    parts = {f"--{key}": getattr(options, key) for key in ("model", "forget", "retain")}
    own = any(parts.values()) or options.holdout
    if missing_parts := [key for key, value in parts.items() if own and not value]:
        what = "a recipe for your model and data needs --model, --forget and --retain"
        raise Refused(f"{missing_parts[0]}: missing; {what}. Pass {' and '.join(missing_parts)}, or none of them.")
    for file in (path, suite) if own else (path,):
        if file.exists():
            raise Refused(f"{file}: exists already. Nothing was changed; choose another name.")
    check_place(path.parent, "NAME")
    if own:
        from llm_unlearn.starter.command import Request, write

        wanted = Request(path, suite, options.model, options.forget, options.retain, options.holdout, options.format)
        return Reply(facts=write(wanted, options.cache))
    pattern = (shipped() / MAIN).read_text(encoding="utf-8")
    body = pattern[pattern.index(LAUNCH_FIRST) :].replace("output: runs/forget_lora", f"output: runs/{path.stem}")
    assert body.rstrip().endswith(LAUNCH_LAST)
    head = (
        f"# What this makes a model forget, and how.\n#   accelerate launch {path} [key=value ...]\n"
        "# For a model and data of your own, with a suite that measures them:\n"
        "#   llm-unlearn new NAME --model BASE --forget DATA --retain DATA [--holdout DATA]\n"
    )
    folder.write(path, head + body)
    print(f"{path}\nnext: llm-unlearn plan {path}")
    return Reply(facts={"path": str(path)})
