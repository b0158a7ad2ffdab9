"""The one rule: the gradient of a window is that of the whole batch, for every cut into micro-batches and every number of ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import build
from llm_unlearn.models.experts import experts_of
from llm_unlearn.models.load import add_adapter, causal, has_adapter, trainable
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.models.trainable_weights import choose_weights
from llm_unlearn.objectives.distribution import CEU, ELM, IHL, KL, Entropy, Margin, Undial
from llm_unlearn.objectives.likelihood import IDK, NLL, TNPO, WGA, WTNPO, Ascent, SatImp
from llm_unlearn.objectives.preference import AP, DPO, FLAT, NPO, SimNPO
from llm_unlearn.objectives.representation import RMU, AdaptiveRMU, CircuitBreak, EmbedMatch, Lunar, RepNoise, _direction
from llm_unlearn.objectives.routing import RouterKL
from llm_unlearn.objectives.terms import AnyLoss, Term, layers_read, stream_of
from llm_unlearn.objectives.views import TOP, beside
from llm_unlearn.sections import Adapter, Train
from llm_unlearn.spec import Refused
from llm_unlearn.training import window as window_module
from llm_unlearn.training.before import reference_of
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import Training
from llm_unlearn.training.window import Model, Window

ROOT = Path(__file__).parent.parent
LOSSES = get_args(get_args(AnyLoss)[0])
SEED = 4
KEPT = EmbedMatch(layers=(1,))
ON_STATES: list[
    tuple[Any, Any]
] = [  # of a model of three layers; beside a retain loss that reads the top, and beside one that ends early
    (RMU(layer=1, c=3.0), KL()),
    (RMU(layer=1, c=3.0), KEPT),
    (RMU(layer=0, c=3.0), KEPT),
    (AdaptiveRMU(layer=1), KL()),
    (AdaptiveRMU(layer=0), KEPT),
    (EmbedMatch(layers=(0, 1)), KL()),
    (EmbedMatch(layers=(0,), distance="norm"), KEPT),
    (CircuitBreak(layers=(0, 1)), KL()),
    (CircuitBreak(layers=(0, 1)), EmbedMatch(layers=(0, 1), distance="norm")),
    (Lunar(layer=1, alpha=2.0), KL()),
    (Lunar(layer=1, alpha=2.0), KEPT),
    (RepNoise(layers=(0, 1)), KL()),
    (RepNoise(layers=(0, 1)), KEPT),
    (NPO(), KEPT),
]
AT_THE_TOP: list[tuple[Any, Any]] = [(loss(), KL()) for loss in LOSSES if layers_read(loss()) == (TOP,)]
CASES = [*AT_THE_TOP, (IDK(name="relabel"), NLL()), (CEU(skip=3), AP()), (FLAT(divergence="jensen_shannon"), AP()), *ON_STATES]
PROCESSES = {
    "npo": (NPO(), KL()),
    "repnoise": (RepNoise(layers=(0, 1)), KL()),
    "elm": (ELM(), NLL()),
    "rmu": (RMU(layer=1, c=3.0), KEPT),
    "rmu beside kl": (RMU(layer=0, c=3.0), KL()),
}


def make_examples(stream: str, count: int, seed: int) -> list[Example]:
    """Answers of very different length: means of means would be far off."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        prompt, answer = (int(x) for x in torch.randint(1, 20, (2,), generator=draw))
        made.append(Example(tuple(torch.randint(4, 1024, (prompt + answer,), generator=draw).tolist()), prompt, stream, i))
    return made


def asked_otherwise(examples: list[Example], stream: str, seed: int) -> list[Example]:
    """The same answers to longer prompts."""
    prompts = make_examples(stream, len(examples), seed)
    pairs = zip(prompts, examples, strict=True)
    made = [(one.ids + two.ids[: two.answer], two.ids[two.answer :]) for one, two in pairs]
    return [Example(prompt + answer, len(prompt), stream, i) for i, (prompt, answer) in enumerate(made)]


def make_job(loss: Any, batch_tokens: int, kept: Any = None, **settings: Any) -> Job:
    """8 forget and 10 retain rows in two windows; two alternates to each row, of which one is drawn."""
    streams = {"forget": make_examples("forget", 8, 1), "retain": make_examples("retain", 10, 2)}
    terms = {"forget": Term(loss=loss, weight=0.7), "retain": Term(loss=kept or KL(), weight=1.5)}
    companions: dict[str, list[int]] = {}
    for k, (stream, term) in enumerate(terms.items()):
        for kind in dict.fromkeys((*term.loss.needs.reads, *term.loss.needs.contrasts)):
            name, own = beside(stream, kind), streams[stream]
            if kind == "alternate":
                streams[name], companions[name] = make_examples(name, 2 * len(own), 30 + k), [2] * len(own)
            elif kind != "answer":
                streams[name], companions[name] = asked_otherwise(own, name, 40 + k + len(kind)), [1] * len(own)
    schedule = build({"forget": 8, "retain": 10}, {"forget": 5, "retain": 7}, seed=3, epochs=1, companions=companions)
    return Job(terms, streams, schedule, Train(batch_tokens=batch_tokens, **settings), SEED)


def make_adapted(make_model: Callable[..., Any], adapter: bool) -> Any:
    """A model that has moved away from `make_model()`, by its adapter or by its weights."""
    model = add_adapter(make_model(), Adapter(rank=4), seed=0) if adapter else make_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if not adapter or "lora_B" in name:
                weight += (0.1 if adapter else 0.02) * torch.randn_like(weight)
    return model


@pytest.fixture
def three_layers(make_model: Callable[..., Any]) -> Callable[..., Any]:
    return lambda: make_model(num_hidden_layers=3)


# -------------------------------------------------------------------------- the definitions, on whole sequences and in float64


@dataclass
class Whole:
    """A window's rows of one term, each through the models by itself."""

    job: Job
    rows: list[dict[str, Example]]  # kind -> example, in the window's order
    name: str
    model: Any
    before: Any

    def logits(self, net: Any, example: Example) -> Tensor:
        """(T, V)"""
        with torch.set_grad_enabled(net is self.model):
            return net(input_ids=torch.tensor([example.ids])).logits[0, example.answer - 1 : -1]

    def logp(self, net: Any, example: Example) -> Tensor:
        """(T,)"""
        targets = torch.tensor(example.ids[example.answer :])
        return self.logits(net, example).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def hidden(self, net: Any, example: Example, layer: int) -> Tensor:
        """(T, D) by a hook on the whole model."""
        found: list[Tensor] = []

        def keep(block: Any, given: Any, made: Any) -> None:
            found.append(made[0] if isinstance(made, tuple) else made)

        handle = causal(net).model.layers[layer].register_forward_hook(keep)
        with torch.set_grad_enabled(net is self.model):
            net(input_ids=torch.tensor([example.ids]))
        handle.remove()
        return found[0][0, example.answer - 1 : -1]

    def states(self, net: Any, layer: int) -> Tensor:
        """(N, D) of all answers of the window."""
        return torch.cat([self.hidden(net, row["answer"], layer) for row in self.rows])

    def logits_of(self, net: Any, kind: str = "answer") -> Tensor:
        """(N, V)"""
        return torch.cat([self.logits(net, row[kind]) for row in self.rows])

    def logps_of(self, net: Any, kind: str = "answer") -> Tensor:
        """(N,)"""
        return torch.cat([self.logp(net, row[kind]) for row in self.rows])

    def sums(self, net: Any, kind: str = "answer") -> Tensor:
        """(S,) Σ_t log p."""
        return torch.stack([self.logp(net, row[kind]).sum() for row in self.rows])

    def mean_p(self, kind: str) -> Tensor:
        """(S,)"""
        return torch.stack([self.logp(self.model, row[kind]).exp().mean() for row in self.rows])

    @property
    def targets(self) -> Tensor:
        """(N, 1)"""
        return torch.tensor([one for row in self.rows for one in row["answer"].ids[row["answer"].answer :]])[:, None]

    def centre(self, kind: Any, layer: int) -> Tensor:
        """(D,) over every example of a stream that any window of the run sees, each once."""
        stream = beside(self.name, kind)
        places = {place for step in range(self.job.schedule.steps) for slot in self.job.schedule.window(step) for place in slot}
        seen = sorted(index for name, index in places if name == stream)
        return torch.cat([self.hidden(self.before, self.job.example(stream, index), layer) for index in seen]).mean(0)


def npo(loss: Any, w: Whole) -> Tensor:
    return -2 / loss.beta * functional.logsigmoid(-loss.beta * (w.sums(w.model) - w.sums(w.before)))


def simnpo(loss: Any, w: Whole) -> Tensor:
    means = torch.stack([w.logp(w.model, row["answer"]).mean() for row in w.rows])
    return -2 / loss.beta * functional.logsigmoid(-loss.beta * means - loss.gamma)


def dpo(loss: Any, w: Whole) -> Tensor:
    a, y = (w.sums(w.model, kind) - w.sums(w.before, kind) for kind in ("alternate", "answer"))
    return -2 / loss.beta * functional.logsigmoid(loss.beta * (a - y))


def ap(loss: Any, w: Whole) -> Tensor:
    return -1 / loss.beta * functional.logsigmoid(loss.beta * (-w.sums(w.model, "alternate") + w.sums(w.model)))


def flat(loss: Any, w: Whole) -> Tensor:
    a, y = w.mean_p("alternate"), w.mean_p("answer")
    if loss.divergence == "kl":
        return -a + (y - 1).exp()
    assert loss.divergence == "jensen_shannon"

    def g(x: Tensor) -> Tensor:
        return torch.tensor(2.0).double().log() - (1 + (-x).exp()).log()

    return -g(a) - (2 - g(y).exp()).log()


def kl(loss: Any, w: Whole) -> Tensor:
    then = w.logits_of(w.before).log_softmax(-1)
    return (then.exp() * (then - w.logits_of(w.model).log_softmax(-1))).sum(-1)


def undial(loss: Any, w: Whole) -> Tensor:
    then = w.logits_of(w.before)
    teacher = (then - loss.beta * functional.one_hot(w.targets[:, 0], then.shape[-1])).softmax(-1)
    return -(teacher * w.logits_of(w.model).log_softmax(-1)).sum(-1)


def ceu(loss: Any, w: Whole) -> Tensor:
    found = []
    for row in w.rows:
        for z, y in list(zip(w.logits(w.model, row["answer"]), row["answer"].ids[row["answer"].answer :], strict=True))[
            loss.skip :
        ]:
            p = z.detach().softmax(-1)
            p[y] = 0
            found.append(-(p / p.sum() * z.log_softmax(-1)).sum())
    return torch.stack(found)


def entropy(loss: Any, w: Whole) -> Tensor:
    logp = w.logits_of(w.model).log_softmax(-1)
    uniform = torch.full_like(logp, 1 / logp.shape[-1])
    return (uniform * (uniform.log() - logp)).sum(-1)


def ihl(loss: Any, w: Whole) -> Tensor:
    p = w.logits_of(w.model).softmax(-1)
    others = p.masked_fill(functional.one_hot(w.targets[:, 0], p.shape[-1]).bool(), -1.0)
    return (1 + p.gather(-1, w.targets)[:, 0] - others.max(-1).values).clamp(min=0)


def margin(loss: Any, w: Whole) -> Tensor:
    z = w.logits_of(w.model)
    return (z.max(-1).values - z.mean(-1)) ** 2


def elm(loss: Any, w: Whole) -> Tensor:
    p0, expert, novice = (w.logits_of(w.before, kind).softmax(-1) for kind in ("answer", "expert", "novice"))
    weight = p0 * (novice / expert) ** loss.eta
    return -(weight / weight.sum(-1, keepdim=True) * w.logits_of(w.model).log_softmax(-1)).sum(-1)


def tnpo(loss: Any, w: Whole) -> Tensor:
    now, then = w.logps_of(w.model), w.logps_of(w.before)
    p, p0, more = now.detach().exp(), then.exp(), getattr(loss, "alpha", 0.0)
    return 2 * p ** (loss.beta + more) / (p**loss.beta + p0**loss.beta) * now


def satimp(loss: Any, w: Whole) -> Tensor:
    now = w.logps_of(w.model)
    p = now.detach().exp()
    return p**loss.beta1 * (1 - p) ** loss.beta2 * now


def wga(loss: Any, w: Whole) -> Tensor:
    now = w.logps_of(w.model)
    return now.detach().exp() ** loss.beta * now


def rmu(loss: Any, w: Whole) -> Tensor:
    h, h0 = w.states(w.model, loss.layer), w.states(w.before, loss.layer)
    c = loss.c if isinstance(loss, RMU) else loss.beta * h0.norm(dim=-1, keepdim=True)
    return ((h - c * _direction(h, SEED, loss.layer)) ** 2).mean(-1)


def embed_match(loss: Any, w: Whole) -> Tensor:
    total: Any = 0
    for layer in loss.layers:
        moved = w.states(w.model, layer) - w.states(w.before, layer)
        total = total + (moved.norm(dim=-1) if loss.distance == "norm" else (moved**2).mean(-1))
    return torch.as_tensor(total)


def circuit_break(loss: Any, w: Whole) -> Tensor:
    total: Any = 0
    for layer in loss.layers:
        h, h0 = w.states(w.model, layer), w.states(w.before, layer)
        h0 = h0 + loss.turn * h0.norm(dim=-1, keepdim=True) * _direction(h0, SEED, layer)
        total = total + ((h * h0).sum(-1) / (h.norm(dim=-1) * h0.norm(dim=-1))).clamp(min=0)
    return torch.as_tensor(total)


def lunar(loss: Any, w: Whole) -> Tensor:
    r = w.centre("alternate", loss.layer) - w.centre("answer", loss.layer)
    return ((w.states(w.model, loss.layer) - w.states(w.before, loss.layer) - loss.alpha * r) ** 2).mean(-1)


def repnoise(loss: Any, w: Whole) -> Tensor:
    """MMD² itself, once per token."""
    total: Any = 0
    for layer in loss.layers:
        x = w.states(w.model, layer)
        d, square = x.shape[-1], ((x[:, None] - x[None]) ** 2).sum(-1)
        norm = (x**2).sum(-1)
        spread = (square.mean() / 4 + (norm.mean() + d) / 2 + 2 * d / 4).detach()
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            b = spread * factor
            noise = ((1 + 2 / b) ** (-d / 2) * (-norm / (b + 2)).exp()).mean()
            total = total + (-square / b).exp().mean() - 2 * noise + (1 + 4 / b) ** (-d / 2)
    return torch.as_tensor(total).expand(len(x))


def router_kl(loss: Any, w: Whole) -> Tensor:
    """By the logits that transformers itself returns."""
    sides = []
    for net in (w.model, w.before):
        rows = []
        for row in w.rows:
            ids, first = torch.tensor([row["answer"].ids]), row["answer"].answer - 1
            with torch.set_grad_enabled(net is w.model):
                routers = causal(net)(input_ids=ids, output_router_logits=True).router_logits
            rows.append(torch.stack([one.reshape(ids.shape[1], -1)[first:-1] for one in routers], 1))
        sides.append(torch.cat(rows).log_softmax(-1))
    now, then = sides
    return (then.exp() * (then - now)).sum(-1).mean(-1)


DEFINITIONS: dict[type, Callable[[Any, Whole], Tensor]] = {
    NLL: lambda loss, w: -w.logps_of(w.model),
    Ascent: lambda loss, w: w.logps_of(w.model),
    IDK: lambda loss, w: -w.logps_of(w.model, "alternate"),
    WGA: wga, SatImp: satimp, TNPO: tnpo, WTNPO: tnpo, NPO: npo, SimNPO: simnpo, DPO: dpo, AP: ap, FLAT: flat, KL: kl,
    Undial: undial, CEU: ceu, Entropy: entropy, IHL: ihl, Margin: margin, ELM: elm, RMU: rmu, AdaptiveRMU: rmu,
    EmbedMatch: embed_match, CircuitBreak: circuit_break, Lunar: lunar, RepNoise: repnoise, RouterKL: router_kl,
}  # fmt: skip


def whole_batch(job: Job, step: int, model: Any, before: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The window's gradient in float64, sequence by sequence, from the definition: Σ_terms weight · mean over all units."""
    model, before = copy.deepcopy(model).double(), copy.deepcopy(before).double()
    for net in (causal(model), causal(before)):
        if experts_of(net).matrices:
            net.set_experts_implementation("eager")  # expert by expert; the default kernel has no float64
    total, means = torch.zeros((), dtype=torch.float64), {}
    for name, term in job.terms.items():
        if type(term.loss) not in DEFINITIONS:
            raise AssertionError(f"no reference for {term.loss.name}: write it from the paper")
        slots = [dict(slot) for slot in job.schedule.window(step)]
        rows = [
            {stream.partition(".")[2] or "answer": job.example(stream, index) for stream, index in slot.items()}
            for slot in slots
            if stream_of(term, name) in slot
        ]
        units = DEFINITIONS[type(term.loss)](term.loss, Whole(job, rows, stream_of(term, name), model, before))
        mean = units.sum() / len(units)
        total, means[name] = total + term.weight_at(0.0) * mean, float(mean.detach())
    total.backward()
    return gradients_of(model), means


def gradients_of(model: Any, share: float = 1.0) -> dict[str, Tensor]:
    return {name: weight.grad * share for name, weight in trainable(model).items() if weight.grad is not None}


def apart(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖; a weight that the definition does not reach has a gradient of 0, or none."""
    far = [found[name].double() - exact.get(name, 0.0) if name in found else exact[name] for name in {**exact, **found}]
    return float(torch.cat([one.flatten() for one in far]).norm() / torch.cat([one.flatten() for one in exact.values()]).norm())


# --------------------------------------------------------------------------------------------------------- through the window


class Rank:
    """An accelerator whose rank is given."""

    def __init__(self, index: int, ranks: int) -> None:
        real = Accelerator(cpu=True)
        self.num_processes, self.process_index, self.device = ranks, index, torch.device("cpu")
        self.no_sync, self.autocast, self.backward = real.no_sync, real.autocast, real.backward

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values


class Handed(Exception):
    """A rank has said what it has."""


def model_of(job: Job, model: Any, before: Any) -> Model:
    """As the training loop makes it, but for data parallelism and for the time at which full weights are asked."""
    scorer, head = Scorer(model), head_of(model)
    asked = (scorer, head) if has_adapter(model) else (Scorer(before), head_of(before))
    return Model(scorer, scorer, head, reference_of(job, *asked, Accelerator(cpu=True), 64))


def weights_of(job: Job) -> dict[str, float]:
    return {name: term.weight_at(0.0) for name, term in job.terms.items()}


def in_windows(job: Job, step: int, model: Any, before: Any, ranks: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same through the loop's own window, the ranks played one after another and averaged as data parallelism does."""
    model = copy.deepcopy(model)
    mine = model_of(job, model, before)
    windows = [Window(job, step, Rank(rank, ranks)) for rank in range(ranks)]  # type: ignore[arg-type]
    means = dict.fromkeys(job.terms, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        if any(term.loss.needs.window for term in job.terms.values()):  # what every rank would hand to the others
            gathered: list[Any] = []

            def hand(own: list[Any]) -> None:
                gathered.extend(own)
                raise Handed

            patch.setattr(window_module, "gather_object", hand)
            for window in windows:
                with pytest.raises(Handed):
                    window._whole(job.terms, window.parts(job.terms), mine)
            patch.setattr(window_module, "gather_object", lambda own: gathered)
        for window in windows:
            part = window.backward(job.terms, weights_of(job), mine)
            means = {name: means[name] + one for name, one in part.items()}
    return gradients_of(model, 1 / ranks), means


@pytest.mark.parametrize(("loss", "kept"), CASES, ids=lambda loss: str(loss).replace("name=", ""))
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_gradient_is_that_of_the_whole_batch(three_layers: Callable[..., Any], loss: Any, kept: Any, adapter: bool) -> None:
    model, before = make_adapted(three_layers, adapter), three_layers()
    cuts = {0: ((10**6, 1), (200, 2), (60, 4), (1, 1)), 1: ((60, 2),)}  # the second window has what is left: 3 forget rows
    for step, shapes in cuts.items():
        exact, means = whole_batch(make_job(loss, 1, kept), step, model, before)
        for batch_tokens, ranks in shapes:
            gradient, logged = in_windows(make_job(loss, batch_tokens, kept), step, model, before, ranks)
            error = apart(gradient, exact)
            assert error <= 1e-5, f"{batch_tokens} tokens a micro-batch, {ranks} ranks: {error:.2e}"
            assert logged == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_terms_that_share_a_stream(three_layers: Callable[..., Any]) -> None:
    """One pass gives what several losses read of the same rows: the top, states, and the log-probabilities of before."""
    terms = {
        "forget": Term(loss=NPO(), weight=0.7),
        "noise": Term(loss=RepNoise(layers=(0,)), weight=0.3, stream="forget"),
        "more noise": Term(loss=RepNoise(layers=(1,)), weight=0.2, stream="forget"),
        "break": Term(loss=CircuitBreak(layers=(0, 1)), weight=0.4, stream="forget"),
        "retain": Term(loss=KL(), weight=1.5),
        "match": Term(loss=KEPT, weight=2.0, stream="retain"),
    }
    for adapter in (True, False):
        model, before = make_adapted(three_layers, adapter), three_layers()
        exact, means = whole_batch(replace(make_job(NPO(), 1), terms=terms), 0, model, before)
        for batch_tokens in (10**6, 60):
            gradient, logged = in_windows(replace(make_job(NPO(), batch_tokens), terms=terms), 0, model, before, 1)
            assert apart(gradient, exact) <= 1e-5
            assert logged == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_a_mean_of_means_would_be_caught(three_layers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: dividing per micro-batch is off by far more than it allows."""
    model, job = make_adapted(three_layers, True), make_job(NLL(), 60, NLL())
    exact, _ = whole_batch(job, 0, model, three_layers())
    monkeypatch.setattr(Window, "denominator", lambda self, name, term: 12)
    gradient, _ = in_windows(job, 0, model, three_layers(), 1)
    assert apart(gradient, exact) > 0.05


def test_a_window_without_units_adds_nothing(three_layers: Callable[..., Any]) -> None:
    """Answers so short that `ceu` skips them whole: neither a division by 0, nor a gradient."""
    model, before = make_adapted(three_layers, True), three_layers()
    without, _ = in_windows(make_job(CEU(skip=500), 60), 0, model, before, 2)
    alone = replace(make_job(NLL(), 60), terms={"retain": Term(loss=KL(), weight=1.5)})
    exact, _ = whole_batch(alone, 0, model, before)
    assert apart(without, exact) <= 1e-5


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_sees_rows_of_its_own(ranks: int) -> None:
    """Together the ranks see each row of the window once, whatever their number; and no target is a padding label."""
    job = make_job(DPO(), 60)
    for step in range(job.schedule.steps):
        wanted = sorted(place for slot in job.schedule.window(step) for place in slot)
        seen = []
        for rank in range(ranks):
            for part in Window(job, step, Rank(rank, ranks)).parts(job.terms):  # type: ignore[arg-type]
                if part.batch:
                    seen += [(one.stream, job.examples[one.stream].index(one)) for one in part.batch.examples]
                    assert int(part.batch.targets.min()) >= 0
                    assert len(part.batch.targets) == sum(one.targets for one in part.batch.examples)
        assert sorted(seen) == wanted


def test_an_end_token_that_is_also_padding_is_unlearned(three_layers: Callable[..., Any]) -> None:
    """Rows that end in the token that fills up shorter rows: it counts among the answer's tokens, alone and in a batch."""
    job = make_job(Ascent(), 10**6)
    for stream, examples in job.examples.items():
        ended = [replace(one, ids=(*one.ids[:-1], 0)) for one in examples]
        job.examples[stream][:] = ended  # type: ignore[index]
    model, before = make_adapted(three_layers, True), three_layers()
    exact, means = whole_batch(job, 0, model, before)
    gradient, logged = in_windows(job, 0, model, before, 2)
    assert apart(gradient, exact) <= 1e-5
    assert logged == pytest.approx(means, rel=1e-4, abs=1e-6)


@dataclass
class Counted:
    """Rows that went through the model: with gradient, and of the reference."""

    policy: int = 0
    reference: int = 0
    window: int = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found, real = Counted(), Scorer.forward

    def forward(self: Scorer, input_ids: Tensor, at: Tensor, *more: Any) -> Any:
        rows = len(input_ids) if input_ids.shape != (1, 1) else 0  # what only takes part in the exchange of gradients
        if torch.is_grad_enabled():
            found.policy += rows
        elif has_adapter(self.model) and self.model.active_adapters and not _switched_off(self.model):
            found.window += rows
        else:
            found.reference += rows
        return real(self, input_ids, at, *more)

    monkeypatch.setattr(Scorer, "forward", forward)
    yield found


def _switched_off(model: Any) -> bool:
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())


@pytest.mark.parametrize("way", ["adapter_off", "kept"])
@pytest.mark.parametrize(("loss", "kept"), CASES, ids=lambda loss: str(loss).replace("name=", ""))
def test_the_policy_runs_once_and_the_reference_where_it_is_read(
    three_layers: Callable[..., Any], counted: Counted, loss: Any, kept: Any, way: Any
) -> None:
    job = make_job(loss, 60, kept, reference=way)
    mine = model_of(job, make_adapted(three_layers, True), None)
    asked = {stream for stream, asked in job.needs.items() if asked.run}
    means = sum(len(job.schedule.seen(stream)) for stream, asked in job.needs.items() if asked.centres)  # of `lunar`
    before = sum(len(job.schedule.seen(stream)) for stream in asked) if way == "kept" else 0
    assert counted.reference == before + means
    counted.reference = 0
    Window(job, 0, Rank(0, 1)).backward(job.terms, weights_of(job), mine)  # type: ignore[arg-type]
    rows = dict.fromkeys(job.examples, 0)
    for slot in job.schedule.window(0):
        for stream, _ in slot:
            rows[stream] += 1
    assert counted.policy == sum(rows[stream] for stream in job.layers)
    assert counted.reference == (0 if way == "kept" else sum(rows[stream] for stream in asked))
    assert counted.window == (rows["forget"] if loss.needs.window else 0)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss", [WGA(), SatImp(), SimNPO(), CEU(), Ascent(), RMU(layer=1)], ids=str)
def test_no_reference_where_none_is_read(three_layers: Callable[..., Any], counted: Counted, loss: Any, adapter: bool) -> None:
    """Neither a pass, nor a copy of the model or of its head."""
    job = make_job(loss, 60, NLL())
    assert job.needs == {}
    with pytest.MonkeyPatch.context() as patch:
        model = make_adapted(three_layers, adapter)
        patch.setattr(copy, "deepcopy", _copy_no_weights)
        Window(job, 0, Rank(0, 1)).backward(job.terms, weights_of(job), model_of(job, model, model))  # type: ignore[arg-type]
    assert counted.reference == counted.window == 0


def _copy_no_weights(given: Any, *more: Any, copied: Callable[..., Any] = copy.deepcopy) -> Any:
    assert not isinstance(given, (torch.nn.Module, Tensor)), "no weights are to be copied"
    return copied(given, *more)


def test_rmu_trains_what_is_chosen_and_keeps_no_second_model(three_layers: Callable[..., Any]) -> None:
    """Weights above the layer, and those that were not chosen, are frozen before the optimizer is built, and stay so."""
    model = three_layers()
    choose_weights(model, ("layers.1.mlp.down_proj", "layers.2.mlp.down_proj"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    job = make_job(RMU(layer=1, c=3.0), 60, KEPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "deepcopy", _copy_no_weights)
        training = Training(job, model, Accelerator(cpu=True))
    training.begin()
    for _ in range(2):
        training.step(False)
    chosen = ["model.layers.1.mlp.down_proj.weight"]
    assert list(trainable(model)) == chosen
    assert [len(group["params"]) for group in training.optimizer.param_groups if group["params"]] == [1]
    moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert moved == chosen


def test_nothing_trainable_below_the_layer_is_refused(three_layers: Callable[..., Any]) -> None:
    model = three_layers()
    choose_weights(model, ("layers.2.mlp",))
    with pytest.raises(Refused, match="its losses end at layer 1, and nothing trainable stands at or below it"):
        Training(make_job(RMU(layer=1), 60, KEPT), model, Accelerator(cpu=True))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradient_on_real_processes(three_layers: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    """Through DistributedDataParallel and gloo: `windows.py` saves the gradients that every rank ends with."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "windows.py"), str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (loss, kept) in PROCESSES.items():
        exact, _ = whole_batch(make_job(loss, 60, kept), 0, make_adapted(three_layers, True), three_layers())
        gradients = [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in range(ranks)]
        for gradient in gradients:
            assert gradient.keys() == gradients[0].keys()
            assert all(torch.equal(one, gradients[0][weight]) for weight, one in gradient.items())
            assert apart(gradient, exact) <= 1e-5, name
