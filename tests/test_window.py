"""The one rule: the gradient of a window is that of the whole batch, for every cut into micro-batches and every number of ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import build
from llm_unlearn.models.load import add_adapter, has_adapter, trainable
from llm_unlearn.models.reference import reference_of
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import IDK, NLL, Ascent
from llm_unlearn.objectives.preference import DPO, NPO
from llm_unlearn.objectives.terms import AnyLoss, Term
from llm_unlearn.recipe import Adapter, Train
from llm_unlearn.training.loop import Job, Window

ROOT = Path(__file__).parent.parent
LOSSES = get_args(get_args(AnyLoss)[0])


def make_examples(stream: str, count: int, seed: int) -> list[Example]:
    """Answers of very different length: means of means would be far off."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt, answer = (int(x) for x in torch.randint(1, 20, (2,), generator=draw))
        made.append(Example(tuple(torch.randint(4, 1024, (prompt + answer,), generator=draw).tolist()), prompt, stream, i))
    return made


def make_job(loss: Any, batch_tokens: int, kl: bool = True) -> Job:
    streams = {
        "forget": make_examples("forget", 8, 1),
        "retain": make_examples("retain", 10, 2),
        "alternate": make_examples("alternate", 8, 3),
    }
    window = {"forget": 5, "retain": 7}
    alternates = ("forget", [1] * 8) if "alternate" in loss.reads else None
    schedule = build({"forget": 8, "retain": 10}, window, seed=3, epochs=1, alternates=alternates)
    terms = {"forget": Term(loss=loss, weight=0.7), "retain": Term(loss=KL() if kl else NLL(), weight=1.5)}
    return Job(terms, streams, schedule, Train(batch_tokens=batch_tokens))


def make_adapted(make_model: Callable[..., Any], adapter: bool) -> Any:
    """A model that has moved away from `make_model()`, by its adapter or by its weights."""
    model = add_adapter(make_model(), Adapter(rank=4), seed=0) if adapter else make_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if not adapter or "lora_B" in name:
                weight += (0.2 if adapter else 0.02) * torch.randn_like(weight)
    return model


def whole_batch(job: Job, step: int, model: Any, before: Any) -> tuple[Tensor, dict[str, float]]:
    """The window's gradient in float64, sequence by sequence, from the definition: Σ_terms weight · mean over all units."""
    model, before = copy.deepcopy(model).double(), copy.deepcopy(before).double()
    places = [place for slot in job.schedule.window(step) for place in slot]

    def logits(net: Any, example: Example) -> Tensor:
        return net(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]

    def logp(net: Any, example: Example) -> Tensor:
        targets = torch.tensor(example.ids[example.answer :])
        return logits(net, example).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    total, means = torch.zeros((), dtype=torch.float64), {}
    for name, term in job.terms.items():
        units: list[Tensor] = []
        mine = [job.example(*place) for place in places if place[0] == name]
        other = [job.example(*place) for place in places if place[0] == "alternate"]
        for i, one in enumerate(mine):
            with torch.no_grad():
                p0 = logp(before, one)
            match term.loss:
                case NLL():
                    units += list(-logp(model, one))
                case Ascent():
                    units += list(logp(model, one))
                case IDK():
                    units += list(-logp(model, other[i]))
                case NPO():
                    ratio = (logp(model, one) - p0).sum()
                    units.append(-2 / term.loss.beta * torch.nn.functional.logsigmoid(-term.loss.beta * ratio))
                case DPO():
                    with torch.no_grad():
                        q0 = logp(before, other[i])
                    gap = (logp(model, other[i]) - q0).sum() - (logp(model, one) - p0).sum()
                    units.append(-2 / term.loss.beta * torch.nn.functional.logsigmoid(term.loss.beta * gap))
                case KL():
                    with torch.no_grad():
                        then = logits(before, one).log_softmax(-1)
                    units += list((then.exp() * (then - logits(model, one).log_softmax(-1))).sum(-1))
                case _:
                    raise AssertionError(f"no reference for {term.loss.name}: write it from the paper")
        mean = torch.stack(units).sum() / len(units)
        total, means[name] = total + term.weight * mean, float(mean.detach())
    total.backward()
    return torch.cat([weight.grad.flatten() for weight in trainable(model).values() if weight.grad is not None]), means


def in_windows(job: Job, step: int, model: Any, before: Any, ranks: int) -> tuple[Tensor, dict[str, float]]:
    """The same through the loop's own window, the ranks played one after another and averaged as data parallelism does."""

    class Rank:
        """An accelerator whose rank is given."""

        def __init__(self, index: int) -> None:
            real = Accelerator(cpu=True)
            self.num_processes, self.process_index, self.device = ranks, index, torch.device("cpu")
            self.no_sync, self.autocast, self.backward = real.no_sync, real.autocast, real.backward

        def reduce(self, values: Tensor, how: str) -> Tensor:
            return values

    model = copy.deepcopy(model)
    scorer, head = Scorer(model), head_of(model)
    examples = [one for stream in job.examples.values() for one in stream]
    asked = (scorer, head) if has_adapter(model) else (Scorer(before), head_of(before))
    reference = reference_of(*asked, job.needs, examples, 64, torch.device("cpu"))
    sums: Any = 0
    for rank in range(ranks):
        window = Window(job, step, Rank(rank))  # type: ignore[arg-type]
        sums = sums + window.backward(scorer, head, reference, False)
    gradients = [weight.grad.flatten() / ranks for weight in trainable(model).values() if weight.grad is not None]
    return torch.cat(gradients), window.means(sums)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_gradient_is_that_of_the_whole_batch(make_model: Callable[..., Any], loss: Any, adapter: bool) -> None:
    model, before = make_adapted(make_model, adapter), make_model()
    for step in (0, 1):  # the second window holds what is left of the epoch: 3 forget rows
        job = make_job(loss(), 10**6)
        exact, means = whole_batch(job, step, model, before)
        for batch_tokens in (10**6, 200, 60, 1):
            for ranks in (1, 2, 4):
                gradient, logged = in_windows(make_job(loss(), batch_tokens), step, model, before, ranks)
                error = float((gradient.double() - exact).norm() / exact.norm())
                assert error <= 1e-5, f"{batch_tokens} tokens a micro-batch, {ranks} ranks: {error:.2e}"
                assert logged == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_a_mean_of_means_would_be_caught(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: dividing per micro-batch is off by far more than it allows."""
    model, job = make_adapted(make_model, True), make_job(NLL(), 60, kl=False)
    exact, _ = whole_batch(job, 0, model, make_model())
    monkeypatch.setattr(Window, "denominator", lambda self, name: 12)
    gradient, _ = in_windows(job, 0, model, make_model(), 1)
    assert float((gradient.double() - exact).norm() / exact.norm()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_on_real_processes(make_model: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    """Through DistributedDataParallel and gloo: `windows.py` prints the gradient that every rank ends with."""
    model = make_adapted(make_model, True)
    job = make_job(NPO(), 60)
    exact, _ = whole_batch(job, 0, model, make_model())
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        "0",
        "--standalone",
    ]
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "windows.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gradients = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for gradient in gradients:
        assert torch.equal(gradient, gradients[0])
        assert float((gradient.double() - exact).norm() / exact.norm()) <= 1e-5
