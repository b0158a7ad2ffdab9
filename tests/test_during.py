"""Layers that run compiled, and activations that lie on the CPU: the same gradients, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from jobs import RECIPE, adapted, job, rows
from torch import Tensor, nn

from llm_unlearn import plan, recipe
from llm_unlearn.data.batch import lay_out
from llm_unlearn.models.compiled import Compiled
from llm_unlearn.models.load import trainable
from llm_unlearn.models.scores import Scorer, checkpoint_activations, head_of, score
from llm_unlearn.models.trials import can_pack, check_same
from llm_unlearn.objectives.views import TOP
from llm_unlearn.spec import Refused
from llm_unlearn.training.during import during
from llm_unlearn.training.loop import Training
from llm_unlearn.training.offload import Laid, Offload, offloaded
from llm_unlearn.training.window import Window

PRIVATE = "train.privacy={noise: 1, delta: 0.001, clip: 1}"
CPU = torch.device("cpu")
Inside = Callable[[], AbstractContextManager[object]]


def gradients(
    model: Any, inside: Inside, packed: bool = True, layers: tuple[int, ...] = (TOP,), seed: int = 3
) -> dict[str, Tensor]:
    """The gradient of Σ log p, or Σ state², on a few rows, forward and backward inside a context."""
    model.zero_grad()
    with inside():
        found = score(Scorer(model), head_of(model), lay_out(rows("forget", 4, seed), packed), layers)["forget"]
        value = found.logps.sum() if TOP in layers else found.hidden(layers[0]).square().sum()
        value.backward()
    return {name: weight.grad.clone() for name, weight in trainable(model).items() if weight.grad is not None}


def made(make_model: Callable[..., Any], kind: str) -> Any:
    model = make_model() if "full" in kind else adapted(make_model, 0.05)
    if "recomputed" in kind:
        checkpoint_activations(model)
    assert can_pack(model, 40)
    return model.train()


# --------------------------------------------------------------------------------------------------------- on the CPU


class Spy:
    """An offload of everything, of which it is remembered what was kept and what was asked for."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.moved, self.stayed, self.back = model, list[Tensor](), list[Tensor](), 0
        pack, unpack = Offload.pack, Offload.unpack

        def watched_pack(offload: Offload, tensor: Tensor) -> Tensor | Laid:
            kept = pack(offload, tensor)
            (self.moved if isinstance(kept, Laid) else self.stayed).append(tensor)
            if isinstance(kept, Laid):
                assert kept.copied.flat.device.type == "cpu" and kept.copied.flat.data_ptr() != tensor.data_ptr()
            return kept

        def watched_unpack(offload: Offload, kept: Tensor | Laid) -> Tensor:
            self.back += isinstance(kept, Laid)
            return unpack(offload, kept)

        monkeypatch.setattr(Offload, "pack", watched_pack)
        monkeypatch.setattr(Offload, "unpack", watched_unpack)

    def inside(self) -> AbstractContextManager[object]:
        return offloaded(self.model, CPU, least=0)


@pytest.mark.parametrize("kind", ["adapter", "full", "adapter recomputed", "full recomputed"])
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_kept_is_moved_and_weights_are_not(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, packed: bool
) -> None:
    model = made(make_model, kind)
    expected = gradients(model, nullcontext, packed)
    spy = Spy(model, monkeypatch)
    found = gradients(model, spy.inside, packed)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    assert spy.moved and spy.back and not weights & {one.untyped_storage().data_ptr() for one in spy.moved}
    own = [one for one in spy.stayed if one.untyped_storage().data_ptr() not in weights and one.numel() > 0]
    assert not [one for one in own if one.untyped_storage().nbytes() >= one.nbytes]  # the rest is a few numbers spread over many
    if (
        "recomputed" in kind
    ):  # a layer keeps its input, (B, L, D), and the last norm a few of its kind; nothing is as wide as a layer
        inputs = [one for one in spy.moved if one.ndim == 3]
        assert model.config.num_hidden_layers < len(inputs) <= model.config.num_hidden_layers + 5
        assert {one.shape[-1] for one in inputs} <= {model.config.hidden_size, 1}


def test_small_tensors_stay(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(make_model, "adapter")
    spy = Spy(model, monkeypatch)
    gradients(model, lambda: offloaded(model, CPU, least=20_000))
    assert spy.moved and min(one.nbytes for one in spy.moved) >= 20_000 > max(
        one.nbytes for one in spy.stayed if one.nbytes < 20_000
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it lies": lambda one: one,
    "transposed": lambda one: one.transpose(0, 2),
    "permuted": lambda one: one.permute(1, 2, 0),
    "later half": lambda one: one[2:],
    "every other": lambda one: one[:, ::2],
    "of one axis": lambda one: one[:, :, 1],
    "spread": lambda one: one[:, :1].expand(-1, 7, -1),
    "one number": lambda one: one[0, 0, 0],
    "none": lambda one: one[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(layout: str) -> None:
    whole = torch.randn(4, 5, 6)
    one, offload = LAYOUTS[layout](whole), Offload(nn.Linear(2, 2), CPU, least=0)
    kept = offload.pack(one)
    back = offload.unpack(kept)
    assert torch.equal(back, one) and back.shape == one.shape
    assert isinstance(kept, Laid) == (layout not in ("spread", "none"))
    if isinstance(kept, Laid):
        assert kept.copied.flat.numel() == one.numel()  # and no more of a larger storage
    if layout in ("transposed", "permuted", "later half"):
        assert back.stride() == one.stride()


def test_what_is_kept_twice_is_copied_once_and_a_new_tensor_never_takes_an_old_ones_place() -> None:
    offload = Offload(nn.Linear(2, 2), CPU, least=0)
    one = torch.randn(64, 64)
    kept, again = offload.pack(one), offload.pack(one.view(32, 128))
    assert isinstance(kept, Laid) and isinstance(again, Laid) and kept.copied is again.copied
    assert offload.unpack(kept).data_ptr() == offload.unpack(again).data_ptr()
    held = [kept]
    for k in range(50):  # the allocator hands out the same address again
        one = torch.full((64, 64), float(k))
        packed = offload.pack(one)
        assert isinstance(packed, Laid)
        held.append(packed)
        del one
    assert [float(offload.unpack(laid)[0, 0]) for laid in held[1:]] == [float(k) for k in range(50)]
    del kept, again, held, packed
    offload.latest = None
    gc.collect()
    assert not offload.copies


def test_copies_that_autocast_makes_of_weights_stay(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(make_model, "full")
    spy = Spy(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model, spy.inside)
    matrices = {weight.shape for name, weight in model.named_parameters() if "proj" in name}

    def as_a_linear_layer_keeps_it(one: Tensor) -> bool:
        return one.dtype == torch.bfloat16 and one.ndim == 2 and one.T.shape in matrices and one.stride(0) == 1

    assert sum(map(as_a_linear_layer_keeps_it, spy.stayed)) == 7 * model.config.num_hidden_layers
    assert spy.moved and not any(map(as_a_linear_layer_keeps_it, spy.moved))


def test_offload_on_a_cpu_is_said_and_does_nothing(make_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(job(offload="activations"), adapted(make_model), Accelerator(cpu=True))
    assert "train.offload: nothing is moved, as this run is on a CPU" in capsys.readouterr().out
    with training.model.during() as nothing:
        assert nothing is None


def test_a_plan_counts_what_stays_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    config = SimpleNamespace(num_hidden_layers=6, hidden_size=10, intermediate_size=30, vocab_size=50)
    size = partial(plan.memory, recipe.load(path), None, 1000, 100, config, 8192, torch.float32, reference=False)
    here, there = size(offload=False), size(offload=True)
    assert here.pop("activations") == 6 * there.pop("activations") == 8192 * 6 * (18 * 10 + 4 * 30) * 4
    assert here == there
    half = partial(plan.memory, recipe.load(path), None, 1000, 100, config, 8192, torch.bfloat16, reference=False)
    copies = 4 * (6 * 10 + 30)  # what peft makes float32 of, before each adapted layer
    assert half(offload=False)["activations"] == 8192 * 6 * ((18 * 10 + 4 * 30) * 2 + copies)


# ------------------------------------------------------------------------------------------------------------- compiled


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.torch.jit")
"""What PyTorch warns of while it compiles is about itself."""


@pytest.fixture
def fresh() -> Any:
    """Nothing compiled before, and nothing left."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


CASES = {  # kind, packed, layers that are read
    "adapter": ("adapter", True, (TOP,)),
    "adapter, padded, ends early": ("adapter", False, (0,)),
    "full, recomputed": ("full recomputed", True, (TOP,)),
    "adapter, recomputed, hooked": ("adapter recomputed", True, (0, TOP)),
}


@compiles
@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_give_the_same_gradients_and_other_shapes_compile_nothing(
    make_model: Callable[..., Any], fresh: None, case: str
) -> None:
    """With PyTorch's tracing alone, without a compiler behind it."""
    kind, packed, layers = CASES[case]
    model = made(make_model, kind)
    compiled = Compiled(model, backend="eager")
    counts = []
    for seed in range(3, 8):
        expected = gradients(model, nullcontext, packed, layers, seed)
        found = gradients(model, compiled.inside, packed, layers, seed)
        assert expected.keys() == found.keys() and expected
        for name, one in expected.items():
            assert (one - found[name]).norm() <= 1e-5 * one.norm()
        counts.append(compilations())
    assert 1 <= counts[0] <= 2 and counts[-1] == counts[0]  # where the embedding is frozen, the first layer is a case of its own
    assert not torch._dynamo.utils.counters["graph_break"]


@compiles
def test_the_adapter_switched_off_is_one_more_case(make_model: Callable[..., Any], fresh: None) -> None:
    wanted = job(steps=3, reference="adapter_off")
    found = []
    for compiles in (False, True):
        training = Training(wanted, adapted(make_model, 0.05), Accelerator(cpu=True))
        compiled = Compiled(training.net, backend="eager")
        if compiles:
            object.__setattr__(training.model, "during", compiled.inside)
        slopes, counts = [], []
        for step in range(3):
            training.optimizer.zero_grad()
            training.progress.step = step
            training.window = Window(wanted, step, training.accelerator, training.layout)
            slopes.append(training.gradient(wanted.terms))
            counts.append(compilations())
        found.append((slopes, counts))
    (own, none), (other, counts) = found
    assert none[-1] == 0 and counts == [3, 3, 3]
    for mine, theirs in zip((one for step in own for one in step), (one for step in other for one in step), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * mine.norm()


@compiles
def test_outside_the_model_is_as_it_was(make_model: Callable[..., Any], fresh: None) -> None:
    model = made(make_model, "adapter").eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    compiled = Compiled(model, backend="eager")
    with pytest.raises(RuntimeError, match="a step that fails"), compiled.inside():
        raise RuntimeError("a step that fails")
    gradients(model, compiled.inside)
    assert not [layer for layer in model.modules() if "forward" in vars(layer)]
    count = compilations()
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), before) and compilations() == count


@compiles
def test_what_cannot_be_compiled_is_refused(make_model: Callable[..., Any], fresh: None) -> None:
    def fails(graph: Any, given: Any) -> Any:
        raise RuntimeError("no compiler here")

    def wrong(graph: Any, given: Any) -> Any:
        return lambda *values: tuple(
            1.01 * one if torch.is_tensor(one) and one.is_floating_point() else one for one in graph(*values)
        )

    refusal = "train.compile: {}; give compile: null."
    for backend, said in ((fails, "fails on this model or machine"), (wrong, "gives other numbers on a few tokens")):
        torch._dynamo.reset()
        model = made(make_model, "adapter")
        with pytest.raises(Refused, match=rf"train\.compile: {said}"):
            check_same(model, Compiled(model, backend=backend).inside, refusal, True)  # type: ignore[arg-type]


@contextmanager
def both(model: Any, inside: Inside) -> Iterator[None]:
    with inside(), offloaded(model, CPU, least=0):
        yield


@compiles
@pytest.mark.slow
def test_layers_that_a_compiler_made(make_model: Callable[..., Any], fresh: None) -> None:
    """The whole way, with code that a C++ compiler makes: about half a minute."""
    model, wanted = make_model(num_hidden_layers=1), job(compile="layers", reference="kept")
    inside = during(wanted.settings, model, Accelerator(cpu=True), can_pack(model, 40))
    count = compilations()
    expected, found = gradients(model, nullcontext), gradients(model, inside)
    with_offload = gradients(model, lambda: both(model, inside))
    assert compilations() == count == 1
    assert all(torch.equal(found[name], one) for name, one in with_offload.items())
    for name, one in expected.items():
        assert (one - found[name]).norm() <= 1e-4 * one.norm()


WRONG = {
    "quantized layers": (["train.compile=layers", "model.quantize=nf4"], "train.compile: layers of quantized weights are not"),
    "kernels": (["train.compile=layers", "model.kernels=liger"], "train.compile: layers with kernels of their own are not"),
    "privacy": (["train.compile=layers", PRIVATE], "train.compile: gradients of single rows"),
    "privacy and offload": (["train.offload=activations", PRIVATE], "train.offload: gradients of single rows"),
    "another word": (["train.offload=weights"], "train.offload: found 'weights'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_refused(name: str, tmp_path: Path) -> None:
    words, expected = WRONG[name]
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    with pytest.raises(Refused) as refused:
        recipe.load(path, words)
    assert expected in str(refused.value)


def test_a_recipe_that_asks_for_none_of_it_is_the_recipe_that_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    known = {recipe.load(path, words).hash for words in ([], ["train.offload=null", "train.compile=null", "model.kernels=null"])}
    assert len(known) == 1 and recipe.load(path, ["train.compile=layers"]).hash not in known
