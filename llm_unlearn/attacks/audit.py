"""Every attack of a suite on every model of an evaluation, each kept by content as soon as it is done."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llm_unlearn import folder
from llm_unlearn.attacks.finding import Attack, Curve, Subject
from llm_unlearn.attacks.gap import finding_of, gap_of
from llm_unlearn.data.sources import rows
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.models.forms import Again
from llm_unlearn.recipe import Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused, fingerprint, parts_of, plain

FORMAT = 2  # of what is kept; raise it when an attack means something else than before
ORIGINAL = "before"


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
    target = targets[column]
    original = targets.get(ORIGINAL)
    try:
        path = cache / f"{key_of(attack, target, original, seed, accelerator.mixed_precision)}.json"
    except Refused as error:  # data of its own that cannot be read
        return {"missing": str(error)}
    kept = torch.tensor(float(path.is_file()), device=accelerator.device)
    if int(accelerator.reduce(kept, "sum")) == accelerator.num_processes:  # all or nobody: it is work for every process
        return dict(json.loads(path.read_text(encoding="utf-8")))
    tell = print if accelerator.is_main_process else _silent
    tell(f"attack: {attack.title}, on {column}")
    subject = Subject(
        column, target.model, target.adapter, Again(target.model, target.adapter, accelerator.device), target.sets,
        Again(original.model, original.adapter, accelerator.device) if original else None,
        # of its own: what an attack prepares for training stays with the accelerator that prepared it
        Accelerator(mixed_precision=accelerator.mixed_precision), batch_tokens, seed, tell,
    )  # fmt: skip
    try:
        result = _plain(attack(subject))
    except Refused as error:  # the other attacks, and this one on other models, still say what they say
        tell(f"attack: {attack.title}, on {column}: {error}")
        return {"missing": str(error)}
    finally:
        subject.accelerator.free_memory()
        del subject
        gc.collect()
    if accelerator.is_main_process:
        folder.write(path, json.dumps(result))
    accelerator.wait_for_everyone()
    return result


def key_of(attack: Attack, target: Target, original: Target | None, seed: int, precision: str) -> str:
    """Stands for all that decides what an attack finds: its settings, the models, the sets that it names, the rows of the sources
    that it reads by itself, the seed.

    Raises:
        Refused: a source cannot be read.
    """
    named = [part for _, part in parts_of(attack)]
    sets = {part: target.sets[part].fingerprint for part in named if isinstance(part, str) and part in target.sets}
    read = [fingerprint(rows(part)) for part in named if isinstance(part, Source)]
    beside = original.identity if original else None
    return fingerprint(FORMAT, plain(attack), target.identity, beside, sets, read, seed, precision)


def _plain(curve: Curve) -> dict[str, Any]:
    """A curve as JSON has it."""
    return {
        "x": list(curve.x), "y": list(curve.y), "low": list(curve.low), "high": list(curve.high), "rows": list(curve.rows),
        "notes": dict(curve.notes),
    }  # fmt: skip


def _silent(text: str) -> None:
    """What all processes but the first say."""
