"""Thresholds of a recipe: what they may say, when they hold, and what a run that misses one answers."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llm_unlearn.cli import main
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.folder import KEYS
from llm_unlearn.sections import Threshold
from llm_unlearn.thresholds import findings, problems, reason_of
from llm_unlearn.tree import locate

RECIPE = """\
output: runs/x
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}}
evaluation:
  suite: eval/quick.yaml
  thresholds:
    - {measure: extraction strength, set: forget, at_most: 0.3}
"""
NUMBERS: list[dict[str, Any]] = [
    {
        "measure": "extraction_strength", "title": "extraction strength", "set": "forget",
        "goal": "as retrained", "knowing": "raises",
        "values": {"before": {"value": 1.0}, "after": {"value": 0.25}, "retrained": {"value": 0.2}},
    },
    {
        "measure": "probability", "title": "probability", "set": "retain", "goal": "as before", "knowing": "raises",
        "values": {"before": {"value": 0.8}, "after": {"value": 0.7}, "retrained": {"missing": "not asked"}},
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("bound", "holds", "why"),
    [
        ({"at_most": 0.3}, True, ""),
        ({"at_most": 0.2}, False, "extraction strength on forget is 0.250, at most 0.2"),
        ({"at_most": 1.2, "of": "retrained"}, False, "extraction strength on forget is 0.250, at most 1.2 of retrained = 0.240"),
        ({"at_most": 1.3, "of": "retrained"}, True, ""),
        ({"judged": "as retrained"}, False, "extraction strength on forget is 0.250: still known"),
    ],
)
def test_a_threshold_holds_or_says_why_not(bound: dict[str, Any], holds: bool, why: str) -> None:
    (found,) = findings([Threshold(measure="extraction strength", set="forget", **bound)], NUMBERS)
    assert (found["holds"], found["why"], found["value"]) == (holds, why, 0.25)


def test_what_was_not_measured_holds_nothing() -> None:
    wanted = [
        Threshold(measure="probability", set="retain", at_least=0.9, of="before"),
        Threshold(measure="probability", set="retain", at_least=0.5, of="retrained"),
        Threshold(measure="rouge", set="retain", at_least=0.5),
    ]
    found = findings(wanted, NUMBERS)
    assert [one["holds"] for one in found] == [False, False, False]
    assert reason_of(found) == (
        "probability on retain is 0.700, at least 0.9 of before = 0.720; "
        "probability on retain: the model retrained has no value to compare with; rouge on retain was not measured"
    )


def test_every_wrong_threshold_is_named() -> None:
    suite = suites.load(locate("eval/quick.yaml"))
    wanted = [
        Threshold(measure="rouge", set="forgt", at_most=1.0),
        Threshold(measure="rogue", set="forget", at_most=1.0),
        Threshold(measure="rouge", set="forget"),
        Threshold(measure="rouge", set="retain", judged="as retrained", of="before"),
    ]
    found = dict(problems(wanted, suite, "eval/quick.yaml", None))
    assert "did you mean 'forget'" in found[0, "set"] and "did you mean 'rouge'" in found[1, "measure"]
    assert found[2,] == "expected one of at_most, at_least, judged." and "at_most or at_least" in found[3, "of"]
    assert "eval/quick.yaml names none" in found[3,] and "forgotten only" in found[3, "judged"]
    assert not list(problems([Threshold(measure="rouge", set="forget", at_most=1.0)], suite, "", None))


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1)])
def test_a_run_that_misses_a_threshold_says_so(
    holds: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    found = findings([Threshold(measure="extraction strength", set="forget", at_most=0.3 if holds else 0.1)], NUMBERS)

    def run(*_: Any, **__: Any) -> Any:
        (tmp_path / "runs" / "x").mkdir(parents=True)
        results = (
            dict.fromkeys(KEYS, "") | {"numbers": [], "thresholds": found} | {key: {} for key in ("models", "curves", "answers")}
        )
        (tmp_path / "runs" / "x" / "evaluation.json").write_text(json.dumps(results))
        return SimpleNamespace(status="finished", step=3, kept=3, reason="", broken=False)

    room = ModuleType("llm_unlearn.run")
    room.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llm_unlearn.run", room)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    assert main(["run", "r.yaml"]) == status
    assert ("thresholds do not hold: extraction strength on forget is 0.250, at most 0.1." in capsys.readouterr().err) is not holds


def test_a_recipe_s_thresholds_are_held_against_its_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("extraction strength", "extractoin strength"))
    assert main(["run", "r.yaml"]) == 2
    assert "r.yaml: evaluation.thresholds[0].measure: found 'extractoin strength'; did you mean" in capsys.readouterr().err
    assert not Path("runs").exists()
