"""The training of pieces: what a run should be made of, given the rows that are kept, and the way there from what is on disk.

A piece lies in `pieces/KEY`, and its key stands for everything that decides its weights. So a deletion, a run that was killed and a
first training are one thing: find the pieces that are wanted, train those that are not there, publish, remove the others.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file

from llm_unlearn import folder as run_folder
from llm_unlearn.data.schedule import Schedule, by_key
from llm_unlearn.durable import remove, whole
from llm_unlearn.exact.manifest import PIECES, WEIGHTS, WORK, Manifest, Piece, State, adapter_files, save
from llm_unlearn.exact.rows import STREAM, Known, digest
from llm_unlearn.methods.exact import Exact, Line, Stage
from llm_unlearn.models.joined import Weights, adapter_blocks, served
from llm_unlearn.models.load import trainable
from llm_unlearn.models.sound import weights_in
from llm_unlearn.recipe import Recipe
from llm_unlearn.run import start
from llm_unlearn.spec import Refused
from llm_unlearn.training.alone import alone
from llm_unlearn.training.checkpoint import restore, snapshot
from llm_unlearn.training.guard import Outcome
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train
from llm_unlearn.training.tracking import share


@dataclass(frozen=True)
class Wanted:
    """A stage with all that decides its weights: the piece as it will be, and the rows that it passes over."""

    line: Line
    stage: Stage
    piece: Piece
    ids: tuple[str, ...]
    schedule: Schedule

    @property
    def seen(self) -> int:
        """Examples that its training sees, repeats counted."""
        return len(self.schedule.example)


def wanted(recipe: Recipe, method: Exact, manifest: Manifest, known: Mapping[str, Known]) -> list[list[Wanted]]:
    """The stages of every line, were it trained on these rows from the start."""
    chains = []
    for line in method.lines([one.placed for one in known.values()]):
        chain: list[Wanted] = []
        seen: tuple[str, ...] = ()
        for stage in line.stages:
            seen = (*seen, *stage.rows)
            ids = tuple(sorted(seen if stage.again else stage.rows))
            content = digest(manifest.salt, json.dumps([[one.answer, *one.ids] for id in ids for one in known[id].examples]))
            rows = sorted(manifest.hash(id) for id in stage.rows)
            parent = chain[-1].piece.key if chain else None
            key = manifest.key(line.name, stage.name, rows, content, parent)
            piece = Piece(key, line.name, stage.name, rows, content, parent)
            names = [f"{id}/{k}" for id in ids for k in range(len(known[id].examples))]
            schedule = by_key(
                names, recipe.window[STREAM], [recipe.seed, line.name, stage.name], stage.epochs * recipe.train.epochs, STREAM,
                recipe.train.steps,
            )  # fmt: skip
            chain.append(Wanted(line, stage, piece, ids, schedule))
        chains.append(chain)
    return chains


class Workshop:
    """One process's part in making the pieces of a run folder."""

    def __init__(self, recipe: Recipe, method: Exact, folder: Path, model: Any, accelerator: Accelerator) -> None:
        """
        Args:
            model: the frozen base with a fresh adapter.
        """
        self.recipe, self.method, self.folder, self.model, self.accelerator = recipe, method, folder, model, accelerator
        self.fresh = snapshot(model)

    def settle(self, manifest: Manifest, known: Mapping[str, Known], training: bool) -> tuple[list[list[Wanted]], Outcome]:
        """Make what is wanted for these rows and is not there yet; lines are dealt to the processes, which train side by side.

        Args:
            training: False makes nothing: of every line, the pieces serve that are there already.

        Returns:
            The pieces that serve, line by line, and whether it came to its end.
        """
        chains = wanted(self.recipe, self.method, manifest, known)
        if training:
            open_lines = [chain for chain in chains if not all(self._there(one) for one in chain)]
            mine = open_lines[self.accelerator.process_index :: self.accelerator.num_processes]
            outcome = self._train(mine, manifest, known)
            if any(gather_object([outcome.status == "interrupted"])):
                return chains, replace(outcome, status="interrupted")
            self.accelerator.wait_for_everyone()
        alive = []
        for chain in chains:
            at = next((i for i, one in enumerate(chain) if not self._there(one)), len(chain))
            alive.append(chain[:at])
        steps = sum(one.schedule.steps for chain in alive for one in chain)
        return alive, Outcome("finished", steps, steps)

    def compare(self, manifest: Manifest, known: Mapping[str, Known]) -> None:
        """The pieces that will serve, or be trained on, must be those that were published: what is published again gets a new hash,
        and nobody would see what was changed.

        Raises:
            Refused: one was changed.
        """
        for one in (one for chain in wanted(self.recipe, self.method, manifest, known) for one in chain):
            piece, path = manifest.by_key.get(one.piece.key), self.folder / PIECES / one.piece.key / WEIGHTS
            if piece and path.is_file() and run_folder.sha256(path) != piece.sha256:
                raise Refused(
                    f"{path} ({piece.line}, {piece.stage}): was changed since it was published. {_mended(piece, manifest)}"
                )

    def _there(self, one: Wanted) -> bool:
        return (self.folder / PIECES / one.piece.key / WEIGHTS).is_file()

    def _train(self, chains: list[list[Wanted]], manifest: Manifest, known: Mapping[str, Known]) -> Outcome:
        """This process's lines, one after the other; a broken-off stage goes on from its checkpoint."""
        threads = torch.get_num_threads()
        torch.set_num_threads(manifest.threads)
        try:
            with alone():
                for chain in chains:
                    for one in chain:
                        if not self._there(one):
                            outcome = self.make(one, known)
                            if outcome.status == "interrupted":
                                return outcome
        finally:
            torch.set_num_threads(threads)
        return Outcome("finished", 0, 0)

    def once_more(self, manifest: Manifest, known: Mapping[str, Known], line: str, keys: set[str]) -> list[Wanted]:
        """The pieces of one line that are among `keys`, trained from the start."""
        chain = next(chain for chain in wanted(self.recipe, self.method, manifest, known) if chain and chain[0].line.name == line)
        mine = [one for one in chain if one.piece.key in keys]
        if self._train([mine], manifest, known).status == "interrupted":
            raise KeyboardInterrupt
        return mine

    def make(self, one: Wanted, known: Mapping[str, Known]) -> Outcome:
        """Train one stage, and put its piece in place as a whole.

        Raises:
            Refused: its loss or gradient is not finite.
        """
        began, parent = time.perf_counter(), one.piece.parent
        scratch, final = self.folder / WORK / one.piece.key, self.folder / PIECES / one.piece.key
        restore(self.model, weights_in(self.folder / PIECES / parent / WEIGHTS) if parent else self.fresh)
        weights, mine = trainable(self.model), adapter_blocks(self.model, one.stage.block)
        examples = [example for id in one.ids for example in known[id].examples]
        job = Job(self.method.terms, {STREAM: examples}, one.schedule, self.recipe.train, self.recipe.seed)
        for name, weight in weights.items():
            weight.requires_grad_(name in mine)
        try:
            title = f"{one.line.name} {one.stage.name}"
            own = start(self.recipe.model)
            share(self.accelerator, own, title)
            outcome = train(job, self.model, own, scratch, resume=True, title=title)
        finally:
            for weight in weights.values():
                weight.requires_grad_()
        if outcome.status == "interrupted":
            return outcome
        if outcome.broken:
            raise Refused(f"{title}: {outcome.reason}; a smaller train.lr may help. What was trained before it is kept.")
        seconds = round(time.perf_counter() - began, 3)
        cost = {"steps": one.schedule.steps, "examples": one.seen, "seconds": seconds}
        with whole(final) as unfinished:
            unfinished.mkdir()
            save_file(snapshot(self.model), unfinished / WEIGHTS)
            (unfinished / COST).write_text(json.dumps(cost), encoding="utf-8")
        shutil.rmtree(scratch)
        return outcome

    # ------------------------------------------------------------------------------------------------------- publishing

    def finished(self, alive: list[list[Wanted]], manifest: Manifest) -> list[Piece]:
        """The pieces that are there, with their hashes and what they cost."""
        before, found = manifest.by_key, dict[str, Piece]()
        for one in (one for chain in alive for one in chain):
            cost_file = self.folder / PIECES / one.piece.key / COST
            cost = json.loads(cost_file.read_text()) if cost_file.is_file() else _cost(before[one.piece.key])
            above = found[one.piece.parent].sha256 if one.piece.parent else None
            own = run_folder.sha256(self.folder / PIECES / one.piece.key / WEIGHTS)
            found[one.piece.key] = Piece(**{**asdict(one.piece), **cost, "sha256": own, "parent_sha256": above})
        return list(found.values())

    def publish(self, manifest: Manifest, alive: list[list[Wanted]], name: str, state: State) -> Manifest:
        """Write the adapter that these pieces make, then the manifest, and remove every other piece; one process does it.

        Args:
            name: of the adapter's folder in the run folder.
        """
        serving = serving_of(alive)
        with whole(self.folder / name) as unfinished:
            served(weights_of(self.folder, serving) or {"fresh": self.fresh}, self.method).save(self.model, unfinished)
        if (self.folder / run_folder.HASHES).is_file():  # a finished run that deletes more
            run_folder.seal(self.folder)
        done = replace(
            manifest, pieces=self.finished(alive, manifest), serving=[piece.key for piece in serving], state=state,
            adapter=adapter_files(self.folder),
        )  # fmt: skip
        sweep(self.folder, done)  # before the manifest says that it is done
        save(done, self.folder)
        for piece in done.pieces:
            (self.folder / PIECES / piece.key / COST).unlink(missing_ok=True)
        return done


COST = "cost.json"
"""What a piece cost, until the manifest says it."""


def _mended(piece: Piece, manifest: Manifest) -> str:
    """What to do about a piece that was changed: what came after it was trained on what it was."""
    line = [one for one in manifest.pieces if one.line == piece.line]
    later = ", ".join(f"{PIECES}/{one.key}" for one in line[line.index(piece) :])
    return f"Put a copy of it back; or, of sisa and modules, remove {later}, which the next deletion trains again."


def serving_of(alive: list[list[Wanted]]) -> list[Piece]:
    """The pieces that the adapter is made of: of each group, the last of its longest line; of equals, the first."""
    best: dict[str, list[Wanted]] = {}
    for chain in alive:
        if chain and len(chain) > len(best.get(chain[0].line.group, ())):
            best[chain[0].line.group] = chain
    return [chain[-1].piece for chain in best.values()]


def weights_of(folder: Path, pieces: Iterable[Piece]) -> dict[str, Weights]:
    """The weights of pieces by their line, as a name of a folder."""
    return {piece.line.replace(" ", "-"): weights_in(folder / PIECES / piece.key / WEIGHTS) for piece in pieces}


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove every weight that the manifest does not list: pieces that depend on deleted rows, and training that was broken off."""
    keys = manifest.by_key
    for path in (folder / PIECES).iterdir() if (folder / PIECES).is_dir() else ():
        if path.name not in keys:
            remove(path)
    remove(folder / WORK)


def _cost(piece: Piece) -> dict[str, Any]:
    return {"steps": piece.steps, "examples": piece.examples, "seconds": piece.seconds}
