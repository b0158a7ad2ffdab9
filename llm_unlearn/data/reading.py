"""The streams of a recipe: read, compared and encoded, a block of rows at a time; many are kept as arrays in the cache.

Two sets of a million rows each need little memory: rows stay in the file that `datasets` maps, what makes two rows the same is a
hash, and token ids lie in a file. It is found again by the content of the data, the settings, the tokenizer and the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm_unlearn.bars import Bar
from llm_unlearn.data.alternates import answers_in, draw_alternates, read_alternates
from llm_unlearn.data.capacity import Capacity
from llm_unlearn.data.examples import Example, content_of, conversation, encode, encode_text, spelling, text_in
from llm_unlearn.data.files import Row
from llm_unlearn.data.sources import BLOCK, chosen, identity_of, read, row_at, rows
from llm_unlearn.data.tokens import Companions, Packer, Tokens, mapped
from llm_unlearn.durable import put
from llm_unlearn.folder import write
from llm_unlearn.objectives.views import Kind, beside
from llm_unlearn.sections import Data
from llm_unlearn.source import Alternate, Contrast, Source
from llm_unlearn.spec import Refused, fingerprint

LARGE = 50_000
"""From so many rows on, what was encoded is kept on disk."""
FORMAT, FACTS, COUNTS = "1", "examples.json", "counts.npy"


@dataclass(frozen=True)
class Examples:
    """All examples of a run, by stream, and what was left out on the way."""

    streams: Mapping[str, Sequence[Example]]
    companions: Mapping[str, Companions]  # `forget.alternate` -> for each example of `forget`, those that may stand beside it
    dropped: dict[str, int]  # stream -> rows whose answer did not fit into max_tokens
    overlap: int  # rows that also stood in the forget set and left one to be kept


def read_examples(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, cache: Path | None = None, quiet: bool = True,
    capacity: Capacity | None = None,
) -> Examples:  # fmt: skip
    """Read, compare and encode the streams of a recipe.

    Args:
        cache: where what takes long is kept; None keeps it in memory.
        quiet: show no progress.
        capacity: of the model that is to read them; rows are cut to its positions.

    Raises:
        Refused: a source cannot be read, a stream has no examples, rows stand in both sets and the recipe says that is an error, or
            the model cannot read a row.
    """
    if capacity is None:
        return _read(data, tokenizer, seed, cache, quiet)
    found = _read(capacity.fit_all(data), tokenizer, seed, cache, quiet)
    capacity.check({**found.streams, **{name: one.flat for name, one in found.companions.items()}}, tokenizer)
    return found


def _read(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, cache: Path | None, quiet: bool) -> Examples:
    """Read, compare and encode, or take what the cache has."""
    sources = {"forget": data.forget} | data.kept
    sources |= {"holdout": data.holdout} if data.holdout else {}
    found = {name: rows(source) for name, source in sources.items()}
    if cache is None or sum(map(len, found.values())) < LARGE:
        return _made(data, sources, found, tokenizer, seed, None, quiet)
    from filelock import FileLock

    place = cache / "examples" / _key(data, sources, found, tokenizer, seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # of several processes one encodes, and the others read what it wrote
        if not (place / FACTS).is_file():
            unfinished = place.with_name(f".{place.name}.{os.getpid()}")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                _keep(_made(data, sources, found, tokenizer, seed, unfinished, quiet), unfinished)
                put(unfinished, place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return _kept(place)


def _key(
    data: Data, sources: Mapping[str, Source], found: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> str:
    """Stands for all that decides what is encoded."""
    read_ = [identity_of(one.source, one.config, one.split, found[name]) for name, one in sources.items()]
    others = [one.alternate.source for one in sources.values() if one.alternate and one.alternate.source]
    drawn = [identity_of(name, None, None, read(name)) for name in others]
    return fingerprint(FORMAT, data, read_, drawn, spelling(tokenizer), seed if others else None)


def _keep(made: Examples, folder: Path) -> None:
    """Beside the arrays what is known of them; written last, so that it is there when all is."""
    for name, one in made.companions.items():
        np.save(folder / name / COUNTS, one.counts)
    facts = {"streams": list(made.streams), "companions": list(made.companions), "dropped": made.dropped, "overlap": made.overlap}
    write(folder / FACTS, json.dumps(facts))


def _kept(folder: Path) -> Examples:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    streams = {name: mapped(name, folder / name) for name in facts["streams"]}
    companions = {name: Companions(mapped(name, folder / name), np.load(folder / name / COUNTS)) for name in facts["companions"]}
    return Examples(streams, companions, facts["dropped"], facts["overlap"])


def _made(
    data: Data,
    sources: Mapping[str, Source],
    found: dict[str, Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    folder: Path | None,
    quiet: bool,
) -> Examples:
    overlap, forgotten = 0, _contents(found["forget"], data.forget)
    for name, source in data.kept.items():
        shared = np.isin(_contents(found[name], source), forgotten)
        overlap += int(shared.sum())
        if shared.any() and data.overlap == "error":
            first = row_at(int(np.flatnonzero(shared)[0]), source)
            raise Refused(
                f"data: {int(shared.sum())} of {len(found[name])} {name} rows also stand in the forget set (first: {first}). "
                "Take them out, or say data.overlap: drop."
            )
        found[name] = chosen(found[name], ~shared)

    streams: dict[str, Tokens] = {}
    companions: dict[str, Companions] = {}
    dropped: dict[str, int] = {}
    for name, source in sources.items():
        one = _Stream(name, source, tokenizer, seed, folder)
        with Bar(f"reading {name}", len(found[name]), "row", quiet=quiet or len(found[name]) <= BLOCK) as bar:
            for block in _blocks(found[name]):
                one.add(block)
                bar.update(len(block))
        streams[name], dropped[name] = one.own.done(), one.dropped
        for stream, packer in one.others.items():
            companions[stream] = Companions(packer.done(), np.array(one.counts[stream], np.int64))
    for name, examples in streams.items():
        if not len(examples):
            shared_too = overlap if name in data.kept else 0
            reasons = [f"{shared_too} rows also stand in the forget set. Name other rows"] if shared_too else []
            if dropped[name]:
                reasons += [f"{dropped[name]} rows have no answer within max_tokens = {sources[name].max_tokens}. Set a larger one"]
            raise Refused(f"data.{name}: no example is left; {'; '.join(reasons) or 'its rows are empty'}.")
    return Examples(streams, companions, dropped, overlap)


def _blocks(found: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (found[start : start + BLOCK] for start in range(0, len(found), BLOCK))


def _contents(found: Sequence[Row], source: Source) -> NDArray[np.bytes_]:
    """(n,) a hash of what makes each row the same as another, 128 bits."""
    hashes = (hashlib.blake2b(content_of(row, source).encode("utf-8", "surrogatepass"), digest_size=16).digest() for row in found)
    return np.fromiter(hashes, "S16", len(found))


@dataclass
class _Stream:
    """One stream and what stands beside it, encoded block after block."""

    name: str
    source: Source
    tokenizer: PreTrainedTokenizerBase
    seed: int
    folder: Path | None
    """Where the arrays are written; None keeps them in memory."""
    rows: int = 0
    examples: int = 0
    dropped: int = 0
    others: dict[str, Packer] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        alternate = self.source.alternate
        kinds: list[Kind] = [kind for kind, _ in _prefixes(self.source.contrast)]
        kinds = [*(["thought"] if self.source.targets == "separate" else []), *(["alternate"] if alternate else []), *kinds]  # type: ignore[list-item]
        for kind in kinds:
            stream = beside(self.name, kind)
            self.others[stream], self.counts[stream] = Packer(stream, self._place(stream)), []
        self.own = Packer(self.name, self._place(self.name))
        self.pool = read_alternates(alternate) if alternate and alternate.source else []

    def _place(self, stream: str) -> Path | None:
        return self.folder / stream if self.folder else None

    def add(self, block: Sequence[Row]) -> None:
        """Some more rows."""
        made = self._texts(block) if self.source.text else self._turns(block)
        self.own.add(made)
        self.rows, self.examples = self.rows + len(block), self.examples + len(made)

    def _beside(self, kind: Kind, found: Sequence[Sequence[Example]]) -> None:
        stream = beside(self.name, kind)
        self.others[stream].add([one for of_row in found for one in of_row])
        self.counts[stream] += map(len, found)

    def _texts(self, block: Sequence[Row]) -> list[Example]:
        source, column = self.source, str(self.source.text)
        texts = [text_in(row[column], self.rows + i, source, column) for i, row in enumerate(block)]
        made = encode_text(texts, self.tokenizer, self.name, source.max_tokens)
        made = [replace(one, id=one.id + self.examples) for one in made] if self.examples else made
        for kind, prefix in _prefixes(source.contrast):
            before = self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
            self._beside(kind, [[_after(before, one, beside(self.name, kind))] for one in made])
        return made

    def _turns(self, block: Sequence[Row]) -> list[Example]:
        source, first = self.source, self.rows
        turns = [conversation(row, first + i, source) for i, row in enumerate(block)]
        encoded = encode(turns, self.tokenizer, source.chat, self.name, source.max_tokens, first, source.targets)
        kept = [(row, example) for row, example in zip(block, encoded, strict=True) if example]
        if source.alternate:
            kept = self._alternates(kept, source.alternate)
        if source.targets == "separate":
            self._thoughts(kept)
        for kind, prefix in _prefixes(source.contrast):
            asked = _asked_otherwise(kept, source, prefix, self.tokenizer, beside(self.name, kind))
            self._beside(kind, [[one] for one in asked])
        self.dropped += len(block) - len(kept)
        return [example for _, example in kept]

    def _thoughts(self, kept: Sequence[tuple[Row, Example]]) -> None:
        """Add the thought of each row, as an example that ends where it ends: it fits, as an answer behind it does."""
        source, stream = self.source, beside(self.name, "thought")
        turns = [conversation(row, example.id, source) for row, example in kept]
        encoded = encode(turns, self.tokenizer, source.chat, stream, source.max_tokens, targets="thought")
        self._beside("thought", [[replace(one, id=own.id)] for one, (_, own) in zip(encoded, kept, strict=True) if one])

    def _alternates(self, kept: list[tuple[Row, Example]], alternate: Alternate) -> list[tuple[Row, Example]]:
        """The alternate answers of each row, as examples; a row loses its place when none of its alternates fits."""
        source, stream = self.source, beside(self.name, "alternate")
        result: list[tuple[Row, Example]] = []
        alternates: list[list[Example]] = []
        for row, example in kept:
            pairs = draw_alternates(self.pool, row, source, alternate, self.seed) if self.pool else answers_in(row, alternate)
            turns = [conversation(row, example.id, source, answer, alternate.answer, thought) for answer, thought in pairs]
            made = encode(turns, self.tokenizer, source.chat, stream, source.max_tokens, targets=source.targets)
            encoded = [other for other in made if other]
            if encoded:
                result.append((row, example))
                alternates.append(encoded)
        self._beside("alternate", alternates)
        return result


def _prefixes(contrast: Contrast | None) -> tuple[tuple[Kind, str], ...]:
    return (("expert", contrast.expert), ("novice", contrast.novice)) if contrast else ()


def _after(before: list[int], example: Example, stream: str) -> Example:
    """A block of running text behind other text, which has no targets."""
    return Example((*before, *example.ids), example.answer + len(before), stream, example.id)


def _asked_otherwise(
    kept: list[tuple[Row, Example]], source: Source, prefix: str, tokenizer: PreTrainedTokenizerBase, stream: str
) -> list[Example]:
    """The same answers, token by token, to prompts that begin with `prefix`.

    Raises:
        Refused: the tokenizer makes other answer tokens of it.
    """
    turns = [conversation(row, example.id, source) for row, example in kept]
    if prefix:
        turns = [[*one[:-2], {**one[-2], "content": f"{prefix} {one[-2]['content']}"}, one[-1]] for one in turns]
    encoded = encode(turns, tokenizer, source.chat, stream, source.max_tokens + len(tokenizer(prefix)["input_ids"]) + 8)
    result: list[Example] = []
    for (_, example), other in zip(kept, encoded, strict=True):
        answer = example.ids[example.answer :]
        if other is None or other.ids[other.answer :][: len(answer)] != answer:
            said = "its answer has other tokens behind the prefix of data.….contrast"
            raise Refused(f"{row_at(example.id, source)}: {said}; change that.")
        result.append(Example(other.ids[: other.answer + len(answer)], other.answer, stream, example.id))
    return result


def summary(examples: Examples, capacity: Capacity) -> list[str]:
    """Return the lines that say what was read: examples of each stream, rows left out, and what the model cannot read well."""
    lines = []
    for name, found in examples.streams.items():
        left_out = f", {examples.dropped[name]} dropped (no answer within max_tokens)" if examples.dropped[name] else ""
        lines.append(f"{name}: {len(found)} examples{left_out}")
    if examples.overlap:
        lines.append(f"retain: {examples.overlap} rows also stood in the forget set and were left out")
    return lines + [f"warning: {text}" for text in capacity.warnings(examples.streams)]
