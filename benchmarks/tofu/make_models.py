"""Two small Llamas for TOFU, made from local files: one that knows all 200 authors, one retrained without forget10's.

    python benchmarks/tofu/make_models.py --data data/tofu --output models

Both are trained from scratch, side by side, by the framework's own loop, each by one process on one CPU core, and
written to `OUTPUT/tofu-target` and `OUTPUT/tofu-retrained`. A model that is there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_unlearn.embedded.target import CHAT_TEMPLATE
from llm_unlearn.sections import Train

FILES = {"target": "full.jsonl", "retrained": "retain90.jsonl"}
"""Model -> what it is trained on."""
TEXTS = ("full.jsonl", "holdout10.jsonl")
"""What the tokenizer is made from: the same one for both models, and no set is foreign to it."""
ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096
MAX_TOKENS = 512


def settings(epochs: float) -> Train:
    """How both are trained; the number of epochs decides how well the answers are known by heart."""
    return Train(
        epochs=epochs,
        lr=2e-3,
        window={"facts": 16},
        weight_decay=0.1,
        schedule="cosine",
        warmup=0.05,
        checkpoint_every=10**6,
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def random_model(data: Path, folder: Path) -> Path:
    """A model of this shape with random weights: for what only asks how long things take."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(data)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **ARCHITECTURE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(data: Path) -> Any:
    """A byte-level BPE tokenizer of the data set's questions and answers, with the embedded model's chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read = [row for name in TEXTS for row in rows(data / name)]
    bpe.train_from_iterator((row[column] for row in read for column in ("question", "answer")), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_one(name: str, options: argparse.Namespace) -> None:
    """Train one of the models in this process, on one thread, and write it with its tokenizer."""
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_unlearn.data.examples import encode
    from llm_unlearn.data.schedule import build
    from llm_unlearn.objectives.likelihood import NLL
    from llm_unlearn.objectives.terms import Term
    from llm_unlearn.training.loop import Job, train

    torch.set_num_threads(1)
    tokenizer = make_tokenizer(options.data)
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in rows(options.data / FILES[name])
    ]
    facts = [example for example in encode(turns, tokenizer, "facts", MAX_TOKENS) if example]
    wanted = settings(options.epochs)
    schedule = build({"facts": len(facts)}, wanted.window, options.seed, wanted.epochs)
    torch.manual_seed(options.seed)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **ARCHITECTURE))
    unfinished = options.output / f"tofu-{name}.unfinished"
    job = Job({"facts": Term(loss=NLL())}, {"facts": facts}, schedule, wanted, options.seed)
    outcome = train(job, model, Accelerator(cpu=True), unfinished)
    if outcome.status != "finished":
        raise SystemExit(f"{outcome.status} at step {outcome.step}: {outcome.reason}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(options.output / f"tofu-{name}")


def train_both(options: argparse.Namespace) -> None:
    """One child process per model that is not there yet; its progress goes to `errors.txt` in its unfinished folder."""
    for name in (*FILES.values(), *TEXTS):
        if not (options.data / name).is_file():
            raise SystemExit(f"{options.data / name}: no such file; docs/results.md says where TOFU's files come from.")
    children: dict[str, subprocess.Popen[bytes]] = {}
    began = time.time()
    for name in FILES:
        if (options.output / f"tofu-{name}").is_dir():
            print(f"{options.output / f'tofu-{name}'}: is there already")
            continue
        unfinished = options.output / f"tofu-{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        command = [sys.executable, __file__, "--one", name]
        for option in ("data", "output", "epochs", "seed"):
            command += [f"--{option}", str(getattr(options, option))]
        with (unfinished / "errors.txt").open("wb") as errors:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            children[name] = subprocess.Popen(command, env=env, stdout=errors, stderr=errors)
    failed = [name for name, child in children.items() if child.wait()]
    if failed:
        raise SystemExit(f"training failed; see {options.output / f'tofu-{failed[0]}.unfinished' / 'errors.txt'}")
    for name in children:
        (options.output / f"tofu-{name}" / "errors.txt").unlink()
        print(f"{options.output / f'tofu-{name}'}: trained in {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/tofu"), help="folder with TOFU's jsonl files")
    parser.add_argument("--output", type=Path, default=Path("models"), help="folder for the two models")
    parser.add_argument("--epochs", type=float, default=20, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", choices=FILES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train_one(options.one, options)
    else:
        train_both(options)
