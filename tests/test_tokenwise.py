"""Values of tokens taken with their gradient while their logits are there, against float64 autograd on all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_unlearn.models.head import Head
from llm_unlearn.models.tokenwise import OfDistribution, OfLikelihood, Read, tokenwise

N, D, V = 11, 6, 40
Of = Callable[[Tensor, slice], Tensor]


def entropy(logits: Tensor, part: slice) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def weighted(logps: Tensor, part: slice) -> Tensor:
    return logps.detach().exp() * logps * torch.arange(N, dtype=logps.dtype)[part]


def made(read: str, targets: Tensor, rows: int) -> Read:
    if read == "entropy":
        return OfDistribution(entropy, rows)
    return OfLikelihood(targets, rows, weighted if read == "weighted" else None)


def plainly(read: str, logits: Tensor, targets: Tensor) -> Tensor:
    if read == "entropy":
        return entropy(logits, slice(None))
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return weighted(logps, slice(None)) if read == "weighted" else logps


def head_and_states(bias: bool = False, scale: float = 1.0, cap: float | None = None, trains: bool = True) -> tuple[Head, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias).requires_grad_(trains)
    return Head(layer, V, scale, cap), torch.randn(N, D, requires_grad=True)


KINDS: list[dict[str, float]] = [{}, {"bias": True}, {"scale": 0.3}, {"cap": 2.0}, {"bias": True, "scale": 3.0, "cap": 1.5}]
FACTORS = {"one": torch.full((N,), 0.7), "many": torch.linspace(-1, 2, N)}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("one_factor", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("read", ["logp", "weighted", "entropy"])
def test_against_float64(read: str, kind: dict[str, float], trains: bool, rows: int, one_factor: bool, factor: str) -> None:
    head, states = head_and_states(**kind, trains=trains)  # type: ignore[arg-type]
    targets = torch.randint(0, V, (N,))
    found = tokenwise(head, states, made(read, targets, rows), one_factor)
    found.backward(FACTORS[factor])

    layer, exact = head.layer, states.detach().double().requires_grad_()
    weights = [one.detach().double().requires_grad_() for one in layer.parameters()]
    expected = plainly(read, head.finish(F.linear(exact, *weights)), targets)
    expected.backward(FACTORS[factor].double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    pairs = [(states, exact), *(zip(layer.parameters(), weights, strict=True) if trains else ())]
    for mine, theirs in pairs:
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    assert trains or all(one.grad is None for one in layer.parameters())


@contextmanager
def largest_kept() -> Iterator[list[int]]:
    """Sizes of what autograd keeps for the backward pass."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):  # type: ignore[func-returns-value]
        yield sizes


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("read", ["logp", "entropy"])
def test_no_more_than_the_logits_of_some_rows_are_ever_there(monkeypatch: pytest.MonkeyPatch, read: str, trains: bool) -> None:
    head, states = head_and_states(trains=trains)
    seen: list[int] = []
    finish = Head.finish
    monkeypatch.setattr(Head, "finish", lambda self, logits: seen.append(len(logits)) or finish(self, logits))  # type: ignore[func-returns-value]
    with largest_kept() as sizes:
        found = tokenwise(head, states, made(read, torch.randint(0, V, (N,)), 3))
    assert max(sizes) < N * V and max(seen) == 3
    found.sum().backward()
    assert max(seen) == 3 and sum(seen) == (2 * N if trains else N)  # a frozen head is asked once


def test_one_factor_asks_a_trained_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    for factor in FACTORS:
        head, states = head_and_states()
        seen: list[int] = []
        finish = Head.finish
        with monkeypatch.context() as patched:
            patched.setattr(Head, "finish", lambda self, logits, to=seen, own=finish: to.append(len(logits)) or own(self, logits))
            tokenwise(head, states, made("logp", torch.randint(0, V, (N,)), 3), one_factor=True).backward(FACTORS[factor])
        asked[factor] = sum(seen)
    assert asked == {"one": N, "many": 2 * N}


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
def test_in_bf16_as_autocast_has_it(trains: bool) -> None:
    head, states = head_and_states(trains=trains, bias=True)
    targets = torch.randint(0, V, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenwise(head, states, made("logp", targets, 4))
    found.sum().backward()
    mine = [states.grad, *(one.grad for one in head.layer.parameters())]
    states.grad = None
    head.layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly("logp", head(states), targets)
    expected.sum().backward()
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(mine, [states.grad, *(one.grad for one in head.layer.parameters())], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or (one - other).norm() <= 2e-2 * other.norm()


def test_logits_of_one_part_are_written_over_those_of_the_last() -> None:
    """Where one product in float32 makes them; the numbers are those of a head that is called."""
    head, states = head_and_states(trains=False)
    room = head.room(4)
    assert room is not None and room.shape == (4, V) and not room.requires_grad
    with torch.no_grad():
        first, second = head(states[:4], room).clone(), head(states[4:7], room)
        assert torch.equal(first, head(states[:4])) and torch.equal(second, head(states[4:7]))
    assert second.data_ptr() == room.data_ptr()
    assert head_and_states(bias=True)[0].room(4) is None
    assert Head(nn.Linear(D, V, bias=False).to(torch.bfloat16), V).room(4) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert head.room(4) is None
    head.layer.register_forward_hook(lambda layer, given, output: None)
    assert head.room(4) is None


def test_a_head_that_somebody_watches_is_called() -> None:
    """As for gradients of single examples, which are taken where a layer is called."""
    for rows in (3, 100):
        head, states = head_and_states()
        calls: list[int] = []
        head.layer.register_forward_hook(lambda layer, given, output, calls=calls: calls.append(len(output)))
        targets = torch.randint(0, V, (N,))
        found = tokenwise(head, states, made("logp", targets, rows))
        found.sum().backward()
        assert sum(calls) >= N
        mine, states.grad = states.grad, None
        plainly("logp", head(states), targets).sum().backward()
        assert mine is not None and states.grad is not None and torch.allclose(mine, states.grad, atol=1e-6)


@pytest.mark.parametrize("half", ["head", "nothing"])
def test_what_is_compared_with_is_rounded_as_the_logits_are(half: str) -> None:
    """A divergence from the same states is 0 exactly, under autocast too, whether the head is kept in half precision or not."""
    head, states = head_and_states(trains=False)
    head.layer.to(torch.bfloat16 if half == "head" else torch.float32)
    then = states.detach().clone()

    def divergence(logits: Tensor, part: slice) -> Tensor:
        logp, logp0 = logits.log_softmax(-1), head(then[part]).log_softmax(-1)
        return (logp.exp() * (logp - logp0)).sum(-1)

    with torch.autocast("cpu", torch.bfloat16):
        found = tokenwise(head, states, OfDistribution(divergence, 4), one_factor=True)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(N)) and states.grad is not None and states.grad.norm() < 1e-2
