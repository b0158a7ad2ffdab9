"""Bases whose files are quantized already: they run as what they are, or are refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_cases import write_case

from llm_unlearn.cli import main
from llm_unlearn.models.forms import Again
from llm_unlearn.models.load import load
from llm_unlearn.models.quantized import is_quantized
from llm_unlearn.sections import Model

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
FORMATS = {
    "nf4": transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> a folder as repositories of quantized weights hold it."""
    made = {}
    for name, settings in FORMATS.items():
        folder = made[name] = tmp_path_factory.mktemp("quantized") / name
        net = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=settings, device_map={"": "cpu"})
        net.save_pretrained(folder)
        for file in tiny_base.glob("tokenizer*"):
            shutil.copy(file, folder)
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_is_trained_on_what_the_base_is(
    name: str, quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_case(tmp_path, quantized[name])
    assert main(["plan", str(recipe)]) == 0
    assert f"over {name} (as the base is)" in capsys.readouterr().out
    assert main(["run", str(recipe)]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["run"]["quantization"] == f"{name} (as the base is)"
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["retain"] == pytest.approx(0.0, abs=1e-5), "the untouched adapter changes nothing"
    assert main(["evaluate", str(tmp_path / "suite.yaml"), "--model", str(quantized[name])]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "perplexity" in line).split()[-1]
    assert float(shown.replace(",", "")) > 100, "of a random model"


REFUSED: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "full weights": ("int8", {"adapter": None}, [], "quantized weights cannot be trained; give model.adapter, or a base"),
    "another format": ("int8", {"quantize": "nf4"}, [], "found nf4, and the weights of .* are int8 already"),
    "fila": ("nf4", {"adapter": {"init": "fila"}}, [], "needs gradients of the base weights"),
    "a copy": ("nf4", {}, ["train.reference=copy"], "quantized weights cannot be copied"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_training(
    name: str, quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    base, model, words, said = REFUSED[name]
    recipe = write_case(tmp_path, quantized[base], **model)
    told = []
    for verb in ("plan", "run"):
        assert main([verb, str(recipe), *words]) == 2
        told.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert told[0] == told[1] and re.search(said, told[0]), told
    assert not (tmp_path / "run").exists()


def test_a_method_without_its_package_is_said(
    quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(quantized["nf4"], tmp_path / "gptq")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (base / "config.json").write_text(json.dumps(config))
    recipe = write_case(tmp_path, base)
    for words in (["plan", str(recipe)], ["run", str(recipe)], ["evaluate", str(tmp_path / "suite.yaml"), "--model", str(base)]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "its weights are gptq, which cannot be read here (" in told and "Install what it names" in told, told


def test_merged_forms_of_a_quantized_base(quantized: dict[str, Path], tmp_path: Path) -> None:
    """An adapter is merged into weights in full precision, which are quantized again; never into quantized ones."""
    recipe = write_case(tmp_path, quantized["nf4"])
    assert main(["run", str(recipe), "evaluation=null"]) == 0
    again = Again(Model(base=str(quantized["nf4"]), adapter=None), str(tmp_path / "run" / "adapter"), CPU)
    merged, beside = again(merged=True), again()
    assert is_quantized(merged.causal) and is_quantized(beside.causal)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        one, other = (loaded.model(input_ids=ids).logits for loaded in (merged, beside))
    assert float((one - other).norm() / other.norm()) < 0.05
    assert main(["run", str(recipe), f"model.start={tmp_path / 'run' / 'adapter'}", f"output={tmp_path / 'next'}"]) == 2


def test_a_model_in_full_precision_is_not_quantized(tiny_base: Path, make_model: Callable[..., Any]) -> None:
    assert not is_quantized(load(Model(base=str(tiny_base), adapter=None), CPU).causal)
