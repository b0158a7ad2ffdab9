"""Let a model write: greedy answers to the prompts of a set, and texts by chance. The one place where a model generates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from llm_unlearn.bars import Bar
from llm_unlearn.data.rendering import cut
from llm_unlearn.evaluation.desk import Desk, padded
from llm_unlearn.evaluation.likelihood import dealt, gathered
from llm_unlearn.models.decoding import Decoding, decoding_of, without_defaults
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.outline import capacity_of
from llm_unlearn.models.readings import next_logits
from llm_unlearn.spec import Refused

FULL = 4  # a batch is filled up once one text of so many has ended
HALF = 2  # the same for making it smaller
FEW = 16  # texts, below which a batch is not worth making smaller
MANY = 64  # texts, from which on a batch is not filled up on a CPU: a step costs there what its rows and their padding cost


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
class Ask:
    """One text that a model is to write: greedily, or by chance."""

    prompt: tuple[int, ...]
    end: frozenset[int]  # tokens that end its turn, besides the eos tokens of tokenizer and model
    limit: int  # most tokens, the end-of-turn token included
    temperature: float = 0.0  # 0: always the likeliest token; all of a pass are greedy, or none is
    floor: float = 0.0  # tokens less likely than so many times the likeliest one are never written
    seed: int = 0  # all that its chance depends on; see `data.examples.draw`
    forbidden: frozenset[tuple[int, ...]] = frozenset()  # runs of tokens that must not be written
    unfinished: bool = False  # a text that came to no end within the limit is wanted all the same
    until: tuple[str, ...] = ()  # texts that end it as well, and are cut off


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
    begin: torch.Tensor  # (B,) where what is written begins

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = [(ask, ids[b, self.begin[b] :].tolist()) if ask.forbidden else (ask, []) for b, ask in enumerate(self.asks)]
        out = [
            (b, run[-1])
            for b, (ask, text) in enumerate(written)
            for run in ask.forbidden
            if tuple(text[max(0, len(text) - len(run) + 1) :]) == run[:-1]
        ]
        rows_out, tokens_out = torch.tensor(out, dtype=torch.long, device=scores.device).reshape(-1, 2).T
        scores = scores.float().index_put((rows_out, tokens_out), torch.tensor(-torch.inf, device=scores.device))
        likely = scores.softmax(-1)  # (B, V)
        heat, floor = torch.tensor([[ask.temperature, ask.floor] for ask in self.asks], device=scores.device).T[:, :, None]
        chance = (scores / heat).softmax(-1) * (likely >= floor * likely.amax(-1, keepdim=True))
        heap = chance.cumsum(-1)
        # a row that has ended is carried along for a while, and what is drawn for it does not count
        which = (ids.shape[1] - self.begin).clamp(max=self.numbers.shape[1] - 1)
        at = self.numbers.gather(1, which[:, None]) * heap[:, -1:] * (1 - 1e-6)
        drawn = (heap > at).int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


@dataclass
class _Enough:
    """Ends a round of writing once so many texts have ended that their places are worth clearing."""

    asks: Sequence[Ask]
    tokenizer: Any
    begin: torch.Tensor  # (B,) where what is written begins
    limits: torch.Tensor  # (B,) most tokens
    stop: torch.Tensor  # the tokens that end a text
    share: int  # a round is over once one of so many has ended
    length: torch.Tensor  # (B,) tokens of a text that has ended, that which ends it included; 0 while it goes on

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = ids.new_tensor([self._said(b, ids) for b in range(len(ids))], dtype=torch.bool)
        now = ids.shape[1] - self.begin
        over = torch.isin(ids[:, -1], self.stop) | said | (now >= self.limits)
        self.length = torch.where(over & (self.length == 0), now, self.length)
        ended = self.length > 0
        return ended | (self.share * ended.sum() >= len(ids))

    def _said(self, b: int, ids: torch.Tensor) -> bool:
        """Whether a text has come to where nothing more is wanted; transformers' own criterion would look into the prompt too.
        A token is at least a byte of text, so no more than so many of the last ones can hold the end."""
        if not (until := self.asks[b].until):
            return False
        first = max(int(self.begin[b]), ids.shape[1] - 2 - max(len(text.encode()) for text in until))
        said = self.tokenizer.decode(ids[b, first:])
        return any(text in said for text in until)


def writing_pass(
    loaded: Loaded, asks: Sequence[Ask], accelerator: Accelerator, batch_tokens: int, show: Bar, guide: Guide | None = None
) -> list[str | None]:
    """Let the model write one text for each ask; None where it came to no end within the limit and had to."""
    mine: list[tuple[int, str | None]] = []
    share = [i for chosen in dealt([_need(ask) for ask in asks], batch_tokens, accelerator) for i in chosen]
    for at, tokens, ended in written(loaded, [asks[i] for i in share], batch_tokens, accelerator.device, guide):
        whole, ask = str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)), asks[share[at]]
        text = cut(whole, ask.until)
        mine.append((share[at], text if ended or ask.unfinished or len(text) < len(whole) else None))
        show.update(min(accelerator.num_processes, show.total - show.n))
    return gathered(mine, len(asks))


def written(
    loaded: Loaded, asks: Sequence[Ask], batch_tokens: int, device: torch.device, guide: Guide | None = None
) -> Iterator[tuple[int, list[int], bool]]:
    """Of each text, once it has ended: which of the asks it is, its tokens without that which ends it, and whether it came to an
    end.

    Asks are taken up in their order, as many at once as `batch_tokens` hold if each became as long as the longest may. Once one of
    `FULL` has ended, others come in their place; their prompts are read by themselves. Where none waits, the rest goes on in a
    smaller batch once half has ended. Where what was computed cannot be cut, or a CPU has `MANY` at once, a batch is written to its
    end before the next. A model that cannot be padded (`models/decoding.py`) writes one text at a time.
    """
    asks = _within(asks, capacity_of(loaded.model).positions)
    decoding = decoding_of(loaded.model) if asks else Decoding()
    writer, waiting = _Writer(loaded, asks, device, guide, decoding), deque(range(len(asks)))
    refilled = decoding == Decoding() and (device.type != "cpu" or MANY * max(map(_need, asks), default=0) > batch_tokens)
    desk: Desk | None = None
    while waiting or desk:
        fresh = writer.fitting(waiting, desk.rows if desk else [], batch_tokens) if refilled or not desk else []
        if desk and fresh:
            new, found = writer.write(writer.enter(fresh), share=1, most=1)
            yield from found
            desk = desk.beside(new) if new else desk
        desk = desk or writer.enter(fresh)
        desk, found = writer.write(desk, FULL if waiting and refilled else HALF if len(desk.rows) >= FEW else 1)
        yield from found
        refilled = refilled and (not desk or desk.cache is not None)


@dataclass(frozen=True)
class _Writer:
    """What writes the texts of one pass."""

    loaded: Loaded
    asks: Sequence[Ask]
    device: torch.device
    guide: Guide | None
    decoding: Decoding

    def fitting(self, waiting: deque[int], rows: Sequence[int], batch_tokens: int) -> list[int]:
        """Take from those that wait as many as there is room for beside these rows; beside none, at least one."""
        widest, fresh = max((_need(self.asks[i]) for i in rows), default=0), list[int]()
        while waiting:
            widest = max(widest, _need(self.asks[waiting[0]]))
            count = len(rows) + len(fresh)
            if count and (not self.decoding.padded or (count + 1) * widest > batch_tokens):
                break
            fresh.append(waiting.popleft())
        return fresh

    def enter(self, rows: list[int]) -> Desk:
        """Texts of which nothing has been written."""
        ids, mask = padded([self.asks[i].prompt for i in rows], _writing(self.loaded, self.asks[0].end).pad_token_id, self.device)
        most = max(ask.limit for ask in self.asks) if self.asks[0].temperature else 0
        own = [torch.rand(most, generator=torch.Generator().manual_seed(self.asks[i].seed)) for i in rows]
        return Desk(rows, ids, mask, torch.stack(own).to(self.device))

    def write(self, desk: Desk, share: int, most: int | None = None) -> tuple[Desk | None, list[tuple[int, list[int], bool]]]:
        """Write on until one text of `share` has ended or none may become longer than the longest may. Returns those that go on,
        and of the others what `written` gives.

        Args:
            most: write no more than so many tokens.
        """
        here, settings = [self.asks[i] for i in desk.rows], _writing(self.loaded, self.asks[0].end)
        # no padding is in front of the widest row, so that this many tokens end at least that one
        settings.max_new_tokens = most or max(map(_need, here)) - desk.ids.shape[1]
        settings.use_cache = self.decoding.cached
        skip = desk.ids.shape[1] - desk.mask.sum(1)
        begin = skip + desk.ids.new_tensor([len(ask.prompt) for ask in here])
        limits, stop = desk.ids.new_tensor([ask.limit for ask in here]), desk.ids.new_tensor(settings.eos_token_id)
        enough = _Enough(here, self.loaded.tokenizer, begin, limits, stop, share, torch.zeros_like(begin))
        guided = [_Guided(self.guide, skip)] if self.guide else []
        chance = [_Chance(here, desk.numbers, begin)] if desk.numbers.shape[1] else []
        with without_defaults(self.loaded.causal):
            out = self.loaded.model.generate(
                input_ids=desk.ids, attention_mask=desk.mask, generation_config=settings, past_key_values=desk.cache,
                logits_processor=LogitsProcessorList([*guided, *chance]), stopping_criteria=StoppingCriteriaList([enough]),
            )  # fmt: skip
        mask = torch.nn.functional.pad(desk.mask, (0, out.sequences.shape[1] - desk.mask.shape[1]), value=1)
        found = []
        for i, row, at, length in zip(desk.rows, out.sequences.tolist(), begin.tolist(), enough.length.tolist(), strict=True):
            ended = bool(length) and row[at + length - 1] in settings.eos_token_id
            found += [(i, row[at : at + length - ended], ended)] if length else []
        cache = out.past_key_values if self.decoding.cached else None
        after = Desk(desk.rows, out.sequences, mask, desk.numbers, cache)
        on = (enough.length == 0).nonzero()[:, 0]
        return after.only(on) if len(on) else None, found


def _within(asks: Sequence[Ask], positions: int | None) -> Sequence[Ask]:
    """Return the asks limited to the positions that the model has; the last token of a text needs none.

    Raises:
        Refused: a prompt alone has more tokens.
    """
    if positions is None:
        return asks
    longest = max((len(ask.prompt) for ask in asks), default=0)
    if longest > positions:
        text = f"a prompt of {longest} tokens is longer than the {positions} positions of this model"
        raise Refused(f"{text}. Set a smaller max_tokens.")
    return [replace(ask, limit=min(ask.limit, positions - len(ask.prompt) + 1)) for ask in asks]


def _need(ask: Ask) -> int:
    """Tokens of prompt and text, if it becomes as long as it may."""
    return len(ask.prompt) + ask.limit


def _writing(loaded: Loaded, end: frozenset[int]) -> Any:
    """Greedy generation, which ends where this answer, the tokenizer or the model ends a turn."""
    stop = end | _as_set(loaded.tokenizer.eos_token_id)
    stop |= _as_set(getattr(loaded.causal.generation_config, "eos_token_id", None))
    pad = loaded.tokenizer.pad_token_id
    if pad is None or pad >= capacity_of(loaded.model).tokens:  # of a tokenizer with tokens that the model lacks
        pad = min(stop, default=0)
    return GenerationConfig(do_sample=False, eos_token_id=sorted(stop), pad_token_id=pad, return_dict_in_generate=True)


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
