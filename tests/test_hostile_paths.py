"""Folders that somebody prepared: nothing is written, replaced or removed outside of them, whatever links and names they hold."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn import compare, durable, folder, recipe
from llm_unlearn.auditing import request as auditing
from llm_unlearn.cli import main
from llm_unlearn.evaluation.kept import write_part
from llm_unlearn.exact import manifest
from llm_unlearn.exact.forgetting import Session
from llm_unlearn.models.combined import read as read_combination
from llm_unlearn.report.columns import write_columns
from llm_unlearn.requests.records import run_of
from llm_unlearn.results import flattened
from llm_unlearn.spec import Refused

RECIPE = """\
output: OUTPUT
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}}
"""


@pytest.fixture
def outside(tmp_path: Path) -> Any:
    """What belongs to somebody else, and is as it was at the end."""
    place = tmp_path / "outside"
    (place / "work").mkdir(parents=True)
    (place / "work" / "thesis.tex").write_text("years of work")
    (place / "step-000001").mkdir()
    yield place
    assert (place / "work" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in place.iterdir()) == ["step-000001", "work"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[recipe.Recipe, Path]:
    """A run folder as one that did not finish, and its recipe."""
    output, path = tmp_path / "runs" / "x", tmp_path / "recipe.yaml"
    output.mkdir(parents=True)
    path.write_text(RECIPE.replace("OUTPUT", str(output)))
    wanted = recipe.load(path)
    folder.write(output / folder.RECIPE, flattened(wanted))
    return wanted, output


LINKS = ("checkpoints", "log.jsonl", "adapter", "trackers", "pieces", "deep/inside/it", "evaluation.json")


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("how", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}])
def test_a_run_folder_leads_nowhere(run: tuple[recipe.Recipe, Path], outside: Path, name: str, how: dict[str, bool]) -> None:
    wanted, output = run
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).symlink_to(outside / "work")
    with pytest.raises(Refused, match=rf"{name}: a link that leads out of .*Nothing was changed; put a copy in its place"):
        folder.check(wanted, **how)


def test_nor_does_a_store(tmp_path: Path, outside: Path) -> None:
    """Pieces that are not served are removed: those of this store, not what a link in their place leads to."""
    text = RECIPE.replace("OUTPUT", str(tmp_path / "store")).replace("objective:\n  forget: {loss: {name: npo}}\n", "")
    text += "  retain: {source: embedded:retain, prompt: question, answer: answer}\nmethod: {name: sisa}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    wanted = recipe.load(tmp_path / "recipe.yaml")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "pieces").symlink_to(outside)
    with pytest.raises(Refused, match=r"pieces: a link that leads out of"):
        Session(wanted, tmp_path / "cache")


def test_a_link_within_the_run_is_no_way_out(run: tuple[recipe.Recipe, Path]) -> None:
    wanted, output = run
    (output / "trackers").mkdir()
    (output / "trackers" / "latest").symlink_to(output / "trackers")
    assert folder.check(wanted, resume=True, overwrite=False) is False


def test_what_no_run_wrote_is_not_removed(run: tuple[recipe.Recipe, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A project of somebody's with a recipe.yaml in it, the folder that one stands in, the home, a link."""
    wanted, output = run
    assert not folder.check(wanted, resume=False, overwrite=True)
    held = (output / folder.RECIPE).read_text()
    (output / folder.RECIPE).write_text(RECIPE)
    for check in (lambda: folder.check(wanted, resume=False, overwrite=True), lambda: folder.clear(output)):
        with pytest.raises(Refused, match=r"has a recipe\.yaml that no run wrote"):
            check()
    (output / folder.RECIPE).write_text(held)
    (output / "below").mkdir()
    monkeypatch.chdir(output / "below")
    for check in (lambda: folder.check(wanted, resume=False, overwrite=True), lambda: folder.clear(output)):
        with pytest.raises(Refused, match="the folder from which this is run, or one above it"):
            check()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(output))
    with pytest.raises(Refused, match="or one above it"):
        folder.check(wanted, resume=False, overwrite=True)


def test_a_link_in_the_place_of_the_folder(run: tuple[recipe.Recipe, Path], outside: Path) -> None:
    wanted, output = run
    output.rename(output.with_name("real"))
    output.symlink_to(output.with_name("real"))
    with pytest.raises(Refused, match=r"is a link to .*real, so all that is in it is not removed"):
        folder.check(wanted, resume=False, overwrite=True)
    output.unlink()
    output.symlink_to(outside)
    with pytest.raises(Refused, match=r"a link to .*, so all that is in it is not removed"):
        folder.clear(output)


def test_clearing_takes_links_and_leaves_what_they_lead_to(run: tuple[recipe.Recipe, Path], outside: Path) -> None:
    _, output = run
    (output / "checkpoints").symlink_to(outside)
    (output / "log.jsonl").symlink_to(outside / "work" / "thesis.tex")
    folder.clear(output)
    assert not output.exists()


@pytest.mark.parametrize("verb", ["compare", "evaluate", "audit"])
def test_other_outputs_lead_nowhere_either(verb: str, tmp_path: Path, outside: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "report.html").symlink_to(outside / "work" / "thesis.tex")
    (output / "privacy_audit.json").write_text("{}")
    with pytest.raises(Refused, match="leads out of"):
        if verb == "compare":
            compare.check_output(output, overwrite=True)
        elif verb == "audit":
            auditing.held(auditing.Asked(None, (), 1, None, 0, output), overwrite=True)  # type: ignore[arg-type]
        else:
            assert main(["evaluate", "eval/quick.yaml", "--model", "embedded:target", "--output", str(output), "--overwrite"]) == 2
            raise Refused("it leads out of the folder")


def test_unfinished_files_are_new(tmp_path: Path, outside: Path) -> None:
    """Their names can be guessed: somebody put links in their place."""
    target = outside / "work" / "thesis.tex"
    places = [durable._unfinished(tmp_path / name) for name in ("a.json", "b.parquet", "c.npz")]
    for place in places:
        place.symlink_to(target)
    (tmp_path / "a.json").symlink_to(target)
    folder.write(tmp_path / "a.json", "{}")
    write_columns([{"x": 1}], tmp_path / "b.parquet")
    write_part({"texts": ["x"]}, tmp_path / "c.npz")
    assert not any(place.is_symlink() for place in places), "each was met"
    assert not (tmp_path / "a.json").is_symlink() and (tmp_path / "a.json").read_text() == "{}"
    (tmp_path / "log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        open(tmp_path / "log", "a", opener=folder.no_link)  # noqa: SIM115


NAMES = ("../up", "/etc", "a/b", "..", ".", "", "a\0b", "C:\\x", "x" * 300)


@pytest.mark.parametrize("name", NAMES)
def test_names_from_files_are_names(name: str, tmp_path: Path) -> None:
    """Of the members of a combination, the pieces of a store, the runs of a ledger."""
    (tmp_path / "combination.json").write_text(json.dumps({"rule": "sum", "members": [None, name], "weights": [1, 1]}))
    with pytest.raises(Refused):
        read_combination(tmp_path)
    piece = {"key": name, "line": "l", "stage": "s", "rows": [], "content": "", "parent": None}
    for pieces, serving in (([piece], []), ([], [name])):
        held = {"salt": "", "settings": "", "base": "", "threads": 1, "versions": {}, "rows": [], "format": manifest.FORMAT}
        (tmp_path / manifest.FILE).write_text(json.dumps(held | {"pieces": pieces, "serving": serving}))
        with pytest.raises(Refused, match="is no piece's key"):
            manifest.read(tmp_path)
    if Path(name).name != name:
        with pytest.raises(Refused, match="The ledger was changed"):
            run_of({"id": 1, "folder": name, "numbers": None})  # type: ignore[arg-type]


def test_keys_are_read_by_nobody_else(tmp_path: Path) -> None:
    from llm_unlearn.requests.certificate import signing_key

    signing_key(tmp_path / "config")
    (found,) = (path for path in (tmp_path / "config").iterdir() if b"PRIVATE" in path.read_bytes())
    assert stat.S_IMODE(found.stat().st_mode) == 0o600


def of_a_run(place: Path) -> recipe.Recipe:
    """A folder that a killed run left, and its recipe."""
    file = place.parent / "r.yaml"
    file.write_text(RECIPE.replace("OUTPUT", str(place)))
    wanted = recipe.load(file)
    place.mkdir()
    (place / "recipe.yaml").write_text(flattened(wanted))
    (place / "log.jsonl").write_text("")
    return wanted


def test_only_what_a_run_wrote_is_removed(tmp_path: Path) -> None:
    """Once the first line of a recipe was enough, whatever it said."""
    wanted = of_a_run(place := tmp_path / "run")
    folder.check(wanted, resume=False, overwrite=True)  # as it was written
    (place / "precious").touch()
    with pytest.raises(Refused, match=r"holds what no run wrote: precious, so all that is in it is not removed"):
        folder.check(wanted, resume=False, overwrite=True)
    (place / "precious").unlink()
    (place / "adapter").mkdir()
    (place / "adapter" / "notes.txt").touch()
    (place / "hashes.json").write_text('{"files": {}}')
    with pytest.raises(Refused, match=r"holds what no run wrote: adapter/notes\.txt"):
        folder.check(wanted, resume=False, overwrite=True)
    (place / "adapter" / "notes.txt").unlink()
    for text in ("# hash 00\nseed: 0\n", (place / "recipe.yaml").read_text().replace("seed: 0", "seed: 1"), "# hash 00\n]"):
        (place / "recipe.yaml").write_text(text)
        with pytest.raises(Refused, match="is not what its run wrote"):
            folder.clear(place)
    assert place.is_dir()


@pytest.mark.parametrize("path", sorted(Path("recipes").rglob("*.yaml")), ids=str)
def test_the_recipe_of_every_shipped_run_has_its_hash(path: Path, tmp_path: Path) -> None:
    """By what stands in it, as settings that later versions add are not in it."""
    (tmp_path / "recipe.yaml").write_text(flattened(recipe.load(path, ["output=" + str(tmp_path / "x")])))
    assert folder._is_as_written(tmp_path / "recipe.yaml")


def test_all_that_runs_write_is_known() -> None:
    from llm_unlearn.auditing import request
    from llm_unlearn.exact import manifest

    assert {request.FILE, manifest.FILE, manifest.PIECES, manifest.WORK} <= folder.OWN


@pytest.mark.parametrize("verb", ["plan", "run", "evaluate", "compare", "audit"])
@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to itself", "below a file", "below a link to nothing"])
def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_read(
    tmp_path: Path, kind: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    if "link" in kind:
        place.symlink_to(place if "itself" in kind else tmp_path / "gone")
    else:
        place.write_text("mine")
    output = place / "run" if kind.startswith("below") else place
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = {
        "plan": ["plan", str(tmp_path / "r.yaml"), f"output={output}"],
        "run": ["run", str(tmp_path / "r.yaml"), f"output={output}"],
        "audit": ["audit", str(tmp_path / "r.yaml"), "objective.forget.loss={name: nll}", "--output", str(output)],
        "evaluate": ["evaluate", "eval/quick.yaml", "--model", "embedded:target", "--output", str(output)],
        "compare": ["compare", str(tmp_path), "--output", str(output)],
    }
    assert main(words[verb]) == 2
    said = capsys.readouterr().err
    assert f"output: {place} is a {'link to ' if 'link' in kind else 'file'}" in said and "must be a folder" in said
    assert os.path.lexists(place) and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("address", ["s3://bucket/run", "https:/example.invalid/run", "hf://me/run"])
@pytest.mark.parametrize("command", ["plan", "run", "evaluate", "new"])
def test_an_output_that_is_an_address_is_refused(
    tmp_path: Path, address: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    suite = str(Path("eval/quick.yaml").resolve())
    monkeypatch.chdir(tmp_path)
    words = {
        "plan": ["plan", "r.yaml", f"output={address}"],
        "run": ["run", "r.yaml", f"output={address}"],
        "evaluate": ["evaluate", suite, "--model", "embedded:target", "--output", address],
        "new": ["new", address],
    }
    assert main(words[command]) == 2
    assert re.search(r"(output|NAME): \S+ is an address", capsys.readouterr().err)
    assert [one.name for one in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_foreign_file_of_the_same_name_is_not_replaced(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evaluation.json", "comparison.json"):
        (tmp_path / name).write_text('{"mine": 1}')
    more = ["eval/quick.yaml", "--model", "embedded:target"] if verb == "evaluate" else [str(tmp_path)]
    assert main([verb, *more, "--output", str(tmp_path), "--overwrite"]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_text() == '{"mine": 1}' == (tmp_path / "comparison.json").read_text()
