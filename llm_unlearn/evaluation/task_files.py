"""Where lm-evaluation-harness finds a task: its name among all, its files, and the content that its numbers depend on.

The library is imported where it is used: only a suite that names tasks needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_unlearn.evaluation.task_code import code_problems
from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.spec import Refused, fingerprint

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
    configs = list(leaves(task))
    if found := list(code_problems(task, configs, files_of(task))):
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
            if _beside(config, file) is None:
                places = " nor ".join(str(place) for place in dict.fromkeys((Path.cwd(), _folder(config))))
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


def _members(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The names below a group or a tag, at any depth."""
    entry = index.get(name)
    config = (entry.cfg or {}) if entry else {}
    below = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags) if entry and not config else ()
    for one in below or ():
        member = one if isinstance(one, str) else str(one.get("group") or one.get("task"))
        yield member
        if member != name:
            yield from _members(index, member)


def leaves(task: Task) -> Iterator[dict[str, Any]]:
    """The settings of every task that is asked, as their files have them, without those of groups; `file` is where it stands."""
    index = manager_of(task).task_index
    for name in dict.fromkeys((task.task, *_members(index, task.task))):
        entry = index.get(name)
        if entry and entry.cfg and not isinstance(entry.cfg.get("task"), list):
            yield {**entry.cfg, "task": name, "file": entry.yaml_path}


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
    data = [found for one in leaves(task) for file in _data_files(one) for found in sorted(_files(_beside(one, file)))]
    return fingerprint(configs, *(file.read_bytes() for file in (*code, *data)))


def place_of(task: Task) -> Path:
    """The folder from which its data files are found: this one, or that of the task file."""
    places = {found[0] for one in leaves(task) for file in _data_files(one) if (found := _beside(one, file))}
    return next((place for place in places if place != Path.cwd()), Path.cwd())


def _data_files(config: Mapping[str, Any]) -> list[str]:
    """The local files and folders that a task reads."""
    given = config.get("dataset_kwargs") or {}
    if str(config.get("dataset_path")) not in READERS:
        return []
    files = given.get("data_files") or given.get("data_dir") or ()
    named = files.values() if isinstance(files, Mapping) else [files]
    flat = [one for some in named for one in ([some] if isinstance(some, str) else some)]
    return [file for file in flat if "://" not in file]


def _folder(config: Mapping[str, Any]) -> Path:
    return Path(config["file"]).resolve().parent


def _beside(config: Mapping[str, Any], file: str) -> tuple[Path, str] | None:
    """Where a file is looked for, and its name there: from here first, then from the task file; None where it is not."""
    return next(((place, file) for place in (Path.cwd(), _folder(config)) if any(_files((place, file)))), None)


def _files(found: tuple[Path, str] | None) -> list[Path]:
    """The files that a name stands for: itself, those of a folder, or of a pattern."""
    if found is None:
        return []
    place, name = found
    path = place / name
    if path.is_dir():
        return [one for one in path.rglob("*") if one.is_file()]
    if path.is_file():
        return [path]
    return [one for one in place.glob(name) if one.is_file()] if not Path(name).is_absolute() else []


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
