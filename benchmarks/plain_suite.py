"""The baseline of evaluation, written as public code does it: each measure walks its rows by itself, in batches of a fixed size in
the order of the data, padded to the longest, with the logits of all positions in float32; texts are generated to their limit.

The numbers are the definitions of the suite that the other way carries out, so that both can be compared.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from benchmarks import device
from benchmarks.plain import IGNORED, nll, padded, without

if TYPE_CHECKING:
    from benchmarks.sides import Turns

Rows = list[dict[str, Any]]
MEASURES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"name": "probability", "set": name}) for name in ("forget", "retain", "real_authors", "world_facts")],
    *[(name, {"name": "rouge", "set": name}) for name in ("forget", "retain", "real_authors", "world_facts")],
    ("forget", {"name": "truth_ratio", "set": "forget", "aggregate": "closer_to_one_better"}),
    *[
        (name, {"name": "truth_ratio", "set": name, "aggregate": "true_better"})
        for name in ("retain", "real_authors", "world_facts")
    ],
    ("forget", {"name": "exact_memorization", "set": "forget"}),
    ("forget", {"name": "extraction_strength", "set": "forget"}),
    *[
        ("forget", {"name": "membership", "attack": {"name": attack}, "set": "forget", "against": "holdout"})
        for attack in ("loss", "zlib", "min_k", "min_k++")
    ],
]
"""What is computed, as (set, measure of a suite file): TOFU's measures, and four membership attacks."""


class Plain:
    """A model from its folder, asked measure by measure."""

    def __init__(self, model: Path, sets: dict[str, Path], batch: int, max_new_tokens: int) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=device.dtype(), device_map={"": device.device()}
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.sets = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in sets.items()}
        self.batch, self.max_new_tokens = batch, max_new_tokens

    def example(self, question: str, answer: str) -> tuple[tuple[int, ...], int]:
        """Tokens, and where the answer begins."""
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole, asked = (
            self.tokenizer(self.tokenizer.apply_chat_template(part, tokenize=False), add_special_tokens=False)["input_ids"]
            for part in (turns, turns[:1])
        )
        return tuple(whole), len(asked)

    @torch.no_grad()
    def walk(self, rows: Rows, column: str, read: Callable[[Tensor, Tensor], list[Any]], k: int | None = None) -> list[Any]:
        """One pass over a column's answers: what is read of each batch's logits and labels, row by row."""
        found: list[Any] = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            examples = [self.example(row["question"], row[column] if k is None else row[column][k]) for row in part]
            batch = {name: one.to(self.model.device) for name, one in padded(examples).items()}
            found += read(self.model(**without(batch)).logits.float(), batch["labels"])
        return found

    def losses(self, name: str, column: str, k: int | None = None) -> np.ndarray[Any, Any]:
        """(R,) NLL/T."""
        return np.array(self.walk(self.sets[name], column, mean_losses, k))

    def probability(self, name: str) -> float:
        return float(np.exp(-self.losses(name, "answer")).mean())

    def truth_ratio(self, name: str, aggregate: str) -> float:
        right = self.losses(name, "paraphrase" if "paraphrase" in self.sets[name][0] else "answer")
        wrong = [self.losses(name, "perturbed", k) for k in range(len(self.sets[name][0]["perturbed"]))]
        ratio = np.exp(-np.stack(wrong)).mean(0) / np.exp(-right)
        return float((np.minimum(ratio, 1 / ratio) if aggregate == "closer_to_one_better" else np.maximum(0, 1 - ratio)).mean())

    def exact_memorization(self, name: str) -> float:
        return float(np.mean([hit.mean() for hit in self.walk(self.sets[name], "answer", hits)]))

    def extraction_strength(self, name: str) -> float:
        strengths = []
        for hit in self.walk(self.sets[name], "answer", hits):
            misses = np.flatnonzero(~hit)
            strengths.append(1 - (misses[-1] + 1 if len(misses) else 0) / len(hit))
        return float(np.mean(strengths))

    @torch.no_grad()
    def rouge(self, name: str) -> float:
        """Recall of ROUGE-L with stemmer."""
        rows, scorer, found = self.sets[name], RougeScorer(["rougeL"], use_stemmer=True), []
        self.tokenizer.padding_side = "left"
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            asked = [[{"role": "user", "content": row["question"]}] for row in part]
            texts = [self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
            batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
            batch.pop("token_type_ids", None)
            out = self.model.generate(**batch, do_sample=False, max_new_tokens=self.max_new_tokens)
            written = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [scorer.score(row["answer"], text)["rougeL"].recall for row, text in zip(part, written, strict=True)]
        return float(np.mean(found))

    def membership(self, name: str, attack: dict[str, str], against: str) -> float:
        """The AUC of one attack, which walks both sets by itself."""
        scores = [self.attacked(self.sets[one], attack["name"]) for one in (name, against)]
        members, others = (np.array(one)[:, None] for one in scores)
        return float(((members < others.T) + 0.5 * (members == others.T)).mean())

    def attacked(self, rows: Rows, attack: str) -> list[float]:
        if attack == "min_k":
            return [-lowest(one) for one in self.walk(rows, "answer", logps)]
        if attack == "min_k++":
            return [-lowest(one) for one in self.walk(rows, "answer", surprises)]
        losses = self.walk(rows, "answer", mean_losses)
        sizes = [len(zlib.compress(row["answer"].encode())) if attack == "zlib" else 1 for row in rows]
        return [loss / size for loss, size in zip(losses, sizes, strict=True)]


def mean_losses(logits: Tensor, labels: Tensor) -> list[float]:
    found: list[float] = (nll(logits, labels) / (labels[:, 1:] != IGNORED).sum(-1)).tolist()
    return found


def answers(labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row by row: its number, where its answer is predicted, and the answer's tokens."""
    for b, row in enumerate(labels[:, 1:]):
        at = (row != IGNORED).nonzero()[:, 0]
        yield b, at, row[at]


def hits(logits: Tensor, labels: Tensor) -> list[Any]:
    first = logits.argmax(-1)
    return [(first[b, at] == truth).cpu().numpy() for b, at, truth in answers(labels)]


def logps(logits: Tensor, labels: Tensor) -> list[Any]:
    logp = logits.log_softmax(-1)
    return [logp[b, at].gather(-1, truth[:, None])[:, 0].cpu().numpy() for b, at, truth in answers(labels)]


def surprises(logits: Tensor, labels: Tensor) -> list[Any]:
    """(log p − mean) / std under the model's own distribution."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).sum(-1)
    std = ((p * logp.square()).sum(-1) - mean.square()).clamp(min=1e-6).sqrt()
    own = logps(logits, labels)
    return [(own[b] - mean[b, at].cpu().numpy()) / std[b, at].cpu().numpy() for b, at, _ in answers(labels)]


def lowest(values: Sequence[float], k: float = 0.2) -> float:
    return float(np.sort(np.asarray(values, dtype=float))[: max(1, int(k * len(values)))].mean())


def evaluate(turns: Turns, model: Path, sets: dict[str, Path], batch: int, max_new_tokens: int) -> None:
    """As `ours.evaluate`; the numbers in the order of `MEASURES`."""
    base = device.held()
    request = turns.next({"base": base})
    while request:
        device.free()
        began = time.perf_counter()
        plain, numbers = Plain(model, sets, batch, max_new_tokens), []
        for name, measure in MEASURES:
            given = {key: value for key, value in measure.items() if key not in ("name", "set")}
            numbers.append(getattr(plain, measure["name"])(name, **given))
        device.synchronize()
        answer = {"seconds": time.perf_counter() - began, "peak": device.peak(), "numbers": numbers}
        del plain
        request = turns.next(answer)
