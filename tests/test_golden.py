"""Every measure of a fixed tiny model as it has always been; the main ones again by a forward pass in numpy, in float64; and
the same numbers however the rows are laid out, on two processes, and in bf16 within what docs/metrics.md says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden import END, FILE, FULL, MOST, SHAPE, Found, Rows, make_golden, make_words, measured
from numpy.typing import NDArray

from llm_unlearn.evaluation import generation, likelihood
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.numbers import numbers
from llm_unlearn.evaluation.suite import AnyMeasure
from llm_unlearn.look import Look

KEPT = json.loads(FILE.read_text(encoding="utf-8"))
ROWS: Rows = KEPT["rows"]
EXPECTED: Found = KEPT["expected"]
EPSILON = 1e-6


def check(found: Found, expected: Found = EXPECTED, within: float = 1e-5) -> None:
    """Values, both ends of the intervals, and on how many rows they rest."""
    assert found.keys() == expected.keys()
    for name, models in expected.items():
        for model, kept in models.items():
            one = found[name][model]
            assert one.keys() == kept.keys() and one.get("missing") == kept.get("missing"), (name, model, one, kept)
            wanted = {key: value for key, value in kept.items() if isinstance(value, (int, float))}
            assert {key: one[key] for key in wanted} == pytest.approx(wanted, rel=within, abs=within), (name, model)


@pytest.fixture(scope="module")
def found() -> Found:
    return measured(ROWS)


def test_every_number_is_what_it_was(found: Found) -> None:
    check(found)


@pytest.mark.parametrize("kind", get_args(get_args(AnyMeasure)[0]), ids=lambda kind: kind.__name__)
def test_every_measure_is_among_them_with_a_value_of_its_own(kind: type) -> None:
    """A measure that is 0 of every model would not show a change."""
    name = str(get_args(get_type_hints(kind)["name"])[0])
    start = {"leak_at_k": "leak@"}.get(name, name.replace("_", " "))
    mine = [models for title, models in EXPECTED.items() if title.split(": ")[1].startswith(start)]
    assert mine and any(one.get("value") for models in mine for one in models.values()), start


# ------------------------------------------------------------------------------------------------ by hand, in float64

Array = NDArray[np.float64]


def forward(weights: dict[str, Array], ids: Sequence[int]) -> Array:
    """(L,) -> (L, V): Llama as its paper writes it (2302.13971: RMSNorm, rotary positions, SwiGLU; 2305.13245: grouped heads)."""
    heads, groups, size = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["hidden_size"]
    width, length = size // heads, len(ids)
    turn = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)  # (L, width / 2)
    unseen = np.triu(np.full((length, length), -np.inf), 1)

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weights[name]

    def rotated(x: Array) -> Array:
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * np.cos(turn) - two * np.sin(turn), two * np.cos(turn) + one * np.sin(turn)], axis=-1)

    x = weights["model.embed_tokens.weight"][list(ids)]
    for layer in range(SHAPE["num_hidden_layers"]):
        here = f"model.layers.{layer}"
        y = norm(x, f"{here}.input_layernorm.weight")
        q, k, v = (y @ weights[f"{here}.self_attn.{name}_proj.weight"].T for name in "qkv")
        mixed = []
        for head in range(heads):
            mine, shared = slice(head * width, (head + 1) * width), head // (heads // groups)
            theirs = slice(shared * width, (shared + 1) * width)
            weight = np.exp(log_softmax(rotated(q[:, mine]) @ rotated(k[:, theirs]).T / width**0.5 + unseen))
            mixed.append(weight @ v[:, theirs])
        x = x + np.concatenate(mixed, axis=-1) @ weights[f"{here}.self_attn.o_proj.weight"].T
        y = norm(x, f"{here}.post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{here}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{here}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    found: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


class ByHand:
    """The model `after` of the golden numbers."""

    def __init__(self) -> None:
        state = make_golden().state_dict()
        self.weights = {name: weight.double().numpy() for name, weight in state.items()}
        self.tokenizer = make_words()

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(word) for word in text.split()]

    def answer(self, question: str, answer: str) -> tuple[Array, list[int]]:
        """(T, V) log p at the answer's tokens, and the tokens, the end among them."""
        prompt, targets = [1, *self.ids(question), 2], [*self.ids(answer), END]
        return log_softmax(forward(self.weights, [*prompt, *targets]))[len(prompt) - 1 : -1], targets

    def probability(self, question: str, answer: str) -> float:
        logp, targets = self.answer(question, answer)
        return float(np.exp(np.mean([row[target] for row, target in zip(logp, targets, strict=True)])))

    def written(self, question: str) -> list[str]:
        ids = start = [1, *self.ids(question), 2]
        while len(ids) < len(start) + MOST and (ids is start or ids[-1] != END):
            ids = [*ids, int(forward(self.weights, ids)[-1].argmax())]
        return [word for word in self.tokenizer.convert_ids_to_tokens(ids[len(start) :]) if not word.startswith("<|")]


def common(one: Sequence[str], two: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    if not one or not two:
        return 0
    lengths = np.zeros((len(one) + 1, len(two) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if a == b else max(lengths[i, j + 1], lengths[i + 1, j])
    return int(lengths[-1, -1])


def test_the_main_numbers_by_a_forward_pass_in_numpy() -> None:
    model, rows = ByHand(), ROWS["forget"]
    asked = [model.answer(row["question"], row["answer"]) for row in rows]
    own = [np.array([row[target] for row, target in zip(logp, targets, strict=True)]) for logp, targets in asked]
    hits = [logp.argmax(-1) == targets for logp, targets in asked]
    strength = [1 - max((t + 1 for t, hit in enumerate(row) if not hit), default=0) / len(row) for row in hits]
    ratios = [
        np.mean([model.probability(row["question"], wrong) for wrong in row["perturbed_answer"]])
        / model.probability(row["question"], row["paraphrased_answer"])
        for row in rows
    ]
    words = [(row["answer"].split(), model.written(row["question"])) for row in rows]
    expected = {
        "perplexity": np.exp(-sum(one.sum() for one in own) / sum(map(len, own))),
        "probability": np.mean([np.exp(one.mean()) for one in own]),
        "exact memorization": np.mean([row.mean() for row in hits]),
        "extraction strength": np.mean(strength),
        "truth ratio": np.mean([min(ratio, 1 / ratio) for ratio in ratios]),
        "entropy": np.mean([-(np.exp(logp) * logp).sum(-1).mean() for logp, _ in asked]),
        "rouge (no stem, part fmeasure, cut 128)": np.mean([2 * common(a, b) / (len(a) + len(b)) for a, b in words]),
    }
    for name, value in expected.items():
        assert EXPECTED[f"forget: {name}"]["after"]["value"] == pytest.approx(float(value), rel=2e-5), name


def test_membership_by_a_forward_pass_in_numpy() -> None:
    model = ByHand()

    def unseen(row: dict[str, Any]) -> tuple[float, float]:
        """loss and min-k++ with k = 0.2."""
        logp, targets = model.answer(row["question"], row["answer"])
        own, p = np.array([one[target] for one, target in zip(logp, targets, strict=True)]), np.exp(logp)
        mean = (p * logp).sum(-1)
        spread = np.sqrt((p * (logp - mean[:, None]) ** 2).sum(-1))
        few = sorted((own - mean) / np.maximum(spread, 1e-3))[: max(1, int(0.2 * len(own)))]
        return float(-own.mean()), float(-np.mean(few))

    members, others = ([unseen(row) for row in ROWS[name]] for name in ("forget", "holdout"))
    for k, attack in enumerate(("loss", "min_k++")):
        wins = [(other[k] > member[k]) + (other[k] == member[k]) / 2 for member in members for other in others]
        assert EXPECTED[f"forget: membership {attack}"]["after"]["value"] == pytest.approx(np.mean(wins), abs=1e-12)


# ------------------------------------------------------------------------------------------------ however it is laid out


@pytest.mark.parametrize(("batch_tokens", "padding"), [(30, "right"), (10**6, "left")])
def test_neither_budget_nor_padding_changes_a_number(batch_tokens: int, padding: str) -> None:
    check(measured(ROWS, batch_tokens=batch_tokens, padding=padding))


def test_rows_that_are_not_sorted_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_they_stand(lengths: Sequence[int], *_: Any) -> list[list[int]]:
        return [list(range(start, min(start + 5, len(lengths)))) for start in range(0, len(lengths), 5)]

    monkeypatch.setattr(likelihood, "dealt", as_they_stand)
    monkeypatch.setattr(generation, "dealt", as_they_stand)
    check(measured(ROWS))


@pytest.mark.slow
@pytest.mark.two_processes("golden")
def test_two_processes_have_the_same_numbers(two_processes: Path) -> None:
    check(json.loads((two_processes / "golden.json").read_text()))


# ------------------------------------------------------------------------------------------------ in bf16

SMOOTH = ("perplexity", "probability", "entropy", "truth ratio", "option probability", "model utility")
"""Read off log p itself; the others are shares of rows or pairs, of which one may tip over."""


@pytest.mark.long
def test_bf16_is_as_close_as_the_docs_say(embedded: dict[str, Path]) -> None:
    """Of the control, which is less certain than the target and so moves further."""
    from llm_unlearn.models.load import load
    from llm_unlearn.sections import Model

    suite = suites.load(FULL, ["retrained=null"])
    loaded = load(Model(base=str(embedded["retrained"])), torch.device("cpu"))
    look = Look(suite, loaded, Accelerator(cpu=True), Path())
    whole = numbers(suite, {"after": look(loaded, "fp32", keep=False)})
    with torch.autocast("cpu", torch.bfloat16):
        half = numbers(suite, {"after": look(loaded, "bf16", keep=False)})
    compared = [(one, a["value"], b["value"]) for one, two in zip(whole, half, strict=True)
                for a, b in [(one["values"]["after"], two["values"]["after"])] if "value" in a]  # fmt: skip
    assert any(a != b for _, a, b in compared), "nothing was computed in bf16"
    for one, a, b in compared:
        smooth = one["title"].startswith(SMOOTH)
        assert b == (pytest.approx(a, rel=2e-3) if smooth else pytest.approx(a, abs=0.02)), (one["set"], one["title"])
