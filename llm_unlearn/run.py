"""A recipe becomes a run folder, straight down the page: load, look, train, save, look again, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from llm_unlearn import durable
from llm_unlearn import folder as run_folder
from llm_unlearn.at_work import at_work, claim, turn
from llm_unlearn.bases import folder_of, resolve_base
from llm_unlearn.compatibility.models import check_columns
from llm_unlearn.data.capacity import Capacity
from llm_unlearn.data.reading import Examples, read_examples, summary
from llm_unlearn.data.schedule import Schedule, build, poisson
from llm_unlearn.evaluation.likelihood import Control
from llm_unlearn.evaluation.numbers import numbers
from llm_unlearn.evaluation.suite import Suite
from llm_unlearn.look import Encoded, Look, Looks, Seen, attacked
from llm_unlearn.methods.combination import Combination
from llm_unlearn.methods.contrast import ADAPTER
from llm_unlearn.methods.registry import Edit
from llm_unlearn.models import combined, fila
from llm_unlearn.models.adapter_files import save_adapter
from llm_unlearn.models.given import check_place
from llm_unlearn.models.kernels import put_in
from llm_unlearn.models.load import Loaded, add_adapter, causal, dtype_of, load, read_tokenizer, trainable
from llm_unlearn.models.outline import check_outline, outline_of
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.models.sharded import is_sharded, state_of
from llm_unlearn.models.trainable_weights import choose_weights, router_facts
from llm_unlearn.models.trials import check_same
from llm_unlearn.objectives.terms import stream_of
from llm_unlearn.recipe import Recipe
from llm_unlearn.report.columns import write_columns
from llm_unlearn.results import flattened, publish, results_of, run_facts
from llm_unlearn.sections import Evaluation, Model, another
from llm_unlearn.spec import Refused
from llm_unlearn.training import secret, sharded
from llm_unlearn.training.before import Shelf
from llm_unlearn.training.certified import certified_by
from llm_unlearn.training.checkpoint import snapshot
from llm_unlearn.training.edits import edit
from llm_unlearn.training.fisher import fisher, some
from llm_unlearn.training.guard import Outcome, aim_of
from llm_unlearn.training.job import Job
from llm_unlearn.training.loop import check, train
from llm_unlearn.training.privacy import mechanism
from llm_unlearn.training.tracking import tell_numbers, tracked


def run(
    recipe: Recipe, suite: Suite | None, *, cache: Path, resume: bool = False, overwrite: bool = False, retrained: str | None = None
) -> Outcome:
    """Carry out a recipe on the processes that are there. `folder.check` has said that it may.

    Args:
        suite: what to measure before and after; None measures nothing.
        cache: folder for the embedded models and for tables that were computed before.
        retrained: the model that never saw the forget set, where recipe or suite name another (`retrained.py`).

    Raises:
        Refused: something the recipe names cannot be used. The run folder is not touched before the data has been read.
    """
    began, folder, whole = time.perf_counter(), Path(recipe.output), recipe.model.adapter is None
    accelerator = start(recipe.model)
    sharded.check(recipe)
    seen, controls, encoded = dict[str, Seen](), dict[str, Control](), Encoded()
    model_before, main = resolve_base(recipe.model, cache), accelerator.is_main_process
    capacity, quantization = check_outline(recipe, outline_of(model_before), accelerator.device)
    examples = read_examples(recipe.data, read_tokenizer(model_before), recipe.seed, cache, quiet=not main, capacity=capacity)
    key = secret.key_of(recipe.drawn_openly, recipe.seed, folder, resume)
    job = make_job(recipe, examples, key, lambda name: folder_of(name, cache))
    if suite and (control := retrained or (recipe.evaluation.retrained if recipe.evaluation else None) or suite.retrained):
        # before the model itself, so that a control that cannot be loaded is said before hours of training
        without = resolve_base(another(recipe.model, control), cache)
        other = load(without, accelerator.device)
        first = Look(suite, other, accelerator, cache, leave=controls, encoded=encoded)
        seen["retrained"] = first.seen(other, control, control, without)
        job = replace(job, aim=aim_of(job, other.model, accelerator))
        del first, other
    elif recipe.train.stop and recipe.train.stop.until == "retrained":
        raise Refused("train.stop.until: compares with the retrained model, and neither evaluation nor its suite names one.")
    loaded = load(model_before, accelerator.device, train=True)
    check(job, loaded.model)
    look = Look(suite, loaded, accelerator, cache, controls, encoded=encoded) if suite else None
    _begin(recipe, job, examples, capacity, accelerator, resume, overwrite)
    with at_work(folder, job.schedule.steps, accelerator.is_main_process) as ended, tracked(recipe, accelerator):
        if look:
            seen["before"] = look.seen(loaded, "the model before", recipe.model.base, model_before)

        model = prepare(loaded.model, recipe.model, job, accelerator)
        along, kept = _along(look, loaded, model, recipe, folder), Shelf(cache / "reference", loaded.identity)
        with sharded.spread():
            outcome, combination = _carry_out(recipe, job, model, accelerator, folder, resume, along, kept)
            if outcome.status == "interrupted":
                ended.append("interrupted")
                return outcome
            saved = save(model, loaded, folder, whole=whole, accelerator=accelerator, combination=combination)
        facts = run_facts(recipe, outcome, accelerator, began, sum(weight.numel() for weight in trainable(model).values()))
        facts |= router_facts(model) | {"quantization": quantization and quantization.text}
        facts |= secret.spent(job.noisy, folder, outcome.kept, main)

        if look and suite and recipe.evaluation:
            after = _become(loaded, model, combination, saved, whole)
            again = (another(model_before, str(saved)), None) if whole else (model_before, str(saved))
            del along, loaded, model
            after = after or load(again[0], accelerator.device, again[1])
            seen["after"] = look.seen(after, "the model after", str(folder), *again)
            del after  # an attack needs the memory
            _conclude(suite, seen, accelerator, cache, folder, str(folder), recipe.evaluation, facts)
        _end(folder, accelerator, outcome.broken)
        return outcome


def _begin(
    recipe: Recipe, job: Job, examples: Examples, capacity: Capacity, accelerator: Accelerator, resume: bool, overwrite: bool
) -> None:
    """The run folder, from which on there is a run; one process makes it and says what was read.

    Raises:
        Refused: another process has begun a run there, or has finished this one, since it was looked at.
    """
    folder = Path(recipe.output)
    if accelerator.is_main_process:
        with turn(folder):
            if run_folder.check(recipe, resume, overwrite):
                raise Refused(f"output: another process has finished the run in {folder} meanwhile. Nothing was changed.")
            if overwrite:
                run_folder.clear(folder)
            run_folder.write(folder / run_folder.RECIPE, flattened(recipe))
            claim(folder)
        secret.begin(job.noisy, folder)
        print("\n".join(summary(examples, capacity)))
    accelerator.wait_for_everyone()


def _end(folder: Path, accelerator: Accelerator, broken: bool) -> None:
    """Nothing is left of what was under way. An unmeasured run vouches for its files now; others did with their numbers."""
    if accelerator.is_main_process:
        if not (folder / run_folder.HASHES).is_file():
            run_folder.seal(folder, broken=broken)
        run_folder.tidy(folder)
    accelerator.wait_for_everyone()


def _carry_out(
    recipe: Recipe,
    job: Job,
    model: Any,
    accelerator: Accelerator,
    folder: Path,
    resume: bool,
    along: Callable[[int], None] | None,
    shelf: Shelf,
) -> tuple[Outcome, Combination | None]:
    """Move the weights: step by step against a loss, or once by an edit, which may combine their logits with the base's."""
    if not isinstance(recipe.method, Edit):
        return train(job, model, accelerator, folder, resume=resume, look=along, shelf=shelf), None
    outcome, influences, combination = edit(recipe.method, job, model, accelerator, folder, resume=resume)
    if influences and accelerator.is_main_process:
        write_columns(influences, folder / run_folder.INFLUENCES)
    return outcome, combination


def _become(loaded: Loaded, model: Any, combination: Combination | None, saved: Path, whole: bool) -> Loaded | None:
    """What is looked at after the training: the model in memory; None where it is sharded, and is to be read again whole."""
    if is_sharded(model):
        return None
    return loaded.become(combined.combine(causal(model), combination) if combination else model, saved, whole)


def evaluate(
    suite: Suite, suite_name: str, asked: Mapping[str, tuple[Model, str | None] | Loaded], *, cache: Path,
    output: Path | None,
    show: bool = True, texts: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Run a suite on models that are there.

    Args:
        asked: "before" | "after" | "model" | "retrained" -> model and adapter, or a model that is there, in the order of the table.
        output: folder for `evaluation.json`, `evaluation.parquet` and `report.html`; None keeps nothing.
        show: print the table.
        texts: keep questions and answers, too.

    Returns:
        What `evaluation.json` says; on processes but the first, nothing.
    """
    check_columns(asked, suite, cache)
    named = [one[0] for one in asked.values() if not isinstance(one, Loaded)]
    accelerator = start(named[0] if named else Model(base="", adapter=None))
    for one in asked.values():
        if isinstance(one, Loaded):
            check_place(one, accelerator.device)
    seen = Looks(suite, accelerator, cache)(asked)
    kept = Evaluation(suite=suite_name, texts=None if texts else False)
    results = _conclude(suite, seen, accelerator, cache, output, suite_name, kept, show=show)
    accelerator.wait_for_everyone()
    return results


def _conclude(
    suite: Suite, seen: Mapping[str, Seen], accelerator: Accelerator, cache: Path, folder: Path | None, title: str,
    named: Evaluation, facts: dict[str, Any] | None = None, show: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The suite's attacks, and all that was found printed and kept.

    Args:
        title: of the page.
        named: the suite's name, and what must hold of the numbers.
        facts: of the run, if it was one; its log is drawn then.
    """
    attacks = attacked(suite, seen, accelerator, cache)
    if accelerator.is_main_process:
        results = results_of(suite, seen, attacks, title=title, named=named, run=facts)
        publish(results, suite, seen, folder, folder / run_folder.LOG if folder and facts else None, show)
        tell_numbers(accelerator, results["numbers"])
        return results
    return {}


def start(model: Model) -> Accelerator:
    """The processes that `accelerate launch` started, or this one; bf16 where the hardware computes in it."""
    sharded.check_launch()
    state = PartialState(cpu=not torch.accelerator.is_available())  # unasked, Accelerate runs every process alone on a CPU
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        raise Refused("the processes that were launched did not find each other; start them with one of the files in launch/.")
    return sharded.make_accelerator("bf16" if dtype_of(model, state.device) == torch.bfloat16 else "no")


def make_job(recipe: Recipe, examples: Examples, key: bytes = b"", where: Callable[[str], str] = str) -> Job:
    """The examples of a recipe and the table that says which step sees which; a private run draws it from its key."""
    streams, privacy, stop = examples.streams, recipe.train.privacy, recipe.train.stop
    companions = {name: found.flat for name, found in examples.companions.items()}
    schedule, private = make_schedule(recipe, examples), None
    if privacy:
        sizes = {stream_of(term, name): len(streams[stream_of(term, name)]) for name, term in recipe.terms.items()}
        private = mechanism(privacy, sizes, recipe.window, schedule.steps, key)
        schedule = poisson(sizes, private.rates, key, schedule.steps)
    aim = stop.until if stop and isinstance(stop.until, float) else None
    certified = certified_by(recipe.method, schedule.steps, key, where)
    return Job(recipe.terms, {**streams, **companions}, schedule, recipe.train, recipe.seed, aim, private, certified)


def make_schedule(recipe: Recipe, examples: Examples) -> Schedule:
    companions = {name: found.counts for name, found in examples.companions.items()}
    sizes = {name: len(examples.streams[name]) for name in recipe.window}
    return build(sizes, recipe.window, recipe.seed, recipe.train.epochs, recipe.train.steps, companions)


def prepare(net: Any, wanted: Model, job: Job, accelerator: Accelerator) -> Any:
    """The model with what is to be trained of it: an adapter, or all or some of its weights; and its kernels."""
    if wanted.kernels:
        check_same(net, lambda: put_in(net), "model.kernels: liger {}; give kernels: null.")
    if not wanted.adapter:
        choose_weights(net, wanted.trainable)
        return net
    model = add_adapter(net, wanted.adapter, job.seed)
    if wanted.adapter.init == "fila":
        weights = fila.adapted_weights(model)
        trained = trainable(model).values()
        for weight in weights.values():
            weight.requires_grad_()
        scorer, head, rows = Scorer(model), head_of(model), {name: some(job.examples[name], 64, job.seed, "fila") for name in SIDES}
        forget, retain = (fisher(scorer, head, list(weights.values()), rows[name], accelerator) for name in SIDES)
        for weight in weights.values():
            weight.requires_grad_(any(weight is one for one in trained))
        fila.begin(model, dict(zip(weights, forget, strict=True)), dict(zip(weights, retain, strict=True)))
    return model


SIDES = ("forget", "retain")


def _along(look: Look | None, loaded: Loaded, model: Any, recipe: Recipe, folder: Path) -> Callable[[int], None] | None:
    """Evaluation every so many steps, one line of `evaluations.jsonl` each; None where none is wanted."""
    every = recipe.evaluation.every if recipe.evaluation else None
    if not look or not every:
        return None

    def at(step: int) -> None:
        if step % every == 0:
            tables = look(replace(loaded, model=model), f"step {step}", keep=False)
            if look.accelerator.is_main_process:
                path = folder / run_folder.ALONG
                rows = [row for row in run_folder.steps_in(path) if row["step"] < step]  # a resumed run passes some steps again
                rows.append({"step": step, "numbers": numbers(look.suite, {"after": tables})})
                tell_numbers(look.accelerator, rows[-1]["numbers"], step)
                run_folder.write(path, "".join(json.dumps(row) + "\n" for row in rows))

    return at


def save(
    model: Any, loaded: Loaded, folder: Path, *, whole: bool, accelerator: Accelerator, combination: Combination | None = None
) -> Path:
    """Write the adapter, with what it is combined to, or the whole model with its tokenizer, into the run folder."""
    final = folder / (run_folder.MODEL if whole else run_folder.ADAPTER)
    weights = (state_of(model) if whole else snapshot(model)) if is_sharded(model) else None  # of all processes
    if accelerator.is_main_process:
        with durable.whole(final) as unfinished:
            if fila.begun(model):
                fila.save(model, unfinished)
            elif whole:
                model.save_pretrained(str(unfinished), state_dict=weights)
            else:
                save_adapter(model, unfinished / ADAPTER if combination else unfinished, weights)
            if combination:
                combined.write(combination, unfinished)
            if whole:
                loaded.tokenizer.save_pretrained(str(unfinished))
    accelerator.wait_for_everyone()
    return final
