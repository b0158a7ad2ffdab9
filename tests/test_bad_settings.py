"""Bad settings: every key of every shipped recipe and suite made wrong in every way, and YAML that means no good. Each is refused
in words that one can read, or means what it says; nothing is done, and nothing takes long."""

import collections
import itertools
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import HOSTILE, WRONG, Keys, content, misspelt, places, put, refusal, without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_unlearn import recipe
from llm_unlearn.cli import main
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.lines import LARGEST, Lines
from llm_unlearn.requests import service
from llm_unlearn.spec import Refused, plain, to_yaml
from llm_unlearn.tree import Tree, read_tree

ROOT = Path(__file__).parents[1]
RECIPE = """\
seed: 0
output: runs/x
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}, weight: VALUE}
"""
always = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=150)
Made = tuple[str, Keys, str, Tree]


def suite_of(tree: Tree) -> suites.Suite:
    """A suite of a tree, as `suites.load` makes it of a file."""
    made = suites.build(suites.Suite, tree)
    if wrong := list(suites._problems(made, tree)):
        raise Refused("\n".join(wrong))
    return made


KINDS: dict[str, tuple[str, Callable[[Tree], Any]]] = {"recipe": ("recipes", recipe.checked), "suite": ("eval", suite_of)}


def made_wrong(kind: str, every: int = 1) -> Iterator[tuple[Keys, str, Tree]]:
    """Every key and item of every shipped file of a kind: taken out, misspelt, and with every wrong value in its place; of all
    these, every so many-th."""
    cases: Iterator[tuple[Keys, str, Callable[[], Tree]]] = (
        (where, name, lambda tree=tree, change=change: Tree(change(), tree.file, tree.places))
        for path in sorted((ROOT / KINDS[kind][0]).rglob("*.yaml"))
        for tree in [read_tree(path)]
        if every == 1 or "tasks" not in tree.data  # the index of lm-evaluation-harness takes half a minute
        for where in places(tree.data)
        for name, change in changes(tree.data, where)
    )
    for where, name, tree in itertools.islice(cases, 0, None, every):
        yield where, name, tree()


def changes(data: dict[str, Any], where: Keys) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "taken out", lambda: without(data, where)
    if isinstance(where[-1], str):
        yield "misspelt", lambda: misspelt(data, where)
    for name, value in WRONG.items():
        yield name, lambda value=value: put(data, where, value)


FREE = ("where", "without", "like", "sets", "objective", "window", "given")
"""What is below these are names that the file chooses."""
EVERY = {"recipe": 31, "suite": 29}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.chdir(ROOT)
    return tmp_path


def tried(kind: str, every: int) -> collections.Counter[str]:
    """Make settings wrong and see what is said; how many were refused, and how many meant something else."""
    seen: collections.Counter[str] = collections.Counter()
    for where, name, tree in made_wrong(kind, every):
        found: list[Any] = []
        said = refusal(lambda tree=tree, found=found: found.append(KINDS[kind][1](tree)))
        seen["accepted" if said is None else "refused"] += 1
        if said is None and name == "misspelt":
            assert len(where) > 1 and where[-2] in FREE, f"{tree.file}: {where} misspelt is accepted"
        if said is None and name not in ("taken out", "megabyte") and seen["accepted"] % 10 == 0:
            again = Lines(to_yaml(plain(found[0])), "again").data
            assert plain(KINDS[kind][1](Tree(again, tree.file))) == plain(found[0]), "what is written out is read as it was"
        if said is not None:
            assert all(line.startswith(f"{ROOT}/") for line in said.split("\n")), said
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_made_wrong_is_refused_or_means_what_it_says(kind: str) -> None:
    seen = tried(kind, EVERY[kind])
    assert seen["refused"] > 800 and seen.total() > 1_000, seen


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_made_wrong_in_every_way(kind: str) -> None:
    seen = tried(kind, 1)
    print(kind, seen)
    assert seen.total() > 40_000, seen


def test_what_takes_a_default_does_not_change_by_being_misspelt(here: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.replace("VALUE", "1").replace("seed", "sed"))
    assert "r.yaml:1: sed: unknown key; did you mean 'seed'?" in (refusal(lambda: recipe.load(here / "r.yaml")) or "")


# ---------------------------------------------------------------------------------------------------------- hostile YAML


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("how", ["file", "word", "suite", "service"])
def test_hostile_yaml_is_refused_at_once(name: str, how: str, here: Path) -> None:
    file = here / "r.yaml"
    value = HOSTILE[name]
    texts = {
        "file": RECIPE.replace("VALUE", value),
        "word": RECIPE.replace("VALUE", "1"),
        "suite": f"sets: {{forget: {{source: embedded:forget, text: answer}}}}\nmeasures: []\nseed: {value}\n",
        "service": service.TEMPLATE + f"apart: {value}\n",
    }
    file.write_text(texts[how])
    load: dict[str, Callable[[], object]] = {
        "file": lambda: recipe.load(file),
        "word": lambda: recipe.load(file, [f"objective.forget.weight={value}"]),
        "suite": lambda: suites.load(file),
        "service": lambda: service.load(file),
    }
    before, began = content(here), time.process_time()
    said = refusal(load[how])
    assert said and time.process_time() - began < 2
    assert ("command line" if how == "word" else f"{file}") in said
    assert content(here) == before and not (ROOT / "pwned").exists()


BOMBS = {
    "billion laughs": "a: &a [" + ", ".join(["lol"] * 10) + "]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(20)),
    "one long text, often": f"a: &a {'x' * 20_000}\nb: [{','.join(['*a'] * 5_000)}]\n",
    "mappings of mappings": "a0: &a0 {k: v}\n" + "".join(f"a{i + 1}: &a{i + 1} {{x: *a{i}, y: *a{i}}}\n" for i in range(40)),
    "10,000 levels of lists": "- " * 10_000 + "x",
    "10,000 levels of keys": "? " * 10_000 + "x",
    "many values": "a: [" + "1," * 250_000 + "]",
    "too large": "#" * (LARGEST + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "many values"])
def test_a_bomb_goes_off_in_no_memory(name: str, here: Path) -> None:
    """Twenty levels of ten are 10²¹ values; what is read takes megabytes."""
    (here / "r.yaml").write_text(BOMBS[name])
    if name == "billion laughs":  # what counts takes three times as long as what is counted
        tracemalloc.start()
    began = time.process_time()
    try:
        said = refusal(lambda: recipe.load(here / "r.yaml"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    took = time.process_time() - began
    assert said and any(word in said for word in ("repeat more than", "more than 50 levels", "bytes; expected settings"))
    print(f"{name}: {took:.2f} s, {most / 2**20:.1f} MiB")
    assert took < 5 and most < 60 << 20


@pytest.mark.long
def test_two_hundred_thousand_values_are_enough(here: Path) -> None:
    (here / "r.yaml").write_text(BOMBS["many values"])
    assert "more than 200,000 values" in (refusal(lambda: recipe.load(here / "r.yaml")) or "")


def test_a_thousand_ids_by_an_alias_are_read(here: Path) -> None:
    """What people write is far from what is refused."""
    ids = ", ".join(f"row-{i}" for i in range(1000))
    source = "{source: embedded:forget, prompt: question, answer: answer"
    text = f"ids: &ids [{ids}]\na: {source}, without: {{id: *ids}}}}\nb: {source}, without: {{id: *ids}}}}\n"
    (here / "r.yaml").write_text(text)
    data = read_tree(here / "r.yaml").data
    assert data["a"] == data["b"] and len(data["b"]["without"]["id"]) == 1000


# ----------------------------------------------------------------------------------------------------------------- files

GOOD = RECIPE.replace("VALUE", "1")
FILES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "a comment": b"# nothing\n",
    "null": b"null\n",
    "a list": b"- output: x\n",
    "a word": b"hello\n",
    "a number": b"3\n",
    "two documents": f"{GOOD}---\n{GOOD}".encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-32": GOOD.encode("utf-32"),
    "Latin-1": GOOD.replace("runs/x", "läufe").encode("latin-1"),
    "binary": bytes(range(256)) * 8,
    "zeros": bytes(1000),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "a zero in it": GOOD.encode().replace(b"runs/x", b"runs\0x"),
    "a bell in it": GOOD.encode().replace(b"runs/x", b"runs\x07x"),
    "tabs": GOOD.replace("  forget", "\tforget").encode(),
    "key twice": f"{GOOD}seed: 1\n".encode(),
    "inner key twice": GOOD.replace("{base:", "{base: x, base:").encode(),
    "no colon": GOOD.replace("seed: 0", "seed 0").encode(),
    "wrong indent": GOOD.replace("  forget: {source", " x: 1\n  forget: {source").encode(),
    "half of it": GOOD[: len(GOOD) // 2].encode(),
    "JSON lines": b'{"output": "x"}\n{"output": "y"}\n',
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "launch alone": f'launch: r"""\n{GOOD}'.encode(),
    "launch and code": f'launch: r"""\n{GOOD}# """; import os; os.system("touch pwned")\n'.encode(),
    "launch, 10,000 deep": ("launch: " + "-" * 10_000 + "1\n" + GOOD).encode(),
    "launch, a sum": ("launch: 1" + "+1" * 20_000 + "\n" + GOOD).encode(),
    "itself": f"extends: r.yaml\n{GOOD}".encode(),
    "extends a folder": f"extends: .\n{GOOD}".encode(),
    "extends nothing": f"extends: none.yaml\n{GOOD}".encode(),
    "extends null": f"extends: null\n{GOOD}".encode(),
    "extends a list": f"extends: [a.yaml, b.yaml]\n{GOOD}".encode(),
    "extends a megabyte": f"extends: {'x' * 200_000}\n{GOOD}".encode(),
    "extends a device": f"extends: /dev/zero\n{GOOD}".encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused(name: str, here: Path) -> None:
    file = here / "r.yaml"
    file.write_bytes(FILES[name])
    before, began = content(here), time.process_time()
    for load in (recipe.load, suites.load, service.load):
        said = refusal(lambda load=load: load(file))
        assert said and str(file) in said
    assert content(here) == before and time.process_time() - began < 3


def test_the_corpus_is_refused(here: Path) -> None:
    """Files as they come from somewhere else: an editor, another program, somebody who means no good."""
    files = sorted((Path(__file__).parent / "corpus").glob("*.yaml"))
    assert len(files) >= 10
    for file in files:
        for load in (recipe.load, suites.load, service.load):
            said = refusal(lambda load=load, file=file: load(file))
            assert said and str(file) in said, file.name


def test_what_is_no_file_is_refused_without_waiting_for_it(here: Path) -> None:
    os.mkfifo(here / "pipe.yaml")
    (here / "folder.yaml").mkdir()
    (here / "nothing.yaml").symlink_to(here / "gone")
    (here / "a.yaml").symlink_to(here / "b.yaml")
    (here / "b.yaml").symlink_to(here / "a.yaml")
    kinds = {"pipe.yaml": "is no ordinary file", "folder.yaml": "is a folder", "nothing.yaml": "is a link to nothing"}
    for name, said in {
        **kinds,
        "a.yaml": "is a link to nothing",
        "/dev/zero": "is no ordinary file",
        "x" * 5000: "no such file",
    }.items():
        for load in (recipe.load, suites.load, service.load):
            assert said in (refusal(lambda load=load, name=name: load(here / name)) or "")


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"], ["a", "b", "c"]], ids=["itself", "each other", "a chain"])
def test_a_circle_of_extends_is_refused(names: list[str], here: Path) -> None:
    for one, other in itertools.pairwise(names):
        (here / f"{one}.yaml").write_text(f"extends: {other}.yaml\n{GOOD}")
    if names == ["a", "b", "c"]:
        (here / "c.yaml").write_text(GOOD)
    assert "a file may extend one other, not a chain" in (refusal(lambda: recipe.load(here / "a.yaml")) or "")


def test_a_byte_order_mark_is_no_part_of_a_key(here: Path) -> None:
    (here / "r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    (here / "launched.yaml").write_bytes(b"\xef\xbb\xbf" + (ROOT / "recipes" / "forget_lora.yaml").read_bytes())
    assert recipe.load(here / "r.yaml").output == "runs/x" and recipe.load(here / "launched.yaml").terms


def test_names_are_read_as_they_are_written(here: Path) -> None:
    """In YAML 1.1 `on` is true, and 1_0 is ten; as the name of a column neither is."""
    text = GOOD.replace("answer: answer}", "answer: answer, where: {on: 1, 1_0: 2, 2024-01-02: x, null: y}}")
    (here / "r.yaml").write_text(text)
    assert list(recipe.load(here / "r.yaml").data.forget.where or ()) == ["on", "1_0", "2024-01-02", "null"]


@pytest.mark.parametrize(
    "text", ["1e5", "12e3", "1e-5", "1_0", "0x10", "1:30", "null", "on", "~", "2024-01-01", "=", "<<", ".inf", ""]
)
def test_text_that_looks_like_a_number_stays_text_in_a_run_folder(text: str) -> None:
    """A row's id may be 1e5: in the recipe.yaml of a run it must not become 100000.0."""
    assert Lines(to_yaml({"id": text, text or "x": 1}), "x").data == {"id": text, text or "x": 1}


# ---------------------------------------------------------------------------------------------------------- by chance

WORDS = [
    "=", "=x", "x", "x=", "-x=1", "--seed=1", "seed=", "seed==1", "seed=x", "seed=1e999", "seed=[1", "seed={a: 1}",
    "seed=-1", "seed=99999999999999999999", "seed.a=1", ".seed=1", "seed.=1", "a..b=1", "a.b.c.d.e.f=1",
    ".".join("abcdefghij" * 10) + "=1", "a." * 10_000 + "b=1", "x" * 1_000_000 + "=1", "seed=" + "x" * 1_000_000, "se\0ed=1",
    "seed=\0", "se\udcffed=1", "seed=\udcff", "model=null", "model=1", "model.base=null", "model.base.x=1", "data=[]",
    "data.forget=embedded:forget", "objective.forget.loss=npo", "objective.forget.loss.name=nppo",
    "objective.forget.loss.beta=-1", "train.lr=fast", "train=1", "train.window.forget=0", "train.window.nobody=1",
    "extends=r.yaml", "launch=1", "output=null", "output=", "output=' '", "evaluation=none.yaml",
    "evaluation.suite=/dev/zero", "evaluation=[1]", "data.forget.source=none.jsonl", "seed=!!python/name:os.system",
    "seed=&a [*a]", "=" * 10_000, "seed=\x1b[2J", "data.forget.where.x=[[1]]", "data.forget.max_tokens=1",
    "method.name=retrain",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS, ids=range(len(WORDS)))
def test_a_wrong_word_is_refused(word: str, here: Path) -> None:
    (here / "r.yaml").write_text(GOOD)
    assert refusal(lambda: recipe.load(here / "r.yaml", [word]))


alphabet = st.sampled_from(
    [*":-?[]{},&*!|>'\"%@`#\n \t=~<.0189eEabx_+", "\u2028", "\ufeff", "é", "\x85", "null", "true", "<<", "!!", "---"]
)


@always
@given(text=st.lists(alphabet, max_size=60).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    refusal(lambda: Lines(text, "x"))


@always
@given(word=st.lists(alphabet, max_size=30).map("".join))
def test_any_word_is_read_or_refused(word: str) -> None:
    tree = Tree(Lines(GOOD, "r.yaml").data, "r.yaml")
    refusal(lambda: recipe.checked(read_words(tree, [word])))


def read_words(tree: Tree, words: list[str]) -> Tree:
    from llm_unlearn import tree as room

    return room._override(tree, words)


@always
@given(data=st.data())
def test_any_damage_to_a_recipe_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes of the main recipe overwritten, left out, put twice, and cut off."""
    whole = bytearray((ROOT / "recipes" / "forget_lora.yaml").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        begin, size = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 20))
        match data.draw(st.sampled_from(["over", "out", "twice", "cut"])):
            case "over":
                whole[begin : begin + size] = data.draw(st.binary(min_size=size, max_size=size))
            case "out":
                del whole[begin : begin + size]
            case "twice":
                whole[begin:begin] = whole[begin : begin + size]
            case "cut":
                del whole[max(begin, 20) :]
        whole = whole or bytearray(b"x")
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(bytes(whole))
    refusal(lambda: recipe.load(file))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=8,
)


@always
@given(value=anything)
def test_any_data_stands_in_yaml_as_it_is(value: Any) -> None:
    """What a run folder's recipe says is what the run was."""
    text = to_yaml({"x": value})
    found: list[Any] = []
    said = refusal(lambda: found.append(Lines(text, "x").data))
    assert said is None or "holds U+" in said or "not valid YAML" in said, text
    assert not found or found[0] == {"x": value}


@pytest.mark.parametrize(
    "word", ["train.lr=1e39", "train.clip=1e31", "objective.forget.loss.beta=1e39", "objective.retain.weight=-1e39"]
)
def test_a_number_that_models_cannot_compute_with_is_refused_before_anything_is_read(
    tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = "  retain: {loss: {name: nll}}\n"
    text = RECIPE.replace("runs/x", str(tmp_path / "run")).replace("VALUE", "1.0") + kept
    (tmp_path / "r.yaml").write_text(text)
    assert main(["run", str(tmp_path / "r.yaml"), word]) == 2
    key, _, value = word.partition("=")
    bound = "greater than or equal to -1e30" if value.startswith("-") else "less than or equal to 1e30"
    assert f": {key}: found {float(value):g}; expected {bound}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
