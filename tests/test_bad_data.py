"""Bad data: files of every format that are not what they say, and rows that are not what is asked for. Each is refused with file
and row, and what is read is what the file says."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import content, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_unlearn.data.reading import read_examples
from llm_unlearn.data.sources import read, rows
from llm_unlearn.evaluation.sets import encode_set
from llm_unlearn.exact.rows import identified
from llm_unlearn.methods.exact import Sisa
from llm_unlearn.requests.matching import read_training
from llm_unlearn.sections import Data
from llm_unlearn.source import Alternate, Source

always = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=150)
GOOD = '{"question": "Who?", "answer": "Ada."}\n'
PAIR = {"prompt": "question", "answer": "answer"}


def row(answer: str, question: str = '"x"') -> bytes:
    """Two good rows, with one between them that holds this, as JSON."""
    return f'{GOOD}{{"question": {question}, "answer": {answer}}}\n{GOOD}'.encode()


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


WHOLE = parquet(question=[f"Who is {i}?" for i in range(50)], answer=["Ada."] * 50)
TEXTS, TEXT = "expected text", "expected one text"
EMPTY = "has no rows; expected at least one"
FILES: dict[str, tuple[bytes, str]] = {
    # nothing in it
    "empty.jsonl": (b"", EMPTY),
    "empty.json": (b"", EMPTY),
    "blank.json": (b" \n ", EMPTY),
    "list.json": (b"[]", EMPTY),
    "empty.csv": (b"", EMPTY),
    "header.csv": (b"question,answer\n", EMPTY),
    "empty.parquet": (b"", EMPTY),
    "no_rows.parquet": (parquet(question=pa.array([], pa.string()), answer=pa.array([], pa.string())), EMPTY),
    # no rows
    "null.json": (b"null", "row 1: found None; expected a row such as"),
    "number.json": (b"3", "row 1: found 3; expected a row"),
    "text.json": (b'"x"', "row 1: found text of 1 characters; expected a row"),
    "object.json": (b"{}", "row 1: found {}; expected a row"),
    "numbers.json": (b"[1, 2]", "row 1: found 1; expected a row"),
    "lists.json": (b'[["a", "b"]]', "row 1: found a list of 2; expected a row"),
    "number.jsonl": (f"{GOOD}3\n".encode(), "number.jsonl:2: found 3; expected a row"),
    "null.jsonl": (f"{GOOD}\nnull\n".encode(), "null.jsonl:3: found None"),
    "list.jsonl": (f"{GOOD}[1]\n".encode(), "list.jsonl:2: found a list of 1"),
    "columns.json": (
        b'{"question": ["a", "b"], "answer": ["c", "d"]}',
        "row 1: column 'question' holds a list of 2; expected one text",
    ),
    # broken
    "cut.jsonl": ((GOOD * 3)[:-10].encode(), "cut.jsonl:3: not a line of JSON (Expecting"),
    "cut.json": (b'[{"question": "x"', "cut.json:1: not JSON (Expecting"),
    "oops.jsonl": (f"{GOOD}{{oops}}\n{GOOD}".encode(), "oops.jsonl:2: not a line of JSON (Expecting property name"),
    "comma.json": (f"[{GOOD},]".encode(), "comma.json:2: not JSON (Expecting value"),
    "behind.json": (f"[{GOOD}]\n{GOOD}{GOOD}".encode(), "behind.json:"),
    "twice.jsonl": (row('"y", "question": "z"'), "twice.jsonl:2: not a line of JSON ('question' is written twice)"),
    "deep.jsonl": (row("[" * 5000 + "]" * 5000), "deep.jsonl:2: not a line of JSON (lists and objects too deep"),
    "deep.json": (
        b"[" + row("[" * 5000 + "]" * 5000).splitlines()[1] + b"]",
        "deep.json: not JSON that can be read (lists",
    ),
    "digits.jsonl": (row("9" * 5000), "digits.jsonl:2: not a line of JSON (Exceeds the limit"),
    "zeros.jsonl": (bytes(100), "zeros.jsonl:1: found a zero byte (byte 0); expected text in UTF-8"),
    "zero.csv": (b"question,answer\na\0,b\n", "zero.csv:2: found a zero byte"),
    "zero.txt": (b"a\0b", "zero.txt:1: found a zero byte"),
    "half.jsonl": (row('"A\\ud800da"'), "half.jsonl:2: not a line of JSON (it holds '\\ud800', half a character)"),
    "gzip.jsonl": (gzip.compress(GOOD.encode()), "found a gzip file; expected jsonl as text. Unpack it"),
    "gzip.csv": (gzip.compress(b"question,answer\na,b\n"), "found a gzip file; expected csv"),
    "zip.json": (b"PK\x03\x04" + bytes(50), "found a zip file; expected json"),
    "xz.txt": (b"\xfd7zXZ\0" + bytes(9), "found a xz file; expected txt"),
    "parquet.jsonl": (WHOLE, "found a Parquet file; expected jsonl"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "found text in UTF-16; expected UTF-8"),
    "utf16.csv": ("question,answer\na,b\n".encode("utf-16"), "found text in UTF-16; expected UTF-8"),
    "utf16_be.txt": (b"\xfe\xff\0h\0i", "found text in UTF-16"),
    "latin.jsonl": (GOOD.encode() + GOOD.replace("W", "é").encode("latin-1"), "latin.jsonl:2: not text in UTF-8"),
    "latin.csv": ("question,answer\né,b\n".encode("latin-1"), "latin.csv:2: not text in UTF-8"),
    "latin.txt": ("né".encode("latin-1"), "latin.txt:1: not text in UTF-8"),
    "binary.jsonl": (bytes(range(1, 256)), "binary.jsonl:1: not a line of JSON"),
    "page.jsonl": (b"<!DOCTYPE html><html></html>", "page.jsonl:1: not a line of JSON"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer.jsonl:1: not a line of JSON"),
    # CSV
    "short.csv": (b"question,answer\na,b\nc\n", "short.csv:3: row 2 has 1 values, and the header 2"),
    "long.csv": (b"question,answer\na,b,c\nd,e,f\n", "long.csv:2: row 1 has 3 values, and the header 2; put text with commas"),
    "quote.csv": (b'question,answer\n"a,b\n', "quote.csv:2: not CSV (unexpected end of data)"),
    "inner_quote.csv": (b'question,answer\n"a"b,c\n', "inner_quote.csv:2: not CSV ("),
    "semicolon.csv": (
        b"question;answer\na;b\n",
        "prompt names column 'question', which is not there; did you mean 'question;answer'?",
    ),
    "no_header.csv": (b"What?,This.\nWho?,Ada.\n", "prompt names column 'question', which is not there; "),
    "twice.csv": (b"question,question,answer\na,b,c\n", "twice.csv:1: the header names column 'question' twice"),
    "cell.csv": (b"question,answer\na,b\nc,\n", f"row 2: column 'answer' holds None; {TEXTS}"),
    "numbers.csv": (b"question,answer\na,true\nb,false\n", f"row 1: column 'answer' holds True; {TEXTS}"),
    # Parquet
    "cut.parquet": (WHOLE[:-20], "cannot be read as a data set (ArrowInvalid: "),
    "half.parquet": (WHOLE[: len(WHOLE) // 2], "cannot be read as a data set (ArrowInvalid: "),
    "head.parquet": (WHOLE[:8], "cannot be read as a data set (ArrowInvalid: "),
    "noise.parquet": (b"PAR1" + bytes(100) + b"PAR1", "cannot be read as a data set ("),
    "text.parquet": (GOOD.encode(), "cannot be read as a data set (ArrowInvalid: "),
    "bytes.parquet": (
        parquet(question=[b"\xff\xfe"], answer=[b"x"]),
        f"row 1: column 'question' holds a value of type bytes; {TEXTS}",
    ),
    "nan.parquet": (parquet(question=["a"], answer=[float("nan")]), f"row 1: column 'answer' holds nan; {TEXTS}"),
    "nulls.parquet": (parquet(question=["a"], answer=pa.array([None], pa.null())), f"row 1: column 'answer' holds None; {TEXTS}"),
    "time.parquet": (
        parquet(question=["a"], answer=pa.array([1], pa.timestamp("s"))),
        "row 1: column 'answer' holds a value",
    ),
    "lists.parquet": (parquet(question=["a"], answer=[["x", "y"]]), "row 1: column 'answer' holds a list of 2; expected one text"),
    "other.parquet": (parquet(x=[1]), "prompt names column 'question', which is not there; Valid: x"),
    # rows
    "no_column.jsonl": (b'{"q": "x", "answer": "y"}\n', "prompt names column 'question', which is not there; Valid: q, answer"),
    "later.jsonl": (f'{GOOD}{{"question": "x"}}\n'.encode(), f"row 2: column 'answer' holds None; {TEXTS}"),
    "first.jsonl": (f'{{"question": "x"}}\n{GOOD}'.encode(), f"row 1: column 'answer' holds None; {TEXTS}"),
    "none.jsonl": (row("null"), f"row 2: column 'answer' holds None; {TEXTS}"),
    "no_text.jsonl": (row('""'), f"row 2: column 'answer' holds ''; {TEXTS}"),
    "white.jsonl": (row('" \\n\\t"'), f"row 2: column 'answer' holds ' \\n\\t'; {TEXTS}"),
    "integer.jsonl": (row("true"), f"row 2: column 'answer' holds True; {TEXTS}"),
    "nan.jsonl": (row("NaN"), f"row 2: column 'answer' holds nan; {TEXTS}"),
    "infinity.jsonl": (row("-Infinity"), f"row 2: column 'answer' holds -inf; {TEXTS}"),
    "true.jsonl": (row("true"), f"row 2: column 'answer' holds True; {TEXTS}"),
    "texts.jsonl": (row('["a", "b"]'), "row 2: column 'answer' holds a list of 2; expected one text"),
    "mapping.jsonl": (row('{"text": "a"}'), f"row 2: column 'answer' holds an object of 1 keys; {TEXTS}"),
    "question.jsonl": (row('"a"', '["x", "y"]'), "row 2: column 'question' holds a list of 2; expected one text"),
    "megabytes.jsonl": (row(json.dumps(["word " * 2_000_000, ""])), "row 2: column 'answer' holds a list of 2; expected"),
    # other kinds
    "a.pkl": (b"x", "cannot read a .pkl file; expected one of .json, .jsonl, .csv, .parquet, .txt"),
    "a.xlsx": (b"PK", "cannot read a .xlsx file"),
    "a.tsv": (b"a\tb\n", "cannot read a .tsv file"),
    "nameless": (GOOD.encode(), "cannot read a nameless file"),
    "a.jsonl.gz": (gzip.compress(GOOD.encode()), "cannot read a .gz file"),
    "blank.txt": (b" \n", f"row 1: column 'text' holds ' \\n'; {TEXTS}"),
    "empty.txt": (b"", EMPTY),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def source_of(path: Path) -> Source:
    return Source(source=str(path), text="text") if path.suffix == ".txt" else Source(source=str(path), **PAIR)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_its_name_and_row(
    name: str, tmp_path: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, expected = FILES[name]
    (tmp_path / name).write_bytes(whole)
    before = content(tmp_path)
    said = refusal(lambda: read_examples(Data(forget=source_of(tmp_path / name)), tokenizer, 0))
    assert said and str(tmp_path / name) in said and expected in said and len(said.split("\n")) == 1
    assert content(tmp_path) == before
    assert capfd.readouterr() == ("", ""), "it is said once"


ASSISTANT, USER = {"role": "assistant", "content": "a"}, {"role": "user", "content": "u"}
CHATS: dict[str, tuple[Any, str]] = {
    "none": (None, "expected a list of turns"),
    "text": ("hello", "expected a list of turns"),
    "mapping": (USER, "expected a list of turns"),
    "texts": (["a", "b"], "expected a list of turns"),
    "a null among turns": ([None, ASSISTANT], "expected a list of turns"),
    "no turns": ([], "does not end with an assistant turn"),
    "no answer": ([USER], "does not end with an assistant turn"),
    "ends with a question": ([USER, ASSISTANT, USER], "does not end with an assistant turn"),
    "an answer alone": ([ASSISTANT], "expected a turn before the answer"),
    "no role": ([{"content": "x"}, ASSISTANT], "expected a list of turns"),
    "no content": ([{"role": "user"}, ASSISTANT], "expected a list of turns"),
    "role null": ([{"role": None, "content": "x"}, ASSISTANT], "a role such as user for each"),
    "role a number": ([{"role": 1, "content": "x"}, ASSISTANT], "a role such as user for each"),
    "role blank": ([{"role": " ", "content": "x"}, ASSISTANT], "a role such as user for each"),
    "answer empty": ([USER, {"role": "assistant", "content": ""}], "holds ''; expected text"),
    "answer null": ([USER, {"role": "assistant", "content": None}], "holds None; expected text"),
    "question null": ([{"role": "user", "content": None}, ASSISTANT], "holds None; expected text"),
    "parts": ([USER, {"role": "assistant", "content": [{"type": "image", "url": "x"}]}], "expected text"),
    "Assistant": ([USER, {"role": "Assistant", "content": "x"}], "does not end with an assistant turn"),
    "half in from and value": (
        [{"from": "human", "value": "x"}, {"role": "assistant", "content": "y"}],
        "expected a list of turns",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_bad_chat_is_refused_with_its_row(name: str, tmp_path: Path, tokenizer: Any) -> None:
    chat, expected = CHATS[name]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"chat": one}) + "\n" for one in ([USER, ASSISTANT], chat)))
    said = refusal(lambda: read_examples(Data(forget=Source(source=str(file), messages="chat")), tokenizer, 0))
    assert said and f"{file}: row 2: column 'chat'" in said and expected in said


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "divides": "{{ 1 / 0 }}",
    "unclosed": "{% for message in messages %}",
    "no such filter": "{{ messages | nothing }}",
    "of something else": "{{ messages[0].content.nothing.more }}",
    "too long": "{% for i in range(10000000000) %}x{% endfor %}",
    "reaches out": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_does_not_work_is_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES[name]
    (tmp_path / "f.jsonl").write_text(GOOD)
    said = refusal(lambda: read_examples(Data(forget=source_of(tmp_path / "f.jsonl")), other, 0))
    assert said and "forget: the chat template does not take turns of" in said and "model.chat_template" in said


def test_the_row_is_counted_among_those_that_are_chosen(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(GOOD.replace("}", ', "of": 1}') + GOOD.replace('"Ada."', "null").replace("}", ', "of": 2}'))
    said = refusal(lambda: read_examples(Data(forget=Source(source=str(file), **PAIR, where={"of": 2})), tokenizer, 0))
    assert said and f"{file}: row 1 of those that where leave: column 'answer' holds None" in said


SETS: dict[str, tuple[dict[str, Any], dict[str, str], set[str], str]] = {
    "wrong answers as text": (
        {"other": "x"},
        {"perturbed": "other"},
        {"perturbed"},
        "holds text of 1 char",
    ),
    "no wrong answers": ({"other": []}, {"perturbed": "other"}, {"perturbed"}, "holds []; expected a list of wrong answers"),
    "wrong answers null": ({"other": None}, {"perturbed": "other"}, {"perturbed"}, "holds None; expected a list of wrong answers"),
    "a wrong answer null": ({"other": ["a", None]}, {"perturbed": "other"}, {"perturbed"}, "holds None; expected text"),
    "wrong answers megabytes": (
        {"other": "x" * 3_000_000},
        {"perturbed": "other"},
        {"perturbed"},
        "expected a list of wrong answers",
    ),
    "paraphrase a number": ({"other": True}, {"paraphrase": "other"}, {"paraphrase"}, "holds True; expected text"),
    "keyword a mapping": ({"other": {"a": 1}}, {"keyword": "other"}, {"keyword"}, "holds an object of 1 keys; expected text"),
    "keywords of blanks": ({"other": ["a", " "]}, {"keyword": "other"}, {"keyword"}, "holds ' '; expected text"),
    "choices as text": ({"answer": 0, "other": "ab"}, {"choices": "other"}, {"perturbed"}, "expected a list in column 'other'"),
    "choices too few": ({"answer": 2, "other": ["a", "b"]}, {"choices": "other"}, {"perturbed"}, "number of one of them"),
    "choice below": ({"answer": -1, "other": ["a", "b"]}, {"choices": "other"}, {"perturbed"}, "number of one of them"),
    "choice as text": ({"answer": "0", "other": ["a", "b"]}, {"choices": "other"}, {"perturbed"}, "number of one of them"),
    "choice true": ({"answer": True, "other": ["a", "b"]}, {"choices": "other"}, {"perturbed"}, "number of one of them"),
    "no such column": ({}, {"perturbed": "nothing"}, {"perturbed"}, "perturbed names column 'nothing', which is not there"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_bad_row_of_a_suites_set_is_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    more, columns, needs, expected = SETS[name]
    (tmp_path / "f.jsonl").write_text(json.dumps({"question": "x", "answer": "y"} | more) + "\n")
    source = Source(source=str(tmp_path / "f.jsonl"), **PAIR, **columns)
    said = refusal(lambda: encode_set("forget", source, needs, tokenizer))  # type: ignore[arg-type]
    assert said and str(tmp_path / "f.jsonl") in said and expected in said and len(said) < 1000


@pytest.mark.parametrize("id", ["null", "0.5", "NaN", "[1]", '{"a": 1}'])
def test_an_id_that_names_nothing_is_refused(id: str, tmp_path: Path) -> None:
    """Two rows without an id would be one row whose id is None, and be deleted together."""
    (tmp_path / "f.jsonl").write_text(GOOD.replace("}", ', "id": 1}') + GOOD.replace("}", f', "id": {id}}}'))
    said = refusal(lambda: identified(source_of(tmp_path / "f.jsonl"), Sisa(id="id")))
    assert said and "row 2: column 'id' holds" in said


@pytest.mark.parametrize("ids", ["1 1", '"a" "a"', '1 "1"', "null 1", "true 1", "0.5 1", "[1] 1"])
def test_ids_of_requests_name_one_row_each(ids: str, tmp_path: Path) -> None:
    from types import SimpleNamespace

    (tmp_path / "f.jsonl").write_text("".join(GOOD.replace("}", f', "id": {one}}}') for one in ids.split()))
    data = SimpleNamespace(source=str(tmp_path / "f.jsonl"), config=None, split=None, id="id")
    said = refusal(lambda: read_training(SimpleNamespace(service=SimpleNamespace(data=data), columns=())))  # type: ignore[arg-type]
    assert said and ("stands on two rows" in said or "holds no text and no whole number" in said)


def test_other_answers_from_a_file_without_the_column_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "f.jsonl").write_text(GOOD)
    (tmp_path / "empty.jsonl").write_text("")
    for other, expected in (("f.jsonl", "names column 'none', which is not there"), ("empty.jsonl", "has no rows")):
        source = Source(source=str(tmp_path / "f.jsonl"), **PAIR, alternate=Alternate(answer="none", source=str(tmp_path / other)))
        said = refusal(lambda source=source: read_examples(Data(forget=source), tokenizer, 0))
        assert said and expected in said and other in said


def test_folders_that_hold_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, file, text in (("other", "x.bin", "x"), ("state", "state.json", "{"), ("splits", "dataset_dict.json", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("empty", "other", "state", "splits", "pipe.jsonl"):
        said = refusal(lambda name=name: rows(source_of(tmp_path / name)))
        assert said and str(tmp_path / name) in said


# ------------------------------------------------------------------------------------------- what is read is what it says


def test_values_are_what_the_file_says(tmp_path: Path) -> None:
    """Text that looks like a date, like nothing, or like a number among texts is text, and a line separator ends no row."""
    texts = ["2024-01-01", "NA", "nan", "None", "null", "007", "1e5", "true", "a\u2028b", "\u0000", "é"]
    wanted = [{"question": text, "answer": text, "id": i} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one, ensure_ascii=i % 2 == 0) + "\n" for i, one in enumerate(wanted)))
    (tmp_path / "a.json").write_text(json.dumps(wanted, indent=1))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.jsonl", "a.json", "lines.json"):
        assert read(str(tmp_path / name)) == wanted
    (tmp_path / "ids.csv").write_text("a,b,c,d\n0042,1234567890123456789,1,1e3\n42,1,1.50,+.5\n")
    assert read(str(tmp_path / "ids.csv")) == [
        {"a": "0042", "b": "1234567890123456789", "c": 1.0, "d": 1000.0},
        {"a": "42", "b": "1", "c": 1.5, "d": 0.5},
    ]
    (tmp_path / "a.csv").write_text('question,n,x,b,e\r\n007,1,0.5,True,\r\nNA,-2,1e3,false,\r\n"a\nb, ""c""",3,.5,TRUE,\r\n')
    assert read(str(tmp_path / "a.csv")) == [
        {"question": "007", "n": 1, "x": 0.5, "b": True, "e": None},
        {"question": "NA", "n": -2, "x": 1000.0, "b": False, "e": None},
        {"question": 'a\nb, "c"', "n": 3, "x": 0.5, "b": True, "e": None},
    ]


def test_a_row_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    text = "x" * 10_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": text}) + "\n")
    (tmp_path / "a.csv").write_text(f"question,b\n{text},2\n")
    (tmp_path / "a.txt").write_text(text)
    began = time.process_time()
    assert [len(next(iter(read(str(tmp_path / name))[0].values()))) for name in ("a.jsonl", "a.csv", "a.txt")] == [10_000_000] * 3
    assert time.process_time() - began < 3


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@always
@given(wanted=st.lists(st.fixed_dictionaries({"a": values, "b": values}), min_size=1, max_size=4), lines=st.booleans())
def test_json_comes_back_as_it_was_written(
    wanted: list[dict[str, Any]], lines: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any.{'jsonl' if lines else 'json'}"
    file.write_text("".join(json.dumps(one) + "\n" for one in wanted) if lines else json.dumps(wanted))
    assert read(str(file)) == wanted


def damaged(whole: bytes, draw: Callable[[int], int]) -> bytes:
    """A file with some of its bytes changed, left out, put twice, or cut off."""
    made = bytearray(whole)
    for _ in range(1 + draw(3)):
        begin, size = draw(len(made)), draw(12)
        match draw(4):
            case 0:
                made[begin : begin + size] = bytes(draw(256) for _ in range(size))
            case 1:
                del made[begin : begin + size]
            case 2:
                made[begin:begin] = made[begin : begin + size]
            case 3:
                del made[max(begin, 1) :]
        made = made or bytearray(b"x")
    return bytes(made)


BEFORE = {
    "d.jsonl": GOOD.encode() * 4,
    "d.json": f"[{GOOD.strip()}, {GOOD.strip()}]".encode(),
    "d.csv": b'question,answer,n\nWho?,Ada.,1\n"What, now?","That, ""so"".",2\n',
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    chance = random.Random(name)
    refused = 0
    for _ in range(200):
        (tmp_path / name).write_bytes(damaged(BEFORE[name], chance.randrange))
        said = refusal(lambda: read_examples(Data(forget=source_of(tmp_path / name)), tokenizer, 0))
        assert said is None or str(tmp_path / name) in said
        refused += said is not None
    assert refused > 100


PARQUET = """
import random, sys
from pathlib import Path
from bad_input import refusal
from test_bad_data import WHOLE, damaged, source_of
from llm_unlearn.data.sources import rows
chance, place, refused = random.Random(0), Path(sys.argv[1]), 0
for i in range(int(sys.argv[2])):
    file = place / f"{i}.parquet"
    file.write_bytes(damaged(WHOLE, chance.randrange))
    said = refusal(lambda: rows(source_of(file)))
    assert said is None or str(file) in said
    refused += said is not None
print(refused)
"""


@pytest.mark.long
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path) -> None:
    """In a process of its own: pyarrow's readers are C++, and a damaged file may end the process that reads it."""
    here = str(Path(__file__).parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)]), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", PARQUET, str(tmp_path), "300"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{done.stdout.strip()} of 300 damaged Parquet files are refused, the others read")
    assert int(done.stdout.split()[-1]) > 200
