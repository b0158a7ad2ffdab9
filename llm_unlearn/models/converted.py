"""GGUF weights converted once to safetensors, kept in the cache with tokenizer, chat template and generation config."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_unlearn.durable import whole
from llm_unlearn.folder import sha256
from llm_unlearn.gguf import locate_gguf, read_header
from llm_unlearn.models import sound
from llm_unlearn.spec import Refused, fingerprint, reason

FORMAT = "1"
"""Changes when a conversion writes other files than before."""
SETTINGS, WHOLE = "settings", "model"


def convert(name: str, cache: Path, weights: bool = True) -> Path:
    """Return the folder of a base that `is_gguf`, as `save_pretrained` writes it; converted now if the cache does not have it.

    Quantized weights become float32, which holds every one of their values exactly; F16 and BF16 stay what they are.

    Args:
        weights: False leaves them out: enough to build the model and to encode text.

    Raises:
        Refused: the file is damaged, or transformers cannot read its architecture, tokenizer or weights.
    """
    header, path = read_header(name), locate_gguf(name)
    home = cache / "gguf" / fingerprint(FORMAT, sha256(path), transformers.__version__)
    if (home / WHOLE).is_dir():
        return home / WHOLE
    if not weights and (home / SETTINGS).is_dir():
        return home / SETTINGS
    home.mkdir(parents=True, exist_ok=True)
    final = home / (WHOLE if weights else SETTINGS)
    with FileLock(home.with_suffix(".lock")):  # other processes wait here, and then find the folder
        if not final.is_dir():
            if weights:
                print(f"first use: converting {header.name} ({header.precision}) to safetensors", flush=True)
            with whole(final) as unfinished, contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers
                unfinished.mkdir(parents=True)
                _write(name, path, unfinished, weights, header.quantized)
    return final


def _write(name: str, path: Path, folder: Path, weights: bool, quantized: bool) -> None:
    """Write what transformers reads in the file. Its errors are of any type, and each becomes one line."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(**place)
        tokenizer = _within(AutoTokenizer.from_pretrained(**place), config.vocab_size)
    except MemoryError:
        raise
    except Exception as error:
        raise Refused(
            f"{name}: transformers cannot read this GGUF file ({reason(error)}). Name the model in safetensors."
        ) from error
    if limit := getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    if not weights:
        config.save_pretrained(folder)
        return
    settings = getattr(transformers, "GgufConfig", None)  # newer versions would keep blocks packed, and fetch kernels for them
    more = {"quantization_config": settings(dequantize=True)} if settings else {}
    try:
        net, report = AutoModelForCausalLM.from_pretrained(
            **place, **more, dtype=torch.float32 if quantized else "auto", output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:
        raise Refused(f"{name}: transformers cannot read its weights ({reason(error)}). Name the model in safetensors.") from error
    sound.check_model(net, report, name)
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config  # what is written is not quantized
    net.save_pretrained(folder)


def _within(tokenizer: Any, size: int) -> Any:
    """Return the tokenizer without tokens that the model has no embedding for: transformers adds its own `<|endoftext|>` where a
    file names no such token."""
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [one for one in layout["added_tokens"] if one["id"] < size]
    if len(added) == len(layout["added_tokens"]):
        return tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {
        name: token for name in names if (token := getattr(tokenizer, name)) and tokenizer.convert_tokens_to_ids(token) < size
    }
    backend = Tokenizer.from_str(json.dumps(layout | {"added_tokens": added}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)
