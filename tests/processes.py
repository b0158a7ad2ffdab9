"""Run by slow tests on several real processes, so that DistributedDataParallel and gloo are in it: trains, and saves the result.

torchrun … processes.py FOLDER KIND …      # what each kind makes lies in FOLDER/KIND; one start for all of them
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_llama
from jobs import moved_by, rules

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes > 1


def every_rule(folder: Path) -> None:
    from test_gradients import a_job, a_model, cases

    if accelerator.is_main_process:
        rules("orthogonal", folder, make_llama)
    accelerator.wait_for_everyone()
    for case in cases():
        name, adapter = case.values
        model = a_model(make_llama, adapter)
        found = moved_by(a_job(name, folder, make_llama), model, folder / str(case.id), Accelerator(cpu=True))
        if accelerator.is_main_process:
            torch.save(found, folder / f"{case.id}.pt")


def budget(folder: Path) -> None:
    from test_weights import budget_job

    moved_by(budget_job(lr=2e-2), make_llama(), folder / "budget", accelerator)


def fila(folder: Path) -> None:
    from test_fila import Scorer as scorer_of
    from test_fila import begun, fisher, head_of, npo_and_kl, rows

    model = make_llama()
    importance = fisher(scorer_of(model), head_of(model), list(model.parameters()), rows("forget", 5, 1), accelerator)
    torch.save(importance, folder / f"fisher-{accelerator.process_index}.pt")
    found = moved_by(npo_and_kl(optimizer="sgd", lr=0.05), begun(make_llama), folder / "shared", Accelerator(cpu=True))
    if accelerator.is_main_process:
        torch.save(found, folder / "moved.pt")


def mixtures(folder: Path) -> None:
    from test_mixtures import ROUTED, adapted_mixture, routed_job

    for kind in ROUTED:
        found = moved_by(routed_job(2, optimizer="sgd", lr=0.05), adapted_mixture(kind), folder / kind, Accelerator(cpu=True))
        if accelerator.is_main_process:
            torch.save(found, folder / f"{kind}.pt")


def dose(folder: Path) -> None:
    from test_dose import processes_jobs, train, weights

    for name, wanted in processes_jobs().items():
        model = make_llama()
        outcome = train(wanted, model, Accelerator(cpu=True), folder / name)
        if accelerator.is_main_process:
            facts = (outcome.status, outcome.step, outcome.kept, outcome.reason)
            torch.save({"outcome": facts, "weights": weights(model)}, folder / f"{name}.pt")


def edits(folder: Path) -> None:
    from test_edits import edits_of_each_kind, told

    for name in edits_of_each_kind():
        found = told(name, make_llama(), folder)
        if accelerator.is_main_process:
            torch.save(found, folder / f"{name}.pt")


def privacy(folder: Path) -> None:
    from test_privacy import private_job, processes_models

    for name, make in processes_models(make_llama).items():
        found = moved_by(private_job(noise=0.01, optimizer="sgd"), make(), folder / f"shared-{name}", Accelerator(cpu=True))
        torch.save(found, folder / f"{name}-{accelerator.process_index}.pt")


def whitebox(folder: Path) -> None:
    from test_whitebox import found_by

    from llm_unlearn.embedded.target import make_tokenizer
    from llm_unlearn.models.scores import Scorer

    read, call = [0], Scorer.forward

    def counted(self: Scorer, ids: torch.Tensor, at: torch.Tensor, *more: object, **named: object) -> object:
        read.append(len(at))
        return call(self, ids, at, *more, **named)

    with patch.object(Scorer, "forward", counted):
        found = found_by(make_llama, make_tokenizer())
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps({"found": found, "read": sum(read)}))


def harness(folder: Path) -> None:
    from test_harness import ask, make_tokenizer, of_each_kind, written
    from test_harness import loaded as as_loaded

    if accelerator.is_main_process:
        written(folder)
    accelerator.wait_for_everyone()
    answered = ask(as_loaded(make_llama, make_tokenizer()), *of_each_kind(folder))
    torch.save(answered, folder / f"found-{accelerator.process_index}.pt")


def certified(folder: Path) -> None:
    from llm_unlearn import recipe
    from llm_unlearn.run import run

    run(recipe.load(folder / "recipe.yaml"), None, cache=folder)


def exact(folder: Path) -> None:
    from llm_unlearn import recipe
    from llm_unlearn.exact.forgetting import forget, run

    wanted = recipe.load(folder.parent / "shared" / "recipe.yaml")
    run(wanted, None, cache=folder)
    forget(Path(wanted.output), ["row3"], cache=folder)


def sharded(folder: Path) -> None:
    from test_sharded import as_launched, train_and_save

    with as_launched():
        train_and_save(folder, make_llama)


def golden(folder: Path) -> None:
    from golden import FILE, measured

    numbers = measured(json.loads(FILE.read_text(encoding="utf-8"))["rows"], accelerator=accelerator)
    if accelerator.is_main_process:
        (folder / "golden.json").write_text(json.dumps(numbers))


def before(folder: Path) -> None:
    from test_before import TAKEN, Shelf, counting, gradient, make_adapted

    shelf = Shelf(folder / "shelf", "this model")
    with counting() as taken:
        found = [gradient(TAKEN, make_adapted(make_llama, True), shelf, accelerator=accelerator) for _ in range(2)]
    torch.save({"taken": taken, "gradients": found}, folder / f"{accelerator.process_index}.pt")


def track(folder: Path) -> None:
    from test_track import trained

    trained(folder, make_llama, "tensorboard")


KINDS = {
    "rules": every_rule,
    "budget": budget,
    "fila": fila,
    "dose": dose,
    "edits": edits,
    "privacy": privacy,
    "whitebox": whitebox,
    "harness": harness,
    "certified": certified,
    "exact": exact,
    "golden": golden,
    "sharded": sharded,
    "before": before,
    "track": track,
    "mixtures": mixtures,
}

for kind in sys.argv[2:]:
    place = Path(sys.argv[1]) / kind
    place.mkdir(parents=True, exist_ok=True)
    KINDS[kind](place)
    accelerator.wait_for_everyone()
accelerator.end_training()
