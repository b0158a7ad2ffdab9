"""What tests share: tiny random models on disk, and the embedded models, trained once for all test processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
os.environ.setdefault("LLM_UNLEARN_CACHE", str(ROOT / ".cache"))  # one for the tests and all that they start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what is simply broken is said within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """(name, make) -> a folder that `make` filled, once for all test processes: by whichever asks first, while others wait."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    here = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        place, failed = here / name, here / f"{name}.failed"
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                place.mkdir()
                try:
                    make(place)
                except BaseException as error:
                    failed.write_text(f"{name}: {error}")
        assert not failed.exists(), failed.read_text()
        return place

    return made


@pytest.fixture
def two_processes(request: pytest.FixtureRequest, made_once: MadeOnce) -> Path:
    """What `processes.py` made of the kind in the test's mark, on two processes. They are started once for all kinds that are asked
    for, since starting takes longer than most of what they do."""
    from jobs import on_processes

    marks = (item.get_closest_marker("two_processes") for item in request.session.items)
    kinds = sorted({str(mark.args[0]) for mark in marks if mark})
    place = made_once("two_processes", lambda place: on_processes(2, "processes.py", str(place), *kinds))
    mark = request.node.get_closest_marker("two_processes")
    return place / str(mark.args[0])


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where the embedded models are kept between test runs."""
    return Path(os.environ["LLM_UNLEARN_CACHE"]).resolve()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from llm_unlearn.embedded.target import make_tokenizer

    return make_tokenizer()


def make_llama(seed: int = 0, vocabulary: int = 1024, **changes: Any) -> Any:
    """A random Llama with grouped heads and an untied output head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return make_llama


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A folder with a tiny random model and the embedded tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(hidden_size=64).save_pretrained(folder)  # nf4 on a CPU wants sizes that divide by 32
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded(cache: Path) -> dict[str, Path]:
    """The embedded target and retrained model; trained on first use, under a lock."""
    from llm_unlearn.embedded.target import models

    return models(cache, show=False)
