"""Examine an architecture: the main job on a small model of it, against plain transformers and peft, one sequence at a time.

python tests/architectures.py llama rwkv           # examine these; without a name, all
python tests/architectures.py llama rwkv --write   # and write their lines into docs/models.md, with full weights and nf4 tried
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import peft
import torch
from small_models import IDS, KINDS, POPULAR, small_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_unlearn.cli import main
from llm_unlearn.embedded.population import rows
from llm_unlearn.embedded.target import make_tokenizer
from llm_unlearn.models.quantized import prepare_4bit_on_cpu
from llm_unlearn.models.structure import decoder_layers
from llm_unlearn.models.trainable_weights import choose_weights
from llm_unlearn.models.trials import can_pack, check_depth
from llm_unlearn.spec import Refused

ROWS, LIMIT = 3, 6
"""Rows of each set, and tokens of an answer that the model writes."""
BETA, WEIGHTS, RATE = 0.5, {"forget": 1.0, "retain": 2.0, "keep": 0.5}, 0.05

RECIPE = f"""\
output: OUTPUT
model: {{base: BASE, MODEL}}
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


FORMS = {
    "LoRA": "adapter: {rank: 4, alpha: 8}",
    "full": "adapter: null",
    "nf4": "adapter: {rank: 4, alpha: 8}, quantize: nf4",
}
"""Column of the table -> settings of a recipe's model."""


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

    def recipe(self, base: Path, output: Path, form: str) -> Path:
        text = RECIPE.replace("FOLDER", str(self.folder)).replace("BASE", str(base)).replace("OUTPUT", str(output))
        text = text.replace("MODEL", FORMS[form])
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


def check_run(folder: Path, bench: Bench, run: Path, form: str) -> None:
    """Compare a run of the recipe with the same two steps by plain transformers and peft.

    Raises:
        Broken: loss terms, log-likelihoods, texts or the saved weights differ.
    """
    rows_of = pd.read_parquet(run / "evaluation.parquet")
    base = load_plainly(folder, form)
    with torch.no_grad():
        before = {name: [log_probabilities(base, row) for row in of_set] for name, of_set in bench.rows.items()}
    check_rows(rows_of, "before", base, bench)
    if form == "full":
        choose_weights(base, None)
    model = base if form == "full" else untrained(base, run / "adapter")
    terms = train(model, bench, before)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for step, (line, own) in enumerate(zip(log, terms, strict=True), 1):
        check_close(f"loss terms of step {step}", [line[name] for name in own], list(own.values()))
    check_rows(rows_of, "after", model.eval(), bench)
    with torch.no_grad():
        if form == "full":
            saved = load_plainly(run / "model", form)
        else:
            saved = peft.PeftModel.from_pretrained(load_plainly(folder, form), str(run / "adapter")).eval()
        for row, old in zip(bench.rows["forget"], before["forget"], strict=True):
            check_close("logits of the saved weights", log_probabilities(saved, row)[0], log_probabilities(model, row)[0])
            if torch.equal(log_probabilities(saved, row), old):
                raise Broken("the saved weights change nothing")


def load_plainly(folder: Path, form: str) -> Any:
    """A model as transformers reads it, in 4 bits where the form says so."""
    if form != "nf4":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=bits, device_map={"": "cpu"})
    prepare_4bit_on_cpu(model)
    return model.eval()


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


def examine(kind: str, bench: Bench, folder: Path, form: str = "LoRA") -> str:
    """Run the main job on a small model of an architecture and compare it; an empty text, or why it is refused.

    Raises:
        Broken: it is neither right nor refused in words, alike by `plan` and `run`.
    """
    base, output = folder / "base", folder / f"run-{form}"
    small_model(kind).save_pretrained(base)
    bench.tokenizer.save_pretrained(base)
    recipe = str(bench.recipe(base, output, form))
    planned, ran = command("plan", recipe), command("run", recipe)
    if (planned.code, ran.code) == (0, 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            check_run(base, bench, output, form)
        return ""
    if ran.code != 2 or (planned.code, planned.errors) not in ((2, ran.errors), (0, "")):
        raise Broken(f"plan: {planned.code} {planned.errors}; run: {ran.code} {ran.errors}")
    if "log.jsonl" in {path.name for path in output.glob("*")}:
        raise Broken(f"run: refused only after the training began: {ran.errors}")
    return ran.errors if planned.code else f"{ran.errors}{BY_RUN}"


BY_RUN = " (by `run` only, before training)"
"""Note on a refusal that only weights can decide."""


@dataclass(frozen=True)
class Abilities:
    """Features that training may use with an architecture beyond plain LoRA."""

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
COLUMNS = ("model type", "class", *FORMS, "packing", "depth", "FSDP2", "tested by")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
REFUSED_HEAD = "| model type | reason |\n|---|---|\n"


def claims(kind: str) -> dict[str, str]:
    """Return the columns of the page that a test can find out in a second: column -> text."""
    tried = abilities(kind)
    marks = {"packing": tried.packing, "depth": tried.depth, "FSDP2": tried.sharding}
    return {
        "model type": kind,
        "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind],
        "LoRA": "yes",
        **{name: "yes" if mark else "no" for name, mark in marks.items()},
        "tested by": "make test" if kind in POPULAR else "make test-long",
    }


def lines_in(page: str, head: str = HEAD) -> dict[str, dict[str, str]]:
    """Model type -> column -> text of a table."""
    names = [name.strip() for name in head.splitlines()[0].strip("|").split("|")]
    table = takewhile(lambda line: line.startswith("|"), page.partition(head)[2].splitlines())
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {cells[0]: dict(zip(names, cells, strict=True)) for cells in lines}


def try_forms(kind: str, bench: Bench, folder: Path) -> dict[str, str]:
    """Column -> yes, or no, of the forms beyond LoRA; what is wrong with them is printed."""
    marks = {}
    for form in [form for form in FORMS if form != "LoRA"]:
        try:
            result = examine(kind, bench, folder, form)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        marks[form] = "no" if result else "yes"
        if result:
            print(f"  {form}: {result}", flush=True)
    return marks


def write_page(supported: dict[str, dict[str, str]], refused: dict[str, str]) -> None:
    """Write these lines into the two tables of docs/models.md; those of other architectures stay."""
    page = PAGE_FILE.read_text(encoding="utf-8")
    lines = {kind: cells for kind, cells in lines_in(page).items() if kind not in refused} | supported
    reasons = {kind: cells["reason"] for kind, cells in lines_in(page, REFUSED_HEAD).items() if kind not in supported} | refused
    for head, table in (
        (HEAD, [" | ".join(lines[kind][name] for name in COLUMNS) for kind in sorted(lines)]),
        (REFUSED_HEAD, [f"{kind} | {reasons[kind]}" for kind in sorted(reasons)]),
    ):
        before, _, rest = page.partition(head)
        after = "".join(dropwhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True)))
        page = before + head + "".join(f"| {line} |\n" for line in table) + after
    PAGE_FILE.write_text(page, encoding="utf-8")


def main_() -> None:
    """Examine architectures, and print of each whether it is right, or why not."""
    warnings.simplefilter("error")
    supported: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["LLM_UNLEARN_CACHE"] = str(Path(place) / "cache")  # what an earlier version measured proves nothing
        bench = Bench.of(Path(place))
        for kind in [word for word in sys.argv[1:] if word != "--write"] or KINDS:
            folder = Path(place) / kind
            folder.mkdir()
            began = time.process_time()
            try:
                result = examine(kind, bench, folder)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            else:
                if result:
                    refused[kind] = result.removeprefix("error: ").replace(f"{folder}/base: ", "").partition("|")[0]
            print(f"{kind} ({time.process_time() - began:.1f} s): {result or 'right'}", flush=True)
            if not result and "--write" in sys.argv:
                supported[kind] = claims(kind) | try_forms(kind, bench, folder)
            if "--write" in sys.argv:
                write_page(supported, refused)


if __name__ == "__main__":
    main_()
