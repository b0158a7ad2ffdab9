"""Where in the model the answer still stands: each layer read by the head, by a probe, or put into the model as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.attacks.finding import Axis, Gain
from llm_unlearn.attacks.rows import Reading, answers_of, batches, curve_of, joined, reading_of, set_of, split, with_original
from llm_unlearn.evaluation.tables import Floats
from llm_unlearn.source import Source
from llm_unlearn.spec import NonNegativeFloat, Part, Refused, spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_unlearn.attacks.finding import Curve, Subject
    from llm_unlearn.data.examples import Example
    from llm_unlearn.models.load import Loaded

FEWEST = 20
"""Rows that a probe is trained on at least, and its classes with two or more of them: below, its accuracy says nothing."""


def _depth(loaded: Loaded) -> int:
    return int(loaded.causal.config.get_text_config().num_hidden_layers)


@spec
class LogitLens:
    """lm_head(norm(h_l)) at the answer positions, layer by layer (nostalgebraist 2020; unlearning: 2309.17410): where the answer
    can still be read, even if later layers hide it. The last layer gives the model's own numbers."""

    name: Literal["logit_lens"] = "logit_lens"
    set: str = "forget"
    """The set whose answers are read."""
    measure: Literal["probability", "first_choice"] = "probability"
    """Mean of exp(mean log p per token), or mean share of tokens that are the first choice."""

    x: ClassVar[Axis] = Axis("decoder layer")
    y: ClassVar[Gain] = Gain("how well the head reads the answer from this layer")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "logit lens" if self.measure == "probability" else "logit lens, first choices"

    def __call__(self, subject: Subject) -> Curve:
        import torch

        from llm_unlearn.models.scores import Scorer, head_of
        from llm_unlearn.models.trials import last_norm

        examples, loaded = answers_of(subject, self.name, self.set), subject.load()
        layers = tuple(range(_depth(loaded)))
        scorer, head, norm = Scorer(loaded.model), head_of(loaded.model), last_norm(loaded.model)
        parts: dict[int, list[tuple[list[int], Reading]]] = {layer: [] for layer in layers}
        with torch.no_grad(), subject.accelerator.autocast():
            for chosen, batch in batches(examples, subject):
                states = scorer(batch.input_ids, batch.at, layers)
                for layer in layers:
                    parts[layer].append((chosen, reading_of(norm(states[layer]), head, batch)))
        readings = [joined(parts[layer], len(examples)) for layer in layers]
        values = [one.probability if self.measure == "probability" else one.hits for one in readings]
        means = [float(rows.mean()) for rows in values]
        return curve_of(layers, values, {"strongest layer": float(np.argmax(means)), "at the strongest layer": max(means)})


@spec
class LayerProbe:
    """Accuracy of a linear probe on frozen states h_l, trained on some rows and tested on others (Alain & Bengio 1610.01644).

    With `labels`, a multinomial logistic regression tells a row's class from the state at the last prompt token. Without, a
    logistic regression on the state at the last answer token tells right answers from the set's wrong ones (2304.13734), and a row
    counts where its right answer gets the highest score. Chance stands in the notes, and wins where nothing is known.
    """

    name: Literal["layer_probe"] = "layer_probe"
    set: str = "forget"
    """The set that is tested."""
    labels: tuple[Source, ...] = ()
    """Rows with the ids of the sets' rows, whose column `answer` is the class of the row, such as its keyword."""
    trained_on: str | None = None
    """The set that the probe learns from; without it, a part of the tested set."""
    share: Part = 0.5
    """The part of the tested set that the probe learns from, where no other set is named."""
    penalty: NonNegativeFloat = 1.0
    """Weight of ½‖W‖² beside the summed log loss (1/C of scikit-learn)."""

    x: ClassVar[Axis] = Axis("decoder layer")
    y: ClassVar[Gain] = Gain("share of rows that a linear probe of this layer gets right")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "layer probe of the class" if self.labels else "layer probe of right and wrong"

    def __call__(self, subject: Subject) -> Curve:
        loaded = subject.load()
        options, right, rows = self._options(subject, self.set)
        test = np.arange(rows.max() + 1)
        if self.trained_on is None:
            first, other = split(len(test), self.share, subject.seed, self.name)
            learn, learn_right = np.isin(rows, first), right
            test = np.array(other)
            taught = options
        else:
            taught, learn_right, _ = self._options(subject, self.trained_on)
            learn = np.ones(len(taught), dtype=bool)
        known = {one for one, count in zip(*np.unique(learn_right[learn], return_counts=True), strict=True) if count > 1}
        learn &= np.isin(learn_right, list(known))
        keep = np.isin(rows, test) & np.isin(right, list(known))
        if learn.sum() < FEWEST or len(known) < 2 or not keep.any():
            raise Refused(
                f"{self.name} of {self.set!r}: {learn.sum()} rows to learn {len(known)} classes from, each seen at least twice, "
                f"and {keep.sum()} to test; a probe needs {FEWEST} and 2, and one to test. Name a larger set in `trained_on`, or a "
                "coarser class in `labels`."
            )
        place = 0 if self.labels else -1
        from_rows = _states(subject, loaded, [one for one, kept in zip(taught, learn, strict=True) if kept], place)
        to_rows = _states(subject, loaded, [one for one, kept in zip(options, keep, strict=True) if kept], place)
        values = []
        for layer in range(_depth(loaded)):
            scores, classes = probe(from_rows[layer], learn_right[learn], to_rows[layer], self.penalty)
            values.append(self._hits(scores, classes, right[keep], rows[keep]))
        return curve_of(range(_depth(loaded)), values, self._chance(learn_right[learn], right[keep], rows[keep], len(values[0])))

    def _options(self, subject: Subject, name: str) -> tuple[list[Example], NDArray[np.str_], NDArray[np.int64]]:
        """What is looked at, the class of each, and its row."""
        found = set_of(subject, self.name, name)
        if self.labels:
            from llm_unlearn.data.sources import rows

            known = {str(row.get("id", i)): str(row[str(one.answer)]) for one in self.labels for i, row in enumerate(rows(one))}
            if without := [one for one in found.ids if one not in known]:
                raise Refused(f"{self.name}: row {without[0]!r} of set {name!r} is in none of `labels`; expected a row of that id.")
            return answers_of(subject, self.name, name), np.array([known[one] for one in found.ids]), np.arange(len(found.ids))
        better = {row for row, kind in zip(found.row, found.kind, strict=True) if kind == "paraphrase"}
        used = [i for i, kind in enumerate(found.kind) if kind != "answer" or found.row[i] not in better]
        kinds = np.array(["wrong" if found.kind[i] == "perturbed" else "right" for i in used])
        if "wrong" not in kinds:
            raise Refused(
                f"{self.name} of {name!r} needs `labels`, or wrong answers: name their column in sets.{name}.perturbed, beside a "
                "measure that reads them, such as truth_ratio."
            )
        return [found.examples[i] for i in used], kinds, np.array([found.row[i] for i in used])

    def _hits(self, scores: Floats, classes: NDArray[np.str_], right: NDArray[np.str_], rows: NDArray[np.int64]) -> Floats:
        if self.labels:
            return np.asarray(classes[scores.argmax(1)] == right, dtype=np.float64)
        score = scores[:, classes.tolist().index("right")] - scores[:, classes.tolist().index("wrong")]
        return np.array([score[(rows == r) & (right == "right")].max() > score[(rows == r) & (right == "wrong")].max() for r in
                         np.unique(rows)], dtype=float)  # fmt: skip

    def _chance(self, taught: NDArray[np.str_], right: NDArray[np.str_], rows: NDArray[np.int64], tested: int) -> dict[str, float]:
        if self.labels:
            names, counts = np.unique(taught, return_counts=True)
            chance = float((right == names[counts.argmax()]).mean())
        else:
            chance = float(np.mean([1 / (rows == r).sum() for r in np.unique(rows)]))
        return {"chance": chance, "classes": float(len(np.unique(taught))), "trained": float(len(taught)), "tested": float(tested)}


def probe(given: Floats, classes: NDArray[np.str_], asked: Floats, penalty: float) -> tuple[Floats, NDArray[np.str_]]:
    """Multinomial logistic regression: minimise Σ −log softmax(xW + b)[class] + penalty/2 · ‖W‖² by L-BFGS in float64.

    Args:
        given: (R, D) states, here and in `asked` (Q, D) put on the mean and spread of `given`.

    Returns:
        (Q, C) scores, and the (C,) classes they are of.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    names, index = np.unique(classes, return_inverse=True)
    centre, spread = given.mean(0), given.std(0)
    spread = np.where(spread > 0, spread, 1)
    x, target = (given - centre) / spread, np.eye(len(names))[index]
    shape = (x.shape[1] + 1, len(names))

    def loss(flat: Floats) -> tuple[float, Floats]:
        w = flat.reshape(shape)
        scores = x @ w[:-1] + w[-1]
        log_p = scores - logsumexp(scores, axis=1, keepdims=True)
        off = np.exp(log_p) - target
        slope = np.concatenate([x.T @ off + penalty * w[:-1], off.sum(0, keepdims=True)])
        return float(-(log_p * target).sum() + penalty / 2 * (w[:-1] ** 2).sum()), slope.ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-6})
    w = found.x.reshape(shape)
    return np.asarray((asked - centre) / spread @ w[:-1] + w[-1], dtype=np.float64), names


def _states(subject: Subject, loaded: Loaded, examples: Sequence[Example], place: int) -> dict[int, Floats]:
    """Layer -> (R, D): states at the position before each answer's first target (0) or before its last (−1)."""
    import torch

    from llm_unlearn.evaluation.likelihood import gathered
    from llm_unlearn.models.scores import Scorer

    layers, scorer = tuple(range(_depth(loaded))), Scorer(loaded.model)
    mine: list[tuple[int, Floats]] = []  # (layers, D) each
    with torch.no_grad(), subject.accelerator.autocast():
        for chosen, batch in batches(examples, subject):
            ends = np.cumsum([one.targets for one in batch.examples])
            at = batch.at[torch.as_tensor(ends - 1 if place else ends - [one.targets for one in batch.examples])]
            states = scorer(batch.input_ids, at, layers)
            mine.extend(zip(chosen, torch.stack([states[layer] for layer in layers], 1).double().cpu().numpy(), strict=True))
    return dict(zip(layers, np.stack(gathered(mine, len(examples)), 1), strict=True))


@spec
class ActivationPatching:
    """The attacked model's h_l in place of the original's at the answer positions: the drop in the original's mean log p per answer
    token, layer by layer (after 2605.24614; which positions and that only one layer is patched at a time are derived here).

    0 where the layer still carries what the original reads from it; large from the layer on where the knowledge was removed. A
    model trained apart from the original has states of its own kind: a large drop there says nothing.
    """

    name: Literal["activation_patching"] = "activation_patching"
    set: str = "forget"
    """The set whose answers are scored."""

    x: ClassVar[Axis] = Axis("decoder layer")
    y: ClassVar[Gain] = Gain(
        "drop in log p per answer token when this layer is patched into the original (nats)", "lowers", against_control=False
    )

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "activation patching"

    def __call__(self, subject: Subject) -> Curve:
        examples, (loaded, original) = answers_of(subject, self.name, self.set), with_original(subject, self.name)
        sizes = [(_depth(one), int(one.causal.config.get_text_config().hidden_size)) for one in (loaded, original)]
        if sizes[0] != sizes[1]:
            raise Refused(f"{self.name}: depth or hidden size of the attacked model and the original differ.")
        whole, patched = patch(subject, loaded, original, examples, [(layer,) for layer in range(sizes[0][0])])
        drops = [whole.logp - one.logp for one in patched]
        largest = int(np.argmax([drop.mean() for drop in drops]))
        return curve_of(
            range(len(drops)), drops, {"largest at layer": float(largest), "log p of the original": float(whole.logp.mean())}
        )


def patch(
    subject: Subject, giver: Loaded, taker: Loaded, examples: Sequence[Example], wanted: Sequence[tuple[int, ...]]
) -> tuple[Reading, list[Reading]]:
    """The taker as it is, and with the giver's outputs of each wanted group of layers at the answer positions."""
    import torch

    from llm_unlearn.models.scores import Scorer, head_of
    from llm_unlearn.objectives.views import TOP

    source, scorer, head = Scorer(giver.model), Scorer(taker.model), head_of(taker.model)
    layers = tuple(sorted({layer for group in wanted for layer in group}))
    parts: list[list[tuple[list[int], Reading]]] = [[] for _ in range(len(wanted) + 1)]
    with torch.no_grad(), subject.accelerator.autocast():
        for chosen, batch in batches(examples, subject):
            given = source(batch.input_ids, batch.at, layers)
            for part, group in zip(parts, ((), *wanted), strict=True):
                swap = {layer: given[layer] for layer in group}
                states = scorer(batch.input_ids, batch.at, swap=swap)[TOP]
                part.append((chosen, reading_of(states, head, batch)))
    whole, *patched = (joined(part, len(examples)) for part in parts)
    return whole, patched
