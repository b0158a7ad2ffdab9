"""Where rows come from: which columns of a file or data set make an example, and what stands beside it."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, cast

from llm_unlearn.chat import Chat, chat_problems
from llm_unlearn.embedded.population import SPLITS
from llm_unlearn.spec import AtLeastTwo, PositiveInt, nearest, spec

Targets = Literal["answer", "thought", "both", "separate"]
"""Which part of an answer with a thought is learnt or forgotten."""


@spec
class Alternate:
    """Another answer to the same prompts, for losses that teach one (idk, relabel, dpo, ap, flat, lunar)."""

    answer: str
    """Column that holds it. A column of lists gives one of the list per epoch."""
    thought: str | None = None
    """Column of the thought before it, where `targets` asks for thoughts; text, or lists alongside `answer`."""
    source: str | None = None
    """Where the column is read, such as embedded:refusals; each prompt gets `count` rows, drawn from the seed. Without it: here."""
    count: PositiveInt = 1
    """How many rows of the source each prompt gets; one of them per epoch."""


@spec
class Contrast:
    """What is put before each prompt, to ask the model as it was as who knows and as who does not (elm)."""

    expert: str
    """Such as `You are an expert in virology.`; may be empty."""
    novice: str
    """Such as `You have never heard of virology.`"""


@spec
class Source:
    """Rows, and which columns of them make an example: prompt + answer, messages, or text."""

    source: str
    """A hub id, a local json / jsonl / csv / parquet / txt file or folder, or embedded:forget | retain | holdout | general."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; without it, train."""
    prompt: str | None = None
    """Column of the question."""
    prompt_input: str | None = None
    """Column of what the question is about, put below it where a row has any: of Alpaca's rows, `input` beside
    `prompt: instruction` and `answer: output`."""
    answer: str | None = None
    """Column of the answer: what is forgotten or kept. With `choices`, the number of the right one, counted from 0."""
    choices: str | None = None
    """Column of all that can be answered, a list per row; what is not the answer is a wrong one for multiple choice."""
    messages: str | None = None
    """Column of a chat, a list of {role, content} or of ShareGPT's {from, value}; the last assistant turn is the answer."""
    text: str | None = None
    """Column of running text, cut into blocks of `max_tokens`; every token is a target."""
    where: Mapping[str, str | int | float | bool | tuple[str | int | float | bool, ...]] | None = None
    """Keep the rows whose column equals the value, or is one of the values."""
    without: Mapping[str, str | int | float | bool | tuple[str | int | float | bool, ...]] | None = None
    """Leave out the rows whose column equals the value, or is one of the values."""
    like: Mapping[str, str] | None = None
    """Keep the rows whose column is like a text in which * stands for any text."""
    limit: PositiveInt | None = None
    """Keep the first so many rows."""
    thought: str | None = None
    """Column of the thought before the answer, of rows for a reasoning model. An answer that begins with `<think>…</think>`, or a
    chat whose last turn has `reasoning_content` or `thinking`, brings its thought itself."""
    targets: Targets = "answer"
    """Part that is learnt, forgotten or measured of rows with a thought: the answer (its thought is prompt), the thought (with what
    closes it), both as one, or separate: the answer, and beside it the thought as a stream of its own, such as `forget.thought`."""
    max_tokens: AtLeastTwo = 1024
    """Longer examples are cut here."""
    chat: Chat = Chat()
    """Settings of the chat template; those that are not set come from the section `chat`."""
    alternate: Alternate | None = None
    """Another answer to the same prompts, for losses that teach one."""
    contrast: Contrast | None = None
    """The same prompts asked in two ways, for losses that compare the two."""
    paraphrase: str | None = None
    """Column of the answer in other words (evaluation only)."""
    perturbed: str | None = None
    """Column of wrong answers, a list per row (evaluation only)."""
    keyword: str | None = None
    """Column of what an answer must name, text or a list of texts (evaluation only)."""


T = TypeVar("T")


def with_chat(settings: T, section: Chat) -> T:
    """Return settings in which every source has the chat settings of a section beside its own."""
    if isinstance(settings, Source):
        return replace(settings, chat=settings.chat.over(section))
    if isinstance(settings, Mapping):
        return cast(T, {key: with_chat(value, section) for key, value in settings.items()})
    if isinstance(settings, tuple):
        return cast(T, tuple(with_chat(value, section) for value in settings))
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        changed = {field.name: with_chat(getattr(settings, field.name), section) for field in dataclasses.fields(settings)}
        same = all(changed[name] is getattr(settings, name) for name in changed)
        return settings if same else replace(settings, **changed)
    return settings


def left_out(source: Source, column: str, values: Iterable[str | int | float | bool]) -> Source:
    """A source without the rows whose column is one of these values, besides those that it leaves out already."""
    out = dict(source.without or {})
    already = out.get(column, ())
    return replace(source, without=out | {column: (*(already if isinstance(already, tuple) else (already,)), *values)})


def source_problems(source: Source) -> Iterable[tuple[tuple[str, ...], str]]:
    """What is wrong with one source: its columns, or a file that is not there. Yields (keys below the source, text)."""
    shapes = [bool(source.prompt or source.answer), bool(source.messages), bool(source.text)]
    if sum(shapes) != 1:
        named = [key for key in ("prompt", "answer", "messages", "text") if getattr(source, key)]
        found = f"found {' and '.join(named)}; " if named else ""
        yield (), f"{found}expected one of: prompt and answer (columns), messages (a chat column), text (a column of running text)."
    elif shapes[0] and not (source.prompt and source.answer):
        yield (
            (),
            f"found {'prompt' if source.prompt else 'answer'} alone; expected both prompt and answer, the names of two columns.",
        )
    if source.prompt_input and not source.prompt:
        yield ("prompt_input",), "goes below a prompt, and none is named. Set prompt, or take it out."
    yield from ((("chat", *keys), text) for keys, text in chat_problems(source.chat))
    if source.choices and (source.perturbed or not source.answer):
        yield ("choices",), "goes with `answer`, the column of the right one's number, and without `perturbed`."
    yield from _thought_problems(source)
    if source.text and source.alternate:
        yield ("alternate",), "running text has no prompt that could have another answer; take it out, or name prompt and answer."
    for path, name in (
        (("source",), source.source),
        (("alternate", "source"), source.alternate.source if source.alternate else None),
    ):
        if name is None:
            continue
        if name.startswith("embedded:") and name.removeprefix("embedded:") not in EMBEDDED:
            yield path, f"found {name!r}; {nearest(name, [f'embedded:{one}' for one in EMBEDDED])}"
        elif missing(name):
            yield path, f"no such file or folder: {name} (looked from {Path.cwd()})."
    if source.split and _split(source) != source.split and Path(os.path.expanduser(source.source)).is_file():
        yield (
            ("split",),
            f"found {source.split!r}, a part of a data set; {source.source} is one file. Use limit, where, or a file of its own.",
        )


def _thought_problems(source: Source) -> Iterable[tuple[tuple[str, ...], str]]:
    """Check that there are thoughts where they are asked for. Yields (keys below the source, text)."""
    if source.targets != "answer" and source.chat.thinking is False:
        yield ("targets",), "asks for thoughts, and chat.thinking is off. Set chat.thinking: true, or targets: answer."
    if source.text and (source.thought or source.targets != "answer"):
        yield ("thought",), "running text has no thoughts; take it out, or name prompt and answer."
    if source.alternate and source.targets in ("thought", "both") and not source.alternate.thought:
        yield ("alternate", "thought"), "missing; targets asks for thoughts, so an alternate answer needs one. Name its column."


EMBEDDED = (*SPLITS, "refusals", "german", "prose")
"""What `embedded:` can name as data."""


HUB_ID = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
"""What a hub calls a model or data set."""


PACKAGED, GGUF = "packaged:", ".gguf"


def is_shipped(name: str) -> bool:
    """Return whether a name means data or a model that comes with this package (embedded:) or with another one (packaged:)."""
    return name.startswith(("embedded:", PACKAGED))


def is_gguf(base: str) -> bool:
    """Return whether a base is stored as GGUF: a local file, or one inside an installed package."""
    return base.startswith(PACKAGED) or Path(base).suffix == GGUF


def missing(name: str) -> bool:
    """A name that can only be meant as a local path, and is not there. (`org/name` may be a hub id, `a/b.jsonl` and `my data` may
    not.)"""
    looks_local = not HUB_ID.fullmatch(name.partition("@")[0]) or Path(name).suffix in (*FILES, GGUF)
    return looks_local and not is_shipped(name) and not os.path.exists(os.path.expanduser(name))


def unnameable(name: str) -> bool:
    """Whether no file or folder can have this name here: too long, or with a character that none can have."""
    try:
        os.lstat(os.path.expanduser(name))
    except ValueError:
        return True
    except OSError as error:
        return error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    return False


class Read(Protocol):
    """What says which data is read, before any row of it is chosen."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


def same_data(one: Read, other: Read) -> bool:
    """Whether two read the same data, also where a local file goes by two names; which rows they choose of it may differ."""
    if one.config != other.config or _split(one) != _split(other):
        return False
    if one.source == other.source:
        return True
    a, b = Path(os.path.expanduser(one.source)), Path(os.path.expanduser(other.source))
    return a.exists() and b.exists() and a.samefile(b)


def _split(one: Read) -> str:
    """The split, without the part of it that `train[:90%]` names."""
    return re.split(r"[\[+]", one.split or "train")[0]


def is_forgotten(name: str) -> bool:
    """Whether a set of a suite is one that is to be forgotten: `forget`, or a part of it, such as `forget_bio`."""
    return name.partition("_")[0] == "forget"


def is_recipe(name: str) -> bool:
    """Whether the name of a model is that of a recipe file, which makes one."""
    return Path(name).suffix in (".yaml", ".yml")


FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Local files by their ending, and the reader of `datasets` that reads them."""
