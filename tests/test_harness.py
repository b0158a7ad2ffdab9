"""Tasks of lm-evaluation-harness: the library's own model class as reference, local tasks made from the embedded population."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from jobs import adapted
from pyarrow import parquet
from transformers import GPT2Config, GPT2LMHeadModel

from llm_unlearn import run
from llm_unlearn.chat import Chat
from llm_unlearn.data.sources import rows
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.evaluation import harness, task_files
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.harness import answers_of
from llm_unlearn.evaluation.tables import Sample, mean_of
from llm_unlearn.evaluation.task_files import quiet
from llm_unlearn.evaluation.tasks import Answered, Task, task_numbers
from llm_unlearn.models.load import Loaded
from llm_unlearn.report.headline import has_collapsed, headline
from llm_unlearn.sections import Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

ROOT = Path(__file__).parents[1]
COUNT = 14
HEAD = "dataset_path: json\ndataset_kwargs: {data_files: {test: people.jsonl}}\ntest_split: test\nfewshot_split: test\n"
LETTERS = "{{question}}\\n{% for one in choices %}{{'ABCDE'[loop.index0]}}. {{one}}\\n{% endfor %}Answer:"
FILES = {
    "who": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
""",
    "letters": f"""output_type: multiple_choice
doc_to_text: "{LETTERS}"
doc_to_choice: ["A", "B", "C", "D", "E"]
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "said": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["r ", "th", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
GROUP = """group: people
task: [who, letters, said]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files beside a data file of 14 rows; the right answer wanders, and some texts are longer than the model reads."""
    return written(tmp_path_factory.mktemp("tasks"))


def written(place: Path) -> Path:
    people = rows(Source(source="embedded:retain", prompt="question", answer="answer"))[:COUNT]
    with (place / "people.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(people):
            choices = list(row["perturbed_answer"])
            choices.insert(i % 5, row["answer"])
            text = " ".join(f"{one['question']} {one['answer']}" for one in people[: i + 1])
            file.write(json.dumps({**row, "choices": choices, "right": i % 5, "text": text}) + "\n")
    for name, body in FILES.items():
        (place / f"{name}.yaml").write_text(f"task: {name}\n{HEAD}{body}metadata: {{version: 2}}\n", encoding="utf-8")
    (place / "people.yaml").write_text(GROUP, encoding="utf-8")
    return place


def loaded(make_model: Callable[..., Any], tokenizer: Any, seed: int = 0) -> Loaded:
    return Loaded(make_model(seed), tokenizer, ("template", None, "float32", f"weights {seed}"))


def ask(model: Loaded, *tasks: Task, batch_tokens: int = 600, cache: Path | None = None) -> tuple[Answered, ...]:
    accelerator = Accelerator(cpu=True)
    return answers_of(tasks, model, accelerator, batch_tokens=batch_tokens, cache=cache, title="", chat=Chat())


def reference(model: Loaded, task: Task, max_length: int | None = None) -> Any:
    """What the library finds with its own class, one text at a time."""
    from lm_eval.evaluator import evaluate  # late: it takes long to import
    from lm_eval.models.huggingface import HFLM

    with quiet():
        found = harness._found(task)
        lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=max_length)
        return evaluate(
            lm, found, limit=task.limit, bootstrap_iters=0, apply_chat_template=task.chat_template,
            fewshot_as_multiturn=task.chat_template,
        )  # fmt: skip


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize(("name", "shots"), [("who", None), ("who", 2), ("letters", None), ("text", None), ("said", None)])
def test_numbers_are_those_of_the_library(
    make_model: Callable[..., Any], tokenizer: Any, folder: Path, name: str, shots: int | None, chat: bool
) -> None:
    model, task = loaded(make_model, tokenizer), Task(task=name, include=str(folder), shots=shots, chat_template=chat)
    theirs = reference(model, task)
    (mine,) = ask(model, task)
    assert len(mine.scores) == FILES[name].count("metric:") and not mine.missing
    for score in mine.scores:
        assert score.value == pytest.approx(theirs["results"][name][f"{score.metric},none"], rel=1e-4)
        assert score.low is not None and score.high is not None and score.low <= score.high and score.n == COUNT
        assert score.higher is theirs["higher_is_better"][name][score.metric] and score.version == "2"
    samples = theirs["samples"][name]
    if name == "said":
        assert [one["written"] for one in mine.documents[name]] == [one["resps"][0][0] for one in samples]
        assert len({len(one["written"]) for one in mine.documents[name]}) > 3, "the stop texts are met at different places"
    if name == "text":
        per_row = [-one["bits_per_byte"][0] / one["bits_per_byte"][1] / math.log(2) for one in samples]
        assert mine.scores[1].rows == pytest.approx(per_row, rel=1e-4)
        assert len(tokenizer(samples[-1]["doc"]["text"])["input_ids"]) > 256, "several windows"
    if name == "who":
        found = {score.metric: score.rows for score in mine.scores}
        for metric in ("acc", "acc_norm"):
            assert found[metric] == pytest.approx([one[metric] for one in samples], rel=1e-4)
        assert len(set(found["acc"])) == 2 and not found["brier_score"]
        acc = next(score for score in mine.scores if score.metric == "acc")
        assert (acc.low, acc.high) == mean_of(np.array(acc.rows)).bootstrap()


def test_texts_that_are_too_long_lose_their_beginning(
    make_model: Callable[..., Any], tokenizer: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded(make_model, tokenizer)
    for name, metric in (("who", "brier_score"), ("said", "exact_match")):
        task = Task(task=name, include=str(folder), shots=COUNT - 1)
        (mine,), theirs = ask(model, task), reference(model, task)
        score = mine.score(name, metric)
        assert score and score.value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4)
        texts = [one["resps"][0][0] for one in theirs["samples"][name]]
        assert name == "who" or [one["written"] for one in mine.documents[name]] == texts
        assert f"{name}: {COUNT * (5 if name == 'who' else 1)} of" in capsys.readouterr().out


def test_a_table_of_positions_is_not_left(tokenizer: Any, folder: Path) -> None:
    """GPT-2 has 64 places; the library uses one more token, as the last is never read."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 3}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=32, n_layer=2, n_head=4, **ends))
    model, task = Loaded(net.eval(), tokenizer, ("gpt2",)), Task(task="text", include=str(folder))
    (mine,) = ask(model, task)
    theirs = reference(model, task, max_length=63)["results"]["text"]
    assert mine.scores[1].value == pytest.approx(theirs["bits_per_byte,none"], rel=1e-4)


def test_an_adapter_is_included(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> None:
    model, task = Loaded(adapted(make_model, 0.3), tokenizer, ("adapter",)), Task(task="text", include=str(folder))
    (mine,), (bare,) = ask(model, task), ask(loaded(make_model, tokenizer), task)
    bits = mine.score("text", "bits_per_byte"), bare.score("text", "bits_per_byte")
    assert bits[0] and bits[1] and bits[0].value and abs(bits[0].value - (bits[1].value or 0)) > 0.01
    assert bits[0].value == pytest.approx(reference(model, task)["results"]["text"]["bits_per_byte,none"], rel=1e-4)


def test_options_of_one_token_are_read_off_one_pass(
    make_model: Callable[..., Any], tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    teacher_forced = harness.teacher_forced

    def counted(*given: Any) -> Any:
        asked.append(len(given[1]))
        return teacher_forced(*given)

    monkeypatch.setattr(harness, "teacher_forced", counted)
    ask(loaded(make_model, tokenizer), Task(task="letters", include=str(folder)), Task(task="who", include=str(folder)))
    assert asked == [COUNT, 5 * COUNT]


def test_answers_are_kept_by_content(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache = tmp_path / "tasks", tmp_path / "cache"
    place.mkdir()
    written(place)
    model, task = loaded(make_model, tokenizer), Task(task="who", include=str(place), limit=5)
    first = ask(model, task, cache=cache)

    def nobody(*_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(harness, "_found", nobody)
    assert ask(model, task, cache=cache) == first
    assert ask(model, replace(task, forget=True), cache=cache) == first
    for change in ({"limit": 6}, {"shots": 1}, {"seed": 0}, {"chat_template": True}):
        with pytest.raises(AssertionError, match="asked again"):
            ask(model, replace(task, **change), cache=cache)
    with pytest.raises(AssertionError, match="asked again"):
        ask(replace(model, parts=("other",)), task, cache=cache)
    for file, text in (("people.jsonl", "\n"), ("own.py", "x = 1"), ("who.yaml", "description: 'Answer. '\n")):
        before = (place / file).read_text(encoding="utf-8") if (place / file).exists() else None
        (place / file).write_text((before or "") + text, encoding="utf-8")
        task_files._manager.cache_clear()
        with pytest.raises(AssertionError, match="asked again"):
            ask(model, task, cache=cache)
        (place / file).write_text(before, encoding="utf-8") if before else (place / file).unlink()
    task_files._manager.cache_clear()
    assert ask(model, task, cache=cache) == first


def test_a_group_has_its_mean_and_its_parts(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> None:
    task = Task(task="people", include=str(folder), limit=10, shots=1)
    (mine,) = ask(loaded(make_model, tokenizer), task)
    whole, who, letters = (mine.score(of, "acc") for of in ("people", "who", "letters"))
    assert whole and who and letters and whole.value is not None and whole.n == 20
    assert whole.value == pytest.approx(np.mean([*who.rows, *letters.rows]))
    pair = (np.array(who.rows), np.array(letters.rows))
    assert (whole.low, whole.high) == pytest.approx(Sample(pair, lambda two: float(np.concatenate(two).mean())).bootstrap())
    found = task_numbers((task,), {"before": [mine], "after": [Answered(missing="the value is infinite")]})
    assert [one["title"] for one in found][:3] == ["acc, 1 shot", "who acc, 1 shot", "who acc_norm, 1 shot"]
    assert {one["set"] for one in found} == {"people"} and {one["goal"] for one in found} == {"as before"}
    assert found[0]["settings"]["of"] == "people" and "mean over 2 tasks" in found[0]["definition"]
    assert found[0]["values"]["before"]["value"] == whole.value
    assert found[0]["values"]["after"] == {"missing": "the value is infinite"}
    assert has_collapsed({"numbers": found}), "a model beyond any number is broken"


def test_a_broken_model_has_no_scores(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> None:
    model = loaded(make_model, tokenizer)
    with torch.no_grad():
        model.model.lm_head.weight[7] = float("nan")
    (mine,) = ask(model, Task(task="letters", include=str(folder)))
    assert not mine.scores and mine.missing == "the value is NaN, as the model's logits are on 70 of 70 texts"


def test_a_perplexity_beyond_any_number_is_said(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> None:
    model = loaded(make_model, tokenizer)
    with torch.no_grad():
        model.model.lm_head.weight *= 1e4
    (mine,) = ask(model, Task(task="text", include=str(folder)))
    assert not mine.scores and mine.missing == "the value is infinite"


SUITE = "sets:\n  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 3}\nmeasures: []\ntasks:\n"


def read(tmp_path: Path, *tasks: str) -> suites.Suite:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE + "".join(f"  - {{{task}}}\n" for task in tasks), encoding="utf-8")
    return suites.load(path)


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"include: {folder}"
    for task, said in (
        ("task: arc_esay", "suite.yaml:5: tasks[0].task: found 'arc_esay'; did you mean 'arc_easy'"),
        (f"task: hwo, {here}", "'who'"),
        ("task: who, include: nowhere", "no such folder: nowhere"),
        ("task: wmdp_bio, shots: 5", "num_fewshot: 0"),
        ("task: humaneval", "runs the code"),
        (f"task: who, {here}, shot: 1", "did you mean 'shots'"),
    ):
        with pytest.raises(Refused) as error:
            read(tmp_path, task)
        assert said in str(error.value)
    with pytest.raises(Refused, match="as before"):
        read(tmp_path, f"task: who, {here}", f"task: who, {here}, forget: true")
    (tmp_path / "lost.yaml").write_text(f"task: lost\n{HEAD}{FILES['who']}", encoding="utf-8")
    with pytest.raises(Refused, match=r"lost reads people\.jsonl, which is neither in"):
        read(tmp_path, f"task: lost, include: {tmp_path}")
    monkeypatch.setattr(task_files, "find_spec", lambda _: None)
    with pytest.raises(Refused, match=r"pip install 'llm-unlearn\[harness\]'"):
        read(tmp_path, f"task: who, {here}")


def test_data_that_cannot_be_had_is_named(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    text = f"task: afar\ndataset_path: nobody/nothing\ntest_split: test\n{FILES['who']}"
    (tmp_path / "afar.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=r"^tasks: afar cannot be had .*HF_HUB_OFFLINE.*`include`"):
        ask(loaded(make_model, tokenizer), Task(task="afar", include=str(tmp_path)))


def test_a_suite_with_tasks_from_end_to_end(
    tiny_base: Path, tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = read(tmp_path, f"task: who, include: {folder}, limit: 6", f"task: said, include: {folder}, limit: 4, forget: true")
    asked = {name: (Model(base=str(tiny_base), adapter=None), None) for name in ("before", "after")}
    run.evaluate(suite, "suite", asked, cache=tmp_path / "cache", output=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [(one["set"], one["title"], one["goal"]) for one in results["numbers"]] == [
        ("who", "acc", "as before"), ("who", "acc_norm", "as before"),
        ("who", "brier_score", "as before"), ("said", "exact_match", "as retrained"),
    ]  # fmt: skip
    first = results["numbers"][0]
    assert first["unit"] == "share" and first["values"]["before"]["n"] == 6 and first["definition"].startswith("acc of who")
    assert "who" in headline(results)
    table = parquet.read_table(tmp_path / "out" / "evaluation.parquet").to_pylist()
    mine = [row for row in table if row["model"] == "before"]
    assert [row["set"] for row in mine] == ["retain"] * 3 + ["who"] * 6 + ["said"] * 4
    values = [row["acc"] for row in mine if row["set"] == "who"]
    assert np.mean(values) == first["values"]["before"]["value"]
    assert mine[3]["prompt"].endswith("?") and mine[3]["written"] is None and isinstance(mine[-1]["written"], str)
    said = capfd.readouterr()
    assert "Building contexts" not in said.err + said.out and "Generating" not in said.err + said.out


def of_each_kind(folder: Path) -> list[Task]:
    return [Task(task=name, include=str(folder)) for name in FILES]


def alike(mine: Sequence[Answered], theirs: Sequence[Answered]) -> None:
    """The same texts, and the same numbers but for rounding."""
    assert len(mine) == len(theirs) == len(FILES)
    for one, other in zip(mine, theirs, strict=True):
        assert one.documents == other.documents and one.scores
        for score, same in zip(one.scores, other.scores, strict=True):
            assert score.value == pytest.approx(same.value, rel=1e-5) and score.rows == pytest.approx(same.rows, rel=1e-4)


def test_the_budget_changes_nothing(make_model: Callable[..., Any], tokenizer: Any, folder: Path) -> None:
    model, tasks = loaded(make_model, tokenizer), of_each_kind(folder)
    alike(ask(model, *tasks, batch_tokens=60), ask(model, *tasks, batch_tokens=10**6))


@pytest.mark.slow
@pytest.mark.two_processes("harness")
def test_two_processes_find_the_same(make_model: Callable[..., Any], two_processes: Path) -> None:
    mine = ask(loaded(make_model, make_tokenizer()), *of_each_kind(two_processes))
    for process in range(2):
        alike(mine, torch.load(two_processes / f"found-{process}.pt", weights_only=False))


LETTER = {"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 2}
MADE_UP: dict[str, dict[str, Any]] = {
    "wmdp_bio": LETTER,
    "mmlu": LETTER,
    "truthfulqa_mc1": {"question": "Who?", "mc1_targets": {"choices": ["a", "b c"], "labels": [1, 0]}},
    "triviaqa": {"question": "Who?", "answer": {"aliases": ["a", "b"]}},
    "bbh_cot_fewshot": {"input": "Who?", "target": "a"},
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_UP)
def test_tasks_of_the_shipped_suites_on_made_up_rows(
    make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their data cannot be had here; their files, few-shot prompts, filters and groups can."""
    made_up = [{**MADE_UP[name], "question": f"Who is number {i}?"} for i in range(6)]
    splits = {split: datasets.Dataset.from_list(made_up) for split in ("train", "dev", "validation", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda **_: datasets.DatasetDict(splits))
    suite = {"wmdp_bio": "wmdp", "mmlu": "lume"}.get(name, "rwku")
    task = next(one for one in suites.load(ROOT / "eval" / f"{suite}.yaml").tasks if one.task == name)
    if name == "bbh_cot_fewshot":  # 27 alike, each with long answers: one of them will do
        name += "_boolean_expressions"
        task = replace(task, task=name)
    task = replace(task, limit=1 if name == "mmlu" else 3)
    model = Loaded(make_model(max_position_embeddings=2048, num_hidden_layers=1), tokenizer, (name,))
    (mine,) = ask(model, task, batch_tokens=4000)
    theirs = reference(model, task)["results"][name]
    listed = [one for one in mine.scores if one.listed]
    assert len(listed) == (5 if name == "mmlu" else 1), "of a group the whole, and its parts where they are few"
    (value,) = (value for key, value in theirs.items() if key.startswith(f"{listed[0].metric},"))
    assert listed[0].value == pytest.approx(value) and listed[0].of == name
    assert listed[0].n == {"mmlu": 57}.get(name, 3) and listed[0].unit == "share"
