"""How the model as it was is asked: every way gives the same gradients, the cheapest is taken, and what was taken is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from jobs import adapted, job, log, straight_and_resumed, weights
from test_window import apart, gradients_of, make_adapted, make_job, weights_of
from torch import Tensor

from llm_unlearn.models.load import trainable
from llm_unlearn.models.reference import LOGPS
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.preference import DPO, NPO
from llm_unlearn.objectives.representation import RMU, EmbedMatch
from llm_unlearn.training import before
from llm_unlearn.training.before import Shelf, choices, reference_of
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import train
from llm_unlearn.training.window import Model, Window

CASES = [(NPO(), KL()), (DPO(), KL(direction="reverse")), (RMU(layer=1), EmbedMatch(layers=(1,)))]
WAYS = ("adapter_off", "kept", "copy")


TAKEN = make_job(NPO(), 60, reference="kept")


def gradient(
    wanted: Job, model: Any, shelf: Shelf | None = None, moves: float = 0.0, accelerator: Accelerator | None = None
) -> dict[str, Tensor]:
    """Of the first window; `moves` the weights after the model as it was has been asked, or is ready to be."""
    accelerator, scorer, head = accelerator or Accelerator(cpu=True), Scorer(model), head_of(model)
    reference = reference_of(wanted, scorer, head, accelerator, 64, shelf)
    with torch.no_grad():
        for k, weight in enumerate(trainable(model).values()):
            weight += moves * torch.randn(weight.shape, generator=torch.Generator().manual_seed(k))
    wrapped = accelerator.prepare(scorer)
    Window(wanted, 0, accelerator).backward(wanted.terms, weights_of(wanted), Model(wrapped, scorer, head, reference))
    return gradients_of(model)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Inside, how many answers each pass over the model as it was takes on this process."""
    found: list[int] = []
    real = before.taken

    def counted(*given: Any) -> Iterator[Any]:
        found.append(0)
        for one in real(*given):
            found[-1] += 1
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(before, "taken", counted)
        yield found


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("loss", "kept"), CASES, ids=lambda loss: loss.name)
def test_every_way_gives_the_same_gradients(make_model: Callable[..., Any], loss: Any, kept: Any, adapter: bool) -> None:
    found = {}
    for way in WAYS[0 if adapter else 1 :]:
        model = make_adapted(make_model, True) if adapter else make_model()
        found[way] = gradient(make_job(loss, 60, kept, reference=way), model, moves=0.02)
    exact = {name: one.double() for name, one in found["copy"].items()}
    assert all(apart(one, exact) < 1e-5 for one in found.values())


def test_the_cheapest_exact_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken once where each answer is seen more than once, unless that takes too much room; full weights have no adapter."""
    often, seldom = job(steps=40), job(steps=1)
    assert {name: one.way for name, one in choices(often, True, 32, 4).items()} == {"forget": "kept", "retain": "kept"}
    assert {name: one.way for name, one in choices(seldom, True, 32, 4).items()} == {
        "forget": "adapter_off",
        "retain": "adapter_off",
    }
    assert {one.way for one in choices(seldom, False, 32, 4).values()} == {"kept"}
    found = choices(often, True, 32, 4)
    targets = {name: sum(example.targets for example in one.examples) for name, one in found.items()}
    assert found["forget"].asked.columns == (LOGPS,) and found["forget"].bytes == 4 * targets["forget"]
    assert found["retain"].bytes == 32 * 4 * targets["retain"]
    assert all(one.visits > one.tokens == sum(len(example.ids) for example in one.examples) for one in found.values())
    monkeypatch.setattr(before, "MOST", found["retain"].bytes - 1)
    assert {name: one.way for name, one in choices(often, True, 32, 4).items()} == {"forget": "kept", "retain": "adapter_off"}
    asked = replace(often, settings=replace(often.settings, reference="copy"))
    assert {one.way for one in choices(asked, True, 32, 4).values()} == {"copy"}


def test_what_was_taken_is_read_again(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """By the same model and rows only; a file that cannot be read is written anew."""
    shelf = Shelf(tmp_path, "this model")
    with counting() as taken:
        first = gradient(TAKEN, make_adapted(make_model, True), shelf)
        (file,) = tmp_path.iterdir()
        again = gradient(TAKEN, make_adapted(make_model, True), shelf)
        assert len(taken) == 1 and all(torch.equal(first[name], again[name]) for name in first)
        gradient(TAKEN, make_adapted(make_model, True), Shelf(tmp_path, "another model"))
        others = replace(TAKEN, examples={**TAKEN.examples, "forget": TAKEN.examples["forget"][::-1]})
        gradient(others, make_adapted(make_model, True), shelf)
        assert len(taken) == 3 and len(list(tmp_path.iterdir())) == 3
        file.write_bytes(file.read_bytes()[:-9])
        mended = gradient(TAKEN, make_adapted(make_model, True), shelf)
        assert len(taken) == 4 and all(torch.equal(first[name], mended[name]) for name in first)
        gradient(TAKEN, make_adapted(make_model, True), shelf)
        assert len(taken) == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_asks_the_same_model(make_model: Callable[..., Any], tmp_path: Path, way: Any) -> None:
    straight, resumed = straight_and_resumed(
        job(steps=6, reference=way, checkpoint_every=2), lambda: adapted(make_model), tmp_path, at=5
    )
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.slow
@pytest.mark.two_processes("before")
def test_two_processes_take_it_together(make_model: Callable[..., Any], two_processes: Path) -> None:
    """Each a share of one pass; both then have everything, and it is what one process takes. A second run reads the file."""
    exact = {name: one.double() for name, one in gradient(TAKEN, make_adapted(make_model, True)).items()}
    found = [torch.load(two_processes / f"{rank}.pt") for rank in range(2)]
    answers = sum(len(TAKEN.schedule.seen(stream)) for stream in ("forget", "retain"))
    assert [len(one["taken"]) for one in found] == [1, 1] and sum(one["taken"][0] for one in found) == answers
    assert all(one["taken"][0] < answers for one in found) and len(list((two_processes / "shelf").iterdir())) == 1
    assert all(apart(gradients, exact) < 1e-5 for one in found for gradients in one["gradients"])


def test_a_copy_reads_packed_sequences_as_the_model_does(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Through the training loop, which packs where the attention can."""
    logs = []
    for way in ("adapter_off", "copy"):
        train(job(2, reference=way), adapted(make_model, 0.05), Accelerator(cpu=True), tmp_path / way)
        logs.append([(row["forget"], row["retain"]) for row in log(tmp_path / way)])
    assert logs[0] == [pytest.approx(one, rel=1e-5) for one in logs[1]]
