"""Scripts that let a shell complete verbs, options, files and the keys of recipes: `llm-unlearn completion bash`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from llm_unlearn.options import parser as parser_of_words
from llm_unlearn.reply import Reply

FILES = ("recipe", "suite", "run", "runs", "folder", "output", "adapter", "service", "certificates", "key")
"""Options and arguments that are paths."""

PREAMBLE = {
    "bash": """
_llm_unlearn_keys() {{ compopt -o nospace 2>/dev/null; compgen -W "{keys}" -- "$1"; }}
""",
    "zsh": """
_llm_unlearn_keys() {{ compadd -S '' -- {keys}; }}
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
    for action in _actions(parser):
        if action.dest == "overrides":
            action.complete = {shell: "_llm_unlearn_keys" for shell in PREAMBLE}  # type: ignore[attr-defined]
        elif action.dest in FILES and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    keys = " ".join(f"{key}=" for key in keys_of_recipes())
    script = shtab.complete(parser, options.shell, preamble=PREAMBLE.get(options.shell, "").format(keys=keys))
    print(f"# {HOW[options.shell]}\n{script}")
    return Reply(facts={"shell": options.shell, "script": script})


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)


def keys_of_recipes() -> list[str]:
    """Every key of a recipe that has one value, as a command line names it: `train.lr`, `model.adapter.rank`."""
    from llm_unlearn.recipe import Recipe
    from llm_unlearn.spec import schema

    whole = schema(Recipe)

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
