"""Tasks of lm-evaluation-harness in a suite: what one writes there, and what their scores say beside the measures.

Needs nothing heavy; `task_files.py` finds the tasks, `harness.py` asks the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_unlearn.spec import NaturalInt, PositiveInt, plain, spec


@spec
class Task:
    """A task of lm-evaluation-harness, or a group of them, asked of each model as it is loaded here, adapter included. Prompts,
    answers and metrics are the library's, and so are the numbers; what is asked goes through the passes of this project."""

    task: str
    """Its name, such as arc_easy, mmlu, wmdp_bio; or one that a file in `include` defines."""
    include: str | None = None
    """Folder with task files (YAML) of one's own. Their `data_files` are looked for from here, else beside the task file."""
    code: bool | None = None
    """Let the files in `include` run the Python that they name (`!function`): whatever their author wrote, as you."""
    shots: NaturalInt | None = None
    """Examples with their answers before each question; without it, as many as the task says, else none."""
    limit: PositiveInt | None = None
    """Ask the first so many documents; of a group, so many of each of its tasks."""
    chat_template: bool = False
    """Put questions and examples as turns of a chat, by the tokenizer's template."""
    seed: NaturalInt = 1234
    """Which examples are drawn; the default is the library's."""
    forget: bool = False
    """What it asks is to be forgotten: the goal is the retrained model then, and not the model before."""

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        return {key: value for key, value in plain(self).items() if key not in ("include", "code", "forget")}


@dataclass(frozen=True)
class Score:
    """One metric of one task or group."""

    of: str
    """The task or group, which may be a part of the one that the suite names."""
    metric: str
    """With the filter in brackets where the task has several."""
    value: float | None
    low: float | None
    high: float | None
    n: int
    """Documents."""
    higher: bool | None
    """Whether more is better."""
    unit: str
    how: str
    """How the documents' values become one, in words."""
    version: str
    """Of the task."""
    listed: bool = True
    """Whether it is a number of its own; else it is there for the documents' values."""
    rows: Sequence[float | None] = ()
    """(n,) of each document, where it has a value of its own; none of a group."""


@dataclass(frozen=True)
class Answered:
    """What one model scored on one task of a suite, with all its parts."""

    scores: Sequence[Score] = ()
    documents: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Task -> its documents: id, prompt, truth, written."""
    missing: str = ""
    """Why there are no scores."""
    library: str = ""
    """Version of lm-evaluation-harness."""
    content: str = ""
    """Stands for the task's files and local data."""

    def score(self, of: str, metric: str) -> Score | None:
        return next((one for one in self.scores if (one.of, one.metric) == (of, metric)), None)


def task_numbers(tasks: Sequence[Task], models: Mapping[str, Sequence[Answered]]) -> list[dict[str, Any]]:
    """Every score of every model as `evaluation.json` has the numbers of measures.

    Args:
        models: "before", "after", … -> what it scored, in the order of the tasks.
    """
    found: list[dict[str, Any]] = []
    for i, task in enumerate(tasks):
        answered = {column: of_model[i] for column, of_model in models.items()}
        for of, metric in dict.fromkeys((one.of, one.metric) for each in answered.values() for one in each.scores if one.listed):
            scores = {column: each.score(of, metric) for column, each in answered.items()}
            first = next(one for one in scores.values() if one is not None)
            library, content = next((each.library, each.content) for each in answered.values() if each.scores)
            found.append(
                {
                    "measure": "task",
                    "title": f"{'' if of == task.task else f'{_short(of, task.task)} '}{_title(metric, task)}",
                    "set": task.task,
                    "goal": "as retrained" if task.forget else "as before" if first.higher is not None else "",
                    "knowing": "raises" if first.higher else "lowers",
                    "unit": "points" if any(one and one.unit == "points" for one in scores.values()) else first.unit,
                    "definition": f"{metric} of {of} (version {first.version}) as lm-evaluation-harness {library} computes it, "
                    f"{first.how}.",
                    "settings": {
                        **task.asked,
                        "of": of,
                        "metric": metric,
                        "version": first.version,
                        "library": library,
                        "content": content,
                    },
                    "values": {column: _value(scores[column], answered[column]) for column in models},
                }
            )
    return found


def _title(metric: str, task: Task) -> str:
    """`acc`, `acc, 5 shots`: with what the suite says of the number of examples, so that it may ask a task twice."""
    return metric if task.shots is None else f"{metric}, {task.shots} shot{'' if task.shots == 1 else 's'}"


def _short(of: str, group: str) -> str:
    return of.removeprefix(group).lstrip("_:") or of


def _value(score: Score | None, answered: Answered) -> dict[str, Any]:
    if score is None or score.value is None:
        return {"missing": answered.missing or "the value is not a number"}
    return {"value": score.value, "low": score.low, "high": score.high, "n": score.n}


def task_records(tasks: Sequence[Task], models: Mapping[str, Sequence[Answered]]) -> Iterator[dict[str, Any]]:
    """One record per document and model: set, id, model, prompt, truth, written, and its value of every metric."""
    for column, of_model in models.items():
        for task, answered in zip(tasks, of_model, strict=True):
            for name, documents in answered.documents.items():
                rows = {_title(one.metric, task): one.rows for one in answered.scores if one.of == name}
                for i, document in enumerate(documents):
                    number = document["id"] if name == task.task else f"{name} {document['id']}"
                    own = {title: values[i] for title, values in rows.items() if len(values) > i}
                    yield {"set": task.task, **document, "id": str(number), "model": column, **own}
