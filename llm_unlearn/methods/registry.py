"""The ways to forget that are not one loss: the union is what a recipe's `method`, the schema and the tests follow."""

from __future__ import annotations

from typing import Annotated

from llm_unlearn.methods.noisy_finetune import NoisyFinetune
from llm_unlearn.methods.retrain import Retrain
from llm_unlearn.spec import by_name

AnyMethod = Annotated[Retrain | NoisyFinetune, by_name]
