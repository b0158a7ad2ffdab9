"""What makes a row look seen: the membership attacks, one equation each, from a model's tables.

One sign for all: a row's score is high when the row looks unseen. Those that need more than the likelihood pass say so in `needs`.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Variant, needs_of
from llm_unlearn.evaluation.tables import Floats, Likelihood, Need, Neighbours, PerRow, SetTable, Shots, Unavailable
from llm_unlearn.spec import Portion, PositiveInt, by_name, spec

LOSS_FLOOR = 1e-9  # nats a token, below which a loss is no more than rounding: what is certain keeps its ratio finite
STD_FLOOR = 1e-3  # where the model is certain there is no spread to divide by; OpenUnlearning's floor, 1e-6 in variance


def loss_of(answers: Likelihood) -> Floats:
    """(R,) NLL/T."""
    loss: Floats = answers.nll / answers.length
    return loss


def lowest(values: list[Floats], k: float) -> Floats:
    """(A,) mean of the lowest share k of each answer's tokens: ⌊kT⌋ of them, at least one."""
    return np.array([np.sort(value)[: max(1, int(k * len(value)))].mean() for value in values])


def _of_rows(table: SetTable, answers: Likelihood, scores: Floats) -> Floats:
    """(A,) -> (R,) the scores by row; 0, as in OpenUnlearning, for a row in which its variant reads no token."""
    found = np.zeros(len(table.ids))
    found[answers.row] = scores
    return found


def made_for(attack: str, table: SetTable, need: PerRow) -> Floats:
    """(R,) what a pass of the attack's own gave.

    Raises:
        Unavailable: it was not made.
    """
    if need not in table.per_row:
        raise Unavailable(f"the membership attack `{attack}` needs a pass of its own. Make the table with {need!r}.")
    return table.per_row[need]


@spec
class Loss:
    """NLL/T (Yeom et al. 2018, 1709.01604)."""

    name: Literal["loss"] = "loss"

    def needs(self, against: str) -> tuple[Need, ...]:
        """What is read of both sets, `against` being the holdout."""
        return ("answer",)

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        return loss_of(table.likelihood.of("answer"))


@spec
class Zlib:
    """NLL/T ÷ bytes of the zlib-compressed answer text, prompt not included (Carlini et al. 2021, 2012.07805)."""

    name: Literal["zlib"] = "zlib"

    def needs(self, against: str) -> tuple[Need, ...]:
        """As in `loss`."""
        return ("answer",)

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        answers = table.likelihood.of("answer")
        size = np.array([len(zlib.compress(table.answers[row].encode())) for row in answers.row], dtype=np.float64)
        return loss_of(answers) / size


@spec
class MinK:
    """−mean of the lowest share k of log p (Shi et al. 2024, 2310.16789)."""

    name: Literal["min_k"] = "min_k"
    k: Portion = 0.2
    """The share of an answer's tokens, the least likely ones, that count."""
    variant: Variant | None = None
    """`peer`: score the tokens that OpenUnlearning scores. It leaves out the last one, usually the end of the turn."""

    def needs(self, against: str) -> tuple[Need, ...]:
        """Return the answers, and again as the variant encodes them."""
        return needs_of(self.variant)

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        answers = table.likelihood.of(self.variant or "answer")
        return _of_rows(table, answers, -lowest([logp.astype(float) for logp in answers.split(answers.logp)], self.k))


@spec
class MinKPlusPlus:
    """−mean of the lowest share k of (log p − mean) / std, both under the model's own distribution (Zhang et al. 2025,
    2404.02936)."""

    name: Literal["min_k++"] = "min_k++"
    k: Portion = 0.2
    """The share of an answer's tokens, the least likely ones, that count."""
    variant: Variant | None = None
    """`peer`: score the tokens that OpenUnlearning scores. It leaves out the last one, usually the end of the turn."""

    def needs(self, against: str) -> tuple[Need, ...]:
        """Return the answers, and again as the variant encodes them."""
        return needs_of(self.variant)

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        answers = table.likelihood.of(self.variant or "answer")
        surprise = (answers.logp - answers.mean) / np.maximum(answers.std, STD_FLOOR)
        return _of_rows(table, answers, -lowest([value.astype(float) for value in answers.split(surprise)], self.k))


@spec
class Reference:
    """NLL/T − NLL/T of a model that saw neither set, here the retrained one (after Carlini et al. 2021, 2012.07805)."""

    name: Literal["reference"] = "reference"

    def needs(self, against: str) -> tuple[Need, ...]:
        """As in `loss`."""
        return ("answer",)

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        if unseen is None:
            raise Unavailable(
                "the membership attack `reference` needs a retrained model: `--retrained PATH` or `retrained:` in "
                "the suite. `loss`, `zlib`, `min_k` and `min_k++` need none."
            )
        if unseen.ids != table.ids:
            raise ValueError("the two models' tables have different rows. Evaluate both on the same sets.")
        return loss_of(table.likelihood.of("answer")) - loss_of(unseen.likelihood.of("answer"))


@spec
class GradientNorm:
    """Norm of the gradient of NLL/T by the model's weights, in eval mode (after Nasr et al. 2019, 1812.00910)."""

    name: Literal["gradient"] = "gradient"

    def needs(self, against: str) -> tuple[Need, ...]:
        """A backward pass for each row."""
        return ("answer", "gradient")

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        return made_for(self.name, table, "gradient")


@spec
class ReCaLL:
    """−NLL(answer | P) / NLL(answer), P rows that the model never saw: they disturb it most where it knew the answer (Xie et al.
    2024, 2406.15968). The rows of P leave the comparison."""

    name: Literal["recall"] = "recall"
    shots: PositiveInt = 5
    """So many of the holdout's first rows stand in front."""

    def needs(self, against: str) -> tuple[Need, ...]:
        """Each answer once more, behind P."""
        return ("answer", Shots(against, self.shots))

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        loss = loss_of(table.likelihood.of("answer"))
        return -made_for(self.name, table, Shots(against, self.shots)) / np.maximum(loss, LOSS_FLOOR)


@spec
class Neighbourhood:
    """NLL/T − mean NLL/T of the answer's neighbours: what was learnt by heart stands lower than what reads alike (Mattern et al.
    2023, 2305.18462, eq. 2). A neighbour has one token x_t swapped for another, w; the neighbours are those with the largest
    p(w | x_<t) / (1 − p(x_t | x_<t)), as in the paper, but p is the attacked model's own, for want of a masked one beside it."""

    name: Literal["neighbourhood"] = "neighbourhood"
    n: PositiveInt = 25
    """Neighbours of each answer (the paper: 100), each of which is scored once."""

    def needs(self, against: str) -> tuple[Need, ...]:
        """Each answer's neighbours, scored."""
        return ("answer", Neighbours(self.n))

    def __call__(self, table: SetTable, against: str, unseen: SetTable | None) -> Floats:
        return loss_of(table.likelihood.of("answer")) - made_for(self.name, table, Neighbours(self.n))


AnyMembershipAttack = Annotated[
    Loss | Zlib | MinK | MinKPlusPlus | Reference | GradientNorm | ReCaLL | Neighbourhood,
    by_name,
]
