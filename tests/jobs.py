"""Small jobs for tests of the optimizer step: rows of very different length, a tiny model, a term to forget and one to keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from llm_unlearn import recipe
from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import build
from llm_unlearn.models.load import add_adapter, trainable
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import NLL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Adapter, Train
from llm_unlearn.spec import Refused
from llm_unlearn.training import gradients
from llm_unlearn.training.checkpoint import snapshot
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train

ROOT = Path(__file__).parent.parent
SIZES = {"forget": 8, "retain": 10}
WINDOW = {"forget": 5, "retain": 7}


RECIPE = """\
output: runs/x
model: {base: embedded:target}
data:
  forget: {source: embedded:forget, prompt: question, answer: answer}
  retain: {source: embedded:retain, prompt: question, answer: answer}
objective:
  forget: {loss: {name: npo}}
  retain: {loss: {name: nll}}
"""
"""A recipe of the embedded default, as short as one can be."""


class PowerCut(BaseException):
    """What ends a run in a test, at any place."""


def refusal(folder: Path, text: str, override: str) -> tuple[recipe.Recipe, str]:
    """A recipe as it stands, and why it is refused once one setting is another."""
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Refused) as refused:
        recipe.load(path, [override])
    return recipe.load(path), str(refused.value)


def straight_and_resumed(wanted: Job, make: Callable[[], Any], folder: Path, at: int) -> tuple[Any, Any]:
    """Two models: of a run that nothing disturbs (`folder`/straight), and of one whose power is cut after step `at` and which is
    then resumed (`folder`/cut)."""
    straight, resumed = make(), make()
    train(wanted, straight, Accelerator(cpu=True), folder / "straight")

    def cut(step: int) -> None:
        if step == at:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(wanted, make(), Accelerator(cpu=True), folder / "cut", look=cut)
    train(wanted, resumed, Accelerator(cpu=True), folder / "cut", resume=True)
    return straight, resumed


def rows(stream: str, count: int, seed: int, longest: int = 20) -> list[Example]:
    """Answers of very different length: means of means would be far off."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt, answer = (int(x) for x in torch.randint(1, longest, (2,), generator=draw))
        made.append(Example(tuple(torch.randint(4, 1024, (prompt + answer,), generator=draw).tolist()), prompt, stream, i))
    return made


def job(steps: int = 4, *, terms: Mapping[str, Term] | None = None, aim: float | None = None, **settings: Any) -> Job:
    """npo on 8 rows, kl on 10 others, and 6 rows of the same kind that no term reads; keywords are those of `train:`."""
    streams = {"forget": rows("forget", 8, 1), "retain": rows("retain", 10, 2), "holdout": rows("holdout", 6, 3)}
    terms = terms or {"forget": Term(loss=NPO(), weight=0.7), "retain": Term(loss=KL(), weight=1.5)}
    defaults: dict[str, Any] = {"lr": 1e-2, "batch_tokens": 200, "warmup": 0.0}
    return Job(terms, streams, build(SIZES, WINDOW, seed=3, steps=steps), Train(**(defaults | settings)), aim=aim)


def adapted(make_model: Callable[..., Any], moved: float = 0.0, **changes: Any) -> Any:
    """A tiny model with an adapter; `moved` away from its base by so much."""
    model = add_adapter(make_model(**changes), Adapter(rank=4), seed=0)
    return away(model, moved)


def away(model: Any, by: float, only: str = "lora_B") -> Any:
    """Move what is trained a little, so that the model is no longer the model as it was."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if by and (only in name or "lora" not in name):
                weight += by * torch.randn_like(weight)
    return model


def weights(model: Any) -> torch.Tensor:
    """All that is trained, as one vector."""
    return torch.cat([weight.flatten() for weight in snapshot(model).values()])


def on_processes(count: int, script: str, *words: str) -> str:
    """Run a script of this folder on several real processes (gloo); what the first one prints."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", "0", "--standalone"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / script), *words], capture_output=True, text=True, timeout=900, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


NPO_AND_NLL = {"forget": Term(loss=NPO(), weight=0.7), "retain": Term(loss=NLL(), weight=1.5)}
"""kl has no gradient at the first step, where the model is the model as it was."""


def rules(name: str, folder: Path, make_model: Callable[..., Any] | None = None) -> tuple[gradients.AnyRule, ...]:
    """A rule with settings that show on a tiny model; that which compares adapters finds two of them in `folder`."""
    if name == "orthogonal":
        for k in (1, 2):
            if make_model and not (folder / f"earlier{k}").exists():
                away(add_adapter(make_model(), Adapter(rank=2 * k), seed=k), 0.1).save_pretrained(str(folder / f"earlier{k}"))
        return (gradients.Orthogonal(adapters=(str(folder / "earlier1"), str(folder / "earlier2")), weight=0.05),)
    found: dict[str, gradients.AnyRule] = {
        "project": gradients.Project(),
        "project_ema": gradients.Project(ema=0.8),
        "bilevel": gradients.Bilevel(gamma=0.5),
        "sharpness": gradients.Sharpness(rho=0.05),
        "latent": gradients.Latent(layer=0, epsilon=0.5, iterations=4),
        "tamper": gradients.Tamper(steps=2, lr=0.05),
        "saliency": gradients.Saliency(quantile=0.5, rows=6),
        "trust_region": gradients.TrustRegion(distance=0.05, kl=1e-3),
    }
    return (found[name],)


def moved_by(wanted: Job, model: Any, folder: Path, accelerator: Accelerator | None = None) -> torch.Tensor:
    """Train, and say by what the weights moved."""
    before = weights(model)
    train(wanted, model, accelerator or Accelerator(cpu=True), folder)
    return weights(model) - before


def log(folder: Path) -> list[dict[str, float]]:
    """A run's log without its times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
