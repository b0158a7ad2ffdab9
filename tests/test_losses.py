"""Every loss against hand-computed values and against its paper's formula in float64, on numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import IDK, NLL, Ascent
from llm_unlearn.objectives.preference import DPO, NPO
from llm_unlearn.objectives.terms import AnyLoss, Term, streams_read

LOSSES = get_args(get_args(AnyLoss)[0])


@dataclass
class Numbers:
    """A view made of given logits."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    owner: Tensor  # (N,)

    @property
    def logps(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]

    def by_sequence(self, values: Tensor) -> Tensor:
        return values.new_zeros(int(self.owner.max()) + 1).index_add(0, self.owner, values)


@dataclass
class Given:
    """A view made of given log-probabilities."""

    logps: Tensor
    owner: Tensor

    def by_sequence(self, values: Tensor) -> Tensor:
        return values.new_zeros(int(self.owner.max()) + 1).index_add(0, self.owner, values)


def random_views(seed: int, streams: tuple[str, ...] = ("forget", "alternate")) -> dict[str, Numbers]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for stream in streams:
        owner = torch.arange(3).repeat_interleave(torch.randint(1, 5, (3,), generator=draw))
        logits = 3 * torch.randn(len(owner), 7, generator=draw, dtype=torch.float64)
        found[stream] = Numbers(logits, torch.randint(0, 7, (len(owner),), generator=draw), owner)
    return found


def logp(view: Numbers, n: int) -> float:
    """log softmax of one target, with `math` alone."""
    row = [float(x) for x in view.logits[n]]
    top = max(row)
    return row[int(view.targets[n])] - top - math.log(sum(math.exp(x - top) for x in row))


def sequences(view: Numbers) -> list[list[int]]:
    return [[n for n in range(len(view.owner)) if view.owner[n] == s] for s in range(3)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def by_the_paper(loss: Any, now: dict[str, Numbers], ref: dict[str, Numbers]) -> list[float]:
    """The loss as its paper writes it, one float at a time."""
    y, a, y0, a0 = now["forget"], now["alternate"], ref["forget"], ref["alternate"]
    match loss:
        case NLL():
            return [-logp(y, n) for n in range(len(y.owner))]
        case Ascent():
            return [logp(y, n) for n in range(len(y.owner))]
        case IDK():
            return [-logp(a, n) for n in range(len(a.owner))]
        case NPO():
            ratios = [sum(logp(y, n) - logp(y0, n) for n in members) for members in sequences(y)]
            return [-2 / loss.beta * log_sigmoid(-loss.beta * ratio) for ratio in ratios]
        case DPO():
            lose = [sum(logp(y, n) - logp(y0, n) for n in members) for members in sequences(y)]
            win = [sum(logp(a, n) - logp(a0, n) for n in members) for members in sequences(a)]
            return [-2 / loss.beta * log_sigmoid(loss.beta * (w - y)) for w, y in zip(win, lose, strict=True)]
        case KL():
            p = [[float(x) for x in row.softmax(-1)] for row in y.logits]
            p0 = [[float(x) for x in row.softmax(-1)] for row in y0.logits]
            if loss.direction == "reverse":
                p, p0 = p0, p
            return [sum(q0 * math.log(q0 / q) for q, q0 in zip(*pair, strict=True)) for pair in zip(p, p0, strict=True)]
    raise AssertionError(f"no reference for {loss.name}: write it from the paper")


CASES = [loss() for loss in LOSSES] + [NPO(beta=2.0), DPO(beta=0.7), KL(direction="reverse")]


@pytest.mark.parametrize("loss", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_paper(loss: Any, seed: int) -> None:
    now = random_views(seed)
    ref = random_like(now)
    values = loss(now, ref, "forget")
    assert values.tolist() == pytest.approx(by_the_paper(loss, now, ref), rel=1e-12)


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_one_value_per_unit(loss: Any) -> None:
    now = random_views(5)
    first = now[streams_read(Term(loss=loss), "forget")[0]]
    values = loss(now, random_like(now), "forget")
    assert values.shape == ((len(first.owner),) if loss.unit == "token" else (3,))


def random_like(views: dict[str, Numbers]) -> dict[str, Numbers]:
    torch.manual_seed(9)
    return {stream: Numbers(torch.randn_like(view.logits), view.targets, view.owner) for stream, view in views.items()}


def test_values_by_hand() -> None:
    owner = torch.tensor([0, 0, 1])
    now = {
        "forget": Given(torch.tensor([-1.0, -2.0, -0.5]), owner),
        "alternate": Given(torch.tensor([-1.0, -1.0, -3.0]), owner),
    }
    ref = {
        "forget": Given(torch.tensor([-0.5, -1.5, -1.5]), owner),
        "alternate": Given(torch.tensor([-2.0, -1.0, -2.0]), owner),
    }
    assert NLL()(now, ref, "forget").tolist() == [1.0, 2.0, 0.5]
    assert Ascent()(now, ref, "forget").tolist() == [-1.0, -2.0, -0.5]
    assert IDK()(now, ref, "forget").tolist() == [1.0, 1.0, 3.0]
    # ratios: (−0.5) + (−0.5) = −1 and +1; β = 1: −2 log σ(1) and −2 log σ(−1)
    assert NPO(beta=1.0)(now, ref, "forget").tolist() == pytest.approx([0.6265233750, 2.6265233750])
    # win − lose: 1 − (−1) = 2 and −1 − 1 = −2; β = 1
    assert DPO(beta=1.0)(now, ref, "forget").tolist() == pytest.approx([0.2538560220, 4.2538560220])


def test_npo_at_the_reference_and_towards_ascent() -> None:
    now = random_views(1)
    view = now["forget"]
    view.logits.requires_grad_()
    value = NPO(beta=0.5)(now, {"forget": Numbers(view.logits.detach(), view.targets, view.owner)}, "forget")
    assert value.tolist() == pytest.approx([2 / 0.5 * math.log(2)] * 3)
    # the gradient of NPO tends to that of ascent as β → 0 (Zhang et al. 2024, proposition 1)
    ref = {"forget": Numbers(view.logits.detach(), view.targets, view.owner)}
    (npo,) = torch.autograd.grad(NPO(beta=1e-7)(now, ref, "forget").sum(), view.logits)
    (ascent,) = torch.autograd.grad(Ascent()(now, ref, "forget").sum(), view.logits)
    assert torch.allclose(npo, ascent, rtol=1e-5, atol=1e-9)


def test_npo_survives_extreme_ratios() -> None:
    owner = torch.tensor([0, 1])
    now, ref = (
        {"forget": Given(torch.tensor([-1e4, -1.0]), owner)},
        {"forget": Given(torch.tensor([-1.0, -1e4]), owner)},
    )
    values = NPO(beta=1.0)(now, ref, "forget")
    assert values[0] == 0 and values[1] == pytest.approx(2 * (1e4 - 1))


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    now = random_views(2)
    assert KL()(now, now, "forget").abs().max() < 1e-12
    assert bool((KL()(now, random_like(now), "forget") > 0).all())
