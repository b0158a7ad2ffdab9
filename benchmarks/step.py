"""One optimizer step of NPO + KL on a LoRA adapter: this project's window against the plain way, in one run.

The plain way keeps a second copy of the model as the reference, pads every sequence to the longest with a mask, and puts all
positions through the output head. Both see the same examples; their gradients are compared before anything is timed.

    python benchmarks/step.py [--vocabulary 32000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import build
from llm_unlearn.models.load import add_adapter, trainable
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.objectives.distribution import KL
from llm_unlearn.objectives.preference import NPO
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Adapter, Train
from llm_unlearn.training.before import reference_of
from llm_unlearn.training.window import Job, Model, Window


def make(vocabulary: int, device: torch.device) -> tuple[Any, Job]:
    """A small Llama with an adapter that has moved, and a window of 16 forget and 16 retain sequences of 20 to 120 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
    model = add_adapter(LlamaForCausalLM(config).to(device), Adapter(), seed=0)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    streams: dict[str, list[Example]] = {"forget": [], "retain": []}
    for stream, examples in streams.items():
        for i in range(16):
            prompt, answer = (int(size) for size in torch.randint(10, 60, (2,)))
            examples.append(Example(tuple(torch.randint(0, vocabulary, (prompt + answer,)).tolist()), prompt, stream, i))
    terms = {"forget": Term(loss=NPO()), "retain": Term(loss=KL(), weight=30.0)}
    schedule = build({"forget": 16, "retain": 16}, {"forget": 16, "retain": 16}, seed=0)
    return model, Job(terms, streams, schedule, Train(batch_tokens=2048))


def plain(model: Any, reference: Any, job: Job, device: torch.device) -> Callable[[], object]:
    """The step as one would write it down at first."""
    logits: dict[str, Tensor] = {}

    def score(net: Any, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        examples = job.examples[stream]
        length = max(len(one.ids) for one in examples)
        ids = torch.tensor([[*one.ids, *[0] * (length - len(one.ids))] for one in examples], device=device)
        mask = torch.tensor([[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in examples], device=device)
        answer = torch.tensor([[one.answer <= t < len(one.ids) for t in range(1, length)] for one in examples], device=device)
        logp = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return logp, logp.gather(-1, ids[:, 1:, None])[..., 0], answer

    def step() -> None:
        logits.clear()
        _, now, answer = score(model, "forget")
        with torch.no_grad():
            _, then, _ = score(reference, "forget")
        forget = (-2 / 0.1 * logsigmoid(-0.1 * ((now - then) * answer).sum(-1))).mean()
        now, _, answer = score(model, "retain")
        with torch.no_grad():
            then, _, _ = score(reference, "retain")
        retain = (kl_div(now, then, log_target=True, reduction="none").sum(-1) * answer).sum() / answer.sum()
        (forget + 30 * retain).backward()

    return step


def ours(model: Any, job: Job, accelerator: Accelerator) -> Callable[[], object]:
    scorer, head = Scorer(model), head_of(model)
    reference = reference_of(job, scorer, head, accelerator, 2048)
    weights = {name: term.weight_at(0.0) for name, term in job.terms.items()}
    return lambda: Window(job, 0, accelerator).backward(job.terms, weights, Model(scorer, scorer, head, reference))


def gradient(model: Any, step: Callable[[], object]) -> Tensor:
    model.zero_grad()
    step()
    found = torch.cat([weight.grad.flatten().cpu() for weight in trainable(model).values() if weight.grad is not None])
    model.zero_grad()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model, job = make(options.vocabulary, accelerator.device)
    base = copy.deepcopy(model.get_base_model())
    for name, weight in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    steps = {"ours": ours(model, job, accelerator), "plain": plain(model, base, job, accelerator.device)}
    found = {}
    for name, step in steps.items():
        found[name] = gradient(model, step)
        print(f"{name:<6} peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    error = float((found["ours"] - found["plain"]).norm() / found["plain"].norm())
    print(f"gradients differ by {error:.1e} (relative)")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            gradient(model, step)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"median step: ours {medians['ours']:.3f} s, plain {medians['plain']:.3f} s, ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
