"""Can an outsider tell the set's rows from rows that the model never saw? Membership inference, from the same tables.

A row's score is high when the row looks unseen (`membership_attacks.py`). The AUC is the chance that a holdout row scores above
a row of the set: 1 is a set that is recognised, ½ nothing known, and far below ½ a set less likely than anything unseen,
over-unlearning, which gives it away just as well.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from llm_unlearn.evaluation.membership_attacks import AnyMembershipAttack, MinK, ReCaLL, Reference
from llm_unlearn.evaluation.memorization import Knowing, MeasureKind
from llm_unlearn.evaluation.tables import Floats, Need, Sample, Tables, Unavailable
from llm_unlearn.spec import Share, spec

Statistic = Literal["auc", "tpr", "secrecy"]
KNOWING: dict[Statistic, Knowing] = {"auc": "moves", "tpr": "raises", "secrecy": "lowers"}


def auc(members: Floats, others: Floats) -> float:
    """The chance that one of `others` scores above one of `members`, ties counting half."""
    ordered = np.sort(others)
    below, not_above = (np.searchsorted(ordered, members, side=side).mean() for side in ("left", "right"))
    return float(1 - (below + not_above) / 2 / len(others))


def tpr(members: Floats, others: Floats, fpr: float) -> float:
    """The largest share of `members` at or below a threshold that has at most a share `fpr` of `others` there too."""
    allowed = int(fpr * len(others) + 1e-9)  # so that 0.29 of 100 is 29
    return float((members < np.sort(others)[allowed]).mean()) if allowed < len(others) else 1.0


def both(measure: Membership | PrivLeak, tables: Tables, unseen: Tables | None) -> tuple[Floats, Floats]:
    """The scores of the set and of the holdout, (R,) and (H,); those of holdout rows that the attack uses up are NaN.

    Raises:
        Unavailable: the attack lacks something, or no holdout row is left.
    """
    members, others = (
        measure.attack(tables[name], measure.against, unseen[name] if unseen else None) for name in (measure.set, measure.against)
    )
    if used := used_up(measure):
        if len(others) <= used:
            raise Unavailable(f"recall puts {used} rows of {measure.against!r} in front; it has {len(others)}. Fewer `shots`.")
        others = np.concatenate([np.full(used, np.nan), others[used:]])
    return members, others


def used_up(measure: Membership | PrivLeak) -> int:
    """So many of the holdout's first rows serve the attack and leave the comparison."""
    return measure.attack.shots if isinstance(measure.attack, ReCaLL) else 0


def check_sets(measure: Membership | PrivLeak) -> None:
    """Refuse a set held against itself."""
    if measure.set == measure.against:
        raise ValueError(f"two different sets, not {measure.set!r} against itself")


@spec
class Membership:
    """How well a membership attack tells the set from a holdout, as its AUC: ½ nothing known, 1 recognised, 0 over-unlearned; as
    tpr, the share of the set that it recognises while it takes at most a share `fpr` of the holdout for members (Carlini et al.
    2022, 2112.03570): nothing known gives about `fpr`, and with fewer than 1/`fpr` holdout rows no false alarm is allowed at all;
    or as secrecy, 1 − 2|AUC − ½|: 1 nothing known, 0 for a set that is recognised and for one that is shunned (SemEval-2025
    task 4, 2504.02883, where the attack is `loss`). Attacks and papers: `membership_attacks.py`."""

    name: Literal["membership"] = "membership"
    attack: AnyMembershipAttack
    """The score by which a row looks unseen."""
    set: str
    """The members: usually the forget set."""
    against: str
    """The holdout: rows of the same kind that the model never saw. It needs the same passes as `set`."""
    statistic: Statistic = "auc"
    """What is made of the scores: auc, tpr or secrecy."""
    fpr: Share = 0.01
    """tpr: the share of the holdout that may be taken for members."""

    kind: ClassVar[MeasureKind] = "membership"

    def __post_init__(self) -> None:
        check_sets(self)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the attack reads."""
        return self.attack.needs(self.against)

    @property
    def unit(self) -> str:
        """What the value is counted in."""
        return "AUC" if self.statistic == "auc" else "share"

    @property
    def knowing(self) -> Knowing:
        """Which way the value goes when the model knows more."""
        return KNOWING[self.statistic]

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        members, others = both(self, model, retrained)

        def statistic(groups: tuple[Floats, ...]) -> float:
            match self.statistic:
                case "auc":
                    return auc(groups[0], groups[1])
                case "tpr":
                    return tpr(groups[0], groups[1], self.fpr)
                case "secrecy":
                    return 1 - 2 * abs(auc(groups[0], groups[1]) - 0.5)

        return Sample((members, others[used_up(self) :]), statistic, members, others=others)


@spec
class PrivLeak:
    """(AUC' − AUC'_retrained) / AUC'_retrained × 100 with AUC' = 1 − AUC of the attack, set against holdout: 0 is what
    retraining would have given, far below 0 a set that is still recognised, far above 0 one that is over-unlearned, a leak
    too (MUSE, 2407.06460, §3.2, on min_k with k = 40 %). Rows are resampled together for both models."""

    name: Literal["privleak"] = "privleak"
    attack: AnyMembershipAttack = MinK(k=0.4)
    """The score, as in `membership`."""
    set: str
    """The forget set."""
    against: str
    """The holdout: rows of the same kind that neither model saw. It needs the same passes as `set`."""
    retrained_auc: float | None = None
    """AUC'_retrained as a number that was published (MUSE: news .4772, books .5393), where there is no retrained model here. With
    it, the retrained model's own tables are not used."""

    kind: ClassVar[MeasureKind] = "membership"
    unit: ClassVar[str] = "%"
    knowing: ClassVar[Knowing] = "lowers"

    def __post_init__(self) -> None:
        check_sets(self)
        if isinstance(self.attack, Reference):
            raise ValueError("an attack that both models can be asked by; `reference` compares with the retrained model already")
        if self.retrained_auc is not None and not 0 < self.retrained_auc < 1:
            raise ValueError(f"retrained_auc between 0 and 1, not {self.retrained_auc}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the attack reads."""
        return self.attack.needs(self.against)

    def __call__(self, model: Tables, retrained: Tables | None) -> Sample:
        mine, first = both(self, model, None), used_up(self)
        if (published := self.retrained_auc) is not None:
            return Sample(
                (mine[0], mine[1][first:]), lambda groups: _leak(1 - auc(groups[0], groups[1]), published), mine[0], others=mine[1]
            )
        if retrained is None:
            raise Unavailable(
                f"privleak of {self.set!r} needs a retrained model, whose AUC is not taken to be one half: `--retrained PATH` "
                "or `retrained:` in the suite; or give its AUC as `retrained_auc`."
            )
        theirs = both(self, retrained, None)
        for name, one, other in zip((self.set, self.against), mine, theirs, strict=True):
            if retrained[name].ids != model[name].ids or len(one) != len(other):
                raise ValueError("the two models' tables have different rows. Evaluate both on the same sets.")
        members, others = (np.stack(pair, axis=1) for pair in zip(mine, theirs, strict=True))  # (R, 2), (H, 2)

        def statistic(groups: tuple[Floats, ...]) -> float:
            now, then = (1 - auc(groups[0][:, model], groups[1][:, model]) for model in (0, 1))
            return _leak(now, then)

        return Sample((members, others[first:]), statistic, mine[0], others=mine[1])


def _leak(now: float, then: float) -> float:
    """In per cent of the retrained model's; where that is 0, a set that even the retrained model is recognised by, as if it were
    one pair in a million, so that the number stays one."""
    return 100 * (now - then) / max(then, 1e-6)
