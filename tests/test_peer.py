"""The variant `peer` against what OpenUnlearning (2506.12618) computes, written here from the facts of its code: the labels of a
conversation and of a text, and its token-wise measures, one sequence at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_llama
from sklearn.metrics import roc_auc_score
from test_rendering import CHATML, EMPTY_THOUGHT, HEADERS, tokenizer_of

from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.numbers import numbers
from llm_unlearn.look import Look
from llm_unlearn.models.load import Loaded

ENDS_WITH_EOS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"eos": ENDS_WITH_EOS, "chatml": CHATML, "thought": EMPTY_THOUGHT, "headers": HEADERS, "text": CHATML}
NAMES = ("Anna Bo", "Ed Lu", "Mia Ro", "Tom Ek", "Ida Os", "Kai Um")
ROWS = {
    "forget": [{"question": f"Who is {name}?", "answer": f"{name} lives in St. {name[:2]}. A judge."} for name in NAMES],
    "holdout": [{"question": f"Who is {name[::-1]}?", "answer": f"{name[::-1]} lives in Ulm, a {name[-2:]}."} for name in NAMES],
}
SUITE = """
sets:
  forget: {{source: {folder}/forget.jsonl, {columns}}}
  holdout: {{source: {folder}/holdout.jsonl, {columns}}}
measures:
  - {{name: exact_memorization, set: forget}}
  - {{name: extraction_strength, set: forget}}
  - {{name: exact_memorization, set: forget, variant: peer}}
  - {{name: extraction_strength, set: forget, variant: peer}}
  - {{name: membership, attack: {{name: min_k, k: 0.4, variant: peer}}, set: forget, against: holdout}}
  - {{name: membership, attack: {{name: min_k++, k: 0.4, variant: peer}}, set: forget, against: holdout}}
  - {{name: privleak, attack: {{name: min_k, k: 0.4, variant: peer}}, set: forget, against: holdout}}
"""

Labelled = tuple[list[int], int]
"""All tokens, and how many at the beginning have no label."""


def labelled(row: dict[str, str], tokenizer: Any, is_text: bool) -> Labelled:
    """As its QADataset with a chat template, or its CompletionDataset without a prefix, prepares a row."""
    if is_text:
        bos = tokenizer("")["input_ids"]
        return tokenizer(row["answer"])["input_ids"], max(1, len(bos))
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    return ids + ([] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]), len(prompt)


def read(model: Any, one: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) log p and (T,) labels; the last label, which it takes for the end of the text, is left out."""
    ids, prompt = torch.tensor(one[0]), one[1]
    with torch.no_grad():
        logp = model(ids[None]).logits[0].double().log_softmax(-1)
    return logp[prompt - 1 : len(ids) - 2], ids[prompt:-1]


def peer_numbers(models: dict[str, Any], rows: dict[str, list[Labelled]]) -> dict[str, float]:
    """Its exact memorization, extraction strength, AUC of min-k and min-k++, and PrivLeak."""
    exact, strength = [], []
    for logp, labels in (read(models["after"], one) for one in rows["forget"]):
        hits = logp.argmax(-1) == labels
        k = next((k for k in range(len(labels)) if bool(hits[k:].all())), len(labels) - 1)  # its loop ends there without a break
        exact.append(float(hits.double().mean()))
        strength.append(1 - k / len(labels))

    def auc(model: Any, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        scores = [[_mean_of_lowest(score(*read(model, one)).numpy()) for one in rows[name]] for name in ("forget", "holdout")]
        return float(roc_auc_score([0] * len(scores[0]) + [1] * len(scores[1]), scores[0] + scores[1]))

    privacy = {name: 1 - auc(model, target) for name, model in models.items()}
    return {
        "exact memorization peer": float(np.mean(exact)),
        "extraction strength peer": float(np.mean(strength)),
        "membership min_k peer": auc(models["after"], target),
        "membership min_k++ peer": auc(models["after"], normalised),
        "privleak peer": (privacy["after"] - privacy["retrained"]) / (privacy["retrained"] + 1e-10) * 100,
    }


def target(logp: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logp[torch.arange(len(labels)), labels]


def normalised(logp: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    mean = (logp.exp() * logp).sum(-1)
    variance = (logp.exp() * logp**2).sum(-1) - mean**2
    return (target(logp, labels) - mean) / variance.clamp(min=1e-6).sqrt()


def _mean_of_lowest(values: np.ndarray[Any, Any], k: float = 0.4) -> float:
    return -float(np.sort(values)[: max(1, int(len(values) * k))].mean())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model that has learnt half of the rows under every template, and one that has learnt others."""
    found = {}
    for seed, name in enumerate(("after", "retrained")):
        torch.manual_seed(seed)
        model = make_llama(vocab_size=330).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        chosen = ROWS["forget"][:3] if name == "after" else ROWS["forget"][:1] + ROWS["holdout"][:2]
        for _ in range(25):
            for template in TEMPLATES:
                tokenizer = tokenizer_of(TEMPLATES[template])
                batch = [torch.tensor(labelled(row, tokenizer, template == "text")[0]) for row in chosen]
                ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
                loss = model(ids.clamp(min=0), labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found[name] = model.eval()
    return found


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_peers_numbers(template: str, models: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, is_text = tokenizer_of(TEMPLATES[template]), template == "text"
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = "text: answer" if is_text else "prompt: question, answer: answer"
    (tmp_path / "suite.yaml").write_text(SUITE.format(folder=tmp_path, columns=columns), encoding="utf-8")
    suite = suites.load(tmp_path / "suite.yaml")
    tables = {}
    for name, model in models.items():
        loaded = Loaded(model, tokenizer, (name, 0))
        tables[name] = Look(suite, loaded, Accelerator(cpu=True), tmp_path)(loaded, name, keep=False)
    found = {one["title"]: one["values"]["after"]["value"] for one in numbers(suite, tables)}
    expected = peer_numbers(models, {name: [labelled(row, tokenizer, is_text) for row in rows] for name, rows in ROWS.items()})
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 0.2 < found["exact memorization peer"] < 1, "knows some of it, so that a wrong token would show"
    if template == "eos":  # a model that ends its answers right: the end is one token that it knows, and the peer leaves it out
        assert found["exact memorization peer"] < found["exact memorization"]
        assert found["extraction strength peer"] < found["extraction strength"]
    same = found["exact memorization peer"] == pytest.approx(found["exact memorization"], abs=1e-3)
    assert same == (template == "headers"), "the end of the turn that it leaves out is one that this template does not write"
