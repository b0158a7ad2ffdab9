"""What the command line asks of runs in pieces: the verb `forget`, and which engine carries out a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm_unlearn.data.words import asked_for
from llm_unlearn.folder import RESULTS
from llm_unlearn.methods.exact import Exact
from llm_unlearn.recipe import Recipe
from llm_unlearn.reply import INTERRUPTED, Reply

if TYPE_CHECKING:
    from llm_unlearn.training.guard import Outcome


def engine(wanted: Recipe) -> Callable[..., Outcome]:
    """What carries out a recipe: the run as such, or that of weights in pieces."""
    if isinstance(wanted.method, Exact):
        from llm_unlearn.exact.forgetting import run as in_pieces

        return in_pieces
    from llm_unlearn.run import run as straight

    return straight


def forget(options: argparse.Namespace) -> Reply:
    """Delete rows, measure again where the run was measured, and print what it cost."""
    from llm_unlearn.exact import manifest

    manifest.read(options.run)  # what is no store is said before anything heavy is read
    from llm_unlearn.exact import measuring
    from llm_unlearn.exact.foreseen import said
    from llm_unlearn.exact.forgetting import forget as delete

    run, where = options.run, asked_for(options.where)
    with manifest.alone(run, not int(options.environment.get("RANK", "0"))):
        measured = (run / RESULTS).is_file() and not options.no_evaluation
        if measured:
            facts, outcome = measuring.forget(run, options.ids, where, options.cache)
        else:
            facts, outcome = delete(run, options.ids, where=where, cache=options.cache)
        if outcome.status == "interrupted":
            print(f"interrupted; llm-unlearn forget {options.run} goes on from there.", file=sys.stderr)
            return Reply(INTERRUPTED)
        if facts:  # of a deletion that --no-evaluation brought to its end
            (run / measuring.PENDING).unlink(missing_ok=True)
    if facts:  # one process speaks
        print(said(facts))
        if facts["rows"] and (run / RESULTS).is_file():
            new = f"The numbers in {RESULTS} are of the adapter before and after this."
            old = f"The numbers in {RESULTS} are of the adapter before this; llm-unlearn evaluate makes new ones."
            print(new if measured else old)
    return Reply(facts={"deletion": facts})
