"""Suites: what a measure asks of its sets, how like measures are told apart, what every row says, and the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.data.sources import rows
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.membership import Membership
from llm_unlearn.evaluation.membership_attacks import AnyMembershipAttack
from llm_unlearn.evaluation.numbers import answers, curves, numbers, titles
from llm_unlearn.evaluation.rows import records
from llm_unlearn.evaluation.tables import Cut, Draws, Likelihood, Sampler, SetTable, Shots
from llm_unlearn.report.columns import write_columns
from llm_unlearn.report.headline import has_collapsed
from llm_unlearn.report.verdict import AS_RETRAINED, OVER, RECOGNISED, judge
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parents[1]
SETS = """sets:
  forget:  {source: embedded:forget, prompt: question, answer: answer, keyword: keyword, perturbed: perturbed_answer}
  holdout: {source: embedded:holdout, prompt: question, answer: answer}
  text:    {source: embedded:refusals, text: text}
measures:
"""


def read(tmp_path: Path, *measures: str) -> suites.Suite:
    path = tmp_path / "suite.yaml"
    path.write_text(SETS + "".join(f"  - {{{measure}}}\n" for measure in measures), encoding="utf-8")
    return suites.load(path)


def table(*losses: float, hit: bool = False, logp: float | None = None) -> SetTable:
    """One row of two tokens per loss."""
    count = len(losses)
    told = np.repeat([-loss for loss in losses], 2) if logp is None else np.full(2 * count, logp)
    start = np.arange(0, 2 * count + 1, 2)
    scored = Likelihood(np.arange(count), np.array(["answer"] * count), start, told, np.full(2 * count, hit), told, 0 * told + 1)
    names = [f"row {i}" for i in range(count)]
    return SetTable(names, ["?"] * count, names, scored, [f"row {i} " if hit else "" for i in range(count)],
                    [["row"], *[[]] * (count - 1)])  # fmt: skip


def test_a_set_gets_what_the_measures_that_read_it_need(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        "name: membership, attack: {name: recall, shots: 3}, set: forget, against: holdout",
        "name: membership, attack: {name: gradient}, set: forget, against: holdout",
        "name: leak_at_k, set: forget, by: exact, n: 4",
        "name: rouge, set: forget, cut: 9",
        "name: discoverable_extraction, set: forget, top_k: 7",
        "name: perplexity, set: text",
    )
    both = {"answer", "gradient", Shots("holdout", 3)}
    assert suite.needs("holdout") == both
    assert suite.needs("forget") == both | {"generation", Draws(4, 0), Cut(9), Sampler(1.0, 7, 1.0)}
    assert suite.needs("text") == {"answer"}


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ("name: keyword_recall, set: holdout", "measures[0]: keyword_recall looks for key spans; name their column in"),
        ("name: leak_at_k, set: holdout, by: keyword", "sets.holdout.keyword"),
        ("name: leak_at_k, set: text, by: exact", "leak_at_k needs questions and answers, and set 'text' is running text"),
        ("name: rouge, set: text, cut: 3", "set 'text' is running text"),
        ("name: model_utility, set: forget, others: [holdout]", "wrong answers; name their column in sets.holdout.perturbed"),
        ("name: model_utility, set: forget, others: [world]", "measures[0].others: found 'world'"),
        ("name: privleak, set: forget, against: holdut", "measures[0].against: found 'holdut'; did you mean 'holdout'"),
        ("name: privleak, set: forget, against: forget", "two different sets"),
    ],
)  # fmt: skip
def test_what_a_set_lacks_is_said_before_a_model_is_loaded(measure: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        read(tmp_path, measure)
    assert said in str(refused.value) and "suite.yaml" in str(refused.value)


def test_like_measures_are_told_apart(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        "name: rouge, set: forget",
        "name: rouge, set: forget, stem: false, cut: 3",
        "name: rouge, set: holdout",
        "name: extraction_strength, set: forget",
        "name: extraction_strength, set: forget, variant: peer",
        "name: membership, attack: {name: min_k, variant: peer}, set: forget, against: holdout",
        "name: leak_at_k, set: forget, by: exact, k: 3",
        "name: membership, attack: {name: loss}, set: forget, against: holdout",
    )
    assert titles(suite) == [
        "rouge", "rouge (no stem, cut 3)", "rouge", "extraction strength", "extraction strength peer", "membership min_k peer",
        "leak@3 exact",
        "membership loss",
    ]  # fmt: skip


def test_every_row_is_in_the_file_with_its_own_values(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        "name: probability, set: forget",
        "name: exact_match, set: forget",
        "name: keyword_recall, set: forget",
        "name: membership, attack: {name: loss}, set: forget, against: holdout",
        "name: membership, attack: {name: reference}, set: forget, against: holdout",
        "name: forget_quality, set: forget",
    )
    models = {
        "after": {"forget": table(1, 2, 4, hit=True), "holdout": table(2, 3)},
        "retrained": {"forget": table(1, 1, 1), "holdout": table(1, 1)},
    }
    path = tmp_path / "deep" / "evaluation.parquet"
    write_columns(records(suite, models), path)
    import datasets

    found: list[dict[str, Any]] = list(datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "kept")))
    assert len(found) == 2 * (3 + 2) and [one.name for one in path.parent.iterdir()] == ["evaluation.parquet"]
    by_row = {(one["model"], one["set"], one["id"]): one for one in found}
    one = by_row["after", "forget", "row 1"]
    assert (one["truth"], one["written"], one["tokens"], one["first_choices"]) == ("row 1", "row 1 ", 2, 2)
    assert one["nll"] == pytest.approx(4) and one["probability"] == pytest.approx(np.exp(-2)) and one["exact match"] == 1
    assert one["membership loss"] == pytest.approx(2) and one["membership reference"] == pytest.approx(1)
    assert one["keyword recall"] is None and by_row["after", "forget", "row 0"]["keyword recall"] == 1
    assert one["mean_entropy"] == pytest.approx(2) and one["forget quality"] is None
    other = by_row["after", "holdout", "row 1"]
    assert other["membership loss"] == pytest.approx(3) and other["probability"] is None
    assert by_row["retrained", "forget", "row 1"]["membership reference"] is None


def test_a_value_that_is_no_number_says_so_in_the_results(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        "name: exact_memorization, set: forget",
        "name: membership, statistic: tpr, attack: {name: loss}, set: forget, against: holdout",
    )
    models = {"after": {"forget": table(1, 2, logp=np.nan), "holdout": table(2, 3)}}
    for number in numbers(suite, models):
        said = number["values"]["after"]["missing"]
        assert said == "the value is NaN, as the model's logits are on 2 of 2 rows of 'forget'"
        json.dumps(number, allow_nan=False)
    assert [number["unit"] for number in numbers(suite, models)] == ["share", "share"]


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [(-90, -99, -80, RECOGNISED), (2, -5, 9, AS_RETRAINED), (70, 40, 99, OVER), (3, None, None, OVER)],
)
def test_privleak_is_judged_on_both_sides(value: float, low: float | None, high: float | None, word: str) -> None:
    found = {"after": {"value": value, "low": low, "high": high}, "retrained": {"missing": "is what the others are compared with"}}
    assert judge({"measure": "privleak", "goal": "as retrained", "knowing": "lowers", "values": found}) == word


@pytest.mark.parametrize(("value", "word"), [(0.2, RECOGNISED), (0.89, AS_RETRAINED), (0.99, AS_RETRAINED)])
def test_more_secrecy_than_retraining_gives_is_no_loss(value: float, word: str) -> None:
    found = {name: {"value": one} for name, one in (("before", 0.0), ("after", value), ("retrained", 0.9))}
    assert judge({"measure": "membership", "goal": "as retrained", "knowing": "lowers", "values": found}) == word


@pytest.mark.parametrize(("value", "word"), [(0.9, RECOGNISED), (0.11, AS_RETRAINED), (0.0, AS_RETRAINED)])
def test_fewer_recognised_rows_than_after_retraining_are_no_loss(value: float, word: str) -> None:
    found = {name: {"value": one} for name, one in (("before", 1.0), ("after", value), ("retrained", 0.1))}
    assert judge({"measure": "membership", "goal": "as retrained", "knowing": "raises", "values": found}) == word


def test_what_is_to_be_forgotten_and_what_is_to_stay(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    source = "{source: embedded:forget, prompt: question, answer: answer}"
    measured = {"forget": "probability", "forget_text": "probability", "retain": "probability", "holdout": "probability"}
    kept = "".join(f"  {name}: {source}\n" for name in measured)
    asked = "".join(f"  - {{name: {measure}, set: {name}}}\n" for name, measure in measured.items())
    path.write_text(
        f"sets:\n{kept}measures:\n{asked}  - {{name: knowledge_gap, set: retain}}\n  - {{name: entropy, set: retain}}\n"
    )
    tables = {name: table(1, 2) for name in measured}
    goals = [number["goal"] for number in numbers(suites.load(path), {"after": tables})]
    assert goals == ["as retrained", "as retrained", "as before", "", "", ""]


@pytest.mark.parametrize(("before", "now", "collapsed"), [(0.0, 0.02, False), (0.0, 0.8, True), (0.01, 0.2, False)])
def test_a_few_broken_answers_are_no_collapse_and_many_are(before: float, now: float, collapsed: bool) -> None:
    found = {"before": {"value": before}, "after": {"value": now}}
    number = {"measure": "fluency", "title": "fluency broken", "set": "retain", "goal": "as before", "knowing": "lowers",
              "unit": "share", "values": found}  # fmt: skip
    assert has_collapsed({"numbers": [number]}) is collapsed


def test_a_curve_leaves_out_a_model_whose_logits_are_nan(tmp_path: Path) -> None:
    suite = read(tmp_path, "name: discoverable_extraction, set: forget, prefix: 1")
    models = {"before": {"forget": table(0.1, 2)}, "after": {"forget": table(1, 2, logp=np.nan)}}
    curve = curves(suite, models)["extraction"]
    assert set(curve) == {"set", "n", "before"} and curve["before"][-1] == 1
    assert [row["probability"].keys() for row in answers(models)["forget"]] == [{"before"}] * 2


# ------------------------------------------------------------------------------------------------ choices


def test_choices_become_an_answer_and_wrong_ones(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"q": "?", "options": ["a", "b", "c"], "right": 1}) + "\n")
    source = Source(source=str(path), prompt="q", answer="right", choices="options")
    assert rows(source) == [{"q": "?", "options": ["a", "c"], "right": "b"}]
    path.write_text(json.dumps({"q": "?", "options": ["a", "b"], "right": 2}) + "\n")
    with pytest.raises(Refused, match=r"row 1: expected a list in column 'options' and the number of one of them.*'right'"):
        rows(source)


def test_choices_go_without_perturbed(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("sets:\n  forget: {source: org/name, prompt: q, answer: a, choices: c, perturbed: p}\nmeasures: []\n")
    with pytest.raises(Refused, match=r"suite.yaml:2: sets.forget.choices: goes with `answer`"):
        suites.load(path)


# ------------------------------------------------------------------------------------------------ shipped


def test_the_full_suite_has_every_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    import typing

    monkeypatch.chdir(ROOT)
    kinds = set(typing.get_args(typing.get_args(suites.AnyMeasure)[0]))
    suite = suites.load(ROOT / "eval" / "full.yaml")
    assert {type(one) for one in suite.measures} == kinds
    attacks = set(typing.get_args(typing.get_args(AnyMembershipAttack)[0]))
    assert {type(one.attack) for one in suite.measures if isinstance(one, Membership)} == attacks


def test_every_measure_is_in_the_table_of_the_docs() -> None:
    import typing

    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for kind in typing.get_args(typing.get_args(suites.AnyMeasure)[0]):
        name = typing.get_args(typing.get_type_hints(kind)["name"])[0]
        assert f"| `{name}`" in page, name


def test_muse_and_tofu_differ_in_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    of = {path.stem: suites.load(path) for path in (ROOT / "eval").glob("*.yaml")}
    assert of["tofu"].measures == of["tofu_forget05"].measures == of["tofu_forget01"].measures
    assert of["muse_news"].measures == of["muse_books"].measures
    assert [of[name].sets["holdout"].config for name in ("tofu", "tofu_forget05", "tofu_forget01")] == [
        "holdout10",
        "holdout05",
        "holdout01",
    ]
    assert {source.source for source in of["muse_books"].sets.values()} == {"muse-bench/MUSE-Books"}
