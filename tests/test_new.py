"""`llm-unlearn new --model …`: columns are recognised, settings follow model and data, `plan` takes both files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_unlearn import recipe
from llm_unlearn.cli import main
from llm_unlearn.data.examples import content_of
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.starter import recommend
from llm_unlearn.starter.columns import FORMATS, source_of
from llm_unlearn.starter.recommend import DataFacts, ModelFacts

Rows = Sequence[Mapping[str, Any]]
TURNS = [("user", "human", "Who sold house {}?"), ("assistant", "gpt", "House {} was sold by Ada Bo.")]
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "qa": lambda i: {"id": i, "question": TURNS[0][2].format(i), "answer": TURNS[1][2].format(i)},
    "completion": lambda i: {"prompt": TURNS[0][2].format(i), "completion": TURNS[1][2].format(i)},
    "instructions": lambda i: {"instruction": TURNS[0][2].format(i), "output": TURNS[1][2].format(i)},
    "alpaca": lambda i: {"instruction": "Who sold it?", "input": f"House {i}", "output": TURNS[1][2].format(i)},
    "messages": lambda i: {"messages": [{"role": role, "content": text.format(i)} for role, _, text in TURNS]},
    "sharegpt": lambda i: {"conversations": [{"from": role, "value": text.format(i)} for _, role, text in TURNS]},
    "text": lambda i: {"text": " ".join(f"On day {k} house {i} was empty." for k in range(40))},
}
KEYS = {
    "qa": {"prompt": "question", "answer": "answer"}, "completion": {"prompt": "prompt", "answer": "completion"},
    "instructions": {"prompt": "instruction", "answer": "output"},
    "alpaca": {"prompt": "instruction", "prompt_input": "input", "answer": "output"},
    "messages": {"messages": "messages"}, "sharegpt": {"messages": "conversations"}, "text": {"text": "text"},
}  # fmt: skip


def write(path: Path, rows: Rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(here: Path, base: Path, kind: str = "qa", *more: str, holdout: bool = False) -> int:
    """Rows 0 to 5 are forgotten, 6 to 13 kept, 14 to 19 were never seen."""
    for name, rows in (("forget", range(6)), ("retain", range(6, 14)), ("holdout", range(14, 20))):
        write(here / f"{name}.jsonl", [KINDS[kind](i) for i in rows])
    words = ["new", "houses", "--model", str(base), "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    return main([*words, *(["--holdout", "holdout.jsonl"] if holdout else []), *more])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holdout", [False, True])
def test_what_is_written_is_planned_as_it_is(
    kind: str, holdout: bool, here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(here, tiny_base, kind, holdout=holdout) == 0
    assert "next: llm-unlearn plan houses.yaml" in capsys.readouterr().out
    made, suite = recipe.load(Path("houses.yaml")), suites.load(Path("houses_suite.yaml"))
    for source in (made.data.forget, made.data.retain, suite.sets["forget"], suite.sets["retain"]):
        assert source
        columns = {key: getattr(source, key) for key in ("prompt", "prompt_input", "answer", "messages", "text")}
        assert {key: value for key, value in columns.items() if value} == KEYS[kind]
    assert set(suite.sets) == {"forget", "retain", *(["holdout"] if holdout else [])}
    assert bool(made.data.holdout) == holdout and suite.retrained is None
    assert main(["plan", "houses.yaml"]) == 0
    assert "note" not in capsys.readouterr().out, "every row that is measured is the recipe's"


def test_missing_rows_are_refused(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(here, tiny_base, "qa") == 0
    assert main(["new", "more", "--model", str(tiny_base), "--forget", "forgot.jsonl", "--retain", "retain.jsonl"]) == 2
    assert "forgot.jsonl: the file does not exist (looked from " in capsys.readouterr().err and not Path("more.yaml").exists()


def test_a_run_of_what_is_written_ends_well(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(here, tiny_base, holdout=True) == 0
    capsys.readouterr()
    assert main(["run", "houses.yaml", "train.epochs=1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["run"]["status"] == "finished" and set(said["evaluation"]["models"]) == {"before", "after"}
    assert Path("runs/houses/adapter").is_dir()


def test_each_setting_says_why(here: Path, tiny_base: Path) -> None:
    assert new(here, tiny_base) == 0
    lines = Path("houses.yaml").read_text().splitlines()
    for key in ("adapter", "quantize", "epochs", "lr", "window", "stop", "batch_tokens", "forget: {loss", "retain: {loss"):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  {key}"))
        assert lines[at - 1].lstrip().startswith("#"), key


def test_what_new_says_to_scripts(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(here, tiny_base, "qa", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["suite"]) == ("houses.yaml", "houses_suite.yaml")
    assert said["columns"]["forget"]["prompt"] == "question"
    assert said["settings"]["train.lr"]["value"] == recommend.SIZES[0].lr and said["settings"]["train.lr"]["reason"]


def test_nothing_is_replaced_or_half_written(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("houses_suite.yaml").write_text("mine")
    assert new(here, tiny_base) == 2
    assert "houses_suite.yaml: exists already" in capsys.readouterr().err
    assert not Path("houses.yaml").exists() and Path("houses_suite.yaml").read_text() == "mine"
    Path("houses_suite.yaml").unlink()
    write(here / "odd.jsonl", [{"a": "1", "b": "2"}])
    assert main(["new", "houses", "--model", str(tiny_base), "--forget", "odd.jsonl", "--retain", "retain.jsonl"]) == 2
    assert "--forget: odd.jsonl has no columns that are recognised; its columns are 'a', 'b'." in capsys.readouterr().err
    assert not list(here.glob("*.yaml"))


def test_model_and_data_go_together(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "houses", "--model", str(tiny_base)]) == 2
    assert "--forget: missing; a recipe for your model and data needs --model, --forget and --retain." in capsys.readouterr().err
    assert main(["new", "houses"]) == 0 and Path("houses.yaml").read_text().count("llm-unlearn new NAME --model") == 1
    assert recipe.load(Path("houses.yaml")).model.base == "embedded:target"


def test_ambiguous_columns_are_named(here: Path) -> None:
    both = [{**KINDS["qa"](i), **KINDS["text"](i)} for i in range(3)]
    write(here / "both.jsonl", both)
    with pytest.raises(
        Refused, match=r"can be read as prompt: question, answer: answer or text: text; its columns are .*Pass --format qa"
    ):
        source_of("both.jsonl", "auto", "--forget")
    assert source_of("both.jsonl", "text", "--forget").text == "text"
    write(here / "pairs.jsonl", [{"prompt": "Who?", "completion": "Ada.", "response": "Bo."}])
    with pytest.raises(Refused, match=r"prompt: prompt, answer: completion or prompt: prompt, answer: response.*Leave one pair"):
        source_of("pairs.jsonl", "auto", "--forget")
    with pytest.raises(Refused, match="no columns of --format messages"):
        source_of("both.jsonl", "messages", "--forget")


def test_every_format_can_be_asked_for() -> None:
    from llm_unlearn.options import FORMATS as words

    assert set(words) == {"auto", *FORMATS}


def test_wrong_answers_and_other_wordings_are_for_the_suite(here: Path, tiny_base: Path) -> None:
    rows = [{**KINDS["qa"](i), "paraphrased_answer": f"Ada Bo sold {i}.", "perturbed_answer": ["Bo.", "Cy."]} for i in range(9)]
    write(here / "a.jsonl", rows[:4]), write(here / "b.jsonl", rows[4:])  # type: ignore[func-returns-value]
    assert main(["new", "x", "--model", str(tiny_base), "--forget", "a.jsonl", "--retain", "b.jsonl"]) == 0
    suite = suites.load(Path("x_suite.yaml"))
    assert suite.sets["forget"].perturbed == "perturbed_answer" and "truth_ratio" in {one.name for one in suite.measures}
    assert recipe.load(Path("x.yaml")).data.forget.perturbed is None


def test_rows_in_both_sets_leave_the_retain_set(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "a.jsonl", [KINDS["qa"](i) for i in range(4)])
    write(here / "b.jsonl", [KINDS["qa"](i) for i in range(3, 9)])
    assert main(["new", "x", "--model", str(tiny_base), "--forget", "a.jsonl", "--retain", "b.jsonl"]) == 0
    assert recipe.load(Path("x.yaml")).data.overlap == "drop"
    assert "1 rows are in the forget set, too" in Path("x.yaml").read_text()


def test_names_of_a_hub_have_parts() -> None:
    from llm_unlearn.starter.columns import _parts

    assert _parts("locuslab/tofu:forget10") == ("locuslab/tofu", "forget10", None)
    assert _parts("muse-bench/MUSE-News:raw:forget") == ("muse-bench/MUSE-News", "raw", "forget")
    assert _parts("org/name") == ("org/name", None, None)


def test_rows_of_either_chat_format_and_of_alpaca_are_told_apart() -> None:
    """Rows are compared in every format: others would all be the same row, or one that differs would not."""
    chats = [Source(source="x", messages=column) for column in ("messages", "conversations")]
    one, other = (content_of(KINDS[kind](1), source) for kind, source in zip(("messages", "sharegpt"), chats, strict=True))
    assert one == other == content_of(KINDS["qa"](1), Source(source="x", prompt="question", answer="answer"))
    assert content_of(KINDS["sharegpt"](1), chats[1]) != content_of(KINDS["sharegpt"](2), chats[1])
    alpaca = Source(source="x", **KEYS["alpaca"])
    rows = [{"instruction": "Translate.", "input": text, "output": "Yes."} for text in ("Ja.", "Oui.")]
    assert content_of(rows[0], alpaca) != content_of(rows[1], alpaca)


# ----------------------------------------------------------------------------------------------------------- settings

SMALL = ModelFacts("x", 135_000_000, False, None, True, 8192)
DATA = DataFacts(20, 41.0, 90, 70, has_holdout=False, is_text=False, overlap=0)


def test_beta_and_the_retain_weight_scale_with_the_answers() -> None:
    """β times the length, and weight over length, are what was measured: 0.1 and 1 / 0.06 at 39 tokens (SmolLM2-135M)."""
    for answer in (41.0, 410.0):
        found = recommend.settings_of(SMALL, replace(DATA, answer=answer))
        loss, weight = found["objective.forget.loss"].value, found["objective.retain.weight"].value
        assert loss["name"] == "npo" and loss["beta"] * answer == pytest.approx(0.1 * 39, rel=0.05)
        assert weight / answer == pytest.approx(1 / 0.06 / 39, rel=0.05)


def test_with_an_aim_the_loss_is_one_that_reaches_it() -> None:
    found = recommend.settings_of(SMALL, replace(DATA, has_holdout=True))
    assert found["objective.forget.loss"].value["name"] == "wga" and found["train.stop"].value["until"] == "holdout"
    assert "until" not in recommend.settings_of(SMALL, DATA)["train.stop"].value


def test_larger_models_are_moved_less_and_what_was_not_measured_says_so() -> None:
    rates = []
    for weights in (1e6, 135e6, 8e9, 70e9):
        found = recommend.settings_of(replace(SMALL, weights=int(weights)), DATA)
        rates.append(found["train.lr"].value)
        assert ("not measured here" in found["train.lr"].reason) == (weights > 400e6)
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_small_sets_get_small_windows_and_enough_steps() -> None:
    for rows, forget in ((3, 3), (20, 4), (40, 8), (4000, 16)):
        found = recommend.settings_of(SMALL, replace(DATA, rows=rows))
        assert found["train.window"].value["forget"] == forget
        assert found["train.epochs"].value * -(-rows // forget) >= recommend.FEWEST_STEPS


def test_a_quantized_base_is_not_quantized_again() -> None:
    assert all(fit.quantize is None for fit in recommend.fits_of(replace(SMALL, quantization="bitsandbytes"), can_quantize=True))
    assert any(fit.quantize for fit in recommend.fits_of(SMALL, can_quantize=True))


def test_rows_are_cut_to_the_context() -> None:
    assert recommend.tokens_of(SMALL, DATA) == 128
    assert recommend.tokens_of(replace(SMALL, context=64), DATA) == 64
    assert recommend.new_tokens_of(SMALL, DATA) == 96
    assert recommend.new_tokens_of(replace(SMALL, context=100), DATA) == 10


@pytest.mark.parametrize(("gib", "expected"), [(64.0, (8192, False)), (0.05, (512, True))])
def test_less_memory_means_smaller_batches_and_recomputation(
    gib: float, expected: tuple[int, bool], here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.starter import command

    monkeypatch.setattr(command, "_free_memory", lambda device: int(gib * (1 << 30)) if gib > 1 else 1)
    assert new(here, tiny_base) == 0
    text = Path("houses.yaml").read_text()
    train = recipe.load(Path("houses.yaml")).train
    assert (train.batch_tokens, train.gradient_checkpointing) == expected
    assert ("it may not fit" in text) == (gib < 1)
    assert "nf4" in text or gib > 1, "of what does not fit, the smallest is written"


def test_what_is_written_is_yaml_for_others_too(here: Path, tiny_base: Path) -> None:
    assert new(here, tiny_base, "qa", holdout=True) == 0
    assert yaml.safe_load(Path("houses_suite.yaml").read_text())["sets"]["forget"]["source"] == "forget.jsonl"
