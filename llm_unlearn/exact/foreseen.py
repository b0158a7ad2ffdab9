"""What a run in pieces will train, and what its deletion will cost, known before anything is trained; and afterwards in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_unlearn.data.capacity import Capacity
from llm_unlearn.exact.manifest import new_manifest
from llm_unlearn.exact.pieces import Wanted, wanted
from llm_unlearn.exact.rows import read_known
from llm_unlearn.methods.exact import S3T, Exact
from llm_unlearn.recipe import Recipe


def foreseen(recipe: Recipe, method: Exact, tokenizer: Any, capacity: Capacity) -> list[str]:
    """Lines of a plan. Which piece a deletion makes stale follows from the rows' ids, so the cost is no estimate."""
    known = read_known(recipe, method, tokenizer, capacity)
    manifest = new_manifest(recipe, "", 1, {}, list(known))
    first = _flat(wanted(recipe, method, manifest, known))
    kept = {id: one for id, one in known.items() if not one.asked}
    after = _flat(wanted(recipe, method, manifest, kept))
    there = {one.piece.key for one in first}
    stale = [one for one in after if one.piece.key not in there] if method.retrains else []
    sizes: dict[str, int] = {}
    for one in first:
        sizes[one.line.name] = sizes.get(one.line.name, 0) + len(one.stage.rows)
    deleted, examples = len(known) - len(kept), sum(len(one.examples) for one in known.values())
    full, cost = sum(one.seen for one in after), sum(one.seen for one in stale)
    expected = f"the formula expects {100 * method.expected(deleted, sizes):.1f} %"
    largest, smallest = max(sizes.values()), min(sizes.values())
    before, again = (sum(one.schedule.steps for one in some) for some in (first, stale))
    lines = [
        f"rows       {len(known)} ids, {examples} examples; {deleted} of them are deleted in this run",
        f"pieces     {len(first)} in {len(sizes)} lines, of {smallest} to {largest} rows",
        f"steps      {before} optimizer steps with all rows, {again} for the deletion "
        f"({100 * cost / max(1, full):.1f} % of a full retrain; {expected})",
    ]
    if isinstance(method, S3T):
        kept_blocks = 100 * method.survivors()
        lines.append(f"budget     one later deletion leaves {kept_blocks:.0f} % of its shard's blocks, in expectation")
    if method.aggregate == "average" and (serving := len({one.line.group for one in first})) > 1:
        lines.append(f"serving    the mean of {serving} adapters' probabilities: the model runs {serving} times for every token")
    return lines


def _flat(chains: list[list[Wanted]]) -> list[Wanted]:
    return [one for chain in chains for one in chain]


def said(facts: Mapping[str, Any]) -> str:
    """A deletion's cost in words."""
    if "note" in facts:
        return str(facts["note"])
    return (
        f"deleted {facts['rows']} rows: {facts['retrained']} of {facts['serving']} pieces retrained"
        + (f", {facts['dropped']} dropped" if facts["dropped"] > 0 else "")
        + f"; {facts['steps']} of {facts['full_steps']} steps, {facts['examples']} of {facts['full_examples']} examples "
        f"({100 * facts['share']:.1f} % of a full retrain; the formula expects {100 * facts['expected_share']:.1f} %), "
        f"{facts['seconds']:g} s"
    )
