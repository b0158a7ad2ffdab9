"""Examples of a stream as arrays: a million of them take no more memory than their tokens, or none where a file holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.examples import Example

FLAT, PARTS = "tokens.bin", ("starts", "answers", "rows")


class Tokens(Sequence[Example]):
    """Examples that are made when they are asked for."""

    def __init__(self, stream: str, flat: NDArray[np.int32], starts: NDArray[np.int64], answers: Any, rows: Any) -> None:
        """
        Args:
            flat: the ids of all examples, one after the other.
            starts: (n + 1,) where each begins.
            answers, rows: (n,) `Example.answer` and `Example.id`.
        """
        self.stream, self.flat, self.starts, self.answers, self.rows = stream, flat, starts, answers, rows

    def __len__(self) -> int:
        return len(self.answers)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = _counted(place, len(self))
        ids = self.flat[self.starts[place] : self.starts[place + 1]]
        return Example(tuple(ids.tolist()), int(self.answers[place]), self.stream, int(self.rows[place]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each."""
        found: NDArray[np.int64] = np.diff(self.starts)
        return found


class Packer:
    """Examples of one stream on their way into arrays."""

    def __init__(self, stream: str, folder: Path | None) -> None:
        """
        Args:
            folder: where they are written; None keeps them in memory.
        """
        self.stream, self.folder = stream, folder
        self._flat: list[NDArray[np.int32]] = []
        self._parts: list[tuple[NDArray[np.int64], ...]] = []
        if folder:
            folder.mkdir(parents=True)

    def add(self, examples: Sequence[Example]) -> None:
        """Some more, in their order."""
        flat = np.array([token for one in examples for token in one.ids], np.int32)
        parts = zip(*((len(one.ids), one.answer, one.id) for one in examples), strict=True)
        self._parts.append(tuple(np.array(part, np.int64) for part in parts) if examples else (np.zeros(0, np.int64),) * 3)
        if self.folder:
            with (self.folder / FLAT).open("ab") as file:
                file.write(flat.tobytes())
        else:
            self._flat.append(flat)

    def done(self) -> Tokens:
        """All of them; those that were written, mapped from their file."""
        lengths, answers, rows = (np.concatenate(part) if part else np.zeros(0, np.int64) for part in _turned(self._parts))
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if self.folder:
            (self.folder / FLAT).touch()
            parts: tuple[Any, ...] = (starts, answers.astype(np.int32), rows)
            for name, part in zip(PARTS, parts, strict=True):
                np.save(self.folder / f"{name}.npy", part)
            return mapped(self.stream, self.folder)
        return Tokens(self.stream, np.concatenate([np.zeros(0, np.int32), *self._flat]), starts, answers.astype(np.int32), rows)


def _turned(parts: list[tuple[NDArray[np.int64], ...]]) -> Iterable[Sequence[NDArray[np.int64]]]:
    return zip(*parts, strict=True) if parts else ((), (), ())


def mapped(stream: str, folder: Path) -> Tokens:
    """What a `Packer` wrote, read from its files as it is asked for."""
    starts, answers, rows = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in PARTS)
    path = folder / FLAT
    flat = np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)
    return Tokens(stream, flat, starts, answers, rows)


class Companions(Sequence[list[Example]]):
    """For each example of a stream those that may stand beside it."""

    def __init__(self, flat: Tokens, counts: NDArray[np.int64]) -> None:
        """
        Args:
            flat: all of them, those of an example together.
            counts: (n,) how many each example has.
        """
        self.flat, self.counts = flat, counts
        self._ends = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, place: int) -> list[Example]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[Example]]: ...
    def __getitem__(self, place: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = _counted(place, len(self))
        return self.flat[self._ends[place] : self._ends[place + 1]]


def _counted(place: int, count: int) -> int:
    """A place from the begin, of one that may be counted from the end."""
    if not -count <= place < count:
        raise IndexError(place)
    return place % count


class Some(Sequence[Example]):
    """Some of a stream's examples, by their places; none of them is made before it is asked for."""

    def __init__(self, examples: Sequence[Example], places: NDArray[np.int32]) -> None:
        self.examples, self.places = examples, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self.examples[i] for i in self.places[place].tolist()]
        return self.examples[int(self.places[place])]


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """(n,) tokens of each example."""
    if isinstance(examples, Tokens):
        return examples.lengths
    return np.fromiter((len(one.ids) for one in examples), np.int64, len(examples))


def targets_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """(n,) answer tokens of each example."""
    if isinstance(examples, Tokens):
        found: NDArray[np.int64] = examples.lengths - examples.answers
        return found
    return np.fromiter((one.targets for one in examples), np.int64, len(examples))
