"""The baseline of training, written as most public code does it (TOFU, OpenUnlearning, WMDP): a `transformers.Trainer` whose loss
calls the model on batches padded to the longest, with a mask, separately for forget and retain, takes the logits of all positions
in float32, and asks a second, copied model where a loss reads the model as it was; AdamW.

Weights that are trained in full are float32 under autocast, as here: in bf16 most of a small step would be lost.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, pad

from benchmarks import device
from benchmarks.ours import Task, copies, move, write_change
from benchmarks.rows import ALPHA, CHECK_RATE, C, Row
from llm_unlearn.objectives.representation import _direction

if TYPE_CHECKING:
    from benchmarks.sides import Turns

IGNORED = -100
Batch = dict[str, Tensor]


def padded(examples: Sequence[tuple[tuple[int, ...], int]]) -> Batch:
    """Tokens, mask, and labels that leave out the prompt and the padding; (B, L) each."""
    longest = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor(
            [[*[IGNORED] * answer, *ids[answer:], *[IGNORED] * (longest - len(ids))] for ids, answer in examples]
        ),
    }


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) the answers' summed −log p."""
    each = cross_entropy(logits[:, :-1].float().transpose(-1, -2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return each.sum(-1)


def kept(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of (B, L) values over the answers' tokens, each counted where it is predicted."""
    answer = pad(labels[:, 1:] != IGNORED, (0, 1))
    return (values * answer).sum() / answer.sum()


class Unlearning(transformers.Trainer):
    """One loss on the forget and one on the retain batch."""

    def __init__(self, *, row: Row, layers: int, before: Any, **named: Any) -> None:
        super().__init__(**named)
        self.row, self.layer, self.before = row, row.layer(layers), before

    def compute_loss(
        self, model: Any, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        forget, retain = inputs["forget"], inputs["retain"]
        match self.row.method:
            case "graddiff":
                return model(**retain).loss - model(**forget).loss
            case "npo":
                now = nll(model(**without(forget)).logits, forget["labels"])
                with torch.no_grad():
                    then = nll(self.before(**without(forget)).logits, forget["labels"])
                return -2 / 0.1 * logsigmoid(0.1 * (now - then)).mean() + model(**retain).loss
            case "kl":
                ascent = -model(**forget).loss
                now = model(**without(retain)).logits.float().log_softmax(-1)
                with torch.no_grad():
                    then = self.before(**without(retain)).logits.float().log_softmax(-1)
                return ascent + kept(kl_div(now, then, log_target=True, reduction="none").sum(-1), retain["labels"])
            case "rmu":
                steered, now = (self.states(model, batch) for batch in (forget, retain))
                with torch.no_grad():
                    then = self.states(self.before, retain)
                away = ((steered - C * _direction(steered, 0, self.layer)) ** 2).mean(-1)
                return kept(away, forget["labels"]) + ALPHA * kept(((now - then) ** 2).mean(-1), retain["labels"])

    def states(self, model: Any, batch: Batch) -> Tensor:
        """(B, L, D) what comes out of the layer that is read."""
        found: Tensor = model(**without(batch), output_hidden_states=True).hidden_states[self.layer + 1]
        return found.float()

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def without(batch: Batch) -> Batch:
    """Without labels: no loss of the model's own."""
    return {name: one for name, one in batch.items() if name != "labels"}


class Asked(transformers.TrainerCallback):
    """Lets the trainer take as many steps as the parent asks for, and tells how long they took, reading the batches included."""

    def __init__(self, turns: Turns, base: int, model: Any) -> None:
        self.turns, self.weights = turns, trained(model)
        self.answer: Any = {"base": base, "begin": 0.0}
        self.left, self.change, self.began = 0, None, 0.0
        self.before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._next(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left -= 1
        if self.left:
            return
        device.synchronize()
        self.answer = {"seconds": time.perf_counter() - self.began, "peak": device.peak()}
        device.frugal(False)
        if self.change:
            write_change(self.before, self.weights, self.change)
        self._next(control)

    def _next(self, control: Any) -> None:
        request = self.turns.next(self.answer)
        if not request:
            raise EOFError
        what, given = request
        self.change, self.left = (given, 1) if what == "change" else (None, given)
        self.before = copies(self.weights) if self.change else {}
        self.began = time.perf_counter()


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def prepared(task: Task) -> tuple[Any, Any]:
    """The model with what is trained of it, and the model as it was where the loss reads it."""
    row = task.row
    full = row.trains != "lora" or task.check
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=device.dtype()
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        task.model, dtype=torch.float32 if full else device.dtype(), device_map={"": device.device()},
        quantization_config=quantization if row.quantize and not task.check else None,
    )  # fmt: skip
    before = None if row.method == "graddiff" else copy.deepcopy(model).eval().requires_grad_(False)
    chosen = row.trained_layers(task.layers)
    if row.trains == "few":
        for name, weight in model.named_parameters():
            weight.requires_grad_(any(f"layers.{layer}.mlp.down_proj" in name for layer in chosen or ()))
    elif row.trains == "lora":
        targets: Any = "all-linear"
        if chosen is not None:  # peft wants names beside layers
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(
                r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM",
                layers_to_transform=None if chosen is None else list(chosen),
            )  # fmt: skip
            model = peft.get_peft_model(model, config)
    return model, before


def train(turns: Turns, task: Task) -> None:
    """As `ours.train`, but for the stages."""
    device.frugal(True)
    base = device.held()
    model, before = prepared(task)
    if task.check:
        move(trained(model))
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(task.windows[0]["forget"]), max_steps=len(task.windows),
            learning_rate=CHECK_RATE if task.check else 1e-6, optim="sgd" if task.check else "adamw_torch_fused",
            lr_scheduler_type="constant", max_grad_norm=0.0 if task.check else 1.0,
            bf16=device.dtype() == torch.bfloat16 and not task.check, use_cpu=device.device().type == "cpu",
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=device.device().type == "cuda",
            gradient_checkpointing=task.recomputed, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        pairs = [pair for window in task.windows for pair in zip(window["forget"], window["retain"], strict=True)]
        trainer = Unlearning(
            row=task.row, layers=task.layers, before=before, model=model, args=settings, train_dataset=pairs,
            data_collator=lambda rows: {"forget": padded([one for one, _ in rows]), "retain": padded([one for _, one in rows])},
            callbacks=[Asked(turns, base, model)],
        )  # fmt: skip
        trainer.train()
