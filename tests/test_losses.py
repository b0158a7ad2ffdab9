"""Every loss against hand-computed values, and against its definition written with `math` alone, on numbers without a model.

The definitions (`PAPER`) are loops over Python floats. Values are compared with them, and so are gradients, by finite
differences in which the factors that a definition holds fixed (sg) stay fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llm_unlearn.objectives.distribution import CEU, ELM, IHL, KL, Entropy, Margin, Undial
from llm_unlearn.objectives.likelihood import IDK, NLL, TNPO, WGA, WTNPO, Ascent, SatImp
from llm_unlearn.objectives.preference import AP, DPO, FLAT, NPO, SimNPO
from llm_unlearn.objectives.representation import RMU, AdaptiveRMU, CircuitBreak, EmbedMatch, Lunar, RepNoise, _direction
from llm_unlearn.objectives.routing import RouterKL
from llm_unlearn.objectives.terms import AnyLoss, Term, count, layers_read, streams_read
from llm_unlearn.objectives.views import ROUTERS, TOP, beside, window_of

LOSSES = get_args(get_args(AnyLoss)[0])
KINDS = ("answer", "alternate", "expert", "novice")
STREAMS = tuple(beside("forget", kind) for kind in KINDS)
WINDOW = window_of("forget")
LAYERS = (7, 10, 20)
SEED = 11


@dataclass
class Numbers:
    """A view made of given logits and states."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    owner: Tensor  # (N,)
    states: dict[int, Tensor] = field(default_factory=dict)  # layer -> (N, D)
    centres: dict[int, Tensor] = field(default_factory=dict)  # layer -> (D,)
    seed: int = SEED

    @property
    def logps(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]

    @property
    def position(self) -> Tensor:
        return torch.tensor([sum(int(self.owner[k] == self.owner[n]) for k in range(n)) for n in range(len(self.owner))])

    def by_sequence(self, values: Tensor) -> Tensor:
        return values.new_zeros(int(self.owner.max()) + 1).index_add(0, self.owner, values)

    def hidden(self, layer: int) -> Tensor:
        return self.states[layer]

    def centre(self, layer: int) -> Tensor:
        return self.centres[layer]

    @property
    def routing(self) -> Tensor:
        return self.states[ROUTERS]


@dataclass
class Given:
    """A view made of given log-probabilities."""

    logps: Tensor
    owner: Tensor

    def by_sequence(self, values: Tensor) -> Tensor:
        return values.new_zeros(int(self.owner.max()) + 1).index_add(0, self.owner, values)


Sides = dict[str, Numbers]


def random_views(seed: int, scale: float = 3.0) -> Sides:
    """Three sequences of one to four tokens per stream; expert and novice are the forget answers under other prompts."""
    draw = torch.Generator().manual_seed(seed)
    found: Sides = {}
    for stream in STREAMS:
        owner = torch.arange(3).repeat_interleave(torch.randint(1, 5, (3,), generator=draw))
        targets = torch.randint(0, 7, (len(owner),), generator=draw)
        if stream in STREAMS[2:]:
            owner, targets = found["forget"].owner, found["forget"].targets
        logits = scale * torch.randn(len(owner), 7, generator=draw, dtype=torch.float64)
        states = {layer: 2 + torch.randn(len(owner), 6, generator=draw, dtype=torch.float64) for layer in LAYERS}
        centres = {layer: torch.randn(6, generator=draw, dtype=torch.float64) for layer in LAYERS}
        states[ROUTERS] = torch.randn(len(owner), 3, 5, generator=draw, dtype=torch.float64)
        found[stream] = Numbers(logits, targets, owner, states, centres)
    return found


def random_like(views: Sides, seed: int = 9) -> Sides:
    """Another model's numbers for the same answers, and for the window: those of the policy's own tokens and four more."""
    draw = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=like.dtype)

    found = {
        stream: replace(view, logits=noise(view.logits), states={layer: 1 + noise(one) for layer, one in view.states.items()})
        for stream, view in views.items()
    }
    found[WINDOW] = whole_window(
        views, {layer: noise(one[:1].expand(4, *one.shape[1:])) for layer, one in views["forget"].states.items()}
    )
    return found


def whole_window(now: Sides, more: dict[int, Tensor] | None = None) -> Numbers:
    states = {layer: one.detach().clone() for layer, one in now["forget"].states.items()}
    if more:
        states = {layer: torch.cat([one, more[layer]]) for layer, one in states.items()}
    return replace(now["forget"], states=states)


def as_now(views: Sides) -> Sides:
    """The reference of a model that has not moved yet."""
    return {stream: copied(view, False) for stream, view in views.items()} | {WINDOW: whole_window(views)}


def copied(view: Numbers, gradient: bool) -> Numbers:
    states = {layer: one.detach().clone().requires_grad_(gradient) for layer, one in view.states.items()}
    return replace(view, logits=view.logits.detach().clone().requires_grad_(gradient), states=states)


def leaves(views: Sides) -> list[Tensor]:
    return [one for view in views.values() for one in (view.logits, *view.states.values())]


# ---------------------------------------------------------------------------------------------- the definitions, with `math` alone


@dataclass
class World:
    """What a definition is written on: the policy, the model as it was, and the policy as far as it is held fixed."""

    now: Sides
    ref: Sides
    fixed: Sides

    def logp(self, side: str, stream: str = "forget") -> list[float]:
        """log p of each target."""
        view = getattr(self, side)[stream]
        return [row[y] for row, y in zip(logs(view), view.targets.tolist(), strict=True)]

    def sums(self, side: str, stream: str = "forget") -> list[float]:
        """Σ_t log p of each sequence."""
        owner, logp = getattr(self, side)[stream].owner.tolist(), self.logp(side, stream)
        return [sum(one for one, s in zip(logp, owner, strict=True) if s == sequence) for sequence in range(3)]

    def mean_p(self, stream: str) -> list[float]:
        """P̄ of each sequence."""
        owner, logp = self.now[stream].owner.tolist(), self.logp("now", stream)
        return [
            sum(math.exp(one) for one, s in zip(logp, owner, strict=True) if s == sequence) / owner.count(sequence)
            for sequence in range(3)
        ]


def logs(view: Numbers) -> list[list[float]]:
    """log softmax, (N, V)."""
    found = []
    for row in view.logits.tolist():
        top = max(row)
        total = math.log(sum(math.exp(x - top) for x in row))
        found.append([x - top - total for x in row])
    return found


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def normalised(weights: list[float]) -> list[float]:
    return [one / sum(weights) for one in weights]


def cross_entropy(teacher: list[float], logp: list[float]) -> float:
    return -sum(q * one for q, one in zip(teacher, logp, strict=True))


def length(x: list[float]) -> float:
    return math.sqrt(sum(one**2 for one in x))


def distance2(x: list[float], y: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def kl(loss: KL, w: World) -> list[float]:
    p, p0 = logs(w.now["forget"]), logs(w.ref["forget"])
    if loss.direction == "reverse":
        p, p0 = p0, p
    return [sum(math.exp(q0) * (q0 - q) for q, q0 in zip(*pair, strict=True)) for pair in zip(p, p0, strict=True)]


def tnpo(loss: Any, w: World) -> list[float]:
    """The weight's numerator has the exponent β + α; α = 0 in `tnpo`."""
    more, beta = getattr(loss, "alpha", 0.0), loss.beta
    found = []
    for now, fixed, then in zip(w.logp("now"), w.logp("fixed"), w.logp("ref"), strict=True):
        p, p0 = math.exp(fixed), math.exp(then)
        found.append(2 * p ** (beta + more) / (p**beta + p0**beta) * now)
    return found


def satimp(loss: SatImp, w: World) -> list[float]:
    pairs = zip(w.logp("fixed"), w.logp("now"), strict=True)
    return [math.exp(one) ** loss.beta1 * (1 - math.exp(one)) ** loss.beta2 * now for one, now in pairs]


def npo(loss: NPO, w: World) -> list[float]:
    ratios = [now - then for now, then in zip(w.sums("now"), w.sums("ref"), strict=True)]
    return [-2 / loss.beta * log_sigmoid(-loss.beta * ratio) for ratio in ratios]


def simnpo(loss: SimNPO, w: World) -> list[float]:
    tokens = [w.now["forget"].owner.tolist().count(s) for s in range(3)]
    return [
        -2 / loss.beta * log_sigmoid(-loss.beta / t * total - loss.gamma) for total, t in zip(w.sums("now"), tokens, strict=True)
    ]


def dpo(loss: DPO, w: World) -> list[float]:
    a, a0, y, y0 = (w.sums(side, stream) for stream in ("forget.alternate", "forget") for side in ("now", "ref"))
    return [-2 / loss.beta * log_sigmoid(loss.beta * (a[s] - a0[s] - (y[s] - y0[s]))) for s in range(3)]


def ap(loss: AP, w: World) -> list[float]:
    nll_a, nll_y = ([-one for one in w.sums("now", stream)] for stream in ("forget.alternate", "forget"))
    return [-1 / loss.beta * log_sigmoid(loss.beta * (a - y)) for a, y in zip(nll_a, nll_y, strict=True)]


def flat(loss: FLAT, w: World) -> list[float]:
    activation, conjugate = {
        "kl": (lambda x: x, lambda t: math.exp(t - 1)),
        "total_variation": (lambda x: math.tanh(x) / 2, lambda t: t),
        "pearson": (lambda x: x, lambda t: t**2 / 4 + t),
        "jensen_shannon": (lambda x: math.log(2) - math.log(1 + math.exp(-x)), lambda t: -math.log(2 - math.exp(t))),
    }[loss.divergence]
    pairs = zip(w.mean_p("forget.alternate"), w.mean_p("forget"), strict=True)
    return [-activation(a) + conjugate(activation(y)) for a, y in pairs]


def undial(loss: Undial, w: World) -> list[float]:
    found = []
    for n, row in enumerate(w.ref["forget"].logits.tolist()):
        y = int(w.ref["forget"].targets[n])
        teacher = normalised([math.exp(z - (loss.beta if v == y else 0.0)) for v, z in enumerate(row)])
        found.append(cross_entropy(teacher, logs(w.now["forget"])[n]))
    return found


def ceu(loss: CEU, w: World) -> list[float]:
    found, seen = [], [0, 0, 0]
    view = w.now["forget"]
    for fixed, now, y, s in zip(logs(w.fixed["forget"]), logs(view), view.targets.tolist(), view.owner.tolist(), strict=True):
        seen[s] += 1
        if seen[s] > loss.skip:
            found.append(cross_entropy(normalised([0.0 if v == y else math.exp(one) for v, one in enumerate(fixed)]), now))
    return found


def entropy(loss: Entropy, w: World) -> list[float]:
    return [sum(1 / len(row) * (math.log(1 / len(row)) - one) for one in row) for row in logs(w.now["forget"])]


def ihl(loss: IHL, w: World) -> list[float]:
    rows = zip(logs(w.now["forget"]), w.now["forget"].targets.tolist(), strict=True)
    return [max(0, 1 + math.exp(row[y]) - max(math.exp(one) for v, one in enumerate(row) if v != y)) for row, y in rows]


def elm(loss: ELM, w: World) -> list[float]:
    p, p0, expert, novice = (logs(one) for one in (w.now["forget"], *(w.ref[s] for s in ("forget", *STREAMS[2:]))))
    found = []
    for n in range(len(p)):
        raised = [q - loss.eta * (e - i) for q, e, i in zip(p0[n], expert[n], novice[n], strict=True)]
        found.append(cross_entropy(normalised([math.exp(one) for one in raised]), p[n]))
    return found


def rmu(loss: Any, w: World) -> list[float]:
    h, h0 = (side["forget"].states[loss.layer] for side in (w.now, w.ref))
    u = _direction(h, SEED, loss.layer).tolist()
    found = []
    for row, then in zip(h.tolist(), h0.tolist(), strict=True):
        c = loss.c if isinstance(loss, RMU) else loss.beta * length(then)
        found.append(sum((x - c * one) ** 2 for x, one in zip(row, u, strict=True)) / len(u))
    return found


def router_kl(loss: RouterKL, w: World) -> list[float]:
    found = []
    for routers, before in zip(*(side["forget"].states[ROUTERS].tolist() for side in (w.now, w.ref)), strict=True):
        total = 0.0
        for z, z0 in zip(routers, before, strict=True):
            a, b = (math.log(sum(math.exp(x) for x in logits)) for logits in (z, z0))
            total += sum(math.exp(y - b) * ((y - b) - (x - a)) for x, y in zip(z, z0, strict=True))
        found.append(total / len(routers))
    return found


def embed_match(loss: EmbedMatch, w: World) -> list[float]:
    total = [0.0] * len(w.now["forget"].owner)
    for layer in loss.layers:
        for n, pair in enumerate(zip(*(side["forget"].states[layer].tolist() for side in (w.now, w.ref)), strict=True)):
            square = distance2(*pair)
            total[n] += square / len(pair[0]) if loss.distance == "mean_square" else math.sqrt(square)
    return total


def circuit_break(loss: CircuitBreak, w: World) -> list[float]:
    total = [0.0] * len(w.now["forget"].owner)
    for layer in loss.layers:
        for n, (h, h0) in enumerate(zip(*(side["forget"].states[layer].tolist() for side in (w.now, w.ref)), strict=True)):
            u = _direction(torch.tensor(h), SEED, layer).double().tolist()
            turned = [x + loss.turn * length(h0) * one for x, one in zip(h0, u, strict=True)]
            total[n] += max(0.0, sum(a * b for a, b in zip(h, turned, strict=True)) / (length(h) * length(turned)))
    return total


def lunar(loss: Lunar, w: World) -> list[float]:
    refusals, own = (w.ref[stream].centres[loss.layer].tolist() for stream in ("forget.alternate", "forget"))
    found = []
    for h, h0 in zip(*(side["forget"].states[loss.layer].tolist() for side in (w.now, w.ref)), strict=True):
        aim = [x0 + loss.alpha * (a - y) for x0, a, y in zip(h0, refusals, own, strict=True)]
        found.append(distance2(h, aim) / len(h))
    return found


def repnoise(loss: RepNoise, w: World) -> list[float]:
    """Each token's part of MMD², by all pairs; what is expected over N(0, I) by its closed form, which is tested on draws below."""
    total = [0.0] * len(w.now["forget"].owner)
    for layer in loss.layers:
        window, still = w.ref[WINDOW].states[layer].tolist(), w.fixed[WINDOW].states[layer].tolist()
        d = len(window[0])
        among = sum(distance2(a, b) for a in still for b in still) / len(still) ** 2
        across = sum(length(a) ** 2 + d for a in still) / len(still)
        spread = among / 4 + across / 2 + 2 * d / 4  # two draws of the pooled sample, half states and half noise
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            b = spread * factor
            for n, x in enumerate(w.now["forget"].states[layer].tolist()):
                own = sum(math.exp(-distance2(x, other) / b) for other in window) / len(window)
                noise = (1 + 2 / b) ** (-d / 2) * math.exp(-(length(x) ** 2) / (b + 2))
                total[n] += own - 2 * noise + (1 + 4 / b) ** (-d / 2)
    return total


PAPER: dict[type, Callable[[Any, World], list[float]]] = {
    NLL: lambda loss, w: [-one for one in w.logp("now")],
    Ascent: lambda loss, w: w.logp("now"),
    IDK: lambda loss, w: [-one for one in w.logp("now", "forget.alternate")],
    WGA: lambda loss, w: [math.exp(p) ** loss.beta * one for p, one in zip(w.logp("fixed"), w.logp("now"), strict=True)],
    SatImp: satimp,
    TNPO: tnpo,
    WTNPO: tnpo,
    NPO: npo,
    SimNPO: simnpo,
    DPO: dpo,
    AP: ap,
    FLAT: flat,
    KL: kl,
    Undial: undial,
    CEU: ceu,
    Entropy: entropy,
    IHL: ihl,
    Margin: lambda loss, w: [(max(row) - sum(row) / len(row)) ** 2 for row in w.now["forget"].logits.tolist()],
    ELM: elm,
    RMU: rmu,
    AdaptiveRMU: rmu,
    EmbedMatch: embed_match,
    CircuitBreak: circuit_break,
    Lunar: lunar,
    RepNoise: repnoise,
    RouterKL: router_kl,
}


def by_the_paper(loss: Any, now: Sides, ref: Sides, fixed: Sides | None = None) -> list[float]:
    """The loss as its definition writes it, one float at a time; `fixed` is what stands in its weights and teachers."""
    if type(loss) not in PAPER:
        raise AssertionError(f"no reference for {loss.name}: write it from the paper")
    return PAPER[type(loss)](loss, World(now, ref, fixed or {**now, WINDOW: ref[WINDOW]}))


CASES = [loss() for loss in LOSSES] + [
    NPO(beta=2.0), DPO(beta=0.7), AP(beta=1.3), SimNPO(beta=4.0, gamma=0.5), KL(direction="reverse"), IDK(name="relabel"),
    WGA(beta=0.0), WGA(beta=5.0), SatImp(beta1=0.5, beta2=2.5), TNPO(beta=1.0), WTNPO(beta=0.5, alpha=0.3),
    FLAT(divergence="total_variation"), FLAT(divergence="pearson"), FLAT(divergence="jensen_shannon"), Undial(beta=1.0),
    CEU(skip=0), CEU(skip=2), ELM(eta=2.5), RMU(layer=20, c=2.0), AdaptiveRMU(layer=10, beta=0.5), EmbedMatch(layers=(7, 10, 20)),
    EmbedMatch(layers=(7, 20), distance="norm"), CircuitBreak(layers=(7,)), Lunar(layer=20, alpha=2.5), RepNoise(layers=(7, 20)),
]  # fmt: skip
BY_SEQUENCE = (NPO, SimNPO, DPO, AP, FLAT)
AT_THE_TOP = [loss for loss in CASES if layers_read(loss) == (TOP,)]
ON_STATES = [loss for loss in CASES if layers_read(loss) != (TOP,)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_has_a_definition_to_be_compared_with(loss: Any) -> None:
    assert loss in PAPER and loss.__doc__
    assert loss().needs.unit == ("sequence" if loss in BY_SEQUENCE else "token")


@pytest.mark.parametrize("loss", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_paper(loss: Any, seed: int) -> None:
    now = random_views(seed)
    ref = random_like(now)
    assert loss(now, ref, "forget").tolist() == pytest.approx(by_the_paper(loss, now, ref), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_gradient_is_that_of_the_paper(loss: Any) -> None:
    """Against finite differences of the definition, its sg factors held fixed: none of them may carry a gradient."""
    now = random_views(4, scale=1.5)
    ref = random_like(now) | {WINDOW: whole_window(now)}
    still = as_now(now)
    loose = {stream: copied(view, True) for stream, view in now.items()}
    variables = [one for one in leaves(loose) if one.numel()]
    slopes = torch.autograd.grad(loss(loose, ref, "forget").sum(), variables, allow_unused=True)
    step = 1e-5
    read = {beside("forget", kind) for kind in loss.needs.reads}
    for (stream, which), slope in zip([(s, i) for s in now for i in (TOP, *LAYERS, ROUTERS)], slopes, strict=True):
        if stream not in read or which not in layers_read(loss):
            assert slope is None, f"{stream} {which} is not to be read"
            continue
        assert slope is not None
        place = now[stream].logits if which == TOP else now[stream].states[which]
        for n in range(place.numel()):
            found = []
            for sign in (1, -1):
                place.view(-1)[n] += sign * step
                moving = ref | {WINDOW: whole_window(now)}
                found.append(sum(by_the_paper(loss, now, moving, still)))
                place.view(-1)[n] -= sign * step
            assert float(slope.reshape(-1)[n]) == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_one_value_per_unit(loss: Any) -> None:
    """A vector with as many values as the loop divides by: nothing is broadcast to a matrix, and nothing is averaged."""
    now = random_views(5)
    first = now[streams_read(Term(loss=loss), "forget")[0]]
    lengths = [first.owner.tolist().count(s) for s in range(3)]
    values = loss(now, random_like(now), "forget")
    if isinstance(loss, CEU):
        assert values.shape == (sum(max(0, one - loss.skip) for one in lengths),)
    else:
        assert values.shape == ((3,) if loss.needs.unit == "sequence" else (sum(lengths),))
    assert count(loss, lengths) == len(values)


@pytest.mark.parametrize("loss", AT_THE_TOP, ids=str)
def test_what_is_added_to_all_logits_changes_nothing(loss: Any) -> None:
    """Losses read log-probabilities, not raw logits; the margin reads differences of logits."""
    now = random_views(6)
    ref = random_like(now)
    lifted = {stream: replace(view, logits=view.logits + 5) for stream, view in now.items()}
    assert torch.allclose(loss(now, ref, "forget"), loss(lifted, ref, "forget"), rtol=1e-9, atol=1e-12)
    ref_lifted = {stream: replace(view, logits=view.logits - 3) for stream, view in ref.items()}
    assert torch.allclose(loss(now, ref, "forget"), loss(now, ref_lifted, "forget"), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- values by hand


def hand(*p: tuple[float, float, float], h: tuple[float, float] = (0.0, 0.0), **more: Any) -> Numbers:
    """One sequence whose tokens have these probabilities; token 0 is the right one everywhere."""
    states = {7: torch.tensor([h] * len(p), dtype=torch.float64)}
    zeros = torch.zeros(len(p), dtype=torch.long)
    return Numbers(torch.tensor(p, dtype=torch.float64).log(), zeros, zeros, states, **more)


A, B = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
L = 0.6931471805599453  # log 2
BY_HAND: list[tuple[Any, list[float]]] = [
    # p(y) = 1/2, 1/4 now and 1/4, 1/2 before; p(a) = 1/2, 1/2 now and 1/4, 1/4 before
    (NLL(), [L, 2 * L]),
    (Ascent(), [-L, -2 * L]),
    (IDK(), [L, L]),
    (WGA(), [-L / 2, -L / 2]),  # 1/2 · −L, 1/4 · −2L
    (SatImp(), [-L / 64, -1.5 * L / 1024]),  # 2^−5 · 1/2 · −L, 4^−5 · 3/4 · −2L
    (TNPO(beta=1.0), [-4 * L / 3, -4 * L / 3]),  # 2 · ½ / (½ + ¼) · −L, 2 · ¼ / (¼ + ½) · −2L
    (WTNPO(beta=1.0, alpha=1.0), [-2 * L / 3, -L / 3]),  # the same times ½ and ¼
    (NPO(beta=1.0), [1.3862943611]),  # ratios L and −L, their sum 0; −2 log ½
    (SimNPO(beta=2.0), [0.1177830357]),  # mean log p −1.5L; −log σ(3L) = log(1 + 1/8)
    (DPO(beta=1.0), [0.4462871026]),  # a: 2L, y: 0; −2 log σ(2L) = 2 log(1 + 1/4)
    (AP(beta=1.0), [1.0986122887]),  # NLL(a) − NLL(y) = 2L − 3L; −log σ(−L) = log 3
    # P̄(a) = 1/2, P̄(y) = 3/8
    (FLAT(), [0.0352614285]),  # −.5 + exp(−.625)
    (FLAT(divergence="total_variation"), [-0.0518798795]),  # (tanh .375 − tanh .5) / 2 = (0.3583573984 − 0.4621171573) / 2
    (FLAT(divergence="pearson"), [-0.08984375]),  # −.5 + .140625 / 4 + .375
    (FLAT(divergence="jensen_shannon"), [-0.0140941128]),  # −log 2σ(½) − log(2 − 2σ(⅜)) = −log 1.2449187 − log 0.8146668
    (KL(), [L / 4, L / 4]),  # p0 = B, p = A: ¼ · −L + ½ · L; then the other way round
    (KL(direction="reverse"), [L / 4, L / 4]),
    (Undial(beta=2 * L), [25 * L / 13, 1.6 * L]),  # teachers (1, 8, 4)/13 and (1, 2, 2)/5, as e^−2L = 1/4
    (CEU(skip=0), [2 * L, 4 * L / 3]),  # teachers (0, ½, ½) and (0, ⅔, ⅓)
    (CEU(), [4 * L / 3]),
    (Entropy(), [0.0566330123, 0.0566330123]),  # −log 3 + 5L/3
    (IHL(), [1.25, 0.75]),  # 1 + ½ − ¼, 1 + ¼ − ½
    (Margin(), [4 * L**2 / 9, 4 * L**2 / 9]),  # (−L + 5L/3)²
    (ELM(), [21 * L / 11, 1.5 * L]),  # p0 · novice / expert: (⅛, 1, ¼) and (¼, ½, ¼)
    # h = (3, 4), h0 = (4, 3), r = (2, 0)
    (EmbedMatch(), [1.0, 1.0]),  # (1 + 1) / 2
    (EmbedMatch(distance="norm"), [1.4142135624] * 2),
    (CircuitBreak(layers=(7,), turn=0.0), [0.96, 0.96]),  # (12 + 12) / 25
    (Lunar(), [5.0, 5.0]),  # (−1, 1) − (2, 0) = (−3, 1); 10 / 2
]


@pytest.mark.parametrize(("loss", "expected"), BY_HAND, ids=str)
def test_values_by_hand(loss: Any, expected: list[float]) -> None:
    now = {"forget": hand(A, B, h=(3.0, 4.0)), "forget.alternate": hand(A, A)}
    own, refusals = ({7: torch.tensor(centre, dtype=torch.float64)} for centre in ((1.0, 5.0), (3.0, 5.0)))
    ref = {
        "forget": hand(B, A, h=(4.0, 3.0), centres=own),
        "forget.alternate": hand(B, B, centres=refusals),
        "forget.expert": hand(A, A),
        "forget.novice": hand(B, B),
    }
    assert loss(now, ref, "forget").tolist() == pytest.approx(expected, rel=1e-9, abs=5e-8)


def test_value_of_router_kl_by_hand() -> None:
    """Two routers over two experts: (½, ½) against (½, ½), and (¼, ¾) against (½, ½): ½ log 2 + ½ log ⅔ = ½ log 4/3, halved."""
    even, uneven = [0.0, 0.0], [0.0, math.log(3)]
    now, ref = (
        {"forget": replace(hand(A), states={ROUTERS: torch.tensor([[even, one]], dtype=torch.float64)})} for one in (uneven, even)
    )
    assert RouterKL()(now, ref, "forget").tolist() == pytest.approx([math.log(4 / 3) / 4])
    assert RouterKL()(now, now, "forget").tolist() == [0.0]


def test_values_by_hand_around_a_direction() -> None:
    origin, five = {"forget": hand(A, h=(0.0, 0.0))}, {"forget": hand(A, h=(3.0, 4.0))}
    assert RMU(c=5.0)(origin, {}, "forget").tolist() == pytest.approx([12.5])  # ‖0 − 5u‖² / 2
    assert AdaptiveRMU(beta=2.0)(origin, five, "forget").tolist() == pytest.approx([50.0])  # ‖0 − 2 · 5 u‖² / 2
    one, two = _direction(torch.zeros(2), SEED, 7).tolist()
    assert RMU(c=5.0)(five, {}, "forget").tolist() == pytest.approx([((3 - 5 * one) ** 2 + (4 - 5 * two) ** 2) / 2])
    # one state at 0, d = 2: bandwidth (0 + 2 · 2 + 4) / 4 = 2, and b = ½, 1, 2, 4, 8 in 1 − 2b/(b + 2) + b/(b + 4):
    # .711111 + .533333 + .333333 + .166667 + .066667
    found = RepNoise()(origin, {WINDOW: origin["forget"]}, "forget")
    assert found.tolist() == pytest.approx([1.8111111111])


# ------------------------------------------------------------------------------------------------------------------- direction


def after_a_step(loss: Any, now: Sides, ref: Sides, rate: float = 1e-4) -> Sides:
    """The numbers after a short step down the loss's gradient on them."""
    loose = {stream: copied(view, True) for stream, view in now.items()}
    loss(loose, ref, "forget").sum().backward()
    slopes = [torch.zeros_like(one) if one.grad is None else one.grad for one in leaves(loose)]
    size = float(torch.cat([one.flatten() for one in slopes]).norm())
    assert size > 0
    with torch.no_grad():
        for place, slope in zip(leaves(loose), slopes, strict=True):
            place -= rate / size * slope
    return {stream: copied(view, False) for stream, view in loose.items()}


FORGET = [
    Ascent(), WGA(), SatImp(), TNPO(), WTNPO(), NPO(), SimNPO(), DPO(), FLAT(), FLAT(divergence="total_variation"),
    FLAT(divergence="pearson"), FLAT(divergence="jensen_shannon"), Undial(), CEU(skip=0), IHL(),
]  # fmt: skip


@pytest.mark.parametrize("loss", FORGET, ids=str)
def test_the_answer_becomes_less_likely(loss: Any) -> None:
    """Each of its tokens, from the model as it was."""
    now = random_views(7, scale=1.0)
    moved = after_a_step(loss, now, as_now(now))
    assert bool((moved["forget"].logps < now["forget"].logps).all())


@pytest.mark.parametrize(("loss", "stream"), [(NLL(), "forget"), (IDK(), "forget.alternate"), (AP(), "forget")], ids=str)
def test_an_answer_becomes_likelier(loss: Any, stream: str) -> None:
    now = random_views(7, scale=1.0)
    moved = after_a_step(loss, now, as_now(now))
    assert bool((moved[stream].logps > now[stream].logps).all())


@pytest.mark.parametrize("loss", [DPO(), AP(), *(loss for loss in CASES if isinstance(loss, FLAT))], ids=str)
def test_of_two_answers_one_is_preferred(loss: Any) -> None:
    now = random_views(8, scale=1.0)
    moved = after_a_step(loss, now, as_now(now))
    likelier = bool((moved["forget.alternate"].logps > now["forget.alternate"].logps).all())
    assert likelier != isinstance(loss, AP)  # the refusal in the others, the own answer in this


def test_ceu_leaves_the_first_tokens_alone() -> None:
    now = random_views(8, scale=1.0)
    moved, first = after_a_step(CEU(skip=2), now, as_now(now)), now["forget"].position < 2
    assert torch.equal(moved["forget"].logits[first], now["forget"].logits[first])
    assert bool((moved["forget"].logps < now["forget"].logps)[~first].all()) and bool((~first).any())


@pytest.mark.parametrize("loss", [KL(), KL(direction="reverse")], ids=str)
def test_kl_goes_back_to_the_reference(loss: Any) -> None:
    now = random_views(2)
    ref = random_like(now)
    moved = after_a_step(loss, now, ref)
    for direction in ("forward", "reverse"):
        away = sum(by_the_paper(KL(direction=direction), now, ref))
        assert sum(by_the_paper(KL(direction=direction), moved, ref)) < away
    assert loss(now, now, "forget").abs().max() < 1e-12
    assert bool((loss(now, ref, "forget") > 0).all())


def test_entropy_rises_and_is_highest_at_uniform() -> None:
    now = random_views(3)
    moved = after_a_step(Entropy(), now, {})

    def spread(view: Numbers) -> float:
        return sum(-math.exp(one) * one for row in logs(view) for one in row)

    assert spread(moved["forget"]) > spread(now["forget"])
    uniform = {"forget": replace(now["forget"], logits=torch.full_like(now["forget"].logits, 2.0))}
    assert Entropy()(uniform, {}, "forget").abs().max() < 1e-12
    assert bool((Entropy()(now, {}, "forget") > 0).all())


def test_pdu_flattens_the_margin() -> None:
    now = random_views(3)
    moved = after_a_step(Margin(), now, {})
    before, after = ([max(row) - sum(row) / len(row) for row in side["forget"].logits.tolist()] for side in (now, moved))
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_elm_speaks_as_the_novice() -> None:
    """What the expert says more often than the novice becomes rarer, and the reverse."""
    now = random_views(3)
    ref = as_now(now)
    moved = after_a_step(ELM(), now, ref)
    expert, novice = ref["forget.expert"].logits.log_softmax(-1), ref["forget.novice"].logits.log_softmax(-1)
    change = moved["forget"].logits.log_softmax(-1) - now["forget"].logits.log_softmax(-1)
    p = now["forget"].logits.softmax(-1)
    assert bool(((p * change * (expert - novice)).sum(-1) < 0).all())
    assert float(ELM(eta=0.0)(now, ref, "forget").sum()) == pytest.approx(  # without contrast, the entropy of p0
        -float((p * p.log()).sum())
    )


@pytest.mark.parametrize("loss", [RMU(), AdaptiveRMU()], ids=str)
def test_states_go_to_the_direction(loss: Any) -> None:
    now = random_views(3)
    ref = random_like(now)
    moved = after_a_step(loss, now, ref)
    h0 = ref["forget"].states[7]
    c = loss.c if isinstance(loss, RMU) else loss.beta * h0.norm(dim=-1, keepdim=True)
    aim = c * _direction(h0, SEED, 7)
    assert bool(((moved["forget"].states[7] - aim).norm(dim=-1) < (now["forget"].states[7] - aim).norm(dim=-1)).all())


@pytest.mark.parametrize("loss", [EmbedMatch(), EmbedMatch(distance="norm"), EmbedMatch(layers=(7, 20))], ids=str)
def test_embed_match_brings_states_back(loss: Any) -> None:
    now = random_views(3)
    ref = random_like(now)
    moved = after_a_step(loss, now, ref)
    for layer in loss.layers:
        before, after = ((side["forget"].states[layer] - ref["forget"].states[layer]).norm(dim=-1) for side in (now, moved))
        assert bool((after < before).all())


@pytest.mark.parametrize("beside_it", [1.0, 1e-3, 1e-6])
def test_circuit_break_turns_states_away(beside_it: float) -> None:
    """Also from just beside h = h0, where the cosine is highest and its gradient is 0."""
    now = random_views(3)
    ref = as_now(now)
    draw = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        noise = torch.randn(now["forget"].states[layer].shape, generator=draw, dtype=torch.float64)
        now["forget"].states[layer] += beside_it * noise
    loss = CircuitBreak(turn=0.0)
    moved = after_a_step(loss, now, ref, rate=beside_it)
    assert bool((loss(moved, ref, "forget") < loss(now, ref, "forget")).all())


def test_circuit_break_leaves_where_a_run_begins() -> None:
    """At h = h0 the cosine has no gradient; the turn gives it one, the same for the same seed."""
    now = random_views(3)
    slopes = []
    for turn in (0.0, 1e-3):
        loose = {stream: copied(view, True) for stream, view in now.items()}
        CircuitBreak(layers=LAYERS[:1], turn=turn)(loose, as_now(now), "forget").sum().backward()
        slope = loose["forget"].states[LAYERS[0]].grad
        assert slope is not None
        slopes.append(float(slope.norm()))
    assert slopes[0] < 1e-12 and slopes[1] > 1e-5


def test_circuit_break_ends_at_a_right_angle() -> None:
    now = {"forget": replace(hand(A, A, A), states={7: torch.tensor([[3.0, 4.0], [4.0, -3.0], [-3.0, -4.0]])})}
    ref = {"forget": replace(hand(A, A, A), states={7: torch.tensor([[3.0, 4.0]] * 3)})}
    assert CircuitBreak(layers=(7,), turn=0.0)(now, ref, "forget").tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_lunar_steers_towards_refusals() -> None:
    now = random_views(3)
    ref = as_now(now)
    r = ref["forget.alternate"].centres[7] - ref["forget"].centres[7]
    moved = after_a_step(Lunar(), now, ref)
    assert bool(((moved["forget"].states[7] - now["forget"].states[7]) @ r > 0).all())
    there = {"forget": replace(now["forget"], states={7: ref["forget"].states[7] + 0.5 * r})}
    assert Lunar(alpha=0.5)(there, ref, "forget").abs().max() < 1e-12


def test_repnoise_makes_states_noise() -> None:
    """Down its gradient, a cloud around (1.5, 1.5) with variance 0.04 comes to mean 0 and variance 1."""
    draw = torch.Generator().manual_seed(2)
    states = (1.5 + 0.2 * torch.randn((60, 2), generator=draw, dtype=torch.float64)).requires_grad_()
    zeros = torch.zeros(60, dtype=torch.long)
    first = None
    optimizer = torch.optim.Adam([states], lr=0.02)
    for _ in range(300):
        view = {"forget": Numbers(torch.zeros(60, 2), zeros, zeros, {7: states})}
        loss = RepNoise()(view, {WINDOW: whole_window(view)}, "forget").sum() / 60
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02 * first
    assert states.detach().mean(0).abs().max() < 0.3
    assert states.detach().var(0).tolist() == pytest.approx([1.0, 1.0], abs=0.4)


# --------------------------------------------------------------------------------------------------------------------- extremes


def extreme(targets: str, states: float) -> Numbers:
    """p → 0 or p → 1, with float32 logits of ± 1e4."""
    logits = torch.full((3, 5), 1e4 if targets == "0" else -1e4)
    logits[:, 2] = -logits[:, 2]
    owner = torch.tensor([0, 0, 1])
    hidden = {layer: torch.full((3, 4), states) for layer in LAYERS} | {ROUTERS: torch.full((3, 2, 4), states)}
    return Numbers(logits, torch.full((3,), 2), owner, hidden, {layer: torch.zeros(4) for layer in LAYERS})


@pytest.mark.parametrize("loss", CASES, ids=str)
def test_extremes_are_finite(loss: Any) -> None:
    ends = [("0", 0.0), ("0", 1e4), ("1", -1e4), ("1", 0.0)]
    for one, other, then in [(x, y, z) for x in ends for y in ends for z in ends]:
        now = {stream: copied(extreme(*(one if stream == "forget" else other)), True) for stream in STREAMS}
        ref = {stream: extreme(*(then if stream == "forget" else other)) for stream in STREAMS} | {WINDOW: whole_window(now)}
        values = loss(now, ref, "forget")
        values.sum().backward()
        assert bool(torch.isfinite(values).all()), f"{one} {other} {then}: {values}"
        for place in leaves(now):
            assert place.grad is None or bool(torch.isfinite(place.grad).all()), f"{one} {other} {then}: {place.grad}"


def test_npo_survives_extreme_ratios() -> None:
    owner = torch.tensor([0, 1])
    now, ref = (
        {"forget": Given(torch.tensor([-1e4, -1.0]), owner)},
        {"forget": Given(torch.tensor([-1.0, -1e4]), owner)},
    )
    values = NPO(beta=1.0)(now, ref, "forget")
    assert values[0] == 0 and values[1] == pytest.approx(2 * (1e4 - 1))


def test_repnoise_in_a_wide_model_in_float32() -> None:
    """4096 coordinates: powers of b/(b + 2) keep their digits."""
    draw = torch.Generator().manual_seed(3)
    states = torch.randn((20, 4096), generator=draw)
    found = []
    for precise in (states, states.double()):
        view = {"forget": replace(hand(*[A] * 20), states={7: precise})}
        found.append(RepNoise()(view, {WINDOW: view["forget"]}, "forget"))
    assert found[0].tolist() == pytest.approx(found[1].tolist(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- special cases


def slope(loss: Any, now: Sides, ref: Sides) -> Tensor:
    loose = {stream: copied(view, True) for stream, view in now.items()}
    (found,) = torch.autograd.grad(loss(loose, ref, "forget").sum(), loose["forget"].logits)
    return found


def test_npo_at_the_reference_and_towards_ascent() -> None:
    now = random_views(1)
    ref = as_now(now)
    assert NPO(beta=0.5)(now, ref, "forget").tolist() == pytest.approx([2 / 0.5 * math.log(2)] * 3)
    # the gradient of NPO tends to that of ascent as β → 0 (Zhang et al. 2024, proposition 1)
    assert torch.allclose(slope(NPO(beta=1e-7), now, ref), slope(Ascent(), now, ref), rtol=1e-5, atol=1e-9)
    assert torch.allclose(slope(NPO(beta=1e-7), now, random_like(now)), slope(Ascent(), now, ref), rtol=1e-4, atol=1e-6)


def test_weights_that_are_one() -> None:
    now = random_views(1)
    ref = random_like(now)
    assert torch.equal(WGA(beta=0.0)(now, ref, "forget"), Ascent()(now, ref, "forget"))
    assert torch.equal(SatImp(beta1=0.0, beta2=0.0)(now, ref, "forget"), Ascent()(now, ref, "forget"))
    assert torch.allclose(SatImp(beta1=2.0, beta2=0.0)(now, ref, "forget"), WGA(beta=2.0)(now, ref, "forget"), rtol=1e-12)
    assert torch.allclose(WTNPO(alpha=0.0)(now, ref, "forget"), TNPO()(now, ref, "forget"), rtol=1e-12)
    assert torch.allclose(TNPO()(now, as_now(now), "forget"), Ascent()(now, ref, "forget"), rtol=1e-12)  # 2 · ½ at p = p0


def test_simnpo_is_npo_without_a_reference_on_means() -> None:
    now = random_views(1)
    owner = torch.arange(3)
    lengths = now["forget"].owner.bincount()
    mean = Given(now["forget"].by_sequence(now["forget"].logps) / lengths, owner)
    certain = Given(torch.zeros(3, dtype=torch.float64), owner)
    npo = NPO(beta=2.5)({"forget": mean}, {"forget": certain}, "forget")
    assert torch.allclose(SimNPO(beta=2.5)(now, {}, "forget"), npo, rtol=1e-12)
    plain = slope(SimNPO(beta=1e-7), now, {})  # β → 0: ascent on each answer's mean
    each = slope(Ascent(), now, {}) / lengths[now["forget"].owner][:, None]
    assert torch.allclose(plain, each, rtol=1e-5, atol=1e-9)


def test_undial_without_the_answer_is_the_reference_without_it() -> None:
    """β → ∞ takes the answer out of p0; β → 0 leaves p0, whose cross-entropy to itself is its entropy."""
    now = random_views(1)
    ref = as_now(now)
    # far from the answer, undial and ceu have the same teacher as long as p = p0
    assert torch.allclose(Undial(beta=1e4)(now, ref, "forget"), CEU(skip=0)(now, ref, "forget"), rtol=1e-12)
    assert slope(Undial(beta=1e-9), now, ref).abs().max() < 1e-8
    # the teacher moves the answer's logit alone: the gradient at p = p0 vanishes once z[y] is β lower
    lowered = now["forget"].logits.scatter_add(
        -1, now["forget"].targets[:, None], torch.full((len(now["forget"].owner), 1), -2.0).double()
    )
    there = {**now, "forget": replace(now["forget"], logits=lowered)}
    assert slope(Undial(beta=2.0), there, ref).abs().max() < 1e-12


def test_ceu_counts_only_what_it_reads() -> None:
    now = random_views(1)
    lengths = now["forget"].owner.bincount().tolist()
    for skip in (0, 1, 2, 9):
        values = CEU(skip=skip)(now, {}, "forget")
        assert len(values) == count(CEU(skip=skip), lengths) == sum(max(0, one - skip) for one in lengths)
    loose = {"forget": copied(now["forget"], True)}
    CEU(skip=9)(loose, {}, "forget").sum().backward()  # nothing left: a sum of 0 that goes through backward
    assert loose["forget"].logits.grad is not None and float(loose["forget"].logits.grad.abs().sum()) == 0


DIVERGENCES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    # f(u), and the activation g(v) that brings v into the domain of f*
    "kl": (lambda u: u * math.log(u), lambda v: v),
    "total_variation": (lambda u: abs(u - 1) / 2, lambda v: math.tanh(v) / 2),
    "pearson": (lambda u: (u - 1) ** 2, lambda v: v),
    "jensen_shannon": (
        lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2), lambda v: math.log(2) - math.log(1 + math.exp(-v))
    ),
}  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flat_has_the_conjugate_of_its_divergence(divergence: Any) -> None:
    """f*(t) = sup_u (u t − f(u)), found by looking (f-GAN, Nowozin et al. 2016, 1606.00709); and f(1) = 0."""
    f, g = DIVERGENCES[divergence]
    assert f(1.0) == pytest.approx(0.0)
    owner = torch.zeros(1, dtype=torch.long)
    for y in (1e-6, 0.1, 0.35, 0.6, 0.99):
        for a in (0.05, 0.8):
            t = g(y)
            low, high = 1e-9, 50.0
            for _ in range(200):  # u t − f(u) is concave
                one, two = low + (high - low) / 3, high - (high - low) / 3
                low, high = (low, two) if one * t - f(one) > two * t - f(two) else (one, high)
            highest = low * t - f(low)
            views = {
                name: Given(torch.tensor([math.log(p)], dtype=torch.float64), owner)
                for name, p in (("forget", y), ("forget.alternate", a))
            }
            value = FLAT(divergence=divergence)(views, {}, "forget")
            assert value.tolist() == pytest.approx([-g(a) + highest], rel=1e-7, abs=1e-7)


def test_rmu_draws_its_direction_from_the_seed_alone() -> None:
    like = torch.zeros(3, 500)
    u = _direction(like, 3, 7)
    torch.manual_seed(77)  # neither the global seed, nor what was drawn before, nor the precision of the states
    torch.rand(5)
    assert torch.equal(u, _direction(torch.ones(9, 500), 3, 7))
    assert torch.equal(u, _direction(like.double(), 3, 7).float())
    assert float(u.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(u.min()) >= 0 and float(u.mean()) == pytest.approx(0.5 / math.sqrt(500 / 3), rel=0.05)  # U[0, 1), normalised
    assert not torch.allclose(u, _direction(like, 4, 7), atol=1e-2)
    assert not torch.allclose(u, _direction(like, 3, 8), atol=1e-2)


def test_repnoise_expects_what_draws_of_noise_give() -> None:
    """Its closed forms over N(0, I) against many draws: MMD² by all pairs of states and drawn noise."""
    draw = torch.Generator().manual_seed(5)
    x = 0.5 + 1.5 * torch.randn((6, 3), generator=draw, dtype=torch.float64)
    y = torch.randn((2000, 3), generator=draw, dtype=torch.float64)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b) ** 2

    xx, xy, yy = between(x, x), between(x, y), between(y, y)
    others = len(y) * (len(y) - 1)  # a draw is not paired with itself
    bandwidth = xx.mean() / 4 + xy.mean() / 2 + yy.sum() / others / 4
    drawn = 0.0
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        b = bandwidth * factor
        among = ((-yy / b).exp().sum() - len(y)) / others
        drawn += float((-xx / b).exp().mean() - 2 * (-xy / b).exp().mean() + among)
    view = {"forget": replace(hand(*[A] * 6), states={7: x})}
    values = RepNoise()(view, {WINDOW: view["forget"]}, "forget")
    assert float(values.sum() / 6) == pytest.approx(drawn, rel=0.03)


def test_repnoise_is_the_same_however_the_window_is_cut() -> None:
    """The parts of some tokens, beside the whole window's states, add up to MMD² and its gradient."""
    now = random_views(1)
    ref = {WINDOW: whole_window(now)}
    whole = RepNoise()(now, ref, "forget")
    pieces = []
    for part in (slice(0, 2), slice(2, None)):
        view = now["forget"]
        piece = replace(view, states={7: view.states[7][part]})
        pieces.append(RepNoise()({"forget": piece}, ref, "forget"))
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-12)


def test_ihl_is_never_below_zero() -> None:
    sure = torch.tensor([[0.0, 50.0, 0.0], [0.0, 0.0, 0.0]])
    view = Numbers(sure, torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert IHL()({"forget": view}, {}, "forget").tolist() == pytest.approx([0.0, 1.0])
