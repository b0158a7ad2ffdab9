"""The per-example membership attack: shadow models that were taught some rows and made to forget them tell, row by row, what this
way of forgetting leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.attacks.asking import answers_of, known
from llm_unlearn.attacks.finding import Axis, Curve, Gain, Subject
from llm_unlearn.attacks.relearning import Relearning, fine_tune
from llm_unlearn.evaluation.membership import auc, tpr
from llm_unlearn.evaluation.tables import Floats, Sample
from llm_unlearn.recipe import Recipe, load
from llm_unlearn.sections import Adapter
from llm_unlearn.spec import PositiveFloat, PositiveInt, Refused, fingerprint, plain, spec
from llm_unlearn.tree import locate

if TYPE_CHECKING:
    from llm_unlearn.data.examples import Example
    from llm_unlearn.evaluation.sets import EncodedSet
    from llm_unlearn.models.load import Loaded
    from llm_unlearn.training.job import Job

CERTAIN = 1e-9  # a probability stays so far away from 0 and from 1: its logit is a number
GRID = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of shadows at which the attack is looked at; all of them is added."""


@spec
class Shadows:
    """U-LiRA (Hayes et al. 2024, 2403.01218, after LiRA, Carlini et al. 2022, 2112.03570) with adapters for shadow models. Each
    shadow starts from the retrained model, which knows neither set, is taught half of the rows of both, and is made to forget
    them by the recipe. A row's φ = log p/(1 − p), p its probability per token, is then taken for normal: with one mean over the
    shadows that learnt and forgot the row, another over those that never saw it, and variances shared by all rows, as the shadows
    are few. The row's score is the ratio of the two densities at the attacked model's φ; the AUC is that of the set against the
    holdout: ½ where having forgotten cannot be told from never having seen."""

    name: Literal["shadows"] = "shadows"
    set: str
    """The members: the set that was to be forgotten."""
    against: str
    """The holdout: rows of the same kind that the model never saw."""
    retain: str
    """The set that the recipe holds on to while a shadow forgets."""
    recipe: str
    """The recipe whose objective, adapter and training make a shadow forget; its data are not used."""
    shadows: PositiveInt = 8
    """Shadow models, an even number: of each pair, one is taught the rows that the other is not."""
    steps: PositiveInt = 60
    """Optimizer steps that teach a shadow its half."""
    window: PositiveInt = 32
    """Rows in one of these steps."""
    lr: PositiveFloat = 1e-3
    """Learning rate of the teaching."""
    adapter: Adapter = Adapter()
    """The adapter by which a shadow is taught; it is merged before the shadow forgets."""

    def __post_init__(self) -> None:
        if len({self.set, self.against, self.retain}) < 3:
            raise ValueError("three different sets: members, holdout, retain")
        if self.shadows % 2:
            raise ValueError(f"an even number of shadows, not {self.shadows}")

    @property
    def title(self) -> str:
        return "shadow models"

    @property
    def x(self) -> Axis:
        return Axis("shadows", "shadows")

    @property
    def y(self) -> Gain:
        return Gain("AUC", at_last=True)

    def __call__(self, subject: Subject) -> Curve:
        asked = [answers_of(subject.sets[name]) for name in (self.set, self.against)]
        members = len(asked[0].ids)
        taught = halves(self.shadows, members + len(asked[1].ids), subject.seed)
        phi = np.stack([self.shadow(k, taught[k], asked, subject) for k in range(self.shadows)])  # (K, R)
        mine = logit(subject.load(), asked, subject)
        points = [k for k in GRID if k < self.shadows] + [self.shadows]
        scores = [-log_ratios(mine, phi[:k], taught[:k]) for k in points]  # high = looks unseen
        samples = [Sample((one[:members], one[members:]), lambda groups: auc(groups[0], groups[1])) for one in scores]
        bounds = [sample.bootstrap() or (sample.value, sample.value) for sample in samples]
        return Curve(
            tuple(float(k) for k in points), tuple(sample.value for sample in samples),
            tuple(low for low, _ in bounds), tuple(high for _, high in bounds), tuple((-scores[-1][:members]).tolist()),
            {"tpr_at_1_percent_fpr": tpr(scores[-1][:members], scores[-1][members:], 0.01)},
        )  # fmt: skip

    def shadow(self, k: int, taught: NDArray[np.bool_], asked: Sequence[EncodedSet], subject: Subject) -> Floats:
        """(R,) φ of all rows in shadow k; made once for all models that are attacked.

        Raises:
            Refused: there is no model that never saw the rows, or the recipe cannot be carried out on these sets.
        """
        control, forgetting = subject.control, self.forgetting()
        if control is None:
            raise Refused("shadow models start from the retrained model; give it: --retrained PATH, or `retrained:` in the suite.")
        kept = subject.sets[self.retain].fingerprint_asked
        key = [k, control.identity, *(one.fingerprint_asked for one in asked), kept, plain(forgetting), taught.tolist()]
        return np.array(subject.once(fingerprint(*key), lambda: self._shadow(k, control(merged=True), taught, asked, subject)))

    def _shadow(
        self, k: int, loaded: Loaded, taught: NDArray[np.bool_], asked: Sequence[EncodedSet], subject: Subject
    ) -> list[float]:
        from llm_unlearn.models.load import add_adapter
        from llm_unlearn.models.merging import merge_adapter

        subject.tell(f"  shadow {k + 1} of {self.shadows}")
        forgetting, members = self.forgetting(), len(asked[0].ids)
        parts = [answers_of(one, np.flatnonzero(half).tolist())
                 for one, half in zip(asked, (taught[:members], taught[members:]), strict=True)]  # fmt: skip
        mine = replace(parts[0], ids=[*parts[0].ids, *parts[1].ids], examples=[*parts[0].examples, *parts[1].examples])
        job = forget_job(forgetting, mine.examples, subject.sets[self.retain].asked, loaded, subject)
        teaching = Relearning(set=self.set, steps=self.steps, lr=self.lr, window=self.window).job(mine, subject)
        net = add_adapter(loaded.model, self.adapter, subject.seed)
        fine_tune(teaching, net, subject, lambda _: None, f"teaching shadow {k + 1}")
        net = merge_adapter(net, "shadow models")
        net = add_adapter(net, forgetting.model.adapter, subject.seed) if forgetting.model.adapter else net.requires_grad_()
        fine_tune(job, net, subject, lambda _: None, f"shadow {k + 1} forgets")
        found: list[float] = logit(replace(loaded, model=net), asked, subject).tolist()
        return found

    def forgetting(self) -> Recipe:
        """The recipe, which must not need more than forget and retain rows.

        Raises:
            Refused: it needs more, or cannot be read.
        """
        recipe = load(locate(self.recipe), check=False)
        more = [f"data.forget.{name}" for name in ("alternate", "contrast") if getattr(recipe.data.forget, name)]
        adapter = recipe.model.adapter
        more += [f"method: {recipe.method.name}"] if recipe.method else []  # its terms alone are not how it forgets
        more += ["model.adapter.init: fila"] if adapter and adapter.init == "fila" else []
        more += ["model.trainable"] if recipe.model.trainable else []
        more += ["train.stop.until: holdout"] if recipe.train.stop and recipe.train.stop.until == "holdout" else []
        if more:
            raise Refused(f"{self.recipe}: shadow models cannot forget by a recipe with {', '.join(more)}; take one without.")
        return recipe


def halves(shadows: int, rows: int, seed: int) -> NDArray[np.bool_]:
    """(K, R) which shadow is taught which rows: shadow 2j a random half, shadow 2j + 1 the other one."""
    rng = np.random.default_rng([seed, 2403])
    first = np.argsort(rng.random((shadows // 2, rows)), axis=1) < rows // 2
    return np.stack([first, ~first], axis=1).reshape(shadows, rows)


def logit(loaded: Loaded, asked: Sequence[EncodedSet], subject: Subject) -> Floats:
    """(R,) log p/(1 − p) of the rows of all sets, p their probability per token."""
    found = np.concatenate([known(loaded, one, "probability", subject).rows for one in asked])
    p = np.clip(found, CERTAIN, 1 - CERTAIN)
    return np.asarray(np.log(p) - np.log1p(-p))


def log_ratios(phi: Floats, shadows: Floats, taught: NDArray[np.bool_]) -> Floats:
    """(R,) log N(φ; learnt and forgotten) − log N(φ; never seen).

    Means are each row's own over its K/2 shadows, and variances are shared by all rows, unbiased; with two shadows, that have none,
    they are 1.

    Args:
        phi: (R,) of the attacked model.
        shadows: (K, R)
        taught: (K, R) whether a shadow was taught a row, each in K/2 of them.
    """
    found = np.zeros_like(phi)
    for side, sign in ((taught, 1.0), (~taught, -1.0)):
        count = side.sum(axis=0)
        mean = np.where(side, shadows, 0.0).sum(axis=0) / count
        spread = np.where(side, (shadows - mean) ** 2, 0.0).sum()
        variance = spread / (count - 1).sum() if (count - 1).sum() else 1.0
        variance = max(variance, 1e-12)
        found += sign * (-((phi - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return found


def forget_job(recipe: Recipe, forget: Sequence[Example], retain: Sequence[Example], control: Loaded, subject: Subject) -> Job:
    """The recipe's objective and training on other rows; `stop: {until: retrained}` means the shadow's own start, which never saw
    them."""
    from llm_unlearn.data.schedule import build
    from llm_unlearn.objectives.terms import stream_of
    from llm_unlearn.training.guard import aim_of
    from llm_unlearn.training.job import Job

    rows = {"forget": forget, "retain": retain} if recipe.data.retain else {"forget": forget}
    examples = {name: [replace(one, stream=name) for one in found] for name, found in rows.items()}
    sizes = {name: len(found) for name, found in examples.items()}
    terms = {name: term for name, term in recipe.terms.items() if stream_of(term, name) in sizes}  # a shadow has no further streams
    schedule = build(sizes, {name: recipe.window[name] for name in sizes}, recipe.seed, recipe.train.epochs, recipe.train.steps)
    settings = replace(recipe.train, checkpoint_every=schedule.steps + 1, batch_tokens=subject.batch_tokens)
    job = Job(terms, examples, schedule, settings, recipe.seed)
    return replace(job, aim=aim_of(job, control.model, subject.accelerator))
