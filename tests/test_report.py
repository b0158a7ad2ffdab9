"""The report: what it says of the numbers, that it says all of them, and that nothing in it runs or is fetched."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_unlearn.report.headline import headline
from llm_unlearn.report.page import MOST_ROWS, page, write_page
from llm_unlearn.report.plots import plots_of
from llm_unlearn.report.summary import key_numbers, standing
from llm_unlearn.report.terminal import print_table
from llm_unlearn.report.texts import MOST, readable
from llm_unlearn.report.verdict import LARGELY, OTHERWISE, SIGNIFICANT, band_of, judge, reach_verdict, rule, shown

EVIL = "<script>alert(1)</script>"
MODELS = ("before", "after", "retrained")


def entry(value: float, spread: float = 0.013, n: int = 40) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def number(
    measure: str, values: dict[str, Any], of: str = "forget", knowing: str = "raises", goal: str | None = None
) -> dict[str, Any]:
    found = {name: entry(value) if isinstance(value, float) else value for name, value in values.items()}
    return {
        "measure": measure,
        "title": measure.replace("_", " "),
        "set": of,
        "goal": ("as retrained" if of == "forget" else "as before") if goal is None else goal,
        "knowing": knowing,
        "definition": f"What {measure} means.",
        "settings": {"k": 0.25, "p": None},
        "values": found,
    }


def of_three(measure: str, before: float, after: float, retrained: float, **more: Any) -> dict[str, Any]:
    return number(measure, dict(zip(MODELS, (before, after, retrained), strict=True)), **more)


def example(i: int, *columns: str, text: str = "") -> dict[str, Any]:
    said = {column: f"{column} says {i} {text}" for column in columns}
    probability = dict.fromkeys(columns, 0.25)
    return {
        "id": f"row/{i}",
        "prompt": f"question {i} {text}",
        "truth": f"truth {i} {text}",
        "probability": probability,
    } | said


@pytest.fixture
def results() -> dict[str, Any]:
    needs = {"missing": "needs a retrained model: --retrained PATH"}
    return {
        "format": 1,
        "suite": "eval/quick.yaml",
        "suite_hash": "5u1te",
        "title": "runs/forget_lora",
        "run": {
            "recipe_hash": "rec1pe", "seed": 7, "status": "finished", "reason": "", "steps": 45, "kept_step": 45,
            "seconds": 31.2, "trainable": 12345, "device": "cpu", "processes": 1, "precision": "fp32",
            "versions": {"torch": "2.13.0"},
        },
        "models": {name: {"name": f"some/{name}", "identity": f"1d-{name}"} for name in MODELS},
        "numbers": [
            of_three("rouge", 0.912, 0.905, 0.911, of="retain"),
            of_three("perplexity", 1.003, 2.009, 1.951, knowing="lowers"),
            of_three("probability", 0.997, 0.503, 0.544),
            number("forget_quality", {"before": 5.4e-13, "after": 0.31, "retrained": needs}, knowing="lowers"),
            of_three("membership", 0.998, 0.547, 0.552, knowing="moves"),
        ],
        "curves": {
            "extraction": {
                "set": "forget", "n": [1, 10, 100],
                "before": [1, 1, 1], "after": [0, 0.1, 0.2], "retrained": [0, 0, 0.3],
            },
        },
        "answers": {"forget": [example(i, *MODELS) for i in range(3)], "holdout": [example(9)]},
    }  # fmt: skip


LOG = [
    {"step": 1, "lr": 1e-3, "grad_norm": 0.5, "forget": 2.77, "retain": 0.0, "tokens": 1306, "seconds": 0.2},
    {"step": 2, "lr": 1e-3, "grad_norm": "nan", "forget": "inf", "retain": 0.1, "tokens": 9, "seconds": 0.2},
    {"step": 3, "lr": 1e-3, "grad_norm": 0.4, "forget": 1.5, "retain": 0.1, "retain_perplexity": 1.01},
]


class Reader(HTMLParser):
    """Tags, ids, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(results: dict[str, Any], width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    print_table(results, Console(file=file, width=width, color_system=None))
    return raw.getvalue().decode(encoding)


# ---------------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("after", "retrained", "knowing", "word"),
    [
        (0.50, 0.55, "raises", "as retrained"),
        (0.90, 0.55, "raises", "still known"),
        (0.10, 0.55, "raises", "over-forgotten"),
        (1.01, 1.95, "lowers", "still known"),
        (9e9, 1.95, "lowers", "over-forgotten"),
        (0.01, 0.00, "raises", "as retrained"),  # inside the interval
        (0.02, 0.00, "raises", "still known"),
        (0.93, 0.53, "moves", "recognised"),
        (0.05, 0.53, "moves", "over-forgotten"),
        (0.50, 0.80, "moves", "as retrained"),  # an attacker knows less than of the retrained model
    ],
)
def test_against_the_retrained_model(after: float, retrained: float, knowing: str, word: str) -> None:
    assert judge(of_three("m", 0.99, after, retrained, knowing=knowing)) == word


@pytest.mark.parametrize(
    ("before", "after", "knowing", "word"),
    [
        (0.8, 0.776, "raises", "97 % kept"),
        (2.0, 2.06, "lowers", "+3 %"),
        (2.0, 1.0, "lowers", "−50 %"),
        (0.0, 0.5, "raises", ""),
    ],
)
def test_against_the_model_before(before: float, after: float, knowing: str, word: str) -> None:
    assert judge(of_three("m", before, after, 0.3, of="retain", knowing=knowing)) == word


def test_p_values_comparison_sets_and_missing_values() -> None:
    gone = {"missing": "none"}
    assert judge(number("forget_quality", {"after": 0.05, "retrained": gone})) == "as retrained"
    assert judge(number("forget_quality", {"after": 0.049, "retrained": gone})) == "differs"
    assert judge(number("rouge", {"model": 0.9, "retrained": 0.2})) == "still known"
    assert judge(number("rouge", {"after": 0.9, "retrained": gone})) == ""
    assert judge(number("rouge", {"after": gone, "retrained": 0.9})) == ""
    assert judge(number("rouge", {"model": 0.9}, of="retain")) == ""
    assert judge(of_three("rouge", 0.9, 0.9, 0.9, of="holdout", goal="")) == ""


def test_headline_of_a_success(results: dict[str, Any]) -> None:
    said = headline(results)
    assert said == "Forgotten: all 4 kinds of measures on forget are as in the retrained model. Kept: 99 % of the scores on retain."


def test_headline_of_a_leak(results: dict[str, Any]) -> None:
    results["numbers"][2]["values"]["after"] = entry(0.99)
    results["numbers"][4]["values"]["after"] = entry(0.95)
    said = headline(results)
    assert "forgotten" not in said.lower()
    assert "still known: probability; recognised: membership" in said


@pytest.fixture
def main_run() -> dict[str, Any]:
    """The numbers of recipes/forget_lora.yaml, as they were measured."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "real_runs.json").read_text(encoding="utf-8"))["run"]
    return found


def number_of(results: dict[str, Any], title: str) -> dict[str, Any]:
    return next(one for one in results["numbers"] if (one["title"], one["set"]) == (title, "forget"))


def test_a_model_that_tests_tell_apart_is_not_largely_forgotten(main_run: dict[str, Any]) -> None:
    """Nine of 13 measures were as retrained beside forget quality p = 1.9e-4 and a min-k++ AUC of .35."""
    said = headline(main_run)
    assert said.startswith(
        "Not as retrained: told from the retrained model by forget quality (p = 1.9e-04) and membership min_k++ (0.354 against "
        "0.583); 3 of 6 kinds of measures on forget are as in the retrained model; still known: exact memorization; "
        "over-forgotten, a leak too: discoverable extraction and membership min_k++. "
    )
    assert standing(main_run) == {"word": "Not as retrained, and leaks", "kind": "bad"}
    assert [one["title"] for one in key_numbers(main_run, MODELS)[:2]] == ["membership min_k++", "forget quality"]


@pytest.mark.parametrize(("p", "auc", "word"), [(0.05, 0.47, LARGELY), (0.049, 0.47, OTHERWISE), (0.05, 0.4, OTHERWISE)])
def test_one_failed_test_is_enough(main_run: dict[str, Any], p: float, auc: float, word: str) -> None:
    number_of(main_run, "forget quality")["values"]["after"]["value"] = p
    number_of(main_run, "membership min_k++")["values"]["after"]["value"] = auc
    verdict = reach_verdict(main_run["numbers"])
    assert (verdict.word, verdict.as_retrained, verdict.kinds) == (word, 5 if word == LARGELY else 4, 6)
    assert len(verdict.failed) == (word == OTHERWISE)


def test_measures_of_one_kind_count_once_and_the_worst_counts(main_run: dict[str, Any]) -> None:
    one = number_of(main_run, "probability")
    main_run["numbers"] += [one | {"title": f"probability {i}"} for i in range(9)]
    assert reach_verdict(main_run["numbers"]).kinds == 6
    spoilt = copy.deepcopy(one) | {"title": "probability 9"}
    spoilt["values"]["after"]["value"] = 0.99
    before = reach_verdict(main_run["numbers"]).as_retrained
    assert reach_verdict([*main_run["numbers"], spoilt]).as_retrained == before - 1


def test_over_forgetting_alone_is_a_leak(results: dict[str, Any]) -> None:
    results["numbers"][2]["values"]["after"] = entry(0.1)
    assert standing(results) == {"word": "Largely forgotten, but leaks", "kind": "bad"}
    assert "Largely forgotten: 3 of 4 kinds" in headline(results) and "over-forgotten, a leak too: probability" in headline(results)


@pytest.mark.parametrize(
    ("before", "value", "low", "high", "band"),
    [
        (0.99, 0.5, 0.45, 0.58, (0.4, 0.6)),  # 20 %
        (0.99, 0.5, 0.2, 0.9, (0.2, 0.9)),  # the interval
        (0.6, 0.5, 0.49, 0.51, (0.475, 0.525)),  # a quarter of the way back
    ],
)
def test_the_band_around_one_control(before: float, value: float, low: float, high: float, band: tuple[float, float]) -> None:
    made = number("m", {"before": before, "after": 0.5, "retrained": {"value": value, "low": low, "high": high}})
    assert band_of(made) == pytest.approx(band)


def test_the_rule_and_what_one_control_can_tell_stand_in_the_page_and_in_the_docs(main_run: dict[str, Any]) -> None:
    read = " ".join(Reader(page(main_run, [])).text.split())
    docs = " ".join((Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8").replace("*", "").split())
    assert len(rule()) == 5
    for heading, text in rule():
        assert f"{heading} {text}" in read and f"{heading} {text}" in docs
    seen = "forget quality sees distributions that lie 0.30 or more apart"
    assert f"With these rows {seen} and membership sees AUCs that differ by more than about 0.13." in read
    alone = only_model(main_run)
    alone["numbers"] = [one for one in alone["numbers"] if one["measure"] != "forget_quality"]
    assert "How the verdict is reached" not in page(alone, [])


def test_one_kind_alone_is_said_to_be_alone(results: dict[str, Any]) -> None:
    results["numbers"] = results["numbers"][:2]
    only = "the only kind of measures on forget that could be compared is as in the retrained model."
    assert headline(results).startswith(f"Forgotten: {only}")


def test_the_distance_that_forget_quality_can_see(main_run: dict[str, Any]) -> None:
    from scipy.stats import ks_2samp

    rows = number_of(main_run, "forget quality")["values"]["after"]["n"] // 2
    least = next(d for d in range(rows) if ks_2samp(range(rows), [x + d - 0.5 for x in range(rows)]).pvalue < SIGNIFICANT)
    assert least / rows == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("after", [entry(0.1), {"missing": "the value is nan"}])
def test_a_collapsed_model_is_said_first_and_is_no_success(results: dict[str, Any], after: dict[str, Any]) -> None:
    results["numbers"][0]["values"]["after"] = after
    said = headline(results)
    assert said.startswith("The model collapsed: rouge on retain went from 0.912 to ")
    assert "Forgotten" not in said and "Kept" not in said


def test_a_stopped_run_is_said(results: dict[str, Any]) -> None:
    results["run"] |= {"status": "stopped", "steps": 30, "kept_step": 20, "reason": "retain perplexity 9 is above 2"}
    said = "The run was stopped by its guard: retain perplexity 9 is above 2; the weights of step 20 were kept."
    assert said in headline(results)
    assert "retain perplexity 9 is above 2" in page(results, LOG) and "dashed" in page(results, LOG)


def test_without_a_retrained_model_the_headline_says_so(results: dict[str, Any]) -> None:
    del results["models"]["retrained"]
    for one in results["numbers"]:
        one["values"].pop("retrained")
    results["numbers"] = [one for one in results["numbers"] if one["measure"] != "forget_quality"]
    assert "without a retrained model (--retrained PATH)" in headline(results)
    assert "Forgotten" not in headline(results)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.9968, "0.997"), (12.345, "12.35"), (1234.5, "1,234"), (5.4e-13, "5.4e-13"), (9e9, "9.0e+09")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert shown(value) == text


# --------------------------------------------------------------------------------------------------------- the terminal


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_shows_every_name_and_number_and_fits(results: dict[str, Any], width: int) -> None:
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width
    for one in results["numbers"]:
        assert one["title"] in text
        for found in one["values"].values():
            assert "value" not in found or shown(found["value"]) in text
    assert [text.index(f"\n {name}") for name in ("forget", "retain")] == sorted(
        text.index(f"\n {n}") for n in ("forget", "retain")
    )
    assert all(name in text for name in (*MODELS, "as retrained", "99 % kept", "needs a retrained model: --retrained PATH"))
    assert " ".join(headline(results).split()) in " ".join(text.split())


def test_the_terminal_is_not_steered_by_data_and_survives_its_encoding(results: dict[str, Any]) -> None:
    results["title"] = "runs/[red]x[/red]\x1b[31m"
    results["numbers"][0]["set"] = "ret\x1bain é漢"
    assert "[red]x[/red]" in printed(results) and "\x1b" not in printed(results)
    assert "probability" in printed(results, encoding="ascii")


def test_the_table_of_one_model(results: dict[str, Any]) -> None:
    assert "0.503" in printed(only_model(results))


# ------------------------------------------------------------------------------------------------------------- the page


def only_model(results: dict[str, Any]) -> dict[str, Any]:
    """What a stand-alone evaluation of one model writes."""
    text = copy.deepcopy(results) | {"run": None, "models": {"model": results["models"]["after"]}, "curves": {}}
    for one in text["numbers"]:
        one["values"] = {"model": one["values"]["after"]}
    text["answers"] = {"forget": [example(0, "model")]}
    return text


def test_every_number_with_its_interval_and_definition_stands_in_the_page(results: dict[str, Any]) -> None:
    read = Reader(page(results, LOG))
    for one in results["numbers"]:
        assert one["definition"] in read.text and one["title"] in read.text
        for found in one["values"].values():
            if "value" not in found:
                assert found["missing"] in read.text
                continue
            assert shown(found["value"]) in read.text and ("title", repr(found["value"])) in read.attributes
            assert f"{shown(found['low'])}–{shown(found['high'])}" in read.text
    facts = ("rec1pe", "5u1te", "12,345 weights", "cpu, 1 process, fp32", "torch 2.13.0", "some/after", "1d-retrained")
    assert all(fact in read.text for fact in facts)
    assert headline(results) in read.text


def test_data_cannot_run_in_the_page_nor_in_its_plots(results: dict[str, Any], tmp_path: Path) -> None:
    text = f'{EVIL} $x$ "onload="y" {{{{ 1237*7 }}}} ]]> --> \x00\ud800 漢 http://evil.example'
    results["answers"] = {text: [example(0, *MODELS, text=text)], "forget": [example(0, *MODELS, text=text)]}
    results |= {"title": text, "suite": text}
    results["models"] = {name: {"name": text, "identity": text} for name in MODELS}
    results["models"][text] = {"name": text, "identity": "x"}
    results["numbers"][2]["values"][text] = entry(0.77)
    results["numbers"][0] |= {"set": text, "title": text, "definition": text, "settings": {text: text}}
    results["numbers"][1]["values"]["after"] = {"missing": text}
    results["curves"] = {text: results["curves"]["extraction"] | {"set": text}}
    log = [{"step": 1, text: 1.0, "forget": 2.0}, {"step": 2, text: 2.0}]
    write_page(results, log, tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in written and "<script>alert" not in written.lower()
    assert written.count("&lt;script&gt;") > 10
    assert "{{ 1237*7 }}" in written and "8659" not in written
    assert all(EVIL not in plot.svg for plot in plots_of(results, log))
    assert any("&lt;script&gt;" in plot.svg for plot in plots_of(results, log))
    read = Reader(written)
    assert read.tags.count("script") == 1
    assert not [name for name, _ in read.attributes if name.startswith("on")]


def test_nothing_is_fetched(results: dict[str, Any]) -> None:
    text = page(results, LOG)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"@import|url\((?!#)|\bsrc=|<link|<img|<iframe", text)
    assert "default-src 'none'" in text
    assert all(value.startswith("#") for name, value in Reader(text).attributes if name in ("href", "xlink:href"))


def test_drawings_are_parts_of_the_page(results: dict[str, Any]) -> None:
    text = page(results, LOG)
    read = Reader(text)
    assert read.tags.count("svg") == 4 + 4  # forget, retain, extraction, rows; four panels of the training
    assert "<?xml" not in text and text.lower().count("<!doctype") == 1 and "<metadata" not in text
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    inside = "".join(plot.svg for plot in plots_of(results, LOG))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', inside))
    assert used and used <= set(ids)
    assert not re.search(r"#[0-9a-f]{6}\b", inside), "a colour that is not the page's"
    assert {"var(--before)", "var(--after)", "var(--retrained)"} <= set(re.findall(r"var\(--\w+\)", inside))
    assert page(results, LOG) == text


def test_one_model_no_curve_no_log_no_answers(results: dict[str, Any]) -> None:
    one = only_model(results)
    read = Reader(page(one, []))
    assert "0.503" in read.text and "The evaluation" in read.text and "model says 0" in read.text
    bare = one | {"answers": {}, "numbers": []}
    assert Reader(page(bare, [])).tags.count("svg") == 0
    assert headline(bare) in printed(bare)


def test_examples_are_limited_and_the_rest_is_counted(results: dict[str, Any]) -> None:
    results["answers"] = {
        "forget": [example(i, "after") for i in range(MOST_ROWS + 3)],
        "retain": [example(1, "after")],
    }
    results["numbers"][0]["values"]["after"]["n"] = 700
    text = page(results, [])
    assert f"{MOST_ROWS} examples, 3 of {MOST_ROWS + 3} left out" in text
    assert "699 of 700 left out" in text
    assert f"question {MOST_ROWS - 1} " in text and f"question {MOST_ROWS} " not in text


def test_a_log_of_one_step_and_of_nothing_finite(results: dict[str, Any]) -> None:
    assert "Training" in page(results, LOG[:1])
    assert "Training" in page(results, LOG[1:2])


# ------------------------------------------------------------------------------------------------------------- attacks


def attack(name: str, before: float, after: float, retrained: float, back: float, leaks: bool, **more: Any) -> dict[str, Any]:
    """One attack as `evaluation.json` has it, of two points."""
    y = dict(zip(MODELS, (before, after, retrained), strict=True))
    return {
        "name": name, "title": name.replace("_", " "), "definition": f"What {name} is {EVIL}.",
        "settings": {"steps": 20, "rows": None},
        "set": "forget", "x": {"name": "training", "unit": "steps", "ticks": [], "untouched": True},
        "y": {"name": "extraction_strength", "knowing": "raises"},
        "curves": {
            column: {"x": [0, 20], "y": [0.1, value], "low": [0, 0], "high": [1, 1], "rows": [], "notes": {}}
            for column, value in y.items()
        },
        "gap": {
            "best": {column: {"x": 20, "at": "20 steps", "value": value, "low": 0.0, "high": 1.0} for column, value in y.items()},
            "gap": after - retrained, "came_back": back, "half": {}, "leaks": leaks,
        },
        "finding": f"A finding {EVIL}.",
    } | more  # fmt: skip


@pytest.fixture
def audited(results: dict[str, Any]) -> dict[str, Any]:
    lost = attack("quantization", 0.9, 0.11, 0.1, 0.0, False)
    lost["curves"]["retrained"] = {"missing": "needs a bigger boat"}
    del lost["gap"]["best"]["retrained"]
    results["attacks"] = [
        attack("relearning", 0.911, 0.622, 0.205, 0.591, True), lost, attack("adapter_removal", 0.912, 0.913, 0.206, 1.0, True),
    ]  # fmt: skip
    results["robustness"] = {
        "relearning": 0.25, "quantization": 0.75, "harmonic_mean": 0.375, "utility": 0.4, "floor": 0.5, "value": 0.0,
    }  # fmt: skip
    return results


def test_the_headline_says_what_leaks_most_first(audited: dict[str, Any]) -> None:
    said = "Leaks: of what was forgotten, 100 % comes back under adapter removal (20 steps) and 59 % under relearning (20 steps)."
    assert f"{said} Only merged weights may be released, or none." in headline(audited)
    for one in audited["attacks"]:
        one["gap"]["leaks"] = False
    uncertain = "No certain leak under the 3 attacks that were tried: adapter removal (20 steps) recovers the most, 100 %."
    assert uncertain in headline(audited) and "merged" not in headline(audited)
    audited["attacks"][0]["gap"]["by_attack"] = True
    for one in audited["attacks"][1:]:
        one["gap"]["by_attack"] = False  # it was there without the attack
    audited["attacks"][0]["gap"]["came_back"] = 0.05
    assert "No leak under the 3 attacks that were tried." in headline(audited)
    for one in audited["attacks"]:
        one["gap"]["by_attack"], one["gap"]["came_back"] = True, 0.05
    assert "No leak under the 3 attacks that were tried." in headline(audited)
    audited["attacks"] = []
    assert "leak" not in headline(audited).lower()


def test_attacks_in_the_terminal(audited: dict[str, Any]) -> None:
    text = printed(audited, 100)
    line = next(line for line in text.splitlines() if "relearning: extraction" in line)
    assert line.split()[-6:] == ["0.911", "0.622", "0.205", "+0.417", "59", "%"]
    assert "needs a bigger boat (quantization, retrained)" in " ".join(text.split())


def test_attacks_on_the_page(audited: dict[str, Any]) -> None:
    read = Reader(page(audited, []))
    text = " ".join(read.text.split())
    for said in ("0.622", "+0.417", "59 %", "Settings: steps 20.", f"A finding {EVIL}.", "needs a bigger boat",
                 "Robustness 0.000: below 0.5 of what was to stay, nothing counts (R under relearning 0.250;"):  # fmt: skip
        assert said in text, said
    assert read.tags.count("script") == 1
    captions = [plot.caption for plot in plots_of(audited, [])]
    assert "relearning: extraction strength on forget" in captions
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_points_of_an_attack_are_drawn_by_name(audited: dict[str, Any]) -> None:
    audited["attacks"][1]["x"] = {"name": "weights", "unit": "bits", "ticks": ["as it is", "nf4"], "untouched": True}
    (svg,) = [plot.svg for plot in plots_of(audited, []) if plot.caption.startswith("quantization")]
    assert "as it is" in svg and "nf4" in svg and "weights (bits)" in svg
    assert "var(--before)" in svg and "var(--after)" in svg and "var(--retrained)" not in svg


# ---------------------------------------------------------------------------------------------------------- thresholds


def asked(measure: str, value: float | None, holds: bool, why: str = "", **more: Any) -> dict[str, Any]:
    """What a threshold came to, as `evaluation.json` has it."""
    return {
        "measure": measure,
        "set": "forget",
        "asked": "at most 0.3",
        "value": value,
        "bound": 0.3,
        "holds": holds,
        "why": why,
    } | more


def test_what_was_asked_and_did_not_come_is_said_first(results: dict[str, Any]) -> None:
    before = headline(results)
    for nothing in ([], None):
        assert headline(results | {"thresholds": nothing}) == before and "hreshold" not in printed(results)
    assert headline(results | {"thresholds": [asked("probability", 0.2, True)]}).startswith("The threshold holds. ")
    results["thresholds"] = [
        asked("probability", 0.2, True), asked("rouge", 0.5, False, "rouge on forget is 0.500, at most 0.3"),
        asked("mmlu", None, False, bound=None),
    ]  # fmt: skip
    said = "2 of 3 thresholds do not hold: rouge on forget is 0.500, at most 0.3; mmlu on forget has no value, asked: at most 0.3."
    assert headline(results) == f"{said} {before}"
    assert standing(results) == {"word": "Thresholds not met", "kind": "bad"}
    many = headline(results | {"thresholds": [asked(f"m{i}", 0.5, False, f"why {i}") for i in range(5)]})
    assert many.startswith("5 of 5 thresholds do not hold: why 0; why 1; why 2; 2 more.")


def test_thresholds_in_the_terminal_and_on_the_page(results: dict[str, Any]) -> None:
    assert "hreshold" not in Reader(page(results, [])).text.split("*/")[-1]
    results["thresholds"] = [asked("probability", 0.2, True), asked(EVIL, None, False, f"{EVIL} was not measured", judged=None)]
    text = printed(results)
    assert "holds  probability on forget: asked at most 0.3, came 0.200" in text and f"DOES NOT HOLD  {EVIL} on forget" in text
    read = " ".join(Reader(page(results, [])).text.split())
    assert "probability forget at most 0.3 0.300 0.200 ✓ holds" in read
    assert f"{EVIL} forget at most 0.3 0.300 — ✗ does not hold {EVIL} was not measured" in read


# --------------------------------------------------------------------------------------------------- what is seen first


def test_a_word_for_the_whole(audited: dict[str, Any]) -> None:
    assert standing(audited)["word"] == "Forgotten, but leaks"
    audited["attacks"] = []
    assert standing(audited) == {"word": "Forgotten", "kind": "good"}
    audited["numbers"][1]["values"]["after"]["value"] = 1.01
    assert standing(audited) == {"word": "Largely forgotten", "kind": "mixed"}
    audited["numbers"][2]["values"]["after"]["value"] = 0.99
    assert standing(audited) == {"word": "Not as retrained", "kind": "bad"}
    assert standing(only_model(audited | {"numbers": audited["numbers"][:3]})) == {"word": "Not compared", "kind": "plain"}
    audited["numbers"][0]["values"]["after"]["value"] = 0.01
    assert standing(audited) == {"word": "Collapsed", "kind": "bad"}


def test_the_key_numbers_are_of_what_was_to_go_and_of_what_was_to_stay(results: dict[str, Any]) -> None:
    cards = key_numbers(results, MODELS)
    assert [(one["title"], one["set"]) for one in cards] == [
        ("probability", "forget"), ("membership", "forget"), ("perplexity", "forget"), ("rouge", "retain"),
    ]  # fmt: skip
    first = cards[0]
    assert [(one["text"], one["now"]) for one in first["models"]] == [("0.997", False), ("0.503", True), ("0.544", False)]
    assert first["judgement"] == "as retrained" and first["track"] and not cards[2]["track"]
    assert (first["models"][1]["place"], first["models"][1]["low"], first["models"][1]["width"]) == (50.3, 49.0, 2.6)


def test_texts_are_shown_as_they_are_and_no_longer_than_one_reads() -> None:
    assert readable("plain é漢 👩‍🚀\n\tשלום") == "plain é漢 👩‍🚀\n\tשלום"
    assert readable("a\x00b\x1b[31m\x7f\x85") == "a␀b␛[31m␡⟨U+0085⟩"
    assert readable("\u202egnp.exe\u2066x") == "⟨U+202E⟩gnp.exe⟨U+2066⟩x"
    assert readable("a\r\nb") == "a\nb"
    cut = readable("x" * 10_000_000)
    assert len(cut) < MOST + 60 and cut.endswith("… (cut: 10,000,000 characters in all)")
