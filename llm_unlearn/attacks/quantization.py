"""Quantization: rounding the weights may undo a small change of them."""

from __future__ import annotations

from typing import Literal

from llm_unlearn.attacks.asking import Asked, answers_of, curve_of, known
from llm_unlearn.attacks.finding import Axis, Curve, Gain, Subject
from llm_unlearn.spec import Refused, spec

BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0}


@spec
class Quantization:
    """Load the model in fewer bits and measure again: an update smaller than half a rounding step is rounded away, and with it
    what was forgotten (Zhang et al. 2024, 2410.16454). In the table, the best that the attacker finds among the formats."""

    name: Literal["quantization"] = "quantization"
    set: str
    """The set whose answers the attacker wants."""
    formats: tuple[Literal["int8", "nf4", "fp4"], ...] = ("int8", "nf4", "fp4")
    """What the weights are rounded to."""
    merged: bool = True
    """The adapter is merged into the weights before they are rounded, as a released model is; false: the base is rounded, and the
    adapter stays as it is."""
    measure: Asked = "probability"
    """What is measured; the notes have the other one, at the last point."""

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError("formats, each once")

    @property
    def title(self) -> str:
        return "quantization" if self.merged else "quantization under the adapter"

    @property
    def x(self) -> Axis:
        return Axis("weights", "bits", ("as it is", *self.formats), untouched=True)

    @property
    def y(self) -> Gain:
        return Gain(self.measure)

    def __call__(self, subject: Subject) -> Curve:
        from llm_unlearn.models.quantized import own_quantization

        loaded = subject.load()
        if kept := own_quantization(loaded.causal.config):
            raise Refused(f"the model is loaded in {kept.format} already; evaluate one in full precision.")
        asked = answers_of(subject.sets[self.set])
        bits = 8.0 * next(iter(loaded.model.parameters())).element_size()
        points = [(bits, known(loaded, asked, self.measure, subject))]
        del loaded
        for name in self.formats:
            points.append((BITS[name], known(subject.load(quantize=name, merged=self.merged), asked, self.measure, subject)))
        return curve_of(points, {f"{name}": one.value for name, (_, one) in zip(self.formats, points[1:], strict=True)})
