"""What is asked of an audit: which recipes can be audited, where the outcome may be written, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.methods.exact import Exact
from llm_unlearn.methods.registry import Edit
from llm_unlearn.objectives.terms import stream_of
from llm_unlearn.places import check_place, no_way_out
from llm_unlearn.recipe import Recipe
from llm_unlearn.spec import Refused
from llm_unlearn.written import object_in

FILE = "privacy_audit.json"


@dataclass(frozen=True)
class Asked:
    """An audit that can be made."""

    recipe: Recipe
    streams: tuple[str, ...]
    """Those that the recipe learns by heart: where canaries may be put."""
    canaries: int
    guesses: int
    seed: int
    output: Path

    @property
    def key(self) -> dict[str, Any]:
        """What decides the outcome, but for the recipe's own secret."""
        return {"recipe": self.recipe.hash, "canaries": self.canaries, "guesses": self.guesses, "seed": self.seed}


def check(recipe: Recipe, *, canaries: int, guesses: int | None, seed: int, output: Path | None) -> Asked:
    """All that can be refused of a recipe before anything heavy is imported.

    Args:
        guesses: without it, half of the canaries.
        output: without it, the recipe's output and `_audit`.

    Raises:
        Refused: the recipe does not train on rows that it learns by heart, or the options do not fit.
    """
    if canaries < 2:
        raise Refused(f"--canaries: found {canaries}; expected at least 2: one guess in, one out.")
    guesses = max(2, canaries // 4 * 2) if guesses is None else guesses
    if guesses % 2 or not 2 <= guesses <= canaries:
        raise Refused(f"--guesses: found {guesses} with {canaries} canaries; expected an even number from 2 to {canaries}.")
    if isinstance(recipe.method, (Edit, Exact)):
        raise Refused(f"method: {recipe.method.name} does not train all its weights on all its rows; an audit asks for a training.")
    if recipe.train.stop and recipe.train.stop.until == "retrained":
        raise Refused("train.stop.until: an audit has no retrained model to compare with; add train.stop=null and train.steps=….")
    learnt = dict.fromkeys(stream_of(term, name) for name, term in recipe.terms.items() if term.loss.name == "nll")
    streams = tuple(one for one in learnt if not (recipe.sources[one].alternate or recipe.sources[one].contrast))
    if not streams:
        raise Refused(
            "objective: an audit reads which made-up rows were learnt, and nothing here is learnt by heart; expected a stream "
            "with loss nll, and without alternate and contrast."
        )
    return Asked(recipe, streams, canaries, guesses, seed, output or Path(f"{recipe.output}_audit"))


def held(asked: Asked, overwrite: bool) -> dict[str, Any] | None:
    """What a finished audit in the output folder found; None where there is none, one that goes on, or one to be replaced.

    Raises:
        Refused: the folder holds another audit, or something that is no audit at all.
    """
    output = asked.output
    check_place(output, "--output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / FILE).is_file():
        raise Refused(
            f"--output: {output} exists and is not an audit's folder (it has no {FILE}). Nothing was changed; choose another."
        )
    no_way_out(output)
    if overwrite:  # all that is in it is removed
        if not asked.key.keys() <= object_in(output / FILE, "choose another --output").keys():
            raise Refused(f"--output: {output / FILE} was written by no audit. Nothing was changed; choose another.")
        return None
    found = object_in(output / FILE, "add --overwrite to make the audit again")
    if other := [key for key, value in asked.key.items() if found.get(key) != value]:
        raise Refused(
            f"--output: {output} holds an audit with another {', '.join(other)}. Nothing was changed; add --overwrite to replace "
            "it, or choose another."
        )
    return found if "verdict" in found else None


def said(found: Mapping[str, Any], output: Path) -> str:
    """What an audit found, for the terminal."""
    lines = [f"canaries   {found['inserted']} of {found['canaries']} made-up rows were put into {found['stream']}"]
    if claimed := found["claimed"]:
        rate = f"a row enters a step with probability {claimed['sampling_rate']:.3g}"
        lines.append(f"claimed    ε {claimed['epsilon']:.3g} at δ {found['delta']:g} by the recipe as it stands ({rate})")
        here = found["claimed_of_canaries"]
        rate = f"one of them enters a step with probability {here['sampling_rate']:.3g}"
        lines.append(f"           ε {here['epsilon']:.3g} of a canary in this run ({rate})")
    lines += [
        f"guesses    {found['right']} of {found['guesses']} were right",
        f"refuted    ε below {found['refuted_epsilon']:.3g} (had all been right: {found['refutable_epsilon']:.3g})",
        found["verdict"],
        f"written    {output / FILE}",
    ]
    return "\n".join(lines)
