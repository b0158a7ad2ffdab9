"""Bases that a recipe makes, and further sets that are kept beside the retain set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llm_unlearn import recipe
from llm_unlearn.cli import main
from llm_unlearn.data.reading import read_examples
from llm_unlearn.requests.derived import Data
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused

COLUMNS = "prompt: question, answer: answer"
LEARN = """\
output: {folder}/learn
model: {{base: {base}, adapter: {{rank: 4, alpha: 8}}}}
data: {{forget: {{source: embedded:forget, {columns}, limit: 4}}, retain: {{source: embedded:retain, {columns}, limit: 4}}}}
objective: {{forget: {{loss: {{name: nll}}}}, retain: {{loss: {{name: nll}}}}}}
train: {{steps: 2, lr: 0.05, window: {{forget: 2, retain: 2}}}}
"""
FORGET = """\
output: {folder}/run
model: {{base: {folder}/learn.yaml, adapter: {{rank: 2, alpha: 4}}}}
data:
  forget: {{source: embedded:forget, {columns}, limit: 4}}
  retain: {{source: embedded:retain, {columns}, limit: 4}}
  streams:
    general: {{source: embedded:general, {columns}, limit: 6}}
objective:
  forget: {{loss: {{name: npo}}}}
  retain: {{loss: {{name: nll}}}}
  general: {{loss: {{name: kl}}, weight: 3}}
train: {{steps: 2, lr: 0.01, window: {{forget: 2, retain: 2, general: 3}}}}
"""


@pytest.fixture
def asked(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose base is the model of another recipe, and which keeps a third set."""
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    for name, text in (("learn.yaml", LEARN), ("forget.yaml", FORGET)):
        (tmp_path / name).write_text(text.format(folder=tmp_path, base=tiny_base, columns=COLUMNS))
    return tmp_path / "forget.yaml"


def weights_of(folder: Path) -> Any:
    return load_file(folder / "model.safetensors")


def test_a_recipe_as_base_is_trained_once_and_then_unlearned(
    asked: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(asked)]) == 0
    said = capsys.readouterr().out
    assert f"base       {tmp_path}/learn.yaml: is trained on first use, and kept in the cache" in said
    assert not (tmp_path / "cache/retrained").exists(), "plan trains nothing"
    assert main(["run", str(asked)]) == 0
    assert f"first use: training the model of {tmp_path}/learn.yaml" in capsys.readouterr().out
    (made,) = (tmp_path / "cache/retrained").glob("*/model")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not weights_of(made)[key].equal(weights_of(tiny_base)[key]), "the base has learned"
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert main(["run", str(asked), f"output={tmp_path}/again"]) == 0
    assert "first use" not in capsys.readouterr().out and (made / "model.safetensors").stat().st_mtime_ns == before
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(first[name].equal(second[name]) for name in first)
    assert main(["plan", str(asked), f"output={tmp_path}/third"]) == 0
    assert "learn.yaml: is in the cache" in capsys.readouterr().out


def test_another_base_recipe_is_another_model(asked: Path, tmp_path: Path) -> None:
    from llm_unlearn.bases import home_of

    first = home_of(recipe.load(tmp_path / "learn.yaml"), tmp_path)
    assert home_of(recipe.load(tmp_path / "learn.yaml", ["output=elsewhere"]), tmp_path) == first
    assert home_of(recipe.load(tmp_path / "learn.yaml", ["train.lr=0.01"]), tmp_path) != first
    on_top = home_of(recipe.load(asked), tmp_path)
    (tmp_path / "learn.yaml").write_text((tmp_path / "learn.yaml").read_text().replace("steps: 2", "steps: 3"))
    assert home_of(recipe.load(asked), tmp_path) != on_top, "what the base was made from decides, too"


def test_a_base_recipe_that_is_not_there_is_refused(asked: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"model\.base: .*none\.yaml"):
        recipe.load(asked, [f"model.base={tmp_path}/none.yaml"])


def test_a_further_set_has_its_own_term_window_and_log(asked: Path, tmp_path: Path) -> None:
    wanted = recipe.load(asked)
    assert wanted.window == {"forget": 2, "retain": 2, "general": 3}
    assert main(["run", str(asked)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps[0]["general"] == 0.0, "the KL of a model to itself"
    assert steps[1]["general"] > 0.0
    assert recipe.load(tmp_path / "run/recipe.yaml", check=False).data.streams == wanted.data.streams


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.general=null", r"data: general: |data\.general: no loss reads this stream"),
        ("objective.general.stream=genral", r"did you mean 'general'"),
        ("train.window.genral=2", r"train\.window\.genral: no such stream; did you mean 'general'"),
        ("data.streams.general.prompt=null", r"data\.streams\.general: found answer alone"),
        (
            "data.streams={holdout: {source: embedded:general, prompt: question, answer: answer}}",
            r"data\.streams\.holdout: must be",
        ),
    ],
)
def test_a_wrong_further_set_is_refused(override: str, said: str, asked: Path) -> None:
    with pytest.raises(Refused, match=said):
        recipe.load(asked, [override])


def test_rows_to_forget_leave_every_set_that_is_kept(tokenizer: Any) -> None:
    columns = {"prompt": "question", "answer": "answer"}
    forget, retain = Source(source="embedded:forget", **columns), Source(source="embedded:retain", **columns)
    with pytest.raises(Refused, match="40 of 40 more rows also stand in the forget set"):
        read_examples(Data(forget=forget, retain=retain, streams={"more": forget}), tokenizer, 0)
    general = Source(source="embedded:general", **columns)
    found = read_examples(Data(forget=forget, retain=retain, streams={"general": general}), tokenizer, 0)
    assert found.overlap == 0 and list(found.streams) == ["forget", "retain", "general"]
    assert {one.stream for one in found.streams["general"]} == {"general"}
