"""The command line: words are parsed, one verb is carried out, and what it refuses, or fails at, becomes a message and an
exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn.options import parser as parser_of_words
from llm_unlearn.outward import guarded, know

if TYPE_CHECKING:
    from llm_unlearn.reply import Reply


@guarded(os.environ)
def main(words: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status of its reply (`reply.py`).
    """
    parser = parser_of_words()
    options, more = parser.parse_known_args(words)
    if more and (any(word.startswith("-") for word in more) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # settings may stand before and after options
        options.overrides = [*options.overrides, *more]
    settle()
    options.words = list(sys.argv[1:] if words is None else words)
    options.cache, options.config, options.environment = cache_folder(), config_folder(), os.environ
    from llm_unlearn.reply import INTERRUPTED, TERMINATED
    from llm_unlearn.training.signals import leaving

    with leaving() as came, words_elsewhere(options.json):
        reply = carried_out(options)
        if reply.status == INTERRUPTED and came and came[0] != signal.SIGINT:
            name = signal.Signals(came[0]).name
            print(f"{name} asked for it, as when a node is preempted or a terminal is closed.", file=sys.stderr)
            reply = replace(reply, status=TERMINATED)
    if options.json and not int(os.environ.get("RANK", "0")):
        print(json.dumps({"status": reply.status, **reply.facts}, indent=1, ensure_ascii=False, default=str))
    return reply.status


def carried_out(options: argparse.Namespace) -> Reply:
    """The answer of one verb; of one that ends in an error, after the words for it."""
    from llm_unlearn.reply import BUSY, INTERRUPTED, REFUSED, Reply
    from llm_unlearn.spec import Busy, Refused  # from here on something is done: settings may be read
    from llm_unlearn.troubles import reply_to

    again = f"the same command{' with --resume' * hasattr(options, 'resume')}"
    try:
        module, _, function = options.verb.partition(":")
        verb: Callable[[argparse.Namespace], Reply] = getattr(import_module(f"llm_unlearn.{module}"), function)
        return verb(options)
    except Refused as error:
        if int(os.environ.get("RANK", "0")):
            time.sleep(10)  # the first process says the same and ends all; who is still here then has a reason of its own
        if options.debug:
            traceback.print_exception(error)
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return Reply(REFUSED, {"errors": str(error).splitlines()})
    except Busy as error:
        print(f"error: {error}", file=sys.stderr)
        return Reply(BUSY, {"errors": [str(error)]})
    except KeyboardInterrupt:
        print(f"interrupted; {again} goes on from what is finished.", file=sys.stderr)
        return Reply(INTERRUPTED)
    except Exception as error:
        if options.debug:
            traceback.print_exception(error)
        words, reply = reply_to(error, again)
        print(words, file=sys.stderr)
        return reply


@contextlib.contextmanager
def words_elsewhere(wanted: bool) -> Iterator[None]:
    """Inside, what is printed for people goes to standard error, so that standard output holds nothing but one JSON object."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def launch(file: str) -> None:
    """What the last line of a recipe calls when `accelerate launch` runs the recipe as a program."""
    if multiprocessing.parent_process() is None:  # a data worker that imports the main file again must not start a second run
        sys.exit(main(["run", file, *sys.argv[1:]]))


def settle() -> MutableMapping[str, str]:
    """What libraries are told before any is imported: how to wait, and not to warn of optional CPU kernels at every start. And
    which words are secret.

    Returns:
        The environment of this process.
    """
    know(os.environ)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    wait_briefly()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # of 1,024, each batch of a new length adds some for its shapes
    return os.environ


def wait_briefly() -> None:
    """Threads of PyTorch on a CPU that wait for each other spin for milliseconds: beside any other load, a small model then runs
    many times slower. Where they sleep at once, waking them takes longer than the work of a small model. So they spin briefly."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def cache_folder() -> Path:
    """Where embedded models and tables are kept: $LLM_UNLEARN_CACHE, else llm_unlearn in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLM_UNLEARN_CACHE") or Path(home) / "llm_unlearn")


def config_folder() -> Path:
    """Where this user's signing key is kept: llm_unlearn in the user's configuration."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llm_unlearn"
