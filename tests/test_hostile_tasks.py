"""Task files of lm-evaluation-harness that somebody prepared: what they name is not run unless the suite says so, and not by a
template at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest

from llm_unlearn.evaluation import harness, task_files
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


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in a group's list may be a task of the library's, whose 14,000 files take seconds to look through: not here."""
    manager = task_files._manager
    monkeypatch.setattr(task_files, "_manager", lambda include, whole: manager(include, False))


STRANGER = "metric_list: [{metric: stranger/m, hf_evaluate: true}]"
GROUPS = {
    "a member's own keys": "task: [{task: sound, STRANGER}]",
    "a group's own keys": f"task: [sound]\n{STRANGER}",
    "a task in a list": "task: [{task: inline, dataset_path: json, STRANGER}]",
    "a group in a list": "task: [{group: inner, task: [{task: sound, STRANGER}]}]",
    "a group in a group's place": "task: [{group: inner, STRANGER, task: [sound]}]",
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("how", GROUPS)
@pytest.mark.parametrize("code", [None, True])
def test_what_a_group_adds_to_a_task_is_looked_at(folder: Path, how: str, code: bool | None) -> None:
    """The library merges the keys of groups and members into tasks, and fetches the metric as it makes them."""
    write(folder, "sound", SOUND)
    write(folder, "g", f"group: g\n{GROUPS[how].replace('STRANGER', STRANGER)}\n")
    task = Task(task="g", include=str(folder), code=code)
    ((_, said),) = task_problems(task)
    assert "measures by 'stranger/m', a script of a hub" in said
    with pytest.raises(Refused, match=r"script of a hub"):
        harness._found(task)


@pytest.mark.parametrize(
    "keys, said",
    [
        ("unsafe_code: true", "runs the code that a model writes"),
        ("generation_kwargs: {do_sample: true}", "draws its answers by chance"),
        ("dataset_kwargs: {data_files: nowhere.jsonl}", "reads nowhere.jsonl, which is neither in"),
        ("metric_list: [acc]", "metric_list: found 'acc'; expected {metric: …}"),
        ("metric_list: 5", "metric_list: found 5; expected a list"),
        ("dataset_kwargs: [rows.jsonl]", "dataset_kwargs: found ['rows.jsonl']; expected keys and values"),
        ("generation_kwargs: 1", "generation_kwargs: found 1; expected keys and values"),
    ],
)
def test_what_a_group_asks_of_a_task_is_looked_at(folder: Path, keys: str, said: str) -> None:
    write(folder, "sound", SOUND)
    task = write(folder, "g", f"group: g\ntask: [{{task: sound, {keys}}}]\n")
    ((_, found),) = task_problems(task)
    assert said in found


@pytest.mark.usefixtures("alone")
def test_python_of_a_task_below_a_group_in_a_list_is_not_run_unasked(folder: Path) -> None:
    write(folder, "evil", RUNS["plain"])
    task = write(folder, "g", "group: g\ntask: [{group: inner, task: [evil]}]\n")
    ((key, said),) = task_problems(task)
    assert key == "include" and "evil.yaml runs Python of its author's" in said
    with pytest.raises(Refused, match=r"runs Python of its author's"):
        harness._found(task)


def test_groups_that_hold_each_other_are_refused(folder: Path) -> None:
    write(folder, "b", "group: b\ntask: [g]\n")
    task = write(folder, "g", "group: g\ntask: [b]\n")
    ((_, said),) = task_problems(task)
    assert "cannot be made a task of (RecursionError" in said


def test_a_metric_of_ones_own_is_asked_where_the_suite_says_so(folder: Path) -> None:
    (folder / "evil.py").write_text("def docs(references, predictions):\n    return 1.0\n")
    write(folder, "own", RUNS["inside"])
    assert not list(task_problems(Task(task="own", include=str(folder), code=True)))


def test_a_group_reads_data_beside_each_of_its_tasks(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for name, pattern in (("one", "only-one.jsonl"), ("two", "*.json?"), ("three", str(folder / "three" / "r*.jsonl"))):
        (folder / name).mkdir()
        (folder / name / (pattern if name == "one" else "rows.jsonl")).write_text(json.dumps({"question": f"{name}?"}) + "\n")
        (folder / name / f"{name}.yaml").write_text(SOUND.replace("NAME", name).replace("rows.jsonl", f"'{pattern}'"))
    task = write(folder, "g", "group: g\ntask: [one, two, three]\n")
    assert not list(task_problems(task))
    found: Any = harness._found(task)["tasks"]
    assert {name: one.test_docs()[0]["question"] for name, one in found.items()} == {
        name: f"{name}?" for name in ("one", "two", "three")
    }
