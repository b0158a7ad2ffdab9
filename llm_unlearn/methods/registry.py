"""The ways to forget that are not one loss: the union is what a recipe's `method`, the schema and the tests follow."""

from __future__ import annotations

from typing import Annotated

from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.dampening import Dampening, FisherNoise
from llm_unlearn.methods.exact import Exact
from llm_unlearn.methods.influence import Influence
from llm_unlearn.methods.noisy_finetune import NoisyFinetune
from llm_unlearn.methods.retrain import Retrain
from llm_unlearn.methods.task_vector import TaskVector
from llm_unlearn.spec import by_name

Edit = TaskVector | Dampening | FisherNoise | Influence | Contrast
"""One-shot edits of the weights, or of what is made of their logits (`methods/edits.py`)."""

AnyMethod = Annotated[Retrain | Edit | Exact | NoisyFinetune, by_name]
