"""Can an outsider tell the set's rows from rows that the model never saw? Membership inference, from the same tables.

One sign for every attack: a row's score is high when the row looks unseen. The AUC is the chance that a holdout row
scores above a row of the set: 1 is a set that is recognised, ½ nothing known, and far below ½ a set less likely than
anything unseen, over-unlearning, which gives it away just as well.
"""

from __future__ import annotations

import zlib
from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.memorization import Knowing
from llm_unlearn.evaluation.tables import Floats, Sample, SetTable, Tables, Unavailable
from llm_unlearn.spec import Share, spec

Attack = Literal["loss", "zlib", "min_k", "min_k++", "reference"]

STD_FLOOR = 1e-3  # where the model is certain there is no spread to divide by; OpenUnlearning's floor, 1e-6 in variance


def lowest(values: list[Floats], k: float) -> Floats:
    """(A,) mean of the lowest share k of each answer's tokens: ⌊kT⌋ of them, at least one."""
    return np.array([np.sort(value)[: max(1, int(k * len(value)))].mean() for value in values])


def attack_scores(table: SetTable, reference: SetTable | None, attack: Attack, k: float) -> Floats:
    """(R,) one score per row of a set, high = looks unseen.

    loss      NLL/T (Yeom et al. 2018, 1709.01604)
    zlib      NLL/T ÷ bytes of the zlib-compressed answer text, prompt not included (Carlini et al. 2021, 2012.07805)
    min_k     −mean of the lowest k of log p (Shi et al. 2024, 2310.16789)
    min_k++   the same of (log p − mean) / std, both under the model's own distribution (Zhang et al. 2025, 2404.02936)
    reference NLL/T − NLL/T of a model that saw neither set, here the retrained one (after Carlini et al. 2021)

    Raises:
        Unavailable: `reference` without the table of the retrained model.
        ValueError: the reference table has other rows than the table.
    """
    answers = table.likelihood.of("answer")
    loss: Floats = answers.nll / answers.length
    match attack:
        case "loss":
            return loss
        case "zlib":
            size = np.array([len(zlib.compress(table.answers[row].encode())) for row in answers.row], dtype=np.float64)
            return loss / size
        case "min_k":
            return -lowest([logp.astype(float) for logp in answers.split(answers.logp)], k)
        case "min_k++":
            surprise = (answers.logp - answers.mean) / np.maximum(answers.std, STD_FLOOR)
            return -lowest([value.astype(float) for value in answers.split(surprise)], k)
        case "reference":
            if reference is None:
                raise Unavailable(
                    "the membership attack `reference` needs a retrained model: `--retrained PATH` or `retrained:` in "
                    "the suite. `loss`, `zlib`, `min_k` and `min_k++` need none."
                )
            if reference.ids != table.ids:
                raise ValueError("the two models' tables have different rows. Evaluate both on the same sets.")
            unseen = reference.likelihood.of("answer")
            return loss - unseen.nll / unseen.length


def auc(members: Floats, others: Floats) -> float:
    """The chance that one of `others` scores above one of `members`, ties counting half."""
    ordered = np.sort(others)
    below, not_above = (np.searchsorted(ordered, members, side=side).mean() for side in ("left", "right"))
    return float(1 - (below + not_above) / 2 / len(others))


def tpr(members: Floats, others: Floats, fpr: float) -> float:
    """The largest share of `members` at or below a threshold that has at most a share `fpr` of `others` there too."""
    allowed = int(fpr * len(others) + 1e-9)  # so that 0.29 of 100 is 29
    return float((members < np.sort(others)[allowed]).mean()) if allowed < len(others) else 1.0


def _both(model: Tables, retrained: Tables | None, measure: Membership | MembershipTPR) -> tuple[Floats, Floats]:
    """The scores of the set and of the holdout, (R,) and (H,)."""

    def of(name: str) -> Floats:
        return attack_scores(model[name], retrained[name] if retrained else None, measure.attack, measure.k)

    return of(measure.set), of(measure.against)


def _check(measure: Membership | MembershipTPR) -> None:
    if not 0 < measure.k <= 1:
        raise ValueError(f"k above 0 and at most 1, a share of the tokens, not {measure.k}")
    if measure.set == measure.against:
        raise ValueError(f"two different sets, not {measure.set!r} against itself")


@spec
class Membership:
    """AUC of a membership attack, the set against a holdout: ½ nothing known, 1 recognised, 0 over-unlearned
    (attacks and papers at `attack_scores`)."""

    name: Literal["membership"] = "membership"
    attack: Attack
    """The score: loss, zlib, min_k, min_k++ or reference (defined at `attack_scores`)."""
    set: str
    """The members: usually the forget set."""
    against: str
    """The holdout: rows of the same kind that the model never saw. It needs the same passes as `set`."""
    k: float = 0.2
    """min_k and min_k++: the share of an answer's tokens, the least likely ones, that count."""

    needs: ClassVar[tuple[str, ...]] = ("answer",)
    knowing: ClassVar[Knowing] = "moves"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        members, others = _both(model, retrained, self)
        return Sample((members, others), lambda groups: auc(groups[0], groups[1]), members)


@spec
class MembershipTPR:
    """Share of the set that a membership attack recognises while it takes at most a share `fpr` of the holdout for
    members (Carlini et al. 2022, 2112.03570). Nothing known gives about `fpr`; with fewer than 1/`fpr` holdout rows
    no false alarm is allowed at all."""

    name: Literal["membership_tpr"] = "membership_tpr"
    attack: Attack
    """The score: loss, zlib, min_k, min_k++ or reference (defined at `attack_scores`)."""
    set: str
    """The members: usually the forget set."""
    against: str
    """The holdout: rows of the same kind that the model never saw. It needs the same passes as `set`."""
    k: float = 0.2
    """min_k and min_k++: the share of an answer's tokens, the least likely ones, that count."""
    fpr: Share = 0.01
    """The share of the holdout that may be taken for members."""

    needs: ClassVar[tuple[str, ...]] = ("answer",)
    knowing: ClassVar[Knowing] = "raises"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        members, others = _both(model, retrained, self)
        return Sample((members, others), lambda groups: tpr(groups[0], groups[1], self.fpr), members)
