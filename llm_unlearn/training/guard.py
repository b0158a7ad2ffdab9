"""What ends a run before its last step: a side effect past its bound, a loss that is not finite, or the user."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator

from llm_unlearn.data.batch import cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.scores import Head, Scorer, score


@dataclass(frozen=True)
class Probe:
    """Perplexity on a few fixed examples, the same on any number of processes."""

    examples: Sequence[Example]
    batch_tokens: int

    @torch.no_grad()
    def perplexity(self, scorer: Scorer, head: Head, accelerator: Accelerator) -> float:
        """exp(Σ NLL / Σ T) over the probe's answer tokens, on all ranks."""
        total = torch.zeros(2, dtype=torch.float64)
        mine = cut([len(example.ids) for example in self.examples], self.batch_tokens, accelerator.num_processes)
        for chosen in mine[accelerator.process_index]:
            if chosen:
                batch = lay_out([self.examples[i] for i in chosen]).to(accelerator.device)
                with accelerator.autocast():
                    logps = torch.cat([scores.logps for scores in score(scorer, head, batch).values()])
                total += torch.tensor([-logps.double().sum().item(), len(logps)], dtype=torch.float64)
        total = accelerator.reduce(total.to(accelerator.device).float(), "sum").cpu()
        return math.exp(min(700.0, float(total[0] / total[1])))


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM set the event instead of ending the process; a second Ctrl-C ends it at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, action in before.items():
            signal.signal(number, action)
