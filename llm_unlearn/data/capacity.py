"""Token ids and sequence lengths that a model can read, checked against encoded rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.examples import Example
from llm_unlearn.data.tokens import Tokens, lengths_of
from llm_unlearn.sections import Data
from llm_unlearn.source import Source
from llm_unlearn.spec import Refused


@dataclass(frozen=True)
class Capacity:
    """Token ids and positions that a model can read."""

    model: str
    """Name that the user gave it."""
    tokens: int
    """Rows of its input embedding: ids are below this."""
    positions: int | None = None
    """Most tokens of a sequence, where positions come from a table; None where they are computed."""
    trained: int | None = None
    """Positions that the model was made for (`max_position_embeddings`), where its config.json states them."""

    def fit(self, source: Source) -> Source:
        """Return the source with its rows cut to at most the positions that exist."""
        if self.positions is None or source.max_tokens <= self.positions:
            return source
        return replace(source, max_tokens=self.positions)

    def fit_all(self, data: Data) -> Data:
        """Return the data section with every source fitted."""
        retain, holdout = (source and self.fit(source) for source in (data.retain, data.holdout))
        streams = {name: self.fit(source) for name, source in data.streams.items()} if data.streams else None
        return replace(data, forget=self.fit(data.forget), retain=retain, holdout=holdout, streams=streams)

    def check(self, encoded: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the model can read every encoded row.

        Args:
            encoded: stream or set -> its examples.

        Raises:
            Refused: a row has a token without a row in the embedding, or more tokens than there are positions.
        """
        for name, examples in encoded.items():
            largest, longest = largest_id(examples), longest_of(examples)
            if largest >= self.tokens:
                word = tokenizer.convert_ids_to_tokens(largest)
                what = f"rows of {name} hold token {largest} ({word!r}), and {self.model} has embeddings for {self.tokens} tokens"
                raise Refused(f"model.base: {what}. Use the tokenizer that belongs to the model.")
            if self.positions is not None and longest > self.positions:
                what = f"rows of {name} have up to {longest} tokens, and {self.model} has {self.positions} positions"
                raise Refused(f"model.base: {what}. Set a smaller max_tokens, which leaves room for what stands before rows.")

    def warnings(self, encoded: Mapping[str, Sequence[Example]]) -> list[str]:
        """Return a sentence for each stream or set with sequences at, or beyond, what the model was made for; most have none."""
        found = []
        for name, examples in encoded.items():
            longest = longest_of(examples)
            if self.positions is not None and longest == self.positions:
                found.append(f"{name}: rows are cut to {longest} tokens, the positions that {self.model} has.")
            elif self.trained is not None and longest > self.trained:
                what = f"rows of up to {longest} tokens, and {self.model} was made for {self.trained} (max_position_embeddings)"
                found.append(f"{name}: {what}; its numbers beyond mean little. Set max_tokens: {self.trained}.")
        return found


def largest_id(examples: Sequence[Example]) -> int:
    """Return the largest token id of examples; -1 where there are none."""
    if isinstance(examples, Tokens):
        return int(examples.flat.max(initial=-1))
    return max((max(example.ids, default=-1) for example in examples), default=-1)


def longest_of(examples: Sequence[Example]) -> int:
    """Return the number of tokens of the longest example."""
    return int(lengths_of(examples).max(initial=0))
