"""What a published model's numbers do not say, in plain words: each limit follows from the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_unlearn.hub.facts import Facts
from llm_unlearn.report.verdict import columns_of


def of(told: Facts) -> Iterator[str]:
    """Each limit in a sentence or two; Markdown of our own words only."""
    yield from _of_the_measuring(told.results)
    yield from _of_the_attacks(told.results, told.kind)
    yield from _of_the_weights(told)
    yield "The numbers are the publisher's own, made with llm-unlearn; nobody else has checked them. See *Measure it again*."
    yield "The licence of the base model holds for what is made of it; this card states none."


def _of_the_measuring(results: Mapping[str, Any] | None) -> Iterator[str]:
    if not results:
        yield "Nothing was measured: nothing can be said of what it forgot, or of what else it lost."
        return
    columns = columns_of(results)
    if "retrained" not in columns:
        yield (
            "There was no retrained model to compare with. So it cannot be said whether it forgot as much as a model that never "
            "saw the rows, or too much, or whether it can be told that it once saw them."
        )
    if "before" not in columns:
        yield "It was not measured before: what it lost besides is not known."
    yield "What holds for these rows and these questions need not hold for the same facts in other words or in another language."


def _of_the_attacks(results: Mapping[str, Any] | None, kind: str) -> Iterator[str]:
    attacks = (results or {}).get("attacks") or ()
    if not attacks:
        yield (
            "No attack was tried. That a question is no longer answered does not mean that the answer is gone: relearning, "
            "quantization and other prompts have brought back what other models had unlearned."
        )
        return
    leaks = [one for one in attacks if one["gap"]["leaks"]]
    if leaks:
        count = "One attack brings" if len(leaks) == 1 else f"{len(leaks)} attacks bring"
        yield f"{count} back a part of what was forgotten (bold above)."
    if any(one["name"] == "adapter_removal" for one in leaks) and kind in ("adapter", "combination"):
        yield "Without the adapter it is there again, as measured above: only merged weights should have been released, or none."


def _of_the_weights(told: Facts) -> Iterator[str]:
    model = told.recipe["model"]
    if told.kind in ("adapter", "combination"):
        yield (
            "An adapter can be removed: whoever has the base model has the model that knows everything, and this repository takes "
            "nothing away from them."
        )
    if told.kind == "combination":
        yield "Its logits are made of those of several adapters. Plain peft loads one of them, which is another model."
    if told.kind == "merged":
        yield (
            "The numbers were taken with the adapter on its base. Merged weights compute the same up to rounding, and were not "
            "measured by themselves."
        )
    run = (told.results or {}).get("run") or {}
    if bits := model.get("quantize") or run.get("quantization"):
        other = "; on a base in full precision" if told.kind == "adapter" else ". These weights are in full precision, and so"
        yield f"It was trained and measured on a base in {bits}{other} its numbers differ."
    if model.get("chat_template"):
        yield "It was trained and measured in a chat template that is not published; in the tokenizer's own, its numbers differ."
    if model.get("trainable"):
        yield "Only some of the weights were trained; all others are those of the model before."
