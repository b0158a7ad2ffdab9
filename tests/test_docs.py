"""The documentation: links hold, what it names is there, commands parse, recipes load, and what is made of the code is complete."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_unlearn import cli, recipe, reply
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.options import parser
from scripts.pages import commands, links, notebook, papers, reference

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ARRIVING: set[str] = set()
"""Verbs that are under way in other branches; one that is there is held to its words like any other."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages; "" is a block without one."""
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def test_all_pages_are_looked_at() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/tutorial.md", "docs/reference/index.md"} <= {
        path.relative_to(ROOT).as_posix() for path in PAGES
    }


# --------------------------------------------------------------------------------------------------------------- links


def anchors_of(page: Path) -> set[str]:
    text = links.FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {reference.slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one).replace("`", "")) for one in headings}


@each_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for _, target in links.links_of(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors_of(to)):
            broken.append(target)
    assert not broken


NAMED = re.compile(
    r"(?<![\w/.<-])((?:recipes|eval|launch|docs|tests|benchmarks|scripts|llm_unlearn)/[\w./-]*\w\.(?:yaml|sh|md|py|json))"
)


@each_page
def test_files_that_are_named_are_there(page: Path) -> None:
    examples = {"recipes/mine", "recipes/methods/floored.yaml", "recipes/methods/NAME.yaml"}
    text = page.read_text(encoding="utf-8")
    lost = {name for name in NAMED.findall(text) if name not in examples and not (ROOT / name).is_file()}
    assert not (lost if page.name != "CHANGELOG.md" else {name for name in lost if not name.startswith("benchmarks/")})


# ------------------------------------------------------------------------------------------------------------ commands


def lines_of(page: Path) -> Iterator[str]:
    """What a page tells to type after `llm-unlearn`: lines of blocks, and code in lines."""
    text = page.read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        if language in ("", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from re.findall(r"^(?:[A-Z_]+=\S+ )*(llm-unlearn .+)$", line.removeprefix("$ "))
    yield from re.findall(r"(?<!`)`(llm-unlearn [^`\n]+)`(?!`)", BLOCK.sub("", text))


def words_of(line: str) -> list[str]:
    """The words of a line as a shell would give them, without comment, pipe and the brackets around what may be left out."""
    line = re.sub(r"\s+(?:# |> |\| ).*$", "", line)
    return shlex.split(re.sub(r"\[((?:--|key=)[^\]]*)\]", r"\1", line))[1:]


def known(words: list[str], grammar: argparse.ArgumentParser) -> bool:
    """Whether there is such a verb, where a page names it without what it takes."""
    verbs = {one.prog.removeprefix("llm-unlearn "): one for one, _, _ in commands.verbs_of(grammar)}
    return " ".join(words) in verbs


@each_page
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grammar = parser()
    verbs = {one.prog.split()[1] for one, _, _ in commands.verbs_of(grammar)}
    wrong = []
    for line in lines_of(page):
        words = words_of(line)
        if "…" in line or "VERB" in words or words[0] in ARRIVING - verbs or known(words, grammar) or words == ["--help"]:
            continue
        try:
            options, more = grammar.parse_known_args(words)
            if more and (any(word.startswith("-") for word in more) or not hasattr(options, "overrides")):
                wrong.append(line)
        except SystemExit:
            wrong.append(f"{line}: {capsys.readouterr().err.strip().splitlines()[-1]}")
    assert not wrong


def test_a_wrong_command_would_be_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("Say `llm-unlearn pan x.yaml`.\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="pan"):
        test_commands_parse(page, capsys)
    page.write_text("```sh\nllm-unlearn evaluate eval/quick.yaml --modell X   # one\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="modell"):
        test_commands_parse(page, capsys)


def test_exit_statuses_are_those_of_the_code() -> None:
    said = re.search(r"^Exit statuses: (.*)$", (ROOT / "docs/reference/index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert said
    codes = [
        reply.DONE,
        reply.UNFIT,
        reply.REFUSED,
        reply.BUSY,
        reply.UNREACHABLE,
        reply.BUG,
        reply.UNABLE,
        reply.INTERRUPTED,
        reply.TERMINATED,
    ]
    assert [int(part.split()[0]) for part in said[1].split(" · ")] == codes


# ------------------------------------------------------------------------------------------------------ settings files


def test_whole_recipes_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            data = yaml.safe_load(block) if re.search(r"^model:", block, re.MULTILINE) and "\noutput:" in f"\n{block}" else None
            if isinstance(data, dict) and {"model", "data", "output"} <= data.keys():
                (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
                recipe.load(tmp_path / "block.yaml")
                found += 1
    assert found >= 1  # the README's


def test_the_tutorial_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script writes its rows, and `new` writes a recipe and a suite for them."""
    page = ROOT / "docs/tutorial.md"
    monkeypatch.chdir(tmp_path)
    exec(blocks(page, "python")[0], {})
    assert len(Path("forget.jsonl").read_text(encoding="utf-8").splitlines()) == 40
    *_, audit = blocks(page, "yaml")
    Path("audit.yaml").write_text(audit, encoding="utf-8")
    files = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--holdout", "holdout.jsonl"]
    assert cli.main(["new", "forget_customers", "--model", "embedded:target", *files]) == 0
    wanted = recipe.load(Path("forget_customers.yaml"))
    assert wanted.train.stop and wanted.train.stop.until == "holdout" and wanted.output == "runs/forget_customers"
    assert wanted.evaluation and wanted.evaluation.suite == "forget_customers_suite.yaml"
    assert [attack.name for attack in suites.load(Path("audit.yaml")).attacks] == ["relearning", "quantization", "adapter_removal"]


@pytest.mark.slow
def test_the_worked_example_of_a_loss_works(tmp_path: Path) -> None:
    """Its edits, made on a copy of the code: the recipe is read by it, and its test passes."""
    page = ROOT / "docs/extending.md"
    cls, union, test = blocks(page, "python")
    (text,) = blocks(page, "yaml")
    shutil.copytree(ROOT / "llm_unlearn", tmp_path / "llm_unlearn", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "eval", tmp_path / "eval")
    losses, terms = (tmp_path / "llm_unlearn/objectives" / name for name in ("likelihood.py", "terms.py"))
    losses.write_text(losses.read_text(encoding="utf-8") + "\n\n" + cls, encoding="utf-8")
    before = terms.read_text(encoding="utf-8")
    old = union.strip().removesuffix(" | Floored")
    assert f"\n{old}\n" in before, "the page shows the union as it was"
    after = before.replace(f"\n{old}\n", f"\n{union.strip()}\n").replace("Ascent, SatImp", "Ascent, Floored, SatImp")
    terms.write_text(after, encoding="utf-8")
    (tmp_path / "recipes/methods/floored.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "test_floored.py").write_text(test, encoding="utf-8")
    read = (
        "from pathlib import Path; from llm_unlearn import catalogue, recipe; import test_floored; "
        "print(catalogue.terms_of(recipe.load(Path('recipes/methods/floored.yaml')))); "
        "test_floored.test_floored_pulls_at_likely_tokens_only()"
    )
    done = subprocess.run(
        [sys.executable, "-c", read], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "floored(forget) + kl(retain)"


# ---------------------------------------------------------------------------------------------------------- references


def specs_of(kind: Any, found: dict[type, None]) -> dict[type, None]:
    """Every spec class that a field's type holds, by the types alone (the reference reads the schema)."""
    for part in typing.get_args(kind):
        specs_of(part, found)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind not in found:
        found[kind] = None
        hints = typing.get_type_hints(kind, include_extras=True)
        for one in dataclasses.fields(kind):
            specs_of(hints[one.name], found)
    return found


def sections_of(text: str) -> list[str]:
    return re.split(r"^#+ ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("kind", [recipe.Recipe, suites.Suite], ids=lambda kind: kind.__name__)
def test_the_reference_has_every_field_of_every_setting(kind: type) -> None:
    page = reference.page(kind, "Title of the page", "")
    sections = sections_of(page)
    kinds = specs_of(kind, {})
    assert len(kinds) > 30
    for one in kinds:
        rows = [re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) for section in sections]
        wanted = [field.name for field in dataclasses.fields(one)]
        assert wanted in rows, f"{one.__name__}: no table of {wanted}"
        if one.__doc__ and one is not kind:
            assert reference.prose(" ".join(one.__doc__.split("\n\n")[0].split())) in page, one.__name__


def test_a_row_of_the_reference_says_type_default_and_meaning() -> None:
    page = reference.page(recipe.Recipe, "Reference", "")
    assert "| `beta` | number > 0 | `0.1` | Inverse temperature; towards 0 it becomes gradient ascent. |" in next(
        section for section in sections_of(page) if section.startswith("npo\n")
    )
    assert "| `output` | string | **required** | The run folder. |" in page


@pytest.mark.parametrize("kind", [recipe.Recipe, suites.Suite], ids=lambda kind: kind.__name__)
def test_links_within_the_reference_hold(kind: type) -> None:
    page = reference.page(kind, "Title of the page", "")
    headings = [reference.slug(one) for one in re.findall(r"^#+ (.+)$", page, re.MULTILINE)]
    assert len(headings) == len(set(headings))
    assert {target[1:] for _, target in links.links_of(page) if target.startswith("#")} <= set(headings)


def test_the_command_line_page_has_every_word() -> None:
    sections = {section.split("\n")[0]: section for section in sections_of(commands.page())}
    verbs = list(commands.verbs_of(parser()))
    assert len(verbs) > 20
    for verb, text, _ in verbs:
        section = sections[verb.prog]
        assert commands.sentence(text) in section
        for word in commands.words_of(verb):
            for name in word.option_strings or [word.metavar or "{" + ",".join(word.choices or ()) + "}"]:
                assert f"`{name}" in section, f"{verb.prog}: {name}"


# -------------------------------------------------------------------------------------------------- papers, leaderboard


def test_every_paper_that_is_cited_has_its_line() -> None:
    page = papers.PAGE.read_text(encoding="utf-8")
    assert papers.lacking(page) == [], "add a line to docs/papers.md, then: python -m scripts.pages.papers"
    assert papers.written(page) == page, "python -m scripts.pages.papers"
    assert "nothing cites it" not in page
    assert "loss `npo`" in page and "rule `project`" in page and "attack `gcg`" in page and "membership attack `min_k`" in page


def test_figures_for_choosing_are_those_of_the_leaderboard() -> None:
    board: dict[str, tuple[str, str]] = {}
    for line in (ROOT / "docs/leaderboard.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| [\w ]+ \| \[([\w\\]+)\]\(.*?\) \|.*?\| (\d\.\d+) ± \S+ \| (\d\.\d+) ±", line):
            board[found[1].replace("\\", "")] = found[2], found[3]
    rows = 0
    for line in (ROOT / "docs/choosing.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and (names := re.findall(r"\[`(\w+)`\]\(\.\./recipes/methods/", cells[1])):
            assert cells[2].split(", ") == [board[name][0] for name in names], line
            assert cells[3].split(", ") == [board[name][1] for name in names], line
            rows += 1
    assert rows >= 8


# ------------------------------------------------------------------------------------------------------------ the site


def test_links_out_of_docs_lead_somewhere_on_the_site() -> None:
    page = "[a](../recipes/methods/wga.yaml) [b](metrics.md#text) "
    page += "[c](../CHANGELOG.md) [`d`](../Makefile) [e](https://e.org) `[f](../x)`"
    assert links.rewritten(page, "docs/methods.md", "methods.md", None) == (
        "[a](reference/shipped.md#recipesmethodswgayaml) [b](metrics.md#text) [c](changelog.md) `d` [e](https://e.org) `[f](../x)`"
    )
    there = links.rewritten("[d](../Makefile)", "docs/methods.md", "methods.md", "https://host/us/it/")
    assert there == "[d](https://host/us/it/blob/main/Makefile)"
    below = links.rewritten("[g](../recipes.md) [h](docs/exact.md)", "docs/reference/index.md", "reference/index.md", None)
    assert below.startswith("[g](../recipes.md)")
    assert links.rewritten("[h](docs/exact.md)", "CHANGELOG.md", "changelog.md", None) == "[h](exact.md)"
    assert links.rewritten("[n](notebook.ipynb)", "docs/index.md", "index.md", None) == "[n](notebook.md)"


def test_the_notebook_is_a_page() -> None:
    text = notebook.page((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    assert text.startswith("# ") and "```python\nfrom llm_unlearn import" in text and text.count("```") % 2 == 0


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="preconnect" href="https://fonts.example" crossorigin>',
        "<link href=//cdn.example/x.css rel=stylesheet>",
        "<img alt='' src='http://img.example/badge.svg'>",
        "@import 'https://fonts.example/css';",
        "a { background: url(https://img.example/x.png) }",
        '<pre class="mermaid">',
    ],
)
def test_a_site_that_would_fetch_is_seen(text: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    from scripts.pages import hooks

    own = '<a href="https://arxiv.org/abs/2404.05868">x</a><link rel="stylesheet" href="site.css"><img src="a.svg">'
    own += '<link rel="canonical" href="https://x.y/">'
    (tmp_path / "good.html").write_text(own, encoding="utf-8")
    assert list(hooks.fetched(tmp_path)) == []
    (tmp_path / "page.html").write_text(f"<p>{text}</p>", encoding="utf-8")
    (found,) = hooks.fetched(tmp_path)
    assert found.startswith("page.html: ")


# ---------------------------------------------------------------------------------------------------- files of the root


def test_the_citation_is_that_of_this_version() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors", "type"} <= said.keys()
    assert said["version"] == project["version"] and said["license"] == project["license"]
    dates = re.search(
        rf"^## {re.escape(project['version'])} — (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert dates and str(said["date-released"]) == dates[1]


@pytest.mark.parametrize("form", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_forms_for_issues_are_forms(form: Path) -> None:
    said = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.name == "config.yml":
        assert isinstance(said["blank_issues_enabled"], bool)
        return
    assert {"name", "description", "body"} <= said.keys()
    ids = [part["id"] for part in said["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert all(part["attributes"].get("label") for part in said["body"] if part["type"] != "markdown")


def test_hooks_before_a_commit_need_no_network() -> None:
    said = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in said["repos"]] == ["local"]
    assert {hook["id"] for hook in said["repos"][0]["hooks"]} == {"ruff", "ruff-format", "mypy"}
    assert all(hook["language"] == "system" for hook in said["repos"][0]["hooks"])
