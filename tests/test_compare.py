"""Comparing many runs: what is found and refused, the numbers side by side, the page, and the evaluation of many models."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score, roc_curve
from test_report import EVIL, LOG, Reader, example, number

from llm_unlearn import candidates, compare, folder, many
from llm_unlearn.cli import main
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.report.comparison import area, comparison_of, roc
from llm_unlearn.report.comparison_page import FIRST, answers_of, comparison_page
from llm_unlearn.report.comparison_terminal import FEW, print_comparison
from llm_unlearn.report.headline import headline
from llm_unlearn.report.likeness import Run, comparable, differing
from llm_unlearn.report.ranking import scores_of
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parent.parent
BEFORE = {"probability": 0.99, "rouge": 1.0, "membership": 0.98, "kept": 0.9}
RETRAINED = {"probability": 0.54, "rouge": 0.78, "membership": 0.52, "kept": 0.9}
SETTINGS = {
    "sets": {"forget": {"source": "f.jsonl", "limit": None}, "retain": {"source": "r.jsonl"}, "holdout": {"source": "h.jsonl"}},
    "measures": [
        {"name": "probability", "set": "forget"},
        {"name": "membership", "attack": {"name": "min_k", "k": 0.2}, "set": "forget"},
    ],
    "max_new_tokens": 48,
}


def results_of(after: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """An evaluation: three measures on forget, one on retain, two rows of forget and of holdout."""

    def of(measure: str, key: str, **rest: Any) -> dict[str, Any]:
        return number(measure, {"before": BEFORE[key], "after": after[key], "retrained": RETRAINED[key]}, **rest)

    member = of("membership", "membership", knowing="moves") | {
        "settings": {"attack": {"name": "min_k", "k": 0.2}, "against": "holdout"}
    }
    rows = {
        name: [example(i, "before", "after", "retrained", text=name) | {"id": f"{name}/{i}"} for i in range(2)]
        for name in ("forget", "holdout")
    }
    return {
        "format": 1, "title": "runs/x", "suite": "eval/quick.yaml", "suite_hash": "5u1te", "run": None,
        "models": {name: {"name": f"some/{name}", "identity": f"1d-{name}"} for name in ("before", "after", "retrained")},
        "numbers": [
            of("probability", "probability") | {"settings": {}}, of("rouge", "rouge") | {"settings": {}}, member,
            of("probability", "kept", of="retain") | {"settings": {}},
        ],
        "curves": {"extraction": {"set": "forget", "n": [1, 10], "before": [1, 1], "after": [0, 0.5], "retrained": [0, 0.1]}},
        "answers": rows,
    } | more  # fmt: skip


GOOD = {"probability": 0.55, "rouge": 0.8, "membership": 0.53, "kept": 0.85}
SHY = {"probability": 0.9, "rouge": 0.95, "membership": 0.9, "kept": 0.9}
BROKEN = {"probability": 0.0, "rouge": 0.0, "membership": 0.5, "kept": 0.01}


def run(name: str, after: Mapping[str, float] = GOOD, log: Any = (), **more: Any) -> Run:
    return Run(name, f"runs/{name}", results_of(after, **more), log)


@pytest.fixture
def three() -> list[Run]:
    return [run("broken", BROKEN), run("shy", SHY, LOG), run("good", GOOD, LOG)]


def saved(path: Path, results: Mapping[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / folder.RESULTS).write_text(json.dumps(results or results_of(GOOD)), encoding="utf-8")
    return path


def printed(comparison: Mapping[str, Any], width: int = 130) -> str:
    raw = io.StringIO()
    print_comparison(comparison, Console(file=raw, width=width, color_system=None))
    return raw.getvalue()


# ------------------------------------------------------------------------------------------------- the numbers and words


def test_runs_stand_best_first_between_their_baselines(three: list[Run]) -> None:
    made = comparison_of(three)
    assert made["columns"] == ["before", "good", "shy", "broken", "retrained"]
    assert [(one["rank"], one["state"]) for one in made["runs"]] == [(1, "ranked"), (2, "ranked"), (None, "collapsed")]
    for one in three:
        row = next(row for row in made["runs"] if row["name"] == one.name)
        assert {key: row[key] for key in ("forgotten", "kept", "score")} == {
            key: value for key, value in scores_of(one.results).items() if key in ("forgotten", "kept", "score")
        }
        assert row["headline"] == headline(one.results)
    values = made["numbers"][0]["values"]
    assert {column: values[column]["value"] for column in made["columns"]} == {
        "before": 0.99, "good": 0.55, "shy": 0.9, "broken": 0.0, "retrained": 0.54,
    }  # fmt: skip
    assert made["numbers"][0]["judgements"] == {"good": "as retrained", "shy": "still known", "broken": "over-forgotten"}
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_one_sentence_for_all(three: list[Run]) -> None:
    found = {str(row["name"]): row for row in comparison_of(three)["runs"]}
    assert comparison_of(three)["overall"] == (
        f"Closest to retrained: good (forgotten {found['good']['forgotten']:.3f}); keeps most: shy (kept 1.000); "
        f"best in both: good (score {found['good']['score']:.3f}); collapsed: broken."
    )
    twins = comparison_of([run("a"), run("b")])["overall"]
    assert twins.startswith("Closest to retrained: a and b (forgotten")
    assert comparison_of([run("a", BROKEN)])["overall"] == "Collapsed: a."
    assert comparison_of([run("a")])["overall"].startswith("a: forgotten 0.")


def test_a_model_without_a_base_has_no_score_and_no_rank() -> None:
    alone = results_of(GOOD)
    alone["models"] = {"model": {"name": "hub/x", "identity": "1d-x"}, "retrained": alone["models"]["retrained"]}
    for one in alone["numbers"]:
        one["values"] = {"model": one["values"]["after"], "retrained": one["values"]["retrained"]}
    made = comparison_of([run("good"), Run("hub/x", "hub/x", alone)])
    assert made["columns"] == ["before", "good", "hub/x", "retrained"]
    assert made["runs"][1]["state"] == "unscored" and "without a score" in made["overall"] and "hub/x" in made["overall"]
    assert made["numbers"][0]["values"]["hub/x"]["value"] == 0.55
    assert "hub/x" in comparison_page(made, [run("good"), Run("hub/x", "hub/x", alone)])


def test_each_run_keeps_its_own_baselines() -> None:
    other = results_of(SHY)
    other["models"] = {**other["models"], "before": {"name": "other/base", "identity": "1d-other"}}
    other["numbers"][0]["values"]["before"] = {"value": 0.97, "low": 0.9, "high": 1.0, "n": 2}
    made = comparison_of([run("good"), Run("other", "o", other)])
    assert list(made["baselines"]) == ["before", "retrained", "before 2"]
    assert made["columns"] == ["before", "before 2", "good", "other", "retrained"]
    assert [made["numbers"][0]["values"][name]["value"] for name in ("before", "before 2")] == [0.99, 0.97]
    assert any("2 models before" in note and "other/base" in note for note in made["notes"])


def test_attacks_are_drawn_as_they_come() -> None:
    curve = {"x": [0, 10], "y": [0.1, 0.6]}
    attack = {"name": "relearning", "title": "what comes back", "curves": {"after": curve, "retrained": curve, "related": curve}}
    names = {"name": "quantization", "title": "in fewer bits", "curves": {"after": {"x": ["nf4", "int8"], "y": [0.2, 0.1]}}}
    empty = {"name": "none", "title": "nothing", "curves": {"after": {"x": [], "y": []}}}
    runs = [run("good", attacks=[attack, names, empty]), run("shy", SHY)]
    made = comparison_of(runs)
    assert [list(one["lines"]) for one in made["attacks"]] == [["good", "retrained", "good: related"], ["good"]]
    text = Reader(comparison_page(made, runs)).text
    assert "relearning what comes back" in text and "nf4" in text and "none nothing" not in text
    assert comparison_of([run("shy")])["attacks"] == []


def test_roc_against_an_independent_reference() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.beta(4, 2, 30).round(2), rng.beta(2, 2, 25).round(2)  # rounded, so that there are ties
    x, y = roc(members.tolist(), others.tolist())
    truth, p = np.r_[np.ones(30), np.zeros(25)], np.r_[members, others]
    assert area(x, y) == pytest.approx(roc_auc_score(truth, p), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, p, drop_intermediate=False)
    # the corners are enough to draw every point
    for a, b in zip(fpr, tpr, strict=True):
        segments = zip(x, x[1:], y, y[1:], strict=False)
        assert any(
            x0 - 1e-12 <= a <= x1 + 1e-12 and y0 - 1e-12 <= b <= y1 + 1e-12
            and math.isclose((b - y0) * (x1 - x0), (a - x0) * (y1 - y0), abs_tol=1e-12)
            for x0, x1, y0, y1 in segments
        )  # fmt: skip
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert roc([0.5], [0.5]) == ([0.0, 1.0], [0.0, 1.0])


def test_roc_is_that_of_the_loss_attack_and_says_what_it_rests_on() -> None:
    one = results_of(GOOD)
    for name, values in (("forget", (0.9, 0.2)), ("holdout", (0.5, 0.1))):
        for row, p in zip(one["answers"][name], values, strict=True):
            row["probability"] = {"before": 0.5, "after": p}
    one["numbers"][2]["values"]["after"]["n"] = 900
    runs = [Run("a", "a", one)]
    made = comparison_of(runs)["roc"]
    assert made["lines"]["a"]["auc"] == 0.75 and made["lines"]["before"]["auc"] == 0.5 and "retrained" not in made["lines"]
    assert (made["rows"], made["of"]) == (4, 900)
    assert (
        "2 rows of forget and 2 of holdout, of 900 in all: only these stand"
        in Reader(comparison_page(comparison_of(runs), runs)).text
    )
    none = results_of(GOOD, answers={})
    assert comparison_of([Run("a", "a", none)])["roc"] is None


# -------------------------------------------------------------------------------------------------------- what is refused


def test_another_suite_is_refused_with_the_keys_that_differ() -> None:
    changed = json.loads(json.dumps(SETTINGS))
    changed["max_new_tokens"] = 20
    changed["measures"][1]["attack"]["k"] = 0.4
    changed["sets"]["retain"]["source"] = "other.jsonl"
    first, other = run("a", suite_settings=SETTINGS), run("b", suite_settings=changed, suite_hash="other")
    assert differing(first, other) == [
        'sets.retain.source: "other.jsonl", not "r.jsonl"',
        "measures.membership min_k forget.attack.k: 0.4, not 0.2",
        "max_new_tokens: 20, not 48",
    ]
    with pytest.raises(Refused) as error:
        comparable([first, other])
    assert "runs/b: was measured by another suite than runs/a: sets.retain.source" in str(error.value)
    assert "--common" in str(error.value) and "on forget probability, membership" in str(error.value)
    shown, notes = comparable([first, other], common=True)
    kept = [[(one["measure"], one["set"]) for one in each.results["numbers"]] for each in shown]
    assert kept == [[("probability", "forget"), ("membership", "forget")]] * 2  # ROUGE is of answers of another length
    assert "different suites" in notes[0] and set(shown[0].results["answers"]) == {"forget", "holdout"}
    assert shown[0].results["curves"] == {}


def test_suites_without_settings_are_told_apart_by_their_measures() -> None:
    other = results_of(GOOD, suite_hash="other", suite="eval/mine.yaml")
    other["numbers"][2]["settings"] = {"attack": {"name": "min_k", "k": 0.4}, "against": "holdout"}
    found = differing(run("a"), Run("b", "runs/b", other))
    assert found[0] == "suite: eval/mine.yaml, not eval/quick.yaml" and len(found) == 3
    assert "membership on forget (attack min_k (k 0.4), against holdout) is only in runs/b" in found
    shown, _ = comparable([run("a"), Run("b", "runs/b", other)], common=True)
    assert [one["measure"] for one in shown[0].results["numbers"]] == ["probability", "probability"]
    nothing = results_of(GOOD, suite_hash="other", numbers=[])
    with pytest.raises(Refused, match="No measure is the same in all runs"):
        comparable([run("a"), Run("b", "b", nothing)], common=True)


def test_changed_rows_are_refused_and_missing_rows_are_said() -> None:
    changed, fewer = results_of(GOOD), results_of(GOOD)
    changed["answers"]["forget"][1]["truth"] = "something else"
    fewer["answers"]["forget"].pop()
    with pytest.raises(Refused, match=r"b: sets.forget: 1 of 2 rows are others than in runs/a, such as 'forget/1'"):
        comparable([run("a"), Run("b", "b", changed)])
    _, notes = comparable([run("a"), Run("b", "b", fewer)])
    assert notes == ["b was asked 1 rows of forget, a 2."]


# ----------------------------------------------------------------------------------------------------- which folders


def test_folders_folders_above_and_globs(tmp_path: Path) -> None:
    ready = [saved(tmp_path / "bench" / name / "seed-0") for name in ("dpo", "npo")]
    unfinished = tmp_path / "bench" / "elm" / "seed-0"
    (unfinished / folder.CHECKPOINTS).mkdir(parents=True)
    (unfinished / folder.RECIPE).write_text("")
    assert compare.found([str(ready[0]), str(ready[0] / folder.RESULTS), str(ready[1])]) == (ready, [])
    for word in (str(tmp_path / "bench"), str(tmp_path / "bench" / "*" / "seed-*"), str(tmp_path / "*")):
        folders, left_out = compare.found([word, str(ready[0])])
        assert sorted(folders) == ready
        assert left_out == [
            f"{unfinished}: no evaluation.json there: the run is not finished. Run: llm-unlearn run "
            f"{unfinished / 'recipe.yaml'} --resume"
        ]


def test_what_finds_nothing_is_refused_at_once_with_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "run" / folder.ADAPTER).mkdir(parents=True)
    (tmp_path / "run" / folder.RECIPE).write_text("")
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / name) for name in ("run", "empty", "none", "x*")]
    with pytest.raises(Refused) as error:
        compare.found(words)
    lines = str(error.value).splitlines()
    assert f"llm-unlearn evaluate SUITE --model {words[0]} --output FOLDER" in lines[0]
    assert "nor in a folder below" in lines[1] and "no such folder" in lines[2] and "it matches nothing" in lines[3]


@pytest.mark.parametrize(("text", "expected"), [("{", "cannot be read"), ("[]", "an object"), ('{"title": 1}', "suite_hash")])
def test_a_file_that_is_no_evaluation_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / folder.RESULTS).write_text(text)
    with pytest.raises(Refused, match=expected):
        compare.read([path])


def test_half_a_line_of_a_log_is_passed_over(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / folder.LOG).write_text('{"step": 1, "forget": 2.0}\n{"step": 2, "for')
    assert compare.read([path])[0].log == [{"step": 1, "forget": 2.0}]


def test_names_are_as_long_as_it_takes(tmp_path: Path) -> None:
    def names(*places: str) -> list[str]:
        for place in places:
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
        return compare.names_of([str(tmp_path / place) for place in places])

    assert names("runs/npo", "runs/dpo") == ["npo", "dpo"]
    assert names("runs/npo/seed-0", "runs/npo/seed-1") == ["npo/seed-0", "npo/seed-1"]
    assert names("a/npo/seed-0", "b/npo/seed-0") == ["a/npo/seed-0", "b/npo/seed-0"]
    assert names("runs/before", "runs/retrained") == ["run before", "run retrained"]
    assert compare.names_of(["org/a", "org/b", "org/a"]) == ["org/a", "org/b", "org/a 2"]


# ----------------------------------------------------------------------------------------------- the terminal and files


def test_few_runs_stand_beside_each_other_and_many_under_each_other(three: list[Run]) -> None:
    few = printed(comparison_of(three))
    head = next(line for line in few.splitlines() if "measure" in line)
    assert head.split() == ["measure", "before", "good", "shy", "broken", "retrained"]
    assert all(headline(one.results).split(".")[0][:40] in few for one in three)
    many_runs = [run(f"run-{i}", GOOD | {"kept": 0.9 - i / 1000}) for i in range(FEW + 1)]
    text = printed(comparison_of(many_runs))
    lines = [line for line in text.splitlines() if re.match(r"\s*\d+ .*run-\d", line)]
    assert [re.findall(r"run-\d", line) for line in lines] == [[f"run-{i}"] for i in range(FEW + 1)]
    assert "forgotten" in text and "measure" not in text
    assert all(len(line) <= 130 for line in text.splitlines())


def test_the_verb_writes_both_files_and_never_over_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(saved(tmp_path / "a")), str(saved(tmp_path / "b", results_of(SHY))), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {compare.RESULTS, compare.PAGE}
    assert json.loads((tmp_path / "out" / compare.RESULTS).read_text())["columns"] == ["before", "a", "b", "retrained"]
    (tmp_path / "out" / compare.PAGE).write_text("mine")
    assert main(words) == 2 and "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / compare.PAGE).read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0 and (tmp_path / "out" / compare.PAGE).read_text() != "mine"


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    places = [str(saved(tmp_path / name)) for name in ("a", "b")]
    code = (
        "import sys\nfrom llm_unlearn.cli import main\n"
        f"assert main(['compare', *{places!r}, '--output', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- the page


def test_the_page_has_every_run_number_and_verdict(three: list[Run]) -> None:
    made = comparison_of(three)
    page = comparison_page(made, three)
    read = Reader(page)
    assert made["overall"] in read.text
    for one in made["runs"]:
        assert one["headline"] in read.text and one["folder"] in [value for name, value in read.attributes if name == "title"]
    for row in made["numbers"]:
        assert row["definition"] in read.text
        assert all(("title", repr(row["values"][name]["value"])) in read.attributes for name in made["columns"])
    assert read.attributes.count(("role", "img")) == 3 + 4  # frontier, ROC, extraction; four panels of the training
    assert {"r0", "r1", "r2"} <= {word for name, value in read.attributes if name == "class" for word in value.split()}
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not re.search(r"#[0-9a-f]{6}\b", page[page.index('<section id="plots"') : page.index('<section id="verdicts"')])
    assert comparison_page(made, three) == page


def test_the_page_needs_nothing_but_itself(three: list[Run]) -> None:
    text = comparison_page(comparison_of(three), three)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r"@import|url\((?!#)|\bsrc=|<link|<img|<iframe|fetch\(|XMLHttp|innerHTML|eval\(", text)
    assert "default-src 'none'" in text


def test_data_cannot_run_in_the_page(three: list[Run]) -> None:
    text = f'{EVIL} </script> <!-- $x$ "onload="y" {{{{ 1237*7 }}}} ]]> \x00\ud800 \u2028 漢'
    bad = results_of(GOOD, suite=text, title=text, attacks=[
        {"name": text, "title": text, "curves": {text: {"x": [1, 2], "y": [1, 2]}}},
    ])  # fmt: skip
    bad["numbers"][0] |= {"title": text, "definition": text, "settings": {text: text}}
    bad["answers"] = {text: [example(0, "before", "after", text=text)], "forget": [example(1, "after", text=text)]}
    runs = [Run(text, text, bad, [{"step": 1, text: 1.0}, {"step": 2, text: 2.0}]), run("b")]
    page = comparison_page(comparison_of(runs, [text], [text]), runs)
    assert EVIL not in page and page.lower().count("<script") == page.lower().count("</script>") == 2
    assert "{{ 1237*7 }}" in page and "8659" not in page
    read = Reader(page)
    assert read.tags.count("script") == 2 and not [name for name, _ in read.attributes if name.startswith("on")]
    page.encode("utf-8", "replace")


def data_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_answers_of_all_columns_stand_side_by_side(three: list[Run]) -> None:
    three[2].results["answers"]["forget"][0] |= {"after": "its own words", "probability": {"after": 0.123456, "before": math.nan}}
    made = comparison_of(three)
    data = data_in(comparison_page(made, three))
    assert [one["name"] for one in data["columns"]] == made["columns"] and data["columns"][1]["place"] == 0
    row = data["sets"][0]["rows"][0]
    said = dict(zip(made["columns"], (data["texts"][i] for i in row["a"]), strict=True))
    assert (
        said["good"] == "its own words" and said["shy"] == "after says 0 forget" and said["retrained"] == "retrained says 0 forget"
    )
    assert dict(zip(made["columns"], row["p"], strict=True))["good"] == 0.123
    assert len(data["texts"]) == len(set(data["texts"]))
    assert answers_of(made, three)["sets"][0]["of"] == 40  # what the measures' n says


def test_many_runs_open_with_the_best_and_can_all_be_shown() -> None:
    runs = [
        run(f"a run with a name that is much too long for any column {i:02d}", GOOD | {"kept": 0.9 - i / 500}) for i in range(40)
    ]
    made = comparison_of(runs)
    read = Reader(comparison_page(made, runs))
    assert [name for name, _ in read.attributes if name == "checked"] == ["checked"] * FIRST
    assert all(f"body:has(#show-{i}:not(:checked)) .r{i} " in read.text for i in range(40))
    assert all(one["headline"] in read.text for one in made["runs"])


# --------------------------------------------------------------------------------------------------- models to be measured


def a_run(path: Path, weights: str, base: str = "embedded:target") -> Path:
    """A run folder as far as its model is concerned."""
    path.mkdir(parents=True)
    text = (ROOT / "recipes" / "forget_lora.yaml").read_text(encoding="utf-8").replace("embedded:target", base)
    (path / folder.RECIPE).write_text(text, encoding="utf-8")
    (path / weights).mkdir(parents=True)
    return path


def test_words_stand_for_models_with_the_base_that_they_name(tmp_path: Path) -> None:
    lora, full = a_run(tmp_path / "runs" / "lora", folder.ADAPTER), a_run(tmp_path / "runs" / "full", folder.MODEL)
    begun = a_run(tmp_path / "runs" / "begun", f"{folder.CHECKPOINTS}/step-000020")
    (begun / folder.CHECKPOINTS / "step-000030.unfinished").mkdir()
    loose = tmp_path / "loose" / "checkpoint-100"
    loose.mkdir(parents=True)
    (loose / candidates.ADAPTER_FILE).write_text('{"base_model_name_or_path": "org/base"}')
    words = [str(tmp_path / "runs" / "*"), str(lora), str(tmp_path / "loose"), "org/other"]
    found = candidates.candidates_of(words, [], None, None)
    assert [(one.place, one.model.base, one.adapter, one.before and one.before.base) for one in found] == [
        (str(begun / "checkpoints/step-000020"), "embedded:target", str(begun / "checkpoints/step-000020"), "embedded:target"),
        (str(full), str(full / "model"), None, "embedded:target"),
        (str(lora), "embedded:target", str(lora / "adapter"), "embedded:target"),
        (str(loose), "org/base", str(loose), "org/base"),
        ("org/other", "org/other", None, None),
    ]
    assert found[0].under_way and found[0].under_way.adapter and found[0].run == begun and not found[1].under_way
    assert [list(one.columns) for one in found] == [["before", "after"]] * 4 + [["model"]]
    (with_base,) = candidates.candidates_of(["org/other"], [], str(full), "nf4")
    assert with_base.before and with_base.before.base == str(full / "model") and with_base.model.quantize == "nf4"
    several = candidates.candidates_of(["org/base"], [str(lora), str(loose)], None, None)
    assert [(one.model.base, one.adapter) for one in several] == [("org/base", str(lora / "adapter")), ("org/base", str(loose))]


def test_a_run_under_way_goes_on_while_others_are_measured(tmp_path: Path) -> None:
    first = a_run(tmp_path / "begun", f"{folder.CHECKPOINTS}/step-000007")
    (one,) = candidates.candidates_of([str(first)], [], None, "nf4")
    assert candidates.as_it_is_now(one) == one
    (first / folder.CHECKPOINTS / "step-000007").rename(first / folder.CHECKPOINTS / "step-000009")
    now = candidates.as_it_is_now(one)
    assert now.place.endswith("begun/checkpoints/step-000009") and now.under_way and now.model.quantize == "nf4"
    asked: Any = SimpleNamespace(candidates=[one, candidates.Candidate("org/other", one.model)], output=tmp_path / "out")
    assert many._renamed(asked, now, 0) == ("begun/checkpoints/step-000009", tmp_path / "out" / "begun/checkpoints/step-000009")
    (first / folder.CHECKPOINTS / "step-000009").rename(first / folder.ADAPTER)
    done = candidates.as_it_is_now(one)
    assert (done.place, done.adapter, done.under_way) == (str(first), str(first / folder.ADAPTER), None)
    (first / folder.ADAPTER).rmdir()
    with pytest.raises(Refused, match=r"step-000007: is gone, and .*begun has no other checkpoint"):
        candidates.as_it_is_now(one)


def test_what_one_model_lacks_does_not_end_the_others() -> None:
    alone: Any = SimpleNamespace(num_processes=1)
    cuda = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.")
    assert many._why_not(cuda, alone) == "out of memory (OutOfMemoryError: CUDA out of memory.)"
    assert many._why_not(FileNotFoundError(2, "No such file", "x"), alone).endswith("'x'")
    assert many._why_not(OSError("no such weights"), alone) == "no such weights" and many._why_not(Refused("a: b"), alone) == "a: b"
    assert not many._why_not(OSError(28, "No space left on device"), alone) and not many._why_not(KeyError("x"), alone)
    assert not many._why_not(cuda, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]


def test_words_that_stand_for_nothing_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    begun = a_run(tmp_path / "begun", "logs")
    words = [str(tmp_path / "empty"), str(begun), str(tmp_path / "none"), str(tmp_path / "x*")]
    with pytest.raises(Refused) as error:
        candidates.candidates_of(words, [], "./nowhere", None)
    lines = str(error.value).splitlines()
    assert len(lines) == 5 and all(line.startswith("--model: ") for line in lines[:4])
    assert "no model, adapter or finished run" in lines[0] and "--resume" in lines[1]
    assert "no such folder" in lines[2] and "matches 0 paths" in lines[3] and lines[4].startswith("--before: no such folder")
    with pytest.raises(Refused, match="found with 2 models"):
        candidates.candidates_of(["a/b", "c/d"], ["x"], None, None)


def test_one_plain_model_is_evaluated_as_ever(tmp_path: Path) -> None:
    lora, full = a_run(tmp_path / "lora", folder.ADAPTER), a_run(tmp_path / "full", folder.MODEL)
    assert not candidates.is_many(["embedded:target"], [], None) and not candidates.is_many([str(full)], [], None)
    assert not candidates.is_many(["org/base"], [str(lora)], None)
    assert candidates.is_many([str(lora)], [], None) and candidates.is_many([str(tmp_path)], [], None)
    assert candidates.is_many(["a/b", "c/d"], [], None) and candidates.is_many([str(tmp_path / "*")], [], None)
    assert candidates.is_many(["a/b"], ["x", "y"], None) and candidates.is_many(["a/b"], [], "c/d")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Two runs on a tiny model: one with an adapter of random numbers, one under way whose newest checkpoint has the same."""
    import torch
    from safetensors.torch import save_file

    from llm_unlearn.models.load import add_adapter, load, trainable
    from llm_unlearn.sections import Adapter, Model
    from llm_unlearn.training.checkpoint import WEIGHTS, snapshot

    top = tmp_path_factory.mktemp("trained")
    for name, weights in (("done", folder.ADAPTER), ("begun", f"{folder.CHECKPOINTS}/step-000007")):
        a_run(top / name, weights, base=str(tiny_base))
    loaded = load(Model(base=str(tiny_base)), torch.device("cpu"))
    net = add_adapter(loaded.model, Adapter(rank=16, alpha=32), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_(0, 0.1)
    net.save_pretrained(str(top / "done" / folder.ADAPTER))
    save_file(snapshot(net), str(top / "begun" / folder.CHECKPOINTS / "step-000007" / WEIGHTS))
    (top / "done" / folder.LOG).write_text('{"step": 1, "forget": 2.0}\n{"step": 2, "forget": 1.0}\n')
    return top


@pytest.mark.slow
def test_two_models_are_measured_once_and_compared(
    trained: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_unlearn import look as room

    suite = suites.load(
        ROOT / "eval" / "quick.yaml",
        ["max_new_tokens=4", *(f"sets.{name}.limit=3" for name in ("forget", "retain", "holdout", "general"))],
    )  # fmt: skip
    output, looks = tmp_path / "out", []
    plain_see: Callable[..., Any] = room.Looks._see
    monkeypatch.setattr(room.Looks, "_see", lambda *words: looks.append(words[3]) or plain_see(*words))

    def evaluate(other: Any = suite) -> int:
        found = candidates.candidates_of([str(trained / "done"), str(trained / "begun")], [], None, None)
        return many.evaluate(many.Asked(other, "quick", found, str(tiny_base), output, False), tmp_path / "cache").status

    monkeypatch.setattr(many, "see_checkpoint", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        evaluate()
    monkeypatch.undo()
    monkeypatch.setattr(room.Looks, "_see", lambda *words: looks.append(words[3]) or plain_see(*words))
    assert evaluate() == 0
    assert looks.count(str(trained / "done")) == 1, "the model that was measured before the kill is not asked again"
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert files == [
        *(f"begun/checkpoints/step-000007/{name}" for name in ("evaluation.json", "evaluation.parquet", "report.html")),
        "comparison.html", "comparison.json",
        *(f"done/{name}" for name in ("evaluation.json", "evaluation.parquet", "log.jsonl", "report.html")),
    ]  # fmt: skip
    made = json.loads((output / compare.RESULTS).read_text())
    assert set(made["columns"]) == {"before", "begun/checkpoints/step-000007", "done", "retrained"}
    for row in made["numbers"]:  # the same weights, by two ways
        both = [row["values"][name].get("value") for name in ("done", "begun/checkpoints/step-000007")]
        assert both[0] == pytest.approx(both[1], rel=1e-6) and both[0] is not None
    before, after = (made["numbers"][0]["values"][name]["value"] for name in ("before", "done"))
    assert before != after
    asked = len(looks)
    capsys.readouterr()
    assert evaluate() == 0
    assert len(looks) == asked, "a finished evaluation loads no model"
    assert capsys.readouterr().out.count("measured before") == 2
    again, left_out = compare.found([str(output)])
    assert len(again) == 2 and not left_out
    with pytest.raises(Refused, match="is of another suite or of other weights"):
        evaluate(other=suites.load(ROOT / "eval" / "quick.yaml", [f"retrained={tiny_base}", "max_new_tokens=5"]))
