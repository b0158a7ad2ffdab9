"""Forced routing: whether a mixture of experts has forgotten, or only sends tokens past the experts that know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llm_unlearn.attacks.finding import Axis, Gain
from llm_unlearn.attacks.rows import Reading, answers_of, batches, curve_of, joined, reading_of, with_original
from llm_unlearn.spec import Refused, spec

if TYPE_CHECKING:
    from llm_unlearn.attacks.finding import Curve, Subject

CHANGED, DISTANCE = "changed choices", "Jensen-Shannon distance of routers"


@spec
class ForcedRouting:
    """Run a mixture of experts with the original model's routing: at every token and router, the original's choice of experts and
    its gates in place of the model's own (the shortcut that GRIP, 2601.16905, describes; this measure of it is the project's own).

    What comes back was routed around, not removed from the experts. The notes say how far routing moved at the answer tokens: the
    share of tokens and routers whose set of experts changed, and the mean Jensen–Shannon distance (0 to 1) of the routers'
    distributions. A model trained apart has experts of its own order, so forcing mostly disturbs it.
    """

    name: Literal["routing"] = "routing"
    set: str = "forget"
    """The set whose answers are scored."""
    measure: Literal["probability", "first_choice"] = "probability"
    """Mean of exp(mean log p per token), or mean share of tokens that are the first choice."""

    x: ClassVar[Axis] = Axis("routing", ticks=("its own", "the original's"), untouched=True)

    @property
    def y(self) -> Gain:
        """Value on the y axis."""
        return Gain("probability" if self.measure == "probability" else "share of first choices")

    @property
    def title(self) -> str:
        """The name, with the settings that tell it from its like."""
        return "forced routing" if self.measure == "probability" else "forced routing, first choices"

    def __call__(self, subject: Subject) -> Curve:
        import torch

        from llm_unlearn.evaluation.likelihood import gathered
        from llm_unlearn.models.routing import Reader, distance, forced_routing, share_changed
        from llm_unlearn.models.scores import Scorer, head_of
        from llm_unlearn.objectives.views import TOP

        examples, (loaded, original) = answers_of(subject, self.name, self.set), with_original(subject, self.name)
        try:
            mine, theirs = Reader(loaded.model), Reader(original.model)
        except Refused:
            raise Refused(f"{self.name}: {type(loaded.causal).__name__} is no mixture of experts. Take the attack out.") from None
        scorer, head, moved = Scorer(loaded.model), head_of(loaded.model), list[tuple[int, tuple[float, float]]]()
        parts: list[list[tuple[list[int], Reading]]] = [[], []]
        with torch.no_grad(), subject.accelerator.autocast():
            for chosen, batch in batches(examples, subject):
                with mine.reading():
                    parts[0].append((chosen, reading_of(scorer(batch.input_ids, batch.at)[TOP], head, batch)))
                with theirs.reading(), forced_routing(loaded.model, original.model):
                    parts[1].append((chosen, reading_of(scorer(batch.input_ids, batch.at)[TOP], head, batch)))
                far = distance(mine.routing, theirs.routing, batch.at)
                changed = share_changed(mine.routing, theirs.routing, batch.at)
                columns = [
                    _by_row(one, batch.owner) for one in (far, torch.full_like(far, torch.nan) if changed is None else changed)
                ]
                moved.extend(zip(chosen, zip(*columns, strict=True), strict=True))
        readings = [joined(part, len(examples)) for part in parts]
        values = [one.probability if self.measure == "probability" else one.hits for one in readings]
        far, changed = np.array(gathered(moved, len(examples))).reshape(len(examples), 2).mean(0).tolist()
        return curve_of((1, 2), values, {DISTANCE: far, **({} if np.isnan(changed) else {CHANGED: changed})})

    def remark(self, curves: Mapping[str, Mapping[str, Any]], gap: Mapping[str, Any]) -> str:
        """Measure how far unlearning moved the routing, and whether the knowledge was only routed around."""
        notes = next((curves[name]["notes"] for name in ("after", "model") if curves.get(name, {}).get("notes")), None)
        if not notes:
            return ""
        share = f"{100 * notes[CHANGED]:.0f} % of the choices of experts have changed, " if CHANGED in notes else ""
        moved = f"At the answers, {share}Jensen–Shannon distance {notes[DISTANCE]:.2f}."
        return f"{moved} The knowledge is still in the experts and was routed around." if gap["leaks"] else moved


def _by_row(values: Any, owner: Any) -> list[float]:
    """(N,) means over the tokens of each row."""
    where = owner.cpu().numpy()
    found: list[float] = (np.bincount(where, values.cpu().numpy()) / np.bincount(where)).tolist()
    return found
