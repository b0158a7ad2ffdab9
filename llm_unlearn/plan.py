"""What a run will do, before it does anything: steps, examples and tokens per stream, trainable weights, peak memory. Writes
nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_unlearn import folder
from llm_unlearn.bases import describe_base, home_of, settings_of
from llm_unlearn.data.examples import Example
from llm_unlearn.data.reading import Examples, read_examples
from llm_unlearn.data.tokens import lengths_of, targets_of
from llm_unlearn.embedded import target
from llm_unlearn.exact.foreseen import foreseen
from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.edits import strengths_of
from llm_unlearn.methods.exact import Exact
from llm_unlearn.methods.registry import Edit
from llm_unlearn.models.experts import recorded_routers
from llm_unlearn.models.load import add_adapter, dtype_of, read_tokenizer, trainable
from llm_unlearn.models.outline import check_outline, outline_of
from llm_unlearn.models.quantized import Quantization
from llm_unlearn.models.reference import LOGPS
from llm_unlearn.models.scores import CHUNK
from llm_unlearn.models.trainable_weights import Group, adapted, choose_weights, frozen_routers, table, trained
from llm_unlearn.objectives.terms import Ramp, Term
from llm_unlearn.objectives.views import ROUTERS
from llm_unlearn.places import check_place
from llm_unlearn.recipe import Recipe, load
from llm_unlearn.run import make_job
from llm_unlearn.sections import Model
from llm_unlearn.source import is_recipe
from llm_unlearn.spec import readable
from llm_unlearn.training.before import choices
from llm_unlearn.training.dose import Stop
from llm_unlearn.training.job import Job
from llm_unlearn.training.room import STATES
from llm_unlearn.tree import locate

GIB = 1 << 30
LIBRARIES = 0.45 * GIB
"""Memory of a process that has imported torch, transformers and peft, and nothing else (measured on Linux)."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, in words and as plain data."""

    text: str
    facts: dict[str, Any]


def plan(recipe: Recipe, cache: Path, show_example: bool = False) -> Plan:
    """Return what a run will do. The model is built without weights; of a hub id, only its small files are read.

    Args:
        show_example: also show the first example of each stream as the model reads it, its targets marked.
    """
    check_place(Path(recipe.output), "output")
    tokenizer, net = skeleton_of(recipe.model, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capacity, quantization = check_outline(recipe, net, device)
    examples = read_examples(recipe.data, tokenizer, recipe.seed, cache, quiet=False, capacity=capacity)
    job = make_job(recipe, examples)
    base = sum(weight.numel() for weight in net.parameters())
    routing = sum(one.rows for one in recorded_routers(net)) if any(ROUTERS in one for one in job.layers.values()) else 0
    config = net.config.get_text_config()
    model = add_adapter(net, recipe.model.adapter, recipe.seed) if recipe.model.adapter else net
    if not recipe.model.adapter:
        choose_weights(net, recipe.model.trainable)
    moved = sum(weight.numel() for weight in trainable(model).values())

    lines = [f"{recipe.output}: {_kind(recipe, quantization)} on {recipe.model.base}, {recipe.hash}", ""]
    if stored := describe_base(recipe.model.base):
        lines.append(f"base       {stored['file']}, quantized to {stored['precision']}; converted to safetensors once")
    if isinstance(recipe.method, Exact):
        lines += foreseen(recipe, recipe.method, tokenizer, capacity)
    else:
        lines += _steps(recipe, job, examples)
    if examples.overlap:
        lines.append(f"overlap    {examples.overlap} retain rows also stand in the forget set and leave the retain set")
    lines.append(
        f"weights    {moved:,} trainable of {base + (moved if recipe.model.adapter else 0):,} ({100 * moved / base:.2f} %)"
    )
    changed, routers = adapted(model) or trained(model), frozen_routers(model)
    lines += _listed("adapted" if recipe.model.adapter else "trained", changed) + _listed("frozen", routers, FROZEN)
    lines += _reference(job, bool(recipe.model.adapter), config, dtype_of(recipe.model, device), base, routing)
    moves = recipe.train.offload is not None and device.type == "cuda"
    dtype = dtype_of(recipe.model, device)
    size_of = partial(memory, recipe, quantization, base, moved, config, job.longest, dtype, bool(job.needs))
    needed = size_of(offload=moves) | ({"Python and libraries": LIBRARIES} if device.type == "cpu" else {})
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
    if recipe.train.micro_batch:
        lines.append("batches    of as many tokens as fit into memory, found before the first step; below, of batch_tokens")
    lines.append(f"memory     about {sum(needed.values()) / GIB:.2f} GiB at the peak per process ({parts})")
    if moves:
        lines.append(
            f"offload    about {size_of(offload=False)['activations'] / GIB:.2f} GiB of CPU memory per process, for activations"
        )
    lines += _measures(recipe, cache) + [f"warning    {text}" for text in capacity.warnings(examples.streams)]
    facts = {
        "output": recipe.output,
        "recipe_hash": recipe.hash,
        "steps": None if isinstance(recipe.method, Exact) else job.schedule.steps,
        "examples": {name: len(found) for name, found in examples.streams.items()},
        "trainable": moved,
        "weights": base,
        "changed": [group.facts for group in changed],
        "frozen_routers": [group.facts for group in routers],
        "base": stored,
        "memory_bytes": {name: round(size) for name, size in needed.items()},
    }
    if show_example:
        shown = {name: _example(found[0], tokenizer) for name, found in job.examples.items() if len(found)}
        lines += [line for name, one in shown.items() for line in _marked(name, one)]
        facts["example"] = shown
    return Plan("\n".join(lines), facts)


def skeleton_of(model: Model, cache: Path) -> tuple[Any, Any]:
    """Return the tokenizer of a model, and the model without its weights; of a hub id only small files are read.

    Raises:
        Refused: they cannot be read.
    """
    if model.base.startswith("embedded:"):
        tokenizer = target.make_tokenizer()
        return tokenizer, target.make_model(len(tokenizer))
    model = settings_of(model, cache)
    return read_tokenizer(model), outline_of(model)


def _measures(recipe: Recipe, cache: Path) -> list[str]:
    """Return what the run is measured by, and what is there already."""
    lines = [f"measures   {recipe.evaluation.suite if recipe.evaluation else 'none'}"]
    lines += _made_on_first_use(recipe, cache)
    if Path(recipe.output).exists():
        lines.append(f"note       {recipe.output} exists already")
    return lines


FROZEN = "router; it stays as it is unless the recipe names it"


def _listed(title: str, groups: list[Group], note: str = "") -> list[str]:
    """Return one line for each kind of weights."""
    return [f"{'' if i else title:<10} {text}{f'  {note}' if note else ''}" for i, text in enumerate(table(groups))]


def _example(example: Example, tokenizer: Any) -> dict[str, Any]:
    """Return an example as text: its prompt and its targets, as the tokens decode."""
    whole, prompt = (str(tokenizer.decode(list(ids))) for ids in (example.ids, example.ids[: example.answer]))
    targets = whole[len(prompt) :] if whole.startswith(prompt) else str(tokenizer.decode(list(example.ids[example.answer :])))
    return {
        "row": example.id + 1,
        "prompt": prompt,
        "targets": targets,
        "tokens": len(example.ids),
        "target_tokens": example.targets,
    }


def _marked(stream: str, shown: dict[str, Any]) -> list[str]:
    """Return the lines that show an example, its targets between ⟦ and ⟧."""
    counts = f"row {shown['row']}, {shown['tokens']} tokens, {shown['target_tokens']} of them targets, marked ⟦ ⟧"
    text = f"{shown['prompt']}⟦{shown['targets']}⟧"
    return ["", f"example    {stream}: {counts}", *(f"  {readable(line)}" for line in text.split("\n"))]


def _made_on_first_use(recipe: Recipe, cache: Path) -> list[str]:
    """Return which models other recipes make, and whether the cache has them."""
    lines, control = [], recipe.evaluation.retrained if recipe.evaluation else None
    for title, name in (("retrained", control), ("base", recipe.model.base)):
        if name and is_recipe(name):
            there = (home_of(load(locate(name)), cache) / folder.MODEL).is_dir()
            lines.append(f"{title:<10} {name}: {'is in the cache' if there else 'is trained on first use, and kept in the cache'}")
    return lines


def _steps(recipe: Recipe, job: Job, examples: Examples) -> list[str]:
    """How often what is seen."""
    edit = recipe.method if isinstance(recipe.method, Edit) else None
    lines = []
    if not edit or edit.trains:
        lines.append(f"steps      {job.schedule.steps} optimizer steps of {_window(recipe)}; {_share(recipe)}")
    if edit:
        lines.append(f"strengths  {edit.knob} {', '.join(f'{strength:g}' for strength in strengths_of(edit))}")
    if isinstance(edit, Contrast):
        lines.append("serving    logits of the base and of an adapter, combined: the model runs 2 times for every token")
    if recipe.train.stop:
        lines.append(f"dose       {_nearest(recipe.train.stop) if edit else _dose(recipe.train.stop)}")
    if job.noisy:
        lines.append(job.noisy.said)
    for name in sorted(job.read, key=list(job.examples).index) if not edit or edit.trains else ():
        seen = job.schedule.seen(name)
        tokens = int(lengths_of(job.examples[name])[seen].sum())
        answer = int(targets_of(job.examples[name])[seen].sum())
        visits = int((job.schedule.stream == job.schedule.streams.index(name)).sum())
        dropped = examples.dropped.get(name, 0)
        note = f"; {dropped} dropped, no answer within max_tokens" if dropped else ""
        lines.append(
            f"{name:<10} {len(seen)} of {len(job.examples[name])} examples, {visits} visits; "
            f"{tokens} tokens, {answer} of them targets{note}"
        )
    return lines


READ: dict[tuple[int, ...], str] = {(LOGPS,): "log-probabilities", (ROUTERS,): "router logits"}


def _reference(job: Job, adapter: bool, config: Any, dtype: torch.dtype, base: int, routing: int) -> list[str]:
    """How the model as it was is asked, why, and what it costs."""
    size = torch.finfo(dtype).bits // 8
    lines: list[str] = []
    for stream, one in choices(job, adapter, int(config.hidden_size), size, routing).items():
        what = READ.get(one.asked.columns, "hidden states")
        often = f"each is seen {one.visits / max(1, one.tokens):.1f} times"
        if one.way == "kept":
            room = f"{one.bytes / GIB:.2f} GiB" if one.bytes >= GIB / 100 else f"{one.bytes / 1024:.0f} KiB"
            text = f"{what} of {len(one.examples)} answers taken once and kept, {one.tokens:,} tokens of one pass, {room}; {often}"
        elif one.way == "adapter_off":
            why = often if one.tokens >= one.visits else f"{what} would take {one.bytes / GIB:.1f} GiB"
            text = f"the adapter switched off, {one.visits:,} tokens of more forward passes in all; {why}"
        else:
            text = f"a second model in memory, {base * size / GIB:.2f} GiB, {one.visits:,} tokens of more forward passes in all"
        lines.append(f"{'reference' if not lines else '':<10} {stream}: {text}")
    return lines


def _aim(stop: Stop) -> str:
    aims = {"retrained": "as unlikely as to the retrained model", "holdout": "as unlikely as the holdout set", "None": ""}
    return aims.get(str(stop.until), f"at perplexity {stop.until}")


def _bounds(stop: Stop) -> list[str]:
    found = []
    if stop.budget.retain_accuracy is not None:
        found.append(f"{100 * stop.budget.retain_accuracy:g} % of retain accuracy is lost")
    if stop.budget.retain_perplexity is not None:
        found.append(f"retain perplexity is {stop.budget.retain_perplexity:g} times what it was")
    return found


def _nearest(stop: Stop) -> str:
    """Which strength of an edit is taken, in words."""
    wanted = f"that with which the forget set is most nearly {_aim(stop)}" if _aim(stop) else "the last"
    return ", ".join([f"of the strengths, {wanted}", *(f"before {bound}" for bound in _bounds(stop))])


def _dose(stop: Stop) -> str:
    """Where the run may end before its last step, in words."""
    ends = [*([f"the forget set is {aim}"] if (aim := _aim(stop)) else []), *_bounds(stop)]
    return f"ends where {', or '.join(ends)}; looked at every {stop.every} steps" if ends else "no bound"


def memory(
    recipe: Recipe, quantization: Quantization | None, base: int, moved: int, config: Any, longest: int, dtype: torch.dtype,
    reference: bool, offload: bool,
) -> dict[str, float]:  # fmt: skip
    """Estimated peak bytes of one process while it trains; attention is counted as memory-efficient.

    Weights, gradients and optimizer states follow from counts. Activations are those of a decoder layer with a gated
    feed-forward block, per token: 18 hidden + 4 intermediate vectors kept for the backward pass, and under an adapter in float32
    the inputs that peft makes float32 of a half-precision base's; one vector a layer with gradient checkpointing; those of the
    layer that is at work where the others lie on the CPU (`offload`). Logits are those of the tokens that are at work at once
    (`models/tokenwise.py`), and what a loss makes of them.
    """
    size = torch.finfo(dtype).bits // 8
    frozen = (quantization.bits / 8 if quantization else size) * base if recipe.model.adapter else 4.0 * base
    states = moved * (4 + STATES[recipe.train.optimizer]) + (4 * moved if recipe.model.adapter else 0)
    tokens = max(longest, min(recipe.train.batch_tokens, longest * sum(recipe.window.values())))
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, (list, tuple)) else int(inner)  # Gemma-3n has one for each layer
    layer = (18 * hidden + 4 * inner) * size + (4 * (6 * hidden + inner) if recipe.model.adapter and size < 4 else 0)
    kept = layers * hidden * size + layer if recipe.train.gradient_checkpointing else layers * layer
    kept = layer if offload else kept
    whole = any(term.loss.needs.policy == "logits" for term in recipe.terms.values())
    every = tokens * int(config.vocab_size)
    logits = 4.0 * (8 * min(CHUNK // 2, every) if whole else 2 * min(CHUNK, every))
    snapshot = 4.0 * moved if recipe.train.stop else 0.0
    second = {"second model": float(size * base)} if reference and recipe.train.reference == "copy" else {}
    return {
        "weights": frozen,
        **second,
        "gradients and optimizer": states + snapshot,
        "activations": float(tokens * kept),
        "logits": logits,
    }


def _kind(recipe: Recipe, quantization: Quantization | None) -> str:
    adapter = recipe.model.adapter
    how = f"LoRA of rank {adapter.rank}" if adapter else "full weights"
    losses = " + ".join(f"{_weight(term)} × {term.loss.name}({term.stream or name})" for name, term in recipe.terms.items())
    losses = f"{recipe.method.name}: {losses}" if recipe.method else losses
    return f"{losses}, {how}{f' over {quantization.text}' if quantization else ''}"


def _weight(term: Term) -> str:
    moving = f"{term.weight.start:g}…{term.weight.end:g}" if isinstance(term.weight, Ramp) else f"{term.weight:g}"
    return f"({moving}, held at {term.budget.at_most:g})" if term.budget else moving


def _window(recipe: Recipe) -> str:
    return " + ".join(f"{size} {name}" for name, size in recipe.window.items())


def _share(recipe: Recipe) -> str:
    return "as many as asked" if recipe.train.steps else f"{recipe.train.epochs:g} epochs of the {next(iter(recipe.window))} set"
