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

FEW = 16  # texts, below which a batch is not worth making smaller


@dataclass(frozen=True)
class Guide:
    """A second model beside the one that writes: tokens are chosen from log q = log p_other + scale · (log p − log p_other), among
    those with p ≥ floor · max p. Scale 1 is the model that writes alone, 0 the other one.

    The second model reads the whole text anew for every token, as it has no cache here: for short answers.
    """

    other: Loaded
    scale: float
    floor: float


def generation_pass(
    loaded: Loaded, one: EncodedSet, accelerator: Accelerator, batch_tokens: int, max_new_tokens: int, show: tqdm[Any],
    guide: Guide | None = None,
) -> list[str]:  # fmt: skip
    """(R,) let the model answer every prompt of a set greedily, a second one guiding it or none."""
    end = one.end
    asks = [Ask(example.ids[: example.answer], end, max_new_tokens, unfinished=True) for example in one.asked]
    return [(text or "").strip() for text in writing_pass(loaded, asks, accelerator, batch_tokens, show, guide)]


def samples_pass(
    loaded: Loaded, one: EncodedSet, draws: Draws, accelerator: Accelerator, batch_tokens: int, most: int, show: tqdm[Any]
) -> list[list[str]]:
    """(R, n) let the model answer every prompt of a set n times, drawn at temperature 1 from its whole distribution.

    What is drawn depends on the seed, the prompt and the number of the draw.
    """
    end = one.end
    asks = [
        Ask(prompt, end, most, 1.0, seed=draw(draws.seed, prompt, n), unfinished=True)
        for example in one.asked
        for prompt in [example.ids[: example.answer]]
        for n in range(draws.n)
    ]
    texts = writing_pass(loaded, asks, accelerator, batch_tokens, show)
    return [[(text or "").strip() for text in texts[i : i + draws.n]] for i in range(0, len(texts), draws.n)]


@dataclass(frozen=True)
class Ask:
    """One text that a model is to write: greedily, or by chance."""

    prompt: tuple[int, ...]
    end: int  # the end-of-turn token
    limit: int  # most tokens, the end-of-turn token included
    temperature: float = 0.0  # 0: always the likeliest token; within a batch all are greedy, or none is
    floor: float = 0.0  # tokens less likely than so many times the likeliest one are never written
    seed: int = 0  # all that its chance depends on; see `data.examples.draw`
    forbidden: frozenset[tuple[int, ...]] = frozenset()  # runs of tokens that must not be written
    unfinished: bool = False  # a text that came to no end within the limit is wanted all the same
    until: tuple[str, ...] = ()  # texts after which nothing more is wanted; what is written ends with one, or a little after it


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


@dataclass
class _Half:
    """Ends a round of writing once half of a batch's texts have ended: in a smaller one, the others need not carry them along."""

    asks: Sequence[Ask]
    tokenizer: Any
    begin: int  # length of the padded prompts
    stop: torch.Tensor  # the tokens that end a text
    left: torch.Tensor  # (B,) tokens that each text may still have; 0 when it has ended

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        over = torch.isin(ids[:, -1], self.stop) | torch.tensor([self._said(b, ids) for b in range(len(ids))], device=ids.device)
        self.left = torch.where(over, 0, (self.left - 1).clamp(min=0))
        ended = self.left == 0
        return ended | (len(ids) >= FEW and 2 * ended.sum() >= len(ids))

    def _said(self, b: int, ids: torch.Tensor) -> bool:
        """Whether a text has come to where nothing more is wanted; transformers' own criterion would look into the prompt too.
        A token is at least a byte of text, so no more than so many of the last ones can hold the end."""
        if not (until := self.asks[b].until):
            return False
        first = max(self.begin, ids.shape[1] - 2 - max(len(text.encode()) for text in until))
        said = self.tokenizer.decode(ids[b, first:])
        return any(text in said for text in until)


def writing_pass(
    loaded: Loaded, asks: Sequence[Ask], accelerator: Accelerator, batch_tokens: int, show: tqdm[Any], guide: Guide | None = None
) -> list[str | None]:
    """Let the model write one text for each ask; None where it came to no end within the limit and had to."""
    mine: list[tuple[int, str | None]] = []
    for chosen in dealt([len(ask.prompt) + ask.limit for ask in asks], batch_tokens, accelerator):
        batch = [asks[i] for i in chosen]
        for i, (tokens, ended) in zip(chosen, written(loaded, batch, accelerator.device, guide), strict=True):
            text = str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))
            mine.append((i, text if ended or asks[i].unfinished else None))
        show.update(min(len(chosen) * accelerator.num_processes, show.total - show.n))
    return gathered(mine, len(asks))


def written(loaded: Loaded, asks: Sequence[Ask], device: torch.device, guide: Guide | None = None) -> list[tuple[list[int], bool]]:
    """One batch: of each text its tokens, without that which ends it, and whether it came to an end. Prompts are padded on the
    left."""
    most = max(ask.limit for ask in asks)
    settings = _writing(loaded, asks[0].end, most)
    ids, mask = _padded([ask.prompt for ask in asks], settings.pad_token_id, device)
    begin, stop = ids.shape[1], ids.new_tensor(settings.eos_token_id)
    own = [torch.rand(most, generator=torch.Generator().manual_seed(ask.seed)) for ask in asks if ask.temperature]
    numbers = torch.stack(own).to(device) if own else None
    found: dict[int, list[int]] = {}
    rows, cache = torch.arange(len(asks), device=device), None
    while len(rows):
        settings.max_new_tokens = most - (ids.shape[1] - begin)
        here = [asks[b] for b in rows]
        limits = ids.new_tensor([ask.limit for ask in here]) - (ids.shape[1] - begin)
        half = _Half(here, loaded.tokenizer, begin, stop, limits)
        guided = [_Guided(guide, ids.shape[1] - mask.sum(1))] if guide else []
        chance = [_Chance(here, numbers[rows], begin)] if numbers is not None else []
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, past_key_values=cache,
            logits_processor=LogitsProcessorList([*guided, *chance]), stopping_criteria=StoppingCriteriaList([half]),
        )  # fmt: skip
        found |= {int(b): text for b, text in zip(rows, out.sequences[:, begin:].tolist(), strict=True)}
        on = half.left.nonzero()[:, 0]
        rows, ids, mask = (
            rows[on],
            out.sequences[on],
            torch.nn.functional.pad(mask[on], (0, out.sequences.shape[1] - mask.shape[1]), value=1),
        )
        cache = _only(out.past_key_values, on)
    result = []
    for b, ask in enumerate(asks):
        text = found[b][: ask.limit]
        end = next((t for t, token in enumerate(text) if token in settings.eos_token_id), None)
        result.append((text[:end], end is not None))
    return result


def _only(cache: Any, rows: torch.Tensor) -> Any:
    """What was computed of some rows; None of a kind that cannot be cut, and the rows are then read again from their beginning."""
    layers = getattr(cache, "layers", [])
    if not len(rows) or not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def _writing(loaded: Loaded, end: int, most: int) -> Any:
    """Greedy generation of at most so many tokens, which ends where this answer, the tokenizer or the model ends a turn."""
    stop = {end} | _as_set(loaded.tokenizer.eos_token_id)
    stop |= _as_set(getattr(loaded.causal.generation_config, "eos_token_id", None))
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else next(iter(stop))
    return GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=sorted(stop), pad_token_id=pad, return_dict_in_generate=True
    )


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids and mask, padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
