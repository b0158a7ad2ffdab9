"""What leaves the process as words: no secret, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from tqdm.auto import tqdm

from llm_unlearn import outward
from llm_unlearn.cli import main
from llm_unlearn.outward import Guarded, canvas, guarded, harmless, secrets_of, without_secrets
from llm_unlearn.report.verdict import printable
from llm_unlearn.spec import Refused

TOKEN, KEY, PASSWORD, KEPT = "hf_" + "q" * 34, "9f" * 20, "s3cr3t-of-mine", "hf_" + "k" * 34
HOSTILE = {
    "a title": "\x1b]0;owned\x07",
    "the clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "a link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "the screen": "\x1b[2J\x1b[H",
    "a device": "\x1bP+q544e\x1b\\",
    "eight bits": "\x9b2J\x9d0;owned\x9c",
    "another line": "all fits\rerror",
    "backspaces": "error\x08\x08\x08\x08\x08fine!",
    "direction": "\u202egnp.exe\u202c \u2066x\u2069",
    "halves": "\udce9\ud83d",
    "bells": "\x07\x05\x0e",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text(f"{KEPT}\n")
    given = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "DB_PASSWORD": PASSWORD}
    others = {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "", "SHORT_KEY": "yes", "SSH_KEY": str(tmp_path)}
    return {"HOME": str(tmp_path), **given, **others}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_terminal_obeys_nothing(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = HOSTILE[what]
    with guarded({}):
        print(f"name: {said}.")
        print(f"name: {said}.", file=sys.stderr)
        sys.stdout.writelines([said, "\n"])
    found = "".join(capsys.readouterr())
    assert found and all(letter == "\n" or letter.isprintable() for letter in found), found
    assert all(letter.isprintable() for letter in printable(said))


def test_colours_are_left_out_and_words_of_every_script_stay(capsys: pytest.CaptureFixture[str]) -> None:
    words = "שלום\u200f مرحبا\u200e நன்றி 👩\u200d🔬 naïve\tx\n"
    with guarded({}):
        print(f"\x1b[31mred\x1b[0m \x1b[8mhidden\x1b[m {words}", end="")
    assert capsys.readouterr().out == f"red hidden {words}"


def test_a_json_object_says_the_same_as_before() -> None:
    facts = {"name": "a\x1b]0;x\x07b", "turned": "\u202ex", "half": "\x9b"}
    assert json.loads(harmless(json.dumps(facts, ensure_ascii=False))) == facts


def test_bars_move_and_tables_have_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that takes escapes: those of the bar and of the table reach it, those of the words in them do not."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded({}):
        assert sys.stdout.isatty()
        with tqdm(total=2, desc="steps\x1b]0;owned\x07") as bar:
            bar.update(1)
            bar.write("said\x1b[2J", file=sys.stderr)
            bar.update(1)
        Console(file=canvas("stdout"), force_terminal=True, color_system="standard").print(f"{TOKEN} \x1b]0;owned\x07", style="red")
    assert "owned" in out.getvalue() and "\x1b]0" not in out.getvalue() and TOKEN not in out.getvalue()
    assert "\r" in err.getvalue() and "\x1b]" not in err.getvalue() and "\x1b[2J" not in err.getvalue()
    assert "\x1b[31m" in out.getvalue()
    assert isinstance(sys.stdout, Terminal), "afterwards the streams are what they were"


def test_secrets_are_known_from_where_they_are_kept(environment: dict[str, str]) -> None:
    assert outward.secrets_of(environment) == {TOKEN, KEY, PASSWORD, KEPT}
    assert outward.secrets_of({}) == set()


def test_what_is_a_secret_and_what_a_word(tmp_path: Path) -> None:
    """Keys of clouds may begin like a path; a password that is a plain word or a number stands in names of files and in results."""
    key, quoted = "/Kx9+abc/defGHI", 'pa"ss\\word 1'
    home = {"HOME": str(tmp_path), "AWS_SECRET_ACCESS_KEY": key, "DB_PASSWORD": quoted, "SIGNING_KEY": str(tmp_path)}
    home |= {"POSTGRES_PASSWORD": "postgres", "PIN_KEY": "0.12345678", "LONG_SECRET": "correcthorsebatterystaple"}
    assert outward.secrets_of(home) == {key, quoted, json.dumps(quoted)[1:-1], "correcthorsebatterystaple"}
    with guarded({"HOME": str(tmp_path), "A_TOKEN": "abcd-1234", "B_TOKEN": "abcd-1234-5678", "DB_PASSWORD": quoted}):
        assert outward.without_known(f"abcd-1234-5678 {json.dumps(quoted)}") == '… "…"'


@pytest.mark.parametrize("secret", [TOKEN, KEY, PASSWORD, KEPT])
def test_no_secret_is_said_by_anybody(secret: str, environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, logged, warned of, in an error of ours and in the traceback of anybody's."""
    with guarded(environment):
        print(f"as {secret} says")
        handler = logging.StreamHandler(sys.stderr)
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, f"401 for {secret}", None, None))
        sys.stderr.write(warnings.formatwarning(f"with {secret}", UserWarning, "x.py", 1))
        try:
            raise ValueError(f"proxy of {secret}")
        except ValueError:
            traceback.print_exc()
        error = Refused(f"model.base: {secret} cannot be read")
        print(json.dumps({"errors": str(error)}))
    found = "".join(capsys.readouterr())
    assert secret not in found + str(error) + repr(error) and found.count("…") == 4 and "…" in str(error)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("https://me:pass@hub.example/x", "https://…@hub.example/x"),
        ("proxy http://tok3n@10.0.0.1:80 failed", "proxy http://…@10.0.0.1:80 failed"),
        ("postgresql://u:p%40ss@db/x", "postgresql://…@db/x"),
        ("https://x/y?a=1&X-Amz-Signature=abc&b=2", "https://x/y?a=1&X-Amz-Signature=…&b=2"),
        ("https://x/y?access_token=abc", "https://x/y?access_token=…"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': 'Bearer …'}"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic …"),
        (f"a {TOKEN}.", "a …."),
        ("-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\nx", "…\nx"),
    ],
)
def test_secrets_that_have_a_shape(said: str, left: str) -> None:
    assert without_secrets(said) == left


def test_other_words_stay() -> None:
    for text in (
        "Basic mathematics",
        "train.batch_tokens=8192 key=value",
        "me@example.org",
        "https://x/y@main",
        "hf_home",
        "a: b@c",
    ):
        assert without_secrets(text) == text


def test_what_a_program_sees_is_a_stream() -> None:
    stream = Guarded(io.StringIO())
    assert stream.write("a\x1b[2Jb") == 6 and stream.beneath.getvalue() == "a\\u001b[2Jb"  # type: ignore[attr-defined]
    assert not stream.isatty() and stream.writable()


@pytest.mark.parametrize(
    "secret",
    [
        "https:/ada:hunter2x@example.invalid/x",  # as a path has it
        "https://ada:hunter2x@example.invalid/x",
        "//ada:hunter2x@example.invalid/x",
        "postgresql:/ada:hunter2x@db/x",
        "https:/hunter2xhunter2x@example.invalid",
        "ghp_hunter2xABCDEFGHIJKLMNOPQRSTUVWXYZ01",
        "github_pat_hunter2xABCDEFGHIJKLMNOP",
        "glpat-hunter2xABCDEFGHIJKL",
        "sk-proj-hunter2xABCDEFGHIJKL",
        "xoxb-hunter2x-123456",
        "hf_hunter2xABCDEFGHIJKLM",
        "eyJhunter2xx.eyJhunter2x0.hunter2x",
        "https://x/y?db_pwd=hunter2x",
    ],
)
def test_what_looks_like_a_secret_is_left_out(secret: str) -> None:
    assert "hunter2x" not in without_secrets(f"found {secret}; expected a folder")
    assert "AKIA" not in without_secrets("key AKIAIOSFODNN7EXAMPLE is")


@pytest.mark.parametrize(
    "plain",
    ["runs/x@main", "risk-assessment-of-2024-models", "a: b@c", "C:/x@y", "hub/model@v1", "a//b@c", "task-2024-05-06-forget"],
)
def test_plain_words_stay(plain: str) -> None:
    assert without_secrets(plain) == plain


@pytest.mark.parametrize("name", ["GITHUB_PAT", "DB_PWD", "PROXY_AUTH", "AWS_CREDENTIALS", "SENTRY_DSN", "DB_PASS"])
def test_names_of_secrets(name: str) -> None:
    assert secrets_of({name: "hunter2-hunter2", "HOME": "/nowhere"}) == {"hunter2-hunter2"}
    assert secrets_of({"PWD": "/gone/for-good1", "PATH": "/x/y-z/bin1", "AUTHOR": "ada-2-brisk", "HOME": "/nowhere"}) == set()


@pytest.mark.parametrize(
    "words", [["show"], ["verify"], ["plan"], ["run"], ["forget", "{}", "--ids", "1"], ["evaluate", "{}", "--model", "x"]]
)
def test_no_command_repeats_a_login(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://ada:hunter2x@example.invalid/x"
    put = [word.replace("{}", address) for word in words]
    assert main(put if "{}" in words else [*put, address]) == 2
    said = capsys.readouterr()
    assert "hunter2x" not in said.out + said.err and "example.invalid" in said.err
