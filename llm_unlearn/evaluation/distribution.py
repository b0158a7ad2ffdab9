"""The whole distribution of the next token: how sure the model is, and how far it is from the retrained model."""

from __future__ import annotations

from typing import ClassVar, Literal

from llm_unlearn.evaluation.memorization import Knowing, MeasureKind
from llm_unlearn.evaluation.tables import Distance, Need, Sample, Tables, Unavailable, mean_of
from llm_unlearn.spec import spec


@spec
class Entropy:
    """mean_i of the mean entropy of the model's distribution at the answer's tokens, nats; 0 for a model that is certain."""

    name: Literal["entropy"] = "entropy"
    set: str
    """The set that is measured."""

    kind: ClassVar[MeasureKind] = "distribution"
    needs: ClassVar[tuple[Need, ...]] = ("answer",)
    unit: ClassVar[str] = "nats"
    knowing: ClassVar[Knowing] = "lowers"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of("answer")
        return mean_of(answers.sum(answers.entropy) / answers.length)


@spec
class KnowledgeGap:
    """mean_i of the mean distance to the retrained model's distribution at the answer's tokens, nats, over the whole vocabulary:
    KL(retrained ‖ model), or the Jensen–Shannon divergence, which is at most log 2. 0 is what retraining would have given."""

    name: Literal["knowledge_gap"] = "knowledge_gap"
    set: str
    """The set that is measured."""
    distance: Distance = "kl"
    """`kl`: grows without bound where the model rules out what the retrained one would say; `js`: symmetric and bounded."""

    kind: ClassVar[MeasureKind] = "distribution"
    needs: ClassVar[tuple[Need, ...]] = ("answer", "distance")
    unit: ClassVar[str] = "nats"
    knowing: ClassVar[Knowing] = "raises"

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        answers = model[self.set].likelihood.of("answer")
        if self.distance not in answers.more:
            raise Unavailable(
                f"knowledge_gap of {self.set!r} needs a retrained model with the same tokens: `--retrained PATH` or `retrained:` "
                "in the suite."
            )
        return mean_of(answers.sum(answers.more[self.distance]) / answers.length)
