"""Words on their way out of this process: without secrets, and without what a terminal would obey.

Names, rows, what a model writes and what a library or a hub says pass through here before they are shown, whoever prints them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from llm_unlearn.streams import be_patient

HIDDEN = "…"
"""What stands in the place of a secret."""
SECRET_NAMES = re.compile(
    r"((TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|CREDENTIAL)S?|(^|_)(AUTH|CREDS|PAT|DSN)|_(PWD|PW|PASS))$", re.IGNORECASE
)
"""Names of environment variables whose values are secrets."""
SHORTEST = 8
"""What is shorter is a word that may stand anywhere."""
TELLING = re.compile(r"(?=.*[^A-Za-z])(?![\d.eE+\-]*$)")
"""And so is what has nothing but letters, or is a number: `postgres` as a password would be cut out of names of files."""
SHAPES = re.compile(
    r"(?P<before>\b[a-z][a-z0-9+.\-]+:/{1,2}|(?<![\w/])//)[^\s/@'\"<>]+(?P<after>@)"  # a login in an address, or a path made of one
    r"|(?P<key>[?&][\w.\-]*(?:token|key|password|passwd|pwd|secret|signature|credentials?|auth|sig)=)[^&\s'\"<>]+"
    r"|(?P<bearer>\bauthorization\W{1,5}(?:bearer|basic)\s+)[^\s'\"]+"
    r"|\b(?:hf_[a-z0-9]{20,}|gh[pousr]_[a-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w\-]{20,}|xox[abeoprs]-[\w\-]{10,}|npm_[a-z0-9]{36})"
    r"|\bsk-(?=[\w\-]*\d)[\w\-]{20,}|\b(?-i:(?:AKIA|ASIA)[A-Z0-9]{16})\b|\b(?-i:AIza[\w\-]{35}|eyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.IGNORECASE | re.DOTALL,
)
"""Secrets that one knows by their shape."""

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters but for the tabulator and the end of a line, letters that turn the direction of others around, halves of
characters."""
MOVES = re.compile(r"((?:\x1b\[[0-9;:?]*[A-Za-z]|\r)+)")
"""What draws in a terminal: colours, and the cursor on its way."""
BAR = re.compile(r"(?:\r|(?:\n|\x1b\[A)+\Z)?")
"""How a progress bar goes back to its line: at the beginning of what it writes, or as all of it."""

_known: set[str] = set()


def without_known(text: str) -> str:
    """Text without the secrets that this process was given."""
    for secret in sorted(_known, key=len, reverse=True):  # one may begin as another does
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(text: str) -> str:
    """Text without what was given as a secret, and without what looks like one."""
    return SHAPES.sub(
        lambda found: "".join(found[name] or "" for name in ("before", "key", "bearer")) + HIDDEN + (found["after"] or ""),
        without_known(text),
    )


def harmless(text: str) -> str:
    """Text that a terminal shows and does not obey: colours are left out, the rest is written out, as it is within JSON."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", COLOUR.sub("", text.replace("\r\n", "\n")))


class Guarded:
    """A stream in front of a terminal, a file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self.beneath = stream

    def write(self, text: str) -> int:
        """Write what is harmless of a text. A progress bar may go back to its line."""
        begin = BAR.match(text)
        moved = begin[0] if begin else ""
        said = harmless(without_secrets(text[len(moved) :]))
        encoding = getattr(self.beneath, "encoding", None) or "utf-8"  # what it cannot write is written out, too
        self.beneath.write(moved + said.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Each as `write` does it."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Whatever else one asks a stream for is the stream's."""
        return getattr(self.beneath, name)


class Drawn:
    """One of the two streams for who draws: moves of the cursor and colours pass, and the words between them as ever."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, text: str) -> int:
        """Write a text with what moves in it."""
        parts = MOVES.split(text)  # words and moves by turns
        own(self.name).write("".join(part if i % 2 else harmless(without_secrets(part)) for i, part in enumerate(parts)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Whatever else one asks a stream for is the stream's."""
        return getattr(own(self.name), name)


def canvas(name: str) -> TextIO:
    """`stdout` or `stderr`, whatever stands there when something is drawn."""
    return cast(TextIO, Drawn(name))


def own(name: str) -> Any:
    """A stream without what this room, or rich while it draws, has put before it."""
    stream: Any = getattr(sys, name)
    while True:
        if isinstance(stream, Guarded):
            stream = stream.beneath
        elif (proxied := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = proxied
        else:
            return stream


@contextlib.contextmanager
def guarded(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, all that is printed passes through here, and the secrets of this user are known."""
    be_patient()
    before, known = (sys.stdout, sys.stderr), set(_known)
    know(environment)
    sys.stdout, sys.stderr = (cast(TextIO, stream if isinstance(stream, Guarded) else Guarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _known.clear()
        _known.update(known)


def know(environment: Mapping[str, str]) -> None:
    """From now on the secrets of this user are left out of what is written, as for who calls from Python."""
    _known.update(secrets_of(environment))


def secrets_of(environment: Mapping[str, str]) -> set[str]:
    """Tokens, keys and passwords in the environment, and the tokens that `hf auth login` has kept."""
    named = [value.strip() for name, value in environment.items() if SECRET_NAMES.search(name)]
    found = {value for value in named if not is_place(value)}
    cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '')}/.cache"
    home = Path(environment.get("HF_HOME") or f"{cache}/huggingface")
    for path in (Path(environment.get("HF_TOKEN_PATH") or home / "token"), home / "stored_tokens"):
        with contextlib.suppress(OSError, ValueError):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("[")]
            found |= {line.rpartition("=")[2].strip() for line in lines}
    plain = {one for one in found if len(one) >= SHORTEST and (TELLING.match(one) or len(one) > 2 * SHORTEST)}
    return plain | {json.dumps(one)[1:-1] for one in plain}  # as it stands in JSON


def is_place(text: str) -> bool:
    """Whether a text is the path of a file or folder, as of a key that lies in one."""
    try:
        return os.path.lexists(text)
    except ValueError:
        return False
