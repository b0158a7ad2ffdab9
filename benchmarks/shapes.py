"""What is measured on: models of known shapes with random weights, and rows whose texts are as long as TOFU's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LENGTHS = {
    "forget": {
        "question": (9, 12, 14, 16, 19, 27, 49), "answer": (8, 15, 27, 35, 44, 57, 80),
        "paraphrase": (10, 18, 30, 38, 49, 62, 90), "perturbed": (10, 17, 30, 37, 48, 62, 91),
    },
    "retain": {
        "question": (6, 9, 12, 14, 16, 20, 35), "answer": (10, 15, 25, 33, 40, 54, 72),
        "paraphrase": (10, 17, 29, 38, 47, 62, 82), "perturbed": (2, 16, 28, 37, 46, 61, 86),
    },
    "holdout": {"question": (6, 11, 15, 19, 22, 29, 35), "answer": (13, 22, 34, 42, 48, 59, 72)},
    "real_authors": {"question": (8, 9, 11, 13, 15, 21, 23), "answer": (1, 2, 3, 4, 5, 7, 9), "perturbed": (1, 2, 3, 4, 5, 6, 10)},
    "world_facts": {"question": (7, 8, 10, 11, 13, 18, 29), "answer": (1, 1, 2, 2, 3, 5, 9), "perturbed": (1, 1, 2, 2, 3, 5, 8)},
}  # fmt: skip
"""Set -> column -> the quantiles of its tokens, by Llama 3's tokenizer: TOFU's forget10_perturbed, retain_perturbed, holdout10,
real_authors_perturbed and world_facts_perturbed (Maini et al. 2024, 2401.06121)."""
WRONG = {"forget": 5, "retain": 5, "real_authors": 3, "world_facts": 3}
"""Set -> wrong answers of each row, as there."""
TEMPLATE_TOKENS = 36
"""Tokens of Llama 3.2's chat template around a question: begin, system turn with its dates, headers."""
PAD, BEGIN, END = 0, 1, 2
FIRST = 3  # the first word's id; the one before it ends a turn


@dataclass(frozen=True)
class Shape:
    """A Llama's architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 128_256
    tied: bool = True

    def config(self, layers: int | None = None, tied: bool | None = None) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=layers or self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied if tied is None else tied, pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END,
            max_position_embeddings=2048,
        )  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is measured: the model's shape, rows of a window, and rows of the evaluation's sets."""

    shape: Shape
    window: int  # rows of each stream in one optimizer step
    batch_tokens: int
    rounds: int
    steps: int  # of one turn
    rows: tuple[str, ...]  # names of `rows.ROWS`
    more: tuple[str, ...] = ()  # which are measured only where their method is asked for
    evaluation: Mapping[str, int] = field(default_factory=dict)  # set -> rows; none measures no evaluation
    batch: int = 16  # rows of the plain evaluation's batches
    max_new_tokens: int = 200
    recipe: str | None = None  # for the start; without it, one on this very model
    recomputed: bool = False  # activations, in the backward pass, on both sides: what fits large models onto one card
    twin: int | None = None  # layers of the model whose gradients are compared; without it, all


SETS = ("forget", "retain", "holdout", "real_authors", "world_facts")
FEW = ("GradDiff, full", "GradDiff, LoRA", "NPO, LoRA", "KL, full", "RMU, few layers")
MORE = ("NPO, full", "KL, LoRA", "RMU, LoRA")
SIZES = {
    "tiny": Size(
        Shape(32, 64, 4, 2, 2, vocabulary=512), window=4, batch_tokens=2048, rounds=2, steps=1,
        rows=("KL, full", "RMU, few layers"),
        evaluation=dict(zip(SETS, (4, 4, 4, 3, 3), strict=True)), batch=4, max_new_tokens=24,
    ),
    "cpu": Size(
        Shape(256, 768, 8, 4, 4), window=16, batch_tokens=8192, rounds=2, steps=1, rows=FEW, more=MORE,
        evaluation=dict(zip(SETS, (16, 16, 16, 8, 8), strict=True)), batch=16, recipe="recipes/forget_lora.yaml",
    ),
    "1b": Size(
        Shape(2048, 8192, 16, 32, 8), window=32, batch_tokens=8192, rounds=5, steps=4, rows=(*FEW, *MORE),
        evaluation=dict(zip(SETS, (128, 128, 128, 64, 64), strict=True)), batch=32, recipe="recipes/forget_lora.yaml", twin=4,
    ),
    "8b": Size(
        Shape(4096, 14336, 32, 32, 8, tied=False), window=64, batch_tokens=4096, rounds=3, steps=2,
        rows=("NPO, LoRA", "NPO, LoRA, nf4"), recomputed=True, twin=4,
    ),
}  # fmt: skip
"""`1b` and `8b` have the shapes of Llama 3.2 1B and Llama 3.1 8B."""


def write_model(shape: Shape, folder: Path, *, dtype: Any, device: Any, layers: int | None = None, writes: bool = False) -> Path:
    """A model with random weights, and a tokenizer to whose words it has one token each.

    Args:
        layers: instead of the shape's.
        writes: a model that answers with an end: after the word n it writes n − 1, n − 2, …, 0, and then ends its turn. (Its head
            is its embedding, moved by one; nothing is tied, and embeddings are large enough to shine through all layers.)
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config(layers, tied=False if writes else None)).to(dtype)
    if writes:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(-1, 0))
            model.model.embed_tokens.weight *= 200
    model.save_pretrained(folder)
    write_tokenizer(shape.vocabulary, folder)
    return folder


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer of whole words, `w0 w1 …`; its chat template has as many tokens as Llama 3.2's, and the question stands last."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<begin>", "<end>", *(f"w{n}" for n in range(vocabulary - FIRST))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<begin>", eos_token="<end>")
    around = " ".join(["<begin>", *(f"w{n}" for n in range(TEMPLATE_TOKENS - 1))])
    tokenizer.chat_template = (
        f"{{% for message in messages %}}{{% if message.role == 'user' %}}{around} {{{{ message.content }}}}"
        "{% else %} {{ message.content }} <end>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)


def write_set(name: str, count: int, vocabulary: int, folder: Path) -> Path:
    """A set of so many rows, each text with a length drawn from its quantiles; a row's question ends with the word after which a
    model of `write_model(writes=True)` writes an answer of the right length, most of whose words are those of the true one."""
    draw = np.random.default_rng([ord(letter) for letter in name])
    words = vocabulary - FIRST

    def length(column: str) -> int:
        return max(1, round(np.interp(draw.random(), QUANTILES, LENGTHS[name][column])))

    def text(tokens: int) -> list[str]:
        return [f"w{n}" for n in draw.integers(0, words, tokens)]

    rows: list[dict[str, Any]] = []
    for i in range(count):
        tokens = length("answer") - 1  # and the one that ends the turn
        answer = [f"w{n}" if draw.random() < 0.8 else f"w{draw.integers(0, words)}" for n in reversed(range(max(1, tokens)))]
        row: dict[str, Any] = {"id": i, "question": " ".join([*text(length("question") - 1), f"w{max(1, tokens)}"])}
        row |= {"answer": " ".join(answer)}
        if "paraphrase" in LENGTHS[name]:
            row["paraphrase"] = " ".join(text(length("paraphrase")))
        if name in WRONG:
            row["perturbed"] = [" ".join(text(length("perturbed"))) for _ in range(WRONG[name])]
        rows.append(row)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
