"""Run by test_window.py on several processes: one window's gradient through DistributedDataParallel, saved by every rank."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_llama
from test_window import NPO, make_adapted, make_job

from llm_unlearn.models.load import trainable
from llm_unlearn.models.reference import reference_of
from llm_unlearn.models.scores import Scorer, head_of
from llm_unlearn.training.loop import Window

accelerator = Accelerator(cpu=True)
model, job = make_adapted(make_llama, True), make_job(NPO(), 60)
scorer, head = Scorer(model), head_of(model)
reference = reference_of(scorer, head, job.needs, [], 64, accelerator.device)
wrapped = accelerator.prepare(scorer)
assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
Window(job, 0, accelerator).backward(wrapped, head, reference, False)
gradient = torch.cat([weight.grad.flatten() for weight in trainable(model).values() if weight.grad is not None])
torch.save(gradient, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
