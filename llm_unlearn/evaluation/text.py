"""What a model writes, compared with the truth as text."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Knowing, MeasureKind, mean_over
from llm_unlearn.evaluation.tables import Cut, Floats, Ints, Need, Sample, SetTable, Tables, Unavailable, mean_of
from llm_unlearn.spec import PositiveInt, spec


def rouge_l(truth: list[str], text: list[str], stem: bool, part: Literal["recall", "fmeasure"]) -> Floats:
    """(R,) ROUGE-L (Lin 2004) of each text against its truth, 0 to 1: their longest common subsequence of words.

    Words are those of the `rouge_score` package, runs of a–z and 0–9 in lower case, so another script scores 0.
    """
    scores = [_rouge_l(one, other, stem) for one, other in zip(truth, text, strict=True)]
    return np.array([recall if part == "recall" else fmeasure for recall, fmeasure in scores], dtype=float)


@cache
def _scorer(stem: bool) -> Any:
    """`rouge_score` with a stemmer that knows the words it has seen: without, most of the time goes there."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score import tokenize
    from rouge_score.rouge_scorer import RougeScorer

    stemmer = SimpleNamespace(stem=lru_cache(1 << 16)(PorterStemmer().stem)) if stem else None
    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=lambda text: tokenize.tokenize(text, stemmer)))


@lru_cache(1 << 14)
def _rouge_l(truth: str, text: str, stem: bool) -> tuple[float, float]:
    """Recall and f-measure. Kept, as several measures of a suite, and the table of rows, ask for the same pair."""
    score = _scorer(stem).score(truth, text)["rougeL"]
    return score.recall, score.fmeasure


def _written(table: SetTable, measure: str, set: str) -> list[str]:
    if table.generated is None:
        raise Unavailable(
            f"{measure} of {set!r} needs the model's greedy answers, and this table was made without them. "
            "Make it with the pass `generation`."
        )
    return table.generated


@spec
class Rouge:
    """Mean ROUGE-L of the greedy answer against the truth, 0 to 1: recall with stemmer in TOFU (2401.06121),
    f-measure without, the truth cut to 128 tokens, in MUSE (2407.06460)."""

    name: Literal["rouge"] = "rouge"
    set: str
    """The set that is measured."""
    stem: bool = True
    """Cut words to their stems first (Porter, English)."""
    part: Literal["recall", "fmeasure"] = "recall"
    """`recall`: the share of the truth's words that appear in order; `fmeasure`: its harmonic mean with precision."""
    cut: PositiveInt | None = None
    """Compare with the first so many tokens of the truth; set the suite's `max_new_tokens` alike."""

    kind: ClassVar[MeasureKind] = "text"
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The greedy answers, and the truth cut where it is to be."""
        return ("generation", Cut(self.cut)) if self.cut else ("generation",)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        truth = table.cut.get(Cut(self.cut)) if self.cut else table.answers
        if truth is None:
            raise Unavailable(f"rouge of {self.set!r} needs the truth cut to {self.cut} tokens. Make the table with that.")
        return mean_of(rouge_l(truth, _written(table, "rouge", self.set), self.stem, self.part))


@spec
class ExactMatch:
    """Share of greedy answers that equal the truth once outer blanks are cut and inner ones made single (SQuAD,
    1606.05250, without its other clean-up: case and punctuation count)."""

    name: Literal["exact_match"] = "exact_match"
    set: str
    """The set that is measured."""

    kind: ClassVar[MeasureKind] = "text"
    needs: ClassVar[tuple[Need, ...]] = ("generation",)
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        written = _written(table, "exact_match", self.set)
        same = [one.split() == other.split() for one, other in zip(table.answers, written, strict=True)]
        return mean_of(np.array(same, dtype=float))


# ------------------------------------------------------------------------------------------------ key spans


def names(text: str, span: str) -> bool:
    """Whether a text says a span word for word: case and white space aside, and not as a part of longer words."""
    words = r"\s+".join(re.escape(word) for word in span.casefold().split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text.casefold()) is not None


def keyword_share(table: SetTable, texts: list[str], set: str) -> tuple[Ints, Floats]:
    """(U,) the rows that have key spans, and (U,) the share of them that the row's text says.

    Raises:
        Unavailable: the set has no column of key spans, or no row has one.
    """
    at = [row for row, spans in enumerate(table.keywords or ()) if spans]
    if not at or table.keywords is None:
        raise Unavailable(f"set {set!r} has no key spans; name the column that holds them in sets.{set}.keyword.")
    shares = [sum(names(texts[row], span) for span in table.keywords[row]) / len(table.keywords[row]) for row in at]
    return np.array(at), np.array(shares)


@spec
class KeywordRecall:
    """Mean share of an answer's key spans that the greedy answer says, word for word, case aside (as the fill-in-the-blank
    probes of RWKU, 2406.10890, but in a free answer). Rows without key spans are left out."""

    name: Literal["keyword_recall"] = "keyword_recall"
    set: str
    """The set that is measured. It needs `keyword`, a column of text or of lists of texts."""

    kind: ClassVar[MeasureKind] = "text"
    needs: ClassVar[tuple[Need, ...]] = ("generation", "keyword")
    unit: ClassVar[str] = "share"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        table = model[self.set]
        at, shares = keyword_share(table, _written(table, "keyword_recall", self.set), self.set)
        return mean_over(shares, table, at)


# ------------------------------------------------------------------------------------------------ is it language?

REPEATED = 0.5
"""A text of which more than this share of the word pairs stood in it before is gibberish."""
LONG_ENOUGH = 8
"""Words from which on repetition is held against a text: a short answer may say a name twice."""


def _pieces(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def _grams(pieces: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(pieces[i:] for i in range(n)), strict=False))


def gram_entropy(text: str) -> float:
    """(H₂ + 2 H₃)/3 of the text's pairs and triples of words, bits; 0 for a text too short to have any."""
    total = 0.0
    for n, weight in ((2, 1 / 3), (3, 2 / 3)):
        counts = np.array(list(_grams(_pieces(text), n).values()), dtype=float)
        p = counts / counts.sum() if len(counts) else counts
        total += weight * float(-(p * np.log2(p)).sum())
    return total


def repetition(text: str) -> float:
    """The share of a text's word pairs that stood in it before; 0 where there are none."""
    counts = _grams(_pieces(text), 2)
    return 1 - len(counts) / counts.total() if counts else 0.0


def broken(text: str) -> float:
    """1 for a text without any letter or digit, or for one of 8 words or more that mostly repeats itself."""
    words = [piece for piece in _pieces(text) if piece[0].isalnum()]
    return float(not words or (len(words) >= LONG_ENOUGH and repetition(text) > REPEATED))


@spec
class Fluency:
    """Whether the greedy answers are language at all. `entropy`: mean (H₂ + 2 H₃)/3 of word pairs and triples, bits (ROME,
    Meng et al. 2022, 2202.05262; RWKU, 2406.10890). `repetition`: mean share of word pairs that stood in the answer before.
    `broken`: share of answers that are empty, or 8 words or more of which over half repeat."""

    name: Literal["fluency"] = "fluency"
    set: str
    """The set that is measured."""
    part: Literal["entropy", "repetition", "broken"] = "entropy"
    """Which of the three."""

    kind: ClassVar[MeasureKind] = "text"
    needs: ClassVar[tuple[Need, ...]] = ("generation",)

    @property
    def unit(self) -> str:
        """Depends on the part."""
        return "bits" if self.part == "entropy" else "share"

    @property
    def knowing(self) -> Knowing:
        """A model that can still speak has a high entropy, and little of the others."""
        return "raises" if self.part == "entropy" else "lowers"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        measure = {"entropy": gram_entropy, "repetition": repetition, "broken": broken}[self.part]
        return mean_of(np.array([measure(text) for text in _written(model[self.set], "fluency", self.set)]))
