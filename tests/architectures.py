"""Examine an architecture: the main job on a small model of it, against plain transformers and peft, one sequence at a time.

python tests/architectures.py llama rwkv           # examine these; without a name, all
python tests/architectures.py llama rwkv --write   # and write the lines of those that are right into docs/models.md
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import peft
import torch
from small_models import IDS, KINDS, small_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_unlearn.cli import main
from llm_unlearn.embedded.population import rows
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.models.structure import decoder_layers
from llm_unlearn.models.trials import can_pack, check_depth
from llm_unlearn.spec import Refused

ROWS, LIMIT = 3, 6
"""Rows of each set, and tokens of an answer that the model writes."""
BETA, WEIGHTS, RATE = 0.5, {"forget": 1.0, "retain": 2.0, "keep": 0.5}, 0.05

RECIPE = f"""\
output: OUTPUT
model: {{base: BASE, adapter: {{rank: 4, alpha: 8}}}}
data:
  forget: {{source: FOLDER/forget.jsonl, prompt: question, answer: answer}}
  retain: {{source: FOLDER/retain.jsonl, prompt: question, answer: answer}}
objective:
  forget: {{loss: {{name: npo, beta: {BETA}}}}}
  retain: {{loss: {{name: kl}}, weight: {WEIGHTS["retain"]}}}
  keep: {{loss: {{name: nll}}, stream: retain, weight: {WEIGHTS["keep"]}}}
train:
  {{steps: 2, optimizer: sgd, lr: {RATE}, warmup: 0, schedule: constant, clip: null, window: {{forget: {ROWS}, retain: {ROWS}}}}}
evaluation: FOLDER/suite.yaml
"""
SUITE = f"""\
sets:
  forget: {{source: FOLDER/forget.jsonl, prompt: question, answer: answer}}
  retain: {{source: FOLDER/retain.jsonl, prompt: question, answer: answer}}
measures:
  - {{name: perplexity, set: forget}}
  - {{name: rouge, set: forget}}
  - {{name: perplexity, set: retain}}
max_new_tokens: {LIMIT}
"""


@dataclass(frozen=True)
class Row:
    """A row of a set as plain transformers see it: the rendered conversation, and where its answer begins."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Bench:
    """Inputs for every architecture: rows, a suite, a tokenizer."""

    folder: Path
    tokenizer: Any
    rows: dict[str, list[Row]]

    @staticmethod
    def of(folder: Path) -> Bench:
        tokenizer, encoded = make_tokenizer(), {}
        for name in ("forget", "retain"):
            few = rows(name)[:ROWS]
            lines = [json.dumps({key: row[key] for key in ("question", "answer")}) + "\n" for row in few]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            encoded[name] = [_encode(tokenizer, row["question"], row["answer"]) for row in few]
        (folder / "suite.yaml").write_text(SUITE.replace("FOLDER", str(folder)), encoding="utf-8")
        return Bench(folder, tokenizer, encoded)

    def recipe(self, base: Path, output: Path) -> Path:
        text = RECIPE.replace("FOLDER", str(self.folder)).replace("BASE", str(base)).replace("OUTPUT", str(output))
        path = output.with_suffix(".yaml")
        path.write_text(text, encoding="utf-8")
        return path


def _encode(tokenizer: Any, question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    start = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    return Row(tuple(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]), len(start))


PAGE = "llm_unlearn.report.page.write_page"
"""Draws the report, which takes as long as all the rest and is the same for every architecture."""


@dataclass(frozen=True)
class Command:
    """Exit code and output of a command."""

    code: int
    errors: str


def command(*words: str) -> Command:
    """Run a command in this process; what it prints is kept back."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), mock.patch(PAGE):
        code = main(words)
    lines = errors.getvalue().splitlines()
    return Command(code, "\n".join(line for line in lines if line.startswith("error:")) if code == 2 else "\n".join(lines[-8:]))


# ------------------------------------------------------------------------------------------------ plain transformers and peft


def log_probabilities(model: Any, row: Row) -> Tensor:
    """(T, V) of the answer's tokens, the sequence alone in its batch."""
    logits: Tensor = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float()
    return logits[row.start - 1 : -1].log_softmax(-1)


def likelihood(logp: Tensor, row: Row) -> Tensor:
    """(T,) log-probability of each token of the answer."""
    return logp.gather(-1, torch.tensor(row.ids[row.start :])[:, None])[:, 0]


@torch.no_grad()
def write(model: Any, row: Row, tokenizer: Any) -> str:
    """The answer that the model writes greedily, read anew for every token."""
    ids, end = list(row.ids[: row.start]), {tokenizer.eos_token_id, IDS["eos_token_id"]}
    while len(ids) < row.start + LIMIT and (len(ids) == row.start or ids[-1] not in end):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[row.start :], skip_special_tokens=True)).strip()


def train(model: Any, bench: Bench, before: dict[str, list[Tensor]]) -> list[dict[str, float]]:
    """Move the trainable weights by two steps of npo + kl + nll; the loss terms of each step.

    Args:
        before: set -> log-probabilities (T, V) of each row by the model before.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    steps = []
    for _ in range(2):
        model.zero_grad()
        terms = dict.fromkeys(WEIGHTS, 0.0)
        tokens = sum(len(row.ids) - row.start for row in bench.rows["retain"])
        for name, of_set in bench.rows.items():
            for row, old in zip(of_set, before[name], strict=True):
                new = log_probabilities(model, row)
                if name == "forget":
                    ratio = (likelihood(new, row) - likelihood(old, row)).sum()
                    values = {"forget": -2 / BETA * logsigmoid(-BETA * ratio) / ROWS}
                else:
                    kl = (old.exp() * (old - new)).sum()
                    values = {"retain": kl / tokens, "keep": -likelihood(new, row).sum() / tokens}
                torch.stack([WEIGHTS[term] * value for term, value in values.items()]).sum().backward()
                terms = terms | {term: terms[term] + float(value.detach()) for term, value in values.items()}
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight -= RATE * weight.grad
        steps.append(terms)
    return steps


# ------------------------------------------------------------------------------------------------ one architecture


class Broken(AssertionError):
    """The framework's numbers are not those of plain transformers and peft."""


def check_close(what: str, ours: Sequence[float] | Tensor, theirs: Sequence[float] | Tensor, within: float = 2e-4) -> None:
    """Raise Broken where numbers differ by more than rounding."""
    a, b = (torch.as_tensor(one, dtype=torch.float64) for one in (ours, theirs))
    if a.shape != b.shape or not torch.allclose(a, b, rtol=within, atol=within):
        raise Broken(f"{what}: {a.tolist()[:4]} instead of {b.tolist()[:4]}")


def check_lora(folder: Path, bench: Bench, run: Path) -> None:
    """Compare a run of the recipe with the same two steps by plain transformers and peft.

    Raises:
        Broken: loss terms, log-likelihoods, texts or the saved adapter differ.
    """
    found = pd.read_parquet(run / "evaluation.parquet")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fresh = copy.deepcopy(base)
    with torch.no_grad():
        before = {name: [log_probabilities(base, row) for row in of_set] for name, of_set in bench.rows.items()}
    check_rows(found, "before", base, bench)
    model = untrained(base, run / "adapter")
    terms = train(model, bench, before)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for step, (line, own) in enumerate(zip(log, terms, strict=True), 1):
        check_close(f"loss terms of step {step}", [line[name] for name in own], list(own.values()))
    check_rows(found, "after", model.eval(), bench)
    with torch.no_grad():
        saved = peft.PeftModel.from_pretrained(fresh, str(run / "adapter")).eval()
        for row in bench.rows["forget"]:
            check_close("logits of the saved adapter", log_probabilities(saved, row)[0], log_probabilities(model, row)[0])
            if torch.equal(log_probabilities(saved, row), before["forget"][bench.rows["forget"].index(row)]):
                raise Broken("the saved adapter changes nothing")


def untrained(base: Any, adapter: Path) -> Any:
    """The base with a fresh adapter of the kind that was saved there."""
    config = peft.PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


@torch.no_grad()
def check_rows(found: pd.DataFrame, column: str, model: Any, bench: Bench) -> None:
    """Compare what the evaluation kept of one model's rows: log-likelihood and written text."""
    for name, of_set in bench.rows.items():
        mine = found[(found["set"] == name) & (found["model"] == column)]
        theirs = [-float(likelihood(log_probabilities(model, row), row).sum()) for row in of_set]
        check_close(f"log-likelihood of {name}, {column}", list(mine["nll"]), theirs)
        texts = [write(model, row, bench.tokenizer) for row in of_set] if name == "forget" else []
        if name == "forget" and list(mine["written"]) != texts:
            raise Broken(f"texts of {name}, {column}: {list(mine['written'])} instead of {texts}")


def examine(kind: str, bench: Bench, folder: Path) -> str:
    """Run the main job on a small model of an architecture and compare it; an empty text, or why it is refused.

    Raises:
        Broken: it is neither right nor refused in words, alike by `plan` and `run`.
    """
    small_model(kind).save_pretrained(folder / "base")
    bench.tokenizer.save_pretrained(folder / "base")
    recipe = str(bench.recipe(folder / "base", folder / "run"))
    planned, ran = command("plan", recipe), command("run", recipe)
    if (planned.code, ran.code) == (0, 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            check_lora(folder / "base", bench, folder / "run")
        return ""
    if (planned.code, ran.code) != (2, 2) or planned.errors != ran.errors:
        raise Broken(f"plan: {planned.code} {planned.errors}; run: {ran.code} {ran.errors}")
    return planned.errors


@dataclass(frozen=True)
class Abilities:
    """What training may use with an architecture beyond plain LoRA."""

    packing: bool
    """Sequences end to end give the numbers of padded ones."""
    depth: bool
    """A pass that ends at a lower layer gives that layer's output of a whole pass."""
    sharding: bool
    """Its decoder layers are modules that a forward pass calls once each, which is what `fully_shard` needs of them."""


def abilities(kind: str) -> Abilities:
    """Try on a small model what `train` tries before it relies on an architecture."""
    model = small_model(kind)
    try:
        check_depth(model, (0,))
        depth = True
    except Refused:
        depth = False
    calls: list[int] = []
    _, layers = decoder_layers(model)
    handles = [layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        model(input_ids=torch.arange(4, 12)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return Abilities(can_pack(model, 7), depth, calls == list(range(len(layers))))


PAGE_FILE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """\
| model type | class | LoRA | packing | depth | FSDP2 |
|---|---|---|---|---|---|
"""


def line_of(kind: str, found: Abilities) -> str:
    """The line of docs/models.md of an architecture that is right."""
    marks = " | ".join("yes" if mark else "no" for mark in (found.packing, found.depth, found.sharding))
    return f"| {kind} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | yes | {marks} |"


def lines_in(page: str) -> dict[str, str]:
    """Model type -> its line of the table."""
    table = page.partition(HEAD)[2].partition("\n\n")[0]
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}


def write_page(kinds: Sequence[str]) -> None:
    """Write the lines of these architectures into docs/models.md; the others stay."""
    page = PAGE_FILE.read_text(encoding="utf-8")
    before, _, table = page.partition(HEAD)
    lines = lines_in(page)
    for kind in kinds:
        lines[kind] = line_of(kind, abilities(kind))
    text = "".join(lines[kind] + "\n" for kind in sorted(lines))
    PAGE_FILE.write_text(before + HEAD + text + "\n" + table.partition("\n\n")[2], encoding="utf-8")


def main_() -> None:
    """Examine architectures, and print of each whether it is right, or why not."""
    warnings.simplefilter("error")
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench.of(Path(place))
        for kind in [word for word in sys.argv[1:] if word != "--write"] or KINDS:
            folder = Path(place) / kind
            folder.mkdir()
            began = time.process_time()
            try:
                result = examine(kind, bench, folder) or "right"
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            results[kind] = result
            print(f"{kind} ({time.process_time() - began:.1f} s): {result}", flush=True)
    if "--write" in sys.argv:
        write_page([kind for kind, result in results.items() if result == "right"])


if __name__ == "__main__":
    main_()
