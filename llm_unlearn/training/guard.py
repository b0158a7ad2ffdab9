"""The dose: what a run is looked at for on the way, when it ends before its last step, and which of its weights are kept.
(`signals.py`: the user.)"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from llm_unlearn.data.batch import cut, lay_out
from llm_unlearn.data.examples import Example
from llm_unlearn.models.head import Head
from llm_unlearn.models.scores import Scorer, head_of, score, statistics
from llm_unlearn.models.sharded import at_rest, take_part
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused
from llm_unlearn.training.checkpoint import Progress, snapshot
from llm_unlearn.training.dose import Stop
from llm_unlearn.training.fisher import some

if TYPE_CHECKING:
    from llm_unlearn.training.job import Job


COLLAPSED = 0.5
"""Of its accuracy before: a model with less has lost most of what was to be kept; so has one of ten times the perplexity."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["finished", "stopped", "interrupted"]
    step: int
    """Optimizer steps done."""
    kept: int
    """The step whose weights the model now has."""
    reason: str = ""
    broken: bool = False
    """It ended because it came to nothing good (divergence.py), not by the recipe's own bound."""


@torch.no_grad()
def ask(
    examples: Sequence[Example], batch_tokens: int, scorer: Scorer, head: Head, accelerator: Accelerator
) -> tuple[float, float]:
    """(perplexity exp(Σ NLL / Σ T), accuracy: the share of answer tokens that are the first choice) of some examples, on all
    ranks. Where a forward pass is not finite, neither is the perplexity; one that is e⁷⁰⁰ or more is e⁷⁰⁰."""
    total = torch.zeros(3, dtype=torch.float64)  # Σ NLL, hits, tokens
    mine = cut([len(example.ids) for example in examples], batch_tokens, accelerator.num_processes)
    for chosen in mine[accelerator.process_index]:
        with accelerator.autocast():
            if not chosen:
                take_part(scorer, (TOP,), accelerator.device)
                continue
            batch = lay_out([examples[i] for i in chosen]).to(accelerator.device)
            for scores in score(scorer, head, batch).values():
                found = statistics(scores)
                total += torch.stack([-found.logp.double().sum(), found.hit.sum(), torch.tensor(len(found.hit))])
    at_rest(scorer)
    nll, hits, tokens = accelerator.reduce(total.to(accelerator.device, torch.float32), "sum").tolist()
    return math.exp(min(700.0, nll / tokens)) if math.isfinite(nll) else math.inf, hits / tokens


def aim_of(job: Job, retrained: Any, accelerator: Accelerator) -> float | None:
    """The perplexity at which a run is to end: that of a model that never saw the forget set, where its `stop` says so.

    Raises:
        Refused: that model gives no finite one.
    """
    stop = job.settings.stop
    if not stop or stop.until != "retrained":
        return job.aim
    rows = Probe.of(stop, job.examples, job.seed, job.settings.batch_tokens, None).sets["forget"]
    found = ask(rows, job.settings.batch_tokens, Scorer(retrained), head_of(retrained), accelerator)[0]
    if not math.isfinite(found):
        raise Refused("train.stop.until: the retrained model's perplexity on the forget set is not finite; name another model.")
    return found


@dataclass(frozen=True)
class Probe:
    """A few fixed rows of each set, and the rule of a recipe's `stop`."""

    stop: Stop
    sets: Mapping[str, Sequence[Example]]
    batch_tokens: int
    aim: float | None
    """The perplexity of the forget set that is to be reached, where it does not depend on the model under training."""

    @staticmethod
    def of(stop: Stop, examples: Mapping[str, Sequence[Example]], seed: int, batch_tokens: int, aim: float | None) -> Probe:
        """The rows that a rule looks at, drawn from the seed."""
        wanted = [
            name for name in ("retain", "forget", "holdout") if name in examples and (name != "holdout" or stop.until == "holdout")
        ]
        wanted = [name for name in wanted if name != "forget" or stop.until is not None]
        sets = {name: some(examples[name], stop.rows, seed, f"probe {name}") for name in wanted}
        return Probe(stop, sets, batch_tokens, aim)

    def look(self, scorer: Scorer, head: Head, accelerator: Accelerator) -> dict[str, float]:
        """Set by set, perplexity, and of the retain set accuracy, as columns of the log."""
        found: dict[str, float] = {}
        for name, rows in self.sets.items():
            found[f"{name}_perplexity"], accuracy = ask(rows, self.batch_tokens, scorer, head, accelerator)
            if name == "retain":
                found["retain_accuracy"] = accuracy
        return found

    def harm(self, before: Mapping[str, float], now: Mapping[str, float]) -> str:
        """In words, the bound that is passed; "" within the budget."""
        bounds = self.stop.budget
        if bounds.retain_perplexity is not None:
            then, value = before["retain_perplexity"], now["retain_perplexity"]
            if not value <= bounds.retain_perplexity * then:
                return f"retain perplexity {value:.4g} is above {bounds.retain_perplexity:g} × {then:.4g}"
        if bounds.retain_accuracy is not None:
            then, value = before["retain_accuracy"], now["retain_accuracy"]
            if not value >= (1 - bounds.retain_accuracy) * then:
                return f"retain accuracy {value:.4g} is more than {100 * bounds.retain_accuracy:g} % below {then:.4g}"
        return ""

    def collapse(self, now: Mapping[str, float], before: Mapping[str, float]) -> str:
        """In words, that most of what is to be kept is gone; "" where it is not. No recipe sets this bound, and it ends no run."""
        then, value = before.get("retain_accuracy", 0.0), now.get("retain_accuracy", 1.0)
        if value < COLLAPSED * then:
            return f"retain accuracy fell from {then:.4g} to {value:.4g}"
        then, value = before.get("retain_perplexity", 1.0), now.get("retain_perplexity", 1.0)
        return f"retain perplexity rose from {then:.4g} to {value:.4g}" if value * COLLAPSED > 5 * then else ""

    def gap(self, now: Mapping[str, float]) -> float | None:
        """log of the aim over the forget set's perplexity: what is still to be forgotten, below 0 beyond the aim; None without
        aim."""
        aim = self.aim_at(now)
        return None if aim is None else math.log(aim / now["forget_perplexity"])

    def aim_at(self, now: Mapping[str, float]) -> float | None:
        """The perplexity that the forget set is to have; the holdout set's moves with the model."""
        return now["holdout_perplexity"] if self.stop.until == "holdout" else self.aim

    def compared(self, now: Mapping[str, float]) -> str:
        """In words, where the forget set is and where it is to be."""
        whose = {"retrained": "the retrained model's", "holdout": "the holdout set's"}.get(str(self.stop.until), "asked for")
        return (
            f"forget perplexity {now['forget_perplexity']:.4g} on {len(self.sets['forget'])} rows ({whose}: {self.aim_at(now):.4g})"
        )


def first(probe: Probe, seen: dict[str, float], progress: Progress, model: nn.Module) -> Outcome | None:
    """The look before a run; how it ends, where its aim is reached before it begins."""
    if broken := _overflown(seen):
        return Outcome("stopped", 0, 0, f"{broken} before the first step", True)
    gap = probe.gap(seen)
    progress.before, progress.good, progress.good_look = seen, snapshot(model), seen
    progress.gap = float("inf") if gap is None else abs(gap)
    if gap is not None and gap <= 0:
        return Outcome("finished", 0, 0, f"nothing is left to forget: {probe.compared(seen)}")
    return None


def judge(probe: Probe, seen: Mapping[str, float], progress: Progress, model: nn.Module, quiet: bool = False) -> Outcome | None:
    """Keep these weights if they are the best so far, and end the run where its aim is reached or its budget is spent, or where
    the model computes nothing finite any more.

    Args:
        quiet: of many processes, another speaks.
    """
    if broken := _overflown(seen):
        return Outcome("stopped", progress.step, progress.good_step, f"{broken} at step {progress.step}", True)
    harm, gap = probe.harm(progress.before, seen), probe.gap(seen)
    if not harm and not progress.warned and (found := probe.collapse(seen, progress.before)):
        progress.warned = True
        if not quiet:
            print(f"warning: {found} by step {progress.step}, and no budget of train.stop ends the run", file=sys.stderr)
    progress.beyond = progress.beyond + 1 if harm else 0
    if not harm and (gap is None or abs(gap) <= progress.gap):
        progress.good_step, progress.good, progress.good_look = progress.step, snapshot(model), dict(seen)
        progress.gap = progress.gap if gap is None else abs(gap)
    if harm and progress.beyond >= probe.stop.patience:
        return Outcome("stopped", progress.step, progress.good_step, f"{harm} at step {progress.step}")
    if not harm and gap is not None and gap <= 0:
        reason = f"the aim is reached at step {progress.step}: {probe.compared(seen)}"
        if progress.good_step != progress.step:
            reason += f"; step {progress.good_step} was nearer to it: {probe.compared(progress.good_look)}"
        return Outcome("finished", progress.step, progress.good_step, reason)
    return None


def _overflown(seen: Mapping[str, float]) -> str:
    """In words, what a look found that is not finite; "" where all is."""
    names = [name.replace("_", " ") for name, value in seen.items() if not math.isfinite(value)]
    return f"{', '.join(names)} not finite" if names else ""


def ending(probe: Probe | None, progress: Progress, more: str = "more epochs") -> Outcome:
    """All steps are done; `more` of what would go further, if the last was the best."""
    step = progress.step
    if not probe:
        return Outcome("finished", step, step)
    gap, reason = probe.gap(progress.good_look), ""
    if gap is not None and gap > 0:
        further = "" if progress.good_step < step else f"; {more} would go further"
        reason = f"the aim is not reached: {probe.compared(progress.good_look)}{further}"
    elif progress.beyond:
        reason = "the last looks were beyond the budget"
    if found := probe.collapse(progress.good_look, progress.before):
        reason = "; ".join(filter(None, (reason, f"{found}: most of what was to be kept is gone")))
    return Outcome("finished", step, progress.good_step, reason)
