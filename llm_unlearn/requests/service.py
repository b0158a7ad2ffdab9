"""The service file: how deletion requests are served, in which data rows are looked up, and when a request counts as fulfilled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn import recipe as recipes
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.exact import Exact
from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Threshold
from llm_unlearn.source import Source, is_forgotten, same_data, source_problems
from llm_unlearn.spec import NonNegativeFloat, Portion, Refused, dotted, fingerprint, readable, spec
from llm_unlearn.thresholds import problems
from llm_unlearn.tree import Tree, build, is_file, locate, no_such_file, read_tree

TEMPLATE = """\
# How deletion requests are served: llm-unlearn requests add --where person=…, then llm-unlearn requests run
ledger: requests.db                 # who asked for what, and what was done; beside this file
output: runs/requests               # one run folder per serving; beside this file
recipe: recipes/forget_lora.yaml    # how to forget: its data.forget becomes the rows of the requests
suite: eval/quick.yaml              # what is measured, on the rows of each request by themselves
data: {source: embedded:forget, id: id}

thresholds:                         # a request is fulfilled when all of these hold, after every later run too
  - {measure: extraction strength, set: forget, at_most: 0.3}
  - {measure: probability, set: forget, judged: as retrained}
  - {measure: probability, set: retain, at_least: 0.95, of: before}
"""


@spec
class Training:
    """The training data in which the rows of a request are looked up."""

    source: str
    """A hub id, a local file or folder, or embedded:…, as in a recipe; `data.forget` of the recipe names its columns."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; without it, train."""
    id: str
    """Column that names each row; no two rows may have the same."""


@spec
class Service:
    """How deletion requests are served."""

    recipe: str
    """How to forget: a recipe, whose `data.forget` is replaced by the rows of the requests and whose other sets lose them."""
    data: Training
    thresholds: tuple[Threshold, ...]
    """What must hold for a request to count as fulfilled."""
    suite: str | None = None
    """What is measured; without it, the suite of the recipe."""
    ledger: str = "requests.db"
    """The SQLite file that holds the requests, from the folder of this file."""
    output: str = "runs/requests"
    """Where the run folders go, from the folder of this file."""
    apart: NonNegativeFloat = 0.1
    """Weight of the penalty that keeps a later adapter's directions apart from earlier ones' (O3, Gao et al. 2024, 2407.10223)."""
    most: Portion = 0.2
    """A request for a larger share of the rows must be confirmed."""


@dataclass(frozen=True)
class Office:
    """A service with all that it names, read and checked."""

    service: Service
    recipe: Recipe
    suite: suites.Suite
    suite_name: str
    ledger: Path
    output: Path

    @property
    def in_pieces(self) -> bool:
        """Whether requests are served by deletions from a store: the run folder of an exact method."""
        return isinstance(self.recipe.method, Exact)

    @property
    def model(self) -> str:
        """The model that is to forget where a request names none: the recipe's base, or its store."""
        return self.recipe.output if self.in_pieces else self.recipe.model.base

    @property
    def hash(self) -> str:
        """Stands for everything that decides how requests are served; a run that was begun under another cannot go on."""
        return fingerprint(self.recipe.hash, self.suite, self.service)

    def is_training(self, source: Source) -> bool:
        """Whether a source reads the data in which requests are looked up."""
        return same_data(source, self.service.data)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the training data that are learnt: what a row says."""
        forget = self.recipe.data.forget
        named = (forget.prompt, forget.answer, forget.choices, forget.messages, forget.text)
        return tuple(column for column in named if column)


def load(path: Path) -> Office:
    """Read and check a service file with its recipe and suite. Imports nothing heavy.

    Raises:
        Refused: every wrong key at once, each with its place, what was found and what was expected.
    """
    if not is_file(path):
        raise Refused(f"{no_such_file(path)} Name one with --service FILE, or write one with: llm-unlearn requests new.")
    tree = read_tree(path)
    service = build(Service, tree)
    at = locate(service.recipe, path)
    if not is_file(at):
        raise Refused(f"{tree.place(('recipe',))}: recipe: {no_such_file(at)}")
    recipe = recipes.load(at)
    name = service.suite or (recipe.evaluation.suite if recipe.evaluation else None)
    if name is None:
        raise Refused(f"{path}: suite: missing; {service.recipe} names none, and a request is judged by its numbers.")
    suite_at = locate(name, path) if service.suite else locate(name, at)
    if not is_file(suite_at):
        raise Refused(f"{tree.place(('suite',))}: suite: {no_such_file(suite_at)}")
    office = Office(
        service, recipe, suites.load(suite_at), name, path.parent / service.ledger, path.parent.resolve() / service.output
    )
    wrong = list(_problems(office, tree))
    if wrong:
        raise Refused("\n".join(wrong))
    return office


def _problems(office: Office, tree: Tree) -> Iterable[str]:
    def say(text: str, *path: str | int) -> str:
        return readable(f"{tree.place(path)}: {dotted(path)}: {text}")

    service, suite, method = office.service, office.suite, office.recipe.method
    if isinstance(method, Contrast):
        text = "leaves the logits of several models combined, and the next request begins from one set of weights"
        yield say(f"{method.name} {text}; name a recipe that changes weights.", "recipe")
    data = Source(source=service.data.source, config=service.data.config, split=service.data.split, text=service.data.id)
    yield from (say(text, "data", *where) for where, text in source_problems(data))
    if "forget" not in suite.sets:
        yield say(f"{office.suite_name} has no set `forget`, on which a request is measured.", "suite")
    elif not office.is_training(suite.sets["forget"]):
        found = suite.sets["forget"].source
        yield say(f"sets.forget of {office.suite_name} reads {found}, and requests are looked up elsewhere.", "data", "source")
    if office.in_pieces and suite.attacks:
        text = f"{office.suite_name} has attacks, which look at the model before, and a deletion from a store leaves none"
        yield say(f"{text}; take them out, and attack the store with llm-unlearn evaluate.", "suite")
    yield from _threshold_problems(office, say)


def _threshold_problems(office: Office, say: Callable[..., str]) -> Iterable[str]:
    """Every threshold must read a number that the suite has, and say what it must be."""
    service, suite = office.service, office.suite
    if not service.thresholds:
        yield say("found none; expected at least one, or every request would be fulfilled.", "thresholds")
    elif not any(is_forgotten(one.set) for one in service.thresholds):
        yield say("none reads the set `forget`; a request would be fulfilled without anything forgotten.", "thresholds")
    control = (office.recipe.evaluation and office.recipe.evaluation.retrained) or suite.retrained
    for keys, text in problems(service.thresholds, suite, office.suite_name, control):
        yield say(text, "thresholds", *keys)
