"""What each weight matters to a set of answers: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from llm_unlearn.bars import walk
from llm_unlearn.data.batch import lay_out
from llm_unlearn.data.examples import Example, draw
from llm_unlearn.models.head import Head
from llm_unlearn.models.scores import Scorer, score


def fisher(
    scorer: Scorer, head: Head, weights: Sequence[Tensor], examples: Sequence[Example], accelerator: Accelerator, title: str = ""
) -> list[Tensor]:
    """(1/n) Σ_i (∂/∂θ Σ_t −log p(y_t))² over n examples, one backward pass each; dealt to all ranks, the same on every one.

    Args:
        weights: θ; each must require a gradient.
        title: of a progress bar; "" shows none.
    """
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    mine = examples[accelerator.process_index :: accelerator.num_processes]
    for example in walk(mine, title, "row", quiet=not title or not accelerator.is_main_process):
        for so_far, slope in zip(total, slopes(scorer, head, weights, [example], accelerator), strict=True):
            so_far += slope**2
    return [accelerator.reduce(one, "sum") / len(examples) for one in total]


def slopes(
    scorer: Scorer, head: Head, weights: Sequence[Tensor], examples: Sequence[Example], accelerator: Accelerator
) -> list[Tensor]:
    """Σ_i ∂/∂θ Σ_t −log p(y_t) over a few examples, in one pass on this process alone; float32."""
    batch = lay_out(examples).to(accelerator.device)
    with torch.enable_grad(), accelerator.autocast():
        loss = torch.stack([-scores.logps.sum() for scores in score(scorer, head, batch).values()]).sum()
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w, dtype=torch.float32) if one is None else one.float() for w, one in zip(weights, found, strict=True)]


def some(examples: Sequence[Example], rows: int, seed: int, purpose: str) -> list[Example]:
    """`rows` of the examples, drawn from the seed, in their order."""
    chosen = np.random.default_rng([seed, draw(purpose)]).permutation(len(examples))[:rows]
    return [examples[i] for i in sorted(chosen.tolist())]
