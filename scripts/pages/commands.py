"""The reference of the command line: every verb with its words, read off the parser that reads them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from llm_unlearn.options import parser

TITLE = """# Command line

Read off the parser itself; `llm-unlearn VERB --help` says the same. Heavy libraries are imported only where a verb needs them,
so that help and refusals come at once.
"""

CODES = """## Exit status

| status | when |
|---|---|
| 0 | done, or ended by the recipe's own bound |
| 1 | done, and something in it does not hold: a loss that was not finite, a check that failed, a run of several that failed |
| 2 | refused: the reason stands on standard error, and nothing was changed |
| 3 | another process is at work there (`requests run`) |
| 130 | interrupted; the same command goes on (a run: with `--resume`) |

`accelerate launch RECIPE` ends with the same, or with Accelerate's own 1 where one of several processes failed.
"""


def page() -> str:
    """The page, in Markdown."""
    whole = parser()
    verbs = list(verbs_of(whole))
    lines = [
        TITLE,
        *(f"- [`{one.prog}`](#{one.prog.replace(' ', '-')}) {text}" for one, text, depth in verbs if depth == 1),
        "",
        CODES,
    ]
    for one, text, depth in verbs:
        lines += [f"{'#' * (depth + 1)} {one.prog}", "", sentence(text), "", "```", one.format_usage().strip(), "```", ""]
        lines += [*_table(one), ""]
        if one.epilog and depth == 1:
            lines += [one.epilog, ""]
    return "\n".join(lines)


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
