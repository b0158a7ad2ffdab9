"""Let a model write: greedy answers to the prompts of a set, and texts by chance. The one place where a model generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from llm_unlearn.data.examples import draw
from llm_unlearn.evaluation.likelihood import dealt, gathered
from llm_unlearn.evaluation.sets import EncodedSet
from llm_unlearn.evaluation.tables import Draws
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.readings import next_logits


@dataclass(frozen=True)
class Guide:
    """A second model beside the one that writes: tokens are chosen from log q = log p_other + scale · (log p − log p_other), among
    those with p ≥ floor · max p. Scale 1 is the model that writes alone, 0 the other one.

    The second model reads the whole text anew for every token, as it has no cache here: for short answers.
    """

    other: Loaded
    scale: float
    floor: float


@dataclass(frozen=True)
class _Guided:
    """Puts log q in the place of the writing model's logits."""

    guide: Guide
    skip: torch.Tensor  # (B,) tokens of padding on the left

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mine = scores.float().log_softmax(-1)  # (B, V)
        theirs = next_logits(self.guide.other.model, ids, self.skip).log_softmax(-1)
        likely = mine.exp() >= self.guide.floor * mine.amax(-1, keepdim=True).exp()
        return (theirs + self.guide.scale * (mine - theirs)).masked_fill(~likely, -torch.inf)


def generation_pass(
    loaded: Loaded, one: EncodedSet, accelerator: Accelerator, batch_tokens: int, max_new_tokens: int, show: tqdm[Any],
    guide: Guide | None = None,
) -> list[str]:  # fmt: skip
    """(R,) let the model answer every prompt of a set greedily, a second one guiding it or none."""
    wanted = one.asked
    prompts = [example.ids[: example.answer] for example in wanted]
    texts = greedy_pass(loaded, prompts, wanted[0].ids[-1], max_new_tokens, accelerator, batch_tokens, show, guide=guide)
    return [text.strip() for text in texts]


def greedy_pass(
    loaded: Loaded, prompts: Sequence[Sequence[int]], end: int, most: int, accelerator: Accelerator, batch_tokens: int,
    show: tqdm[Any], until: Sequence[str] = (), guide: Guide | None = None,
) -> list[str]:  # fmt: skip
    """(R,) let the model go on from each prompt greedily; prompts are padded on the left.

    Args:
        end: the token that ends a turn, beside those that the tokenizer and the model name.
        most: tokens.
        until: texts after which nothing more is wanted; what is written ends with one of them, or a little after it.
        guide: a second model that has a say in every token.
    """
    tokenizer, device = loaded.tokenizer, accelerator.device
    settings = _writing(loaded, end, most)
    mine: list[tuple[int, str]] = []
    for chosen in dealt([len(prompt) + most for prompt in prompts], batch_tokens, accelerator):
        ids, mask = _padded([prompts[i] for i in chosen], settings.pad_token_id, device)
        ends = StoppingCriteriaList([_Said(tokenizer, until, ids.shape[1])] if until else [])
        guided = LogitsProcessorList([_Guided(guide, ids.shape[1] - mask.sum(1))] if guide else [])
        written = loaded.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=ends, logits_processor=guided
        )[:, ids.shape[1] :]  # fmt: skip
        mine.extend(zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True))
        show.update(min(len(chosen) * accelerator.num_processes, show.total - show.n))
    return gathered(mine, len(prompts))


@dataclass(frozen=True)
class _Said:
    """Which rows have said one of some texts since their prompt; transformers' own criterion looks into the prompt too."""

    tokenizer: Any
    until: Sequence[str]
    begin: int  # length of the padded prompts

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B,); a token is at least a byte of text, so no more than so many of the last ones can hold it."""
        most = 2 + max(len(text.encode()) for text in self.until)
        texts = self.tokenizer.batch_decode(ids[:, max(self.begin, ids.shape[1] - most) :])
        return torch.tensor([any(text in said for text in self.until) for said in texts], device=ids.device)


def samples_pass(
    loaded: Loaded, one: EncodedSet, draws: Draws, accelerator: Accelerator, batch_tokens: int, most: int, show: tqdm[Any]
) -> list[list[str]]:
    """(R, n) let the model answer every prompt of a set n times, drawn at temperature 1 from its whole distribution.

    What is drawn depends on the seed, the prompt and the number of the draw.
    """
    asks = [
        Ask(prompt, example.ids[-1], most, 1.0, 0.0, draw(draws.seed, prompt, n), unfinished=True)
        for example in one.asked
        for prompt in [example.ids[: example.answer]]
        for n in range(draws.n)
    ]
    texts = sampling_pass(loaded, asks, accelerator, batch_tokens, show)
    return [[text or "" for text in texts[i : i + draws.n]] for i in range(0, len(texts), draws.n)]


@dataclass(frozen=True)
class Ask:
    """One text that a model is to write by chance."""

    prompt: tuple[int, ...]
    end: int  # the end-of-turn token
    limit: int  # most tokens, the end-of-turn token included
    temperature: float
    floor: float  # tokens less likely than so many times the likeliest one are never written
    seed: int  # all that its chance depends on; see `data.examples.draw`
    forbidden: frozenset[tuple[int, ...]] = frozenset()  # runs of tokens that must not be written
    unfinished: bool = False  # a text that came to no end within the limit is wanted all the same


@dataclass(frozen=True)
class _Chance:
    """Draws each row's next token with numbers of its own, so that neither the batch nor the process can change it.

    Rows of -inf with one 0 come out: the greedy choice falls on the token that was drawn. The floor holds among the tokens that
    are allowed: without it, a flat tail of thousands of unlikely ones would break every other text.
    """

    asks: Sequence[Ask]
    numbers: torch.Tensor  # (B, tokens) uniform on [0, 1)
    begin: int  # length of the padded prompts

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = ids[:, self.begin :].tolist()
        out = [
            (b, run[-1])
            for b, ask in enumerate(self.asks)
            for run in ask.forbidden
            if tuple(written[b][max(0, len(written[b]) - len(run) + 1) :]) == run[:-1]
        ]
        rows_out, tokens_out = torch.tensor(out, dtype=torch.long, device=scores.device).reshape(-1, 2).T
        scores = scores.float().index_put((rows_out, tokens_out), torch.tensor(-torch.inf, device=scores.device))
        likely = scores.softmax(-1)  # (B, V)
        heat, floor = torch.tensor([[ask.temperature, ask.floor] for ask in self.asks], device=scores.device).T[:, :, None]
        chance = (scores / heat).softmax(-1) * (likely >= floor * likely.amax(-1, keepdim=True))
        heap = chance.cumsum(-1)
        at = self.numbers[:, ids.shape[1] - self.begin, None] * heap[:, -1:] * (1 - 1e-6)
        drawn = (heap > at).int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def sampling_pass(
    loaded: Loaded, asks: Sequence[Ask], accelerator: Accelerator, batch_tokens: int, show: tqdm[Any]
) -> list[str | None]:
    """Let the model write one text for each ask, by chance; None where it came to no end within the limit and had to."""
    tokenizer, device = loaded.tokenizer, accelerator.device
    mine: list[tuple[int, str | None]] = []
    for chosen in dealt([len(ask.prompt) + ask.limit for ask in asks], batch_tokens, accelerator):
        batch = [asks[i] for i in chosen]
        settings = _writing(loaded, batch[0].end, max(ask.limit for ask in batch))
        ids, mask = _padded([ask.prompt for ask in batch], settings.pad_token_id, device)
        own = [torch.rand(settings.max_new_tokens, generator=torch.Generator().manual_seed(ask.seed)) for ask in batch]
        chance = LogitsProcessorList([_Chance(batch, torch.stack(own).to(device), ids.shape[1])])
        written = loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=chance)[
            :, ids.shape[1] :
        ].tolist()
        for i, ask, tokens in zip(chosen, batch, written, strict=True):
            ends = (t for t, token in enumerate(tokens[: ask.limit]) if token in settings.eos_token_id)
            length = next(ends, ask.limit if ask.unfinished else None)
            mine.append((i, None if length is None else str(tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()))
        show.update(min(len(chosen) * accelerator.num_processes, show.total - show.n))
    return gathered(mine, len(asks))


def _writing(loaded: Loaded, end: int, most: int) -> Any:
    """Greedy generation of at most so many tokens, which ends where this answer, the tokenizer or the model ends a turn."""
    stop = {end} | _as_set(loaded.tokenizer.eos_token_id)
    stop |= _as_set(getattr(loaded.causal.generation_config, "eos_token_id", None))
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else next(iter(stop))
    return GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=sorted(stop), pad_token_id=pad)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids and mask, padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
