"""The main job on small models of the architectures that transformers brings, against plain transformers and peft; and whether
docs/models.md says what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PAGE_FILE, REFUSED_HEAD, Bench, claims, command, examine, lines_in
from small_models import POPULAR, small_config, small_model
from transformers import AutoModelForCausalLM

from llm_unlearn.models.decoding import Decoding, decoding_of
from llm_unlearn.models.structure import check_decoder
from llm_unlearn.models.trials import check_depth, check_head
from llm_unlearn.spec import Refused

PAGE = PAGE_FILE.read_text(encoding="utf-8")
LINES, REFUSED = lines_in(PAGE), lines_in(PAGE, REFUSED_HEAD)
ENCODERS = ("bert", "roberta", "electra", "big_bird")


def each(kinds: Iterable[str]) -> list[Any]:
    """Parameters of a test; the popular ones run in CI."""
    return [pytest.param(kind, marks=() if kind in POPULAR else pytest.mark.long) for kind in kinds]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.of(tmp_path_factory.mktemp("bench"))


def test_the_page_has_the_popular_architectures() -> None:
    assert sorted(POPULAR - LINES.keys() - REFUSED.keys()) == []
    assert len(POPULAR & LINES.keys()) >= 40


@pytest.mark.parametrize("kind", each(LINES))
def test_an_architecture_computes_what_transformers_and_peft_compute(kind: str, bench: Bench, tmp_path: Path) -> None:
    assert examine(kind, bench, tmp_path) == ""


@pytest.mark.parametrize("kind", each(LINES))
def test_the_page_says_what_an_architecture_can_do(kind: str) -> None:
    claimed = claims(kind)
    assert claimed == {name: LINES[kind][name] for name in claimed}, "python tests/architectures.py NAME --write"


@pytest.mark.long
@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_is_refused_as_the_page_says(kind: str, bench: Bench, tmp_path: Path) -> None:
    assert examine(kind, bench, tmp_path).endswith(REFUSED[kind]["reason"])


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused_alike_by_plan_and_run(kind: str, bench: Bench, tmp_path: Path) -> None:
    found = examine(kind, bench, tmp_path)
    assert "its layers read the tokens that follow" in found or "its head has layers of its own" in found


def test_a_head_with_layers_of_its_own_is_refused() -> None:
    config = small_config("bert")
    config.is_decoder = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Refused, match="its head has layers of its own"):
        check_decoder(model)


@pytest.mark.parametrize("kind", ["cpmant", "deepseek_v32", "deepseek_v4", "xlnet"])
def test_a_model_that_reads_the_tokens_that_follow_is_refused(kind: str) -> None:
    with pytest.raises(Refused, match="its states depend on the tokens that follow"):
        check_head(small_model(kind))


def test_layers_with_several_states_for_a_token_are_not_ended_early() -> None:
    with pytest.raises(Refused, match="do not return one hidden state for each token"):
        check_depth(small_model("gemma3n_text"), (0,))


def test_a_model_that_ignores_padding_is_not_padded() -> None:
    assert decoding_of(small_model("rwkv")) == Decoding(cached=True, padded=False)
    assert decoding_of(small_model("llama")) == decoding_of(small_model("gpt_oss")) == Decoding()


def test_a_command_that_fails_keeps_its_words(tmp_path: Path) -> None:
    found = command("plan", str(tmp_path / "none.yaml"))
    assert found.code == 2 and "none.yaml" in found.errors
