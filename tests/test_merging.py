"""Adapters that are merged: the merged model is the model with its adapter, also where head and embedding share their weight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_cases import write_case

from llm_unlearn.cli import main
from llm_unlearn.models import merging
from llm_unlearn.models.forms import Again
from llm_unlearn.models.load import load
from llm_unlearn.models.merging import merge_adapter
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


def make_adapter(folder: Path, base: Any, *targets: str) -> Any:
    """An adapter of random weights, as peft writes it."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, on tied weights
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora" in name:
                    weight.normal_(0, 0.2)
        model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "q_proj"), ("q_proj",)])
def test_merged_logits_are_those_of_base_and_adapter(
    targets: tuple[str, ...], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_model(hidden_size=64, tie_word_embeddings=True).save_pretrained(base)
    tokenizer.save_pretrained(base)
    plain = load(Model(base=str(base), adapter=None), CPU).model
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    model = make_adapter(tmp_path / "adapter", plain, *targets)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    adapter = str(tmp_path / "adapter")
    started = load(Model(base=str(base), start=adapter, adapter=None), CPU)
    released = Again(Model(base=str(base), adapter=None), adapter, CPU)(merged=True)
    started.model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load(Model(base=str(tmp_path / "saved"), adapter=None), CPU)
    for loaded in (started, released, saved):
        with torch.no_grad():
            assert torch.allclose(loaded.model(input_ids=IDS).logits, expected, atol=1e-4)
    tied = "lm_head" not in targets and "embed_tokens" not in targets
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")  # of peft, which is right
def test_a_merge_that_changes_the_model_is_refused(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_adapter(tmp_path / "adapter", make_model(tie_word_embeddings=True), "lm_head")
    monkeypatch.setattr(merging, "_untie", lambda net: None)
    with pytest.raises(Refused, match=r"a: merged into its base it gives other logits, .* % apart"):
        merge_adapter(model, "a")


def test_a_run_starts_from_an_adapter_on_a_tied_head(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(hidden_size=64, tie_word_embeddings=True).save_pretrained(base)
    tokenizer.save_pretrained(base)
    make_adapter(tmp_path / "adapter", load(Model(base=str(base), adapter=None), CPU).model, "lm_head")
    recipe = write_case(tmp_path, base, start=str(tmp_path / "adapter"))
    assert main(["run", str(recipe), "evaluation=null"]) == 0
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["retain"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("wrong", "refused"), [((2,), False), ((0, 1, 2, 3, 4), True)])
def test_a_merge_is_wrong_where_most_sequences_say_so(
    wrong: tuple[int, ...], refused: bool, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ill-conditioned sequence is rounding: on SmolLM2, float32 rounds some logits by 1e-3."""
    model = make_adapter(tmp_path, make_model(hidden_size=64), "q_proj")
    logits, exact = [], merging._logits

    def rounded(net: Any) -> torch.Tensor:
        logits.append(exact(net))
        if len(logits) == 2:
            logits[1][list(wrong)] *= 1.01
        return logits[-1]

    monkeypatch.setattr(merging, "_logits", rounded)
    if refused:
        with pytest.raises(Refused, match=r"merged into its base it gives other logits, 1 % apart"):
            merge_adapter(model, "a")
    else:
        merge_adapter(model, "a")
    assert logits[0].shape[:2] == (5, 8)
