"""Recipes: both readings of a file, what is refused and how, overrides, `extends`, hash, schema, and lightness."""

import ast
import json
import multiprocessing
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import llm_unlearn
from llm_unlearn import recipe, sections, tree
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.objectives.terms import AnyLoss
from llm_unlearn.source import Alternate
from llm_unlearn.spec import Refused, fingerprint, plain, schema, to_yaml
from llm_unlearn.tree import LAUNCH_FIRST, LAUNCH_LAST

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SUITES = sorted((ROOT / "eval").glob("*.yaml"))
LOSSES = get_args(get_args(AnyLoss)[0])

MINIMAL = """\
seed: 0
output: runs/x
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo, beta: 0.1}}
train: {lr: 1.0e-4}
"""
"""A whole recipe; the numbers of its lines are in the expectations below."""

RETAIN = "data.retain={source: embedded:retain, prompt: question, answer: answer}"
KEEP = "objective.retain={loss: {name: nll}}"
DPO = "objective.forget.loss={name: dpo}"
ALTERNATE = "data.forget.alternate={source: embedded:refusals, answer: text}"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the hub."""

    def refuse(*_: object) -> None:
        raise AssertionError("a recipe was checked over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def written(folder: Path, text: str = MINIMAL, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def launchable(body: str) -> str:
    return f"{LAUNCH_FIRST}\n{body}{LAUNCH_LAST}\n"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(Refused) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- shipped files, both readings


def test_there_are_recipes_and_suites() -> None:
    assert "forget_lora.yaml" in {path.name for path in RECIPES}
    assert "quick.yaml" in {path.name for path in SUITES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_read_as_yaml_is_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wanted = recipe.load(path)
    by_a_plain_reader = yaml.safe_load(path.read_text())
    assert by_a_plain_reader.pop("launch") == 'r"""'
    assert wanted.seed == by_a_plain_reader.get("seed", wanted.seed)
    if wanted.evaluation:
        suites.load(tree.locate(wanted.evaluation.suite, path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_read_as_python_is_one_launch_call(path: Path) -> None:
    settings, imported, call = ast.parse(path.read_text()).body
    assert isinstance(settings, ast.AnnAssign) and settings.value is None
    assert isinstance(settings.target, ast.Name) and settings.target.id == "launch"
    assert isinstance(settings.annotation, ast.Constant)
    as_python, as_yaml = yaml.safe_load(str(settings.annotation.value)), yaml.safe_load(path.read_text())
    assert {"launch": 'r"""', **as_python} == as_yaml, "both readings hold the same settings"
    assert ast.unparse(imported) == "from llm_unlearn import launch"
    assert ast.unparse(call) == "launch(__file__)"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_run_as_python_launches_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(llm_unlearn, "launch", launched.append)
    runpy.run_path(str(path), run_name="__main__")
    assert launched == [str(path)]


def test_launch_runs_the_file_with_the_words_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, launchable(MINIMAL))
    words: list[Any] = []

    def main(given: list[str]) -> int:
        words.append(given)
        return 7

    monkeypatch.setattr("llm_unlearn.cli.main", main)
    monkeypatch.setattr(sys, "argv", [str(path), "train.lr=1e-5", "--resume"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert words == [["run", str(path), "train.lr=1e-5", "--resume"]]
    assert ended.value.code == 7


def test_launch_does_nothing_in_a_worker_process(tmp_path: Path) -> None:
    """A worker that imports the main file again must not start a second run: this recipe would end it with status 2."""
    path = written(tmp_path, launchable(MINIMAL.replace("seed: 0", "sead: 0")))
    worker = multiprocessing.get_context("spawn").Process(target=runpy.run_path, args=(str(path),), kwargs={"run_name": "__main__"})
    worker.start()
    alone = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    worker.join()
    assert worker.exitcode == 0
    assert alone.returncode == 2 and f"{path}:2: sead: unknown key" in alone.stderr


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_a_shipped_suite_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert suites.load(path).measures


# ---------------------------------------------------------------------------------------------- reading never executes


ESCAPES = {
    "triple quotes and code in the middle": launchable(MINIMAL + '# """; {code}; r"""\n'),
    "code after the launch line": launchable(MINIMAL).replace("launch(__file__)", "launch(__file__); {code}"),
    "another last line": f'{LAUNCH_FIRST}\n{MINIMAL}# """; {{code}}\n',
    "code instead of the quoted text": launchable(MINIMAL).replace('r"""', '{code} or r"""', 1),
    "a call around the quoted text": launchable(MINIMAL).replace('r"""', 'print(r"""', 1).replace('# """;', '# """);'),
    "an f-string": launchable("# {{{code}}}\n" + MINIMAL).replace('r"""', 'f"""', 1),
    "settings before the launch line": "seed: 0\n" + launchable(MINIMAL.replace("seed: 0\n", "")),
    "no last line": f"{LAUNCH_FIRST}\n{MINIMAL}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_that_would_run_something_else_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    path = written(tmp_path, ESCAPES[name].replace("{{{code}}}", "{" + code + "}").replace("{code}", code))
    said = refusal(path)
    assert str(path) in said and LAUNCH_FIRST in said and LAUNCH_LAST in said
    assert not mark.exists()


def test_comments_after_the_launch_line_do_no_harm(tmp_path: Path) -> None:
    assert recipe.load(written(tmp_path, launchable(MINIMAL) + "# the end\n")).seed == 0


def test_a_comment_may_speak_of_launching(tmp_path: Path) -> None:
    assert recipe.load(written(tmp_path, "# how to launch: see docs\n" + launchable(MINIMAL))).seed == 0


def test_reading_does_not_run_python_tags(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = written(tmp_path, MINIMAL + f"x: !!python/object/apply:os.mkdir [{mark}]\n")
    assert f"{path}:9: x:" in refusal(path)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------------ refusals


def edit(before: str, after: str) -> Callable[[str], str]:
    def edited(text: str) -> str:
        assert before in text
        return text.replace(before, after)

    return edited


IN_THE_FILE = {
    "unknown section": (edit("train:", "trian:"), [":8: trian: unknown key", "'train'", "objective"]),
    "unknown key": (edit("lr: 1.0e-4", "leaning_rate: 1"), [":8: train.leaning_rate: unknown key", "lr", "epochs"]),
    "unknown key of a loss": (edit("beta:", "beat:"), [":7: objective.forget.loss.beat: unknown key", "'beta'"]),
    "misspelt loss": (edit("npo", "nop"), [":7: objective.forget.loss.name: found 'nop'", "'npo'", "simnpo, dpo"]),
    "loss without a name": (edit("name: npo, ", ""), [":7: objective.forget.loss.name: missing", "{'beta': 0.1}"]),
    "wrong type": (edit("1.0e-4", "fast"), [":8: train.lr: found 'fast'; expected a valid number"]),
    "text for a number": (edit("seed: 0", "seed: '0'"), [":1: seed: found '0'; expected a valid integer"]),
    "truth for a number": (edit("seed: 0", "seed: true"), [":1: seed: found True; expected a valid integer"]),
    "truth or a country": (edit("seed: 0", "seed: no"), [":1: seed: found 'no', which some read as bool", "true or false"]),
    "a number or an id": (edit("seed: 0", "seed: 0042"), [":1: seed: found '0042', which some read as int", "quote it"]),
    "a number or a time": (edit("seed: 0", "seed: 1:30"), [":1: seed: found '1:30', which some read as int", "a plain number"]),
    "number for a mapping": (edit("model: {base: embedded:target}", "model: 3"), [":3: model: found 3; expected"]),
    "negative": (edit("1.0e-4", "-1.0e-4"), [":8: train.lr: found -0.0001; expected greater than 0"]),
    "negative seed": (edit("seed: 0", "seed: -1"), [":1: seed: found -1; expected greater than or equal to 0"]),
    "negative decay": (edit("lr: 1.0e-4", "weight_decay: -1.0"), [":8: train.weight_decay: found -1.0; expected"]),
    "beta of zero": (edit("0.1", "0.0"), [":7: objective.forget.loss.beta: found 0.0; expected greater than 0"]),
    "beta of zero in dpo": (
        edit("npo, beta: 0.1", "dpo, beta: 0"),
        [":7: objective.forget.loss.beta: found 0; expected greater"],
    ),
    "weight that is no number": (
        edit("0.1}}", "0.1}, weight: .nan}"),
        [":7: objective.forget.weight: found nan; expected a finite number"],
    ),
    "rate that is no number": (edit("1.0e-4", ".nan"), [":8: train.lr: found nan; expected a finite number"]),
    "misspelt choice": (edit("lr: 1.0e-4", "optimizer: adam"), [":8: train.optimizer: found 'adam'", "'adamw'", "sgd"]),
    "key written twice": (lambda text: text + "seed: 1\n", [":9: seed", "twice"]),
    "nested key written twice": (edit("lr: 1.0e-4", "lr: 1.0e-4, lr: 2"), [":8: train.lr", "twice"]),
    "missing key": (edit("output: runs/x\n", ""), ["r.yaml: output: missing", "run folder"]),
    "missing nested key": (edit("{base: embedded:target}", "{}"), [":3: model.base: missing", "hub id"]),
    "missing section": (
        edit(MINIMAL[MINIMAL.index("objective") : MINIMAL.index("train")], ""),
        ["r.yaml: objective: missing"],
    ),
    "missing data file": (
        edit("embedded:forget", "data/none.jsonl"),
        [":5: data.forget.source:", "data/none.jsonl", "looked from"],
    ),
    "missing model folder": (edit("embedded:target", "./none"), [":3: model.base:", "./none", "looked from"]),
    "unknown embedded model": (
        edit("embedded:target", "embedded:tragte"),
        [":3: model.base: found 'embedded:tragte'", "embedded:target"],
    ),
    "unknown embedded data": (
        edit("embedded:forget", "embedded:forgot"),
        [":5: data.forget.source: found 'embedded:forgot'", "embedded:forget"],
    ),
    "no columns": (edit(", prompt: question, answer: answer", ""), [":5: data.forget", "prompt", "messages", "text"]),
    "half the columns": (edit(", answer: answer", ""), [":5: data.forget", "found prompt alone", "answer"]),
    "filter of a wrong type": (
        edit("answer: answer", "answer: answer, where: {a: {b: 1}}"),
        [":5: data.forget.where.a: found {'b': 1}; expected"],
    ),
    "examples of one token": (
        edit("answer: answer", "answer: answer, max_tokens: 1"),
        [":5: data.forget.max_tokens: found 1; expected greater than or equal to 2"],
    ),
    "alternates of running text": (
        lambda text: edit("prompt: question, answer: answer", "text: answer, alternate: {answer: a}")(text).replace("npo", "dpo"),
        [":5: data.forget.alternate:", "running text"],
    ),
    "no terms": (
        edit("objective:\n  forget: {loss: {name: npo, beta: 0.1}}", "objective: {}"),
        [":6: objective: missing", "npo"],
    ),
    "window of a stream that is not there": (
        edit("lr: 1.0e-4", "window: {froget: 3}"),
        [":8: train.window.froget:", "'forget'"],
    ),
    "stop without a retain set": (edit("lr: 1.0e-4", "stop: {}"), [":8: train.stop:", "data.retain"]),
    "chat template that is not there": (
        edit("target}", "target, chat_template: none.jinja}"),
        [":3: model.chat_template:", "none.jinja"],
    ),
    "chain position": (
        lambda text: "extends: [a, b]\n" + text,
        [":1: extends: found ['a', 'b']; expected the name of one other file"],
    ),
    "unknown tag": (edit("1.0e-4", "!rate 3"), ["r.yaml", "8", "!rate"]),
    "impossible date": (edit("1.0e-4", "2024-13-45"), ["r.yaml", "8", "2024-13-45"]),
    "endless list": (edit("1.0e-4", "&a [*a]"), ["r.yaml:8: train.lr"]),
    "two documents": (lambda text: text + "---\nseed: 1\n", ["r.yaml: not valid YAML", "Line 9"]),
    "open bracket": (edit("1.0e-4}", "[1.0e-4"), ["r.yaml: not valid YAML", "Line 9"]),
    "empty file": (lambda text: "", ["r.yaml: found no settings", "seed: 0"]),
    "not a mapping": (lambda text: "- seed\n- 0\n", ["r.yaml: found no settings", "seed: 0"]),
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_wrong_file_is_refused_with_place_key_found_and_expected(name: str, tmp_path: Path) -> None:
    change, expected = IN_THE_FILE[name]
    path = written(tmp_path, change(MINIMAL))
    said = refusal(path)
    assert str(path) in said
    for part in expected:
        assert part in said


COMMAND_LINE = {
    "unknown key": (["train.leaning_rate=1"], ["train.leaning_rate: unknown key", "lr"]),
    "unknown section": (["trian.lr=1"], ["trian: unknown key", "'train'"]),
    "key inside a number": (["seed.x=1"], ["seed: found {'x': 1}; expected a valid integer"]),
    "misspelt loss": (["objective.forget.loss.name=nop"], ["objective.forget.loss.name: found 'nop'", "'npo'"]),
    "wrong type": (["train.lr=fast"], ["train.lr: found 'fast'; expected a valid number"]),
    "negative": (["train.lr=-1"], ["train.lr: found -1; expected greater than 0"]),
    "quantized without an adapter": (
        ["model.quantize=nf4", "model.adapter=null"],
        ["model.quantize:", "model.adapter"],
    ),
    "stream that no loss reads": ([RETAIN], ["data.retain: no loss reads this stream", "objective.retain"]),
    "term on a stream that is not there": ([KEEP], ["objective.retain: reads stream 'retain'", "Valid: forget"]),
    "named stream that is not there": (
        ["objective.forget.stream=froget"],
        ["objective.forget.stream:", "'froget'", "'forget'"],
    ),
    "alternates that nobody reads": ([ALTERNATE], ["data.forget.alternate: no loss reads it", "dpo"]),
    "two prompts that nobody compares": (
        ["data.forget.contrast={expert: a, novice: b}"],
        ["data.forget.contrast: no loss reads it", "elm"],
    ),
    "missing data file": (["data.forget.source=none.csv"], ["data.forget.source:", "none.csv", "looked from"]),
    "missing alternate file": (
        [DPO, "data.forget.alternate={source: none.csv, answer: a}"],
        ["data.forget.alternate.source:", "none.csv"],
    ),
    "missing adapter to start from": (["model.start=./none"], ["model.start:", "./none"]),
    "word without a value": (["train.lr"], ["found 'train.lr'; expected key=value, such as train.lr=1e-4"]),
    "word without a key": (["=3"], ["found '=3'; expected key=value"]),
    "word that looks like an option": (["--lr=3"], ["found '--lr=3'; expected key=value"]),
    "value that is no YAML": (["train.lr=[1"], ["train.lr: '[1'", "not valid YAML"]),
    "value that is a date": (["train.lr=2024-13-45"], ["train.lr: found '2024-13-45'; expected a valid number"]),
    "value without an end": (["train.lr=&a [*a]"], ["train.lr: '&a [*a]'", "not valid YAML"]),
    "value with a tag": (["train.lr=!rate 3"], ["train.lr: '!rate 3'", "not valid YAML"]),
}


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_a_wrong_word_on_the_command_line_is_refused(name: str, tmp_path: Path) -> None:
    words, expected = COMMAND_LINE[name]
    said = refusal(written(tmp_path), *words)
    assert "command line: " in said
    for part in expected:
        assert part in said


def test_a_loss_that_compares_needs_an_alternate(tmp_path: Path) -> None:
    path = written(tmp_path)
    said = refusal(path, DPO)
    assert f"{path}:5: data.forget.alternate: missing; loss 'dpo' reads" in said and "embedded:refusals" in said
    assert recipe.load(path, [DPO, ALTERNATE]).data.forget.alternate == Alternate(source="embedded:refusals", answer="text")


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    written(tmp_path, name="forget_lora.yaml")
    said = refusal(tmp_path / "forget_lore.yaml")
    assert f"{tmp_path / 'forget_lore.yaml'}: no such file" in said
    assert f"Did you mean {tmp_path / 'forget_lora.yaml'}?" in said


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(MINIMAL.encode() + b"# \xff\xfe\n")
    assert f"{path}: not a text file in UTF-8" in refusal(path)


def test_all_wrong_keys_are_said_at_once_and_nothing_twice(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("seed: 0", "seed: x").replace("1.0e-4", "-1"))
    lines = refusal(path, "train.sped=1").splitlines()
    assert len(lines) == len(set(lines)) == 3
    assert lines[0].startswith(f"{path}:1: seed:")


# -------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-5"])
def test_every_way_to_write_a_small_number_is_a_number(text: str, tmp_path: Path) -> None:
    assert recipe.load(written(tmp_path, MINIMAL.replace("1.0e-4", text))).train.lr == 1e-5
    assert recipe.load(written(tmp_path), [f"train.lr={text}"]).train.lr == 1e-5


def test_overrides_change_what_they_name_and_leave_the_rest(tmp_path: Path) -> None:
    path = written(tmp_path)
    before, after = (
        recipe.load(path),
        recipe.load(path, ["train.lr=2e-3", "model.adapter={rank: 4}", "train.lr=1e-3", "output=a=b"]),
    )
    assert after.train.lr == 1e-3 and after.train.epochs == before.train.epochs
    assert after.model.adapter == sections.Adapter(rank=4) and after.output == "a=b"
    assert recipe.load(path).train.lr == before.train.lr


def test_another_loss_on_the_command_line_does_not_inherit_settings(tmp_path: Path) -> None:
    assert plain(recipe.load(written(tmp_path), ["objective.forget.loss.name=ascent"]).objective["forget"].loss) == {
        "name": "ascent"
    }


def test_a_suite_by_name_is_the_short_way_to_write_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    short, whole = (recipe.load(path, [f"evaluation={text}"]) for text in ("eval/quick.yaml", "{suite: eval/quick.yaml}"))
    assert short == whole and short.evaluation and short.evaluation.suite == "eval/quick.yaml"


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    wanted = recipe.load(written(tmp_path))
    with pytest.raises(AttributeError):
        wanted.train.lr = 1.0  # type: ignore[misc]


def test_extends_lays_one_file_over_another(tmp_path: Path) -> None:
    written(tmp_path, launchable(MINIMAL), "below.yaml")
    path = written(tmp_path, launchable("extends: below.yaml\nseed: 3\nobjective: {forget: {loss: {name: ascent}, weight: 2.0}}\n"))
    wanted = recipe.load(path)
    assert (wanted.seed, wanted.output, wanted.train.lr) == (3, "runs/x", 1e-4)
    assert wanted.objective["forget"].loss.name == "ascent" and wanted.objective["forget"].weight == 2


def test_a_wrong_key_is_placed_in_the_file_that_wrote_it(tmp_path: Path) -> None:
    below = written(tmp_path, MINIMAL.replace("1.0e-4", "-1"), "below.yaml")
    path = written(tmp_path, "extends: below.yaml\ntrain: {epochs: -2}\n")
    said = refusal(path)
    assert f"{below}:8: train.lr: found -1" in said and f"{path}:2: train.epochs: found -2" in said


def test_a_file_extends_one_other_and_no_chain(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL, "a.yaml")
    middle = written(tmp_path, "extends: a.yaml\n", "b.yaml")
    path = written(tmp_path, "seed: 1\nextends: b.yaml\n")
    said = refusal(path)
    assert f"{middle}:1: extends:" in said and str(path) in said and "not a chain" in said


def test_a_missing_file_to_extend_is_said_with_the_line_that_names_it(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL, "below.yaml")
    path = written(tmp_path, "seed: 1\nextends: bellow.yaml\n")
    said = refusal(path)
    assert f"{path}:2: extends:" in said and "no such file" in said and "below.yaml?" in said


def test_null_takes_an_inherited_term_out(tmp_path: Path) -> None:
    text = MINIMAL + "# end\n"
    both = text.replace(
        "objective:\n",
        "  retain: {source: embedded:retain, prompt: question, answer: answer}\nobjective:\n  retain: {loss: {name: kl}}\n",
    )
    below = written(tmp_path, both, "below.yaml")
    assert set(recipe.load(below).objective) == {"forget", "retain"}
    wanted = recipe.load(written(tmp_path, "extends: below.yaml\nobjective: {retain: null}\ndata: {retain: null}\n"))
    assert set(wanted.objective) == {"forget"} and set(wanted.sources) == {"forget"}


# ---------------------------------------------------------------------------------------- hash, flattened file, schema


def test_the_hash_is_about_content_and_not_about_order_or_output(tmp_path: Path) -> None:
    first = recipe.load(written(tmp_path))
    head, tail = MINIMAL.split("model:")
    turned = recipe.load(
        written(tmp_path, launchable("model:" + tail.replace("name: npo, beta: 0.1", "beta: 0.1, name: npo") + head))
    )
    assert turned.hash == first.hash
    path = written(tmp_path)
    words = [RETAIN, "objective={forget: null}", "objective={b: {loss: {name: nll}, stream: retain}}"]
    terms = ["objective.a={loss: {name: npo}, stream: forget}", "train.window={retain: 3, forget: 4}"]
    one = recipe.load(path, [*words, *terms])
    other = recipe.load(path, [*words[:2], terms[0], words[2], "train.window={forget: 4, retain: 3}"])
    assert list(one.objective) != list(other.objective) and one.hash == other.hash
    assert recipe.load(path, ["output=runs/y"]).hash == first.hash
    assert recipe.load(path, ["train.epochs=5", "train.lr=1e-4"]).hash == first.hash, "a default written out is the default"
    assert fingerprint({"a": 1, "new": None}) == fingerprint({"a": 1}) != fingerprint([{"a": 1}, None]), "null is not given"
    for change in (
        "train.lr=2e-4",
        "seed=1",
        "objective.forget.loss.beta=0.2",
        "model.adapter=null",
        "data.forget.limit=3",
    ):
        assert recipe.load(path, [change]).hash != first.hash, change


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_flattened_recipe_is_the_same_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wanted = recipe.load(path)
    again = recipe.load(written(tmp_path, to_yaml(plain(wanted))))
    assert again == wanted and again.hash == wanted.hash


def test_a_flattened_recipe_of_defaults_is_the_same_recipe(tmp_path: Path) -> None:
    wanted = recipe.load(written(tmp_path, MINIMAL.replace("train: {lr: 1.0e-4}\n", "")), ["train.stop={}", RETAIN, KEEP])
    again = recipe.load(written(tmp_path, to_yaml(plain(wanted)), "flat.yaml"))
    assert again == wanted and again.hash == wanted.hash


def docs(path: Path) -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring under it, from the source."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    found.setdefault(node.name, {})[ast.unparse(field.target)] = cleandoc(str(below.value.value))
    return found


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("recipe.py", recipe.Recipe),
        ("objectives/preference.py", recipe.Recipe),
        ("objectives/distribution.py", recipe.Recipe),
        ("objectives/terms.py", recipe.Recipe),
        ("evaluation/suite.py", suites.Suite),
        ("evaluation/membership.py", suites.Suite),
        ("evaluation/membership_attacks.py", suites.Suite),
    ],
)
def test_the_schema_says_what_the_fields_say(file: str, kind: type[object]) -> None:
    whole = schema(kind)
    assert json.loads(json.dumps(whole)) == whole
    known = {kind.__name__: whole, **whole["$defs"]}
    checked = 0
    for name, fields in docs(ROOT / "llm_unlearn" / file).items():
        for field, text in fields.items():
            if name in known:
                assert known[name]["properties"][field]["description"] == text, f"{name}.{field}"
                checked += 1
    assert checked


def test_the_schema_names_every_loss_and_refuses_unknown_keys() -> None:
    whole = schema(recipe.Recipe)
    names = {name for loss in LOSSES for name in get_args(get_type_hints(loss)["name"])}
    assert set(whole["$defs"]["Term"]["properties"]["loss"]["discriminator"]["mapping"]) == names
    assert len(names) == len(LOSSES) + 1 == 27  # idk and relabel are one equation
    assert whole["additionalProperties"] is False
    objects = {name: part for name, part in whole["$defs"].items() if part.get("type") == "object"}
    assert all(part["additionalProperties"] is False for part in objects.values())


def test_every_field_that_is_not_a_name_or_a_section_says_what_it_is() -> None:
    silent = []
    for kind in (recipe.Recipe, suites.Suite):
        whole = schema(kind)
        for name, part in {kind.__name__: whole, **whole["$defs"]}.items():
            for field, about in part.get("properties", {}).items():
                section = "$ref" in about or "anyOf" in about or "discriminator" in about  # its class says what it is
                if field not in ("name", "kind") and not section and "description" not in about:
                    silent.append(f"{name}.{field}")
    assert silent == []


# ----------------------------------------------------------------------------------------------- what stays unimported


HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate")
LIGHTLY = f"""
import sys
def alone(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"):
        raise AssertionError(event)
sys.addaudithook(alone)
from llm_unlearn.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print([name for name in {HEAVY!r} if name in sys.modules], status)
"""


def lightly(*words: str, cwd: Path) -> tuple[str, str]:
    """The last line of standard output, and standard error, of one verb in a fresh process that may start no other."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHTLY, *words], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr


def test_a_bad_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("npo", "nop"))
    last, said = lightly("run", str(path), cwd=tmp_path)
    assert last == "[] 2"
    assert said.startswith(f"error: {path}:7: objective.forget.loss.name: found 'nop'") and "Traceback" not in said


def test_help_comes_from_one_process_that_imports_nothing_heavy(tmp_path: Path) -> None:
    last, _ = lightly("--help", cwd=tmp_path)
    assert last == "[] 0"
    assert not list(tmp_path.iterdir())


def test_the_schema_comes_without_anything_heavy(tmp_path: Path) -> None:
    last, _ = lightly("schema", "suite", cwd=tmp_path)
    assert last == "[] 0"
