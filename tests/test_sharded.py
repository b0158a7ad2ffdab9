"""Training with the model spread over processes (FSDP2): the same weights as in one process, whatever is trained, and what is
refused before anything is read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import NPO_AND_NLL, RECIPE, ROOT, adapted, job, log, rules, straight_and_resumed, weights
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from llm_unlearn import recipe
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.models.load import trainable
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.likelihood import NLL, Ascent
from llm_unlearn.objectives.representation import RMU, EmbedMatch
from llm_unlearn.objectives.terms import Term
from llm_unlearn.run import run, start
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused
from llm_unlearn.training import sharded
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import Training, train

GRAD_DIFF = {"forget": Term(loss=Ascent(), weight=0.7), "retain": Term(loss=NLL(), weight=1.5)}
SMALL: dict[str, Any] = {"optimizer": "sgd", "lr": 0.01, "clip": None, "batch_tokens": 60}
"""Micro-batches so small that processes have different numbers of them, and some with rows of one stream only."""
ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

Make = Callable[..., Any]


def cases() -> dict[str, tuple[Job, Callable[[Make], Any]]]:
    """Name -> what is trained, and the model that it is trained on."""
    tamed = SMALL | {"lr": 2e-3}
    deep: dict[str, Any] = {"num_hidden_layers": 3}
    rmu = {"forget": Term(loss=RMU(layer=0, c=3.0)), "retain": Term(loss=KL())}
    early = {"forget": Term(loss=RMU(layer=0, c=3.0)), "retain": Term(loss=EmbedMatch(layers=(1,)))}
    stop, harmful = Stop(budget=Harm(retain_perplexity=1.001), every=1, rows=5, patience=2), {"forget": GRAD_DIFF["forget"]}
    return {
        "npo and kl, lora": (job(reference="adapter_off", **SMALL), lambda make: adapted(make, 0.02)),
        "npo and nll, lora": (job(terms=NPO_AND_NLL, **SMALL), lambda make: adapted(make, 0.02)),
        "recomputed, lora": (job(steps=2, gradient_checkpointing=True, **SMALL), lambda make: adapted(make, 0.02)),
        "grad_diff": (job(terms=GRAD_DIFF, **(SMALL | {"lr": 0.05, "clip": 0.5})), lambda make: make()),
        "npo and kl, tied": (job(**tamed), lambda make: make(tie_word_embeddings=True)),
        "two depths": (job(terms=rmu, **SMALL), lambda make: adapted(make, 0.02, **deep)),
        "never to the top": (job(terms=early, **SMALL), lambda make: adapted(make, 0.02, **deep)),
        "best weights": (job(steps=6, terms=harmful, stop=stop, **(SMALL | {"lr": 0.02, "clip": 0.5})), lambda make: make()),
        **{
            f"rule {name}": (job(steps=2, terms=GRAD_DIFF, rules=rules(name, Path()), **tamed), lambda make: make())
            for name in sharded.RULES
        },
    }


# ---------------------------------------------------------------------------------------------- on two processes (processes.py)


@contextmanager
def as_launched() -> Iterator[None]:
    """Inside, these processes are as launch/fsdp2_cpu.yaml starts them."""
    AcceleratorState._reset_state()
    with patch.dict(os.environ, ASKED):
        start(Model(base="embedded:target"))
        yield
    AcceleratorState._reset_state()
    Accelerator(cpu=True)


def train_and_save(folder: Path, make: Make) -> None:
    """What the tests below read."""
    here = Accelerator()
    begin, found_sharded = Training.__init__, list[bool]()

    def spread(self: Training, *given: Any) -> None:
        begin(self, *given)
        found_sharded.append(all(isinstance(weight, DTensor) for weight in trainable(self.net).values()))

    with patch.object(Training, "__init__", spread):
        for name, (wanted, build) in cases().items():
            model = build(make)
            with sharded.spread():
                outcome = train(wanted, model, Accelerator(), folder / name)
                found = weights(model)
            torch.save((found, (outcome.status, outcome.step, outcome.kept)), folder / f"{name}.{here.process_index}.pt")
        for name, (wanted, build) in resumed().items():
            with sharded.spread():
                both = straight_and_resumed(wanted, partial(build, make), folder / name, 3)
                torch.save([weights(model) for model in both], folder / f"{name}.{here.process_index}.pt")
        if here.is_main_process:
            write_base(folder, make)
        here.wait_for_everyone()
        carry_out(folder)
    assert found_sharded.count(True) == len(cases()) + 3 * len(resumed()) + len(RUNS)
    assert not all(found_sharded), "an attack trains as in any other launch"


def resumed() -> dict[str, tuple[Job, Callable[[Make], Any]]]:
    """Runs whose power is cut; what is looked at is kept with the checkpoint."""
    settings: dict[str, Any] = {"steps": 5, "checkpoint_every": 2, "batch_tokens": 60}
    settings["stop"] = Stop(budget=Harm(retain_perplexity=100.0), every=2, rows=4)
    return {
        "resumed, lora": (job(**settings), adapted),
        "resumed, whole": (job(terms=GRAD_DIFF, **(settings | {"lr": 1e-3})), lambda make: make()),
    }


RUN = """\
output: {folder}/{name}
model: {{base: {folder}/{base}, adapter: {adapter}}}
data:
  forget: {{source: embedded:forget, prompt: question, answer: answer, limit: 8}}
  retain: {{source: embedded:retain, prompt: question, answer: answer, limit: 10}}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: kl}}}}
train: {{steps: 3, lr: 1.0e-2, optimizer: sgd, warmup: 0.0, window: {{forget: 5, retain: 7}}, batch_tokens: 200}}
"""
SUITE = """\
sets: {forget: {source: embedded:forget, prompt: question, answer: answer, limit: 6}}
measures: [{name: perplexity, set: forget}]
attacks: [{name: relearning, set: forget, steps: 2, lr: 1.0e-3}]
"""
RUNS = {"lora": ("base", "{rank: 4}"), "whole": ("base", "null"), "tied": ("tied_base", "null")}


def write_base(folder: Path, make: Make) -> None:
    """Two models, a suite and the recipes; by one process, as another might read a file while it is written."""
    for base, tied in (("base", False), ("tied_base", True)):
        make(hidden_size=64, tie_word_embeddings=tied).save_pretrained(folder / base)
        make_tokenizer().save_pretrained(folder / base)
    (folder / "suite.yaml").write_text(SUITE)
    for name, (base, adapter) in RUNS.items():
        (folder / f"{name}.yaml").write_text(RUN.format(folder=folder, name=name, base=base, adapter=adapter))


def carry_out(folder: Path) -> None:
    """Whole runs; two of them with what is measured before and after."""
    for name in RUNS:
        measured = name != "tied"
        wanted = recipe.load(folder / f"{name}.yaml", [f"evaluation.suite={folder / 'suite.yaml'}"] if measured else [])
        run(wanted, suites.load(folder / "suite.yaml") if measured else None, cache=folder)


@pytest.mark.slow
@pytest.mark.two_processes("sharded")
@pytest.mark.parametrize("name", cases())
def test_the_weights_are_those_of_one_process(name: str, two_processes: Path, make_model: Make, tmp_path: Path) -> None:
    wanted, build = cases()[name]
    model = build(make_model)
    before = weights(model)
    outcome = train(wanted, model, Accelerator(cpu=True), tmp_path)
    exact = weights(model)
    if name == "best weights":
        assert 0 < outcome.kept < outcome.step
    for rank in (0, 1):
        found, ended = torch.load(two_processes / f"{name}.{rank}.pt")
        assert ended == (outcome.status, outcome.step, outcome.kept)
        assert torch.allclose(found, exact, rtol=0, atol=1e-5)
    moved = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert len(before) != len(exact) or float((exact - before).abs().max()) > 5e-4, "nothing was trained"
    assert name != "grad_diff" or {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= moved.keys()
    for mine, theirs in zip(log(tmp_path), log(two_processes / name), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(math.isclose(mine[key], theirs[key], rel_tol=1e-4, abs_tol=1e-5) for key in mine), (mine, theirs)


@pytest.mark.slow
@pytest.mark.two_processes("sharded")
@pytest.mark.parametrize("name", resumed())
def test_a_resumed_run_has_the_same_bits(name: str, two_processes: Path) -> None:
    for rank in (0, 1):
        straight, again = torch.load(two_processes / f"{name}.{rank}.pt")
        assert torch.equal(straight, again)
    assert log(two_processes / name / "straight") == log(two_processes / name / "cut")
    saved = two_processes / name / "straight" / "checkpoints" / "step-000004"
    kept = load_file(saved / "trainable.safetensors")
    assert sum(weight.numel() for weight in kept.values()) == len(straight)
    assert not [path for path in saved.rglob("*") if "pytorch_model" in path.name], "frozen weights in a checkpoint"


@pytest.mark.slow
@pytest.mark.two_processes("sharded")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a property that transformers has renamed
def test_what_is_saved_is_what_one_process_saves(name: str, two_processes: Path, make_model: Make, tmp_path: Path) -> None:
    """By plain transformers and peft; and the numbers after, those of an attack that trains included."""
    write_base(tmp_path, make_model)
    base, adapter = RUNS[name]
    with patch.dict(RUNS, {name: (base, adapter)}, clear=True):
        carry_out(tmp_path)
    ids = torch.arange(4, 40)[None]
    made = []
    for folder in (tmp_path, two_processes):
        where = folder / name / ("model" if adapter == "null" else "adapter")
        model: Any = AutoModelForCausalLM.from_pretrained(where if adapter == "null" else folder / base)
        model = model if adapter == "null" else PeftModel.from_pretrained(model, where)
        with torch.no_grad():
            made.append(model(input_ids=ids).logits)
    weights_of = [sorted(load_file(next((folder / name).glob("*/*.safetensors")))) for folder in (tmp_path, two_processes)]
    assert weights_of[0] == weights_of[1]
    before: Any = AutoModelForCausalLM.from_pretrained(tmp_path / base)
    with torch.no_grad():
        assert float((before(input_ids=ids).logits - made[0]).abs().max()) > 1e-2
    assert torch.allclose(*made, rtol=0, atol=1e-4)
    if name == "tied":
        return
    one, two = (json.loads((folder / name / "evaluation.json").read_text()) for folder in (tmp_path, two_processes))
    assert two["run"]["processes"] == 2 and len(one["attacks"]) == len(two["attacks"]) > 0
    for mine, theirs in zip(one["numbers"], two["numbers"], strict=True):
        for column in ("before", "after"):
            assert mine["values"][column]["value"] == pytest.approx(theirs["values"][column]["value"], rel=1e-4)


@pytest.mark.slow
def test_the_launch_file_shards(tmp_path: Path, make_model: Make) -> None:
    """As a user types it: the run ends well, and one that could not be sharded is refused by the process that speaks."""
    write_base(tmp_path, make_model)
    file = tmp_path / "lora.yaml"
    file.write_text(RUN.format(folder=tmp_path, name="lora", base="base", adapter="{rank: 4}"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "fsdp2_cpu.yaml")]
    words = [*launch, "-m", "llm_unlearn", "run", str(file)]
    refused = subprocess.run(
        [*words, "evaluation={suite: eval/quick.yaml, every: 1}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert "evaluation.suite: retrained: " in refused.stderr and not (tmp_path / "lora").exists()


# -------------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def nothing_begun() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ASKED, r"asks for FSDP, and Accelerate made NO of this process.*--config_file launch/fsdp2\.yaml"),
        (ASKED | {"FSDP_VERSION": "1"}, r"FSDP version 1; give fsdp_version: 2"),
        (ASKED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, r"fsdp_cpu_ram_efficient_loading: .*give false"),
        (ASKED | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"fsdp_activation_checkpointing: .*train\.gradient_checkpointing"),
        (ASKED | {"FSDP_OFFLOAD_PARAMS": "true"}, r"fsdp_offload_params: .*give false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed, which is not supported; launch/fsdp2\.yaml"),
    ],
)
@pytest.mark.usefixtures("nothing_begun")
def test_what_the_launch_asks_and_cannot_have_is_refused(asked: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=said):
        start(Model(base="embedded:target"))
    for name in asked:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert start(Model(base="embedded:target")).num_processes == 1 and not sharded.is_asked()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective=null; model.adapter=null; method={name: dampening, alpha: [0.5]}", "method: dampening needs whole weights"),
        ("model.quantize=nf4", "model.quantize: quantized weights are not sharded"),
        ("model.adapter={init: fila}", "model.adapter.init: fila"),
        ("train.compile=layers", "train.compile: compiled layers were not tried"),
        ("train.offload=activations", "train.offload: weights that are gathered"),
        ("train.micro_batch=auto", "train.micro_batch: one process may run out of memory"),
        ("train.optimizer=adamw_8bit", "train.optimizer: 8-bit states are not sharded"),
        ("train.privacy={noise: 1.0, delta: 1.0e-4, clip: 1.0}", "train.privacy: no process"),
        ("train.rules=[{name: saliency}]", "train.rules: saliency: it needs whole weights"),
        ("train.rules=[{name: project, ema: 0.5}]", "train.rules: project.ema: what it remembers"),
        ("evaluation={suite: eval/quick.yaml, every: 2}", "evaluation.every: looks need the whole model"),
        ("objective.forget.loss={name: repnoise, layers: [0]}", "objective.forget: it compares all rows of a window"),
    ],
)
def test_what_cannot_be_sharded_is_refused(override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    wanted = recipe.load(path, override.split("; "))
    sharded.check(wanted)
    monkeypatch.setattr(sharded, "is_asked", lambda: True)
    with pytest.raises(Refused) as refused:
        sharded.check(wanted)
    assert str(refused.value).startswith(said) and "the launch asks for FSDP" in str(refused.value)
    sharded.check(recipe.load(path))
