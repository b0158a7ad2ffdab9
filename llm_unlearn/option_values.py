"""Values of the command line's options, parsed by argparse. Imports nothing of ours."""

from __future__ import annotations

import argparse
from datetime import date


def day(word: str) -> str:
    try:
        return date.fromisoformat(word).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {word!r}; expected a day such as 2026-12-01") from None


def pair(word: str) -> tuple[str, str]:
    column, sign, value = word.partition("=")
    if not column or not sign:
        raise argparse.ArgumentTypeError("expected column=value, such as person='Ada Lovelace'")  # the word may be a row's
    return column, value


def count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; expected a whole number from 1 on")
    return int(word)


def rows(word: str) -> int | str:
    if word != "all" and not word.isdigit():
        raise argparse.ArgumentTypeError(f"found {word!r}; expected a whole number from 0 on, or all")
    return word if word == "all" else int(word)
