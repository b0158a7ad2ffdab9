"""Benchmarks name functions of the project to time them: they must be there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_times_is_there(path: Path) -> None:
    found = runpy.run_path(str(path))
    assert callable(found["main"])
    for stage, functions in found.get("STAGES", {}).items():
        for place, name in functions:
            assert callable(getattr(place, name)), stage


def test_the_runs_of_the_obstacles_are_such_as_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of theirs is read as `llm-unlearn` reads it, recipes and suites with it; nothing is carried out."""
    from llm_unlearn import recipe
    from llm_unlearn.evaluation import suite
    from llm_unlearn.options import parser

    monkeypatch.chdir(FOLDER.parent)
    room = runpy.run_path(str(FOLDER / "obstacles.py"))
    commands: dict[str, list[str]] = {}
    place = room["Place"](tmp_path, 1, room["METHODS"])
    monkeypatch.setattr(room["Place"], "carry_out", lambda self, asked: commands.update(asked))
    lines = [*room["sequence"](place), *room["share"](place)]
    forgotten = {}
    for name, words in commands.items():
        options, more = parser().parse_known_args(words)
        assert not [word for word in more if word.startswith("-")], name
        if options.verb == "verbs:run":
            wanted = recipe.load(options.recipe, [*options.overrides, *more], check=False)
            assert wanted.evaluation and suite.load(Path(wanted.evaluation.suite)).sets["forget"].where
            forgotten[name] = set(wanted.data.forget.where["id"])  # type: ignore[index, arg-type]
    assert len(forgotten["share/npo-50"]) == 100 and forgotten["share/npo-1"] < forgotten["share/sisa-5"]
    assert forgotten["together/npo-8"] == set().union(*(forgotten[f"sequence/npo-{k}"] for k in range(1, 9)))
    assert sum(line.startswith("| npo |") for line in lines) == len(room["REQUESTS"]) + len(room["SHARES"])
