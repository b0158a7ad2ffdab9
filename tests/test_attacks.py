"""Attacks: what each does to a tiny model against the same done by hand, what the curves are said to mean, and what is kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llm_unlearn.attacks import audit as room
from llm_unlearn.attacks.adapter_removal import AdapterRemoval
from llm_unlearn.attacks.asking import answers_of, known
from llm_unlearn.attacks.audit import Target, audit, key_of
from llm_unlearn.attacks.finding import Attack, Axis, Curve, Gain, Subject
from llm_unlearn.attacks.gap import crossing, finding_of, gap_of
from llm_unlearn.attacks.layers import ActivationPatching, LayerProbe
from llm_unlearn.attacks.quantization import Quantization
from llm_unlearn.attacks.registry import AnyAttack
from llm_unlearn.attacks.relearning import Relearning
from llm_unlearn.attacks.robustness import robustness_of
from llm_unlearn.attacks.shadows import Shadows
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.sets import EncodedSet, encode_set
from llm_unlearn.models.forms import Again, adapter_scaled
from llm_unlearn.models.load import Loaded, add_adapter
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.source import Source
from llm_unlearn.spec import PositiveInt, Refused, parts_of, spec

ROOT = Path(__file__).parent.parent
ATTACKS: list[type[Attack]] = list(get_args(get_args(AnyAttack)[0]))


def source(name: str, limit: int) -> Source:
    wrong = {"paraphrase": "paraphrased_answer", "perturbed": "perturbed_answer"} if name == "forget" else {}
    return Source(source=f"embedded:{name}", prompt="question", answer="answer", limit=limit, **wrong)


@pytest.fixture(scope="module")
def sets(tokenizer: Any) -> dict[str, EncodedSet]:
    needs = ("answer", "paraphrase", "perturbed", "generation")
    return {name: encode_set(name, source(name, size), needs, tokenizer) for name, size in (("forget", 8), ("retain", 5))}


@pytest.fixture(scope="module")
def adapted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tiny base that changes it visibly."""
    folder = tmp_path_factory.mktemp("adapters") / "moved"
    model = add_adapter(Again(Model(base=str(tiny_base)), None, torch.device("cpu"))().model, Adapter(rank=4), seed=0)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(str(folder))
    return folder


def subject(base: Path, sets: Mapping[str, EncodedSet], adapter: Path | None = None, column: str = "after") -> Subject:
    model, path = Model(base=str(base)), str(adapter) if adapter else None
    load = Again(model, path, torch.device("cpu"))
    return Subject(column, model, path, load, sets, None, Accelerator(cpu=True), 300, 0, lambda text: None)


def logits(loaded: Loaded | Any, ids: tuple[int, ...]) -> torch.Tensor:
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([ids])).logits[0])


def probability_by_hand(model: Any, asked: EncodedSet) -> list[float]:
    """mean log p of each true answer's tokens, float64, one call per row."""
    found = []
    for example in asked.examples:
        logp = logits(model, example.ids).double().log_softmax(-1)
        rows = [float(logp[t - 1, example.ids[t]]) for t in range(example.answer, len(example.ids))]
        found.append(float(np.exp(np.mean(rows))))
    return found


# -------------------------------------------------------------------------------------------------------- what is asked


def test_only_the_true_answers_of_the_chosen_rows_are_asked(sets: dict[str, EncodedSet]) -> None:
    whole = sets["forget"]
    assert len(whole.examples) > len(whole.ids) and whole.generate
    found = answers_of(whole, [5, 2])
    assert (found.ids, found.answers, found.row, found.generate) == (
        [whole.ids[5], whole.ids[2]], [whole.answers[5], whole.answers[2]], [0, 1], False,
    )  # fmt: skip
    truth = {whole.row[a]: whole.examples[a] for a in range(len(whole.row)) if whole.kind[a] == "answer"}
    assert found.examples == [truth[5], truth[2]] and found.kind == ["answer", "answer"]
    assert answers_of(whole).examples == [truth[row] for row in range(8)]


def test_what_is_known_is_what_one_call_per_row_says(sets: dict[str, EncodedSet], tiny_base: Path) -> None:
    one = subject(tiny_base, sets)
    loaded, asked = one.load(), answers_of(sets["forget"])
    by_hand = probability_by_hand(loaded, asked)
    found = known(loaded, asked, "probability", one)
    np.testing.assert_allclose(found.rows, by_hand, rtol=1e-4)
    assert found.value == pytest.approx(np.mean(by_hand), rel=1e-4) and found.low < found.value < found.high
    assert set(found.beside) == {"extraction_strength", "whole_answers"} and found.beside["whole_answers"] == 0


# ----------------------------------------------------------------------------------------------------------- relearning


def test_relearning_trains_on_some_rows_and_measures_the_others(sets: dict[str, EncodedSet], tiny_base: Path) -> None:
    one = subject(tiny_base, sets)
    mine, rest = Relearning(set="forget", share=0.25).parts(one)
    assert (len(mine.ids), len(rest.ids)) == (2, 6) and {*mine.ids, *rest.ids} == set(sets["forget"].ids)
    drawn = {tuple(Relearning(set="forget").parts(replace(one, seed=seed))[0].ids) for seed in range(5)}
    assert len(drawn) > 1, "another seed draws other rows"
    assert Relearning(set="forget", rows=1).parts(one)[1].ids == Relearning(set="forget").parts(one)[1].ids
    mine, rest = Relearning(set="forget", train_on="retain", rows=3).parts(one)
    assert len(mine.ids) == 3 and set(mine.ids) <= set(sets["retain"].ids) and rest.ids == sets["forget"].ids
    with pytest.raises(Refused, match="0 rows to train on"):
        Relearning(set="forget", share=0.01).parts(one)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_relearning_is_adamw_on_the_released_weights(
    sets: dict[str, EncodedSet], tiny_base: Path, adapted: Path, with_adapter: bool
) -> None:
    """Two steps on all rows at once, by hand: the released model, its adapter merged, moved by torch's own AdamW on Σ NLL / Σ T."""
    path = adapted if with_adapter else None
    one = subject(tiny_base, sets, path)
    attack = Relearning(set="forget", steps=2, window=4, lr=1e-3, adapter=None)
    mine, rest = attack.parts(one)
    found = attack(one)

    model = one.load(merged=True).model.double().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    expected = [np.mean(probability_by_hand(model, rest))]
    for _ in range(2):
        nll, tokens = torch.zeros(()).double(), 0
        for example in mine.examples:
            logp = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            at = torch.arange(example.answer, len(example.ids))
            nll, tokens = nll - logp[at - 1, torch.tensor(example.ids)[at]].sum(), tokens + len(at)
        (nll / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(np.mean(probability_by_hand(model, rest)))
    assert found.x == (0, 1, 2)
    np.testing.assert_allclose(found.y, expected, rtol=2e-3)
    assert len(set(np.round(np.array(expected) / expected[0], 2))) == 3, "each step shows"
    assert len(found.rows) == 4 and found.notes["trained_rows"] == 4


def test_relearning_with_an_adapter_changes_the_model_and_leaves_the_files(
    sets: dict[str, EncodedSet], tiny_base: Path, adapted: Path
) -> None:
    stamps = {path: path.stat().st_mtime_ns for folder in (tiny_base, adapted) for path in folder.iterdir()}
    attack = Relearning(set="forget", train_on="forget", steps=5, lr=1e-2)
    first, second = (attack(subject(tiny_base, sets, adapted)) for _ in range(2))
    assert first == second, "the seed decides"
    assert first.x == (0, 1, 2, 5) and first.y[-1] != first.y[0]
    assert stamps == {path: path.stat().st_mtime_ns for folder in (tiny_base, adapted) for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------- other forms of the weights


def test_an_adapter_counts_as_often_as_is_said(tiny_base: Path, adapted: Path) -> None:
    """W + f · s · B A for every layer, by hand; afterwards it counts once again."""
    load = Again(Model(base=str(tiny_base)), str(adapted), torch.device("cpu"))
    ids, one = tuple(range(4, 20)), load()
    whole, base = logits(one, ids), load(adapter=False)
    layers = {name: layer for name, layer in one.causal.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 14
    for factor in (0.0, 0.5, -1.0):
        by_hand = copy.deepcopy(base.model).double()
        with torch.no_grad():
            for name, layer in layers.items():
                update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
                by_hand.get_submodule(name).weight += factor * (32 / 4) * update
        with adapter_scaled(one.model, factor):
            torch.testing.assert_close(logits(one, ids).double(), logits(by_hand, ids), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(one, ids), whole) and not torch.allclose(whole, logits(base, ids))
    with pytest.raises(Refused, match="no scale"), adapter_scaled(base.model, 0.0):
        pass


def test_adapter_removal_gives_the_base_back(sets: dict[str, EncodedSet], tiny_base: Path, adapted: Path) -> None:
    found = AdapterRemoval(set="forget")(subject(tiny_base, sets, adapted))
    alone = AdapterRemoval(set="forget")(subject(tiny_base, sets))
    assert found.x == (1, 0.5, 0, -1) and alone.x == (1,)
    assert found.y[2] == pytest.approx(alone.y[0], rel=1e-5) and found.y[0] != pytest.approx(alone.y[0], rel=1e-2)


def test_merged_is_the_same_model(tiny_base: Path, adapted: Path) -> None:
    load, ids = Again(Model(base=str(tiny_base)), str(adapted), torch.device("cpu")), tuple(range(4, 30))
    apart, merged = load(), load(merged=True)
    torch.testing.assert_close(logits(apart, ids), logits(merged, ids), rtol=1e-3, atol=1e-3)
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    assert apart.identity != merged.identity


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_quantization_rounds_the_merged_weights_or_the_base(tiny_base: Path, adapted: Path, bits: Any) -> None:
    """What the rounded layer holds lies within half a rounding step of W + s B A, or of W."""
    bnb = pytest.importorskip("bitsandbytes")
    load = Again(Model(base=str(tiny_base)), str(adapted), torch.device("cpu"))
    base, whole = (form.model.state_dict() for form in (load(adapter=False), load(merged=True)))
    name = "model.layers.1.mlp.up_proj"
    for merged, wanted in ((True, whole), (False, base)):
        layer = load(quantize=bits, merged=merged).causal.get_submodule(name)
        layer = layer if merged else layer.base_layer
        weight, true = layer.weight, wanted[f"{name}.weight"]
        if bits == "int8":
            rounded, step = weight.data.float() * weight.SCB[:, None] / 127, true.abs().amax(1, keepdim=True) / 127
        else:
            assert weight.quant_state.quant_type == bits
            rounded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            block = true.flatten().reshape(-1, weight.quant_state.blocksize).abs().amax(1, keepdim=True)
            step = (block / 3).expand(-1, weight.quant_state.blocksize).reshape(true.shape)  # the widest gap between two levels
        assert bool(((rounded - true).abs() <= 0.55 * step).all())
        other = base if merged else whole
        assert not bool(((rounded - other[f"{name}.weight"]).abs() <= 0.55 * step).all())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantization_measures_each_format(sets: dict[str, EncodedSet], tiny_base: Path, adapted: Path) -> None:
    pytest.importorskip("bitsandbytes")
    attack = Quantization(set="forget", formats=("nf4", "int8"))
    one = subject(tiny_base, sets, adapted)
    found = attack(one)
    assert found.x == (32, 4, 8) and attack.x.ticks == ("as it is", "nf4", "int8")
    again = probability_by_hand(one.load(quantize="nf4", merged=True), answers_of(sets["forget"]))
    assert found.y[1] == pytest.approx(np.mean(again), rel=1e-3) == found.notes["nf4"]
    assert found.y[0] == pytest.approx(np.mean(probability_by_hand(one.load(), answers_of(sets["forget"]))), rel=1e-3)
    with pytest.raises(Refused, match="loaded in nf4 already"):
        attack(replace(one, load=lambda **form: one.load(**{"quantize": "nf4", **form})))


# -------------------------------------------------------------------------------------------------- what the curves say


def curve(x: list[float], y: list[float], spread: float = 0.01) -> dict[str, Any]:
    return {"x": x, "y": y, "low": [v - spread for v in y], "high": [v + spread for v in y], "rows": [], "notes": {}}


def three(before: list[float], after: list[float], retrained: list[float], spread: float = 0.01) -> dict[str, Any]:
    x = [0.0, 10.0, 20.0]
    return {name: curve(x[: len(y)], y, spread) for name, y in (("before", before), ("after", after), ("retrained", retrained))}


RELEARN = Relearning(set="forget")


def test_the_share_that_comes_back_is_what_lies_between_control_and_before() -> None:
    found = gap_of(RELEARN, three([0.9, 0.9, 0.8], [0.1, 0.3, 0.5], [0.1, 0.2, 0.15]))
    assert found["gap"] == pytest.approx(0.5 - 0.2)  # each where the attacker gets most
    assert found["came_back"] == pytest.approx((0.5 - 0.2) / (0.9 - 0.1)) and found["leaks"]
    assert found["best"]["after"] == {"x": 20, "at": "20 optimizer steps", "value": 0.5, "low": 0.49, "high": 0.51}
    # half-way from .1 to .9 is .5, which `after` reaches at the last look and the control never
    assert found["half"] == {"before": 0.0, "after": 20.0, "retrained": None}


@pytest.mark.parametrize(
    ("curves", "share", "leaks"),
    [
        (three([0.9], [0.1, 0.8, 0.9], [0.1, 0.8, 0.9]), 0.0, False),  # it is learnt anew as fast
        (three([0.9], [0.1, 0.3, 0.5], [0.1, 0.2, 0.2], spread=0.2), 3 / 8, False),  # within the noise
        (three([0.9], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]), 0.5, False),  # was there without the attack
        (three([0.9], [0.0, 0.05, 0.05], [0.1, 0.1, 0.1]), 0.0, False),  # less than the control
        (three([0.9], [0.1, 0.5, 0.95], [0.1, 0.1, 0.1]), 1.0, True),  # never more than everything
        (three([0.105], [0.1, 0.5, 0.95], [0.1, 0.1, 0.1]), None, False),  # there was nothing to forget
        ({k: v for k, v in three([0.9], [0.1, 0.5], []).items() if k != "retrained"}, 0.5, True),  # no control
        ({"model": curve([0.0, 1.0], [0.1, 0.9])}, None, False),
        ({**three([0.9], [], []), "after": {"missing": "no"}}, None, False),
    ],
)
def test_what_is_a_leak(curves: dict[str, Any], share: float | None, leaks: bool) -> None:
    found = gap_of(RELEARN, curves)
    assert found["leaks"] is leaks
    assert found["came_back"] == (None if share is None else pytest.approx(share))
    text = finding_of(RELEARN, curves, found)
    assert text and ("% of what was forgotten comes back" in text) == (share is not None)


@dataclass(frozen=True)
class Lower:
    """An attack whose measure falls when the attacker knows more."""

    knowing: Any
    set: str = "forget"
    name: str = "lower"
    title: str = "lower"

    @property
    def x(self) -> Axis:
        return Axis("n")

    @property
    def y(self) -> Gain:
        return Gain("perplexity", self.knowing)

    def __call__(self, subject: Subject) -> Curve:
        raise AssertionError("is not carried out")


def test_a_measure_that_falls_with_knowledge() -> None:
    curves = three([1.0], [5.0, 3.0], [6.0, 5.0])
    found = gap_of(Lower("lowers"), curves)
    assert found["gap"] == 2 and found["came_back"] == pytest.approx(2 / 4) and found["leaks"] and found["half"] == {}
    assert gap_of(Lower("moves"), curves)["came_back"] is None


def test_what_has_no_control_has_no_share() -> None:
    """An early layer of any model made from the original carries all that the original reads from it, and one trained apart never
    does: patching says where the knowledge was cut, and nothing of how much came back."""
    curves = three([0.0, 0.0, 0.0], [0.04, 0.4, 0.7], [0.3, 0.5, 0.6])
    assert ActivationPatching(set="forget").y.knowing == "lowers"
    found = gap_of(ActivationPatching(set="forget"), curves)
    assert found["best"]["after"]["value"] == 0.04 and not found["leaks"]
    assert found["gap"] is None and found["came_back"] is None and found["half"] == {}
    assert "comes back" not in finding_of(ActivationPatching(set="forget"), curves, found)


def test_crossing_lies_on_the_straight_line() -> None:
    assert crossing([0, 10, 30], [0.0, 0.2, 0.6], 0.4) == pytest.approx(20)
    assert crossing([0, 10], [0.5, 0.1], 0.4) == 0
    assert crossing([0, 10], [0.1, 0.3], 0.4) is None


def attack_row(name: str, curves: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "curves": curves}


def kept(share: float) -> list[dict[str, Any]]:
    values = {"before": {"value": 0.8}, "after": {"value": 0.8 * share}}
    return [
        {"goal": "as before", "knowing": "raises", "values": values},
        {"goal": "as retrained", "knowing": "raises", "values": {}},
    ]


def test_robustness_by_hand() -> None:
    little = attack_row("relearning", three([], [0.5, 0.501], [0.5, 0.4]))
    relearned = attack_row("relearning", three([], [0.1, 0.5], [0.2, 0.3]))
    rounded = attack_row("quantization", {"after": curve([32, 8, 4], [0.3, 0.2, 0.4])})
    found = robustness_of([little, relearned, rounded], kept(0.9))
    assert found is not None
    r, q = 0.1 / 0.4, 0.3 / 0.4  # the relearning that gains most, the format that gives most
    assert found["relearning"] == pytest.approx(r) and found["quantization"] == pytest.approx(q)
    assert found["harmonic_mean"] == found["value"] == pytest.approx(2 / (1 / r + 1 / q)) and found["utility"] == pytest.approx(0.9)
    broken = robustness_of([relearned, rounded], kept(0.4))
    assert broken is not None and broken["value"] == 0 and broken["harmonic_mean"] == found["harmonic_mean"]
    lost = attack_row("relearning", three([], [0.3, 0.2], [0.2, 0.3]))
    assert (robustness_of([lost], kept(1.0)) or {})["relearning"] == 1
    assert robustness_of([attack_row("adapter_removal", {})], kept(1.0)) is None


# -------------------------------------------------------------------------------------------------------- what is kept


@spec
class Counted:
    """Writes down on whom it is carried out; what it finds is its own setting."""

    name: str = "counted"
    set: str = "forget"
    value: PositiveInt = 1
    done: ClassVar[list[str]] = []
    fails: ClassVar[dict[str, BaseException]] = {}

    @property
    def title(self) -> str:
        return "counted"

    @property
    def x(self) -> Axis:
        return Axis("n")

    @property
    def y(self) -> Gain:
        return Gain("things")

    def __call__(self, subject: Subject) -> Curve:
        if subject.column in self.fails:
            raise self.fails[subject.column]
        self.done.append(subject.column)
        return Curve((1.0,), (float(self.value),))


@dataclass
class Audit:
    """The same audit again and again, with what was done in each."""

    targets: dict[str, Target]
    cache: Path
    seed: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)

    def done(self, attack: Attack, **changes: Any) -> list[str]:
        Counted.done.clear()
        one = replace(self, **changes)
        self.results = audit([attack], one.targets, Accelerator(cpu=True), batch_tokens=300, seed=one.seed, cache=one.cache)
        return list(Counted.done)


@pytest.fixture
def asked(sets: dict[str, EncodedSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Audit:
    monkeypatch.setattr(Counted, "fails", {})
    monkeypatch.setattr(room, "Accelerator", lambda mixed_precision: Accelerator(cpu=True))
    return Audit({name: Target(Model(base=name), None, f"1d-{name}", sets) for name in ("before", "after", "retrained")}, tmp_path)


def test_an_attack_is_carried_out_once(asked: Audit, sets: dict[str, EncodedSet]) -> None:
    every, targets = ["before", "after", "retrained"], asked.targets
    assert asked.done(Counted()) == every
    first = asked.results
    assert asked.done(Counted()) == [] and asked.results == first
    assert asked.done(Counted(value=2)) == every and asked.results[0]["curves"]["after"]["y"] == [2.0]
    assert asked.done(Counted(), seed=1) == every
    other = {**targets, "after": replace(targets["after"], identity="another")}
    assert asked.done(Counted(), targets=other) == ["after"]
    retain = {name: replace(one, sets={**sets, "retain": answers_of(sets["retain"], [0])}) for name, one in targets.items()}
    assert asked.done(Counted(), targets=retain) == [], "a set that the attack does not name"
    forget = {name: replace(one, sets={**sets, "forget": answers_of(sets["forget"], [0])}) for name, one in targets.items()}
    assert asked.done(Counted(), targets=forget) == every
    assert json.loads(json.dumps(first)) == first, "plain data"


def test_what_cannot_be_attacked_says_why_and_is_tried_again(asked: Audit) -> None:
    Counted.fails["after"] = Refused("it will not load")
    assert asked.done(Counted()) == ["before", "retrained"]
    assert asked.results[0]["curves"]["after"] == {"missing": "it will not load"}
    assert "after: it will not load" in asked.results[0]["finding"] and not asked.results[0]["gap"]["leaks"]
    Counted.fails.clear()
    assert asked.done(Counted()) == ["after"]


def test_an_interrupted_audit_goes_on_where_it_was(asked: Audit) -> None:
    Counted.fails["retrained"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        asked.done(Counted())
    Counted.fails.clear()
    assert asked.done(Counted()) == ["retrained"]


def test_what_an_attack_is_kept_under(asked: Audit) -> None:
    one, other = asked.targets["after"], asked.targets["before"]
    both = {"after": one, "before": other}
    keys = {
        key_of(RELEARN, "after", both, 0, "no"),
        key_of(RELEARN, "after", both, 0, "bf16"),
        key_of(RELEARN, "after", both, 1, "no"),
        key_of(RELEARN, "before", both, 0, "no"),
        key_of(RELEARN, "after", {"after": one}, 0, "no"),
        key_of(RELEARN, "after", {**both, "retrained": one}, 0, "no"),
        key_of(Relearning(set="forget", lr=1e-3), "after", both, 0, "no"),
    }
    assert len(keys) == 7


def test_a_file_that_an_attack_reads_stands_in_its_key(asked: Audit, tmp_path: Path) -> None:
    """Wherever in its settings it is named; what it says counts, not its name or its date."""
    one, paths = asked.targets["after"], [tmp_path / f"{name}.jsonl" for name in ("first", "second")]

    def write(path: Path, said: str) -> Source:
        path.write_text(json.dumps({"id": "a", "q": "Who?", "a": said}) + "\n")
        return Source(source=str(path), prompt="q", answer="a")

    files = tuple(write(path, "me") for path in paths)
    probe = LayerProbe(set="forget", labels=files, trained_on="retain")
    assert [where for where, part in parts_of(probe) if isinstance(part, Source)] == [("labels", 0), ("labels", 1)]
    first = key_of(probe, "after", {"after": one}, 0, "no")
    write(paths[1], "me")
    assert key_of(probe, "after", {"after": one}, 0, "no") == first
    write(paths[1], "you")
    assert key_of(probe, "after", {"after": one}, 0, "no") != first
    retain = replace(one, sets={**one.sets, "retain": answers_of(one.sets["retain"], [0])})
    write(paths[1], "me")
    assert key_of(probe, "after", {"after": one}, 0, "no") == first != key_of(probe, "after", {"after": retain}, 0, "no")
    paths[0].unlink()
    asked.done(probe)
    assert "first.jsonl" in asked.results[0]["curves"]["after"]["missing"], "what cannot be read is said, and no more"


# ----------------------------------------------------------------------------------------------------------- the suites


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_attack_is_a_setting_that_says_what_it_is(attack: Any) -> None:
    more = {"against": "holdout", "retain": "retain", "recipe": "r.yaml"} if attack is Shadows else {}
    one: Attack = attack(set="forget", **more)
    assert (
        one.name == attack.__dataclass_fields__["name"].default
        and one.title
        and one.x.name
        and one.y.knowing in ("raises", "lowers")
    )
    assert len((attack.__doc__ or "").split()) > 20


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{name: relearning, set: forgot}", "attacks[0].set: found 'forgot'; did you mean 'forget'?"),
        ("{name: relearning, set: forget, train_on: x}", "attacks[0].train_on: found 'x'"),
        ("{name: layer_probe, trained_on: retian}", "attacks[0].trained_on: found 'retian'"),
        (
            "{name: layer_probe, labels: [{source: ./no.jsonl, prompt: q, answer: a}]}",
            "attacks[0].labels[0].source: no such file or folder: ./no.jsonl",
        ),
        ("{name: relearn, set: forget}", "attacks[0].name: found 'relearn'; did you mean 'relearning'?"),
        ("{name: relearning, set: forget, share: 0.0}", "a share above 0"),
        ("{name: quantization, set: forget, formats: [nf4, nf4]}", "formats, each once"),
        ("{name: adapter_removal, set: forget, factors: [1.0]}", "factors other than 1"),
    ],
)
def test_a_wrong_attack_is_refused_with_its_place(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    sets = "sets: {forget: {source: embedded:forget, prompt: question, answer: answer}}\nmeasures: []\n"
    path.write_text(f"{sets}attacks:\n  - {line}\n")
    with pytest.raises(Refused) as error:
        suites.load(path)
    assert said in str(error.value) and f"{path}:4" in str(error.value)


# ------------------------------------------------------------------------------------------------------------- the whole


SUITE = """
sets:
  forget: {source: embedded:forget, prompt: question, answer: answer, limit: 12}
  retain: {source: embedded:retain, prompt: question, answer: answer, limit: 12}
measures: [{name: probability, set: forget}, {name: probability, set: retain}]
attacks:
  - {name: relearning, set: forget, steps: 3, lr: 1.0e-3}
  - {name: quantization, set: forget, formats: [nf4]}
  - {name: adapter_removal, set: forget}
retrained: embedded:retrained
"""


@pytest.mark.long
@pytest.mark.slow
def test_run_evaluate_and_two_processes_find_the_same(cache: Path, embedded: Mapping[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    suite, run = tmp_path / "suite.yaml", tmp_path / "run"
    suite.write_text(SUITE)

    def call(words: list[str], cache: Path) -> tuple[dict[str, Any], str]:
        environment = {**os.environ, "LLM_UNLEARN_CACHE": str(cache), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        folder = Path(words[words.index("--output") + 1]) if "--output" in words else run
        return json.loads((folder / "evaluation.json").read_text()), done.stdout

    for name in ("one", "two"):  # caches with the embedded models, and nothing else
        (tmp_path / name).mkdir()
        (tmp_path / name / "embedded").symlink_to(cache / "embedded")
    recipe = ["recipes/forget_lora.yaml", f"output={run}", "train.steps=40", f"evaluation={{suite: {suite}}}"]
    ran, said = call([sys.executable, "-m", "llm_unlearn", "run", *recipe], tmp_path / "one")
    assert said.count("attack: ") == 9
    evaluate = ["-m", "llm_unlearn", "evaluate", str(suite), "--model", "embedded:target", "--adapter", str(run), "--output"]
    again, said = call([sys.executable, *evaluate, str(tmp_path / "a")], tmp_path / "one")
    assert again["attacks"] == ran["attacks"] and "attack: " not in said, "all of it was kept"
    launch = ["accelerate", "launch", "--config_file", "launch/cpu.yaml"]
    two, said = call([*launch, *evaluate, str(tmp_path / "b")], tmp_path / "two")
    assert said.count("attack: ") == 9
    for mine, theirs in zip(ran["attacks"], two["attacks"], strict=True):
        for column in ("before", "after", "retrained"):
            assert mine["curves"][column]["x"] == theirs["curves"][column]["x"]
            np.testing.assert_allclose(mine["curves"][column]["y"], theirs["curves"][column]["y"], atol=2e-3)
    removal = ran["attacks"][2]
    assert removal["gap"]["came_back"] > 0.9 and removal["gap"]["leaks"] and "Only merged weights" in removal["finding"]
    assert (
        0 <= ran["robustness"]["value"] <= 1
        and "Only merged weights may be released, or none." in (run / "report.html").read_text()
    )
