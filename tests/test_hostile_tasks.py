"""Task files of lm-evaluation-harness that somebody prepared: what they name is not run unless the suite says so, and not by a
template at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest

from llm_unlearn.evaluation import harness
from llm_unlearn.evaluation.task_code import tagged
from llm_unlearn.evaluation.task_files import task_problems
from llm_unlearn.evaluation.tasks import Task
from llm_unlearn.spec import Refused

SOUND = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Who?"}) + "\n")
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\ndef docs(dataset):\n    Path({str(tmp_path / 'it-ran')!r}).touch()\n    return dataset\n"
    )
    return tmp_path


def write(folder: Path, name: str, text: str) -> Task:
    (folder / f"{name}.yaml").write_text(text.replace("NAME", name))
    return Task(task=name, include=str(folder))


RUNS = {
    "plain": SOUND + "process_docs: !function evil.docs\n",
    "whole": SOUND + "process_docs: !<!function> evil.docs\n",
    "renamed": "%TAG !f! !func\n---\n" + SOUND + "process_docs: !f!tion evil.docs\n",
    "library": SOUND + "process_docs: !function os.system\n",
    "inside": SOUND.replace("metric: acc", "metric: !function evil.docs"),
}


@pytest.mark.parametrize("name", RUNS)
def test_python_in_a_task_file_is_not_run_unasked(folder: Path, name: str) -> None:
    task = write(folder, name, RUNS[name])
    ((key, said),) = task_problems(task)
    assert key == "include" and f"{name}.yaml runs Python of its author's (" in said and "say `code: true`" in said
    with pytest.raises(Refused, match=r"runs Python of its author's"):
        harness._found(task)
    assert not (folder / "it-ran").exists()


def test_nor_that_of_a_file_which_it_includes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "half.txt").write_text("process_docs: !function evil.docs\n")
    (outside / "evil.py").write_text((folder / "evil.py").read_text())
    task = write(folder, "joined", f"include: [{outside / 'half.txt'}]\n{SOUND}")
    ((_, said),) = task_problems(task)
    assert f"{outside / 'half.txt'} runs Python" in said


def test_it_runs_where_the_suite_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "asked", RUNS["plain"])
    task = Task(task="asked", include=str(folder), code=True)
    assert not list(task_problems(task))
    harness._found(task)
    assert (folder / "it-ran").exists()
    assert f"may run the Python in {folder}" in capsys.readouterr().err


def test_a_template_reaches_nothing(folder: Path) -> None:
    """Compiled as the library does it, this one walks from a text to the module os."""
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(folder / "it-ran") + "') }}"
    task = write(folder, "reaching", SOUND.replace("{{question}}", reach))
    assert not list(task_problems(task))
    with pytest.raises(Refused, match=r"reaching cannot be had \(SecurityError"):
        harness._found(task)
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize("metric", ["{metric: FOLDER/evil}", "{metric: stranger/metric}", "{metric: f1, hf_evaluate: true}"])
def test_a_metric_is_no_script_of_a_hub(folder: Path, metric: str) -> None:
    task = write(folder, "scored", SOUND.replace("{metric: acc,", metric.replace("FOLDER", str(folder))[:-1] + ","))
    ((_, said),) = task_problems(task)
    assert "a script of a hub, and code from there is never run" in said


def test_the_librarys_own_tasks_may_run_what_was_installed_with_them() -> None:
    own = Path(str(lm_eval.__file__)).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    assert "!function" in own.read_text() and not list(tagged(own))


def test_a_sound_one_is_asked(folder: Path) -> None:
    task = write(folder, "sound", SOUND)
    assert not list(task_problems(task))
    found: Any = harness._found(task)
    assert list(found["tasks"]) == ["sound"]
