"""Models, adapters, data sets and checkpoints that somebody prepared: none runs anything, and each is refused with what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jobs import adapted, job

from llm_unlearn.chat import Chat
from llm_unlearn.data import rendering, sources
from llm_unlearn.data.examples import encode
from llm_unlearn.evaluation.kept import read_part
from llm_unlearn.models.load import load, read_config, read_tokenizer
from llm_unlearn.sections import Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.training import shards
from llm_unlearn.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that hostile code would write. Whoever is asked at the terminal whether it may run is told yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    path = tmp_path / "it-ran"
    yield path  # type: ignore[misc]
    assert not path.exists(), "code of the stranger was run"


def code(mark: Path) -> str:
    """Python that leaves a mark when it is imported, and offers whatever is asked of it."""
    return f"open({str(mark)!r}, 'w').close()\nclass Thing:\n    from_pretrained = classmethod(lambda *a, **k: None)\n"


class Bomb:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def stranger(tiny_base: Path, tmp_path: Path, mark: Path) -> Path:
    """A copy of a sound model with code of every kind beside it."""
    folder = tmp_path / "stranger"
    shutil.copytree(tiny_base, folder)
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "stranger", "custom_generate/generate"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code(mark))
    return folder


def told(folder: Path, file: str, **settings: Any) -> None:
    """Change a JSON file of a model."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


AUTO_MAP = {"AutoConfig": "configuration_evil.Thing", "AutoModelForCausalLM": "modeling_evil.Thing"}


def test_a_model_of_an_unknown_architecture_brings_code_that_never_runs(stranger: Path) -> None:
    told(stranger, "config.json", auto_map=AUTO_MAP, model_type="evil", architectures=["EvilForCausalLM"])
    for read in (read_config, lambda model: load(model, CPU)):
        with pytest.raises(
            Refused, match=r"(?s)stranger.*brings Python of its own, which is never run here; name a model of an arch"
        ):
            read(Model(base=str(stranger)))


def test_code_beside_a_known_architecture_is_left_alone(stranger: Path) -> None:
    told(stranger, "config.json", auto_map=AUTO_MAP)
    loaded = load(Model(base=str(stranger)), CPU)
    assert type(loaded.model).__module__.startswith("transformers."), "the library's own, not the stranger's"


@pytest.mark.parametrize("kind", ["EvilTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_brings_no_code(stranger: Path, kind: str) -> None:
    maps = {"AutoTokenizer": ["tokenization_evil.Thing", "tokenization_evil.Thing"]}
    told(stranger, "tokenizer_config.json", tokenizer_class=kind, auto_map=maps)
    try:
        assert type(read_tokenizer(Model(base=str(stranger)))).__module__.startswith("transformers.")
    except Refused as error:
        assert "never run here" in str(error)


def test_kernels_of_a_hub_are_code(stranger: Path) -> None:
    told(stranger, "config.json", attn_implementation="stranger/kernel")
    with pytest.raises(Refused, match=r"asks for the kernel 'stranger/kernel' of a hub, which is code"):
        load(Model(base=str(stranger)), CPU)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(stranger: Path, name: str, mark: Path) -> None:
    (stranger / "model.safetensors").unlink()
    (stranger / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(
        Refused, match=rf"weights are pickles \({name}\), which can run code.*Have whoever made it write safetensors"
    ):
        load(Model(base=str(stranger)), CPU)


@pytest.fixture
def adapter(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    adapted(make_model, 0.1).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_pickled_adapters_are_refused(tiny_base: Path, adapter: Path, mark: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(Refused, match=r"weights are pickles \(adapter_model\.bin\)"):
        load(Model(base=str(tiny_base)), CPU, str(adapter))


def test_an_adapter_imports_no_module(tiny_base: Path, adapter: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter.parent / "megatron").mkdir()
    (adapter.parent / "megatron" / "__init__.py").write_text("")
    (adapter.parent / "megatron" / "core.py").write_text(code(mark))
    monkeypatch.syspath_prepend(str(adapter.parent))
    told(adapter, "adapter_config.json", megatron_config={"a": 1}, megatron_core="megatron.core")
    with pytest.raises(Refused, match=r"megatron_config: has peft import a module"):
        load(Model(base=str(tiny_base)), CPU, str(adapter))
    sys.modules.pop("megatron", None)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% if %}",
    ],
)
def test_a_chat_template_sees_nothing_but_the_turns_and_comes_to_an_end(
    stranger: Path, template: str, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "LONGEST", 0.3)
    (stranger / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    tokenizer = read_tokenizer(Model(base=str(stranger)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Refused, match=r"chat template .*model\.chat_template"):
        encode([turns], tokenizer, Chat(), "forget", 64)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) and signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------------------------- data sets


def test_a_loading_script_beside_data_is_never_run(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    (folder / "other.py").write_text(code(mark))
    assert sources.rows(Source(source=str(folder), text="text")) == [{"text": "a row"}]
    (folder / "rows.py").write_text(code(mark))
    with pytest.raises(Refused, match=r"cannot be read as a data set.*scripts are no longer supported"):
        sources.rows(Source(source=str(folder), text="text"))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.py"])
def test_data_in_pickles_is_refused(tmp_path: Path, name: str, mark: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(Refused, match=r"cannot read a \.\w+ file; expected one of \.json"):
        sources.rows(Source(source=str(path), text="text"))


def test_kept_numbers_hold_no_pickle(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "part.npz"
    np.savez(path, json=np.array([Bomb(mark)], dtype=object))
    assert read_part(path) is None, "it is made again"


# ----------------------------------------------------------------------------------------------------------- checkpoints


def stopped(make_model: Callable[..., Any], folder: Path) -> Path:
    """A run that was stopped after two steps: its checkpoint."""
    train(job(steps=2, checkpoint_every=1), adapted(make_model), Accelerator(cpu=True), folder)
    (found,) = (folder / "checkpoints").glob("step-*")
    return found


FILES = ("progress.pt", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin")


def test_a_checkpoint_is_read_and_never_run(make_model: Callable[..., Any], tmp_path: Path, mark: Path) -> None:
    """Each file of one in turn is a pickle that would leave a mark."""
    place = stopped(make_model, tmp_path / "run")
    held = {path.name for path in place.iterdir()}
    assert {"progress.pt", "optimizer.bin", "trainable.safetensors"} <= held
    assert "custom_checkpoint_0.pkl" not in held, "Accelerate reads these without asking what they do"
    for name in sorted({*FILES, *held}):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run", folder)
        torch.save(Bomb(mark), tmp_path / "saved")
        for content in (pickle.dumps(Bomb(mark), protocol=2), (tmp_path / "saved").read_bytes()):
            (folder / "checkpoints" / place.name / name).write_bytes(content)
            with_it = adapted(make_model)
            try:
                train(job(steps=3), with_it, Accelerator(cpu=True), folder, resume=True)
            except Refused as error:
                known = ("not a checkpoint of this project", "of another version", "weights that cannot be read")
                assert any(one in str(error) for one in known)
            AcceleratorState._reset_state(reset_partial_state=True)
            assert not mark.exists(), name


@pytest.mark.parametrize("name", ["progress.pt", "optimizer.bin", "trainable.safetensors"])
def test_a_damaged_checkpoint_is_refused(name: str, make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Cut off, empty, and of something else."""
    place = stopped(make_model, tmp_path / "run")
    torch.save({"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]}, tmp_path / "foreign")
    whole = (place / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", (tmp_path / "foreign").read_bytes()):
        (place / name).write_bytes(content)
        with pytest.raises(Refused, match=r"step-000002: not a checkpoint of this project .*Remove it, or add --overwrite"):
            train(job(steps=3), adapted(make_model), Accelerator(cpu=True), tmp_path / "run", resume=True)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_shards_of_an_optimizer_are_looked_through(tmp_path: Path, mark: Path) -> None:
    """torch reads a sharded checkpoint's index, and all of it that is no tensor, as pickles that may run anything."""
    import torch.distributed.checkpoint as sharded

    def saved(name: str, rate: object) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there is one process
            state = {"optimizer": {"moment": torch.ones(3), "lr": rate}}
            sharded.save(state, storage_writer=sharded.FileSystemWriter(tmp_path / name), no_dist=True)
        return tmp_path / name

    shards.check(saved("sound", 0.1))
    hostile = saved("hostile", Bomb(mark))
    with pytest.raises(pickle.UnpicklingError):
        shards.check(hostile)
    (hostile / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(pickle.UnpicklingError, match=r"names posix\.mkdir"):
        shards.check(hostile)
    with pytest.raises(FileExistsError):  # as it would have gone
        mark.mkdir()
        pickle.loads((hostile / ".metadata").read_bytes())
    mark.rmdir()
