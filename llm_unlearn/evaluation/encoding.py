"""A suite's sets as one model reads them: encoded by its tokenizer, within its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from llm_unlearn.data.capacity import Capacity
from llm_unlearn.data.examples import spelling
from llm_unlearn.evaluation.sets import MAX_THOUGHT, EncodedSet, encode_set
from llm_unlearn.evaluation.tables import Need
from llm_unlearn.models.load import Loaded
from llm_unlearn.models.outline import capacity_of
from llm_unlearn.source import Source
from llm_unlearn.spec import fingerprint


def suite_capacity(sources: Mapping[str, Source], loaded: Loaded) -> Capacity:
    """Return what a model can read of a suite's sets."""
    most = max((source.max_tokens for source in sources.values()), default=0)
    return capacity_of(loaded.model, str(loaded.causal.config.name_or_path or "the model"), most)


def encoding_key(capacity: Capacity, loaded: Loaded) -> str:
    """Return what stands for all that decides how a suite's sets are encoded for a model."""
    return fingerprint(spelling(loaded.tokenizer), capacity.tokens, capacity.positions)


def encode_sets(
    sources: Mapping[str, Source],
    needs: Callable[[str], Iterable[Need]],
    loaded: Loaded,
    capacity: Capacity,
    max_thought_tokens: int = MAX_THOUGHT,
) -> Mapping[str, EncodedSet]:
    """Read and encode every set of a suite for one model.

    Args:
        needs: of a set, what its measures and attacks read.
        max_thought_tokens: longest thought that the model may write before it answers.

    Raises:
        Refused: a set cannot be read, or the model cannot read a row of it.
    """
    sets = {
        name: encode_set(name, capacity.fit(source), needs(name), loaded.tokenizer, max_thought_tokens)
        for name, source in sources.items()
    }
    capacity.check({name: one.examples for name, one in sets.items()}, loaded.tokenizer)
    return sets
