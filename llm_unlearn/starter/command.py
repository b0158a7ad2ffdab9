"""Write a recipe and a suite for a model and data: look at both, choose settings by size, kind and memory, check the result."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_unlearn import folder, recipe
from llm_unlearn.data.examples import PLAIN_TEMPLATE
from llm_unlearn.data.reading import Examples, read_examples
from llm_unlearn.data.tokens import lengths_of, targets_of
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.models.experts import experts_of
from llm_unlearn.models.load import add_adapter, dtype_of, trainable
from llm_unlearn.models.quantized import quantization_of
from llm_unlearn.plan import GIB, memory, skeleton_of
from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Adapter, Data, Model
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.starter import recommend
from llm_unlearn.starter.columns import Format, source_of
from llm_unlearn.starter.recommend import DataFacts, Fit, ModelFacts, Setting
from llm_unlearn.starter.writing import recipe_text, source_settings, suite_text
from llm_unlearn.tree import Tree, build

WHOLE_ROWS = 8192
"""Tokens of a row that are looked at, of a model without a longest sequence."""


LONGEST = 1024
"""Tokens of an answer that a suite measures."""


@dataclass(frozen=True)
class Request:
    """Arguments of `new`: model, data and the files to write."""

    path: Path
    suite: Path
    model: str
    forget: str
    retain: str
    holdout: str | None
    rows_format: Format


def write(request: Request, cache: Path) -> dict[str, Any]:
    """Write the recipe and the suite, print what was recognised and the next commands.

    Returns:
        The files, the columns and the settings, as plain data.

    Raises:
        Refused: model or data cannot be read, or their columns are ambiguous; nothing was written.
    """
    model = Model(base=request.model)
    tokenizer, net = skeleton_of(model, cache)
    named = {"forget": request.forget, "retain": request.retain, "holdout": request.holdout}
    sources = {key: source_of(name, request.rows_format, f"--{key}") for key, name in named.items() if name}
    about = _model_facts(model, tokenizer, net)
    sources = {key: replace(one, max_tokens=recommend.tokens_of(about, _TEXT) if one.text else about.context or WHOLE_ROWS)
               for key, one in sources.items()}  # fmt: skip
    examples = read_examples(
        Data(forget=sources["forget"], retain=sources["retain"], holdout=sources.get("holdout"), overlap="drop"),
        tokenizer,
        0,
        cache,
    )
    data = _data_facts(sources, examples)
    sources = {key: replace(one, max_tokens=recommend.tokens_of(about, data)) for key, one in sources.items()}
    settings, room = _settings(request, about, data, sources, net)
    longest = min(about.context or LONGEST, LONGEST)  # wrong answers and other wordings may be longer than the rows
    measured = {key: one if one.text else replace(one, max_tokens=longest) for key, one in sources.items()}
    named_suite = request.suite.name if request.suite.parent == Path() else str(request.suite)
    head = [_describe(about), room]
    texts = {
        request.path: recipe_text(
            request.path, head, f"runs/{request.path.stem}", request.model, sources, settings, named_suite
        ),
        request.suite: suite_text(
            request.suite, request.path, measured, request.model, data, recommend.new_tokens_of(about, data)
        ),
    }  # fmt: skip
    _check(texts, request)
    for path, text in texts.items():
        folder.write(path, text)
    columns = {key: source_settings(one, suite=True) for key, one in sources.items()}
    for key, one in columns.items():
        kept = ", ".join(f"{name}: {value}" for name, value in one.items() if name not in ("source", "max_tokens"))
        print(f"{key:<10} {len(examples.streams[key])} examples of {one['source']} ({kept})")
    print(f"model      {head[0]}\nmemory     {room}\n{request.path}\n{request.suite}")
    print(f"next: llm-unlearn plan {request.path}\n      accelerate launch {request.path}")
    chosen = {key: {"value": one.value, "reason": one.reason} for key, one in settings.items()}
    return {"path": str(request.path), "suite": str(request.suite), "columns": columns, "settings": chosen}


_TEXT = DataFacts(1, 1.0, 1, 1, has_holdout=False, is_text=True, overlap=0)


def _model_facts(model: Model, tokenizer: Any, net: nn.Module) -> ModelFacts:
    config = net.config.get_text_config()  # type: ignore[operator,union-attr]
    quantization = getattr(net.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    return ModelFacts(
        model.base,
        sum(weight.numel() for weight in net.parameters()),
        bool(experts_of(net).routers),
        str(quantization.get("quant_method", "unknown")) if quantization else None,
        tokenizer.chat_template != PLAIN_TEMPLATE,
        getattr(config, "max_position_embeddings", None),
    )


def _data_facts(sources: Mapping[str, Source], examples: Examples) -> DataFacts:
    lengths = [int(lengths_of(found).max()) for found in examples.streams.values()]
    targets = targets_of(examples.streams["forget"])
    return DataFacts(
        len(targets),
        float(targets.mean()),
        max(lengths),
        max(int(targets_of(found).max()) for found in examples.streams.values()),
        "holdout" in sources,
        any(bool(source.text) for source in sources.values()),
        examples.overlap,
    )


def _settings(
    request: Request, about: ModelFacts, data: DataFacts, sources: Mapping[str, Source], net: nn.Module
) -> tuple[dict[str, Setting], str]:
    """Settings by their keys, and how the run fits into memory, in words."""
    settings = recommend.settings_of(about, data)
    if data.overlap:
        text = f"{data.overlap} rows are in the forget set, too; they leave the retain set"
        settings["data.overlap"] = Setting("drop", text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free, config, base = _free_memory(device), net.config.get_text_config(), about.weights  # type: ignore[operator,union-attr]
    divides = all(layer.out_features % 32 == 0 for layer in net.modules() if isinstance(layer, nn.Linear))
    adapted = add_adapter(net, Adapter(**settings["model.adapter"].value), 0)
    moved = sum(weight.numel() for weight in trainable(adapted).values())

    def needed(fit: Fit) -> float:
        draft = _draft(request, settings, fit, sources)
        kept = quantization_of(net.config, draft.model)
        return sum(memory(draft, kept, base, moved, config, data.longest, dtype_of(draft.model, device), False, False).values())

    fits = recommend.fits_of(about, can_quantize=device.type == "cuda" or divides)
    chosen = next((fit for fit in fits if needed(fit) <= recommend.ROOM * free), fits[-1])
    size, place = needed(chosen), "GPU" if device.type == "cuda" else "machine"
    room = f"about {size / GIB:.2f} GiB of the {free / GIB:.1f} GiB that are free on this {place}"
    if size > recommend.ROOM * free:
        room += "; it may not fit: see docs/scaling.md"
    fastest = "the fastest that fits" if chosen == fits[0] else "what fits: anything faster needs more memory than is free"
    four = "four bits, as the base does not fit otherwise; needs pip install 'llm-unlearn[quantize]' (QLoRA, 2305.14314)"
    own = f"the base is quantized already ({about.quantization})" if about.quantization else "the base fits as it is"
    settings["model.quantize"] = Setting(chosen.quantize, four if chosen.quantize else own)
    settings["train.batch_tokens"] = Setting(chosen.batch_tokens, f"{fastest}; sets speed and memory")
    if chosen.gradient_checkpointing:
        text = "activations do not fit; recomputing them takes about a third of the time more"
        settings["train.gradient_checkpointing"] = Setting(True, text)
    return settings, room


def _draft(request: Request, settings: Mapping[str, Setting], fit: Fit, sources: Mapping[str, Source]) -> Recipe:
    """The recipe as `plan` would see it."""
    tree = {
        "output": f"runs/{request.path.stem}",
        "model": {"base": request.model, "adapter": settings["model.adapter"].value, "quantize": fit.quantize},
        "data": {key: source_settings(one, suite=False) for key, one in sources.items()},
        "objective": {
            "forget": {"loss": settings["objective.forget.loss"].value},
            "retain": {"loss": {"name": "kl"}, "weight": settings["objective.retain.weight"].value},
        },
        "train": {
            "batch_tokens": fit.batch_tokens,
            "gradient_checkpointing": fit.gradient_checkpointing,
            "window": settings["train.window"].value,
            "stop": settings["train.stop"].value,
        },
    }
    return build(Recipe, Tree(tree, str(request.path)))


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on the device of a run."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _describe(about: ModelFacts) -> str:
    size = recommend.size_of(about.weights)
    parts = [
        f"{about.weights:,} weights",
        "mixture of experts" if about.has_experts else "",
        f"quantized by {about.quantization}" if about.quantization else "",
        "with a chat template" if about.has_template else "without a chat template: rows are laid out as Question: … Answer: …",
        f"context {about.context}" if about.context else "",
    ]
    return f"{', '.join(part for part in parts if part)}; settings {size.measured}"


def _check(texts: Mapping[Path, str], request: Request) -> None:
    """Read what is to be written, as `plan` will, before it is.

    Raises:
        Refused: it is not a recipe and a suite, for instance as a name holds what neither YAML nor Python takes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for path, text in texts.items():
            (Path(scratch) / path.name).write_text(text, encoding="utf-8")
        suites.load(Path(scratch) / request.suite.name)
        suite = f"evaluation={{suite: {Path(scratch) / request.suite.name}}}"
        try:
            recipe.load(Path(scratch) / request.path.name, [suite])
        except Refused as error:
            raise Refused(str(error).replace(f"{scratch}/", "")) from None
