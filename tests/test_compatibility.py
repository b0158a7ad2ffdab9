"""A suite and a retrained model fit a recipe, or are refused: compared by rows, tokenizers and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn import recipe
from llm_unlearn.cli import main
from llm_unlearn.compatibility import checks
from llm_unlearn.compatibility.models import Architecture, check_retrained
from llm_unlearn.compatibility.rows import fit_of
from llm_unlearn.embedded import population
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

CUSTOMERS = [(f"Which plan does customer {i} have?", f"Customer {i} has the {plan} plan.") for i, plan in enumerate("ABCDEFGH")]
ROWS = {"forget": CUSTOMERS[:4], "retain": CUSTOMERS[4:]}
SOURCE = "{{source: {}, prompt: question, answer: answer}}"


def write(folder: Path, name: str, pairs: Sequence[tuple[str, str]]) -> str:
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs)
    (folder / name).write_text("\n".join(lines) + "\n")
    return SOURCE.format(folder / name)


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Path:
    """A recipe on customers, and their rows."""
    sources = {name: write(tmp_path, f"{name}.jsonl", pairs) for name, pairs in ROWS.items()}
    (tmp_path / "r.yaml").write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{base: {tiny_base}}}\n"
        f"data:\n  forget: {sources['forget']}\n  retain: {sources['retain']}\n"
        "objective:\n  forget: {loss: {name: npo}}\n  retain: {loss: {name: nll}}\ntrain: {steps: 1}\nevaluation: suite.yaml\n"
    )
    suite_in(tmp_path, own(tmp_path))
    return tmp_path


def suite_in(place: Path, sets: Mapping[str, str], more: str = "") -> suites.Suite:
    body = "".join(f"  {name}: {source}\n" for name, source in sets.items())
    measures = "".join(f"  - {{name: probability, set: {name}}}\n" for name in sets)
    (place / "suite.yaml").write_text(f"sets:\n{body}measures:\n{measures}{more}")
    return suites.load(place / "suite.yaml")


def own(place: Path) -> dict[str, str]:
    return {name: SOURCE.format(place / f"{name}.jsonl") for name in ROWS}


def problems(place: Path, sets: Mapping[str, str], more: str = "", *overrides: str) -> list[str]:
    return fit_of(recipe.load(place / "r.yaml", overrides), suite_in(place, sets, more), "suite.yaml").problems


def test_the_quick_suite_on_rows_of_ones_own_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made-up people are measured while customers are forgotten: by plan, run and sweep alike, and nothing is written."""
    for words in (["plan"], ["run"], ["sweep", "train.lr=1e-3,1e-4", "--output", str(place / "sweep")]):
        command = [words[0], str(place / "r.yaml"), *words[1:], *([] if words[0] == "sweep" else ["evaluation=eval/quick.yaml"])]
        command += ["--suite", "eval/quick.yaml"] if words[0] == "sweep" else []
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "asks about made-up people (embedded:…), and the recipe forgets rows of" in said, said
        assert "llm-unlearn new NAME --model" in said and "--retain" in said
    assert {one.name for one in place.iterdir()} == {"forget.jsonl", "retain.jsonl", "r.yaml", "suite.yaml"}


def test_a_bench_leaves_out_recipes_that_the_suite_does_not_measure(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "methods").mkdir()
    (place / "methods" / "customers.yaml").write_text(
        "# One.\n" + (place / "r.yaml").read_text().replace("suite.yaml", "eval/quick.yaml")
    )
    words = ["bench", str(place / "methods"), "--suite", "eval/quick.yaml", "--output", str(place / "bench")]
    assert main(words) == 2
    assert "every recipe forgets other rows than it asks about (customers)" in capsys.readouterr().err
    assert not (place / "bench").exists()


def test_other_sets_and_part_of_the_rows_fit(place: Path) -> None:
    sets = own(place)
    assert not problems(place, sets)
    assert not problems(place, {**sets, "forget": sets["forget"].replace("}", ", limit: 2}")})
    world = write(place, "world.jsonl", [("What is the capital of France?", "Paris.")])
    assert not problems(place, {**sets, "world_facts": world, "holdout": world})
    assert not problems(place, {"world_facts": world}), "a suite may ask about neither"


def test_reworded_rows_fit(place: Path) -> None:
    reworded = write(place, "other.jsonl", [("Tell me the plan of customer 1.", ROWS["forget"][1][1])])
    asked = write(place, "asked.jsonl", [(ROWS["forget"][0][0], "Plan A, if you ask me.")])
    for source in (reworded, asked):
        assert not problems(place, {**own(place), "forget": source})


def test_chats_are_compared_with_questions_and_answers(place: Path) -> None:
    turns = [
        {"turns": [{"role": role, "content": text} for role, text in (("system", "Help."), ("user", q), ("assistant", a))]}
        for q, a in ROWS["forget"]
    ]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, turns)) + "\n")
    assert not problems(place, {**own(place), "forget": f"{{source: {place / 'chats.jsonl'}, messages: turns}}"})


def test_rows_of_somebody_else_are_refused_unless_they_are_probes(place: Path) -> None:
    other = write(place, "other.jsonl", [("Who wrote the report on tides?", "It was written by Ada Bo.")])
    (said,) = problems(place, {**own(place), "forget": other})
    assert said.startswith("suite.yaml: sets.forget: none of its rows is in") and "probes: true" in said
    (said,) = problems(place, {**own(place), "retain": other})
    assert said.startswith("suite.yaml: sets.retain: none of its rows is in") and "any other name" in said
    assert not problems(place, {**own(place), "forget": other}, "probes: true\n")


def test_rows_that_the_recipe_keeps_are_not_measured_as_forgotten(place: Path) -> None:
    everybody = write(place, "all.jsonl", CUSTOMERS)
    for more in ("", "probes: true\n"):
        (said,) = problems(place, {**own(place), "forget": everybody}, more)
        assert "sets.forget: 4 of 8 rows are in the recipe's retain set" in said
        (said,) = problems(place, {**own(place), "retain": everybody}, more)
        assert "sets.retain: 4 of 8 rows are in the recipe's forget set" in said


def test_rows_beside_the_recipes_are_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = ("Which plan does customer 99 have?", "Customer 99 has the Z plan.")
    suite_in(place, {**own(place), "forget": write(place, "more.jsonl", [*ROWS["forget"], stranger])})
    assert main(["plan", str(place / "r.yaml")]) == 0
    assert "note       1 of 5 rows of sets.forget are not in the recipe's forget set" in capsys.readouterr().out


def test_running_text_is_compared_by_its_passages(place: Path) -> None:
    """Cut at other places it is the same text; questions about it are not compared with it."""
    text = " ".join(f"On day {i} the ship sailed {i * i} miles to the north of island {i % 7}." for i in range(60))
    for name, texts in {
        "book": [text],
        "pieces": [text[i : i + 700] for i in range(350, len(text), 700)],
        "other": [text[::-1]],
    }.items():
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts) + "\n")
    book, pieces, other = (f"{{source: {place / name}.jsonl, text: text}}" for name in ("book", "pieces", "other"))
    change = f'data.forget={{"source": "{place}/book.jsonl", "text": "text", "prompt": null, "answer": null}}'
    sets = own(place)
    for forget in (book, pieces, sets["forget"]):
        assert not problems(place, {**sets, "forget": forget}, "", change)
    (said,) = problems(place, {**sets, "forget": other}, "", change)
    assert "sets.forget: none of its rows is in" in said


def test_copies_of_the_made_up_people_fit_their_suite(place: Path) -> None:
    """A user's model may have learned them: rows decide, not names."""
    for name in ROWS:
        write(place, f"{name}.jsonl", [(row["question"], row["answer"]) for row in population.rows(name)])
    quick = suites.load(Path("eval/quick.yaml"))
    assert not fit_of(recipe.load(place / "r.yaml"), quick, "eval/quick.yaml").problems


# ------------------------------------------------------------------------------------------------------------- models


def test_a_retrained_model_of_another_tokenizer_is_refused(
    place: Path, tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path_factory.mktemp("other")
    make_model(hidden_size=64, vocabulary=512).save_pretrained(other)
    bytes_only().save_pretrained(other)
    suite_in(place, own(place), f"retrained: {other}\n")
    for verb in ("plan", "run"):
        assert main([verb, str(place / "r.yaml")]) == 2
        said = capsys.readouterr().err
        assert f"{place / 'r.yaml'}: evaluation.suite: retrained: {other} has another tokenizer than" in said, said
    assert not (place / "run").exists()
    base = recipe.load(place / "r.yaml").model.base
    assert main(["evaluate", str(place / "suite.yaml"), "--model", base]) == 2
    assert "has another tokenizer than" in capsys.readouterr().err


def test_a_retrained_model_of_another_shape_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """embedded:retrained has the tokenizer of the tiny model, and twice its layers; none of it is trained to say so."""
    suite_in(place, own(place), "retrained: embedded:retrained\n")
    assert main(["plan", str(place / "r.yaml")]) == 2
    assert "embedded:retrained is a llama with 4 layers of 128, and" in capsys.readouterr().err


def test_a_tokenizer_with_more_added_tokens_fits(tokenizer: Any, tiny_base: Path, make_model: Callable[..., Any]) -> None:
    import copy

    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<|tool|>", "<|think|>"])
    config = make_model(hidden_size=64).config
    original, retrained = Architecture("a", tokenizer, config), Architecture("b", longer, config)
    check_retrained(original, retrained, ["Who is Ada?"], "x")
    longer.add_tokens(["Who is"])
    with pytest.raises(Refused, match="another tokenizer"):
        check_retrained(original, retrained, ["Who is Ada?"], "x")


def test_stopping_at_the_retrained_model_needs_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_in(place, own(place))
    assert main(["plan", str(place / "r.yaml"), "train.stop={until: retrained}"]) == 2
    assert "train.stop.until: compares with the retrained model" in capsys.readouterr().err


def test_a_retrained_model_with_another_chat_template_is_no_aim(
    place: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    import copy

    control = place / "control"
    make_model(seed=1, hidden_size=64).save_pretrained(control)
    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    spoken.save_pretrained(control)
    wanted = suite_in(place, own(place), f"retrained: {control}\n")
    checks.check(recipe.load(place / "r.yaml"), wanted, "suite.yaml", str(control), "r.yaml", place)
    with pytest.raises(Refused, match=r"r\.yaml: train\.stop\.until: .* another chat template"):
        checks.check(
            recipe.load(place / "r.yaml", ["train.stop={until: retrained}"]), wanted, "suite.yaml", str(control), "r.yaml", place
        )  # fmt: skip


def test_evaluate_asks_the_run_what_was_forgotten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "finished"
    (run / "adapter").mkdir(parents=True)
    (run / "recipe.yaml").write_text((place / "r.yaml").read_text())
    base = recipe.load(place / "r.yaml").model.base
    words = ["evaluate", "eval/quick.yaml", "retrained=null", "--model", base, "--adapter", str(run)]
    assert main(words) == 2
    assert f"{run}: eval/quick.yaml: sets.forget, sets.retain" in capsys.readouterr().err


def bytes_only() -> Any:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE({one: i for i, one in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="A", eos_token="B")


def test_the_embedded_models_are_compared_without_being_trained(tmp_path: Path) -> None:
    from llm_unlearn.compatibility.models import architecture_of

    assert architecture_of(Model(base="embedded:target"), tmp_path).shape == ("llama", 4, 128)
