"""The command line: words are parsed, one verb is carried out, and what it refuses becomes a message and an exit status."""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn.options import parser as parser_of_words
from llm_unlearn.streams import be_patient

if TYPE_CHECKING:
    from llm_unlearn.reply import Reply


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status of its reply (`reply.py`).
    """
    be_patient()
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
        reply = carry_out(options)
        if reply.status == INTERRUPTED and came and came[0] != signal.SIGINT:
            print(
                f"{signal.Signals(came[0]).name} asked for it, as when a node is preempted or a terminal closed.", file=sys.stderr
            )
            reply = replace(reply, status=TERMINATED)
    if options.json and not int(os.environ.get("RANK", "0")):
        print(json.dumps({"status": reply.status, **reply.facts}, indent=1, ensure_ascii=False, default=str))
    return reply.status


def carry_out(options: argparse.Namespace) -> Reply:
    """Carry out a verb; what it refuses, and what disk and memory refuse it, becomes words and a status."""
    from llm_unlearn.durable import advice
    from llm_unlearn.reply import INTERRUPTED, REFUSED, Reply
    from llm_unlearn.spec import Refused  # from here on something is done: settings may be read

    module, _, function = options.verb.partition(":")
    verb: Callable[[argparse.Namespace], Reply] = getattr(import_module(f"llm_unlearn.{module}"), function)
    again = f"the same command{' with --resume' * hasattr(options, 'resume')} goes on"
    try:
        return verb(options)
    except Refused as error:
        said = str(error).splitlines()
    except KeyboardInterrupt:
        print(f"interrupted; {again} from what is finished.", file=sys.stderr)
        return Reply(INTERRUPTED)
    except MemoryError as error:
        said = [f"out of memory{f' ({error})' if str(error) else ''}; what was finished is kept, and {again}"]
    except OSError as error:
        if not (words := advice(error, again)):
            raise
        said = [words]
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LOST):
            raise
        said = [f"another process of this run has ended ({str(error).splitlines()[0][:200]}); start all of them anew: {again}"]
    if int(os.environ.get("RANK", "0")):
        time.sleep(10)  # the first process says the same and ends all; who is still here then has a reason of its own
    print("\n".join(f"error: {line}" for line in said), file=sys.stderr)
    return Reply(REFUSED, {"errors": said})


LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting")
"""What the processes' network says where one of them is gone."""


@contextlib.contextmanager
def words_elsewhere(wanted: bool) -> Iterator[None]:
    """Inside, what is printed for people goes to standard error, so that standard output holds nothing but one JSON object."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def launch(file: str) -> None:
    """What the last line of a recipe calls when `accelerate launch` runs the recipe as a program."""
    if multiprocessing.parent_process() is None:  # a data worker that imports the main file again must not start a second run
        sys.exit(main(["run", file, *sys.argv[1:]]))


def settle() -> None:
    """What libraries are told before any is imported: how to wait, and not to warn of optional CPU kernels at every start."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    wait_briefly()


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
