"""Every attack of a suite on every model of an evaluation, each kept by content as soon as it is done."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from llm_unlearn import folder
from llm_unlearn.attacks.finding import Attack, Curve, Subject
from llm_unlearn.attacks.gap import finding_of, gap_of
from llm_unlearn.attacks.shadows import Shadows
from llm_unlearn.data.sources import rows
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.models.forms import Again
from llm_unlearn.sections import Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, fingerprint, parts_of, plain

FORMAT = 3  # of what is kept; raise it when an attack means something else than before
ORIGINAL, CONTROL = "before", "retrained"
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """One column of an evaluation, to be loaded again for each attack."""

    model: Model
    adapter: str | None
    identity: str
    sets: Mapping[str, EncodedSet]


def audit(
    attacks: Sequence[Attack], targets: Mapping[str, Target], accelerator: Accelerator, *, batch_tokens: int, seed: int, cache: Path
) -> list[dict[str, Any]]:
    """Carry out every attack on every model, in the same way.

    Args:
        targets: "before" | "after" | "model" | "retrained" -> the model of that column, in the order of the table.
        cache: folder of kept findings, one file for each attack on each model.

    Returns:
        What `evaluation.json` says of attacks, the same on all processes.
    """
    found = []
    for attack in attacks:
        curves = {column: _carried_out(attack, column, targets, accelerator, batch_tokens, seed, cache) for column in targets}
        gap = gap_of(attack, curves)
        found.append(
            {
                "name": attack.name,
                "title": attack.title,
                "definition": " ".join((type(attack).__doc__ or "").split()),
                "settings": {key: value for key, value in plain(attack).items() if key not in ("name", "set")},
                "set": attack.set,
                "x": {**asdict(attack.x), "ticks": list(attack.x.ticks)},
                "y": asdict(attack.y),
                "curves": curves,
                "gap": gap,
                "finding": finding_of(attack, curves, gap),
            }
        )
    return found


def _carried_out(
    attack: Attack, column: str, targets: Mapping[str, Target], accelerator: Accelerator, batch_tokens: int, seed: int, cache: Path
) -> dict[str, Any]:
    """One attack on one model, from the cache where it was carried out before; {"missing": why} where it cannot be."""
    target, precision = targets[column], accelerator.mixed_precision
    tell = print if accelerator.is_main_process else _silent
    keep = _Kept(cache, accelerator)

    def carry_out() -> dict[str, Any]:
        tell(f"attack: {attack.title}, on {column}")
        original, control = (
            Again(one.model, one.adapter, accelerator.device, one.identity) if (one := targets.get(name)) else None
            for name in (ORIGINAL, CONTROL)
        )
        subject = Subject(
            column, target.model, target.adapter, Again(target.model, target.adapter, accelerator.device, target.identity),
            target.sets, original,
            # of its own: what an attack prepares for training stays with the accelerator that prepared it
            Accelerator(mixed_precision=precision), batch_tokens, seed, tell, control,
            lambda key, make: keep(fingerprint(FORMAT, key, seed, precision), make),
        )  # fmt: skip
        try:
            return _plain(attack(subject))
        finally:
            subject.accelerator.free_memory()
            del subject
            gc.collect()

    try:
        return keep(key_of(attack, column, targets, seed, precision), carry_out)
    except Refused as error:  # the other attacks, and this one on other models, still say what they say
        tell(f"attack: {attack.title}, on {column}: {error}")
        return {"missing": str(error)}


@dataclass(frozen=True)
class _Kept:
    """What was found, one file each, so that a killed audit goes on where it was."""

    cache: Path
    accelerator: Accelerator

    def __call__(self, key: str, make: Callable[[], T]) -> T:
        """What is kept under a key, or what is made now; the same on all processes."""
        path = self.cache / f"{key}.json"
        try:
            found: list[T] = [json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError):  # none, or a damaged one, which is made again
            found = []
        there = torch.tensor(float(len(found)), device=self.accelerator.device)
        if int(self.accelerator.reduce(there, "sum")) == self.accelerator.num_processes:  # all or nobody: it is work for every one
            return found[0]
        result = make()
        if self.accelerator.is_main_process:
            folder.write(path, json.dumps(result))
        self.accelerator.wait_for_everyone()
        return result


def key_of(attack: Attack, column: str, targets: Mapping[str, Target], seed: int, precision: str) -> str:
    """Stands for all that decides what an attack finds: its settings, the models, the sets that it names, the rows of the sources
    and the recipe that it reads by itself, the seed.

    Raises:
        Refused: a source or recipe cannot be read.
    """
    target = targets[column]
    named = [part for _, part in parts_of(attack)]
    sets = {part: target.sets[part].fingerprint for part in named if isinstance(part, str) and part in target.sets}
    read = [fingerprint(rows(part)) for part in named if isinstance(part, Source)]
    beside = [targets[name].identity if name in targets else None for name in (ORIGINAL, CONTROL)]
    recipe = plain(attack.forgetting()) if isinstance(attack, Shadows) else None
    return fingerprint(FORMAT, plain(attack), target.identity, beside, sets, read, recipe, seed, precision)


def _plain(curve: Curve) -> dict[str, Any]:
    """A curve as JSON has it."""
    return {
        "x": list(curve.x), "y": list(curve.y), "low": list(curve.low), "high": list(curve.high), "rows": list(curve.rows),
        "notes": dict(curve.notes),
    }  # fmt: skip


def _silent(text: str) -> None:
    """What all processes but the first say."""
