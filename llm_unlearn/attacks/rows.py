"""The rows under attack: which they are, how they are cut into batches and prompts changed, and what a model says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.evaluation.tables import Floats, mean_of
from llm_unlearn.spec import Refused, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.data.batch import Batch
    from llm_unlearn.data.examples import Example
    from llm_unlearn.evaluation.sets import EncodedSet
    from llm_unlearn.models.head import Head
    from llm_unlearn.models.load import Loaded


def set_of(subject: Subject, attack: str, name: str) -> EncodedSet:
    """A set by its name.

    Raises:
        Refused: the suite has no such set.
    """
    if name not in subject.sets:
        raise Refused(f"{attack}: found set {name!r}; {nearest(name, subject.sets)}")
    return subject.sets[name]


def answers_of(subject: Subject, attack: str, name: str) -> list[Example]:
    """(R,) the true answer of every row of a set, in its order."""
    found = set_of(subject, attack, name)
    return [example for example, kind in zip(found.examples, found.kind, strict=True) if kind == "answer"]


def split(count: int, share: float, seed: int, attack: str) -> tuple[list[int], list[int]]:
    """Rows to train an attack on, and the others to measure it on; each ascending, drawn from the seed.

    Raises:
        Refused: one of the parts would be empty.
    """
    first = round(share * count)
    if not 0 < first < count:
        raise Refused(f"{attack}: a share of {share} of {count} rows leaves none for one of its two parts; give more rows.")
    order = np.random.default_rng([seed, 11]).permutation(count)
    return sorted(order[:first].tolist()), sorted(order[first:].tolist())


def with_original(subject: Subject, attack: str) -> tuple[Loaded, Loaded]:
    """The model under attack, and the model before unlearning beside it.

    Raises:
        Refused: the model before is not known, or has another vocabulary.
    """
    from llm_unlearn.models.scores import head_of

    if subject.original is None:
        raise Refused(f"{attack} needs the model before unlearning beside the one attacked; name it with --before.")
    loaded, original = subject.load(), subject.original()
    mine, theirs = ((one.tokenizer.get_vocab(), head_of(one.model).vocabulary) for one in (loaded, original))
    if mine != theirs:
        raise Refused(f"{attack}: the vocabularies of the attacked model and the original differ; they cannot be compared.")
    return loaded, original


def batches(examples: Sequence[Example], subject: Subject) -> Iterator[tuple[list[int], Batch]]:
    """This process's share of the examples: batches of like length on its device, each with the places of its examples. Who gets
    which follows from the lengths, so that examples of the same lengths are dealt in the same way."""
    from llm_unlearn.data.batch import lay_out
    from llm_unlearn.evaluation.likelihood import dealt

    for chosen in dealt([len(example.ids) for example in examples], subject.batch_tokens, subject.accelerator):
        # one stream, so that the order within the batch is the order given, whatever set an example is from
        same = [replace(examples[i], stream="attacked") for i in chosen]
        yield chosen, lay_out(same).to(subject.accelerator.device)


@dataclass(frozen=True)
class Reading:
    """What a model says of R answers, teacher-forced."""

    logp: Floats  # (R,) mean log p per token
    hits: Floats  # (R,) share of tokens that are the first choice

    @property
    def probability(self) -> Floats:
        """(R,) exp of the mean log p: the length-normalised probability."""
        return np.exp(self.logp)

    @property
    def exact(self) -> Floats:
        """(R,) 1 where every token is the first choice: greedy decoding then writes this answer and no other."""
        return np.asarray(self.hits == 1, dtype=float)


def reading_of(states: Tensor, head: Head, batch: Batch) -> Reading:
    """A batch's answers as the head reads these states, (N, D), of their positions."""
    from llm_unlearn.models.scores import by_stream, statistics
    from llm_unlearn.objectives.views import TOP

    (scores,) = by_stream({TOP: states}, head, batch).values()
    found, owner = statistics(scores), batch.owner.cpu().numpy()
    lengths = np.bincount(owner)
    logp = np.bincount(owner, found.logp.double().numpy())
    return Reading(logp / lengths, np.bincount(owner, found.hit.double().numpy()) / lengths)


def joined(parts: Sequence[tuple[list[int], Reading]], count: int) -> Reading:
    """Readings of all processes' batches as one of `count` examples, in their order; the same on every process."""
    from llm_unlearn.evaluation.likelihood import gathered

    mine = [
        (i, (logp, hits))
        for chosen, one in parts
        for i, logp, hits in zip(chosen, one.logp.tolist(), one.hits.tolist(), strict=True)
    ]
    logp, hits = np.array(gathered(mine, count)).reshape(count, 2).T
    return Reading(logp, hits)


def read(loaded: Loaded, subject: Subject, examples: Sequence[Example]) -> Reading:
    """What a model says of answers."""
    import torch

    from llm_unlearn.models.scores import Scorer, head_of
    from llm_unlearn.objectives.views import TOP

    scorer, head = Scorer(loaded.model), head_of(loaded.model)
    with torch.no_grad(), subject.accelerator.autocast():
        parts = [
            (chosen, reading_of(scorer(batch.input_ids, batch.at)[TOP], head, batch))
            for chosen, batch in batches(examples, subject)
        ]
    return joined(parts, len(examples))


def insert(example: Example, place: int, ids: Sequence[int]) -> Example:
    """The same answer to a prompt with more tokens, put before its token `place`, 0 … `answer`."""
    return replace(example, ids=(*example.ids[:place], *ids, *example.ids[place:]), answer=example.answer + len(ids))


def embedding_table(loaded: Loaded) -> Tensor:
    """(V, D) each token as the decoder receives it."""
    import torch

    from llm_unlearn.models.scores import embedding_of, head_of

    with torch.no_grad():
        found: Tensor = embedding_of(loaded.model)(torch.arange(head_of(loaded.model).vocabulary, device=loaded.causal.device))
    return found


def words_of(tokenizer: Any, vocabulary: int) -> NDArray[np.int64]:
    """The tokens that a prompt may be made of: all but those that mark turns, beginnings and ends."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return np.array([i for i in range(min(vocabulary, len(tokenizer))) if i not in special], dtype=np.int64)


def curve_of(x: Sequence[float], values: Sequence[Floats], notes: Mapping[str, float] | None = None) -> Curve:
    """Means over rows as a curve, with bootstrap intervals: `values[i]` holds the rows at `x[i]`."""
    from llm_unlearn.attacks.finding import Curve

    samples = [mean_of(rows) for rows in values]
    bounds = [sample.bootstrap() for sample in samples]
    whole = [bound for bound in bounds if bound is not None]
    low, high = zip(*whole, strict=True) if whole and len(whole) == len(bounds) else ((), ())
    last = tuple(float(value) for value in values[-1])
    return Curve(tuple(float(one) for one in x), tuple(one.value for one in samples), low, high, last, dict(notes or {}))
