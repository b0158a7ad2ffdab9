"""What of a run folder may leave this machine: files of known kinds, and a last look at every byte of text among them."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from llm_unlearn import folder
from llm_unlearn.hub.fetching import ADAPTER_FILE, COMBINATION_FILE
from llm_unlearn.outward import without_secrets
from llm_unlearn.spec import Refused
from llm_unlearn.withheld import local_name
from llm_unlearn.written import object_in

OF_ADAPTERS = (ADAPTER_FILE, "adapter_model.safetensors", "adapter_model-*.safetensors", "adapter_model.safetensors.index.json")
OF_MODELS = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
CARD = "README.md"
BESIDE = (CARD, folder.RECIPE, folder.RESULTS, folder.REPORT)
"""What is made for the hub, never copied."""
DECIDING = (*OF_ADAPTERS, *OF_MODELS[:5], COMBINATION_FILE, "adapter_model.bin", "pytorch_model*.bin")
"""Files that decide which model a repository is: those of an earlier push that this one lacks are removed with it."""
TEXTS = (".json", ".yaml", ".md", ".html", ".jinja", ".txt", ".model")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
"""Lists of words and their pieces: one word that is also a row's answer was there before the run."""
SETTINGS = (ADAPTER_FILE, "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENS = re.compile(r"content|\w*tokens?|\w*tokens_decoder")
"""Keys of a tokenizer's settings under which texts stand that may look like a path, such as `/`."""
LEAST, BLOCK, QUOTE, LETTERS = 12, 20, 40, 4
"""A text is looked for whole from `LEAST` characters on; of a longer one, any part of `QUOTE` characters, if it has so many
different letters: a line of dashes is nobody's."""


@dataclass(frozen=True)
class Piece:
    """One file of what is published."""

    path: str
    """Its place in the repository."""
    content: bytes | Path

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def sha256(self) -> str:
        """Of the whole content."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        return folder.sha256(self.content)

    @property
    def is_weights(self) -> bool:
        return self.path.endswith(".safetensors")

    @property
    def text(self) -> str | None:
        """All that can be read of it as text; of weights, their header."""
        if self.is_weights and isinstance(self.content, Path):
            return header_of(self.content)
        if PurePath(self.path).suffix not in TEXTS:
            return None
        raw = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return raw.decode("utf-8", "replace")


def weights_of(run: Path) -> Path:
    """The folder of what a run made.

    Raises:
        Refused: it is no run folder, or the run is not finished.
    """
    if not (run / folder.RECIPE).is_file():
        raise Refused(f"{run}: not a run folder (it has no {folder.RECIPE}). Name a folder that `run` wrote.")
    for name in (folder.ADAPTER, folder.MODEL):
        if (run / name).is_dir():
            return run / name
    raise Refused(f"{run}: nothing to publish; the run is not finished. Run: llm-unlearn run {run / folder.RECIPE} --resume")


def commit_of(place: Path) -> str | None:
    """The commit of a base from the hub, of which the adapter that was trained on it remembers the folder."""
    for file in sorted(place.rglob(ADAPTER_FILE)):
        path = PurePath(str(object_in(file, "expected what peft writes").get("base_model_name_or_path")))
        if path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name):
            return path.name
    return None


def inside(path: Path, run: Path) -> Path:
    """A path that does not lead out of the run folder.

    Raises:
        Refused: it does.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise Refused(f"{path}: a link that leads out of {run}; only what lies in the run folder is published. Take it out.")
    return path


def pieces_of(place: Path, run: Path, base: str, revision: str | None) -> tuple[list[Piece], list[str]]:
    """The files of an adapter or model that may be published, and the names of those that stay here.

    Args:
        place: the folder of the weights, within `run`.
        base, revision: what an adapter names as its base instead of a folder of this machine.

    Raises:
        Refused: a link leads out of the run folder, weights are not in safetensors, or none are there.
    """
    found: list[Piece] = []
    left: list[str] = []
    for path in sorted(inside(place, run).rglob("*")):
        name = inside(path, run).relative_to(place).as_posix()
        if path.is_dir():
            continue
        if not _is_known(name):
            left.append(name)
        elif path.name in SETTINGS:
            found.append(Piece(name, _settings(path, base, revision)))
        else:
            found.append(Piece(name, path))
    if not any(one.is_weights for one in found):
        raise Refused(f"{place}: no weights in safetensors, and no other kind is published; found {', '.join(left) or 'nothing'}.")
    for one in found:
        if one.is_weights:
            assert one.text is not None  # a header that can be read
    return found, left


def _is_known(name: str) -> bool:
    member, _, file = name.rpartition("/")
    if member:  # of several adapters that are combined
        return "/" not in member and any(fnmatchcase(file, kind) for kind in OF_ADAPTERS)
    return any(fnmatchcase(file, kind) for kind in (*OF_ADAPTERS, *OF_MODELS, COMBINATION_FILE))


def _settings(path: Path, base: str, revision: str | None) -> bytes:
    """A file of settings in which no path of this machine stands."""
    held = object_in(path, "expected settings as transformers and peft write them")
    if path.name == ADAPTER_FILE:
        held |= {"base_model_name_or_path": base, "revision": revision}
    return (json.dumps(_pathless(held), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _pathless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: one if TOKENS.fullmatch(name) else _pathless(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_pathless(one) for one in value]
    return local_name(value) if isinstance(value, str) and PurePath(value).is_absolute() else value


def header_of(path: Path) -> str:
    """The header of a safetensors file.

    Raises:
        Refused: it is no such file; what else may be in it is not published.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size) if size < 100_000_000 else b""
    try:
        json.loads(raw)
        return raw.decode()
    except (ValueError, RecursionError):
        raise Refused(f"{path}: not a safetensors file; only such weights are published.") from None


def stale(there: Iterable[str], pieces: Sequence[Piece], members: Collection[str] = ()) -> list[str]:
    """Files of a repository that would make it another model than the one that is pushed. What lies in folders is another model of
    its own, and stays.

    Args:
        members: folders of adapters that the repository's `combination.json` names.
    """
    ours, members = {one.path for one in pieces}, set(members)

    def decides(name: str) -> bool:
        place, _, file = name.rpartition("/")
        kinds = () if place and place not in members else (*OF_ADAPTERS, "adapter_model.bin") if place else DECIDING
        return any(fnmatchcase(file, kind) for kind in kinds)

    return sorted(name for name in there if name not in ours and decides(name))


# ------------------------------------------------------------------------------------------------------- the last look


def check(pieces: Sequence[Piece], texts: Mapping[str, Sequence[str]], places: Iterable[Path]) -> None:
    """See that no text that is published repeats a row, names a folder of this machine, or holds a secret.

    Args:
        texts: set -> prompts and answers.
        places: the user's home, the folder of work, and the like.

    Raises:
        Refused: it does; the error says where, and quotes nothing.
    """
    rows = Rows(texts)
    private = sorted({str(place) for place in places if len(place.parts) > 1})
    for one in pieces:
        said = one.text
        if said is None:
            continue
        if without_secrets(said) != said:
            raise Refused(
                f"{one.path}: holds a token, key or login. Nothing was pushed; take it out, and have it replaced where it counts."
            )
        vocabulary = one.path in VOCABULARIES
        if found := rows.quoted(said, vocabulary):
            raise Refused(
                f"{one.path}: repeats words of {found}, which the run was to keep to itself. Nothing was pushed; "
                "take the words out of the names and settings of the recipe or suite."
            )
        if at := next((place for place in private if _names(said, place, vocabulary)), None):
            raise Refused(
                f"{one.path}: names a folder of this machine ({at}). Nothing was pushed; write it in the recipe by another name."
            )


def _names(said: str, place: str, vocabulary: bool) -> bool:
    """Whether a folder is named: with what lies in it, or by itself, where it is no tag, word or token."""
    alone = rf"(?<![\w.\-<]){re.escape(place)}(?![\w\-]|\.\w)"
    return f"{place}/" in said or (not vocabulary and bool(re.search(alone, re.sub(r"\\[nrt]", " ", said))))


class Rows:
    """Texts that must not be repeated, whole or in large part."""

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.whole: dict[str, list[tuple[str, str]]] = {}
        self.parts: dict[str, list[tuple[str, str, int]]] = {}
        for name, found in texts.items():
            for number, raw in enumerate(found):
                text, where = flat(raw), f"text {number + 1} of {name!r}"
                if len(text) >= LEAST:
                    self.whole.setdefault(text[:LEAST], []).append((text, where))
                for start in range(0, len(text) - BLOCK + 1, BLOCK):  # any quote of so many characters holds one block whole
                    if len(set(text[start : start + BLOCK])) >= LETTERS:
                        self.parts.setdefault(text[start : start + BLOCK], []).append((text, where, start))

    def quoted(self, raw: str, vocabulary: bool = False) -> str:
        """Which text is repeated; "" where none is.

        Args:
            vocabulary: a list of words and pieces of words, in which one word is no quote.
        """
        said = flat(raw)
        if vocabulary:  # in which a space is written so
            said = " ".join(re.sub("[▁ġ]", " ", said).split())
        for at in range(len(said) - LEAST + 1):
            for text, where in self.whole.get(said[at : at + LEAST], ()):
                if said.startswith(text, at) and not (vocabulary and _is_a_word(text)):
                    return where
            for text, where, start in self.parts.get(said[at : at + BLOCK], ()):
                if _run(said, at, text, start) >= QUOTE:
                    return where
        return ""


def _is_a_word(text: str) -> bool:
    """Whether one entry of a vocabulary can be all of a text."""
    return " " not in text and (len(text) < QUOTE or len(set(text)) < LETTERS)


def _run(said: str, at: int, text: str, start: int) -> int:
    """How many characters agree around one place in both."""
    before = after = 0
    while before < min(at, start) and said[at - before - 1] == text[start - before - 1]:
        before += 1
    while at + after < len(said) and start + after < len(text) and said[at + after] == text[start + after]:
        after += 1
    return before + after


def flat(text: str) -> str:
    """Text as it is compared: without case, markup's and JSON's escapes, and the kind of its spaces."""
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), html.unescape(text))
    return " ".join(re.sub(r"\\[nrt]", " ", plain).replace("\\", "").split()).casefold()
