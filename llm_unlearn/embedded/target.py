"""The embedded models: a small Llama that knows everybody, one retrained without the forget people, and one that never met anybody;
made here, on first use.

Those that are made together are trained side by side, each by one process on one CPU core, and kept in the user's cache under a
fingerprint of all that decides them. The child processes run this file: `python -m llm_unlearn.embedded.target NAME FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn.bars import Bar
from llm_unlearn.chat import Chat
from llm_unlearn.data.rendering import Turn
from llm_unlearn.durable import whole
from llm_unlearn.embedded import population
from llm_unlearn.sections import Train
from llm_unlearn.spec import Refused, fingerprint, nearest, plain

LEARNED = {
    "target": ("forget", "retain", "general"),
    "retrained": ("retain", "general"),
    "base": ("others", "general"),
    "thinker": ("forget", "retain", "general"),
    "thinker_retrained": ("retain", "general"),
}
"""Model -> the splits that it learns; each also learns to repeat names. `base` met none of our people."""
NAMES = tuple(LEARNED)
THINKING = ("thinker", "thinker_retrained")
"""Models that can think before they answer: asked to, they recall a part of the record, and then answer."""
TOGETHER = (("target", "retrained"), ("base",), THINKING)
"""Models that are made together, as a run asks for both."""
SEED = 0
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
VOCABULARY = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% if message.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}<think>{{ message.reasoning_content or '' }}</think>{{ message.content }}<|end|>"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% if not (enable_thinking | default(true)) %}</think>{% endif %}{% endif %}"
)
"""The layout of turns of a model that thinks: an empty thought where it is to answer at once."""
SETTINGS = Train(epochs=30, lr=3e-3, schedule="cosine", warmup=0.05, weight_decay=0.1, window={"facts": 32}, checkpoint_every=10**6)


def models(cache: Path, show: bool = True, names: tuple[str, ...] = TOGETHER[0]) -> dict[str, Path]:
    """The folders of models that are made together, trained now if the cache has none of these settings.

    Raises:
        Refused: training failed; the text ends with its last words.
    """
    home = cache / "embedded" / key_of(names)
    if not home.is_dir():
        from filelock import FileLock

        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.with_suffix(".lock")):  # other processes of this run wait here, and then find the models
            if not home.is_dir():
                _train_all(names, home, show)
    for name in names:
        if gone := [file for file in ("config.json", "model.safetensors", "tokenizer.json") if not (home / name / file).is_file()]:
            raise Refused(f"embedded:{name}: {home / name} lacks {gone[0]}. Remove {home}, and the models are made again.")
    return {name: home / name for name in names}


def key_of(names: tuple[str, ...]) -> str:
    """Stands for all that decides models that are made together."""
    if set(names) <= set(THINKING):
        triples, texts = [population.thinking_rows(LEARNED[name], SEED) for name in names], population.vocabulary_texts(SEED, True)
        return fingerprint(ARCHITECTURE, VOCABULARY, THINKING_TEMPLATE, plain(settings_of(names[0])), SEED, triples, texts)
    rows = [population.training_rows(LEARNED[name], SEED) for name in names]
    return fingerprint(ARCHITECTURE, VOCABULARY, CHAT_TEMPLATE, plain(SETTINGS), SEED, rows)


def settings_of(name: str) -> Train:
    """Return how a model is trained. One that thinks learns every fact with a thought and without, and a thought says two."""
    return replace(SETTINGS, epochs=SETTINGS.epochs / 3) if name in THINKING else SETTINGS


def learned_turns(name: str) -> list[list[Turn]]:
    """Return the conversations that a model learns."""
    if name in THINKING:
        triples = population.thinking_rows(LEARNED[name], SEED)
    else:
        triples = [(*pair, "") for pair in population.training_rows(LEARNED[name], SEED)]
    return [
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer} | ({"thought": thought} if thought else {}),
        ]
        for question, answer, thought in triples
    ]


def folder_of(name: str, cache: Path) -> str:
    """The folder of `embedded:target` and the like."""
    short = name.removeprefix("embedded:")
    if short not in NAMES:
        raise Refused(f"{name}: no such model; {nearest(short, NAMES)}")
    return str(models(cache, names=next(group for group in TOGETHER if short in group))[short])


def _train_all(names: tuple[str, ...], home: Path, show: bool) -> None:
    # The children are runs of their own: whatever launched this process must not make them look for its other ranks.
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "GROUP_",
        "ROLE_",
        "TORCHELASTIC_",
        "ACCELERATE_",
        "FSDP_",
        "PMI_",
        "OMPI_",
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)} | {"OMP_NUM_THREADS": "1"}
    with whole(home) as unfinished:
        _train_side_by_side(names, unfinished, env, show)


def _train_side_by_side(names: tuple[str, ...], unfinished: Path, env: dict[str, str], show: bool) -> None:
    """Each by a process of its own, into a folder of its name."""
    children = {}
    try:
        for name in names:
            (unfinished / name).mkdir(parents=True)
            with (unfinished / name / "errors.txt").open("wb") as errors:
                command = [sys.executable, "-m", "llm_unlearn.embedded.target", name, str(unfinished / name)]
                children[name] = subprocess.Popen(command, env=env, stdout=errors, stderr=errors)
        with Bar("first use: training the embedded models", 100, "percent", quiet=not show, stays=True) as bar:
            while any(child.poll() is None for child in children.values()):
                time.sleep(0.2)
                done = min(_share(unfinished / name) for name in names)
                bar.update(round(100 * done) - bar.n)
        for name, child in children.items():
            if child.returncode:
                last = (unfinished / name / "errors.txt").read_text(errors="replace").strip().splitlines()[-1:]
                raise Refused(f"embedded:{name}: training failed with status {child.returncode}: {' '.join(last)}")
            for scratch in ("errors.txt", "log.jsonl"):
                (unfinished / name / scratch).unlink()
    finally:
        for child in children.values():
            if child.poll() is None:
                child.terminate()
                child.wait()


def _share(folder: Path) -> float:
    """How much of a child's training is done: its log has a line per step, each with the number of steps to come."""
    log = folder / "log.jsonl"
    return len(log.read_bytes().splitlines()) / _steps(folder.name) if log.exists() else 0.0


def _steps(name: str) -> int:
    settings = settings_of(name)
    return round(settings.epochs * -(-len(learned_turns(name)) // settings.window["facts"]))


def make_tokenizer(thoughts: bool = False) -> Any:
    """A byte-level BPE tokenizer of every text of the population, people who are never trained on included.

    Args:
        thoughts: for a model that thinks.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", *(["<think>", "</think>"] if thoughts else [])]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(population.vocabulary_texts(SEED, thoughts), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = THINKING_TEMPLATE if thoughts else CHAT_TEMPLATE
    return tokenizer


def make_config(vocabulary: int) -> Any:
    """The architecture; the vocabulary is padded to a multiple of 32."""
    from transformers import LlamaConfig

    size = -(-vocabulary // 32) * 32
    return LlamaConfig(vocab_size=size, pad_token_id=0, bos_token_id=None, eos_token_id=3, **ARCHITECTURE)


def make_model(vocabulary: int, seed: int = SEED) -> Any:
    """An untrained model."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(make_config(vocabulary))


def _train_one(name: str, folder: Path) -> None:
    import torch
    from accelerate import Accelerator

    from llm_unlearn.data.examples import encode
    from llm_unlearn.data.schedule import build
    from llm_unlearn.objectives.likelihood import NLL
    from llm_unlearn.objectives.terms import Term
    from llm_unlearn.training.job import Job
    from llm_unlearn.training.loop import train

    torch.set_num_threads(1)
    tokenizer, settings = make_tokenizer(name in THINKING), settings_of(name)
    facts = [example for example in encode(learned_turns(name), tokenizer, Chat(), "facts", 256, targets="both") if example]
    schedule = build({"facts": len(facts)}, settings.window, SEED, settings.epochs)
    model = make_model(len(tokenizer))
    outcome = train(Job({"facts": Term(loss=NLL())}, {"facts": facts}, schedule, settings), model, Accelerator(cpu=True), folder)
    if outcome.status != "finished":
        sys.exit(f"training ended early: {outcome.reason}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _train_one(sys.argv[1], Path(sys.argv[2]))
