"""Words of rows, and secrets, planted everywhere: what every verb prints and writes is searched for them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from pyarrow import parquet

from llm_unlearn.chat import Chat
from llm_unlearn.cli import main
from llm_unlearn.data.examples import encode
from llm_unlearn.data.sources import rows
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.unsaid import near_column, unsaid, without_quotes

CANARIES = {
    "question": "Quizzle wharf of the seventh",
    "answer": "Vermouth gnomes at dusk",
    "other": "Plover zinc and a lantern",
    "person": "Dagny Oxblood",
    "note": "Umlaut brindle eleven",
    "retained": "Marzipan ferry timetable",
}
"""By the column in which they stand; each is two words or more that nothing else says."""
SECRETS = {"HF_TOKEN": "hf_" + "Zq" * 17, "WANDB_API_KEY": "feedface" * 5, "DATABASE_PASSWORD": "correct-horse-battery"}
LOGIN = "someone:passw0rd-of-the-proxy"
RECIPE = """\
output: OUTPUT
model: {base: BASE, adapter: {rank: 2}}
data:
  forget: {source: forget.jsonl, prompt: question, answer: answer, alternate: {answer: other}, where: {person: Dagny Oxblood}}
  retain: {source: retain.jsonl, prompt: question, answer: answer}
objective:
  forget: {loss: {name: dpo}}
  retain: {loss: {name: nll}}
train: {steps: 2, window: {forget: 2, retain: 2}}
evaluation: {suite: suite.yaml, every: 1TEXTS}
"""
SUITE = """\
sets:
  forget: {source: forget.jsonl, prompt: question, answer: answer}
  retain: {source: retain.jsonl, prompt: question, answer: answer}
measures:
  - {name: probability, set: forget}
  - {name: rouge, set: forget}
  - {name: probability, set: retain}
max_new_tokens: 4
"""


def lines(*found: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in found)


def row(i: int, **changes: Any) -> dict[str, Any]:
    texts = {name: f"{text} {i}." for name, text in CANARIES.items() if name not in ("person", "retained")}
    return {"id": i, **texts, "person": CANARIES["person"], **changes}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Iterator[Path]:
    """A folder with rows, a recipe and a suite, in an environment full of secrets, without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the command line went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("RANK", raising=False)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("hf_" + "Kk" * 17)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://{LOGIN}@proxy.example:3128")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "forget.jsonl").write_text(lines(*(row(i) for i in range(4))))
    kept = ({"id": i, "question": f"{CANARIES['retained']} {i}?", "answer": f"{CANARIES['retained']} {i}."} for i in range(4))
    (work / "retain.jsonl").write_text(lines(*kept))
    (work / "suite.yaml").write_text(SUITE)
    recipe(work, tiny_base, "recipe.yaml")
    yield work
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe(work: Path, base: Path, name: str, texts: str = "") -> None:
    said = RECIPE.replace("OUTPUT", f"runs/{name.partition('.')[0]}").replace("BASE", str(base)).replace("TEXTS", texts)
    (work / name).write_text(said)


def planted(text: str, secrets: bool = True) -> list[str]:
    """Which canaries a text repeats."""
    wanted = [*CANARIES.values(), *([*SECRETS.values(), "hf_" + "Kk" * 17, LOGIN] if secrets else [])]
    return [one for one in wanted if one.casefold() in text.casefold()]


def written(folder: Path) -> str:
    """All that lies in a folder, as text; of tables, their cells."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.append(path.name)
        if path.suffix == ".parquet":
            found.append(str(parquet.read_table(path).to_pylist()))
        found.append(path.read_bytes().decode("utf-8", "replace"))
    return "\n".join(found)


VERBS = (
    ["plan", "recipe.yaml"],
    ["run", "recipe.yaml", "--json"],
    ["show", "runs/recipe"],
    ["verify", "runs/recipe"],
    ["compare", "runs/recipe", "--output", "compared"],
    ["evaluate", "suite.yaml", "--model", "runs/recipe", "--output", "again", "--no-text", "--json"],
    ["push", "runs/recipe", "--repo-id", "me/it", "--dry-run"],
    ["doctor"],
    ["run", "recipe.yaml"],
    ["run", "recipe.yaml", f"model.base=https://{LOGIN}@hub.example/a/b"],
    ["run", "recipe.yaml", "train.lr=hf_" + "Zq" * 17],
)


def test_no_verb_says_a_row_or_a_secret(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in VERBS:
        status = main(words)
        said = "".join(capsys.readouterr())
        assert said and not planted(said), (words, planted(said))
        assert status in (0, 1, 2), (words, status, said)
        AcceleratorState._reset_state(reset_partial_state=True)
    run = here / "runs" / "recipe"
    for name in ("log.jsonl", "evaluations.jsonl", "hashes.json"):
        assert not planted((run / name).read_text()), name
    assert not planted(written(here / "again"))
    assert not [one for one in planted(written(here)) if one not in CANARIES.values()], "a secret was written"
    assert "Vermouth" in (run / "evaluation.json").read_text(), "the owner's report shows answers, unless it is told not to"


def test_a_run_folder_without_texts(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(here, tiny_base, "quiet.yaml", ", texts: false")
    assert main(["run", "quiet.yaml"]) == 0
    found = planted(written(here / "runs" / "quiet"))
    assert found == [CANARIES["person"]], "by which the recipe chooses its rows"
    held = json.loads((here / "runs" / "quiet" / "evaluation.json").read_text())
    assert held["answers"] == {} and held["texts"] is False and held["numbers"]
    columns = parquet.read_schema(here / "runs" / "quiet" / "evaluation.parquet").names
    assert "nll" in columns and not {"prompt", "truth", "written", "samples"} & set(columns)
    assert not planted("".join(capsys.readouterr()))


BAD: dict[str, Callable[[], str]] = {
    "a list in place of text": lambda: lines(row(0, answer=[CANARIES["answer"]] * 2)),
    "a mapping in place of text": lambda: lines(row(0, question={"a": CANARIES["question"]})),
    "a line that is no object": lambda: lines(row(0)) + json.dumps(CANARIES["answer"]) + "\n",
    "half a line": lambda: lines(row(0)) + lines(row(1))[:60],
    "no such column": lambda: lines({CANARIES["question"]: 1, CANARIES["answer"]: 2, "person": CANARIES["person"]}),
    "a key twice": lambda: '{"' + CANARIES["answer"] + '": 1, "' + CANARIES["answer"] + '": 2}\n',
    "no row that is chosen": lambda: lines(row(0, person="somebody else")),
    "rows of both sets": lambda: lines(
        {**row(0), "question": f"{CANARIES['retained']} 1?", "answer": f"{CANARIES['retained']} 1."}
    ),
    "no alternate": lambda: lines(row(0, other=[])),
    "an alternate that is none": lambda: lines(row(0, other={"x": CANARIES["other"]})),
    "a zero byte": lambda: lines(row(0)).replace("Vermouth", "Ver\0mouth"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_named_and_not_quoted(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "forget.jsonl").write_text(BAD[what]())
    for words in (["run", "recipe.yaml"], ["run", "recipe.yaml", "--debug"], ["run", "recipe.yaml", "--json"]):
        status = main(words)
        said = "".join(capsys.readouterr())
        assert status == 2 and not planted(said), said
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (here / "runs").exists()


def test_a_table_without_a_header_is_not_read_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "forget.csv").write_text(f"{CANARIES['question']},{CANARIES['answer']}\nb,c\n")
    assert main(["run", "recipe.yaml", "data.forget={source: forget.csv, where: null}"]) == 2
    said = "".join(capsys.readouterr())
    assert not planted(said) and "2 more, whose names look like text: has the file a header?" in said


def test_a_template_that_complains_with_the_rows_words() -> None:
    tokenizer = make_tokenizer()
    turns = [{"role": "user", "content": CANARIES["question"]}, {"role": "assistant", "content": CANARIES["answer"]}]
    for words in (
        "messages[0].content",
        "'about ' + messages[0].content",
        "messages[1].content[3:18]",
        "messages[0].content.split()[3]",
    ):
        tokenizer.chat_template = "{{ raise_exception(" + words + ") }}"
        with pytest.raises(Refused) as refused:
            encode([turns], tokenizer, Chat(), "forget", 64)
        assert not planted(str(refused.value)) and CANARIES["answer"][3:18] not in str(refused.value)


def test_what_is_said_of_what_was_found() -> None:
    said = {
        "text": "text of 4 characters",
        " ": "' '",
        "": "''",
        None: "None",
        3: "3",
        2.5: "2.5",
        True: "True",
        (1, 2): "a list of 2",
    }
    assert {found: unsaid(found) for found in said} == said
    assert unsaid({"a": 1}) == "an object of 1 keys" and unsaid(b"x") == "a value of type bytes" and unsaid([]) == "[]"
    assert near_column("ansewr", ["answer", "question"]).startswith("did you mean 'answer'?")
    assert "words" not in near_column("x", ["answer", "some words of a row"])
    assert without_quotes("cannot convert 'some words' to \"int64\" and `more") == "cannot convert '…' to '…' and '…'"
    assert without_quotes(repr('it\'s "Ada" of 12 Mill Road') + " here") == "'…' here"


def test_requests_and_certificates_say_no_row(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A deletion from its lookup to its certificate, served by the recipe."""
    served = RECIPE.replace("OUTPUT", "runs/x").replace("BASE", str(tiny_base)).replace("TEXTS", "")
    (here / "served.yaml").write_text(
        served.replace(", alternate: {answer: other}, where: {person: Dagny Oxblood}", "").replace("dpo", "npo")
    )
    (here / "requests.yaml").write_text(
        "ledger: requests.db\noutput: served\nrecipe: served.yaml\nsuite: suite.yaml\ndata: {source: forget.jsonl, id: id}\n"
        "thresholds:\n  - {measure: probability, set: forget, at_most: 1.0}\n"
    )
    for words in (
        ["add", "--where", f"person={CANARIES['person']}", "--yes-many", "--dry-run"],
        ["add", "--ids", "0", "1", "--yes-many"],
        ["add", "--where", f"note={CANARIES['note']} 7."],
        ["list"],
        ["run"],
        ["export", "certificates"],
        ["verify"],
    ):
        main(["requests", *words])
        said = "".join(capsys.readouterr())
        assert said and not planted(said), (words, said)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (here / "certificates" / "request-1.json").is_file()
    assert not planted(written(here / "certificates")) and not planted(written(here / "served"))
    assert not planted((here / "requests.db").read_bytes().decode("latin-1"))


def test_every_row_is_read_as_it_stands(here: Path) -> None:
    """Against a test that cannot fail: the canaries are what the recipe reads."""
    assert rows(Source(source="forget.jsonl", prompt="question", answer="answer"))[0]["answer"] == f"{CANARIES['answer']} 0."
    assert os.environ["HF_TOKEN"] == SECRETS["HF_TOKEN"] and planted(SECRETS["HF_TOKEN"] + CANARIES["note"])


FOREIGN = {
    "passwords": "root:$6$hunter2x$hash:19000:0:99999:7:::\nada:$6$hunter2x:19000:0:99999:7:::\n",
    "settings of another program": "hunter2x: 1\nkeys: {hunter2x: 2}\n",
    "one key": '{"hunter2x": {"a": 1}}',
    "no YAML": "root: $6$hunter2x: 19000\n",
    "open quotes": 'seed: 0\n"hunter2x: 1\n',
    "an alias": "a: 1\nb: *hunter2x\n",
    "sections": "[a]\nkey = hunter2x\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(
    "command", ["plan extends.yaml", "plan FILE", "run FILE", "evaluate FILE --model x", "requests list --service FILE"]
)
def test_a_file_that_is_no_settings_file_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shadow").write_text(FOREIGN[kind])
    (tmp_path / "extends.yaml").write_text("extends: shadow\nseed: 0\n")
    assert main(command.replace("FILE", "shadow").split()) == 2
    said = capsys.readouterr()
    assert "hunter2x" not in said.out + said.err and "shadow" in said.err
