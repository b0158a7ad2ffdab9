"""A fixed tiny model, fixed rows, and every measure on them: what `golden.json` holds, and how it was made.

    python tests/golden.py        # makes rows and expected values anew; look at every number that changes, and say why it may

Weights come from the raw output of PCG64, which NumPy promises never to change; so no binary is kept.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from llm_unlearn.embedded.target import CHAT_TEMPLATE
from llm_unlearn.evaluation import suite as suites
from llm_unlearn.evaluation.likelihood import Control
from llm_unlearn.evaluation.numbers import numbers
from llm_unlearn.look import Look
from llm_unlearn.models.load import Loaded

FILE = Path(__file__).with_name("golden.json")
FULL = Path(__file__).parents[1] / "eval" / "full.yaml"
WORDS = [first + vowel + "n" for first in "bdfgklmnprst" for vowel in "aeiou"]
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
END, MOST = 3, 12
SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
Rows = dict[str, list[dict[str, Any]]]
Found = dict[str, dict[str, Any]]
"""`set: title` -> model -> value, low, high, n, or what is missing."""


def uniform(seed: int, *shape: int) -> NDArray[np.float64]:
    """Numbers of mean 0 and variance 1."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53 - 0.5).reshape(shape) * 12**0.5


def make_golden(other: int = 0) -> Any:
    """The model, or with a number another one that is somewhat like it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for i, (name, weight) in enumerate(sorted(model.named_parameters())):
            drawn = uniform(i, *weight.shape) + (0.6 * uniform(1000 * other + i, *weight.shape) if other else 0)
            scaled = 1 + 0.2 * drawn if "norm" in name else drawn * (1.0 if "embed" in name else 3.0 / weight.shape[1] ** 0.5)
            weight.copy_(torch.from_numpy(scaled))
    return model


def make_words() -> Any:
    """A tokenizer of 60 words and the embedded model's turns."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<|pad|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def measured(rows: Rows, *, batch_tokens: int = 300, padding: str = "right", accelerator: Accelerator | None = None) -> Found:
    """Every measure of eval/full.yaml on these rows, the second model in the place of the retrained one."""
    tokenizer = make_words()
    tokenizer.padding_side = padding
    with tempfile.TemporaryDirectory() as folder:
        for name, of_set in rows.items():
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set), encoding="utf-8")
        changes = [f"sets.{name}.source={folder}/{name}.jsonl" for name in rows]
        suite = suites.load(FULL, [*changes, "retrained=null", f"max_new_tokens={MOST}", f"batch_tokens={batch_tokens}"])
        controls: dict[str, Control] = {}
        tables = {}
        for column, other in (("retrained", 1), ("after", 0)):
            loaded = Loaded(make_golden(other), tokenizer, ("golden", other))
            given = {"leave": controls} if column == "retrained" else {"controls": controls}
            look = Look(suite, loaded, accelerator or Accelerator(cpu=True), Path(folder), **given)
            tables[column] = look(loaded, column, keep=False)
    return {f"{one['set']}: {one['title']}": one["values"] for one in numbers(suite, tables)}


def make_rows() -> Rows:
    """Random words; of all sets but the holdout, half of the answers are what the model itself writes."""
    model, tokenizer = make_golden(), make_words()
    numbers = iter(np.random.PCG64(7).random_raw(10**5).tolist())

    def text(least: int, most: int) -> str:
        return " ".join(WORDS[next(numbers) % len(WORDS)] for _ in range(least + next(numbers) % (most - least + 1)))

    def own(question: str) -> str | None:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False)[0]
        new = written[ids.shape[1] :].tolist()
        return str(tokenizer.decode(new[:-1])) if new[-1] == END and len(new) > 4 and min(new[:-1]) > END else None

    rows: Rows = {}
    for name, count in (("forget", 12), ("retain", 8), ("holdout", 10), ("general", 6)):
        rows[name] = []
        while len(rows[name]) < count:
            question = text(2, 8)
            answer = own(question) if name != "holdout" and len(rows[name]) % 2 else text(4, 8)
            if answer:
                wrong = [text(1, 8) for _ in range(3)]
                keyword = answer.split()[:1]
                rows[name].append({"question": question, "answer": answer, "paraphrased_answer": text(1, 8),
                                   "perturbed_answer": wrong, "keyword": keyword})  # fmt: skip
    return rows


def main() -> None:
    rows = make_rows()
    lines = [
        f"{json.dumps(kind)}: {{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()) + "\n}"
        for kind, found in (("rows", rows), ("expected", measured(rows)))
    ]
    FILE.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
