"""Task files of lm-evaluation-harness that would run Python: found before they are loaded, and templates that can do no more than
lay text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.spec import Refused, shown


def code_problems(task: Task, configs: list[dict[str, Any]], files: list[Path]) -> Iterator[tuple[str, str]]:
    """What a task would run. Yields (key below the task, text).

    Args:
        configs: the settings of every task that is asked, merged as the library merges them.
        files: where they and their groups stand.
    """
    for one, tags in () if task.code else (found for file in files for found in tagged(file)):
        said = f"{one} runs Python of its author's ({', '.join(sorted(tags))})"
        yield "include", f"{said}. Read that code; if it may run, say `code: true` beside `include`."
        return
    for config in configs:
        name = scripted(config)
        if name and not (task.code and Path(name).is_absolute()):  # a function of one's own is named by its file
            yield (
                "task",
                f"{config['task']} measures by {name!r}, a script of a hub, and code from there is never run; choose another.",
            )


def tagged(file: Path) -> Iterator[tuple[Path, set[str]]]:
    """The files that a task file is made of, of those that are no part of the library, and the tags in each that YAML itself does
    not know, such as `!function`. Nothing is built of them."""
    waiting, seen = [file.resolve()], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen or not _is_own(path) or not path.is_file():
            continue
        seen.add(path)
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        nodes = list(_nodes(root)) if root else []
        if tags := {node.tag for node in nodes if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag}:
            yield path, tags
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value == "include":
                waiting += [(path.parent / one.value).resolve() for one in _nodes(value) if isinstance(one, yaml.ScalarNode)]


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node below one, and itself, once."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def scripted(config: Mapping[str, Any]) -> str:
    """The metric of a task that the library would fetch from a hub as a script and run; "" where there is none."""
    import lm_eval.api.metrics  # noqa: F401  # as it is imported, it makes the library's own metrics known
    from lm_eval.api.registry import metric_registry

    for one in () if config.get("process_results") else config.get("metric_list") or ():
        if not isinstance(one, Mapping) or not one.get("metric"):
            raise Refused(f"{config['task']}: metric_list: found {shown(one)}; expected {{metric: …}}.")
        name = str(one["metric"])
        function = "/" in name and not _is_own(Path(name))  # of the library's own Python
        if one.get("hf_evaluate") is True or (name not in metric_registry and not function):
            return name
    return ""


def _is_own(path: Path) -> bool:
    """Whether a file is no part of the library."""
    return not path.resolve().is_relative_to(Path(str(find_spec("lm_eval").origin)).resolve().parent)  # type: ignore[union-attr]  # it is there


def fenced_templates() -> None:
    """Have the library lay out its templates in a sandbox, as transformers does with a model's: it has them compiled as they are,
    and from there every object of this process can be reached."""
    import lm_eval.utils as library
    from jinja2.sandbox import SandboxedEnvironment

    if not isinstance(library.env, SandboxedEnvironment):
        fenced = SandboxedEnvironment(loader=library.env.loader, undefined=library.env.undefined, keep_trailing_newline=True)
        fenced.filters.update(library.env.filters)
        library.env = fenced
