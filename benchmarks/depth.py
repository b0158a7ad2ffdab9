"""What a step of a representation loss costs when the model ends at the layer that is read.

The same step — RMU on the forget stream, `embed_match` on the retain stream, a LoRA adapter on the layers up to the one that is
read — with that layer at the end of the model, at half of it and at a quarter, and beside them the gradient difference of
log-likelihoods, which needs the output head. Windows, adapters and the passes over the model as it was are those of a run.

    python benchmarks/depth.py [--layers 16] [--hidden 384] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from llm_unlearn.data.examples import Example
from llm_unlearn.data.schedule import build
from llm_unlearn.models.load import add_adapter
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.models.trials import freeze_unreached
from llm_unlearn.objectives.likelihood import NLL, Ascent
from llm_unlearn.objectives.representation import RMU, EmbedMatch
from llm_unlearn.objectives.terms import Term
from llm_unlearn.sections import Adapter, Train
from llm_unlearn.training.before import reference_of
from llm_unlearn.training.window import Job, Model, Window


def make_step(options: Any, layer: int | None, accelerator: Accelerator) -> Callable[[], object]:
    """Forward, backward and the pass over the model as it was, for losses that end at a layer, or at the head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=6,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(accelerator.device)
    model = add_adapter(base, Adapter(layers=None if layer is None else tuple(range(layer + 1))), seed=0)
    streams: dict[str, list[Example]] = {"forget": [], "retain": []}
    for stream, examples in streams.items():
        for i in range(16):
            prompt, answer = (int(size) for size in torch.randint(10, 60, (2,)))
            examples.append(Example(tuple(torch.randint(0, options.vocabulary, (prompt + answer,)).tolist()), prompt, stream, i))
    terms = {"forget": Term(loss=Ascent()), "retain": Term(loss=NLL(), weight=5.0)}
    if layer is not None:
        terms = {"forget": Term(loss=RMU(layer=layer)), "retain": Term(loss=EmbedMatch(layers=(layer,)), weight=100.0)}
        freeze_unreached(model, (layer,))
    job = Job(terms, streams, build({"forget": 16, "retain": 16}, {"forget": 16, "retain": 16}, seed=0), Train(batch_tokens=2048))
    scorer, head = Scorer(model), head_of(model)
    asked = Model(scorer, scorer, head, reference_of(job, scorer, head, accelerator, 2048))
    weights = {name: term.weight_at(0.0) for name, term in terms.items()}

    def step() -> None:
        model.zero_grad()
        Window(job, 0, accelerator).backward(terms, weights, asked)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    depths = {"whole": options.layers - 1, "half": options.layers // 2 - 1, "quarter": options.layers // 4 - 1, "head": None}
    steps = {name: make_step(options, layer, accelerator) for name, layer in depths.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_:  # the first is for warming up
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["whole"], strict=True))
        what = (
            "log-likelihoods, through the head" if depths[name] is None else f"states of layer {depths[name]} of {options.layers}"
        )
        print(f"{name:<8} {statistics.median(times):7.3f} s a step, {ratio:.2f} of the whole depth   ({what})")


if __name__ == "__main__":
    main()
