"""Ways to forget exactly: weights in pieces, each a function of few rows, so that a deletion touches only the pieces that saw it.

All of them are lines of stages. A **stage** trains an adapter a little further on its rows, and a **line** is a chain of
stages; what a stage ends with depends on the settings, on its own rows and on the stages before it, and on nothing else. Which
row is in which stage follows from the row's id alone, so that deleting one row moves no other.

`train.epochs` are passes over the rows of a line. With `train.steps`, every stage takes so many steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Evaluation, Model, Problems, Train
from llm_unlearn.spec import PositiveFloat, PositiveInt, fingerprint, spec


@dataclass(frozen=True)
class Placed:
    """A row as a layout sees it."""

    id: str
    owner: str | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a line: what it trains on, and which layers it moves."""

    name: str
    rows: tuple[str, ...]
    """Ids of the rows that it is the first of its line to see."""
    again: bool
    """Whether it also passes over the rows of the stages before it."""
    epochs: float
    block: tuple[int, int] | None = None
    """(i, n): moves the i-th of n blocks of decoder layers, counted from the top; None moves all."""


@dataclass(frozen=True)
class Line:
    """A chain of stages, in which each begins with the weights that the one before it ended with."""

    name: str
    group: str
    """Of the lines of one group, the longest serves."""
    stages: tuple[Stage, ...]


def share_of(key: str, kind: str, count: int) -> int:
    """Which of `count` shares a row falls into; follows from its id alone."""
    return int(fingerprint(kind, key), 16) % count


Aggregate = Literal["merge", "average"]
"""How the adapters that serve become one model. merge: their updates are added up, one adapter that costs what one costs. average:
the mean of the probabilities that each of them predicts (Bourtoule et al. 2021, §IV.D), a run of the model for each."""

OBJECTIVE = {"retain": Term(loss=NLL())}
"""What every stage minimises: NLL per token of its rows."""


@spec
class Sisa:
    """Sharded, isolated, sliced, aggregated training (Bourtoule et al. 2021, 1912.03817, §IV) of LoRA adapters over a frozen base.

    The rows are cut into S shards, each with an adapter of its own, and a shard into R slices: stage r begins with the weights of
    stage r − 1 and trains on the slices 1 … r. To cost as much as e′ passes over the shard, each stage makes e = 2e′/(R + 1) passes
    over its rows (§V.B). A deletion from slice r retrains the stages r … R of its shard.
    """

    name: Literal["sisa"] = "sisa"
    shards: PositiveInt = 4
    """S, the adapters that are trained apart."""
    slices: PositiveInt = 3
    """R, the checkpoints in each."""
    id: str | None = None
    """Column that names a row, or all rows that are deleted together; without it, a row is named by its content."""
    aggregate: Aggregate = "merge"
    """How the shards' adapters become one model; see `Aggregate`."""
    weight: PositiveFloat | None = None
    """How often each shard's update counts where they are merged; without it, 1 / shards, the mean."""

    terms = OBJECTIVE
    retrains = True

    def problems(self, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
        """See `piece_problems`."""
        return piece_problems(self, model, train)

    def lines(self, rows: Sequence[Placed]) -> list[Line]:
        """Shard and slice by hash of the id; an empty slice is no stage."""
        epochs = 2 / (self.slices + 1)
        cells = _cells(rows, self.shards, self.slices)
        return [
            Line(name, name, _filled(Stage(f"slice {r + 1}", rows, True, epochs) for r, rows in enumerate(shard)))
            for name, shard in cells.items()
        ]

    def expected(self, deleted: int, sizes: Mapping[str, int]) -> float:
        """The share of a full retrain that deleting rows drawn at random costs, in examples seen: see `sisa_share`."""
        return sisa_share(self.shards, self.slices, deleted)


def sisa_share(shards: int, slices: int, deleted: int) -> float:
    """Expected share of a full retrain for K rows that fall into cells at random.

    Stage r (from 1) of a shard makes 2r / (R(R + 1)) of the shard's work, and is stale unless all K rows missed the slices 1 … r of
    the shard: Σ_r 2r/(R(R + 1)) · (1 − (1 − r/(SR))^K). For K = 1 that is (1/S)(2/3 + 1/(3R)), as in the paper (§V.B).
    """
    work = [2 * r / (slices * (slices + 1)) for r in range(1, slices + 1)]
    return sum(one * (1 - (1 - r / (shards * slices)) ** deleted) for r, one in enumerate(work, 1))


@spec
class S3T:
    """Sequence-aware sharded sliced training (S3T, Basu Roy Chowdhury et al. 2024, 2406.16257): slice i trains the LoRA layers of
    its own block, from the top of the model down, above weights that stay as they are.

    Deleting a row of slice i switches off its block and all that were trained after it, at once and without training. Each shard
    is trained in `orders` cyclic orders of its slices; the one with the most clean blocks serves. So with as many orders as
    slices, one deletion costs one block.
    """

    name: Literal["s3t"] = "s3t"
    shards: PositiveInt = 1
    """S, the adapters that are trained apart."""
    slices: PositiveInt = 4
    """L, slices of a shard, and blocks of layers; no more than the model has decoder layers."""
    orders: PositiveInt = 4
    """B, the orders that each shard is trained in: the budget. Training costs B times as much."""
    id: str | None = None
    """Column that names a row, or all rows that are deleted together; without it, a row is named by its content."""
    aggregate: Aggregate = "merge"
    """How the shards' adapters become one model; see `Aggregate`."""
    weight: PositiveFloat | None = None
    """How often each shard's update counts where they are merged; without it, 1 / shards, the mean."""

    terms = OBJECTIVE
    retrains = False

    def problems(self, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
        """See `piece_problems`."""
        return piece_problems(self, model, train)

    def lines(self, rows: Sequence[Placed]) -> list[Line]:
        """Shard and slice by hash of the id; order b begins with slice ⌊bL/B⌋."""
        cells = _cells(rows, self.shards, self.slices)
        return [
            Line(
                f"{name} order {b + 1}",
                name,
                _filled(Stage(f"slice {at + 1}", shard[at], False, 1.0, (i, self.slices)) for i, at in enumerate(self.order(b))),
            )
            for name, shard in cells.items()
            for b in range(self.orders)
        ]

    def order(self, number: int) -> list[int]:
        """The slices in the order in which one line of a shard sees them."""
        first = number * self.slices // self.orders
        return [(first + i) % self.slices for i in range(self.slices)]

    def expected(self, deleted: int, sizes: Mapping[str, int]) -> float:
        """Nothing is retrained."""
        return 0.0

    def survivors(self) -> float:
        """The expected share of a shard's blocks that serve after one of its rows, of a slice drawn at random, was deleted:
        mean over slices of max over orders of the slice's place, over L."""
        places = [max(self.order(b).index(at) for b in range(self.orders)) for at in range(self.slices)]
        return sum(places) / self.slices**2


@spec
class Modules:
    """One adapter per data owner, composed by adding up their updates; an owner who leaves takes the adapter along, at no cost.

    [U] the survey's "modular" exact unlearning has no one paper; the definition is ours. Deleting single rows of an owner retrains
    that owner's adapter.
    """

    name: Literal["modules"] = "modules"
    owner: str
    """Column that says whose a row is."""
    id: str | None = None
    """Column that names a row, or all rows that are deleted together; without it, a row is named by its content."""
    aggregate: Aggregate = "merge"
    """How the owners' adapters become one model; see `Aggregate`. `average` runs the model once for each owner."""
    weight: PositiveFloat | None = None
    """How often each owner's update counts where they are merged; without it, 1 / owners, the mean."""

    terms = OBJECTIVE
    retrains = True

    def problems(self, model: Model, train: Train, evaluation: Evaluation | None) -> Problems:
        """See `piece_problems`."""
        return piece_problems(self, model, train)

    def lines(self, rows: Sequence[Placed]) -> list[Line]:
        """One line of one stage for every owner; no name of an owner stands in it."""
        by_owner: dict[str, list[str]] = {}
        for row in rows:
            by_owner.setdefault(f"owner {fingerprint(row.owner)}", []).append(row.id)
        return [Line(name, name, (Stage("all", tuple(sorted(ids)), False, 1.0),)) for name, ids in sorted(by_owner.items())]

    def expected(self, deleted: int, sizes: Mapping[str, int]) -> float:
        """Σ_o (n_o/N)(1 − (1 − n_o/N)^K): an owner's adapter is retrained unless all K rows drawn at random are others'. Owners who
        leave as a whole cost nothing."""
        total = max(1, sum(sizes.values()))
        return sum(n / total * (1 - (1 - n / total) ** deleted) for n in sizes.values())


Exact = Sisa | S3T | Modules


def piece_problems(method: Exact, model: Model, train: Train) -> Problems:
    """Pieces are adapters over a base that no row decides, each trained on its own rows alone."""
    if not model.adapter or model.adapter.init != "zero":
        text = f"{method.name} trains adapters over a frozen base that no row decides; give an adapter with init: zero."
        yield text, "model", "adapter"
    if method.weight and method.aggregate == "average":
        text = "counts updates that are merged, and probabilities are averaged, each alike; take it out, or give aggregate: merge."
        yield text, "method", "weight"
    for key, given in (("rules", train.rules), ("stop", train.stop)):
        if given:
            yield f"{method.name} trains each piece on its own rows alone, and has no use for it; take it out.", "train", key


def _cells(rows: Sequence[Placed], shards: int, slices: int) -> dict[str, list[tuple[str, ...]]]:
    """Shard -> for each slice its ids, ascending."""
    found: list[list[list[str]]] = [[[] for _ in range(slices)] for _ in range(shards)]
    for row in rows:
        found[share_of(row.id, "shard", shards)][share_of(row.id, "slice", slices)].append(row.id)
    return {f"shard {s + 1}": [tuple(sorted(ids)) for ids in shard] for s, shard in enumerate(found)}


def _filled(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if stage.rows)
