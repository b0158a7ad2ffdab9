"""How many tokens fit: found by two short steps, changes no result, and is said where it does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from jobs import adapted, job, straight_and_resumed, weights

from llm_unlearn.models.reference import Reference
from llm_unlearn.training import loop, room
from llm_unlearn.training.loop import Training, train
from llm_unlearn.training.room import fitting
from llm_unlearn.troubles import OutOfMemory

FREE = [1e5, 4e5, 1e6, 1e9]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_more_memory_takes_more_tokens_up_to_the_window(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, full: bool, packed: bool
) -> None:
    """And what a step of so many tokens takes is below what is free."""
    model = make_model() if full else adapted(make_model)
    wanted = job(reference="kept", optimizer="sgd")
    training = Training(wanted, model, Accelerator(cpu=True))
    before, found = weights(model), []
    for free in FREE:
        monkeypatch.setattr(room, "_free", lambda accelerator, free=free: free)
        found.append(fitting(wanted, training.model, training.accelerator, packed))
    assert all(weight.grad is None for weight in training.weights) and torch.equal(weights(model), before)
    assert found == sorted(found) and found[0] < found[1] < found[-1]
    training.window.layout = room.Layout(1 << 40, packed)
    assert found[-1] == training.window.largest()
    for free, tokens in zip(FREE[1:], found[1:], strict=True):
        assert tokens <= found[-1] and largest_part(training, room.Layout(tokens, packed)) <= free


def largest_part(training: Training, layout: room.Layout) -> int:
    """Bytes that the largest micro-batch keeps for its backward pass."""
    window, job_ = training.window, training.job
    window.layout = layout
    (first, *_) = window.parts(job_.terms)
    assert first.batch and first.batch.input_ids.numel() <= layout.tokens
    every = window.slots
    window.slots = [slot for slot in every if any(job_.example(*place) in first.batch.examples for place in slot)]
    took = room._peak(
        torch.device("cpu"),
        training.model,
        lambda: bool(window.backward(job_.terms, dict.fromkeys(job_.terms, 1.0), training.model)),
    )
    window.slots = every
    training.optimizer.zero_grad()
    return took


def test_a_run_is_the_same(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    found = {}
    for free in (3e5, 1e9):
        monkeypatch.setattr(room, "_free", lambda accelerator, free=free: free)
        model = adapted(make_model)
        train(job(micro_batch="auto", optimizer="sgd", lr=0.1), model, Accelerator(cpu=True), tmp_path / str(free))
        found[free] = weights(model)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batches of at most")]
    assert len(set(said)) == 2
    assert torch.allclose(*found.values(), atol=1e-6)


def test_a_resumed_run_keeps_what_was_found(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise its last digits would depend on how much was free."""
    tries: list[int] = []
    real = loop.fitting

    def counted(*given: Any) -> int:
        tries.append(real(*given))
        return tries[-1]

    monkeypatch.setattr(loop, "fitting", counted)
    monkeypatch.setattr(room, "_free", lambda accelerator: 5e5)
    straight, resumed = straight_and_resumed(
        job(steps=6, micro_batch="auto", checkpoint_every=2), lambda: adapted(make_model), tmp_path, at=5
    )
    assert len(tries) == 2 and torch.equal(weights(straight), weights(resumed))


def test_where_it_does_not_suffice(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*given: Any, **named: Any) -> Reference:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop.Window, "backward", full)
    with pytest.raises(
        OutOfMemory, match=r"out of memory in step 1, with at most 200 tokens .* train.batch_tokens: 100, .* --resume"
    ):
        train(job(), adapted(make_model), Accelerator(cpu=True), tmp_path / "fixed")
    with pytest.raises(OutOfMemory, match=r"train.micro_batch: auto: .* longest rows alone do not fit .*gradient_checkpointing"):
        train(job(micro_batch="auto"), adapted(make_model), Accelerator(cpu=True), tmp_path / "auto")
