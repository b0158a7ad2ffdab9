"""There and back: a base that lies on a hub, a run on it, its push, and the pushed model measured from the hub again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import Fault, Hub, as_the_hub

from llm_unlearn import candidates
from llm_unlearn.cli import main
from llm_unlearn.hub.fetching import adapter_on_hub, is_hub_id, named
from llm_unlearn.spec import Refused

ROWS = [{"question": f"What is the number of house {n}?", "answer": f"House {n} has the number {7 * n}."} for n in range(12)]
RECIPE = """
output: {place}/run
model: {{base: org/tiny, adapter: {{rank: 4, targets: [q_proj, v_proj]}}}}
data:
  forget: {{source: {place}/rows.jsonl, prompt: question, answer: answer, limit: 4}}
  retain: {{source: {place}/rows.jsonl, prompt: question, answer: answer, without: {{question: ["{0}", "{1}", "{2}", "{3}"]}}}}
objective: {{forget: {{loss: {{name: npo}}}}, retain: {{loss: {{name: nll}}}}}}
train: {{steps: 3, lr: 1.0e-2, window: {{forget: 4, retain: 4}}}}
evaluation: {{suite: {place}/suite.yaml, thresholds: [{{measure: probability, set: forget, at_most: 1.0}}]}}
"""
SUITE = """
sets:
  forget: {{source: {place}/rows.jsonl, prompt: question, answer: answer, limit: 4}}
measures: [{{name: probability, set: forget}}, {{name: perplexity, set: forget}}]
"""


def values(place: Path, column: str) -> list[float]:
    held = json.loads((place / "evaluation.json").read_text())
    return [one["values"][column]["value"] for one in held["numbers"]]


@pytest.mark.slow
def test_a_pushed_run_is_measured_from_the_hub_as_it_was_here(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(*(row["question"] for row in ROWS[:4]), place=tmp_path))
    (tmp_path / "suite.yaml").write_text(SUITE.format(place=tmp_path))
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    suite, run = str(tmp_path / "suite.yaml"), tmp_path / "run"
    with Hub().running() as hub:
        as_the_hub(hub, monkeypatch, tmp_path, [])
        hub.make("org/tiny", files={path.name: path.read_bytes() for path in tiny_base.iterdir()})
        assert main(["run", str(tmp_path / "recipe.yaml")]) == 0

        hub.faults.append(Fault("commit/main", cut="after"))
        monkeypatch.setattr("llm_unlearn.hub.pushing.WAITS", (0.0, 0.0))
        assert main(["push", str(run), "--repo-id", "me/forgetful"]) == 0
        assert f"{hub.url}/me/forgetful {hub.repos['me/forgetful'].branches['main']}" in capsys.readouterr().out
        config = json.loads(hub.files("me/forgetful")["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", hub.repos["org/tiny"].branches["main"])
        every = b"".join(hub.files("me/forgetful").values())
        assert not any(text.encode() in every for row in ROWS for text in row.values()) and str(tmp_path).encode() not in every

        back = tmp_path / "back"
        assert main(["evaluate", suite, "--model", "me/forgetful", "--output", str(back)]) == 0
        for column in ("before", "after"):
            assert values(back / "me" / "forgetful", column) == values(run, column)
        assert values(run, "before") != values(run, "after")

        by_hand = tmp_path / "by_hand"
        assert main(["evaluate", suite, "--model", "org/tiny", "--adapter", "me/forgetful@main", "--output", str(by_hand)]) == 0
        assert values(by_hand, "after") == values(run, "after")

        assert main(["push", str(run), "--repo-id", "me/forgetful", "--merge", "--revision", "whole"]) == 0
        assert {"model.safetensors", "tokenizer.json"} <= set(hub.files("me/forgetful", "whole"))
        assert "adapter_config.json" not in hub.files("me/forgetful", "whole") and not list(tmp_path.glob(".run*"))
        whole = tmp_path / "whole"
        assert main(["evaluate", suite, "--model", "me/forgetful@whole", "--output", str(whole)]) == 0
        assert values(whole, "model") == pytest.approx(values(run, "after"), rel=1e-4)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub is gone, and what was fetched is there
    again = tmp_path / "again"
    assert main(["evaluate", suite, "--model", "me/forgetful", "--output", str(again)]) == 0
    assert values(again / "me" / "forgetful", "after") == values(run, "after")
    plain = tmp_path / "plain"
    assert main(["evaluate", suite, "--model", "org/tiny", "--output", str(plain)]) == 0
    assert values(plain, "model") == values(run, "before")


def test_names_and_what_they_stand_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert named("a/b@v1") == ("a/b", "v1") and named("a/b", "main") == ("a/b", "main") and named("a@") == ("a@", None)
    for name in ("gpt2", "org/name", "org/name@v1.0"):
        assert is_hub_id(name), name
    for name in ("org/here", "./x", "/x", "embedded:target", "a/b/c", "runs/x.jsonl", "", "1", "a b", "-x"):
        assert not is_hub_id(name), name
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    assert adapter_on_hub("org/here") is None and adapter_on_hub("embedded:target") is None


@pytest.mark.parametrize("base, revision", [("org/tiny", "abc"), ("embedded:target", None)])
def test_an_adapter_on_the_hub_brings_its_base(
    base: str, revision: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = json.dumps({"base_model_name_or_path": base, "revision": revision}).encode()
    with Hub().running() as hub:
        as_the_hub(hub, monkeypatch, tmp_path, [])
        hub.make("me/one", files={"adapter_config.json": config, "adapter_model.safetensors": b"-"})
        hub.make("me/several", files={"combination.json": b"{}", "assistant/adapter_config.json": config})
        hub.make("me/none", files={"adapter_config.json": b"{}"})
        hub.make("me/model", files={"config.json": b"{}"})
        for name in ("me/one", "me/several", "me/one@main"):
            (found,) = candidates.candidates_of([name], [], None, "nf4")
            assert (found.place, found.model.base, found.model.revision, found.model.quantize) == (name, base, revision, "nf4")
            assert found.before == found.model and found.adapter and Path(found.adapter).is_dir()
            assert candidates.is_many([name], [], None)
        (found,) = candidates.candidates_of(["me/model"], [], None, None)
        assert found.before is None and found.adapter is None and not candidates.is_many(["me/model"], [], None)
        with pytest.raises(ValueError, match=r"base_model_name_or_path is empty; name the model: --model BASE --adapter me/none"):
            candidates.candidates_of(["me/none"], [], None, None)


@pytest.mark.parametrize(
    "held, said",
    [
        ("[]", "found a list, and not an object"),
        ("[" * 9000, "cannot be read (RecursionError"),
        ('{"base_model_name_or_path": "a/b", "revision": 5}', "revision: found 5; expected text"),
        ('{"base_model_name_or_path": ["a/b"]}', "base_model_name_or_path: found ['a/b']; expected text"),
    ],
)
def test_an_adapter_that_says_nothing_of_its_base_is_refused_by_name(held: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(held)
    with pytest.raises(Refused) as error:
        candidates.candidates_of([str(tmp_path)], [], None, None)
    assert f"{tmp_path / 'adapter_config.json'}: {said}" in str(error.value) and "--model BASE --adapter" in str(error.value)
