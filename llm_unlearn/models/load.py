"""A base model, whole or in four or eight bits, with its tokenizer and its adapter; and the model as it was.

This is the only place that knows peft and bitsandbytes. Weights are read from safetensors only, and code from a hub is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from llm_unlearn.data.examples import PLAIN_TEMPLATE, frugal
from llm_unlearn.folder import adapter_in
from llm_unlearn.hub.fetching import MODEL_FILES, SMALL_FILES, named
from llm_unlearn.lines import text_of
from llm_unlearn.models import combined, kernels, quantized, sound, strangers
from llm_unlearn.models.adapter_targets import targets_of
from llm_unlearn.models.merging import merge_adapter
from llm_unlearn.models.trainable_weights import check_adapted
from llm_unlearn.sections import Adapter, Model
from llm_unlearn.source import missing
from llm_unlearn.spec import Refused, fingerprint, reason

transformers_logging.set_verbosity_error()  # what a model lacks is refused, in words of ours (sound.py)
transformers_logging.disable_progress_bar()  # weights load in a moment; the bars here are those of our own long work


@dataclass(frozen=True)
class Loaded:
    """A model and what speaks its language."""

    model: Any  # a transformers causal LM, or peft's wrapper of one
    tokenizer: PreTrainedTokenizerBase
    parts: tuple[object, ...]
    """What its numbers depend on: chat template, precision, weights, adapter."""

    @property
    def identity(self) -> str:
        """Stands for all of `parts`; tables are kept under it."""
        return fingerprint(*self.parts)

    def become(self, model: Any, folder: Path, whole: bool) -> Loaded:
        """The same after training, saved in `folder`: as an adapter on these weights, or as a whole model in place of them."""
        head = self.parts[:3] if whole else self.parts
        return Loaded(model, self.tokenizer, (*head, folder_identity(folder)))

    @property
    def causal(self) -> Any:
        """The transformers model itself, without peft's wrapper; adapter layers act inside it."""
        return causal(self.model)


def causal(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def folder_of(name: str, revision: str | None = None, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The local folder of a model or adapter; of a hub id, the files of these kinds are downloaded into the hub's own cache.

    Raises:
        Refused: no such folder, and no such id on the hub.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if missing(name):
        raise Refused(f"{name}: no such folder (looked from {Path.cwd()}).")
    from huggingface_hub import constants, snapshot_download

    repo, revision = named(name, revision)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        why = "HF_HUB_OFFLINE is set, and it was not downloaded before" if constants.HF_HUB_OFFLINE else reason(error)
        absent = f"no such folder (looked from {Path.cwd()}), and no model of this name can be read from the hub"
        raise Refused(f"{name}: {absent} ({why}). Check the spelling.") from error


def read_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template in every case: the recipe's, its own, or the plain layout."""
    folder = folder_of(model.base, model.revision, SMALL_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # unsaid, it asks on the terminal
    except Exception as error:  # of a broken file, nearly anything
        raise Refused(f"{model.base}: no tokenizer can be read there ({strangers.why(error)}).") from error
    if not tokenizer.is_fast:
        raise Refused(f"{model.base}: its tokenizer has no fast version (tokenizer.json), which tells where an answer begins.")
    if model.chat_template:
        tokenizer.chat_template = text_of(Path(model.chat_template))
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return frugal(tokenizer)


def read_config(model: Model) -> Any:
    """Return the architecture of a model, every dropout of it 0 (`training_mode.py` says why).

    Raises:
        Refused: there is no config.json that transformers reads.
    """
    folder = folder_of(model.base, model.revision, SMALL_FILES)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a broken file, nearly anything
        raise Refused(f"{model.base}: no model can be read there ({strangers.why(error)}).") from error
    strangers.check_kernels(config, model.base)
    for part in strangers.parts_of(config):
        for name, value in vars(part).items():
            if RANDOM.search(name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


TIED = "Model has `tie_word_embeddings=True`"
"""Warning of peft about an adapter on a tied head; merging.py unties it before it is merged."""
RANDOM = re.compile("drop")
"""Names of settings that draw at random while a model is trained, such as `resid_pdrop`. Noise of routers is left as it is, as
Phi-3.5-MoE also routes by its size in evaluation mode; `training_mode.py` switches it off."""


def dtype_of(model: Model, device: torch.device) -> torch.dtype:
    """The precision of the computation: bf16 where the accelerator has it, else fp32, unless the recipe says which."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if model.precision == "bf16" or (model.precision == "auto" and able) else torch.float32


def load(
    model: Model, device: torch.device, adapter: str | None = None, train: bool = False, full_precision: bool = False
) -> Loaded:
    """Read a model onto a device.

    Args:
        adapter: a trained adapter to put on it (for evaluation).
        train: keep full weights that are to be trained in fp32; the computation's precision is autocast's business.
        full_precision: turn the weights of a base that is quantized already back, so that an adapter can be merged.

    Raises:
        Refused: the model, its tokenizer or the adapter cannot be used, and why.
    """
    if model.kernels and train:
        kernels.known(device)  # said before anything is read
    folder = folder_of(model.base, model.revision)
    strangers.check_weights(folder, model.base, "*.safetensors")
    dtype = dtype_of(model, device)
    weights = torch.float32 if train and not model.adapter else dtype
    config = read_config(model)
    quantized.check_package(config, model.base, device)
    quantization = quantized.settings_for(model, config, dtype)
    try:
        net, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=weights, device_map={"": device}, use_safetensors=True, trust_remote_code=False,
            quantization_config=quantization, attn_implementation=model.attention, output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a broken file, nearly anything
        raise Refused(f"{model.base}: cannot be loaded ({strangers.why(error)}).") from error
    sound.check_model(net, report, model.base)
    if device.type == "cpu":
        quantized.prepare_4bit_on_cpu(net)
    if full_precision:
        net = quantized.dequantized(net, model.base)
    tokenizer = read_tokenizer(model)
    if model.start:
        if quantized.is_quantized(net):
            raise Refused(
                "model.start: an adapter cannot be merged into quantized weights without a loss; merge it first, then quantize."
            )
        for start in model.starts:
            if combined.is_combined(begun := folder_of(adapter_in(start))):
                text = "combines the logits of several models, which no one set of weights does; name another"
                raise Refused(f"model.start: {begun} {text}.")
            net = merge_adapter(put_on(net, begun), start)
    if adapter:
        net = put_on(net, folder_of(adapter))
    return Loaded(net.eval(), tokenizer, parts_of(model, tokenizer, weights, adapter))


def parts_of(model: Model, tokenizer: PreTrainedTokenizerBase, weights: torch.dtype, adapter: str | None) -> tuple[object, ...]:
    """What the numbers of a model depend on, without loading it (`Loaded.parts`)."""
    folders = [folder_of(model.base, model.revision)]
    folders += [folder_of(adapter_in(start)) for start in model.starts]
    folders += [folder_of(adapter)] if adapter else []
    return (str(tokenizer.chat_template), model.quantize, str(weights), *map(folder_identity, folders))


def put_on(net: Any, folder: Path) -> Any:
    """The model with what a folder holds: one adapter, or several that are combined."""
    wanted = combined.read(folder) if combined.is_combined(folder) else None
    places = {name: folder / name for name in wanted.adapters} if wanted else {"default": folder}
    for place in places.values():
        strangers.check_adapter(place, str(place))
        sound.check_adapter_files(place)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below, by name
            warnings.filterwarnings("ignore", TIED)
            one, *others = places
            model = peft.PeftModel.from_pretrained(net, str(places[one]), adapter_name=one)
            for name in others:
                model.load_adapter(str(places[name]), adapter_name=name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a broken file, nearly anything
        raise Refused(f"{folder}: no adapter that fits this model ({reason(error)}).") from error
    for name, place in places.items():
        sound.check_adapter(model, place, name)
    return combined.combine(model.get_base_model(), wanted) if wanted else model


def add_adapter(net: Any, adapter: Adapter, seed: int) -> Any:
    """A fresh adapter on a frozen model: B = 0, A from the seed, both fp32.

    Raises:
        Refused: `targets` names no layer of this model, or one that peft does not adapt.
    """
    targets = targets_of(net, adapter)
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(targets.modules), lora_dropout=0.0, task_type="CAUSAL_LM",
        target_parameters=list(targets.parameters) or None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
                warnings.filterwarnings("ignore", TIED)
                warnings.filterwarnings("ignore", "fan_in_fan_out")  # it sees by itself which way round GPT-2 keeps its weights
                model = peft.get_peft_model(net, config)
        except ValueError as error:
            raise Refused(f"model.adapter.targets: {adapter.targets!r} is not supported by peft ({reason(error)}).") from None
    check_adapted(model, targets)
    return model


@contextlib.contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Inside, an adapted model answers as before: the adapter is switched off. Afterwards what was frozen is frozen still, which
    peft by itself forgets."""
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, wanted in asked:
            weight.requires_grad_(wanted)


def has_adapter(model: Any) -> bool:
    return isinstance(model, peft.PeftModel)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a run may change, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def earlier_directions(name: str) -> dict[str, torch.Tensor]:
    """The A matrices of a saved adapter, by the names that they have in a model which is training one of the same layers."""
    weights = sound.weights_in(folder_of(adapter_in(name)) / sound.ADAPTER_WEIGHTS)
    return {key.replace(".lora_A.", ".lora_A.default."): one for key, one in weights.items() if ".lora_A." in key}


def folder_identity(folder: Path) -> str:
    """A fingerprint of a saved model or adapter: the content of its weights, settings and tokenizer."""
    digest = hashlib.sha256()
    places = [folder, *(folder / name for name in (combined.read(folder).adapters if combined.is_combined(folder) else ()))]
    for path in sorted(path for place in places for pattern in MODEL_FILES for path in place.glob(pattern)):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
