"""The model as lm-evaluation-harness sees it, and what it scores on the library's tasks, each kept by content.

The library makes the prompts and reads the answers; between the two stand the passes of this project, so that length-sorted
batches, every process and the adapter are as for the measures, and no number depends on the batch.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from accelerate import Accelerator
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from llm_unlearn.bars import Bar
from llm_unlearn.chat import Chat
from llm_unlearn.data.examples import Example
from llm_unlearn.data.rendering import apply_template
from llm_unlearn.evaluation.generation import Ask, writing_pass
from llm_unlearn.evaluation.kept import Part
from llm_unlearn.evaluation.likelihood import teacher_forced
from llm_unlearn.evaluation.passes import Job, made
from llm_unlearn.evaluation.scoring import scores_of
from llm_unlearn.evaluation.task_code import code_problems, fenced_templates
from llm_unlearn.evaluation.task_files import content, files_of, leaves, load, quiet
from llm_unlearn.evaluation.tasks import Answered, Score, Task
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.outline import capacity_of
from llm_unlearn.models.readings import alternatives
from llm_unlearn.models.scores import Scores
from llm_unlearn.spec import Refused, fingerprint

FORMAT = 2  # of what is kept; raise it when its content changes
LONGEST = 2048
"""Tokens that a model reads which does not say how many; the library's number."""


class Harness(TemplateLM):  # type: ignore[misc]  # the library has no types
    """A loaded model with the three questions that the library asks of one. Every process gets all requests, takes its share of
    them, and ends with all answers; to the library there is only one process."""

    def __init__(self, loaded: Loaded, accelerator: Accelerator, batch_tokens: int, show: Bar, chat: Chat) -> None:
        super().__init__()
        self.chat = chat
        self.loaded, self.accelerator, self.batch_tokens, self.show = loaded, accelerator, batch_tokens, show
        self.tokenizer: Any = loaded.tokenizer
        self.asked = self.lost = self.shortened = 0
        """Requests, those whose log p is NaN, those of which the model could not read the beginning."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads before the last one that it is asked for. Our passes lay that one out too, and where
        positions are a table, as in GPT-2, it needs a place there; the library would have one more."""
        capacity, limit = capacity_of(self.loaded.model), int(self.tokenizer.model_max_length)
        reads = capacity.trained or (limit if limit < 10**9 else LONGEST)  # transformers writes 1e30 where it does not know
        return reads - (capacity.positions is not None)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """As the tokenizer does it of itself; a text that has its beginning-of-text token already gets no second one."""
        begins = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        special = not begins if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as one text, up to where the model goes on."""
        turns = chat_history
        if self.chat.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.chat.system}, *turns]
        return apply_template(self.tokenizer, turns, self.chat, add_generation_prompt, unfinished=not add_generation_prompt)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding would write it) of each continuation behind its context."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """The same of tokens. What differs in its last token alone, as A, B, C, D behind one question, is read off one pass."""
        longest, alike = self.max_length, dict[tuple[tuple[int, ...], int], list[int]]()
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= longest:
                raise Refused(f"tasks: an answer of {len(continuation)} tokens cannot be scored; this model reads 1 to {longest}.")
            whole = tuple(context + continuation)[-(longest + 1) :]  # the last one is a target only, and never read
            self.shortened += len(context) + len(continuation) > longest + 1
            alike.setdefault((whole[:-1], len(continuation)), []).append(i)
        ends = [[requests[i][2][-1] for i in members] for members in alike.values()]
        examples = [
            Example((*begin, last[0]), len(begin) + 1 - length, "answer", number)
            for number, ((begin, length), last) in enumerate(zip(alike, ends, strict=True))
        ]

        def read(scores: Scores, chosen: Sequence[int]) -> dict[str, Tensor]:
            most = max(len(ends[i]) for i in chosen)
            tokens = scores.targets[:, None].repeat(1, most)  # (N, K)
            at = torch.tensor([examples[i].targets for i in chosen]).cumsum(0) - 1
            last = [ends[i] + [ends[i][0]] * (most - len(ends[i])) for i in chosen]
            tokens[at.to(tokens.device)] = torch.tensor(last, device=tokens.device)
            logp, first = alternatives(scores, tokens)
            return {"logp": logp, "first": first}

        self._expect(len(requests), len(examples))
        found = teacher_forced(self.loaded, examples, self.accelerator, self.batch_tokens, self.show, read)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, one in zip(alike.values(), found, strict=True):
            for k, i in enumerate(members):
                logp = float(one["logp"][:, k].astype(np.float64).sum())
                self.lost += bool(np.isnan(logp))
                answers[i] = (logp, one["first"].tolist() == requests[i][2])
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log p of each text, every token read once, in windows of what the model can read."""
        owner: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                owner.append(i)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logp
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, greedily, up to the first of the texts that end it."""
        end = self.tokenizer.decode([self.eot_token_id])
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            given = normalize_gen_kwargs(request.args[1])
            if given.get("do_sample"):
                raise Refused(f"tasks: {request.task_name} draws its answers by chance; only greedy answers are written here.")
            until = handle_stop_sequences(given.get("until"), eos=end)
            alike.setdefault((int(given["max_gen_toks"]), tuple(until)), []).append(i)
        self._expect(len(requests), len(requests))
        texts = [""] * len(requests)
        for (most, until), members in alike.items():
            room = self.max_length - most
            if room < 1:
                raise Refused(
                    f"tasks: {requests[members[0]].task_name} wants answers of {most} tokens, and this model reads "
                    f"{self.max_length} in all; set `generation_kwargs: {{max_gen_toks: …}}` in a task file of your own."
                )
            prompts = [self.tok_encode(requests[i].args[0]) for i in members]
            self.shortened += sum(len(prompt) > room for prompt in prompts)
            end = frozenset({self.eot_token_id})
            asks = [Ask(tuple(prompt[-room:]), end, most, unfinished=True, until=until) for prompt in prompts]
            written = writing_pass(self.loaded, asks, self.accelerator, self.batch_tokens, self.show)
            for i, text in zip(members, written, strict=True):
                texts[i] = postprocess_generated_text(text or "", list(until), None)
        return texts

    def _expect(self, texts: int, passes: int) -> None:
        """Requests are known only now: let the bar say so."""
        self.asked += texts
        self.show.more(passes)


def answers_of(
    tasks: Sequence[Task],
    loaded: Loaded,
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    cache: Path | None,
    title: str,
    chat: Chat,
) -> tuple[Answered, ...]:
    """What a model scores on each task: from the cache where it was asked before, and then without reading the task's data.

    Raises:
        Refused: a task cannot be had, or this model cannot be asked it.
    """

    def told(task: Task) -> list[Chat]:
        return [chat] if task.chat_template else []

    def job(task: Task) -> Job:
        what = content(task)
        key = fingerprint(
            "harness", FORMAT, lm_eval.__version__, loaded.identity, accelerator.mixed_precision, task.asked, what, *told(task)
        )
        return Job(key, 0, lambda show: asdict(
            replace(_answered(task, loaded, accelerator, batch_tokens, show, chat), library=lm_eval.__version__, content=what)
        ))  # fmt: skip

    parts = made({i: job(task) for i, task in enumerate(tasks)}, loaded, accelerator, cache, title)
    return tuple(_from(parts[i]) for i in range(len(tasks)))


def _from(part: Part) -> Answered:
    """As it was before it was kept."""
    return Answered(**{**part, "scores": [Score(**one) for one in part["scores"]]})


def _answered(task: Task, loaded: Loaded, accelerator: Accelerator, batch_tokens: int, show: Bar, chat: Chat) -> Answered:
    show.update(0, {"task": task.task})
    with _seeded():
        found = _found(task)
        lm = Harness(loaded, accelerator, batch_tokens, show, chat)
        try:
            with quiet():
                results = evaluate(
                    lm, found, limit=task.limit, bootstrap_iters=0, log_samples=True, apply_chat_template=task.chat_template,
                    fewshot_as_multiturn=task.chat_template,
                )  # fmt: skip
        except OverflowError:  # the library takes exp of a sum: of a model that is broken, that is beyond any number
            return Answered(missing="the value is infinite")
    if lm.shortened and accelerator.is_main_process:
        text = f"{task.task}: {lm.shortened} of {lm.asked} texts are longer than the model reads and lost their beginning."
        print(text)
    scores, documents = scores_of(task, found, results)
    lost = f"the value is NaN, as the model's logits are on {lm.lost} of {lm.asked} texts" if lm.lost else ""
    return Answered([] if lost else scores, documents, lost)


def _found(task: Task) -> Any:
    """The task with its data, as the library loads it.

    Raises:
        Refused: it cannot be had; code and data of a task are anybody's, and so is what they raise.
    """
    fenced_templates()
    if problems := [text for _, text in code_problems(task, leaves(task), files_of(task))]:
        raise Refused(f"tasks: {problems[0]}")
    if task.code:
        print(f"tasks: {task.task} may run the Python in {task.include}, as `code: true` says", file=sys.stderr)
    try:
        found = load(task)
    except Exception as error:
        cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise Refused(
            f"tasks: {task.task} cannot be had ({type(error).__name__}: {cause}). Its data set is read from the hub or from the "
            "cache of `datasets`: go online once (and unset HF_HUB_OFFLINE), accept the data set's terms and log in where it asks "
            "for that, or give a task file with local data (`include`)."
        ) from error
    for one in found["tasks"].values():
        if one.get_config("num_fewshot") != 0:  # 0 in a task's file means that it cannot have any
            one.set_config("num_fewshot", task.shots if task.shots is not None else one.get_config("num_fewshot") or 0)
        one.set_fewshot_seed(task.seed)
    return found


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Some tasks draw from the global generators, which the library sets to these seeds; ours stay as they were."""
    kept = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
