"""How the model as it was is asked: for each stream the cheapest exact way, and what is taken before training, kept on disk.

One model is in memory. With an adapter it can be asked again at every step, the adapter switched off. Or its numbers are taken
once, in one pass over the examples that the run sees: log-probabilities (4 bytes a token) where losses read those, hidden states
(D numbers a token and layer) where they read states or, through the head, logits. A second model is made on request only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_unlearn.bars import Bar
from llm_unlearn.data.batch import cut
from llm_unlearn.data.examples import Example
from llm_unlearn.data.tokens import Some, lengths_of, targets_of
from llm_unlearn.durable import whole
from llm_unlearn.models.head import Head
from llm_unlearn.models.load import causal, has_adapter
from llm_unlearn.models.reference import (
    LOGPS,
    Asked,
    Columns,
    Reference,
    adapter_off,
    centres,
    frozen_copy,
    looked_up,
    taken,
    together,
)
from llm_unlearn.models.scores import Scorer
from llm_unlearn.objectives.views import ROUTERS
from llm_unlearn.sections import Asking
from llm_unlearn.spec import fingerprint
from llm_unlearn.training.job import Job

MOST = 8 << 30
"""Bytes that are kept unasked, where the adapter could be switched off instead."""
FORMAT = 3  # of the kept numbers; raise it when their content changes


@dataclass(frozen=True)
class Shelf:
    """Where numbers of the model as it was are kept between runs."""

    folder: Path
    identity: str
    """Stands for the model as it was."""


@dataclass(frozen=True)
class Choice:
    """How one stream of the model as it was is asked, and what it costs."""

    way: Asking
    asked: Asked
    examples: Sequence[Example]
    """Those that the run sees."""
    visits: int
    """Tokens of all visits of the run, which `adapter_off` and `copy` pass through the model."""
    bytes: int
    """Of what is kept, or would be."""
    tokens: int
    """Of the examples, each once, which `kept` passes through the model."""


def choices(job: Job, adapter: bool, hidden: int, size: int, routing: int = 0) -> dict[str, Choice]:
    """Stream -> how the model as it was is asked about it.

    Args:
        adapter: an adapter is trained, which can be switched off.
        hidden: D.
        size: bytes of one number of a hidden state.
        routing: logits of all routers for one token.
    """
    wanted, found = job.settings.reference, {}
    for stream, asked in job.needs.items():
        if not asked.run:
            continue
        seen, lengths = job.schedule.seen(stream), lengths_of(job.examples[stream])
        examples, tokens = Some(job.examples[stream], seen), int(lengths[seen].sum())
        of_stream = job.schedule.example[job.schedule.stream == job.schedule.streams.index(stream)]
        visits = int(lengths[of_stream].sum())
        targets = int(targets_of(job.examples[stream])[seen].sum())
        size_kept = targets * sum({LOGPS: 4, ROUTERS: routing * size}.get(column, hidden * size) for column in asked.columns)
        one = Choice("kept", asked, examples, visits, size_kept, tokens)
        if wanted or (adapter and (tokens >= visits or size_kept > MOST)):
            one = Choice(wanted or "adapter_off", asked, examples, visits, size_kept, tokens)
        found[stream] = one
    return found


def reference_of(
    job: Job, scorer: Scorer, head: Head, accelerator: Accelerator, batch_tokens: int, shelf: Shelf | None = None
) -> Reference:
    """The model as it was, to be asked during training; called before anything is changed.

    Args:
        batch_tokens: at most so many in one forward pass of what is taken now.
        shelf: where what is taken now is looked for first, and put.
    """
    device, size = accelerator.device, 2 if accelerator.mixed_precision == "bf16" else 4
    hidden = int(causal(scorer.model).config.get_text_config().hidden_size)
    routed = any(ROUTERS in asked.layers for asked in job.needs.values())
    routing = sum(router.rows for router in scorer.routers) if routed else 0
    chosen = choices(job, has_adapter(scorer.model), hidden, size, routing)
    ways = {way: {name: one.asked for name, one in chosen.items() if one.way == way} for way in ("adapter_off", "kept", "copy")}
    asks: list[Reference] = []
    if needs := ways["adapter_off"]:
        asks.append(adapter_off(scorer, head, needs, job.seed))
    if needs := ways["copy"]:
        asks.append(frozen_copy(scorer, needs, job.seed))
    if needs := ways["kept"]:
        examples = [example for name in needs for example in chosen[name].examples]
        kept = _Taking(scorer, head, needs, examples, accelerator, batch_tokens).find(shelf)
        asks.append(looked_up(kept, head, needs, device, job.seed))
    read = {name: asked for name, asked in job.needs.items() if asked.centres}
    rows = [job.examples[name][i] for name in read for i in job.schedule.seen(name)]
    lengths = [len(example.ids) for example in rows]
    batches = [[rows[i] for i in part] for part in cut(lengths, batch_tokens)[0]] if rows else []
    with accelerator.autocast():
        means = centres(scorer, head, read, batches, device)
    return together(asks, means, head)


@dataclass(frozen=True)
class _Taking:
    """The pass over the examples of a run, dealt to all processes."""

    scorer: Scorer
    head: Head
    needs: Mapping[str, Asked]
    examples: list[Example]
    accelerator: Accelerator
    batch_tokens: int

    def find(self, shelf: Shelf | None) -> dict[tuple[str, Example], Columns]:
        """What was kept, where every process can read it, or what one pass gives."""
        path = shelf.folder / f"{self._key(shelf)}.safetensors" if shelf else None
        kept = self._read(path) if path else None
        there = self.accelerator.reduce(torch.tensor(float(kept is not None), device=self.accelerator.device), "sum")
        if kept is not None and there == self.accelerator.num_processes:  # all processes take the same way
            return kept
        found = self._take()
        if path and self.accelerator.is_local_main_process:
            self._write(found, path)
        self.accelerator.wait_for_everyone()  # who asks next finds the file, or none does
        return found

    def _key(self, shelf: Shelf) -> str:
        asked = [[name, self.needs[name].columns] for name in self.needs]
        rows = [[example.stream, example.ids, example.answer] for example in self.examples]
        return fingerprint(FORMAT, shelf.identity, self.accelerator.mixed_precision, asked, rows)

    def _take(self) -> dict[tuple[str, Example], Columns]:
        shares = cut([len(example.ids) for example in self.examples], self.batch_tokens, self.accelerator.num_processes)
        batches = [[self.examples[i] for i in part] for part in shares[self.accelerator.process_index] if part]
        count, quiet, mine = sum(map(len, batches)), not self.accelerator.is_main_process, []
        shown = Bar("the model as it was", count, "answer", quiet=quiet)
        with self.accelerator.autocast(), shown as bar:
            for example, columns in taken(self.scorer, self.head, self.needs, batches, self.accelerator.device):
                mine.append((example, columns))
                bar.update()
        everything: Iterable[tuple[Example, Columns]] = gather_object(mine)
        return {(example.stream, example): columns for example, columns in everything}

    def _write(self, kept: Mapping[tuple[str, Example], Columns], path: Path) -> None:
        tensors = {
            f"{name} {column}": torch.cat([kept[name, example][column] for example in self._of(name)]).contiguous()
            for name in self.needs
            for column in self.needs[name].columns
        }
        with whole(path) as unfinished:
            save_file(tensors, str(unfinished))

    def _read(self, path: Path) -> dict[tuple[str, Example], Columns] | None:
        if not path.is_file():
            return None
        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError):
            return None  # it is taken again, and written anew
        kept: dict[tuple[str, Example], Any] = {}
        for name in self.needs:
            for column in self.needs[name].columns:
                examples = self._of(name)
                parts: tuple[Tensor, ...] = torch.split(tensors[f"{name} {column}"], [example.targets for example in examples])
                for example, part in zip(examples, parts, strict=True):
                    kept.setdefault((name, example), {})[column] = part
        return kept

    def _of(self, name: str) -> list[Example]:
        return [example for example in self.examples if example.stream == name]
