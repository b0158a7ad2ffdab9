"""One audit carried out: made-up rows are put into a recipe's data by fair coins, the recipe is trained, and what it learnt of each
row tells which were in (Steinke, Nasr & Jagielski 2023, 2305.08846; `attacks/canaries.py` has what guesses refute)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm_unlearn import folder as run_folder
from llm_unlearn.attacks.canaries import Audited, refuted
from llm_unlearn.attacks.canaries import audit as guess
from llm_unlearn.auditing.request import FILE, Asked, said
from llm_unlearn.bars import Bar
from llm_unlearn.bases import folder_of, resolve_base
from llm_unlearn.data.examples import Example, draw, encode, encode_text
from llm_unlearn.data.reading import Examples, read_examples
from llm_unlearn.durable import remove
from llm_unlearn.evaluation.likelihood import loss_pass
from llm_unlearn.models.load import Loaded, load, read_tokenizer
from llm_unlearn.models.outline import check_outline, outline_of
from llm_unlearn.recipe import Recipe
from llm_unlearn.run import make_job, prepare, start
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused
from llm_unlearn.training import secret, sharded
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import check, train

CONFIDENCE = 0.95
DELTA = 1e-5
"""δ of the bound where the recipe claims nothing."""
QUESTION = 6
"""Words of a made-up question."""
FEWEST = 50
"""Words without which made-up rows would be too much alike."""


@dataclass(frozen=True)
class Planted:
    """A recipe's rows with canaries among them."""

    examples: Examples
    stream: str
    canaries: list[Example]
    inside: NDArray[np.bool_]  # (m,) whether a canary is among the rows


def trial(asked: Asked, cache: Path, overwrite: bool) -> bool:
    """Train the recipe with canaries, guess, print and write what the guesses refute.

    Returns:
        Whether it came to its end; it was interrupted otherwise, and goes on the next time.

    Raises:
        Refused: something that the recipe names cannot be used, δ is too large for so many rows, or a loss was not finite.
    """
    recipe, folder = asked.recipe, asked.output
    accelerator = start(recipe.model)
    sharded.check(recipe)
    tokenizer, (capacity, _) = (
        read_tokenizer(model := resolve_base(recipe.model, cache)),
        check_outline(recipe, outline_of(model), accelerator.device),
    )
    examples = read_examples(recipe.data, tokenizer, recipe.seed, cache, quiet=not accelerator.is_main_process, capacity=capacity)
    plain = make_job(recipe, examples)
    planted = plant(asked, examples, tokenizer)
    key = secret.key_of(recipe.drawn_openly, recipe.seed, folder, resume=not overwrite)
    job = make_job(as_it_stands(recipe, plain), planted.examples, key, lambda name: folder_of(name, cache))
    loaded = load(model, accelerator.device, train=True)
    check(job, loaded.model)
    if accelerator.is_main_process:
        if overwrite:
            run_folder.clear(folder)
        run_folder.write(folder / FILE, json.dumps(asked.key, indent=1))
        secret.begin(job.noisy, folder)
    accelerator.wait_for_everyone()
    before = losses(loaded, planted.canaries, recipe, accelerator, "canaries before")
    model = prepare(loaded.model, recipe.model, job, accelerator)
    outcome = train(job, model, accelerator, folder, resume=not overwrite, title="training with canaries")
    if outcome.status == "interrupted":
        return False
    if outcome.broken:
        raise Refused(f"train: {outcome.reason}; a smaller train.lr may help.")
    after = losses(replace(loaded, model=model), planted.canaries, recipe, accelerator, "canaries after")
    if accelerator.is_main_process:
        found = asked.key | result(asked, planted, plain, job, before, after)
        run_folder.write(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False))
        remove(folder / run_folder.CHECKPOINTS)  # with the key
        print(said(found, folder))
    accelerator.wait_for_everyone()
    return True


def plant(asked: Asked, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Planted:
    """Canaries, and the rows with those of them among them whose coin says so. They go to that stream, of those learnt by heart,
    whose rows are seen most often once half of the canaries are there; the first of equals."""
    window, half = asked.recipe.window, asked.canaries / 2
    stream = max(asked.streams, key=lambda name: min(1.0, window[name] / (len(examples.streams[name]) + half)))
    mine = examples.streams[stream]
    canaries = made_up(asked.recipe.sources[stream], stream, mine, asked.canaries, asked.seed, tokenizer)
    inside = np.random.default_rng(draw(asked.seed, "coins")).random(asked.canaries) < 0.5
    put_in = [one for one, coin in zip(canaries, inside, strict=True) if coin]
    return Planted(replace(examples, streams={**examples.streams, stream: [*mine, *put_in]}), stream, canaries, inside)


def made_up(
    source: Source, stream: str, like: Sequence[Example], number: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Rows of the source's shape and its answers' lengths, whose words are drawn at random.

    Raises:
        Refused: the tokenizer has too few words, or no answer has room.
    """
    words = ordinary_words(tokenizer)
    if len(words) < FEWEST:
        raise Refused(f"model.base: its tokenizer has {len(words)} words of one token; made-up rows need {FEWEST}.")
    chance = np.random.default_rng(draw(seed, "canaries"))
    lengths = [like[i].targets for i in chance.integers(len(like), size=number)]
    asked, told = (
        [" ".join(words[i] for i in chance.integers(len(words), size=size)) for size in sizes]
        for sizes in ([QUESTION] * number, [max(1, length - 1) for length in lengths])  # the last token ends the turn
    )
    if source.text:
        found = [next(iter(encode_text([text], tokenizer, stream, source.max_tokens)), None) for text in told]
    else:
        pairs = zip(asked, told, strict=True)
        turns = [[{"role": "user", "content": f"{q.capitalize()}?"}, {"role": "assistant", "content": a}] for q, a in pairs]
        found = encode(turns, tokenizer, source.chat, stream, source.max_tokens)
    rows = [replace(one, id=len(like) + i) for i, one in enumerate(found) if one]
    if len(rows) < number:
        raise Refused(f"data.{stream}.max_tokens: found {source.max_tokens}; a made-up question leaves no room for an answer.")
    return rows


def ordinary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lower-case words that are one token where they stand behind another word, in the order of the alphabet."""
    found = {text.strip() for text in tokenizer.batch_decode([[id] for id in range(len(tokenizer))])}
    words = sorted(word for word in found if len(word) > 2 and word.isalpha() and word.islower())
    alone = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    behind = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    return [word for word, ids in zip(words, behind, strict=True) if len(ids) == alone + 1]


def as_it_stands(recipe: Recipe, job: Job) -> Recipe:
    """The recipe with the steps and the noise that it has without canaries: more rows change neither."""
    privacy = recipe.train.privacy
    if privacy and job.private:
        privacy = replace(privacy, epsilon=None, noise=job.private.sigma)
    return replace(recipe, train=replace(recipe.train, steps=job.schedule.steps, privacy=privacy))


def losses(
    loaded: Loaded, examples: Sequence[Example], recipe: Recipe, accelerator: Accelerator, title: str
) -> NDArray[np.float64]:
    """(m,) mean −log p over the tokens of each answer."""
    show = Bar(title, len(examples), "row", quiet=not accelerator.is_main_process)
    with show, torch.no_grad(), accelerator.autocast():
        return loss_pass(loaded, examples, accelerator, recipe.train.batch_tokens, show)


def result(
    asked: Asked, planted: Planted, plain: Job, job: Job, before: NDArray[np.float64], after: NDArray[np.float64]
) -> dict[str, Any]:
    """What `privacy_audit.json` says besides what was asked.

    Args:
        plain, job: the recipe's training without canaries and with them.
        before, after: (m,) loss of each canary.
    """
    claimed = claimed_of_canaries = None
    delta, steps = DELTA, job.schedule.steps
    if plain.private and job.private:
        delta = plain.private.settings.delta
        claimed = {"epsilon": plain.private.epsilon(steps), "sampling_rate": plain.private.rate}
        own = replace(job.private, rates={planted.stream: job.private.rates[planted.stream]})
        claimed_of_canaries = {"epsilon": own.epsilon(steps), "sampling_rate": own.rate}
    found = guess(before - after, planted.inside, asked.guesses, delta, CONFIDENCE)
    rows = [
        {"inside": bool(coin), "before": then, "after": now}
        for coin, then, now in zip(planted.inside, before.tolist(), after.tolist(), strict=True)
    ]
    return {
        "stream": planted.stream,
        "inserted": int(planted.inside.sum()),
        "steps": steps,
        "noise_multiplier": job.private.sigma if job.private else None,
        "claimed": claimed,
        "claimed_of_canaries": claimed_of_canaries,
        "delta": delta,
        "confidence": CONFIDENCE,
        "right": found.right,
        "refuted_epsilon": found.epsilon,
        "refutable_epsilon": refuted(asked.canaries, found.guesses, found.guesses, delta, CONFIDENCE),
        "verdict": verdict(found, claimed_of_canaries["epsilon"] if claimed_of_canaries else None),
        "losses": rows,
    }


def verdict(found: Audited, claimed: float | None) -> str:
    """What it means, in a sentence."""
    shown = (
        f"an ε of {found.epsilon:.3g} at least"
        if found.epsilon
        else "nothing: by chance alone as many are right in 5 % of all audits or more"
    )
    if claimed is None:
        return f"The recipe claims no privacy, so there is nothing to refute; guesses like these show {shown}."
    if found.epsilon > claimed:
        return (
            f"REFUTED: were ε {claimed:.3g} true of a canary, so many guesses would be right in less than 5 % of all audits; the "
            "claim is false, or what it rests on does not hold."
        )
    return f"Not refuted: guesses like these show {shown}. A bound below the claim does not prove the claim."
