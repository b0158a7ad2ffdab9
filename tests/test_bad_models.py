"""Bad models: weights, settings, tokenizers and adapters that are broken, or belong to another model. Each is refused by the name
of its folder, nothing is changed, and nothing of it is run."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import content, refusal
from bad_models import ADAPTERS, CONFIG, LORA, MODELS, WEIGHTS, Break, bytes_of, changed, flip, text

from llm_unlearn.data.reading import read_examples
from llm_unlearn.models import load as loading
from llm_unlearn.models.sound import weights_in
from llm_unlearn.sections import Data, Model
from llm_unlearn.source import Source

CPU = torch.device("cpu")
HARMLESS = {"generation config: broken", "tokenizer: more words than the model", "tokenizer: unknown kind"}
"""Defects in what nothing reads; of a vocabulary, the tokens that rows use."""
UNREAD = {"config: unknown key"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A model and an adapter of it."""
    import peft

    folder = tmp_path_factory.mktemp("good")
    make_model(hidden_size=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # in every layer that there is
        config = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(make_model(hidden_size=64), config).save_pretrained(folder / "adapter")
    return folder


def said_of(good: Path, kind: str, change: Break, here: Path) -> str | None:
    """What is said of a copy that was broken; that nothing of it changes, and that it answers in numbers where it is taken."""
    shutil.copytree(good / kind, here / "bad")
    change(here / "bad")
    before = content(here)
    base = here / "bad" if kind == "model" else good / "model"

    def read() -> None:
        loaded = loading.load(Model(base=str(base)), CPU, None if kind == "model" else str(here / "bad"))
        with torch.no_grad():
            assert torch.isfinite(loaded.model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refusal(read)
    assert content(here) == before
    return said


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_model_is_refused(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    said = said_of(good, "model", MODELS[name], tmp_path)
    assert (said is None) == (name in HARMLESS), said
    assert said is None or (str(tmp_path / "bad") in said and len(said.split("\n")) == 1)
    assert "error" not in capfd.readouterr().err.lower(), "it is said once"


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    said = said_of(good, "adapter", ADAPTERS[name], tmp_path)
    assert (said is None) == (name in UNREAD), said
    assert said is None or (str(tmp_path / "bad") in said and len(said.split("\n")) == 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 128}, "no adapter that fits this model"),
        ({"num_hidden_layers": 1}, "which this model does not have"),
    ],
    ids=["wider", "shallower"],
)
def test_an_adapter_of_another_base_is_refused(
    change: dict[str, int], expected: str, good: Path, tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    """peft would put on what fits, and only warn: the model would answer as before, and be called one that has forgotten."""
    make_model(**({"hidden_size": 64} | change)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    said = refusal(lambda: loading.load(Model(base=str(tmp_path / "other")), CPU, str(good / "adapter")))
    assert said and expected in said and str(good / "adapter") in said


def test_no_code_of_a_folder_is_run(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "model", tmp_path / "bad")
    changed(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(tmp_path / "bad")
    text("own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")(tmp_path / "bad")
    assert refusal(lambda: loading.load(Model(base=str(tmp_path / "bad")), CPU)) and not (tmp_path / "ran").exists()


def test_what_is_lacking_is_named(good: Path, tmp_path: Path) -> None:
    said = said_of(good, "model", MODELS["weights: one lacking"], tmp_path) or ""
    assert "the files lack model.layers.0.self_attn.q_proj.weight; expected every weight" in said
    shutil.rmtree(tmp_path / "bad")
    said = said_of(good, "model", MODELS["config: wider"], tmp_path) or ""
    assert "is 1024×64 in the files, and config.json asks for 1024×128" in said


@pytest.mark.long
@pytest.mark.parametrize("name", [WEIGHTS, LORA])
def test_every_bit_of_a_header_turned_round(name: str, good: Path, tmp_path: Path) -> None:
    """A damaged header is refused, or says the same: of its 8 bytes of length and first 512 bytes, one bit each."""
    kind = "model" if name == WEIGHTS else "adapter"
    refused = 0
    for at in range(520):
        refused += said_of(good, kind, bytes_of(name, flip(at)), tmp_path) is not None
        shutil.rmtree(tmp_path / "bad")
    print(f"{name}: {refused} of 520 turned bits refused")
    assert refused > 500


@pytest.mark.parametrize("lacking", ["pad_token", "eos_token", "bos_token", "chat_template"])
def test_a_tokenizer_that_lacks_something_still_serves(lacking: str, good: Path, tmp_path: Path) -> None:
    """Nothing of these is needed: rows are laid out plainly, padding is never read, and what ends a turn is the template's."""
    shutil.copytree(good / "model", tmp_path / "m")
    changed("tokenizer_config.json", **{lacking: None})(tmp_path / "m")
    if lacking == "chat_template":
        (tmp_path / "m" / "chat_template.jinja").unlink()
    tokenizer = loading.load(Model(base=str(tmp_path / "m")), CPU).tokenizer
    assert lacking == "chat_template" or getattr(tokenizer, lacking) is None
    found = read_examples(Data(forget=Source(source="embedded:forget", prompt="question", answer="answer")), tokenizer, 0)
    assert found.streams["forget"] and all(one.targets for one in found.streams["forget"])


def test_a_weights_file_is_read_or_refused_wherever_it_is_read(tmp_path: Path) -> None:
    for name, whole in (("gone", None), ("empty", b""), ("short", b"\0\0"), ("text", b"hello, this is no weights file")):
        if whole is not None:
            (tmp_path / name).write_bytes(whole)
        said = refusal(lambda name=name: weights_in(tmp_path / name))
        assert said and str(tmp_path / name) in said


@pytest.mark.parametrize("file", ["missing", "a folder", "binary", "UTF-16", "no template"])
def test_a_chat_template_that_is_no_text_is_refused(file: str, good: Path, tmp_path: Path, tokenizer: Any) -> None:
    place = tmp_path / "t.jinja"
    match file:
        case "a folder":
            place.mkdir()
        case "binary":
            place.write_bytes(bytes(range(256)))
        case "UTF-16":
            place.write_text("{{ messages }}", encoding="utf-16")
        case "no template":
            place.write_text("{% for")
    model = Model(base=str(good / "model"), chat_template=str(place))
    data = Data(forget=Source(source="embedded:forget", prompt="question", answer="answer"))
    assert refusal(lambda: read_examples(data, loading.read_tokenizer(model), 0))
