"""Run by test_window.py on several processes: gradients of one window through DistributedDataParallel, saved by every rank."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_llama
from test_window import PROCESSES, gradients_of, make_adapted, make_job, weights_of

from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.models.trials import freeze_unreached
from llm_unlearn.objectives.views import TOP
from llm_unlearn.training.before import reference_of
from llm_unlearn.training.window import Model, Window

accelerator = Accelerator(cpu=True)
for name, (loss, kept) in PROCESSES.items():
    model, job = make_adapted(lambda: make_llama(num_hidden_layers=3), True), make_job(loss, 60, kept)
    layers = tuple(sorted({layer for read in job.layers.values() for layer in read}))
    if TOP not in layers:
        freeze_unreached(model, layers)
    scorer, head = Scorer(model), head_of(model)
    reference = reference_of(job, scorer, head, accelerator, 64)
    wrapped = accelerator.prepare(scorer)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    Window(job, 0, accelerator).backward(job.terms, weights_of(job), Model(wrapped, scorer, head, reference))
    torch.save(gradients_of(model), Path(sys.argv[1]) / f"{name}.{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
