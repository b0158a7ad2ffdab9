"""The rules of the house ("Never" in docs/architecture.md), read off the syntax trees."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_unlearn import recipe, tree
from llm_unlearn.evaluation import suite as suites

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_unlearn"

ROOMS = (
    "option_values",  # values of the command line's options
    "options",  # the words of the command line: imports nothing
    "reply",  # what a verb answers
    "streams",
    "outward",  # words on their way out: without secrets, and harmless
    "spec",
    "unsaid",  # what errors may say of rows
    "written",  # JSON of programs, read as an object
    "places",  # folders that are to be written to
    "durable",  # how files are written that vouch for something
    "bars",  # what long work shows of itself
    "troubles",  # what is said of an error that no verb refused
    "held",
    "lines",
    "tree",
    "objectives",
    "embedded.population",
    "embedded.prose",
    "chat",  # what a chat template reads besides the turns
    "source",
    "gguf",  # headers of GGUF files, and those in packages
    "base_names",
    "withheld",  # settings for strangers
    "training.vectors",
    "training.dose",
    "training.gradients",
    "training.privacy",  # settings, and an accountant that is imported late
    "sections",
    "methods",  # settings and equations: what is heavy is asked of a protocol
    "recipe",
    "folder",
    "at_work",
    "catalogue",
    "hub.fetching",  # hub ids, which models are loaded by
    "data",
    "models",
    "training",
    "embedded.target",
    "bases",  # names of base models: embedded, GGUF, made by recipes
    "evaluation",
    "attacks",
    "evaluation.suite",  # names attacks beside measures, and is read before anything heavy
    "evaluation.numbers",
    "evaluation.rows",
    "look",
    "compatibility",  # of a suite and a retrained model with a recipe
    "report",
    "thresholds",
    "results",
    "run",
    "retrained",  # carries out a recipe, for others to be compared with its model
    "exact",  # runs in pieces: begins, looks and reports as `run` does
    "auditing",  # trains a recipe as `run` does
    "alternates",
    "plan",
    "starter",  # writes a recipe and its suite for a model and data, by the memory that `plan` counts
    "compare",
    "candidates",
    "many",
    "children",
    "bench",
    "following",
    "sweeping",  # runs one recipe many times, as bench runs many once
    "requests",  # runs a recipe and reads its numbers; its sub-verbs stand in its own verbs.py
    "checking",
    "doctor",
    "completion",
    "hub",  # reads what a run left, and merges as `requests` releases
    "verbs",
    "cli",
    "api",  # for programs and notebooks; the cache is where the command line has it
)
"""In the order in which they are built: a room imports only itself and rooms that stand before it."""

MEASURES = {
    f"evaluation/{name}.py"
    for name in ("memorization", "membership", "membership_attacks", "extraction", "utility", "text", "distribution", "tables")
}
LINES, LINES_OF_A_FUNCTION = 320, 65
LONG_FILES = {"embedded/population.py"}  # mostly names, towns and sentences


@dataclass(frozen=True)
class Import:
    """One imported module; `late` inside a function, `typing` under `if TYPE_CHECKING`."""

    module: str
    line: int
    late: bool
    typing: bool


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    file: str  # relative to the package, "data/batch.py"
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """`data.batch`; a room's `__init__` is named as the room."""
        return self.file.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix(".")

    @property
    def imports(self) -> list[Import]:
        return list(imports_of(self.tree))


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """Every import, by the full name of the module: `from llm_unlearn.data import batch` is llm_unlearn.data.batch."""

    def walk(nodes: Iterable[ast.AST], late: bool, typing: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (Import(name.name, node.lineno, late, typing) for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"line {node.lineno}: imports are written from the top"
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    ours = node.module.split(".")[0] == "llm_unlearn" and is_module(whole)
                    yield Import(whole if ours else node.module, node.lineno, late, typing)
            elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                yield from walk(node.body, late, True)
                yield from walk(node.orelse, late, typing)
            else:
                inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(ast.iter_child_nodes(node), late or inside, typing)

    return walk(tree.body, False, False)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def all_modules() -> list[Module]:
    files = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)
    texts = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in files}
    return [Module(file, text, ast.parse(text)) for file, text in texts.items()]


MODULES = all_modules()
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)


def ours(one: Import) -> str | None:
    """The module of ours that is imported, without the package's name; None for anybody else's."""
    return one.module.removeprefix("llm_unlearn").removeprefix(".") if one.module.split(".")[0] == "llm_unlearn" else None


def top(one: Import) -> str:
    return one.module.split(".")[0]


def room(name: str) -> str | None:
    """The room of a module: the longest entry of `ROOMS` that it is, or lies in."""
    return max((one for one in ROOMS if name == one or name.startswith(one + ".")), key=len, default=None)


def where(found: Callable[[ast.AST], bool]) -> dict[str, list[int]]:
    """File -> the lines on which such a node stands."""
    places = {one.file: [getattr(node, "lineno", 0) for node in ast.walk(one.tree) if found(node)] for one in MODULES}
    return {file: lines for file, lines in places.items() if lines}


# --------------------------------------------------------------------------------------------------- the walker itself


def test_the_walker_sees_every_kind_of_import() -> None:
    text = (
        "import torch.nn as nn\nfrom typing import TYPE_CHECKING\n"
        "from llm_unlearn.data import batch\nfrom llm_unlearn import recipe, main\n"
        "if TYPE_CHECKING:\n    from peft import PeftModel\nelse:\n    import re\n"
        "def f():\n    with open('x'):\n        import yaml\n"
    )
    found = [(one.module, one.late, one.typing) for one in imports_of(ast.parse(text))]
    assert found == [
        ("torch.nn", False, False),
        ("typing", False, False),
        ("llm_unlearn.data.batch", False, False),
        ("llm_unlearn.recipe", False, False),
        ("llm_unlearn", False, False),
        ("peft", False, True),
        ("re", False, False),
        ("yaml", True, False),
    ]
    assert len(MODULES) > 25 and {"cli.py", "training/loop.py", "objectives/terms.py"} <= {one.file for one in MODULES}


# ---------------------------------------------------------------------------------------------------- who imports whom


@each_module
def test_imports_go_one_way(module: Module) -> None:
    """Rule 10: no import runs back up the plan, those inside functions and for type checkers included."""
    if module.file in ("__init__.py", "__main__.py"):
        assert {ours(one) for one in module.imports if not one.typing} <= {"cli", None}
        return
    mine = room(module.name)
    if mine is None:
        assert module.file.endswith("/__init__.py") and module.name == "embedded", f"{module.file} is in no room: add it to ROOMS"
        assert not module.imports
        return
    for one in module.imports:
        name = ours(one)
        if name is not None and mine != "cli":
            theirs = room(name)
            assert theirs is not None, f"{module.file}:{one.line} imports {one.module}"
            assert ROOMS.index(theirs) <= ROOMS.index(mine), (
                f"{module.file}:{one.line}: {mine} imports {theirs}, which comes after it"
            )


def test_there_is_no_circle() -> None:
    graph = {one.name: {name for i in one.imports if (name := ours(i))} for one in MODULES if one.file != "__init__.py"}
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                follow(other, (*path, name))
            done.add(name)

    for name in graph:
        follow(name, ())
    assert {"spec", "recipe", "training.loop", "evaluation.passes", "cli"} <= done


@each_module
def test_losses_know_nothing_of_models(module: Module) -> None:
    """Rule 1; torch is imported late, so that a recipe is checked without it."""
    if room(module.name) != "objectives":
        return
    for one in module.imports:
        name = ours(one)
        assert name is None or room(name) in ("objectives", "spec"), f"{module.file}:{one.line}: {one.module}"
        assert top(one) not in ("transformers", "peft", "accelerate", "datasets"), f"{module.file}:{one.line}: {one.module}"
        assert top(one) != "torch" or one.late or one.typing, f"{module.file}:{one.line}: torch belongs into a function"


@each_module
def test_training_and_evaluation_do_not_know_each_other(module: Module) -> None:
    """Rule 2: they meet in attacks/ and run.py."""
    apart = {"training": "evaluation", "evaluation": "training"}
    for one in module.imports:
        name = ours(one)
        assert name is None or room(name) != apart.get(room(module.name) or "", ""), f"{module.file}:{one.line}: {one.module}"


def test_measures_take_tables_and_give_numbers() -> None:
    """Rule 3."""
    measures = [one for one in MODULES if one.file in MEASURES]
    assert {one.file for one in measures} == MEASURES
    for module in measures:
        for one in module.imports:
            assert top(one) not in ("torch", "transformers", "peft", "accelerate", "datasets"), (
                f"{module.file}:{one.line}: {one.module}"
            )
            name = ours(one)
            assert name is None or f"{name.replace('.', '/')}.py" in MEASURES | {"spec.py"}, (
                f"{module.file}:{one.line}: {one.module}"
            )


LIGHT = {
    "attacks/layers.py",
    "attacks/soft_prompt.py",
    "attacks/gcg.py",
    "attacks/control.py",
    "attacks/two_model.py",
    "attacks/rewrites.py",
    "attacks/rows.py",
    "__init__.py",
    "__main__.py",
    "cli.py",
    "api.py",
    "option_values.py",
    "options.py",
    "starter/verb.py",
    "reply.py",
    "outward.py",
    "streams.py",
    "checking.py",
    "doctor.py",
    "completion.py",
    "thresholds.py",
    "verbs.py",
    "alternates/__init__.py",
    "alternates/request.py",
    "alternates/usage.py",
    "alternates/writing.py",
    "troubles.py",
    "held.py",
    "spec.py",
    "bars.py",
    "unsaid.py",
    "written.py",
    "durable.py",
    "lines.py",
    "recipe.py",
    "folder.py",
    "at_work.py",
    "catalogue.py",
    "compare.py",
    "candidates.py",
    "many.py",
    "children.py",
    "bench.py",
    "sweeping/command.py",
    "sweeping/space.py",
    "sweeping/held.py",
    "sweeping/study.py",
    "sweeping/pruning.py",
    "sweeping/running.py",
    "sweeping/choosing.py",
    "sweeping/saying.py",
    "requests/service.py",
    "requests/records.py",
    "requests/file.py",
    "requests/ledger.py",
    "requests/chain.py",
    "requests/matching.py",
    "requests/derived.py",
    "requests/judging.py",
    "requests/ways.py",
    "requests/certificate.py",
    "requests/verifying.py",
    "requests/serving.py",
    "requests/stores.py",
    "requests/verbs.py",
    "evaluation/suite.py",
    "evaluation/numbers.py",
    "evaluation/tasks.py",
    "evaluation/task_files.py",
    "evaluation/task_code.py",
    "attacks/finding.py",
    "attacks/registry.py",
    "attacks/relearning.py",
    "attacks/quantization.py",
    "attacks/adapter_removal.py",
    "attacks/shadows.py",
    "attacks/asking.py",
    "attacks/gap.py",
    "attacks/robustness.py",
    "embedded/population.py",
    "methods/exact.py",
    "methods/registry.py",
    "exact/command.py",
    "following/command.py",
    "following/standing.py",
    "following/series.py",
    "following/state.py",
    "auditing/request.py",
    "hub/fetching.py",
    "gguf.py",
    "base_names.py",
    "withheld.py",
    "hub/describing.py",
    "hub/contents.py",
    "hub/limits.py",
    "hub/card.py",
    "hub/failures.py",
    "hub/pushing.py",
    "hub/command.py",
}


@each_module
def test_what_refuses_a_recipe_imports_nothing_heavy_at_the_top(module: Module) -> None:
    if module.file in LIGHT | MEASURES or room(module.name) == "objectives":
        for one in module.imports:
            heavy = top(one) in (
                "torch",
                "transformers",
                "peft",
                "accelerate",
                "datasets",
                "scipy",
                "sklearn",
                "rouge_score",
                "rich",
                "jinja2",
                "optuna",
                "sqlalchemy",
            )
            assert not heavy or one.late or one.typing, f"{module.file}:{one.line}: {one.module}"


LIBRARIES = {  # rule 5: who may import what
    "peft": r"models/\w+\.py",
    "bitsandbytes": r"models/\w+\.py",
    # an attack that trains has an accelerator of its own (audit), and says so (finding); many.py, results.py: the type only
    "accelerate": r"training/\w+\.py|run\.py|evaluation/(passes|likelihood|generation|answering|harness)\.py|embedded/target\.py"
    r"|attacks/(audit|finding)\.py|look\.py|many\.py|results\.py"
    r"|auditing/trial\.py|checking\.py"  # the type only
    r"|exact/(pieces|forgetting)\.py",  # lines are dealt to processes
    "yaml": r"(spec|lines)\.py|evaluation/task_code\.py",  # the last to see what a file of the library's would run
    "pydantic": r"(spec|tree)\.py",
    "pydantic_core": r"nowhere",
    "datasets": r"data/sources\.py",
    "lm_eval": r"evaluation/(harness|scoring|task_files|task_code)\.py",  # an extra: the latter two import it late
    "liger_kernel": r"models/kernels\.py",  # an extra, imported late
    "kronfluence": r"training/ekfac\.py",  # an extra: edits.py imports that file late
    "pyarrow": r"report/columns\.py",
    "pandas": r"api\.py",
    "opacus": r"training/privacy\.py",  # an extra, imported late
    "huggingface_hub": r"hub/\w+\.py|models/load\.py|doctor\.py",  # imported late
    "httpx2": r"hub/failures\.py",  # the errors of huggingface_hub's own client
    "sqlite3": r"requests/(records|file|ledger|chain)\.py",
    "optuna": r"sweeping/study\.py",  # an extra, imported late
    "sqlalchemy": r"sweeping/study\.py",  # comes with it
    "rapidfuzz": r"requests/matching\.py",
    "cryptography": r"requests/(certificate|serving)\.py",  # serving.py: the type only
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_its_place(library: str) -> None:
    found = {one.file for one in MODULES if any(top(i) == library for i in one.imports)}
    assert {file for file in found if not re.fullmatch(LIBRARIES[library], file)} == set()
    assert found or library == "pydantic_core"


def test_the_environment_is_read_where_a_process_begins() -> None:
    """Rule 5; the embedded target reads it only to hand it to its child processes."""

    def environment(node: ast.AST) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name in ("environ", "environb", "getenv", "putenv", "unsetenv")

    assert set(where(environment)) <= {"cli.py", "embedded/target.py"}
    imported = where(lambda node: isinstance(node, ast.ImportFrom) and node.module == "os")
    assert not imported, "import os, so that os.environ can be seen"


# --------------------------------------------------------------------------------------------------- what stands where


def call_of(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names


def given(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and any(word.arg in names for word in node.keywords)


def test_a_model_is_called_in_scores_and_generates_in_generation() -> None:
    """Rule 4; passes.py was cut in five by subject: which passes, sets, likelihood, generation, kept parts. combined.py makes a
    model of models: it puts a head in the place of theirs, and is itself what is called. trials.py compares scores with the model's
    own forward pass. adapter_targets.py leaves the head out, and tries which layers are called; outline.py
    runs a model without weights; merging.py compares a merged model with the unmerged one. decoding.py tries how a model can be
    asked to generate; structure.py looks at the head."""
    assert set(where(lambda node: call_of(node, "generate"))) == {"evaluation/generation.py", "models/decoding.py"}
    assert set(where(lambda node: call_of(node, "base_model", "lm_head", "get_output_embeddings"))) == {
        "models/scores.py",
        "models/combined.py",
        "models/adapter_targets.py",
        "models/merging.py",
        "models/structure.py",
    }
    assert set(where(lambda node: given(node, "input_ids", "inputs_embeds"))) == {
        "models/decoding.py",
        "models/merging.py",
        "models/outline.py",
        "models/scores.py",
        "models/trials.py",
        "models/adapter_targets.py",
        "evaluation/generation.py",
    }
    passes = where(lambda node: given(node, "input_ids") and not call_of(node, "generate"))
    modules = ("adapter_targets", "merging", "outline", "scores", "trials")
    assert set(passes) == {f"models/{name}.py" for name in modules}, "what is given input_ids in generation.py generates"
    assert not where(lambda node: given(node, "labels")), "transformers' own loss is a mean over one micro-batch"
    states = where(lambda node: isinstance(node, ast.Attribute) and node.attr in ("last_hidden_state", "hidden_states"))
    assert set(states) == {"models/scores.py"}


def test_nobody_else_marks_or_shifts_labels() -> None:
    """Rule 4: `-100` in batch.py or nowhere."""

    def mark(node: ast.AST) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return isinstance(node.operand, ast.Constant) and node.operand.value == 100
        return given(node, "ignore_index") or (isinstance(node, ast.Attribute) and node.attr == "ignore_index")

    assert set(where(mark)) <= {"data/batch.py"}
    assert set(where(lambda node: call_of(node, "cross_entropy", "nll_loss"))) == set(), "they shift nothing and divide too early"


def test_no_loss_takes_a_mean() -> None:
    """Rule 7: the loop divides, once, by the window's units."""
    means = where(lambda node: call_of(node, "mean", "nanmean", "average") or given(node, "reduction"))
    assert {file for file in means if file.split("/")[0] in ("objectives", "training", "models", "data")} == set()

    def by_a_count(node: ast.AST) -> bool:
        """By the vocabulary or the hidden size a loss may divide (shape[-1]), and by the length of an answer; not by the batch."""
        return (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Div)
            and bool(re.search(r"\blen\(|numel|size|shape\[0\]", ast.unparse(node.right)))
        )

    assert {file for file in where(by_a_count) if file.startswith("objectives/")} == set()


@each_module
def test_no_settings_travel_unnamed(module: Module) -> None:
    """Rule 6: no `**kwargs` passes through a room. A decoder's keywords are its architecture's, and what stands in its place hands
    them on."""
    if module.file in ("models/combined.py", "models/packing.py"):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert node.args.kwarg is None, f"{module.file}:{node.lineno}: **{node.args.kwarg and node.args.kwarg.arg}"


@each_module
def test_no_room_is_for_anything_and_everything(module: Module) -> None:
    """Rule 8."""
    vague = {"utils", "util", "base", "common", "helpers", "helper", "misc", "tools", "core"}
    assert not vague & set(module.file.removesuffix(".py").split("/"))


@each_module
def test_init_files_hand_names_on_and_define_nothing(module: Module) -> None:
    """Rule 8; the package's own hands most names on when they are asked for."""
    if not module.file.endswith("__init__.py"):
        return
    late = ("__getattr__", "TYPE_CHECKING") if module.file == "__init__.py" else ()
    for node in module.tree.body:
        names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node is module.tree.body[0]
        if (isinstance(node, ast.FunctionDef) and node.name in late) or (
            isinstance(node, ast.If) and ast.unparse(node.test) in late
        ):
            continue
        assert text or isinstance(node, (ast.Import, ast.ImportFrom)) or names in (["__all__"], ["__version__"]), (
            f"{module.file}:{node.lineno}"
        )


def test_no_class_inherits_from_a_class_of_ours() -> None:
    """Rule 9: protocols and composition."""
    classes = [(one, node) for one in MODULES for node in ast.walk(one.tree) if isinstance(node, ast.ClassDef)]
    names = {node.name for _, node in classes}
    assert {"Recipe", "NPO", "Suite", "Refused", "Scorer"} <= names
    for module, node in classes:
        for base in node.bases:
            inner = base.value if isinstance(base, ast.Subscript) else base
            whole = ast.unparse(inner)
            assert whole.split(".")[-1] not in names, f"{module.file}:{node.lineno}: {node.name}({whole})"


@each_module
def test_every_file_opens_with_a_sentence(module: Module) -> None:
    if module.tree.body:  # an empty __init__ has nothing to say
        text = ast.get_docstring(module.tree)
        assert text and len(text.split()) > 3, module.file


@each_module
def test_files_and_functions_are_short(module: Module) -> None:
    count = len(module.text.splitlines())
    assert count <= LINES or module.file in LONG_FILES, f"{module.file}: {count} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= LINES_OF_A_FUNCTION, f"{module.file}:{node.lineno}: {node.name} has {length} lines"


@each_module
def test_every_public_class_says_what_it_is(module: Module) -> None:
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module.file}:{node.lineno}: {node.name}"


# -------------------------------------------------------------------------------------------------------- shipped YAML


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_names_no_machine(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a hub id was asked for"))
    monkeypatch.chdir(ROOT)
    wanted = recipe.load(path)
    assert wanted.terms and wanted.hash
    if wanted.evaluation:
        assert suites.load(tree.locate(wanted.evaluation.suite, path)).measures
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45, "20 to 40 lines, and what two recipes share stands in one that they extend"
    assert not re.search(r"num_processes|num_machines|cuda|gpu_ids", text), "a machine is described in launch/"


@pytest.mark.parametrize("path", sorted((ROOT / "eval").rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_suite_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a hub id was asked for"))
    monkeypatch.chdir(ROOT)
    assert suites.load(path).sets


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.y*ml")), ids=lambda path: path.name)
def test_every_launch_file_is_read_and_holds_no_hyper_parameter(path: Path) -> None:
    """Accelerate refuses a key that it does not know; mixed precision is the recipe's (`model.precision`)."""
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.mixed_precision in (None, "no")
    config = found.fsdp_config
    assert not config or {name.removeprefix("fsdp_") for name in config} <= {
        "version", "auto_wrap_policy", "reshard_after_forward", "state_dict_type", "cpu_ram_efficient_loading",
        "activation_checkpointing",
    }  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert f"launch/{path.name}" in text.splitlines()[0] or "launch/slurm.sh" in text.splitlines()[0], "says how it is started"
    assert not re.search(r"\b(lr|epochs|batch|accumulation|clip)", text), "a recipe says how a model is trained"


def test_the_slurm_file_names_files_that_are_there() -> None:
    text = (ROOT / "launch" / "slurm.sh").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:launch|recipes)/\w+\.(?:yaml|sh)", text))
    assert {"launch/multi_node.yaml", "launch/fsdp2.yaml"} <= named and all((ROOT / name).is_file() for name in named)
