"""The reference of the command line: every verb with its words, read off the parser that reads them."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterable, Iterator

from llm_unlearn import reply
from llm_unlearn.options import parser

TITLE = """# Command line

Read off the parser itself; `llm-unlearn VERB --help` says the same. Heavy libraries are imported only where a verb needs them,
so that help and refusals come at once.
"""

STATUS = "The same with `accelerate launch RECIPE`; of several processes, Accelerate says 1 for whatever any of them ended with."


def page() -> str:
    """The page, in Markdown."""
    whole = parser()
    verbs = list(verbs_of(whole))
    lines = [
        TITLE,
        *(f"- [`{one.prog}`](#{one.prog.replace(' ', '-')}) {text}" for one, text, depth in verbs if depth == 1),
        "",
        *_statuses(),
    ]
    for one, text, depth in verbs:
        lines += [f"{'#' * (depth + 1)} {one.prog}", "", sentence(text), "", "```", one.format_usage().strip(), "```", ""]
        lines += [*_table(one), ""]
        if one.epilog and depth == 1:
            lines += [one.epilog, ""]
    return "\n".join(lines)


def _statuses() -> Iterable[str]:
    """The exit statuses, as `reply.py` names and explains them."""
    names, said = ast.parse(inspect.getsource(reply)).body[-3:-1]
    assert isinstance(names, ast.Assign) and isinstance(names.targets[0], ast.Tuple) and isinstance(said, ast.Expr)
    words = ast.literal_eval(said.value).replace("\n", " ").rstrip(".").split(" · ")
    yield from ("## Exit status", "", "| status | |", "|---|---|")
    for name, word in zip(names.targets[0].elts, words, strict=True):
        yield f"| {getattr(reply, ast.unparse(name))} | {cell(word[:1].lower() + word[1:])} |"
    yield from (
        "",
        STATUS,
        "",
        "With `--json`, a verb prints one JSON object to standard output, `status` in it, and its words to standard error.",
        "",
    )


def verbs_of(whole: argparse.ArgumentParser, depth: int = 1) -> Iterator[tuple[argparse.ArgumentParser, str, int]]:
    """Every verb and sub-verb: (its parser, what it does, 1 for a verb and 2 for one below a verb)."""
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, one in action.choices.items():
                yield one, said.get(name, ""), depth
                yield from verbs_of(one, depth + 1)


def words_of(verb: argparse.ArgumentParser) -> list[argparse.Action]:
    """What a verb takes, without help and sub-verbs."""
    return [one for one in verb._actions if not isinstance(one, (argparse._HelpAction, argparse._SubParsersAction))]


def _table(verb: argparse.ArgumentParser) -> Iterable[str]:
    if not (words := words_of(verb)):
        return
    yield "| word | meaning |"
    yield "|---|---|"
    for one in words:
        yield f"| {_word(one)} | {cell(_meaning(one))} |"


def _word(one: argparse.Action) -> str:
    value = one.metavar or (f"{{{','.join(map(str, one.choices))}}}" if one.choices else one.dest.upper())
    value = value if isinstance(value, str) else " ".join(value)
    takes = "" if one.nargs == 0 else f" {value}" if one.option_strings else value
    return ", ".join(f"`{cell(name + takes)}`" for name in one.option_strings or [""])


def _meaning(one: argparse.Action) -> str:
    notes = [(one.help or "").replace("%%", "%")]
    if one.choices and one.metavar:
        notes.append("one of " + ", ".join(map(str, one.choices)))
    if one.required and one.option_strings:
        notes.append("required")
    return "; ".join(filter(None, notes))


def sentence(text: str) -> str:
    """Help text as a sentence."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("*", "\\*")
