"""Where lm-evaluation-harness finds a task: its name among all, its files, and the content that its numbers depend on.

The library is imported where it is used: only a suite that names tasks needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm_unlearn.evaluation.task_code import code_problems
from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.spec import Refused, fingerprint, reason, shown

INSTALL = "Install it with: pip install 'llm-unlearn[harness]'."
READERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that stand for local files."""


def task_problems(task: Task) -> Iterator[tuple[str, str]]:
    """What is wrong with one task before any model is loaded. Yields (key below the task, text)."""
    if find_spec("lm_eval") is None:
        yield "task", f"needs lm-evaluation-harness. {INSTALL}"
        return
    if task.include and not Path(task.include).is_dir():
        yield "include", f"no such folder: {task.include} (looked from {Path.cwd()})."
        return
    index = manager_of(task).task_index
    if task.task not in index:
        near = difflib.get_close_matches(task.task, index, 5, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        yield "task", f"found {task.task!r}; {hint}`python -m lm_eval ls tasks` lists all {len(index)} names."
        return
    try:
        configs = leaves(task)
        found = list(code_problems(task, configs, files_of(task)))
    except Refused as error:
        found = [("task", str(error))]
    if found:
        yield from found
        return
    if unsafe := [str(one["task"]) for one in configs if one.get("unsafe_code")]:
        yield "task", f"{unsafe[0]} runs the code that a model writes, and nothing here keeps that in; choose another task."
    if task.shots and configs and all(one.get("num_fewshot") == 0 for one in configs):
        yield "shots", f"{task.task} is asked without examples, as its file says `num_fewshot: 0`; take `shots` out."
    if sampled := [one for one in configs if (one.get("generation_kwargs") or {}).get("do_sample")]:
        yield "task", f"{sampled[0]['task']} draws its answers by chance (`do_sample`); only greedy answers are written here."
    for config in configs:
        for file in _data_files(config):
            if _found(config, file) is None:
                places = " nor ".join(map(str, config["places"]))
                yield "task", f"{config['task']} reads {file}, which is neither in {places}. Put it there, or mend `data_files`."


@cache
def _manager(include: str | None, whole: bool) -> Any:
    from lm_eval.tasks import TaskManager

    if not hasattr(TaskManager, "load"):
        raise Refused(f"tasks: found lm-evaluation-harness {version('lm_eval')}; expected 0.4.12 or later. {INSTALL}")
    with quiet():
        return TaskManager(include_path=include, include_defaults=whole)


def manager_of(task: Task) -> Any:
    """The library's index of tasks (seconds for all 14,000 files): of the folder alone where that has all that is named."""
    folder = str(Path(task.include).resolve()) if task.include else None
    if folder:
        own = _manager(folder, False)
        if task.task in own.task_index and all(name in own.task_index for name in _members(own.task_index, task.task)):
            return own
    return _manager(folder, True)


def _members(index: Mapping[str, Any], name: str) -> list[str]:
    """The names below a group or a tag, at any depth, also of groups that stand in the list of another."""
    found, waiting = dict[str, None](), [name]
    while waiting:
        entry = index.get(waiting.pop(0))
        config = (entry.cfg or {}) if entry else {}
        below = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags) if entry and not config else ()
        items = list(below or ())
        while items:
            one = items.pop(0)
            if isinstance(one, Mapping) and isinstance(one.get("task"), list):
                items = [*one["task"], *items]
            member = str(one if not isinstance(one, Mapping) else one.get("group") or one.get("task"))
            if member not in found:
                found[member] = None
                waiting.append(member)
    return list(found)


def leaves(task: Task) -> list[dict[str, Any]]:
    """The settings of every task that is asked, as the library merges those of files, groups and members; `places` are the folders
    from which its data is looked for. Nothing that they name is imported or read.

    Raises:
        Refused: the library makes nothing of them, or they are of the wrong kind.
    """
    manager, kept = manager_of(task), list[dict[str, Any]]()
    try:
        with quiet(), _making(kept.append, read=_without_code):
            manager.load([task.task])
    except Exception as error:  # of a broken file, nearly anything
        raise Refused(f"{task.task}: its files cannot be made a task of ({reason(error)}); mend them.") from None
    groups = [path.parent for path in files_of(task)]
    for config in kept:
        for key, kind, words in SHAPES:
            if not isinstance(found := config.get(key) or kind(), kind):
                raise Refused(f"{config.get('task')}: {key}: found {shown(found)}; expected {words}.")
        name = str(config.get("task"))
        while name not in manager.task_index and "::" in name:  # what stands in a group's list is named behind it
            name = name.rpartition("::")[0]
        own = [Path(entry.yaml_path).resolve().parent] if (entry := manager.task_index.get(name)) and entry.yaml_path else []
        config["places"] = list(dict.fromkeys((Path.cwd(), *own, *groups)))
    return kept


SHAPES: tuple[tuple[str, type[Any], str], ...] = (
    ("metric_list", list, "a list of {metric: …}"),
    ("dataset_kwargs", dict, "keys and values"),
    ("generation_kwargs", dict, "keys and values"),
)


def _without_code(path: Path) -> dict[str, Any]:
    """A task file in which Python is named, and not imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = load_yaml(path, resolve_func=False)
    found.pop("class", None)  # a task that is a program has settings all the same
    return found


@contextlib.contextmanager
def _making(make: Callable[[dict[str, Any]], Any], read: Callable[[Path], dict[str, Any]] | None = None) -> Iterator[None]:
    """Inside, the library hands the settings of each task, merged as it merges them, to `make`.

    Args:
        make: gives the task, or None where none is to be made.
        read: reads a task file in the library's place.
    """
    from lm_eval.tasks import _factory as library

    kept = library.ConfigurableTask, library.load_yaml
    try:
        library.ConfigurableTask = lambda config: make(config) or SimpleNamespace(task_name=str(config.get("task")))
        library.load_yaml = (lambda path, resolve_func: read(path)) if read else kept[1]
        yield
    finally:
        library.ConfigurableTask, library.load_yaml = kept


def load(task: Task) -> Any:
    """The tasks that are asked, with their data, as the library makes them; their files are found from wherever one is."""
    from lm_eval.api.task import ConfigurableTask

    manager, places = manager_of(task), {str(one.get("task")): one["places"] for one in leaves(task)}

    def make(config: dict[str, Any]) -> Any:
        known = config | {"places": places[str(config.get("task"))]}
        return ConfigurableTask(config=config | {"dataset_kwargs": _placed(known)})

    with quiet(), _making(make):
        return manager.load([task.task])


def files_of(task: Task) -> list[Path]:
    """The files of the tasks that are asked, and of their groups."""
    index = manager_of(task).task_index
    entries = (index.get(name) for name in dict.fromkeys((task.task, *_members(index, task.task))))
    return [Path(entry.yaml_path) for entry in entries if entry and entry.yaml_path]


def content(task: Task) -> str:
    """Stands for all that decides what is asked, besides the library's version: the settings of the task and of those below it,
    the text of one's own Python files, local data. A data set of the hub counts by its name. Where folders lie changes nothing."""
    index = manager_of(task).task_index
    names = dict.fromkeys((task.task, *_members(index, task.task)))
    configs = json.dumps([[name, index[name].cfg] for name in names if name in index], sort_keys=True, default=str)
    own = Path(task.include).resolve() if task.include else None
    for folder in (own, Path(str(find_spec("lm_eval").origin)).parent):  # type: ignore[union-attr]  # it is there: the index is its
        configs = configs.replace(str(folder), "")
    code = sorted(own.rglob("*.py")) if own else []
    data = [found for one in leaves(task) for file in _data_files(one) for found in sorted(_files(_found(one, file)))]
    return fingerprint(configs, *(file.read_bytes() for file in (*code, *data)))


DATA = ("data_files", "data_dir")


def _data_files(config: Mapping[str, Any]) -> list[str]:
    """The local files and folders that a task reads."""
    given = config.get("dataset_kwargs") or {}
    if str(config.get("dataset_path")) not in READERS:
        return []
    files = next((given[key] for key in DATA if given.get(key)), ())
    named = files.values() if isinstance(files, Mapping) else [files]
    flat = [one for some in named for one in (some if isinstance(some, (list, tuple)) else [some])]
    return [file for file in flat if isinstance(file, str) and "://" not in file]


def _placed(config: Mapping[str, Any]) -> Any:
    """What a task says of its data, with every local name from the root."""
    given, known = config.get("dataset_kwargs"), set(_data_files(config))

    def place(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: place(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [place(one) for one in value]
        return (_found(config, value) or value) if isinstance(value, str) and value in known else value

    return {key: place(value) if key in DATA else value for key, value in given.items()} if given else given


def _found(config: Mapping[str, Any], file: str) -> str | None:
    """A file's name from the root, looked for in each place in turn; None where it is in none."""
    tried = (one for place in config["places"] for one in (Path(place, file), Path(glob.escape(str(place)), file)))
    return next((str(one) for one in tried if _files(str(one))), None)


def _files(name: str | None) -> list[Path]:
    """The files that a name from the root stands for: itself, those of a folder, or of a pattern."""
    if not name:
        return []
    found = [Path(name)] if Path(name).exists() else [Path(one) for one in glob.glob(name, recursive=True)]
    return [file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's bars, prints, log lines and warnings off the terminal; what goes wrong is raised all the same."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
