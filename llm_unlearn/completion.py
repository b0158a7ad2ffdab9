"""Scripts that let a shell complete verbs, options, files and the keys of recipes: `llm-unlearn completion bash`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_unlearn.options import parser as parser_of_words
from llm_unlearn.reply import Reply

FILES = ("suite", "runs", "folder", "adapter")
"""Options and arguments that may be paths, besides those that can be nothing else."""

PREAMBLE = {
    "bash": """
_llm_unlearn_keys() {{ compopt -o nospace 2>/dev/null; compgen -W "{keys}" -- "$1"; }}
_llm_unlearn_suite_keys() {{ compopt -o nospace 2>/dev/null; compgen -W "{suite_keys}" -- "$1"; }}
""",
    "zsh": """
_llm_unlearn_keys() {{ compadd -S '' -- {keys}; }}
_llm_unlearn_suite_keys() {{ compadd -S '' -- {suite_keys}; }}
""",
}
"""What completes `train.lr=…`: the keys are known, the value is not, so no space follows."""

HOW = {
    "bash": 'eval "$(llm-unlearn completion bash)"   # in ~/.bashrc',
    "zsh": 'llm-unlearn completion zsh > "${fpath[1]}/_llm-unlearn"',
    "tcsh": "llm-unlearn completion tcsh > ~/.llm-unlearn.csh; source it in ~/.tcshrc",
}


def completion(options: argparse.Namespace) -> Reply:
    """Print the script for one shell."""
    import shtab

    parser = parser_of_words()
    for verb, action in _actions(parser):
        if action.dest == "overrides":
            function = "_llm_unlearn_suite_keys" if verb == "evaluate" else "_llm_unlearn_keys"
            action.complete = {shell: function for shell in PREAMBLE}  # type: ignore[attr-defined]
        elif (action.type is Path or action.dest in FILES) and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    keys, suite_keys = (" ".join(f"{key}=" for key in found) for found in (keys_of_recipes(), keys_of_suites()))
    script = shtab.complete(
        parser, options.shell, preamble=PREAMBLE.get(options.shell, "").format(keys=keys, suite_keys=suite_keys)
    )
    print(f"# {HOW[options.shell]}\n{script}")
    return Reply(facts={"shell": options.shell, "script": script})


def _actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Each with the verb that takes it."""
    for action in parser._actions:
        yield parser.prog.split()[-1], action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)


def keys_of_recipes() -> list[str]:
    """Every key of a recipe that has one value, as a command line names it: `train.lr`, `model.adapter.rank`."""
    from llm_unlearn.recipe import Recipe

    return _keys_of(Recipe)


def keys_of_suites() -> list[str]:
    """The same of a suite: `max_new_tokens`."""
    from llm_unlearn.evaluation.suite import Suite

    return _keys_of(Suite)


def _keys_of(kind: type[object]) -> list[str]:
    from llm_unlearn.spec import schema

    whole = schema(kind)

    def walk(here: dict[str, Any], path: str, above: tuple[str, ...]) -> Iterator[str]:
        options = [here, *here.get("anyOf", ())]
        for one in options:
            name = str(one.get("$ref", "")).rpartition("/")[2]
            if name and name not in above:
                yield from walk(whole["$defs"][name], path, (*above, name))
        found = [(key, inner) for one in options for key, inner in one.get("properties", {}).items()]
        for key, inner in found:
            below = list(walk(inner, f"{path}{key}.", above))
            yield from below or [f"{path}{key}"]

    return list(dict.fromkeys(walk(whole, "", ())))
