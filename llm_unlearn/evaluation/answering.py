"""The answers of a model to the prompts of a set: greedy ones, and some by chance; behind a thought where the set asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator

from llm_unlearn.bars import Bar
from llm_unlearn.data.examples import draw
from llm_unlearn.data.rendering import TurnEnd
from llm_unlearn.evaluation.generation import Ask, Guide, writing_pass
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.evaluation.tables import Draws
from llm_unlearn.models.load import Loaded


def generation_pass(
    loaded: Loaded, one: EncodedSet, accelerator: Accelerator, batch_tokens: int, max_new_tokens: int, show: Bar,
    guide: Guide | None = None,
) -> list[str]:  # fmt: skip
    """(R,) let the model answer every prompt of a set greedily, a second one guiding it or none."""
    return _answers(loaded, one, accelerator, batch_tokens, max_new_tokens, show, guide=guide)


def samples_pass(
    loaded: Loaded, one: EncodedSet, draws: Draws, accelerator: Accelerator, batch_tokens: int, most: int, show: Bar
) -> list[list[str]]:
    """(R, n) let the model answer every prompt of a set n times, drawn at temperature 1 from its whole distribution.

    What is drawn depends on the seed, the prompt and the number of the draw.
    """
    texts = _answers(loaded, one, accelerator, batch_tokens, most, show, draws)
    return [texts[i : i + draws.n] for i in range(0, len(texts), draws.n)]


def _answers(
    loaded: Loaded, one: EncodedSet, accelerator: Accelerator, batch_tokens: int, most: int, show: Bar,
    draws: Draws | None = None, guide: Guide | None = None,
) -> list[str]:  # fmt: skip
    """(R · n,) let the model answer every prompt of a set, once, or n times by chance, those of a prompt together; where it thinks
    first, the thought has its own budget."""
    n = draws.n if draws else 1

    def write(prompts: Sequence[tuple[int, ...]], end: TurnEnd, limit: int) -> list[str]:
        asks = [Ask(prompt, end.tokens, limit, unfinished=True, until=end.texts) for prompt in prompts]
        if draws:
            seeds = [draw(draws.seed, ask.prompt, i % n) for i, ask in enumerate(asks)]
            asks = [replace(ask, temperature=1.0, seed=seed) for ask, seed in zip(asks, seeds, strict=True)]
        return [text or "" for text in writing_pass(loaded, asks, accelerator, batch_tokens, show, guide)]

    end, thinking = one.end(loaded.tokenizer), one.thinking
    prompts = [example.ids[: example.answer] for example in one.asked for _ in range(n)]
    if thinking and thinking.only:
        return [text.strip() for text in write(prompts, thinking.end(loaded.tokenizer), thinking.limit)]
    if thinking:
        opened = [prompt for prompt in thinking.prompts(loaded.tokenizer) for _ in range(n)]
        thoughts = write(opened, thinking.end(loaded.tokenizer), thinking.limit)
        prompts = thinking.prompts(loaded.tokenizer, [text.rstrip() for text in thoughts])
    return [text.strip() for text in write(prompts, end, most)]
